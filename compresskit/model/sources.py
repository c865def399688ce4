"""Where weights are read from."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.decomposers.base import Target
from compresskit.errors import InputError


class ModelSource:
    """Weights of a model in memory. Tensors are views: they are read before the layer is replaced."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def read(self, target: Target) -> Tensor:
        """The weight, (m, n)."""
        weight = self._model.get_submodule(target.name).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def rows(self, target: Target, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the weight."""
        return self.read(target)[start:stop]


def check_finite(model: PreTrainedModel) -> None:
    """Refuse a model with NaN or infinity in a weight.

    Raises:
        InputError: names the first such tensor.
    """
    for name, parameter in model.named_parameters():
        values = parameter.float() if parameter.itemsize == 1 else parameter  # float8 has no isfinite
        if parameter.is_floating_point() and not torch.isfinite(values).all():
            raise InputError(f"weight {name} holds NaN or infinity; the checkpoint is damaged")
