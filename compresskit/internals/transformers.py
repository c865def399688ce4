"""Checked with transformers 5.23."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

# No import of transformers: the module is needed while that is half imported.


def declared_ties(model: Any) -> dict[str, str]:
    """The ties that the model's class declares, or the model itself: pattern of a name -> pattern of its source."""
    return dict(model._tied_weights_keys or {})


def declare_ties(model: Any, ties: Mapping[str, str]) -> None:
    """Declare ties on the model itself: ``tie_weights()`` computes its map from them, and saving reads them."""
    model._tied_weights_keys = dict(ties)


def forget_declared_ties(model: Any) -> None:
    """Go back to the ties that the model's class declares."""
    vars(model).pop("_tied_weights_keys", None)


def is_read(parameter: Any) -> bool:
    """Whether a parameter's values came from a checkpoint, while a model is loaded; new ones are initialised."""
    return bool(getattr(parameter, "_is_hf_initialized", False))


def attention_of(model: Any) -> str:
    """The name of the attention implementation in use."""
    name: str = model.config._attn_implementation
    return name


def takes_attention_functions(model: Any) -> bool:
    """Whether the family's attention goes through transformers' attention functions."""
    return bool(getattr(model, "_supports_attention_backend", False))


def builder(loader: Any) -> Callable[[Any], Any]:
    """What makes a model of a configuration: of a model class or of an Auto class."""
    found: Callable[[Any], Any] = getattr(loader, "_from_config", None) or loader.from_config
    return found


def class_for(auto: Any, config: Any) -> Any:
    """The class that an Auto class takes for a configuration; None if it has none."""
    return auto._model_mapping.get(type(config), None)


def initialise(model: Any, module: Any) -> None:
    """Give a module of the model new values, as its family begins with."""
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = False
    model._init_weights(module)


def on_one_gpu(arguments: Any) -> None:
    """Keep Trainer from ``nn.DataParallel``."""
    arguments._n_gpu = min(1, arguments.n_gpu)


def checkpointing_of(module: nn.Module) -> Any:
    """The function with which a module checkpoints its activations; None where it has none."""
    return getattr(module, "_gradient_checkpointing_func", None)


def set_checkpointing(module: Any, function: Any) -> None:
    """Let a module checkpoint its activations with this function."""
    module._gradient_checkpointing_func = function
