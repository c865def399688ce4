"""FLOPs of a model by torch's own counter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from compresskit.decomposers import COST_TOKENS, FactorisedLayer, TiedHead
from compresskit.errors import InputError, one_line
from compresskit.model.inputs import fitted
from compresskit.model.positions import shortened
from compresskit.model.targets import skeleton

_LINEAR = (nn.Linear, nn.Embedding, FactorisedLayer, TiedHead)


class Flops(NamedTuple):
    """FLOPs (2 x multiply-adds) of one forward pass: the whole model, and its linear layers and look-ups only."""

    total: int
    linear: int


def count_flops(model: PreTrainedModel, tokens: int = COST_TOKENS) -> Flops:
    """FLOPs of the whole model for one sequence of ``tokens``, with eager attention (SDPA is not counted on CPU).

    Runs on the meta device, so that nothing is computed; families that look at the values of a mask run on the CPU
    with hollow weights. Models with fewer positions are measured at their longest sequence. ``linear`` is what runs
    inside linear layers, look-ups and tied heads: the products of attention are left out.

    Raises:
        InputError: the model needs more than token ids.
    """
    tokens = shortened(model, tokens)
    try:
        return _count(skeleton(model), tokens)
    except Exception:  # most often "Tensor.item() cannot be called on meta tensors"
        try:
            return _count(skeleton(model, "cpu"), tokens)
        except Exception as error:
            problem = one_line(error)
            raise InputError(f"{type(model).__name__} cannot be run on token ids alone: {problem}") from error


def _count(model: PreTrainedModel, tokens: int) -> Flops:
    model.eval().requires_grad_(False).set_attn_implementation("eager")
    ids = torch.full((1, tokens), model.config.vocab_size - 1, device=model.device)
    if type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():  # classes would all be imported
        ids = ids[None]  # one choice
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(**fitted(model, {"input_ids": ids}))
    by_module = counter.get_flop_counts()
    linear = sum(
        sum(by_module.get(f"{type(model).__name__}.{name}", {}).values())
        for name, module in model.named_modules()
        if isinstance(module, _LINEAR)
    )
    return Flops(counter.get_total_flops(), linear)
