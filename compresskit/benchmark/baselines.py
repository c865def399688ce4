"""What a skeptic compares with: the dense model in 8 bits, and one with fewer layers."""

from __future__ import annotations

import copy
import io
import re
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from compresskit.errors import InputError, UnreachableError
from compresskit.model.targets import block_prefixes


def quantise(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with torch's dynamic int8 quantisation of every linear layer. Runs on CPUs."""
    if not any(engine != "none" for engine in torch.backends.quantized.supported_engines):
        raise InputError("this torch has no engine for int8 on this processor")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of a package of its own, but what everyone has
        quantised: PreTrainedModel = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model).cpu().float(), {nn.Linear}, dtype=torch.qint8
        )
    return quantised


def int8_megabytes(model: PreTrainedModel) -> float:
    """MB of the file that ``torch.save`` makes of a quantised model's weights: safetensors has no such tensors."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue()) / 1e6


def with_fewer_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every second layer (every third where the number is odd, ...), as DistilBERT begins.

    Raises:
        UnreachableError: it has one layer.
    """
    layers = model.config.num_hidden_layers
    every = next((number for number in range(2, layers + 1) if layers % number == 0), None)
    if every is None:
        raise UnreachableError("half-layers: the model has one layer")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers // every
    smaller: Any = type(model)(config)
    smaller = smaller.to(model.dtype)
    places = {path: re.fullmatch(r"(.*\.)(\d+)\.", path) for path in block_prefixes(model)}
    weights = {}
    for name, weight in model.state_dict().items():
        path = next((path for path in places if name.startswith(path)), None)
        match = places[path] if path is not None else None
        if path is None or match is None or len(places) != layers:
            weights[name] = weight
        elif int(match[2]) % every == 0:
            weights[f"{match[1]}{int(match[2]) // every}.{name[len(path) :]}"] = weight
    smaller.load_state_dict(weights)
    made: PreTrainedModel = smaller.eval()
    return made
