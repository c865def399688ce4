"""A model with some rows of its vocabulary alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model.rebuilt import rebuilt
from compresskit.model.rebuilt import shapes as shapes_of


def vocabulary_rows(model: PreTrainedModel) -> int:
    """Rows of the word embedding.

    Raises:
        InputError: the configuration says something else, so that it is not known what hangs on the vocabulary.
    """
    table = model.get_input_embeddings()
    assert isinstance(table, nn.Embedding)  # supported models have one
    if getattr(model.config, "vocab_size", None) != table.num_embeddings:
        raise InputError(
            f"{type(model).__name__}: its word embedding has {table.num_embeddings:,} rows, its configuration says "
            f"vocab_size {getattr(model.config, 'vocab_size', None)}; its vocabulary cannot be trimmed"
        )
    return table.num_embeddings


def named_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that the model's configuration names by number, such as ``pad_token_id``."""
    found: set[int] = set()

    def note(number: int) -> int:
        found.add(number)
        return number

    _renumber(copy.deepcopy(model.config), note)
    return found


def check_padding(model: PreTrainedModel, new: Mapping[int, int]) -> None:
    """Refuse new numbers of tokens that would shift the model's positions.

    Raises:
        InputError: positions are counted from the padding token's number (RoBERTa), and it gets another one.
    """
    pad = model.config.pad_token_id
    table = model.get_input_embeddings()
    counted = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not table and m.padding_idx == pad]
    if pad is not None and counted and new.get(pad, pad) != pad:
        raise InputError(
            f"{type(model).__name__} counts positions from the padding token's number {pad}, which would become "
            f"{new[pad]}: keep more tokens than {pad}"
        )


@torch.no_grad()
def with_rows(model: PreTrainedModel, order: Sequence[int]) -> PreTrainedModel:
    """A model of the same class that has these rows of the vocabulary, in this order; all else is ``model``'s own.

    They are taken of every tensor whose shape hangs on ``vocab_size``: the word embedding, the decoder and its bias
    (MobileBERT's decoder has a part with columns for them).

    Raises:
        InputError: a tensor hangs on the vocabulary in another way than by one of its dimensions.
    """
    rows = vocabulary_rows(model)
    new = {old: number for number, old in enumerate(order)}
    config = copy.deepcopy(model.config)
    config.vocab_size = len(order)
    _renumber(config, lambda number: new.get(number, number))
    shapes = shapes_of(model, config)
    chosen = torch.tensor(order, device=model.device)
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        wanted = tuple(shapes.get(name, ()))
        changed = [d for d, size in enumerate(tensor.shape) if len(wanted) != tensor.dim() or size != wanted[d]]
        if changed and (len(changed) > 1 or (tensor.shape[changed[0]], wanted[changed[0]]) != (rows, len(order))):
            raise InputError(f"{type(model).__name__}: {name} hangs on the vocabulary in a way that is not known")
        tensors[name] = tensor.index_select(changed[0], chosen) if changed else tensor
    return rebuilt(model, config, tensors)


def _renumber(config: Any, change: Callable[[int], int]) -> None:
    """Change the numbers of tokens in a configuration, in place."""
    for name in (name for name in config.to_dict() if name.endswith("_token_id")):
        value = getattr(config, name, None)
        if isinstance(value, list):
            setattr(config, name, [change(number) for number in value])
        elif isinstance(value, int):
            setattr(config, name, change(value))
