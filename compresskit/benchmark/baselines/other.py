"""Any ready encoder: what there would be to take instead of making one smaller."""

from __future__ import annotations

from collections.abc import Mapping

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.benchmark.provenance import MadeBy
from compresskit.model import checkpoint as checkpoints
from compresskit.model import identity
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.tokenizer import find_tokenizer
from compresskit.tasks.registry import KINDS
from compresskit.training.reading import with_new_head


@register
class Other(Baseline):
    """``other:HUB_ID`` or ``other:FOLDER``, of any family, with its own tokenizer; only a hub id needs the network."""

    name = "other"
    summary = "any ready encoder, fine-tuned on the task's labels as the teacher is"
    argument = "HUB_ID|FOLDER"
    trained = True
    own_tokenizer = True

    def content(self, argument: str) -> Mapping[str, str]:
        """Of every file. Raises InputError: it cannot be read, or has no tokenizer."""
        read = checkpoints.read(argument, compressed=None)
        find_tokenizer(None, read)
        return identity.of_checkpoint(read)

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The encoder as it is."""
        read = checkpoints.read(asked.argument, compressed=None)
        return Made(read, {"facts": {"model": read.origin}})

    def stand_in(self, dense: Checkpoint, asked: Asked, made_by: MadeBy) -> Checkpoint:
        """The encoder, with a new head where the task has one."""
        assert asked.rows is not None  # what has a tokenizer of its own needs a task
        if KINDS.get(asked.rows.task.kind).head is None:
            return checkpoints.read(asked.argument, compressed=None)
        return with_new_head(asked.argument, asked.rows.task, asked.rows.labels)

    def fact(self, model: str, made_by: MadeBy) -> str:
        """Which encoder, and how it was trained."""
        tuned = "fine-tuned on the labels alone, as the teacher was" if made_by.teacher is not None else "as it is"
        return f"{(made_by.facts or {})['model']}, {tuned}"
