"""A weight that is multiplied out only once its numbers are used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.internals.torch import replaced, without_subclasses

_METADATA = frozenset(
    {Tensor.dtype.__get__, Tensor.device.__get__, Tensor.shape.__get__, Tensor.ndim.__get__, Tensor.size, Tensor.dim}  # type: ignore[attr-defined]
)


class LazyWeight(Tensor):
    """Stands for ``layer.dense_weight()``. Reading dtype, device or shape costs nothing (T5 looks at a dtype in every
    forward pass); any other function computes with the product, through which gradients flow.
    """

    _dense: Callable[[], Tensor]

    @classmethod
    def of(cls, layer: nn.Module, shape: tuple[int, int], dense: Callable[[], Tensor]) -> Tensor:
        """The weight of a layer. Args: its shape, and what computes it."""
        factor = next((p for name, p in layer.named_parameters() if name != "bias"), None)
        if factor is None or torch.compiler.is_compiling():  # a compiler drops what nobody uses
            return dense()
        found = torch.empty((), dtype=factor.dtype, device=factor.device).expand(shape).as_subclass(cls)
        found._dense = dense
        return found

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with without_subclasses():
            if func in _METADATA:
                return func(*args, **(kwargs or {}))
        args, kwargs = replaced(LazyWeight, lambda lazy: lazy._dense(), tuple(args), dict(kwargs or {}))
        return func(*args, **kwargs)
