"""What the cells of a benchmark share, read once: checkpoints, tasks, texts, and the machine they run on."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from compresskit import __version__
from compresskit.benchmark import quality
from compresskit.benchmark.grid import Cell, Grid
from compresskit.benchmark.records import digest
from compresskit.calibration.statistics import Calibration, calibrate
from compresskit.data import corpus as corpora
from compresskit.data.corpus import Corpus, Part
from compresskit.decomposers import registry
from compresskit.errors import InputError
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.positions import check_length, positions
from compresskit.model.tokenizer import find_tokenizer
from compresskit.planning.recipe import Recipe
from compresskit.storage.files import file_hash
from compresskit.tasks.declaration import Task
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.rows import TaskData
from compresskit.training.data import DEFAULT_LENGTH

_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "numpy", "scipy")


class Sources:
    """Everything that is read for a grid. Raises InputError where something is missing, before any cell runs."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._texts = corpora.find_corpus(grid.text)
        # Instances are few and live as long as the benchmark.
        self.identity = cache(self._identity)
        self.tokenizer = cache(self._tokenizer)
        self.task = cache(self._task)
        self.passages = cache(self._passages)
        self.encoded = cache(self._encoded)
        # Large (an n x n moment for every layer), and cells come task by task: not for longer than they are needed.
        self.statistics = lru_cache(2)(self._statistics)
        self.task_statistics = lru_cache(2)(self._task_statistics)
        self._text_record = cache(self._texts.record)

    def cells(self) -> list[Cell]:
        """Every cell of the grid with its key."""
        grid, machine = self.grid, host()
        found = []
        for origin, task, method, recipe, ratio, seed in grid.rows():
            everything: dict[str, Any] = {
                "model": self.identity(origin),
                "method": method,
                "recipe": _plain(recipe) if recipe is not None else None,
                "methods": registry.sources(rule.method for rule in recipe.rules) if recipe is not None else [],
                "ratio": ratio,
                "seed": seed,
                "first seed": grid.of(task).seeds[0],
                "text": self._text_record(),
                **({} if grid.any_machine else {"host": machine}),
                "versions": versions(),
                "general": grid.stage("general"),
            }
            own = method not in ("dense", "int8")
            shared: dict[str, Any] = {}
            if grid.share_general and own:
                everything["share general"] = True
                shared = everything | {"first seed": grid.seeds[0], "precision": grid.precision}
            if task is not None:
                declared, data = self.task(task)
                everything |= {
                    "task": declared.model_dump(mode="json"),
                    "data": data.record(),
                    "stages": [grid.of(task).stage("teacher"), grid.of(task).stage("task")],
                }
            if grid.students_from == "teacher" and own:
                everything["students from"] = grid.students_from
                if recipe is not None and recipe.calibration_tokens and recipe.by_error:
                    everything["weighed by"] = "predictions"  # matrices in plans; before, they counted alike
                shared = everything
            name = self.identity(origin)["name"].rpartition("/")[2]
            task_name = self.task(task)[0].name if task is not None else ""
            start = ""
            if shared:
                of_task = task_name if grid.students_from == "teacher" else ""
                first = digest({k: v for k, v in shared.items() if k != "seed"})
                parts = (name, method, f"{ratio:g}x" if ratio else "", of_task, first[:8])
                start = "-".join(part for part in parts if part)
            found.append(Cell(name, origin, method, recipe, ratio, task, task_name, seed, digest(everything), start))
        rows = [(cell.model, cell.method, cell.ratio, cell.task_name, cell.seed) for cell in found]
        if twins := [row for row in rows if rows.count(row) > 1]:
            what = ", ".join(str(part) for part in twins[0][:4] if part)
            raise InputError(f"two rows would be called {what}: give models, recipes and tasks different names")
        return found

    def check(self) -> None:
        """Refuse what no cell could do: no tokenizer, too little text, too few positions."""
        grid = self.grid
        for origin in grid.models or (None,):
            model = self.read_dense(origin).model
            self.tokenizer(origin)
            stages = [grid.stage("general")] if grid.general is not False else []
            stages += [grid.of(task).stage(what) for what in ("teacher", "task") for task in grid.tasks]
            tasks = [self.task(task)[0].max_length for task in grid.tasks]
            for stage in stages:
                check_length(
                    model, max([stage["max_length"] or DEFAULT_LENGTH, *(tasks if not stage["max_length"] else [])])
                )
            if not grid.tasks:
                self.passages(origin)

    def read_dense(self, origin: str | None) -> Checkpoint:
        """The pre-trained checkpoint, freshly read: a cell may change it."""
        return checkpoints.read(origin)

    def corpus(self, part: Part) -> Corpus:
        """The general text, or a part of it."""
        return Corpus(self._texts.name, self._texts.path, part)

    def made_by(self, cell: Cell) -> dict[str, Any]:
        """All that is needed to do a cell again."""
        grid = self.grid
        made: dict[str, Any] = {
            "model": self.identity(cell.origin),
            "recipe": cell.recipe.model_dump(mode="json", exclude_defaults=True) if cell.recipe is not None else None,
            "text": self._text_record(),
            "general": grid.stage("general"),
        }
        if cell.task is not None:
            declared, data = self.task(cell.task)
            made |= {
                "task": declared.model_dump(mode="json", exclude_defaults=True),
                "data": data.record(),
                "notes": list(data.notes),
                "teacher": grid.of(cell.task).stage("teacher"),
                "task_stage": grid.of(cell.task).stage("task"),
            }
        used = versions()
        for package in registry.sources(rule.method for rule in cell.recipe.rules) if cell.recipe is not None else ():
            if package != "compresskit":
                used |= dict([package.split(" ", 1)])
        return made | {"versions": used, "hardware": hardware(), "git": git_state()}

    def _identity(self, origin: str | None) -> dict[str, Any]:
        read = checkpoints.read(origin)
        assert read.folder is not None
        files = [*checkpoints.weight_files(read.folder), read.folder / "config.json"]
        return {"name": read.origin, "sha256": {file.name: file_hash(file) for file in files}}

    def _tokenizer(self, origin: str | None) -> Any:
        return find_tokenizer(None, checkpoints.read(origin))

    def _task(self, name: str) -> tuple[Task, TaskData]:
        declared = load_task(name)
        return declared, load_data(declared, None if self.grid.data is None else Path(self.grid.data))

    def _passages(self, origin: str | None) -> quality.Passages:
        limit = positions(self.read_dense(origin).model) or quality.PASSAGE
        return quality.find_passages(self.corpus("held-out"), self.tokenizer(origin), min(quality.PASSAGE, limit))

    def _statistics(self, origin: str | None, part: Part, tokens: int) -> tuple[Calibration, float]:
        """The calibration, and the seconds that it took."""
        start = time.perf_counter()
        found = calibrate(self.read_dense(origin).model, self.tokenizer(origin), self.corpus(part), tokens)
        return found, time.perf_counter() - start

    def _task_statistics(
        self, origin: str | None, task: str, teacher: Path, tokens: int, weigh: bool
    ) -> tuple[Calibration, float]:
        start = time.perf_counter()
        dense, tokenizer = checkpoints.read(teacher).model, self.tokenizer(origin)
        found = calibrate(dense, tokenizer, self.task(task)[1], tokens, weigh=weigh)
        return found, time.perf_counter() - start

    def _encoded(self, origin: str | None) -> tuple[quality.Encoded, float]:
        """The passages through the teacher, and its own retrieval score."""
        passages = self.passages(origin)
        encoded = quality.encode(self.read_dense(origin).model.float().eval(), self.tokenizer(origin), passages)
        return encoded, quality.retrieval(encoded.vectors, passages.document)


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe without newer fields where they say the usual: keys from before they existed stay valid."""
    newer = {"objective", "calibration_tokens", "calibration_sha256"}
    plain = recipe.model_dump(mode="json", exclude=newer)
    return plain | recipe.model_dump(mode="json", include=newer, exclude_defaults=True)


@cache
def hardware() -> dict[str, Any]:
    """The machine, without its name."""
    memory = None
    if hasattr(os, "sysconf"):
        memory = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def host() -> str:
    """A hash of the hardware and the threads: figures of another kind of machine are not mixed with these."""
    return digest(hardware())[:16]


def versions() -> dict[str, str]:
    """Of Python, compresskit and the libraries that decide a result."""
    return {"python": platform.python_version(), "compresskit": __version__} | {n: version(n) for n in _LIBRARIES}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@cache
def git_state() -> str | None:
    """Commit of the checkout that runs, with ``-dirty`` where files differ; None for an installed package."""
    folder = Path(__file__).resolve().parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", Path(__file__).name],
            capture_output=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() if tracked.returncode == 0 else None
