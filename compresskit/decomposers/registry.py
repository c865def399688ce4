"""The plugin registry: every module of this package that decorates a class with :func:`register` adds a method."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TypeVar

from compresskit.decomposers.base import DENSE, Decomposer
from compresskit.errors import InputError, unknown

_registry: dict[str, Decomposer] = {}
_builtin_loaded = False

D = TypeVar("D", bound=type[Decomposer])


def register(cls: D) -> D:
    """Class decorator: makes a :class:`Decomposer` known under its ``name``.

    Raises:
        InputError: the name is taken by another class.
    """
    if cls.name == DENSE or cls.name in _registry:
        holder = "compresskit" if cls.name == DENSE else type(_registry[cls.name]).__module__
        raise InputError(f"method {cls.name!r} of {cls.__module__} is already registered by {holder}")
    _registry[cls.name] = cls()
    return cls


def _load_builtin() -> None:
    global _builtin_loaded
    if not _builtin_loaded:
        package = importlib.import_module("compresskit.decomposers")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"compresskit.decomposers.{module.name}")
        _builtin_loaded = True


def decomposers() -> dict[str, Decomposer]:
    """All registered methods by name, sorted."""
    _load_builtin()
    return dict(sorted(_registry.items()))


def get(name: str) -> Decomposer:
    """The method called ``name``.

    Raises:
        InputError: no such method; the message has the nearest name and all of them.
    """
    known = decomposers()
    if name not in known:
        raise unknown("method", name, known)
    return known[name]
