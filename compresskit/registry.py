"""A registry: everything of one sort that a user may name, from this package and from others.

Methods, task kinds, baselines and export formats are found alike. Every module of one package (for methods
``compresskit.decomposers``) that decorates a class with :meth:`Registry.register` adds one, and so does every installed
package with an entry point in the registry's group.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Generic, TypeVar

from compresskit.errors import InputError, one_line, unknown

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Instances of the registered classes, by name. Nothing is imported before the first question.

    Args:
        what: the word for one entry in messages, e.g. ``method``.
        base: the class that every entry derives from. It has a class attribute ``name``.
        package: the package whose modules hold the entries of compresskit itself.
        group: of the entry points of other packages, ``name = "package.module:Class"``.
        needs: class attributes that every entry must have, beside ``name``.
        reserved: names that mean something else, so that no entry may take them.
        find: lists the entry points of a group.
    """

    def __init__(
        self,
        what: str,
        base: type[T],
        package: str,
        group: str,
        *,
        needs: Iterable[str] = (),
        reserved: Iterable[str] = (),
        find: Callable[[str], Iterable[EntryPoint]] = lambda group: entry_points(group=group),
    ) -> None:
        self.what, self.base, self.package, self.group = what, base, package, group
        self.needs, self.reserved, self.find = ("name", *needs), tuple(reserved), find
        self._entries: dict[str, T] = {}
        self._plugins: dict[str, EntryPoint] = {}
        self._broken: dict[str, str] = {}
        self._loaded = False
        #: Why no entry may be used: two packages register one name.
        self._refused = ""

    def register(self, cls: C) -> C:
        """Class decorator: makes the class known under its ``name``.

        Raises:
            InputError: the name is taken by another class.
        """
        entry: Any = cls
        if entry.name in self.reserved or entry.name in self._entries:
            holder = "compresskit" if entry.name in self.reserved else type(self._entries[entry.name]).__module__
            raise InputError(f"{self.what} {entry.name!r} of {cls.__module__} is already registered by {holder}")
        self._entries[entry.name] = entry()
        return cls

    def all(self) -> dict[str, T]:
        """Every entry that works, by name, sorted. Raises InputError: two packages register one name."""
        self._load()
        return dict(sorted(self._entries.items()))

    def get(self, name: str, also: Iterable[str] = ()) -> T:
        """The entry called ``name``.

        Args:
            also: further names that the message about an unknown one lists.

        Raises:
            InputError: no such entry (the message has the nearest name and all of them), or its plug-in is broken.
        """
        known = self.all()
        if name in self._broken:
            raise InputError(f"{self.what} {name!r} cannot be loaded: {self._broken[name]}")
        if name not in known:
            raise unknown(self.what, name, [*known, *also])
        return known[name]

    def installed(self, name: str) -> T:
        """The entry called ``name``, once its ``packages`` are known to be there.

        Raises:
            InputError: see :meth:`get`; a package is missing (the message names the entry's ``extra`` that brings it).
        """
        entry: Any = self.get(name)
        missing = [package for package in entry.packages if not _is_installed(package)]
        if missing:
            owner = self.source(name).split()[0]
            extra = f"the extra {entry.extra!r} ({owner}[{entry.extra}])" if entry.extra else "it first"
            raise InputError(f"{self.what} {name}: {', '.join(missing)} missing; install {extra}")
        found: T = entry
        return found

    def broken(self) -> dict[str, str]:
        """Plug-ins that could not be loaded: name -> reason."""
        self._load()
        return dict(sorted(self._broken.items()))

    def source(self, name: str) -> str:
        """The package that an entry comes from, with its version; ``compresskit`` for the entries of its own."""
        self._load()
        return _package(self._plugins[name]) if name in self._plugins else "compresskit"

    @contextmanager
    def with_plugins(self, points: Iterable[EntryPoint]) -> Iterator[None]:
        """Within the block other packages offer these entry points alone: a plug-in is tried without installing it."""
        self._load()
        before = dict(vars(self))
        own = {name: entry for name, entry in self._entries.items() if name not in self._plugins}
        self._entries, self._plugins, self._broken, self._refused, self._loaded = own, {}, {}, "", False
        self.find = lambda _: points
        try:
            yield
        finally:
            vars(self).update(before)

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")
            for point in self.find(self.group):
                self._load_plugin(point)
        if self._refused:
            raise InputError(self._refused)

    def _load_plugin(self, point: EntryPoint) -> None:
        """Two entries of one name are refused; a plug-in that cannot be loaded is remembered with its reason."""
        before = dict(self._entries)
        try:
            cls = point.load()
            self._check(cls, point)
        except (Exception, SystemExit) as error:  # whatever a stranger's package raises
            self._entries = before
            self._broken[point.name] = f"plug-in of {_package(point)}: {type(error).__name__}: {one_line(error)}"
            return
        known = self._entries.get(cls.name)
        if cls.name in self.reserved or (known is not None and type(known) is not cls) or cls.name in self._plugins:
            holder = _package(self._plugins[cls.name]) if cls.name in self._plugins else "compresskit"
            words = f"{self.what} {cls.name!r} of {_package(point)} is already registered by {holder}: uninstall one"
            self._refused = words
            return
        if known is None:  # else it registered itself when it was imported
            self.register(cls)
        self._plugins[cls.name] = point

    def _check(self, cls: Any, point: EntryPoint) -> None:
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise TypeError(f"{point.value} is no subclass of compresskit's {self.base.__name__}")
        found: Any = cls
        for name in self.needs:
            if not hasattr(found, name):
                raise TypeError(f"{point.value} has no {name}")
        if found.name != point.name:
            raise TypeError(f"{point.value} calls itself {found.name!r}, its entry point says {point.name!r}")
        found()  # abstract methods are missing where this raises


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
