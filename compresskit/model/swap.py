"""Put factorised layers into a model, and dense ones back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.decomposers import (
    AnyDecomposer,
    FactorisedEmbedding,
    FactorisedLayer,
    FactorisedLinear,
    Group,
    SharedFactors,
    Spec,
    TiedHead,
)
from compresskit.model.targets import replace_module, tied_heads


def mount(model: PreTrainedModel, decomposer: AnyDecomposer, group: Group, spec: Spec) -> None:
    """Replace a group's dense layers by factorised ones, in place; their factors are on the meta device.

    Biases are the old layers' own; factors of a frozen weight are frozen. Heads tied to a factorised embedding become
    :class:`TiedHead`.
    """
    with torch.device("meta"):
        layers = decomposer.layers(group, spec)
    targets = {target.name for target in group.targets}
    for path, layer in layers.items():
        if path not in targets:
            weights: list[Any] = [model.get_submodule(target.name).weight for target in group.targets]
            _take_after(layer, weights[0])
            # Shared factors learn as soon as one of their matrices does.
            layer.requires_grad_(any(weight.requires_grad for weight in weights))
            layer.train(model.training)
            model.base_model.add_module(path, layer)
            continue
        old = model.get_submodule(path)
        assert isinstance(old, nn.Linear | nn.Embedding)
        layer.train(old.training)
        _take_after(layer, old.weight)
        if isinstance(layer, FactorisedEmbedding):
            _mount_embedding(model, path, layer)
        else:
            if isinstance(layer, FactorisedLinear) and isinstance(old, nn.Linear):
                layer.bias = old.bias
            replace_module(model, path, layer)


def _take_after(layer: nn.Module, weight: Tensor) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(weight.dtype)
        parameter.requires_grad_(weight.requires_grad)


def _mount_embedding(model: PreTrainedModel, path: str, layer: FactorisedEmbedding) -> None:
    is_word_embedding = model.get_submodule(path) is model.get_input_embeddings()
    heads = tied_heads(model) if is_word_embedding else []
    replace_module(model, path, layer)
    for head in heads:
        old = model.get_submodule(head)
        assert isinstance(old, nn.Linear)
        replace_module(model, head, TiedHead(layer, old.bias))
    if heads:
        _drop_weight_ties(model, {f"{head}.weight" for head in heads})


def _drop_weight_ties(model: PreTrainedModel, keys: set[str]) -> None:
    """Make transformers forget ties that :class:`TiedHead` now keeps by construction."""
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel):
            continue
        prefix = f"{name}." if name else ""
        ties = {key: source for key, source in module.all_tied_weights_keys.items() if prefix + key not in keys}
        module.all_tied_weights_keys = ties
        if module._tied_weights_keys:
            # On the instance: tie_weights() recomputes its map from this attribute.
            module._tied_weights_keys = {
                key: source for key, source in module._tied_weights_keys.items() if prefix + key not in keys
            }


def assign(model: PreTrainedModel, factors: Mapping[str, Tensor]) -> None:
    """Give mounted layers their factors, by module path and attribute; shared ones lie below the base model. Whole
    numbers are buffers.
    """
    for name, tensor in factors.items():
        path, _, attribute = name.rpartition(".")
        shared = isinstance(getattr(model.base_model, path, None), SharedFactors)
        layer = model.base_model.get_submodule(path) if shared else model.get_submodule(path)
        learns = tensor.is_floating_point()
        setattr(layer, attribute, nn.Parameter(tensor, getattr(layer, attribute).requires_grad) if learns else tensor)


def densify(model: PreTrainedModel) -> None:
    """Replace every factorised layer by an ordinary one with the weight multiplied out, in place; ties are restored."""
    heads = {name: module for name, module in model.named_modules() if isinstance(module, TiedHead)}
    for name, module in list(model.named_modules()):
        if isinstance(module, FactorisedLayer):
            replace_module(model, name, module.to_dense())
    for name, module in list(model.base_model.named_children()):
        if isinstance(module, SharedFactors):
            delattr(model.base_model, name)
    for name, head in heads.items():
        with torch.device("meta"):
            dense = nn.Linear(head.in_features, head.out_features, bias=False)
        table = model.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        dense.weight = table.weight
        dense.register_parameter("bias", head.bias)
        replace_module(model, name, dense.train(head.training))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.__dict__.pop("resize_token_embeddings", None)  # a factorised embedding kept its size
            module.__dict__.pop("_tied_weights_keys", None)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
