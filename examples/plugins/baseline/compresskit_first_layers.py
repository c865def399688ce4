"""The first K layers of the dense model: a baseline of another package.

It learns on the same budget as the students, so a table shows what leaving out the last layers costs instead.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.provenance import MadeBy
from compresskit.errors import InputError, UnreachableError
from compresskit.model.checkpoint import Checkpoint


class FirstLayers(Baseline):
    """``first-layers:K`` in a grid."""

    name = "first-layers"
    summary = "the first K layers, distilled on the students' budget"
    argument = "K"
    trained = True

    def check(self, argument: str) -> None:
        super().check(argument)
        if not argument.isdecimal() or int(argument) < 1:
            raise InputError(f"baseline first-layers:{argument}: K must be a whole number of at least 1")

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        model: Any = dense.model
        layers, kept = model.config.num_hidden_layers, int(asked.argument)
        if kept >= layers or layers % kept:  # each layer learns from the teacher's at the same share of the way
            raise UnreachableError(f"first-layers:{kept}: K must divide the {layers} layers of the model")
        config = copy.deepcopy(model.config)
        config.num_hidden_layers = kept
        smaller = type(model)(config).to(model.dtype)
        weights = model.state_dict()
        smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
        return Made(replace(dense, model=smaller.eval()), {"facts": {"layers": f"{kept} of {layers}"}})

    def fact(self, model: str, made_by: MadeBy) -> str:
        return f"the first {made_by.facts['layers']} layers of {model}"
