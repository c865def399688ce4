"""The dense model in 8 bits."""

from __future__ import annotations

import copy
import io
import warnings
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.errors import InputError
from compresskit.model.checkpoint import Checkpoint


@register
class Int8(Baseline):
    """torch's dynamic quantisation: weights of linear layers in 8 bits, inputs quantised as they come. Not trained."""

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
        """Of the file that ``torch.save`` makes of the weights: safetensors has no such tensors."""
        file = io.BytesIO()
        torch.save(made.model.state_dict(), file)
        return len(file.getvalue()) / 1e6


def quantise(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with every linear layer quantised dynamically. Runs on CPUs."""
    if not any(engine != "none" for engine in torch.backends.quantized.supported_engines):
        raise InputError("this torch has no engine for int8 on this processor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of a package of its own, but what everyone has
        quantised: PreTrainedModel = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model).cpu().float(), {nn.Linear}, dtype=torch.qint8
        )
    return quantised
