"""Tensors that several modules of a model share, and embeddings that do more than look up."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.decomposers import FactorisedEmbedding, FactorisedLayer, TiedHead
from compresskit.internals.torch import buffers_of, forward_hooks, parameters_of, with_members
from compresskit.internals.transformers import declare_ties, declared_ties


class TiedEmbedding(nn.Module):
    """An embedding whose table is that of a factorised one elsewhere in the model (``encoder.embed_tokens`` of T5).

    The other one is referenced through ``__dict__``, not registered, so its factors are stored and counted once.
    """

    def __init__(self, embedding: FactorisedEmbedding, padding_idx: int | None) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = padding_idx

    @property
    def embedding(self) -> FactorisedEmbedding:
        """The embedding whose factors this one looks up in."""
        found: FactorisedEmbedding = self.__dict__["embedding"]
        return found

    @property
    def weight(self) -> Tensor:
        """The table, multiplied out anew wherever it is used; it cannot be set."""
        return self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:  # ids: (...) -> (..., d)
        found: Tensor = self.embedding(ids)
        return found


class Scale:
    """A forward hook: the look-up times a constant, as the embeddings of Gemma have it; the table itself is not scaled.

    Args:
        kind: the class that the dense embedding had.
        factor: the constant.
    """

    def __init__(self, kind: type[nn.Embedding], factor: float) -> None:
        self.kind = kind
        self.factor = factor

    def __call__(self, layer: nn.Module, _: Any, found: Tensor) -> Tensor:
        # As the families do it: the constant is rounded to the dtype of the weights.
        return found * torch.tensor(self.factor, dtype=next(layer.parameters()).dtype, device=found.device)

    def dense(self, plain: nn.Embedding) -> nn.Embedding:
        """The embedding of the dense model with this table."""
        with torch.device("meta"):
            made: nn.Embedding = self.kind(plain.num_embeddings, plain.embedding_dim, plain.padding_idx, self.factor)
        made.weight = plain.weight
        if "embed_scale" in (buffers := buffers_of(made)):
            buffers["embed_scale"] = torch.tensor(self.factor, device=plain.weight.device)
        return made


def scale_of(module: nn.Module) -> Scale | None:
    """What an embedding multiplies its look-ups with; None where it is an ordinary one, or another kind of module."""
    if not isinstance(module, nn.Embedding) or type(module) is nn.Embedding:
        return None
    names = ("scalar_embed_scale", "embed_scale")
    factor = next((getattr(module, name) for name in names if isinstance(getattr(module, name, None), float)), None)
    return Scale(type(module), factor) if factor is not None else None


def scale_hook(layer: nn.Module) -> Scale | None:
    """The scale that :func:`add_scale` gave a factorised embedding."""
    return next((hook for hook in forward_hooks(layer) if isinstance(hook, Scale)), None)


def twin(layer: FactorisedLayer, other: nn.Module) -> nn.Module:
    """What takes the place of ``other``, which has the same weight as the module that ``layer`` replaces: the same
    factors, its own bias.
    """
    made: nn.Module
    if isinstance(layer, FactorisedEmbedding):
        if isinstance(other, nn.Linear):
            made = TiedHead(layer, other.bias)
        else:
            made = TiedEmbedding(layer, getattr(other, "padding_idx", None))
    else:
        made = copy.copy(layer)
        with_members(made, {**parameters_of(layer), "bias": getattr(other, "bias", None)}, buffers_of(layer))
    made.train(other.training)
    return made


def undeclared_ties(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that are one and the same tensor though the family does not say so: name -> name of the first."""
    known = model.all_tied_weights_keys or {}
    places: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[id(parameter)].append(name)
    found: dict[str, str] = {}
    for names in places.values():
        free = [name for name in names if name not in known]
        owner = next((known[name] for name in names if name in known and known[name] in free), free[0] if free else "")
        found |= {name: owner for name in free if name != owner}
    return found


def tie(model: PreTrainedModel, ties: Mapping[str, str]) -> None:
    """Make parameters one and the same tensor, and tell transformers, which then stores and reads them once.

    Args:
        ties: name of a parameter -> name of the one that takes its place.
    """
    for name, owner in ties.items():
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, model.get_parameter(owner))
    if not ties:
        return
    for part, prefix in _parts(model):
        own = {name[len(prefix) :]: owner[len(prefix) :] for name, owner in ties.items() if _both(prefix, name, owner)}
        part.all_tied_weights_keys = {**(part.all_tied_weights_keys or {}), **own}
        declared = {_pattern(name): _pattern(owner) for name, owner in own.items()}
        declare_ties(part, {**declared_ties(part), **declared})


def untie(model: PreTrainedModel, keys: set[str]) -> None:
    """Make transformers forget ties of these parameters, which factors now keep by construction."""
    for part, prefix in _parts(model):
        gone = {key[len(prefix) :] for key in keys if key.startswith(prefix)}
        ties = part.all_tied_weights_keys or {}
        part.all_tied_weights_keys = {key: source for key, source in ties.items() if key not in gone}
        if declared := declared_ties(part):
            declare_ties(part, {key: source for key, source in declared.items() if key not in gone})


def separate(model: PreTrainedModel) -> None:
    """Give every module its own copy of what it shares with others beyond the family's own ties, in place: an ordinary
    checkpoint cannot say that they are one.
    """
    for name in undeclared_ties(model):
        path, _, attribute = name.rpartition(".")
        parameter = model.get_parameter(name)
        module = model.get_submodule(path)
        setattr(module, attribute, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def _parts(model: PreTrainedModel) -> list[tuple[PreTrainedModel, str]]:
    """The model and the models inside it, each with the prefix of its parameters' names."""
    modules = model.named_modules()
    return [(part, f"{name}." if name else "") for name, part in modules if isinstance(part, PreTrainedModel)]


def _both(prefix: str, name: str, owner: str) -> bool:
    return name.startswith(prefix) and owner.startswith(prefix)


def _pattern(name: str) -> str:
    """A parameter's name as transformers reads it: a pattern, unless it ends in ``weight`` or ``bias``."""
    return name if name.endswith(("weight", "bias")) else f"{re.escape(name)}$"
