"""The dense model in 8 bits."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.errors import InputError
from compresskit.internals.torch import int8_product, packed_int8, unpacked
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.targets import replace_module


@register
class Int8(Baseline):
    """Weights of linear layers in 8 bits, inputs quantised as they come. Not trained."""

    name = "int8"
    summary = "the dense model with its linear layers in 8 bits (torch, dynamic); runs on CPUs"
    exported = False  # its layers have no counterpart in an exported graph; --export onnx-int8 is the row for that
    cpu_only = True

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """A quantised copy. Raises InputError: this torch has no engine for it."""
        return Made(replace(dense, model=quantise(dense.model)))

    def counted(self, dense: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
        """The dense model: quantised layers have as many parameters, but hide them from torch."""
        return dense

    def megabytes(self, made: Checkpoint) -> float:
        """Of what a file of the weights would hold: safetensors has no such tensors."""
        layers = [module for module in made.model.modules() if isinstance(module, Int8Linear)]
        others = sum(parameter.nbytes for parameter in made.model.parameters())
        return (sum(layer.nbytes for layer in layers) + others) / 1e6


class Int8Linear(nn.Module):
    """A linear layer that multiplies 8-bit weights with inputs in 8 bits.

    One scale holds for the whole weight, symmetric about zero; every call finds scale and zero point of its input anew.
    """

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = dense.in_features, dense.out_features
        bias = None if dense.bias is None else dense.bias.detach().float()
        self.packed = packed_int8(dense.weight.detach().float(), bias)
        #: Bytes of the codes, the bias, and the scale.
        self.nbytes = self.in_features * self.out_features + 4 * (1 if bias is None else 1 + len(bias))

    def forward(self, x: Tensor) -> Tensor:  # x: (..., n) -> (..., m)
        return int8_product(x, self.packed)

    def weight(self) -> Tensor:
        """The rounded weight; a method, as torch's own quantised layers have it, so that models take it for none."""
        return unpacked(self.packed)


def quantise(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with every linear layer quantised dynamically. Runs on CPUs."""
    if not any(engine != "none" for engine in torch.backends.quantized.supported_engines):
        raise InputError("this torch has no engine for int8 on this processor")
    quantised: Any = copy.deepcopy(model).cpu().float().eval()
    for name, layer in list(quantised.named_modules()):
        if type(layer) is nn.Linear:
            replace_module(quantised, name, Int8Linear(layer))
    return quantised
