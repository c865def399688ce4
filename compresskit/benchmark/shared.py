"""What the cells of a benchmark share, read once: checkpoints, tasks, texts, statistics."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from compresskit.benchmark import keys, quality
from compresskit.benchmark.baselines.registry import find
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.keys import Ground
from compresskit.benchmark.machine import git_state, hardware, host, versions
from compresskit.benchmark.provenance import MadeBy, digest
from compresskit.benchmark.rows import Cell, is_tuned
from compresskit.calibration.statistics import Calibration, calibrate
from compresskit.data.corpus import Corpus, Part
from compresskit.data.units import LANGUAGE, find_corpora
from compresskit.errors import InputError
from compresskit.model import checkpoint as checkpoints
from compresskit.model import identity
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.positions import check_length, positions
from compresskit.model.sentence_vectors import SentenceModel, read_sentence_model, reader_of_text
from compresskit.model.tokenizer import find_tokenizer
from compresskit.tasks.declaration import Task
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.rows import TaskData
from compresskit.training.data import DEFAULT_LENGTH


def _content(entry: str) -> dict[str, str]:
    """What the model of a baseline is made of beside the dense one, as hashes."""
    baseline, argument = find(entry)
    return dict(baseline.content(argument))


class Shared:
    """Everything that is read for a grid. Raises InputError where something is missing, before any cell runs."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._corpora = find_corpora(grid.text, grid.fields, grid.unit)
        # Instances are few and live as long as the benchmark.
        self.identity = cache(self._identity)
        self.tokenizer = cache(self._tokenizer)
        self.reader = cache(self._reader)
        self.task = cache(self._task)
        self.passages = cache(self._passages)
        self.encoded = cache(self._encoded)
        # Large (an n x n moment for every layer), and cells come task by task: not for longer than they are needed.
        self.statistics = lru_cache(2)(self._statistics)
        self.task_statistics = lru_cache(2)(self._task_statistics)
        self.text_record = cache(self._text_record)
        self.content = cache(_content)

    def cells(self) -> list[Cell]:
        """Every cell of the grid with its key. Raises InputError: two rows would have one name."""
        grid = self.grid
        machine = None if grid.any_machine else host(hardware())
        found = []
        for row in grid.rows():
            ground = Ground(self.identity(row.model), self.text_record(), versions(), machine)
            task = ""
            if row.task is not None:
                declared, data = self.task(row.task)
                task, plain = declared.name, declared.model_dump(mode="json", exclude_defaults=True)
                ground = replace(ground, task=plain, data=data.record())
            if row.baseline:
                ground = replace(ground, content=self.content(row.baseline))
            settings = keys.settings(row, grid, ground)
            model = ground.model["name"].rpartition("/")[2]
            found.append(
                Cell(
                    model=model,
                    origin=row.model,
                    method=row.name,
                    recipe=row.recipe,
                    ratio=row.ratio,
                    task=row.task,
                    task_name=task,
                    seed=row.seed,
                    key=digest(settings),
                    start=keys.start(row, grid, settings, model, task),
                    baseline=row.baseline,
                    variant=row.variant,
                    tuned=row.tuned,
                )
            )
        rows = [(cell.model, cell.method, cell.ratio, cell.task_name, cell.seed) for cell in found]
        if twins := [row for row in rows if rows.count(row) > 1]:
            what = ", ".join(str(part) for part in twins[0][:4] if part)
            raise InputError(f"two rows would be called {what}: give models, recipes and tasks different names")
        return found

    def check(self) -> None:
        """Refuse what no cell could do: no tokenizer, too little text, too few positions."""
        grids = [self.grid.of(task, name) for name in ("", *self.grid.variants) for task in (None, *self.grid.tasks)]
        usual_length = (
            0 if self.grid.unit else DEFAULT_LENGTH
        )  # texts with vectors are as long as the model's folder says
        asked = [0, *(g.stage("general")["max_length"] or usual_length for g in grids if g.general is not False)]
        for task in self.grid.tasks:
            if not is_tuned(task):
                continue
            usual = self.task(task)[0].max_length
            stages = [self.grid.of(task).stage("teacher")]
            stages += [self.grid.of(task, name).stage("task") for name in ("", *self.grid.variants)]
            asked += [stage["max_length"] or usual for stage in stages]
        for origin in self.grid.models or (None,):
            model = self.read_dense(origin).model
            self.tokenizer(origin)
            check_length(model, max(asked))
            if not self.grid.tasks:
                self.passages(origin)

    def read_dense(self, origin: str | None) -> Checkpoint:
        """The pre-trained checkpoint, freshly read: a cell may change it."""
        return checkpoints.read(origin)

    def corpora(self, part: Part) -> tuple[Corpus, ...]:
        """The texts of stage 1, or a part of each."""
        return tuple(replace(corpus, part=part) for corpus in self._corpora)

    def corpus(self, part: Part) -> Corpus:
        """The first of them, for calibration and for quality without labels."""
        return self.corpora(part)[0]

    def made_by(
        self, cell: Cell, made: Mapping[str, Any] | None = None, trained: Mapping[str, Mapping[str, Any]] | None = None
    ) -> MadeBy:
        """All that is needed to do a cell again.

        Args:
            made: further fields, known once its model is made.
            trained: ``general`` or ``task_stage`` -> settings that were decided in training, in place of the grid's.
        """
        grid, done = self.grid.of(cell.task, cell.variant, cell.baseline), trained or {}
        fields: dict[str, Any] = {
            "model": self.identity(cell.origin),
            "recipe": cell.recipe.model_dump(mode="json", exclude_defaults=True) if cell.recipe is not None else None,
            "text": self.text_record(),
            "unit": grid.unit or None,
            **({"language": grid.language} if grid.language != LANGUAGE else {}),
            **({"max_texts": grid.max_texts} if grid.max_texts is not None else {}),
            "general": grid.stage("general") | dict(done.get("general", {})),
            "versions": versions() | dict(package.split(" ", 1) for package in keys.packages(cell) if " " in package),
            "hardware": hardware(),
            "git": git_state(),
        }
        if cell.task is not None:
            declared, data = self.task(cell.task)
            fields |= {
                "task": declared.model_dump(mode="json", exclude_defaults=True),
                "data": data.record(),
                "notes": data.notes,
            }
        if cell.tuned:
            fields |= {
                "teacher": grid.stage("teacher"),
                "task_stage": grid.stage("task") | dict(done.get("task_stage", {})),
            }
        return MadeBy.model_validate(fields | dict(made or {}))

    def _identity(self, origin: str | None) -> dict[str, Any]:
        read = checkpoints.read(origin)
        assert read.folder is not None
        return {"name": read.origin, "sha256": identity.of_folder(read.folder)}

    def _text_record(self) -> dict[str, Any] | list[dict[str, Any]]:
        first, *others = (corpus.record() for corpus in self._corpora)
        return [first, *others] if others else first

    def _tokenizer(self, origin: str | None) -> Any:
        return find_tokenizer(None, checkpoints.read(origin))

    def _reader(self, origin: str | None) -> Any:
        """What reads plain text."""
        return reader_of_text(checkpoints.read(origin), self.tokenizer(origin))

    def _task(self, name: str) -> tuple[Task, TaskData]:
        declared = load_task(name)
        folder = None if self.grid.data is None else Path(self.grid.data)
        return declared, load_data(declared, folder, train=is_tuned(name))

    def _passages(self, origin: str | None, part: Part = "held-out") -> quality.Passages:
        """Those that quality is measured on; of the training part as many as maps between widths are fitted to."""
        limit = positions(self.read_dense(origin).model) or quality.PASSAGE
        found = quality.find_passages(self.corpus(part), self.reader(origin), min(quality.PASSAGE, limit))
        return found if part == "held-out" else found.spread()

    def _statistics(self, origin: str | None, part: Part, tokens: int) -> tuple[Calibration, float]:
        """The calibration, and the seconds that it took."""
        start = time.perf_counter()
        found = calibrate(self.read_dense(origin).model, self.reader(origin), self.corpus(part), tokens)
        return found, time.perf_counter() - start

    def _task_statistics(
        self, origin: str | None, task: str, teacher: Path, tokens: int, weigh: bool
    ) -> tuple[Calibration, float]:
        start = time.perf_counter()
        dense, tokenizer = checkpoints.read(teacher).model, self.tokenizer(origin)
        found = calibrate(dense, tokenizer, self.task(task)[1], tokens, weigh=weigh)
        return found, time.perf_counter() - start

    def vectors_of(self, folder: Path | None) -> SentenceModel | None:
        """How a model's vectors are made for quality without labels; None: the mean over the tokens."""
        return read_sentence_model(folder) if self.grid.unit else None

    def _encoded(self, origin: str | None, part: Part = "held-out") -> tuple[quality.Encoded, float]:
        """The passages through the teacher, and its own retrieval score."""
        passages = self.passages(origin, part)
        read = self.read_dense(origin)
        encoded = quality.encode(
            read.model.float().eval(), self.tokenizer(origin), passages, self.vectors_of(read.folder)
        )
        return encoded, quality.retrieval(encoded.vectors, passages.document)
