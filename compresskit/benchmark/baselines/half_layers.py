"""The dense model with every second layer, distilled as the students are."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.benchmark.provenance import MadeBy
from compresskit.errors import UnreachableError
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.targets import block_prefixes


@register
class HalfLayers(Baseline):
    """As DistilBERT begins: every second layer (every third where their number is odd, ...), the rest as it is."""

    name = "half-layers"
    summary = "every second layer, trained on the students' budget"
    trained = True

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The model with fewer layers. Raises UnreachableError: it has one layer."""
        smaller = replace(dense, model=with_fewer_layers(dense.model))
        counts = (one.model.config.num_hidden_layers for one in (smaller, dense))
        return Made(smaller, {"layers": "{} of {}".format(*counts)})

    def fact(self, model: str, made_by: MadeBy) -> str:
        """How many layers are left."""
        return f"{made_by.layers} layers of {model}, evenly spread" if made_by.layers is not None else ""


def with_fewer_layers(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every n-th layer, n the smallest divisor of their number above 1.

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
