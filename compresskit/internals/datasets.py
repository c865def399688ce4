"""Checked with datasets 5.2."""

from __future__ import annotations

from typing import Any


def fingerprint(dataset: Any) -> str:
    """A hash of a data set's rows and of what was done to them."""
    found: str = dataset._fingerprint
    return found
