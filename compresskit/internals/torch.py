"""Checked with torch 2.13. Of a module its own members: the public iterators leave out what comes twice."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

T = TypeVar("T")


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by attribute."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by attribute."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own children by attribute."""
    return module._modules


def with_members(
    module: nn.Module, parameters: Mapping[str, nn.Parameter | None], buffers: Mapping[str, Tensor | None]
) -> None:
    """Replace all of the module's own parameters and buffers."""
    module._parameters, module._buffers = dict(parameters), dict(buffers)


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run after the module."""
    return list(module._forward_hooks.values())


def hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """What runs before or after the module, forth and back."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return [hook for kind in kinds for hook in kind.values()]


def without_subclasses() -> Any:
    """A context in which functions of subclasses of tensors are those of tensors."""
    return torch._C.DisableTorchFunctionSubclass()


def replaced(kind: type[T], function: Callable[[T], Any], *values: Any) -> Sequence[Any]:
    """The values with every instance of ``kind`` inside them replaced."""
    found: Sequence[Any] = tree_map_only(kind, function, values)
    return found


def packed_int8(weight: Tensor, bias: Tensor | None) -> Any:
    """The weight (m, n) of a linear layer in 8 bits with its bias, for :func:`int8_product`. One scale, symmetric."""
    scale = max(2 * float(weight.abs().max()) / 255, float(torch.finfo(torch.float32).eps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop such tensors in a version that is not allowed yet
        codes = torch.quantize_per_tensor(weight, scale, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(codes, bias)


def int8_product(x: Tensor, packed: Any) -> Tensor:
    """The layer's output for x (..., n), which is quantised as it comes: what a layer of
    ``torch.ao.quantization.quantize_dynamic`` computes, which newer versions drop.
    """
    found: Tensor = torch.ops.quantized.linear_dynamic(x, packed, True)
    return found


def unpacked(packed: Any) -> Tensor:
    """The rounded weight of :func:`packed_int8`, (m, n) in float32."""
    weight: Tensor = torch.ops.quantized.linear_unpack(packed)[0].dequantize()
    return weight
