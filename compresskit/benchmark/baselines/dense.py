"""The dense model itself."""

from __future__ import annotations

from compresskit.benchmark.baselines.base import DENSE, Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.model.checkpoint import Checkpoint


@register
class Dense(Baseline):
    """The model that all others are compared with; every grid has it, whether it is named or not."""

    name = DENSE
    summary = "the dense model; of a task its fine-tuned teacher (always there)"

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The model as it is."""
        return Made(dense)
