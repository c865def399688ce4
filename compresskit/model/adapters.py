"""Adapters (LoRA, prompts and the like) and computed weights that were not merged into the model that holds them."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.internals.torch import buffers_of, parameters_of

#: Packages whose layers stand in the place of a model's own.
_PACKAGES = ("peft", "adapters", "loralib")
#: Names that these layers and the wrappers of prompts give to what they hold.
_NAMES = re.compile(
    r"(^|\.)(base_layer|modules_to_save|original_module|prompt_encoder|prompt_embeddings|ia3_l|ln_tuning_layers"
    r"|(lora|hada|lokr|b?oft|vera|randlora|adalora)_\w+)(\.|$)"
)
#: Of these layers transformers reads what lies under the names of their own parameters, and nothing else.
_LAYERS = (nn.Linear, nn.Embedding, nn.LayerNorm)
_ADVICE = "merge it into the model first (merge_and_unload), or train the model itself"


def check_given(model: Any, what: str = "model") -> None:
    """Refuse an object that is no plain transformers model.

    A model with an adapter would save the adapter alone, and factors would stand where the adapter looks for matrices.
    A weight that is computed from others (a parametrization, a mask of pruning) would not be saved, and whoever reads
    the folder would get random numbers in its place.

    Raises:
        InputError: it is no ``PreTrainedModel``, or holds an adapter that is not merged or a weight that is computed.
    """
    if found := _adapter(model):
        raise InputError(f"{what}: {type(model).__name__} holds an adapter ({found}); {_ADVICE}")
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"{what}: give a PreTrainedModel, a folder or a hub id, not a {type(model).__name__}")
    if found := _computed(model):
        raise InputError(
            f"{what}: {found} is computed from other tensors (a parametrization or pruning mask) and would not be "
            "saved; make it permanent first (remove_parametrizations or prune.remove of torch.nn.utils)"
        )


def _computed(model: PreTrainedModel) -> str:
    """A weight or bias that is no parameter of its layer; empty: there is none."""
    for name, module in model.named_modules():
        if isinstance(module, _LAYERS):
            own = parameters_of(module).keys() | buffers_of(module).keys()
            for tensor in ("weight", "bias"):
                if tensor not in own and hasattr(module, tensor):
                    return f"{name}.{tensor}"
    return ""


def _adapter(model: Any) -> str:
    """What shows that a model holds an adapter; empty: nothing does."""
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "peft_config", None):
        kinds = [getattr(config, "peft_type", config) for config in (_configs(model) or [])]
        return ", ".join(str(getattr(kind, "value", kind)) for kind in kinds) or "PEFT"
    if not isinstance(model, nn.Module):
        return ""
    for name, module in model.named_modules():
        if _package(module) in _PACKAGES or _NAMES.search(name):
            return name or type(module).__name__
    return next((name for name, _ in model.named_parameters() if _NAMES.search(name)), "")


def _configs(model: Any) -> list[Any]:
    found = getattr(model, "peft_config", None)
    return list(found.values()) if isinstance(found, dict) else [found] if found is not None else []


def _package(module: nn.Module) -> str:
    return type(module).__module__.partition(".")[0]
