"""Models that were given as objects come back as they were: mode, dtype and device are the caller's."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

M = TypeVar("M", bound=PreTrainedModel)
N = TypeVar("N", bound=nn.Module)


def copied(model: N, memo: dict[int, Any] | None = None) -> N:
    """A deep copy, also of a copy.

    A model that was trained with gradient checkpointing holds handles of its hooks, which torch cannot copy twice. The
    copy's handles remove nothing.
    """
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            for handle in value if isinstance(value, list) else [value]:
                if isinstance(handle, RemovableHandle):
                    memo[id(handle)] = RemovableHandle(OrderedDict())
    return copy.deepcopy(model, memo)


@contextmanager
def mode_kept(*models: nn.Module) -> Iterator[None]:
    """Give every module its own mode (training or not) back in the end: a caller may have frozen some of them."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def as_it_was(*models: nn.Module) -> Iterator[None]:
    """Give every tensor its dtype and device back in the end, and every module its mode.

    Numbers survive where the types in between hold them, as float32 does with those of 16 bits.
    """
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    before = [(tensor, tensor.dtype, tensor.device) for tensor in tensors]
    with mode_kept(*models):
        try:
            yield
        finally:
            for tensor, dtype, device in before:
                tensor.data = tensor.data.to(device, dtype)


def twin(model: M) -> M:
    """A copy with a mode, a configuration and a device of its own that shares the memory of the weights until it is
    moved or changes its dtype.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copied(model, memo)
