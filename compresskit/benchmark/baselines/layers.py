"""The dense model with fewer layers, evenly chosen and distilled as the students are."""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.benchmark.provenance import MadeBy
from compresskit.errors import InputError, UnreachableError
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.depth import stretches
from compresskit.model.targets import block_prefixes, count_parameters


class _FewerLayers(Baseline):
    """Keeps some layers, as DistilBERT begins, and everything else as it is."""

    trained = True
    pace = 0.2  # 1e-4 where factors take 5e-4 (reports/dense-rates)

    @abstractmethod
    def kept(self, model: PreTrainedModel, asked: Asked) -> int:
        """How many layers are kept. Raises UnreachableError: none can be left out, or too many would be kept."""

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The model with fewer layers. Raises UnreachableError: see :meth:`kept`."""
        smaller = replace(dense, model=with_fewer_layers(dense.model, self.kept(dense.model, asked)))
        counts = (one.model.config.num_hidden_layers for one in (smaller, dense))
        return Made(smaller, {"layers": "{} of {}".format(*counts)})

    def fact(self, model: str, made_by: MadeBy) -> str:
        """How many layers are left."""
        return f"{made_by.layers} layers of {model}, evenly spread"


@register
class HalfLayers(_FewerLayers):
    """Every second layer, every third where their number is odd, ..."""

    name = "half-layers"
    summary = "every second layer, trained on the students' budget"

    def kept(self, model: PreTrainedModel, asked: Asked) -> int:
        """The largest share of the layers below 1 that leaves equal steps. Raises UnreachableError: there is one."""
        layers = _layers(self.name, model)
        return max(count for count in range(1, layers) if layers % count == 0)


@register
class Layers(_FewerLayers):
    """``layers:K``."""

    name = "layers"
    summary = "K layers, evenly chosen, trained on the students' budget"
    argument = "K"

    def check(self, argument: str) -> None:
        """Refuse what is no whole number above 0."""
        super().check(argument)
        if not re.fullmatch(r"[1-9]\d{0,5}", argument, re.ASCII):
            raise InputError(f"baseline layers:{argument}: K must be a whole number of at least 1, e.g. layers:3")

    def kept(self, model: PreTrainedModel, asked: Asked) -> int:
        """K. Raises UnreachableError: the model has no more layers."""
        layers, count = _layers(f"layers:{asked.argument}", model), int(asked.argument)
        if count >= layers:
            raise UnreachableError(f"layers:{count}: K must be below {layers}, the number of layers of the model")
        return count


@register
class FewerLayers(_FewerLayers):
    """As many layers as come nearest to the ratio."""

    name = "fewer-layers"
    summary = "as many layers as come nearest to the ratio, evenly chosen, trained on the students' budget"
    rated = True

    def kept(self, model: PreTrainedModel, asked: Asked) -> int:
        """The number whose ratio is nearest, as a quotient. Raises UnreachableError: the model has one layer."""
        assert asked.ratio is not None
        layers, wanted = _layers(self.name, model), count_parameters(model) / asked.ratio

        def off(count: int) -> float:
            with torch.device("meta"):
                size = count_parameters(_built(model, count))
            return max(size / wanted, wanted / size)

        return min(range(1, layers), key=off)


def _layers(name: str, model: PreTrainedModel) -> int:
    """The layers of a model. Raises UnreachableError: it has one."""
    layers: int = model.config.num_hidden_layers
    if layers < 2:
        raise UnreachableError(f"{name}: the model has one layer")
    return layers


def _built(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """A new model with that many layers, each of the kind of the layer that it begins as: some families list for every
    layer whether it attends to all tokens or to those nearby (``layer_types``).
    """
    config = copy.deepcopy(model.config)
    layers = config.num_hidden_layers
    kept = [stretch.start for stretch in stretches(layers, count)]
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list | tuple) and len(value) == layers:
            setattr(config, name, [value[number] for number in kept])
    config.num_hidden_layers = count
    made: PreTrainedModel = type(model)(config)
    return made


def with_fewer_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """The model with the first layer of each of ``count`` equal stretches."""
    layers = model.config.num_hidden_layers
    smaller: Any = _built(model, count)
    smaller = smaller.to(model.dtype)
    places = {path: re.fullmatch(r"(.*\.)(\d+)\.", path) for path in block_prefixes(model)}
    numbers = {stretch.start: place for place, stretch in enumerate(stretches(layers, count))}
    weights = {}
    for name, weight in model.state_dict().items():
        path = next((path for path in places if name.startswith(path)), None)
        match = places[path] if path is not None else None
        if path is None or match is None or len(places) != layers:
            weights[name] = weight
        elif int(match[2]) in numbers:
            weights[f"{match[1]}{numbers[int(match[2])]}.{name[len(path) :]}"] = weight
    smaller.load_state_dict(weights)
    made: PreTrainedModel = smaller.eval()
    return made
