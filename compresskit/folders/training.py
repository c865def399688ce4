"""What a training run leaves in its output folder: ``training.json``, a picture of the losses, the model card."""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from compresskit import __version__
from compresskit.errors import InputError
from compresskit.markup import markdown, plain
from compresskit.model.checkpoint import Checkpoint, weight_files
from compresskit.model.output import MARKER, TRAINING
from compresskit.model.quantizer import is_compressed
from compresskit.model.targets import count_parameters
from compresskit.model.weights import fingerprints
from compresskit.scores import mean_over_splits, share_kept
from compresskit.storage.files import file_hash
from compresskit.validation import read_json

FORMAT_VERSION = 1
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WHO = {"teacher": "teacher", "student_before": "student before", "student_after": "student after"}


def identity(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    """Which model this is: its name, class, size and the hash of its weights (None for one given from Python)."""
    if checkpoint is None:
        return None
    files = weight_files(checkpoint.folder) if checkpoint.folder is not None else []
    return {
        "name": checkpoint.origin,
        "class": type(checkpoint.model).__name__,
        "parameters": count_parameters(checkpoint.model),
        "sha256": [file_hash(file) for file in files] or None,
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
        teacher, student = (mean_over_splits(scores[who], primary) for who in ("teacher", "student_after"))
        record["kept"] = share_kept(student, teacher)
    return record


def score_rows(record: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of the closing table: teacher, student before, student after, kept."""
    scores = record["scores"]
    who = [name for name in _WHO if name in scores]
    fine_tuned = "teacher" not in scores
    titles = ["before", "after"] if fine_tuned else [_WHO[name] for name in who]
    rows = []
    losses = record["primary_metric"] is None
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
    return read_stages(checkpoint.folder / TRAINING) if checkpoint.folder is not None else []


def read_stages(path: Path) -> list[dict[str, Any]]:
    """The stages of a ``training.json``; none where there is no such file, or it is no record of ours.

    Raises:
        InputError: unreadable, or of another format version.
    """
    record = read_json(path, "cannot be read") if path.is_file() else {}
    if not isinstance(record.get("stages"), list):
        return []
    if record.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{path}: format version {record.get('format_version')!r}, known is {FORMAT_VERSION}")
    return list(record["stages"])


def write(checkpoint: Checkpoint, stages: list[dict[str, Any]], folder: Path, title: str) -> None:
    """Fill ``folder`` (where the model was saved) with the records of ``stages``, the newest one last."""
    original = ""
    if checkpoint.folder is not None:
        if (checkpoint.folder / "recipe.yaml").is_file():
            shutil.copyfile(checkpoint.folder / "recipe.yaml", folder / "recipe.yaml")
        if (checkpoint.folder / MARKER).is_file():
            compression = read_json(checkpoint.folder / MARKER, "cannot be read")
            text = json.dumps(compression | {"weights": fingerprints(folder)}, indent=2)
            (folder / MARKER).write_text(text + "\n", encoding="utf-8")
        card = checkpoint.folder / "README.md"
        if (checkpoint.folder / MARKER).is_file() and card.is_file():
            original = card.read_text(encoding="utf-8")
    text = json.dumps({"format_version": FORMAT_VERSION, "stages": stages}, indent=1)
    # One line per entry of the log.
    text = re.sub(r"\{[^{}]*\}", lambda leaf: re.sub(r"\n\s*", " ", leaf[0]), text)
    (folder / TRAINING).write_text(text + "\n", encoding="utf-8")
    loss_picture(stages[-1], folder / "losses.png")
    (folder / "README.md").write_text(_card(original, stages, title, checkpoint), encoding="utf-8")


def loss_picture(record: Mapping[str, Any], path: Path) -> None:
    """The loss terms over the steps, logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    log = record["log"]
    names = [name for name in (log[0] if log else {}) if name.startswith("loss_")]
    for name in ["loss", *names] if len(names) > 1 else ["loss"]:
        points = [(entry["step"], entry[name]) for entry in log if entry.get(name, 0) > 0]
        if points:
            label = "total" if name == "loss" else name.removeprefix("loss_")
            axes.plot(*zip(*points, strict=True), label=label, color="black" if name == "loss" else None)
    axes.set(xlabel="step", ylabel="loss; terms without their weights", yscale="log", title=record["stage"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)


_CARD = """---
library_name: transformers
tags:
- compresskit
---

# {title}

{origin}, trained by compresskit.

## Load

```python
{before}from transformers import {loader}

model = {loader}.from_pretrained("FOLDER_OR_REPOSITORY")
```

"""


def _card(original: str, stages: Sequence[Mapping[str, Any]], title: str, checkpoint: Checkpoint) -> str:
    loader = type(checkpoint.model).__name__
    count = count_parameters(checkpoint.model)
    section = f"## Training\n\nThis {loader} has {count:,} parameters.\n\n"
    section += "\n\n".join(_stage_text(stage) for stage in stages) + "\n"
    if heading := re.search(r"^## (Quality|Training)$", original, flags=re.MULTILINE):
        text = re.sub(rf"{heading[0]}\n.*?(?=\n## |\Z)", lambda _: section, original, flags=re.DOTALL)
        # The student took over its teacher's class.
        text = re.sub(r"(?<=from transformers import )\w+|(?<=model = )\w+(?=\.from_pretrained)", loader, text)
        return re.sub(r"^# .*$", lambda _: f"# {title}", text, count=1, flags=re.MULTILINE)
    before = "import compresskit  # lets transformers read the factorised layers\n" * is_compressed(checkpoint.model)
    # A path of this machine says nothing to the reader of a card.
    origin = checkpoint.origin if _HUB_ID.fullmatch(checkpoint.origin) else checkpoint.name
    return _CARD.format(title=title, origin=origin, before=before, loader=loader) + section


def _stage_text(stage: Mapping[str, Any]) -> str:
    data = stage["data"]
    what = data["task"]["name"] if "task" in data else plain(data["source"])
    passes = f", {stage['epochs']:.2f} epochs" if "task" in data else ""  # of a text only as much is read as is needed
    lines = [
        f"**{stage['stage']}** on {what}: {stage['steps']:,} steps of {stage['batch_size']} sequences "
        f"({stage['tokens']:,} tokens{passes}), learning rate {stage['learning_rate']:g}, "
        f"losses {', '.join(f'{name} {weight:g}' for name, weight in stage['losses'].items())}, seed {stage['seed']}."
    ]
    if stage["teacher"] is not None:
        lines.append(f"Teacher: {plain(stage['teacher']['name'])} ({stage['teacher']['parameters']:,} parameters).")
    columns, rows = score_rows(stage)
    return "\n".join([*lines, "", markdown(columns, rows)])
