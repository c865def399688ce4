"""A size of the weight file instead of a ratio: it becomes one once the model is known."""

from __future__ import annotations

import re

from compresskit.errors import InputError
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.targets import count_parameters


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5MB``, ``500kB`` or ``0.2GB`` (powers of ten). Raises InputError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(kB|MB|GB)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise InputError(f"size {text!r}: give a number with kB, MB or GB, such as 5MB")
    return int(float(match[1]) * {"kb": 1e3, "mb": 1e6, "gb": 1e9}[match[2].lower()])


def ratio_of_size(dense: Checkpoint, size: int) -> float:
    """The ratio that makes the weight file at most ``size`` bytes; its header and kept tensors are allowed for.

    Raises:
        InputError: no ratio above 1 does so.
    """
    tensors = [*dense.model.state_dict().items(), *dense.kept.items()]
    # A factorised matrix has two tensors in the file; one entry of the header takes about 80 bytes and the name.
    header = 256 + sum(2 * (len(name) + 80) for name, _ in tensors)
    kept = sum(tensor.nbytes for tensor in dense.kept.values())
    total = sum(parameter.nbytes for parameter in dense.model.parameters())
    parameters = count_parameters(dense.model)
    room = (size - header - kept) / (total / parameters)
    if room <= 0 or parameters / room <= 1:
        what = "too small for its header alone" if room <= 0 else f"not below the dense model's {total / 1e6:.1f} MB"
        raise InputError(f"size {size / 1e6:g} MB: {what}")
    return parameters / room
