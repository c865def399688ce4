"""Attention maps for distillation: pre-softmax scores where the family lets an attention function be put in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from compresskit.errors import one_line
from compresskit.internals.transformers import attention_of, takes_attention_functions
from compresskit.model.inputs import fitted
from compresskit.model.kept import mode_kept
from compresskit.model.positions import shortened

SCORES = "compresskit_scores"
#: Tokens that are run to see what a model gives: whole blocks of every family.
_TOKENS = 64


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
        query, key, value: (B, A, T, H / A); keys and values may have fewer heads, each for several queries.
        attention_mask: additive, (B, 1, T, T) or broadcastable.
        scaling: default 1 / sqrt(H / A).
        dropout: of the probabilities.

    Returns:
        Output (B, T, A, H / A) and scores Q K^T x scaling (B, A, T, T).
    """
    if key.shape[1] != query.shape[1]:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
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
    before = [(model, attention_of(model)) for model in models if model is not None]
    try:
        yield
    finally:
        for model, implementation in before:
            if attention_of(model) != implementation:
                model.set_attn_implementation(implementation)


def expose_attention(model: PreTrainedModel) -> str:
    """Make ``output_attentions`` give the most telling map the family allows: ``scores``, else ``probabilities``.

    Where the model computes something else with the scores' function than with its own (which may cap the scores, or
    add to them), it keeps its own.
    """
    model.set_attn_implementation("eager")
    if takes_attention_functions(model):
        with suppress(Exception):
            own = _run(model)[0]
            model.set_attn_implementation(SCORES)
            if torch.allclose(_run(model)[0], own, rtol=1e-2, atol=1e-2 * float(own.abs().mean())):
                return "scores"
        model.set_attn_implementation("eager")
    return "probabilities"


def lacking(model: PreTrainedModel, what: Literal["hidden_states", "attentions"]) -> str | None:
    """Why a model does not give hidden states (B, T, H) or attention maps (B, A, T, T) of every layer; None if it does.

    A short sequence is run through it: families differ in more than their configurations say. FNet and YOSO have no
    attention maps, Longformer's are of windows, Funnel's states become fewer.
    """
    kind, name = type(model).__name__, "attention maps" if what == "attentions" else "hidden states"
    with attention_kept(model):
        if what == "attentions":
            model.set_attn_implementation("eager")
        try:
            found = _run(model, **{f"output_{what}": True}).get(what)
        except Exception as error:  # every family refuses in its own way
            return f"{kind} gives no {name} ({one_line(error)[:100]})"
    axes = 2 if what == "attentions" else 1
    if not found or any(layer is None or layer.dim() != axes + 2 for layer in found):
        return f"{kind} gives no {name}"
    tokens = found[0].shape[1] if what == "hidden_states" else found[0].shape[-2]
    if tokens != _length(model) or any(set(_tokens(layer, what)) != {tokens} for layer in found):
        return f"the {name} of {kind} are not one for each token"
    return None


def _tokens(layer: Tensor, what: str) -> tuple[int, ...]:
    return tuple(layer.shape[-2:] if what == "attentions" else layer.shape[1:2])


def _length(model: PreTrainedModel) -> int:
    return shortened(model, _TOKENS)


@torch.no_grad()
def _run(model: PreTrainedModel, **wanted: bool) -> Any:
    """The base model's outputs for a sequence of the first words of its vocabulary."""
    base = model.base_model
    ids = torch.arange(_length(model), device=model.device)[None] % model.config.vocab_size
    with mode_kept(model), torch.random.fork_rng(devices=[]):
        base.eval()
        torch.manual_seed(0)  # BigBird attends to random blocks
        return base(**fitted(base, {"input_ids": ids}), **wanted, return_dict=True)
