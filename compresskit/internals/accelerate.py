"""Checked with accelerate 1.15."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Take accelerate's autocast off the model's forward in the end: the model would go on computing in bf16."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        if before is not None:
            vars(model)["forward"] = before
