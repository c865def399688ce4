"""How many tokens a model takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

from compresskit.errors import InputError

#: Last parts of the names of position tables. Boxes, entities and relative positions have tables with other names.
_TABLES = ("position_embeddings", "position_embedding", "positional_embedding", "embed_positions", "wpe")


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model takes at most, special tokens among them; None where nothing limits it.

    A table of positions does: by its rows, or by fewer where counting starts behind the padding (RoBERTa) or at another
    row (Nystromformer). Relative and rotary positions, and none at all, do not, whatever ``max_position_embeddings``
    says.
    """
    limits = [_rows(model.base_model, name, module) for name, module in model.base_model.named_modules()]
    return min((limit for limit in limits if limit), default=None)


def _rows(base: nn.Module, name: str, table: Any) -> int | None:
    path, _, last = name.rpartition(".")
    if last not in _TABLES or "entity" in path or not hasattr(table, "num_embeddings"):
        return None
    limit: int = table.num_embeddings
    if table.padding_idx is not None:
        limit -= table.padding_idx + 1
    numbers = getattr(base.get_submodule(path), "position_ids", None)  # the rows to look up, one for each token
    return min(limit, numbers.shape[-1]) if isinstance(numbers, torch.Tensor) else limit


def shortened(model: Any, tokens: int) -> int:
    """``tokens``, or as many as ``model`` takes; of what is no transformers model, as its configuration says."""
    if not isinstance(model, PreTrainedModel):
        with torch.device("meta"):
            model = AutoModel.from_config(model.config)
    return min(tokens, positions(model) or tokens)


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Refuse sequences longer than the model's position table. Raises InputError."""
    limit = positions(model)
    if limit is not None and max_length > limit:
        raise InputError(
            f"max length {max_length}: {type(model).__name__} has {limit} positions; choose at most {limit}"
        )
