"""The plugin registry: every module of this package that decorates a class with :func:`register` adds a method, and so
does every installed package with an entry point in the group :data:`GROUP`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from compresskit.decomposers.base import AUTO, DENSE, Decomposer
from compresskit.errors import InputError, unknown

#: Entry points of other packages: ``name = "package.module:Class"``.
GROUP = "compresskit.decomposers"

_registry: dict[str, Decomposer] = {}
_plugins: dict[str, EntryPoint] = {}
_broken: dict[str, str] = {}
_loaded = False
#: Why no method may be used: two packages register one name.
_refused = ""

D = TypeVar("D", bound=type[Decomposer])


def register(cls: D) -> D:
    """Class decorator: makes a :class:`Decomposer` known under its ``name``.

    Raises:
        InputError: the name is taken by another class.
    """
    if cls.name in (AUTO, DENSE) or cls.name in _registry:
        holder = "compresskit" if cls.name in (AUTO, DENSE) else type(_registry[cls.name]).__module__
        raise InputError(f"method {cls.name!r} of {cls.__module__} is already registered by {holder}")
    _registry[cls.name] = cls()
    return cls


def _load_all() -> None:
    global _loaded, _refused
    if not _loaded:
        _loaded = True
        package = importlib.import_module("compresskit.decomposers")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"compresskit.decomposers.{module.name}")
        for point in entry_points(group=GROUP):
            _load_plugin(point)
    if _refused:
        raise InputError(_refused)


def _load_plugin(point: EntryPoint) -> None:
    """Two methods of one name are refused; a plug-in that cannot be loaded is remembered with its reason."""
    global _refused
    before = dict(_registry)
    try:
        cls = point.load()
        _check(cls, point)
    except (Exception, SystemExit) as error:  # whatever a stranger's package raises
        _registry.clear()
        _registry.update(before)
        _broken[point.name] = f"plug-in of {_package(point)}: {type(error).__name__}: {' '.join(str(error).split())}"
        return
    known = _registry.get(cls.name)
    if cls.name in (AUTO, DENSE) or (known is not None and type(known) is not cls) or cls.name in _plugins:
        holder = _package(_plugins[cls.name]) if cls.name in _plugins else "compresskit"
        _refused = f"method {cls.name!r} of {_package(point)} is already registered by {holder}: uninstall one"
        return
    if known is None:  # else it registered itself when it was imported
        register(cls)
    _plugins[cls.name] = point


def _check(cls: object, point: EntryPoint) -> None:
    if not (isinstance(cls, type) and issubclass(cls, Decomposer)):
        raise TypeError(f"{point.value} is no subclass of compresskit's Decomposer")
    for name in ("name", "summary", "reference", "spec_type", "options_type"):
        if not hasattr(cls, name):
            raise TypeError(f"{point.value} has no {name}")
    if cls.name != point.name:
        raise TypeError(f"{point.value} calls itself {cls.name!r}, its entry point says {point.name!r}")
    cls()  # abstract methods are missing where this raises


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value


def decomposers() -> dict[str, Decomposer]:
    """All methods that work, by name, sorted. Raises InputError: two packages register one name."""
    _load_all()
    return dict(sorted(_registry.items()))


def broken() -> dict[str, str]:
    """Plug-ins that could not be loaded: name -> reason."""
    _load_all()
    return dict(sorted(_broken.items()))


def sources(names: Iterable[str]) -> list[str]:
    """The packages that decide what these methods do, sorted: for ``auto`` those of all methods, for ``dense`` none."""
    known = {name for given in names for name in (decomposers() if given == AUTO else [given]) if name != DENSE}
    return sorted({source(name) for name in known})


def source(name: str) -> str:
    """The package that a method comes from, with its version; ``compresskit`` for the methods of its own."""
    _load_all()
    return _package(_plugins[name]) if name in _plugins else "compresskit"


def get(name: str) -> Decomposer:
    """The method called ``name``.

    Raises:
        InputError: no such method (the message has the nearest name and all of them), or its plug-in is broken.
    """
    known = decomposers()
    if name in _broken:
        raise InputError(f"method {name!r} cannot be loaded: {_broken[name]}")
    if name not in known:
        raise unknown("method", name, [*known, AUTO])
    return known[name]
