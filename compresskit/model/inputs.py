"""Inputs as a model takes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def takes_mask(model: Any) -> bool:
    """Whether a transformers model can be told which tokens are padding. FNet cannot: it mixes all into each."""
    return "attention_mask" in inspect.signature(model.forward).parameters


def fitted(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of a tokenizer as ``model`` takes it.

    Token types that the model does not tell apart are type 0 (a tokenizer for pairs, a model of one type). Types and
    masks are left out for a family without them. Where a page's layout is part of a family's input and the batch has
    none, every word lies in the empty box, as in LayoutLM.

    Args:
        model: a transformers model; any other (an exported one) gets its token types alone fitted.
        batch: ``input_ids`` (B, T) and what else there is.
    """
    found = dict(batch)
    accepted = inspect.signature(model.forward).parameters if isinstance(model, nn.Module) else {}
    for name in ("token_type_ids", "attention_mask"):  # FNet has no mask
        if accepted and name in found and name not in accepted:
            del found[name]
    types = getattr(model.config, "type_vocab_size", None)
    if "token_type_ids" in found and isinstance(types, int) and types > 0:
        given = found["token_type_ids"]
        found["token_type_ids"] = torch.where(given < types, given, 0)
    if "bbox" in accepted and "bbox" not in found:
        found["bbox"] = torch.zeros(*found["input_ids"].shape, 4, dtype=torch.long, device=found["input_ids"].device)
    return found
