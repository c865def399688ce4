"""The record of a training (``training.json``): one entry per stage, the newest one last."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict

from compresskit import __version__
from compresskit.errors import InputError
from compresskit.model.checkpoint import Checkpoint, weight_files
from compresskit.model.output import TRAINING
from compresskit.model.targets import count_parameters
from compresskit.scores import kept_over_splits
from compresskit.storage.files import file_hash
from compresskit.validation import read_json, validate

FORMAT_VERSION = 1
_WHO = {"teacher": "teacher", "student_before": "student before", "student_after": "student after"}


class _View(BaseModel):
    """What is read of an entry; the file holds more, such as every setting of the stage."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class HubPlace(_View):
    """Where a task lies on the hub."""

    path: str
    name: str | None = None


class TaskEntry(_View):
    """The task of a stage."""

    name: str
    hub: HubPlace | None = None


class SplitEntry(_View):
    """A split of the task; ``remark`` says where it is not a whole one."""

    remark: str = ""


class DataEntry(_View):
    """What a stage was trained on: a task with its splits, or a text or data set by its name, of which ``held_out``
    sequences or texts are scored.
    """

    task: TaskEntry | None = None
    splits: dict[str, SplitEntry] = {}
    source: str = ""
    held_out: int = 0


class ModelEntry(_View):
    """A model that took part."""

    name: str
    parameters: int


class StageRecord(_View):
    """One stage of a training.

    Attributes:
        finished: when, ISO 8601.
        stage: ``general``, ``sentences``, ``task`` or ``fine-tuning``.
        teacher: None where there was none.
        losses: weight of each loss term that the models' classes allowed.
        seed: of every random choice.
        epochs: passes over the data.
        steps: of the optimizer.
        tokens: real (non-padding) ones that were trained on.
        log: losses over the steps.
        scores: of teacher, student before and student after: split -> metric -> fraction; of a general stage the losses
            on held-out sequences.
        primary_metric: of the task; None of a general stage.
    """

    finished: str
    stage: str
    teacher: ModelEntry | None = None
    data: DataEntry
    learning_rate: float
    batch_size: int
    losses: dict[str, float]
    seed: int
    epochs: float
    steps: int
    tokens: int
    log: list[dict[str, Any]] = []
    scores: dict[str, dict[str, dict[str, float]]]
    primary_metric: str | None


def identity(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """Which model this is: its name, class, size, the hash of its weights (None for one given from Python), and what
    the classes of a head were called whose last layer was replaced.
    """
    if checkpoint is None:
        return None
    files = weight_files(checkpoint.folder) if checkpoint.folder is not None else []
    return {
        "name": checkpoint.origin,
        "class": type(checkpoint.model).__name__,
        "parameters": count_parameters(checkpoint.model),
        "sha256": [file_hash(file) for file in files] or None,
        **({"replaced_head": list(checkpoint.replaced_head)} if checkpoint.replaced_head is not None else {}),
    }


def stage_record(
    settings: Mapping[str, Any],
    history: Mapping[str, Any],
    scores: Mapping[str, Any],
    primary: str | None,
    notes: Sequence[str],
) -> dict[str, Any]:
    """One stage as plain data: settings, what happened, scores, and all that is needed to do it again."""
    state = PartialState()
    record = {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **settings,
        **history,
        "tokens_per_second": history["tokens"] / history["seconds"],
        "scores": dict(scores),
        "primary_metric": primary,
        "notes": list(dict.fromkeys(notes)),
        "versions": {"compresskit": __version__}
        | {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "hardware": {
            "machine": platform.machine(),
            "device": str(state.device),
            "processes": state.num_processes,
            "threads": torch.get_num_threads(),
        },
    }
    if primary is not None and "teacher" in scores:
        record["kept"] = kept_over_splits(scores["student_after"], scores["teacher"], primary)
    return record


def score_rows(stage: StageRecord) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the closing table: teacher, student before, student after, kept."""
    scores = stage.scores
    who = [name for name in _WHO if name in scores]
    fine_tuned = "teacher" not in scores
    titles = ["before", "after"] if fine_tuned else [_WHO[name] for name in who]
    rows = []
    losses = stage.primary_metric is None
    shares = not losses and not fine_tuned
    for split, values in scores[who[-1]].items():
        for metric in values:
            cells = [scores[name][split][metric] for name in who]
            text = [f"{cell:.4g}" if losses else f"{100 * cell:.2f}" for cell in cells]
            kept = [f"{100 * cells[-1] / cells[0]:.1f} %" if cells[0] > 0 and cells[-1] > 0 else "-"] if shares else []
            rows.append((split.replace("_", " "), f"loss {metric}" if losses else metric, *text, *kept))
    return ("split", "metric", *titles, *(["kept"] if shares else [])), rows


def earlier_stages(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The records of the stages that made the model, from its folder. Raises InputError."""
    return read_stages(checkpoint.folder) if checkpoint.folder is not None else []


def read_stages(folder: Path) -> list[dict[str, Any]]:
    """The stages of a folder, whole and as plain data; none where it was not trained, or its file is no record of ours.

    Raises:
        InputError: unreadable, or of another format version.
    """
    path = folder / TRAINING
    record = read_json(path, "cannot be read") if path.is_file() else {}
    if not isinstance(record.get("stages"), list):
        return []
    if record.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path}: format version {record.get('format_version')!r}, known is {FORMAT_VERSION}")
    return list(record["stages"])


def last_stage(folder: Path) -> StageRecord | None:
    """The newest stage of a folder; None where it was not trained.

    Raises:
        InputError: as :func:`read_stages`; an entry is missing or of another kind.
    """
    stages = read_stages(folder)
    return view(stages[-1]) if stages else None


def view(stage: Mapping[str, Any]) -> StageRecord:
    """A stage as typed data. Raises InputError: an entry is missing or of another kind."""
    found: StageRecord = validate(StageRecord, dict(stage), f"{TRAINING}: an entry is missing or of another kind")
    return found


def write_stages(stages: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write ``training.json``, one line per entry of the log."""
    text = json.dumps({"format_version": FORMAT_VERSION, "stages": stages}, indent=1)
    text = re.sub(r"\{[^{}]*\}", lambda leaf: re.sub(r"\n\s*", " ", leaf[0]), text)
    (folder / TRAINING).write_text(text + "\n", encoding="utf-8")
