"""Where weights are read from."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.decomposers import Target
from compresskit.errors import InputError

#: isfinite makes copies: of this many numbers at a time.
_NUMBERS = 1 << 22


class ModelWeights:
    """The weights of a model in memory, or mapped from its file: a :class:`~compresskit.decomposers.WeightSource`.
    Tensors may be views: they are read before the layer is replaced.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def read(self, target: Target) -> Tensor:
        """The weight, (m, n)."""
        return _aligned(self.view(target))

    def rows(self, target: Target, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the weight."""
        return _aligned(self.view(target)[start:stop])

    def view(self, target: Target) -> Tensor:
        """The weight where it lies.

        Raises:
            InputError: it is on the meta device.
        """
        weight = self._model.get_submodule(target.name).weight
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise _without_numbers(f"{target.name}.weight")
        return weight.detach()


def _aligned(tensor: Tensor) -> Tensor:
    """A copy where the tensor does not begin where torch would put it, as in a mapped file: BLAS rounds differently
    there, and the same weights are to give the same factors.
    """
    return tensor.clone() if tensor.device.type == "cpu" and tensor.data_ptr() % 64 else tensor


def _without_numbers(name: str) -> InputError:
    return InputError(
        f"weight {name} is on the meta device, which holds no numbers: load the model with its weights "
        "(without them a plan by shapes can be made: explicit ones, or a ratio with allocation uniform)"
    )


def check_weights(model: PreTrainedModel) -> None:
    """Refuse a model without weights, or with some of them offloaded to disk.

    Raises:
        InputError: names the first weight on the meta device.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise _without_numbers(name)


def check_finite(model: PreTrainedModel) -> None:
    """Refuse a model with NaN or infinity in a weight.

    Raises:
        InputError: names the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.device.type == "meta":  # offloaded to disk
            continue
        for block in parameter.detach().flatten().split(_NUMBERS):
            values = block.float() if block.itemsize == 1 else block  # float8 has no isfinite
            if not torch.isfinite(values).all():
                raise InputError(f"weight {name} holds NaN or infinity; the checkpoint is damaged")
