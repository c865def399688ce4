"""A model that answers: a folder, a hub id, an object, or a folder that ``export`` wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from compresskit.errors import InputError, one_line
from compresskit.exporting.format import FORMATS
from compresskit.folders.training import read_stages
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.classes import several_at_once
from compresskit.model.heads import has_head
from compresskit.model.output import EXPORT
from compresskit.model.quantizer import is_compressed
from compresskit.model.sentence_vectors import has_sentence_model
from compresskit.model.targets import check_supported
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import TaskKind
from compresskit.tasks.predicting import Runnable
from compresskit.tasks.registry import KINDS
from compresskit.validation import read_json, validate

ModelLike = PreTrainedModel | str | Path | None


@dataclass(frozen=True)
class Answering:
    """A model that was read.

    Attributes:
        checkpoint: what the outputs mean is read from its model; that of an export is without weights.
        run: computes the outputs of an export; None where the checkpoint's model does.
    """

    checkpoint: Checkpoint
    run: Runnable | None = None


def read(model: ModelLike, as_class: str | None = None) -> Answering:
    """Read a model, or what ``export`` made of one.

    Raises:
        InputError: it cannot be read, or an export cannot be run here.
    """
    if model is None or isinstance(model, str | Path):
        folder = None if model is None else Path(model)
        if folder is not None and (folder / EXPORT).is_file():
            return _read_export(folder, as_class)
        return Answering(checkpoints.read(model, as_class, compressed=None))
    if as_class is not None:
        raise InputError(f"as_class {as_class}: is for a folder; this model is a {type(model).__name__} already")
    found = checkpoints.in_memory(model)
    if not is_compressed(model):
        check_supported(model)
    return Answering(found)


def _read_export(folder: Path, as_class: str | None) -> Answering:
    """Raises InputError: it is incomplete, or its format cannot be run here."""
    if as_class is not None:
        raise InputError(f"--as {as_class}: model {folder} is an export, whose head is the one it was made with")
    record = read_json(folder / EXPORT, "cannot be read")
    name, head = record.get("format"), record.get("model_class")
    if not isinstance(name, str) or not isinstance(head, str):
        raise InputError(f"{folder / EXPORT}: says no format or no model_class: it is no record of an export")
    chosen = FORMATS.installed(name)
    chosen.weight_files(folder)
    try:
        run = chosen.load(folder)
        if isinstance(run, PreTrainedModel):
            return Answering(Checkpoint(folder.name, folder.name, folder, run))
        model = _without_weights(folder, head)
    except InputError:
        raise
    except Exception as error:  # runtimes raise what they like
        raise InputError(f"model {folder}: its {name} cannot be run: {one_line(error)}") from None
    if run is None:
        formats = ", ".join(known for known, form in FORMATS.all().items() if form.runtime is not None)
        raise InputError(f"model {folder}: format {name} cannot be run here ({formats} can)")
    return Answering(Checkpoint(folder.name, folder.name, folder, model), run)


def _without_weights(folder: Path, head: str) -> PreTrainedModel:
    """The class that was exported, so that its configuration says what the outputs mean."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    loader: Any = getattr(transformers, head)
    with torch.device("meta"):
        model: PreTrainedModel = loader._from_config(config)
    return model.eval()


def recorded_task(checkpoint: Checkpoint) -> Task | None:
    """The task that the model was last trained on, as its folder says; None where it was on none, or has another head
    now.
    """
    try:
        stages = [] if checkpoint.folder is None else read_stages(checkpoint.folder)
        declared = next(stage["data"]["task"] for stage in reversed(stages) if stage["data"].get("task"))
        task: Task = validate(Task, declared, "task")
        kind = KINDS.get(task.kind)
        kind.check(task)
        kind.check_head(task, checkpoint.model)
    except (InputError, StopIteration, KeyError, TypeError, AttributeError):
        return None  # a record is a help, not a condition
    return task


def kind_of(checkpoint: Checkpoint) -> TaskKind:
    """The kind of task that a model's head answers; of a model without a head that of its sentence vectors.

    Raises:
        InputError: it has neither, or its head does not say what it predicts.
    """
    model, name = checkpoint.model, type(checkpoint.model).__name__
    unused = f" ({checkpoint.unused_head})" if checkpoint.unused_head else ""
    if model.base_model is model:
        if has_sentence_model(checkpoint.folder):
            return KINDS.get("similarity")
        raise InputError(
            f"model {checkpoint.origin}: {name} has no head that answers anything, and its folder does not say how "
            f"vectors of texts are made (modules.json): give a fine-tuned model{unused}"
        )
    if has_head(model, "sequence-classification"):
        several = several_at_once(model)
        if several is None:
            return KINDS.get("regression" if model.config.num_labels == 1 else "classification")
        if model.config.problem_type == "multi_label_classification":
            return KINDS.get("multi-label")
        raise InputError(f"model {checkpoint.origin}: predicts {several}, which no kind of task here does")
    fitting = [kind for kind in KINDS.all().values() if kind.head is not None and has_head(model, kind.head)]
    if len(fitting) != 1:
        kinds = ", ".join(kind.name for kind in fitting)
        why = f"may be one of several kinds ({kinds}); say with --task which" if fitting else "is of no kind of task"
        raise InputError(f"model {checkpoint.origin}: the head of {name} {why}{unused}")
    return fitting[0]
