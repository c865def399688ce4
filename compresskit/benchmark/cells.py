"""One cell from the dense checkpoint to its record; a killed one continues where its folder says it was."""

from __future__ import annotations

import json
import math
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, set_seed

from compresskit.benchmark import finished, quality, scoring
from compresskit.benchmark.baselines.base import Made, megabytes
from compresskit.benchmark.finished import MODEL
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.records import RECORD, LayerError, Record
from compresskit.benchmark.records import read as read_record
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.shared import Shared
from compresskit.decomposers import FactorisedLayer, SharedFactors
from compresskit.errors import InputError, UnreachableError, WorkError, one_line
from compresskit.folders.training import read_stages
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.measure import count_flops
from compresskit.model.output import output_folder
from compresskit.model.sentence_vectors import bytes_behind, numbers_behind
from compresskit.model.targets import count_parameters, find_targets
from compresskit.model.tokenizer import find_tokenizer
from compresskit.pipeline import Compression
from compresskit.planning.resolved import resolved_recipe
from compresskit.storage.writing import new_folder, write_text
from compresskit.training import stages
from compresskit.training.reading import labels_of
from compresskit.training.working_folder import working_folder

#: Of a cell: what its model is made from on the way.
WORK = "work"
#: Of a task's dense cell: what the teacher says of the training rows, for all students, while there are any to train.
OUTPUTS = "outputs"
#: The traceback of a cell that failed, or of its export.
ERROR = "error.txt"


@dataclass
class Workshop:
    """Where a cell is made.

    Attributes:
        cell: what to make.
        shared: what all cells share.
        folder: of the cell.
        dense: folder of the dense cell of the same model and task.
        start: folder of the stage 1 or compressed teacher that the cell shares with others; None: it has its own.
        callbacks: for trainings.
        say: called with what is being done.
    """

    cell: Cell
    shared: Shared
    folder: Path
    dense: Path
    start: Path | None = None
    callbacks: tuple[TrainerCallback, ...] = ()
    say: Callable[[str], None] = lambda _: None

    def failure(self, message: str) -> Record:
        """The record of a cell that could not be made."""
        cell = self.cell
        return Record(
            key=cell.key,
            status="failed",
            message=message,
            model=cell.model,
            method=cell.method,
            kind="baseline" if cell.baseline else "student",
            ratio_asked=cell.ratio,
            task=cell.task_name or None,
            seed=cell.seed,
            made_by=self.shared.made_by(cell),
        )

    def run(self) -> Record:
        """Make and measure the cell. What goes wrong is a record too; only an interrupt leaves without one."""
        try:
            found = self._run()
        except UnreachableError as error:
            return self.failure(str(error)).model_copy(update={"status": "unreachable"})
        except Exception as error:  # one cell must not stop the others
            return self.failure(reason(error, self.folder))
        return Record.model_validate(self.failure("").model_dump() | found | {"status": "finished"})

    def _run(self) -> dict[str, Any]:
        rival = self.cell.rival
        if rival is not None and rival.trained and rival.own_tokenizer:
            found = self._trained_by_labels()
        else:
            found = self._trained() if self.cell.learns else self._untrained()
        found["score_teacher"] = found["score"] if self.cell.is_teacher else self._teacher_score()
        if self.cell.task is None:
            found["scores"]["retrieval chance"] = self.shared.passages(self.cell.origin).chance
            found["scores"]["retrieval teacher"] = self.shared.encoded(self.cell.origin)[1]
        return found

    # -- the two kinds of cells -------------------------------------------------------------------------------------

    def _untrained(self) -> dict[str, Any]:
        """The dense model, of a task fine-tuned first, or what a baseline makes of it."""
        cell = self.cell
        assert cell.rival is not None
        if cell.is_teacher and cell.tuned:
            self._finetune(cell.origin)
        elif not cell.is_teacher:
            self.say(f"making {cell.method}")
        dense = self._read_dense()
        start = time.perf_counter()
        made = cell.rival.make(dense, finished.asked(cell, self.shared, self.folder, self.dense))
        seconds = time.perf_counter() - start
        found = self._size(made) | self._score(made)
        found["made_by"] = self.shared.made_by(cell, made.made_by)
        if not cell.is_teacher:
            return found | {"seconds_compress": seconds}
        return found | ({"seconds_distill": _last_stage(self.folder / MODEL)["seconds"]} if cell.tuned else {})

    def _trained_by_labels(self) -> dict[str, Any]:
        """What has a tokenizer of its own, fine-tuned as the dense model was; as it is where that was not."""
        start = self.folder / WORK / "compressed"
        if not start.is_dir():
            (self.folder / WORK / "compressed.json").unlink(missing_ok=True)
        made = _once(self.folder / WORK / "compressed.json", lambda: self._make_baseline(start))
        if self.cell.tuned:
            self._finetune(start)
        elif not (self.folder / MODEL).exists():
            with new_folder(self.folder / MODEL) as temporary:
                shutil.copytree(start, temporary, dirs_exist_ok=True)
        read = finished.read_own(self.cell, self.shared, self.folder, self.dense)
        found = self._size(read) | self._score(read)
        if self.cell.tuned:
            found["seconds_distill"] = _last_stage(self.folder / MODEL)["seconds"]
        found["made_by"] = self.shared.made_by(self.cell, made["made_by"])
        return made | found

    def _finetune(self, start: Any) -> None:
        """On the labels of the task, with the teacher's settings."""
        self.say(f"fine-tuning {'the teacher' if self.cell.is_teacher else self.cell.method}")
        settings = {**self.grid.teacher, "precision": self.grid.precision}
        self._train(stages.finetune, self.folder / MODEL, start, task=self.cell.task, data=self.grid.data, **settings)

    def _trained(self) -> dict[str, Any]:
        """A student of a method or a baseline, taught in the grid's stages."""
        cell, grid = self.cell, self.grid
        # What comes before stage 2 may be shared; then it lies in a folder of its own.
        work = self.start or self.folder / WORK
        start = work / "compressed"
        if not start.is_dir():
            (work / "compressed.json").unlink(missing_ok=True)
        make = self._compress if cell.rival is None else self._make_baseline
        made = _once(work / "compressed.json", lambda: make(start))
        self.say("scoring before training")
        before = _once(
            self.folder / WORK / "before.json", lambda: self._score(Made(self._read(start)), asymmetric=False)
        )
        trained: dict[str, dict[str, Any]] = {}
        seconds = 0.0
        if grid.general is not False:
            start = work / "general" if cell.tuned or self.start else self.folder / MODEL
            seconds += self._stage_1(work / "compressed", start, trained)
        if not cell.tuned and self.start and not (self.folder / MODEL).exists():
            with new_folder(self.folder / MODEL) as temporary:  # tasks that only score share a model
                shutil.copytree(start, temporary, dirs_exist_ok=True)
        if cell.tuned:
            seconds += self._stage_2(start, trained)
        read = Made(self._read(self.folder / MODEL))
        found = self._size(read) | self._score(read)
        found |= {"score_before": before["score"], "seconds_distill": seconds}
        found["made_by"] = self.shared.made_by(cell, made["made_by"], trained)
        return made | found

    def _stage_1(self, start: Path, target: Path, trained: dict[str, dict[str, Any]]) -> float:
        """General text, from one folder to another; the seconds it took. ``trained`` learns what was decided in it."""
        self.say("stage 1: general text")
        seed = self.shared.grid.seeds[0] if self.grid.share_general else self.cell.seed
        settings = {**(self.grid.general or {}), **self._options, "seed": seed}
        if self.grid.unit:
            settings |= {"text": self.shared.corpora(finished.training_part(self.cell)), "unit": self.grid.unit}
            settings |= {"language": self.grid.language, "max_texts": self.grid.max_texts}
            settings |= {"teacher_outputs": self.dense / OUTPUTS}
        else:
            settings["text"] = self.shared.corpus(finished.training_part(self.cell))
        self._train(stages.distill, target, start, self.cell.origin, **settings)
        stage = _last_stage(target)
        trained["general"] = {"losses": stage["losses"], "seed": seed}  # the losses that the class allowed
        return float(stage["seconds"])

    def _stage_2(self, start: Path, trained: dict[str, dict[str, Any]]) -> float:
        """The task, as :meth:`_stage_1`."""
        self.say(f"stage 2: {self.cell.task_name}")
        target, teacher = self.folder / MODEL, self.dense / MODEL
        settings = {**self.grid.task, **self._options, "teacher_outputs": self.dense / OUTPUTS}
        self._train(stages.distill, target, start, teacher, task=self.cell.task, data=self.grid.data, **settings)
        stage = _last_stage(target)
        trained["task_stage"] = {"losses": stage["losses"]}
        return float(stage["seconds"])

    @property
    def _options(self) -> dict[str, Any]:
        return {"allow_dense": self.cell.rival is not None, "precision": self.grid.precision}

    @property
    def grid(self) -> Grid:
        """The grid as it is for this cell."""
        return self.shared.grid.of(self.cell.task, self.cell.variant, self.cell.baseline)

    # -- making -----------------------------------------------------------------------------------------------------

    def _compress(self, target: Path) -> dict[str, Any]:
        recipe = self.cell.recipe
        assert recipe is not None
        self.say("compressing")
        dense = self._read_whole()
        statistics, calibrating = None, 0.0
        if recipe.calibration_tokens:
            statistics, calibrating = finished.statistics(
                self.cell, self.shared, self.dense, recipe.calibration_tokens, weigh=recipe.by_error
            )
        start = time.perf_counter()
        work = Compression(dense, recipe, statistics=statistics)
        plan = work.plan()
        norms = {
            a.group.name: math.hypot(*(_norm(dense.model, target.name) for target in a.group.targets))
            for a in plan.assignments
        }
        plan = work.apply(plan)
        seconds = calibrating + time.perf_counter() - start  # as if no other cell had read the same before
        with output_folder(target, overwrite=True) as temporary:
            work.write(plan, temporary, self.cell.folder)
        residual = math.hypot(*((a.error or 0.0) * norms[a.group.name] for a in plan.assignments))
        errors = [LayerError(name=a.group.name, role=a.group.role, error=a.error or 0.0) for a in plan.assignments]
        return {
            "seconds_compress": seconds,
            "error": residual / math.hypot(*norms.values()),
            "errors": [error.model_dump() for error in errors],
            "made_by": {
                "resolved_recipe": resolved_recipe(plan).model_dump(mode="json", exclude_defaults=True),
                "plan_notes": list(plan.notes),
                **({"calibration": plan.calibration} if plan.calibration else {}),
            },
        }

    def _make_baseline(self, target: Path) -> dict[str, Any]:
        assert self.cell.rival is not None
        self.say(f"making {self.cell.method}")
        dense = self._read_whole()
        start = time.perf_counter()
        made = self.cell.rival.make(dense, finished.asked(self.cell, self.shared, self.folder, self.dense))
        seconds = time.perf_counter() - start
        with new_folder(target) as temporary:
            checkpoints.save(made.checkpoint, temporary)
        return {"seconds_compress": seconds, "made_by": dict(made.made_by)}

    def _train(self, train: Callable[..., Any], output: Path, *models: Any, **settings: Any) -> None:
        """A stage into ``output``, unless it is there; a stopped one continues."""
        if output.exists():
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = {"seed": self.cell.seed, **settings}
        rival = self.cell.rival
        callbacks = (*self.callbacks, *(rival.callbacks() if rival is not None else ()))
        train(*models, output=output, resume=working_folder(output).exists(), callbacks=callbacks, **settings)

    # -- reading and measuring ----------------------------------------------------------------------------------------

    def _read_dense(self) -> Checkpoint:
        return finished.read_dense(self.cell, self.shared, self.dense)

    def _read_whole(self) -> Checkpoint:
        """What the student is made from."""
        whole = self.grid.students_from == "checkpoint"
        return self.shared.read_dense(self.cell.origin) if whole else self._read_dense()

    def _read(self, folder: Path) -> Checkpoint:
        """A student in the class in which it is scored, with the teacher's head where it has none yet."""
        set_seed(self.cell.seed)  # of a head that is new in the student
        adopt = self._read_dense().model if self.cell.tuned else None
        changes = labels_of(adopt) if adopt is not None else {}
        return checkpoints.read(folder, compressed=None, adopt=adopt, **changes)

    def _teacher_score(self) -> float:
        score_ = read_record(self.dense / RECORD).score
        assert score_ is not None  # a finished cell has one
        return score_

    def _size(self, made: Made) -> dict[str, Any]:
        rival, read = self.cell.rival, made.checkpoint
        whole = self._read_dense()
        dense = whole.model
        model = read.model if rival is None else rival.counted(dense, read.model)
        flops = count_flops(model)
        total = count_parameters(model) if rival is None else rival.parameters(dense, read.model)
        folder, roles = self._folder(made), _by_role(model, dense)
        behind = numbers_behind(folder)
        total += behind
        own = megabytes(read) if rival is None else rival.megabytes(read)
        roles["rest"] += behind
        return {
            "parameters": total,
            "parameters_by_role": roles,
            "ratio": (count_parameters(dense) + numbers_behind(whole.folder)) / total,
            "megabytes": own + bytes_behind(folder) / 1e6,
            "flops": flops.total,
            "flops_linear": flops.linear,
        }

    def _folder(self, made: Made) -> Path | None:
        """What says how a model's vectors are made, with the layers behind it: an exported graph may come without."""
        return made.checkpoint.folder if made.run is None else self._read_dense().folder

    def _score(self, made: Made, *, asymmetric: bool = True) -> dict[str, Any]:
        cell, rival, model = self.cell, self.cell.rival, made.checkpoint.model
        if cell.task is None:
            tokenizer, how = self.shared.tokenizer(cell.origin), self.shared.vectors_of(self._folder(made))

            def encode(passages: quality.Passages) -> quality.Encoded:
                if made.run is not None:
                    return quality.encode_run(made.run, tokenizer, passages, how)
                return quality.encode(model.float().eval(), tokenizer, passages, how)

            return scoring.without_labels(cell, self.shared, encode)
        if made.run is not None:  # what its outputs mean is read from the dense model
            whole = self._read_dense()
            return scoring.on_task(cell, self.shared, whole.model, made.run, folder=whole.folder, asymmetric=asymmetric)
        own, dense = None, None
        if rival is not None and rival.own_tokenizer:  # its own head may have its classes in another order
            own, dense = find_tokenizer(None, made.checkpoint), self._read_dense().model
        cpu = rival is not None and rival.cpu_only
        device: Any = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
        folder = made.checkpoint.folder
        model = model.float().to(device)
        rest: dict[str, Any] = {"tokenizer": own, "numbered_by": dense, "asymmetric": asymmetric}
        return scoring.on_task(cell, self.shared, model, folder=folder, **rest)


def reason(error: Exception, folder: Path) -> str:
    """The message of a record for what went wrong; the traceback goes into the cell's folder."""
    write_text(folder / ERROR, "".join(traceback.format_exception(error)))
    return str(error) if isinstance(error, InputError | WorkError) else f"{type(error).__name__}: {one_line(error)}"


def _once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of ``compute``, kept in a file."""
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return kept
    path.parent.mkdir(parents=True, exist_ok=True)
    found = compute()
    write_text(path, json.dumps(found))
    return found


def _last_stage(folder: Path) -> dict[str, Any]:
    """What a trained folder says of its last training."""
    return read_stages(folder)[-1]


def clear(folder: Path) -> None:
    """Remove what a finished cell was made from; only once its record is written, so that a kill costs nothing."""
    # Names with a dot: a kill leaves the temporary folders of models and exports.
    for path in (folder / WORK, working_folder(folder / MODEL), *folder.glob(f".{MODEL}.*"), *folder.glob(".*.part-*")):
        shutil.rmtree(path, ignore_errors=True)
    (folder / ERROR).unlink(missing_ok=True)


def _norm(model: nn.Module, name: str) -> float:
    weight: Any = model.get_submodule(name).weight
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))


def _by_role(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, int]:
    """Parameters of the targets of each role; ``rest`` is everything else."""
    roles: dict[str, int] = {}
    modules = dict(model.named_modules())
    counted: set[SharedFactors] = set()
    for target in find_targets(dense):
        if target.role is None or target.name not in modules:  # a model with fewer layers lacks some
            continue
        layer = modules[target.name]
        shared = layer.shared_factors if isinstance(layer, FactorisedLayer) else ()
        parts = [layer, *(factors for factors in shared if factors not in counted)]
        counted.update(shared)
        own = sum(parameter.numel() for part in parts for parameter in part.parameters())
        roles[target.role] = roles.get(target.role, 0) + own
    return roles | {"rest": count_parameters(model) - sum(roles.values())}
