"""How many tokens a model takes."""

from __future__ import annotations

from transformers import PreTrainedModel

from compresskit.errors import InputError


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model takes at most; None where its positions are relative."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - module.padding_idx - 1  # the roberta kind starts to count behind the padding
    return limit


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Refuse sequences longer than the model's position table. Raises InputError."""
    limit = positions(model)
    if limit is not None and max_length > limit:
        raise InputError(
            f"max length {max_length}: {type(model).__name__} has {limit} positions; choose at most {limit}"
        )
