"""Checkpoints of a run: written aside and renamed, so that each one is whole or not there."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

#: The folder beside the checkpoints in which the next one is written.
PART = "part"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def state_of(checkpoint: Path) -> TrainerState:
    """What a checkpoint says of its run."""
    return TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))


def put_in_place(folder: Path, keep: int | None, best: str | None) -> None:
    """Move the checkpoint that was written in :data:`PART` to its place.

    Args:
        folder: of all checkpoints.
        keep: how many stay, the new one included; the oldest go. None: all.
        best: the path of one that stays in any case.
    """
    older = checkpoints(folder)
    for written in (folder / PART).iterdir():
        shutil.rmtree(folder / written.name, ignore_errors=True)
        written.rename(folder / written.name)
        older = [path for path in older if path.name != written.name]
    (folder / PART).rmdir()
    others = max(1, keep or len(older) + 1) - 1
    older = [path for path in older if str(path) != best]
    for path in older[: max(0, len(older) - others)]:
        # Renamed first: a kill while it is deleted must not leave half a checkpoint.
        shutil.rmtree(path.rename(path.with_name(f"old-{path.name}")), ignore_errors=True)
