"""How many bytes a model's weight file will have, known before a weight is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: Where safetensors starts what follows the header, and how it stores the header's own length.
_ALIGNMENT, _LENGTH = 8, 8

#: Names of kinds of numbers, in the order in which safetensors stores tensors.
_KINDS = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What ``save_pretrained`` stores of a model: persistent buffers, and parameters, shared ones once.

    Of several names of a shared parameter the longest one counts, which may not be the one that is stored.
    """
    ignored = model._keys_to_ignore_on_save or ()
    names: dict[int | str, str] = {}
    found = model.state_dict(keep_vars=True)
    for name, tensor in found.items():
        if name not in ignored:
            key = id(tensor) if isinstance(tensor, nn.Parameter) else name  # each module stores its own buffers
            names[key] = max(names.get(key, ""), name, key=len)
    return {name: found[name] for name in names.values()}


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of a safetensors file with these tensors: its header, as transformers has it written, and their data.

    Devices do not matter, so shapes on the meta device will do.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order, end = list(_KINDS), 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return _LENGTH + -(-len(text) // _ALIGNMENT) * _ALIGNMENT + end
