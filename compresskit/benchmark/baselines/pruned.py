"""The dense model without its smallest weights: magnitude pruning, unstructured.

Gordon, Duh and Andrews: Compressing BERT, Studying the Effects of Weight Pruning on Transfer Learning (2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.benchmark.provenance import MadeBy
from compresskit.errors import UnreachableError
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.targets import count_parameters, find_targets


@register
class Pruned(Baseline):
    """Of every matrix that a method would factorise the same share of entries stays, those of largest magnitude; the
    others are 0 and stay 0 in training. What counts as its parameters is what is not 0; its file holds the zeros too.
    """

    name = "pruned"
    summary = "the dense model without its smallest weights, trained on the students' budget"
    rated = True
    trained = True

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The pruned model. Raises UnreachableError: what is never pruned is larger than the ratio allows."""
        assert asked.ratio is not None
        total = count_parameters(dense.model)
        prunable = sum(weight.numel() for weight in _matrices(dense.model))
        share = 1 - (total - total / asked.ratio) / prunable
        if share <= 0:
            raise UnreachableError(
                f"pruned: {asked.ratio:g}x leaves {total / asked.ratio:,.0f} parameters, but {total - prunable:,} lie "
                "outside the matrices that are pruned"
            )
        for weight in _matrices(dense.model):
            _keep_largest(weight, round(share * weight.numel()))
        return Made(dense, {"facts": {"stored": f"{total:,}"}})

    def parameters(self, dense: PreTrainedModel, model: PreTrainedModel) -> int:
        """All but the zeros of the pruned matrices."""
        zeros = sum(int((weight == 0).sum()) for weight in _matrices(model))
        return count_parameters(model) - zeros

    def callbacks(self) -> tuple[TrainerCallback, ...]:
        """Keep the zeros."""
        return (KeepZeros(),)

    def fact(self, model: str, made_by: MadeBy) -> str:
        """That zeros are stored."""
        stored = (made_by.facts or {})["stored"]
        return f"its parameters are those of {model} that are not 0; its file stores all {stored}, and none is skipped"


class KeepZeros(TrainerCallback):
    """What is 0 in a pruned matrix when training begins, or goes on, is 0 after every step."""

    def __init__(self) -> None:
        self.kept: list[tuple[nn.Parameter, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Of a run that goes on the weights are the checkpoint's already."""
        self.kept = [(weight, weight != 0) for weight in _matrices(kwargs["model"])]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the step's checkpoint is written."""
        with torch.no_grad():
            for weight, mask in self.kept:
                weight.mul_(mask)


def _matrices(model: PreTrainedModel) -> Iterator[nn.Parameter]:
    """The weights that are pruned: those of the targets that have a role."""
    for target in find_targets(model):
        if target.role is not None:
            weight: Any = model.get_submodule(target.name).weight
            yield weight


def _keep_largest(weight: nn.Parameter, count: int) -> None:
    """Set all but the ``count`` entries of largest magnitude to 0."""
    with torch.no_grad():
        flat = weight.view(-1)
        kept = flat.abs().topk(count).indices
        values = flat[kept]
        flat.zero_()
        flat[kept] = values
