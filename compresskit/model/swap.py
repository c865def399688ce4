"""Put factorised layers into a model, and dense ones back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.decomposers import (
    AnyDecomposer,
    FactorisedLayer,
    FactorisedLinear,
    Group,
    SharedFactors,
    Spec,
    TiedHead,
    exact_products,
)
from compresskit.errors import InputError
from compresskit.internals.torch import buffers_of, hooks, parameters_of
from compresskit.internals.transformers import forget_declared_ties
from compresskit.model.sharing import Scale, TiedEmbedding, scale_hook, scale_of, twin, untie
from compresskit.model.targets import replace_module

#: Options of embeddings beside ``padding_idx``: they change rows or gradients.
_OPTIONS = ("max_norm", "scale_grad_by_freq", "sparse")


def check_replaceable(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Refuse layers that do more than the ones in their place would.

    Raises:
        InputError: one has hooks or a ``forward`` of its own, or is an embedding with other options than
            ``padding_idx``.
    """
    for name in names:
        module = model.get_submodule(name)
        own = [hook for hook in hooks(module) if not isinstance(hook, Scale) and not _of_transformers(hook)]
        if own or "forward" in vars(module):
            what = f"a hook ({getattr(own[0], '__qualname__', type(own[0]).__name__)})" if own else "its own forward"
            raise InputError(
                f"model: {name} has {what}, which the layer in its place would not have: take it off first, and put "
                "it on the new model where it is still wanted"
            )
        for option in _OPTIONS:
            if getattr(module, option, None):
                raise InputError(
                    f"model: embedding {name} has {option}={getattr(module, option)}, which a factorised one cannot "
                    f"follow: set {option} to {None if option == 'max_norm' else False} first"
                )


def _of_transformers(hook: Callable[..., Any]) -> bool:
    """Whether a hook is of transformers itself, which puts it on again where it is needed (checkpointing)."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "transformers"


def mount(model: PreTrainedModel, decomposer: AnyDecomposer, group: Group, spec: Spec) -> None:
    """Replace a group's dense layers by factorised ones, in place; their factors are on the meta device.

    Biases are the old layers' own; factors of a frozen weight are frozen. Modules that share a weight share its factors
    (heads tied to a factorised embedding become :class:`TiedHead`).
    """
    with torch.device("meta"):
        layers = decomposer.layers(group, spec)
    targets = {target.name: target for target in group.targets}
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
        assert isinstance(layer, FactorisedLayer)
        layer.train(old.training)
        _take_after(layer, old.weight)
        if isinstance(layer, FactorisedLinear) and isinstance(old, nn.Linear):
            layer.bias = old.bias
        scale = scale_of(old)
        if scale is not None:
            layer.register_forward_hook(scale)
        replace_module(model, path, layer)
        for other in targets[path].shared:
            replace_module(model, other, twin(layer, model.get_submodule(other)))
        untie(model, {f"{name}.weight" for name in targets[path].shared})


def _take_after(layer: nn.Module, weight: Tensor) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(weight.dtype)
        parameter.requires_grad_(weight.requires_grad)


def assign(model: PreTrainedModel, factors: Mapping[str, Tensor]) -> None:
    """Give mounted layers their factors, by module path and attribute; shared ones lie below the base model. Whole
    numbers are buffers.
    """
    modules = list(model.modules())
    for name, tensor in factors.items():
        path, _, attribute = name.rpartition(".")
        shared = isinstance(getattr(model.base_model, path, None), SharedFactors)
        layer = model.base_model.get_submodule(path) if shared else model.get_submodule(path)
        old: Any = getattr(layer, attribute)
        new = nn.Parameter(tensor, old.requires_grad) if tensor.is_floating_point() else tensor
        for holder in modules:  # layers that share a weight
            if holder is layer or parameters_of(holder).get(attribute) is old:
                setattr(holder, attribute, new)
            elif buffers_of(holder).get(attribute) is old:  # is stored with each
                setattr(holder, attribute, tensor.clone())


@exact_products
def densify(model: PreTrainedModel) -> None:
    """Replace every factorised layer by an ordinary one with the weight multiplied out, in place; ties are restored.

    Raises:
        InputError: see :func:`check_replaceable`.
    """
    ours = (FactorisedLayer, TiedHead, TiedEmbedding)
    check_replaceable(model, [name for name, module in model.named_modules() if isinstance(module, ours)])
    tied = {n: m for n, m in model.named_modules() if isinstance(m, TiedHead | TiedEmbedding)}
    weights: dict[tuple[int, ...], nn.Parameter] = {}  # one for all layers with the same factors
    for name, module in list(model.named_modules()):
        if isinstance(module, FactorisedLayer):
            factors = tuple(id(value) for key, value in module.named_parameters() if key != "bias")
            if isinstance(module, FactorisedLinear) and factors in weights:
                dense: Any = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
                dense.register_parameter("bias", module.bias)
                dense.train(module.training)
            else:
                dense = module.to_dense()
            dense.weight = weights.setdefault(factors, dense.weight) if factors else dense.weight
            scale = scale_hook(module)
            replace_module(model, name, scale.dense(dense).train(module.training) if scale is not None else dense)
    for name, module in list(model.base_model.named_children()):
        if isinstance(module, SharedFactors):
            delattr(model.base_model, name)
    table = model.get_input_embeddings()
    for name, other in tied.items():
        assert isinstance(table, nn.Embedding)
        with torch.device("meta"):
            if isinstance(other, TiedHead):
                dense = nn.Linear(other.in_features, other.out_features, bias=False)
                dense.register_parameter("bias", other.bias)
            else:
                dense = nn.Embedding(other.num_embeddings, other.embedding_dim, other.padding_idx)
        dense.weight = table.weight
        replace_module(model, name, dense.train(other.training))
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for method in ("resize_token_embeddings", "save_pretrained"):  # those of a compressed model
                module.__dict__.pop(method, None)
            forget_declared_ties(module)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
