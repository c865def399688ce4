"""The registered task kinds."""

from __future__ import annotations

from transformers import PreTrainedModel

from compresskit.registry import Registry
from compresskit.tasks.kind import TaskKind
from compresskit.tasks.predictions import PLAIN, Predictions

KINDS: Registry[TaskKind] = Registry(
    "task kind",
    TaskKind,  # type: ignore[type-abstract]
    "compresskit.tasks",
    "compresskit.task_kinds",
    needs=("summary", "head", "metrics"),
)
register = KINDS.register


def predictions_of(model: PreTrainedModel) -> Predictions:
    """What the model's head predicts: plain logits, unless a kind has predictions of its own that fit the model."""
    own = (kind.predictions for kind in KINDS.all().values() if kind.predictions is not PLAIN)
    return next((predictions for predictions in own if predictions.fits(model)), PLAIN)
