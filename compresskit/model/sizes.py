"""Is a checkpoint as large as its configuration says? Asked before anything of that size is allocated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PreTrainedModel

from compresskit.errors import InputError, one_line
from compresskit.internals.transformers import builder
from compresskit.model.quantizer import QUANT_METHOD, CompresskitConfig, mount_config
from compresskit.model.weights import Stored

#: Largest number of layers, labels, heads, ...: transformers makes lists of that length before a model is built.
_MOST_PARTS = 100_000
#: What a model may have beyond its stored numbers: new heads and buffers of a model smaller than that.
_ROOM = 1 << 20


def check_config(data: Mapping[str, Any], path: Path, stored: Stored) -> None:
    """Refuse numbers in ``config.json`` that no weights of this size can go with, and code it asks to be fetched.

    Raises:
        InputError: names the entry.
    """
    most = max(stored.size, _ROOM)
    # The specs of a compressed model are checked against its matrices.
    for key, value in _entries({key: value for key, value in data.items() if key != "quantization_config"}):
        if isinstance(value, int) and abs(value) > (_MOST_PARTS if key.startswith(("num_", "n_")) else most):
            raise InputError(f"{path}: {key} {_short(value)}: too large for weights of {stored.size:,} bytes")
        if key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
            raise InputError(f"{path}: {key} {value!r} names code to fetch (a checkpoint's own code is not run)")


def _entries(data: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every entry with its key, of nested mappings and lists too."""
    if not isinstance(data, dict | list):
        yield key, data
        return
    for name, value in data.items() if isinstance(data, dict) else ((key, entry) for entry in data):
        # An implementation may be named for each part of a model.
        yield from _entries(value, key if key.endswith("_implementation") else str(name))


def check_sizes(loader: Any, config: Any, folder: Path, stored: Stored) -> None:
    """Build the model without memory and compare it with the headers of its weight files.

    Args:
        loader: a model class, or an Auto class.
        config: of a dense model, or of a compressed one (its specs are mounted).
        stored: of ``folder``.

    Raises:
        InputError: more layers or numbers than the files can hold, a tensor of another shape, or a configuration of
            which no model can be built.
    """
    try:
        with torch.device("meta"), _at_most(2 * len(stored.shapes) + 1000, folder):
            model: PreTrainedModel = builder(loader)(config)
        described = getattr(config, "quantization_config", None)
        if isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD:
            mount_config(model, CompresskitConfig(**described))
    except InputError:
        raise
    except Exception as error:  # whatever a family's code makes of absurd numbers
        raise InputError(f"{folder}/config.json: no model can be built of it: {one_line(error)}") from None
    for name, tensor in model.named_parameters():
        shape = stored.shapes.get(name)
        if shape is not None and shape != tuple(tensor.shape):
            raise InputError(f"model {folder}: weight {name} is {_by(shape)}, config.json says {_by(tensor.shape)}")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    numbers = sum(tensor.numel() for tensor in tensors.values())
    # Ties are not known here, so a tied table counts twice.
    if numbers > 2 * stored.numbers + _ROOM:
        held = f"its weights hold {stored.numbers:,}"
        raise InputError(f"model {folder}: config.json describes {numbers:,} numbers, {held}")


@contextmanager
def _at_most(tensors: int, folder: Path) -> Iterator[None]:
    """Stop a model that is being built once it has more parameter tensors than that."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if made > tensors:
            raise InputError(f"model {folder}: config.json describes more layers than its weights have")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _short(value: int) -> str:
    text = str(value)
    return text if len(text) < 20 else f"{text[:9]}... ({len(text)} digits)"


def _by(shape: Any) -> str:
    return "x".join(map(str, shape)) or "one number"
