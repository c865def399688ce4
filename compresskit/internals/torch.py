"""Checked with torch 2.13. Of a module its own members: the public iterators leave out what comes twice."""

from __future__ import annotations

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


def without_subclasses() -> Any:
    """A context in which functions of subclasses of tensors are those of tensors."""
    return torch._C.DisableTorchFunctionSubclass()


def replaced(kind: type[T], function: Callable[[T], Any], *values: Any) -> Sequence[Any]:
    """The values with every instance of ``kind`` inside them replaced."""
    found: Sequence[Any] = tree_map_only(kind, function, values)
    return found
