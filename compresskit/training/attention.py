"""Attention maps for distillation: pre-softmax scores where the family lets an attention function be put in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SCORES = "compresskit_scores"


def scores_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Eager attention that returns the scores before mask and softmax in place of the probabilities.

    Args:
        module: the attention module.
        query, key, value: (B, A, T, H / A).
        attention_mask: additive, (B, 1, T, T) or broadcastable.
        scaling: default 1 / sqrt(H / A).
        dropout: of the probabilities.

    Returns:
        Output (B, T, A, H / A) and scores Q K^T x scaling (B, A, T, T).
    """
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    masked = scores if attention_mask is None else scores + attention_mask[..., : key.shape[-2]]
    probabilities = torch.softmax(masked, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), scores


ALL_ATTENTION_FUNCTIONS.register(SCORES, scores_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(SCORES, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


@contextmanager
def attention_kept(*models: PreTrainedModel | None) -> Iterator[None]:
    """Give the models their own attention implementation back in the end."""
    before = [(model, model.config._attn_implementation) for model in models if model is not None]
    try:
        yield
    finally:
        for model, implementation in before:
            if model.config._attn_implementation != implementation:
                model.set_attn_implementation(implementation)


def expose_attention(model: PreTrainedModel) -> str:
    """Make ``output_attentions`` give the most telling map the family allows: ``scores``, else ``probabilities``."""
    if getattr(model, "_supports_attention_backend", False):
        with suppress(ValueError, ImportError):
            model.set_attn_implementation(SCORES)
            return "scores"
    model.set_attn_implementation("eager")
    return "probabilities"
