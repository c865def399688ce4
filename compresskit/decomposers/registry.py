"""The registered methods."""

from __future__ import annotations

from collections.abc import Iterable

from compresskit.decomposers.interface import AUTO, DENSE, AnyDecomposer, Decomposer
from compresskit.registry import Registry

METHODS: Registry[AnyDecomposer] = Registry(
    "method",
    Decomposer,  # type: ignore[type-abstract]
    "compresskit.decomposers",
    "compresskit.decomposers",
    needs=("summary", "reference", "spec_type", "options_type"),
    reserved=(AUTO, DENSE),
)
register = METHODS.register


def get(name: str) -> AnyDecomposer:
    """The method called ``name``. Raises InputError: no such method, or its plug-in is broken."""
    return METHODS.get(name, also=(AUTO,))


def sources(names: Iterable[str]) -> list[str]:
    """The packages that decide what these methods do, sorted: for ``auto`` those of all methods, for ``dense`` none."""
    known = {name for given in names for name in (METHODS.all() if given == AUTO else [given]) if name != DENSE}
    return sorted({METHODS.source(name) for name in known})
