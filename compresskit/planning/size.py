"""A size of the weight file instead of a ratio."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model.file_size import file_size, saved_tensors


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5MB``, ``500kB`` or ``0.2GB`` (powers of ten). Raises InputError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(kB|MB|GB)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise InputError(f"size {text!r}: give a number with kB, MB or GB, such as 5MB")
    return int(float(match[1]) * {"kb": 1e3, "mb": 1e6, "gb": 1e9}[match[2].lower()])


@dataclass(frozen=True)
class SizeLimit:
    """How large a weight file may be.

    Attributes:
        most: bytes.
        kept: tensors that are stored beside the model's own, by name.
    """

    most: int
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    def file_size(self, model: PreTrainedModel) -> int:
        """Bytes that the weight file of ``model`` has, header, buffers and kept tensors too."""
        return file_size({**saved_tensors(model), **self.kept})

    def __str__(self) -> str:
        return f"{self.most / 1e6:g} MB"
