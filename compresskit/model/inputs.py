"""Inputs as a model takes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.model.tokenizer import MASK


def fitted(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of a tokenizer as ``model`` takes it.

    Token types that the model does not tell apart are type 0 (a tokenizer for pairs, a model of one type). Types and
    masks are left out for a family without them. Where a page's layout is part of a family's input and the batch has
    none, every word lies in the empty box, as in LayoutLM. BigBird attends to blocks in long sequences again, which it
    gives up for good once it has seen a short one.

    Args:
        model: a transformers model; any other (an exported one) gets its token types alone fitted.
        batch: ``input_ids`` (B, T) and what else there is.
    """
    found = dict(batch)
    limit = full_attention(model)
    if limit is not None and found["input_ids"].shape[-1] > limit:
        model.base_model.set_attention_type("block_sparse")
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


def complete(batch: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """The inputs that an exported model reads, by their ``names``: as in torch, every token is real where no mask says
    otherwise, and of type 0.
    """
    ids = batch["input_ids"]
    return {name: batch.get(name, torch.full_like(ids, int(name == MASK))) for name in names}


def full_attention(model: Any) -> int | None:
    """Up to how many tokens each attends to all, in BigBird, which attends to blocks of longer sequences; None where
    length decides nothing.
    """
    base: Any = getattr(model, "base_model", None)
    if not hasattr(base, "set_attention_type") or model.config.attention_type != "block_sparse":
        return None
    return int((5 + 2 * model.config.num_random_blocks) * model.config.block_size)
