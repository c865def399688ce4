"""A model built anew from another configuration: what its tensors would be, and itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.errors import WorkError


def built(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A model of the same class and another configuration on the meta device: shapes and ties without memory."""
    with torch.device("meta"):
        found: PreTrainedModel = type(model)(config)
    return found


def shapes(model: PreTrainedModel, config: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a model of the same class and another configuration would store."""
    return {name: tuple(tensor.shape) for name, tensor in built(model, config).state_dict().items()}


def rebuilt(model: PreTrainedModel, config: Any, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of the same class, mode, dtype and device with another configuration and these tensors.

    Raises:
        WorkError: a tensor is missing, left over, or of another shape.
    """
    build: Any = type(model).from_pretrained
    made, info = build(None, config=config, state_dict=dict(tensors), dtype=model.dtype, output_loading_info=True)
    if lost := sorted(map(str, {*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})):
        raise WorkError(f"{type(model).__name__}: {lost[0]} was lost when the model was built anew")
    smaller: PreTrainedModel = made.train(model.training)
    return smaller.to(model.device)  # type: ignore[arg-type]
