"""One cell from the dense checkpoint to its record; a killed one continues where its folder says it was."""

from __future__ import annotations

import json
import math
import shutil
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from compresskit.benchmark import quality
from compresskit.benchmark.baselines import int8_megabytes, quantise, with_fewer_layers
from compresskit.benchmark.grid import Cell
from compresskit.benchmark.records import RECORD, LayerError, Record
from compresskit.benchmark.records import read as read_record
from compresskit.benchmark.sources import Sources
from compresskit.calibration.statistics import Calibration
from compresskit.data.corpus import Part
from compresskit.decomposers.base import SharedFactors
from compresskit.errors import InputError, UnreachableError, WorkError, one_line
from compresskit.folders.compressed import write_compressed
from compresskit.folders.compression import resolved_recipe
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.measure import count_flops
from compresskit.model.output import output_folder
from compresskit.model.sources import ModelSource
from compresskit.model.targets import count_parameters, find_targets
from compresskit.planning.apply import apply_plan
from compresskit.planning.planner import make_plan
from compresskit.planning.recipe import Recipe
from compresskit.scores import mean_over_splits
from compresskit.storage.writing import write_text
from compresskit.tasks.kind import Scoring
from compresskit.tasks.predicting import Runnable
from compresskit.training import stages
from compresskit.training.data import sequence_length
from compresskit.training.evaluation import score
from compresskit.training.working_folder import working_folder

#: Of a cell: the model that was scored, and what it is made from on the way.
MODEL, WORK = "model", "work"
#: Of a task's dense cell: what the teacher says of the training rows, for all students, while there are any to train.
OUTPUTS = "outputs"
#: The traceback of a cell that failed, or of its export.
ERROR = "error.txt"


@dataclass
class Workshop:
    """Where a cell is made.

    Attributes:
        cell: what to make.
        sources: what all cells share.
        folder: of the cell.
        dense: folder of the dense cell of the same model and task.
        start: folder of the stage 1 or compressed teacher that the cell shares with others; None: it has its own.
        callbacks: for trainings.
        say: called with what is being done.
    """

    cell: Cell
    sources: Sources
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
            kind="baseline" if cell.recipe is None else "student",
            ratio_asked=cell.ratio,
            task=cell.task_name or None,
            seed=cell.seed,
            made_by=self.sources.made_by(cell),
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
        method = self.cell.method if self.cell.recipe is None else ""
        found: dict[str, Any]
        if method == "dense":
            found = self._teacher()
        elif method == "int8":
            found = self._int8()
        else:
            found = self._student(half_layers=method == "half-layers")
        found["score_teacher"] = found["score"] if method == "dense" else self._teacher_score()
        if self.cell.task is None:
            found["scores"]["retrieval chance"] = self.sources.passages(self.cell.origin).chance
            found["scores"]["retrieval teacher"] = self.sources.encoded(self.cell.origin)[1]
        return found

    # -- the three kinds of cells ---------------------------------------------------------------------------------

    def _teacher(self) -> dict[str, Any]:
        cell, grid = self.cell, self.sources.grid
        found: dict[str, Any] = {}
        if cell.task is not None and not (self.folder / MODEL).exists():
            self.say("fine-tuning the teacher")
            settings = {**grid.of(cell.task).teacher, "precision": grid.precision}
            self._train(stages.finetune, self.folder / MODEL, cell.origin, task=cell.task, data=grid.data, **settings)
        read = self._read_dense()
        if cell.task is not None:
            found["seconds_distill"] = _last_stage(self.folder / MODEL)["seconds"]
        return found | self._size(read.model, read.folder) | self._score(read.model)

    def _int8(self) -> dict[str, Any]:
        self.say("quantising")
        dense = self._read_dense()
        size = self._size(dense.model, dense.folder)
        start = time.perf_counter()
        quantised = quantise(dense.model)
        seconds = time.perf_counter() - start
        size |= {"megabytes": int8_megabytes(quantised), "seconds_compress": seconds}
        return size | self._score(quantised)

    def _student(self, *, half_layers: bool) -> dict[str, Any]:
        cell, grid = self.cell, self.sources.grid
        options = {"allow_dense": half_layers, "precision": grid.precision}
        # What comes before stage 2 may be shared; then it lies in a folder of its own.
        work = self.start or self.folder / WORK
        start = work / "compressed"
        if not start.is_dir():
            (work / "compressed.json").unlink(missing_ok=True)
        made = _once(work / "compressed.json", lambda: self._halve(start) if half_layers else self._compress(start))
        self.say("scoring before training")
        before = _once(self.folder / WORK / "before.json", lambda: self._score(self._read(start).model))
        seconds, made_by = 0.0, self.sources.made_by(cell) | made.pop("made_by", {})
        if grid.general is not False:
            self.say("stage 1: general text")
            target = work / "general" if cell.task is not None else self.folder / MODEL
            text, seed = self.sources.corpus(self._part), grid.seeds[0] if self.start else cell.seed
            settings = {**grid.general, **options, "seed": seed}
            self._train(stages.distill, target, start, cell.origin, text=text, **settings)
            start, stage = target, _last_stage(target)
            seconds += stage["seconds"]
            made_by["general"] |= {"losses": stage["losses"], "seed": seed}  # the losses that the class allowed
        if cell.task is not None:
            self.say(f"stage 2: {cell.task_name}")
            target, teacher = self.folder / MODEL, self.dense / MODEL
            settings = {**grid.of(cell.task).task, **options, "teacher_outputs": self.dense / OUTPUTS}
            self._train(stages.distill, target, start, teacher, task=cell.task, data=grid.data, **settings)
            stage = _last_stage(target)
            seconds += stage["seconds"]
            made_by["task_stage"]["losses"] = stage["losses"]
        read = self._read(self.folder / MODEL)
        found = self._size(read.model, read.folder) | self._score(read.model)
        return made | found | {"score_before": before["score"], "seconds_distill": seconds, "made_by": made_by}

    @property
    def _part(self) -> Part:
        """Of the general text, what a student may see."""
        return "all" if self.cell.task is not None else "training"

    # -- making -----------------------------------------------------------------------------------------------------

    def _compress(self, target: Path) -> dict[str, Any]:
        recipe = self.cell.recipe
        assert recipe is not None
        self.say("compressing")
        dense = self._read_whole()
        statistics, calibrating = self._statistics(recipe) if recipe.calibration_tokens else (None, 0.0)
        start = time.perf_counter()
        plan = make_plan(dense.model, recipe, ModelSource(dense.model), statistics=statistics)
        norms = {
            a.group.name: math.hypot(*(_norm(dense.model, target.name) for target in a.group.targets))
            for a in plan.assignments
        }
        plan = apply_plan(dense.model, plan, statistics=statistics)
        seconds = calibrating + time.perf_counter() - start  # as if no other cell had read the same before
        with output_folder(target, overwrite=True) as temporary:
            write_compressed(dense, plan, temporary, self.cell.folder)
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

    def _statistics(self, recipe: Recipe) -> tuple[Calibration, float]:
        cell, tokens = self.cell, recipe.calibration_tokens
        if self.sources.grid.students_from == "checkpoint":
            return self.sources.statistics(cell.origin, self._part, tokens)
        assert cell.task is not None
        return self.sources.task_statistics(cell.origin, cell.task, self.dense / MODEL, tokens, recipe.by_error)

    def _halve(self, target: Path) -> dict[str, Any]:
        dense = self._read_whole()
        start = time.perf_counter()
        smaller = replace(dense, model=with_fewer_layers(dense.model))
        seconds = time.perf_counter() - start
        shutil.rmtree(target, ignore_errors=True)
        part = target.with_name("compressed.part")
        part.mkdir(parents=True, exist_ok=True)
        checkpoints.save(smaller, part)
        part.rename(target)
        counts = (one.model.config.num_hidden_layers for one in (smaller, dense))
        return {"seconds_compress": seconds, "made_by": {"layers": "{} of {}".format(*counts)}}

    def _train(self, train: Callable[..., Any], output: Path, *models: Any, **settings: Any) -> None:
        """A stage into ``output``, unless it is there; a stopped one continues."""
        if output.exists():
            return
        output.parent.mkdir(parents=True, exist_ok=True)
        settings = {"seed": self.cell.seed, **settings}
        train(*models, output=output, resume=working_folder(output).exists(), callbacks=self.callbacks, **settings)

    # -- reading and measuring ----------------------------------------------------------------------------------------

    def _read_dense(self) -> Checkpoint:
        return read_dense(self.cell, self.sources, self.dense)

    def _read_whole(self) -> Checkpoint:
        """What the student is made from."""
        whole = self.sources.grid.students_from == "checkpoint"
        return self.sources.read_dense(self.cell.origin) if whole else self._read_dense()

    def _read(self, folder: Path) -> Checkpoint:
        """A student in the class in which it is scored, with the teacher's head where it has none yet."""
        adopt = self._read_dense().model if self.cell.task is not None else None
        changes = stages.labels_of(adopt) if adopt is not None else {}
        return checkpoints.read(folder, compressed=None, adopt=adopt, **changes)

    def _teacher_score(self) -> float:
        score_ = read_record(self.dense / RECORD).score
        assert score_ is not None  # a finished cell has one
        return score_

    def _size(self, model: PreTrainedModel, folder: Path | None) -> dict[str, Any]:
        assert folder is not None
        flops, total = count_flops(model), count_parameters(model)
        dense = self._read_dense().model
        return {
            "parameters": total,
            "parameters_by_role": _by_role(model, dense),
            "ratio": count_parameters(dense) / total,
            "megabytes": sum(file.stat().st_size for file in checkpoints.weight_files(folder)) / 1e6,
            "flops": flops.total,
            "flops_linear": flops.linear,
        }

    def _score(self, model: PreTrainedModel) -> dict[str, Any]:
        cell = self.cell
        if cell.task is None:
            teacher, _ = self.sources.encoded(cell.origin)
            passages = self.sources.passages(cell.origin)
            ours = quality.encode(model.float().eval(), self.sources.tokenizer(cell.origin), passages)
            scores = quality.closeness(ours, teacher, passages)
            return {"metric": quality.METRIC, "score": scores[quality.METRIC], "scores": dict(scores)}
        # Quantised layers run on CPUs only.
        device: Any = "cuda" if torch.cuda.is_available() and cell.method != "int8" else "cpu"
        return score_on_task(cell, self.sources, model.float().to(device))


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
    stage: dict[str, Any] = json.loads((folder / "training.json").read_text(encoding="utf-8"))["stages"][-1]
    return stage


def clear(folder: Path) -> None:
    """Remove what a finished cell was made from; only once its record is written, so that a kill costs nothing."""
    for path in (folder / WORK, working_folder(folder / MODEL), *folder.glob(f".{MODEL}.*")):
        shutil.rmtree(path, ignore_errors=True)
    (folder / ERROR).unlink(missing_ok=True)


def has_model(cell: Cell, record: Record, folder: Path) -> bool:
    """Whether the model of a finished cell is still there, where it has one of its own."""
    own = cell.recipe is not None or cell.method == "half-layers" or (cell.method == "dense" and cell.task is not None)
    return not own or record.status != "finished" or (folder / MODEL).is_dir()


def read_dense(cell: Cell, sources: Sources, dense: Path) -> Checkpoint:
    """The dense model that the cell is compared with: the task's teacher, or the pre-trained checkpoint itself."""
    return sources.read_dense(cell.origin) if cell.task is None else checkpoints.read(dense / MODEL)


def read_own(cell: Cell, sources: Sources, folder: Path, dense: Path) -> Checkpoint:
    """The checkpoint of a finished cell; of the int8 baseline the one it is made from."""
    if cell.recipe is not None or cell.method == "half-layers":
        return checkpoints.read(folder / MODEL, compressed=None)
    return read_dense(cell, sources, dense)


def read_model(cell: Cell, sources: Sources, folder: Path, dense: Path) -> PreTrainedModel:
    """The model of a finished cell, for timing."""
    model = read_own(cell, sources, folder, dense).model.float().eval()
    return quantise(model) if cell.recipe is None and cell.method == "int8" else model


def score_on_task(cell: Cell, sources: Sources, model: PreTrainedModel, run: Runnable | None = None) -> dict[str, Any]:
    """Metric, score (its mean over the splits) and every metric of a model on the cell's task.

    ``run`` computes in the model's place, e.g. ONNX Runtime.
    """
    assert cell.task is not None
    task, data = sources.task(cell.task)
    length = sequence_length(sources.grid.of(cell.task).stage("task")["max_length"], task)
    found = score(Scoring(model, sources.tokenizer(cell.origin), length, run=run), data)
    return {"metric": task.primary, "score": mean_over_splits(found, task.primary), "scores": dict(found)}


def _norm(model: nn.Module, name: str) -> float:
    weight: Any = model.get_submodule(name).weight
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float64))


def _by_role(model: PreTrainedModel, dense: PreTrainedModel) -> dict[str, int]:
    """Parameters of the targets of each role; ``rest`` is everything else."""
    roles: dict[str, int] = {}
    modules = dict(model.named_modules())
    counted: set[int] = set()
    for target in find_targets(dense):
        if target.role is None or target.name not in modules:  # a model with fewer layers lacks some
            continue
        layer = modules[target.name]
        shared = getattr(layer, "shared", None)
        parts = [layer, shared] if isinstance(shared, SharedFactors) and id(shared) not in counted else [layer]
        counted.add(id(shared))
        own = sum(parameter.numel() for part in parts for parameter in part.parameters())
        roles[target.role] = roles.get(target.role, 0) + own
    return roles | {"rest": count_parameters(model) - sum(roles.values())}
