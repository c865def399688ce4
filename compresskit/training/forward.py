"""Changes of how a model computes that last no longer than its training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

_DROPOUT_NUMBERS = ("attention_dropout", "attention_probs_dropout_prob", "dropout_prob")


@contextmanager
def dropout(model: PreTrainedModel, probability: float | Literal["keep"]) -> Iterator[None]:
    """Every dropout of the model at ``probability`` for a while; ``keep`` changes nothing."""
    changed: list[tuple[Any, str, float]] = []
    for module in model.modules() if probability != "keep" else ():
        # Attention modules keep the probability as a number.
        names = ("p",) if isinstance(module, torch.nn.Dropout) else _DROPOUT_NUMBERS
        changed += [(module, name, getattr(module, name)) for name in names if _is_number(module, name)]
    for module, name, _ in changed:
        setattr(module, name, probability)
    try:
        yield
    finally:
        for module, name, before in changed:
            setattr(module, name, before)


def _is_number(module: Any, name: str) -> bool:
    return isinstance(getattr(module, name, None), float | int)
