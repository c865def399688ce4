"""The folder of a benchmark: one folder per cell, locked while a process works on it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from compresskit.benchmark.grid import Grid
from compresskit.benchmark.records import FORMAT_VERSION, RECORD, Record, read, write
from compresskit.benchmark.rows import Cell
from compresskit.errors import InputError
from compresskit.storage.writing import write_text
from compresskit.validation import validate

#: Says that a folder is a benchmark's, and which grid it holds.
GRID = "bench.json"
CELLS = "cells"
#: Where stages 1 lie that cells share.
GENERAL = "general"
_LOCK = ".lock"


class Store:
    """Records and models below ``folder``.

    Raises:
        InputError: the folder is not a benchmark's; a record in it is damaged or edited.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: Cells that this process was asked for: another one may have written its own grid into the folder since.
        self._asked: set[str] = set()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"output {folder}: is a file")
        found = [path for path in folder.iterdir() if path.suffix != ".part"] if folder.is_dir() else []
        if found and not (folder / GRID).is_file():
            raise InputError(f"output {folder}: is not empty and holds no benchmark ({GRID}); choose another folder")

    def open(self, grid: Grid, cells: Sequence[Cell], *, overwrite: bool) -> None:
        """Make the folder ready for these cells.

        Raises:
            InputError: it holds cells of another configuration and ``overwrite`` is False, or cannot be written.
        """
        wanted = self._asked = {cell.folder for cell in cells}
        foreign = [folder for folder in self._folders(CELLS) if folder.name not in wanted]
        starts = {cell.start for cell in cells}
        if foreign and not overwrite:
            raise InputError(
                f"output {self.folder}: holds {len(foreign)} cells of another configuration, model, data, version or "
                f"machine, e.g. {foreign[0].name}; choose another --output, or remove them with --overwrite"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            data = {
                "format_version": FORMAT_VERSION,
                "grid": _without_places(grid).model_dump(mode="json"),
                "cells": [cell.folder for cell in cells],
            }
            write_text(self.folder / GRID, json.dumps(data, indent=1) + "\n")
            for folder in foreign:
                self._remove(folder)
            if overwrite:
                for folder in self._folders(GENERAL):
                    if folder.name not in starts:
                        self._remove(folder)
            (self.folder / CELLS).mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"output {self.folder}: cannot be written: {error.strerror or error}") from None

    def _remove(self, folder: Path) -> None:
        if not any((folder / name).exists() for name in (_LOCK, RECORD)):
            raise InputError(f"output {folder}: was not written by compresskit, so it is not removed")
        with _locked(folder) as mine:
            if not mine:
                raise InputError(f"output {folder}: another process works on it, so it is not removed")
            shutil.rmtree(folder)

    def missing(self) -> list[str]:
        """Cells of the last run's grid that have no record yet, by the names of their folders."""
        return [name for name in self._listed() or () if not (self.folder / CELLS / name / RECORD).exists()]

    def _listed(self) -> list[str] | None:
        """The cells of the last run's grid, by the names of their folders; None where the folder does not say."""
        names = self._marker().get("cells", None)
        if names is None:
            return None
        if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise InputError(f"report {self.folder / GRID}: cells must be a list of names of folders")
        return names

    def grid(self) -> Grid:
        """The grid that the folder was made for. Raises InputError: there is none, or it cannot be read."""
        grid: Grid = validate(Grid, self._marker().get("grid"), f"report {self.folder / GRID}")
        return grid

    def _marker(self) -> dict[str, Any]:
        path = self.folder / GRID
        try:
            data: Any = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"report {self.folder}: is no benchmark's folder: {GRID} is missing") from None
        except (OSError, ValueError) as error:
            raise InputError(f"report {self.folder}: holds no readable {GRID}: {error}") from None
        found = data.get("format_version") if isinstance(data, dict) else None
        if type(found) is not int or found != FORMAT_VERSION:  # True and 1.0 are equal to it
            raise InputError(
                f"report {path}: format version {found!r}, this compresskit reads {FORMAT_VERSION}"
                + (": upgrade compresskit" if type(found) is int and found > FORMAT_VERSION else "")
            )
        marker: dict[str, Any] = data
        return marker

    def records(self) -> list[Record]:
        """Every record in the folder. Raises InputError: one is damaged or edited, or lies in another cell's folder."""
        return [_read(folder) for folder in self._recorded()]

    def of_grid(self) -> list[Record]:
        """The same, where the last run's grid, or this process's own, asks for all of them: a table of others would add
        up what does not belong together.

        Raises:
            InputError: as above; there is a cell that the grid does not ask for.
        """
        names, found = self._listed(), self.records()
        known = None if names is None else {*names, *self._asked}
        foreign = [folder.name for folder in self._recorded() if known is not None and folder.name not in known]
        if foreign:
            raise InputError(
                f"report {self.folder}: holds {len(foreign)} cells that its grid ({GRID}) does not ask for, e.g. "
                f"{foreign[0]}; move them away"
            )
        return found

    def record(self, cell: Cell) -> Record | None:
        """The cell's record, if it has one. Raises InputError: see :meth:`records`."""
        return _read(self.path(cell)) if (self.path(cell) / RECORD).exists() else None

    def write(self, cell: Cell, record: Record) -> None:
        """Keep the record."""
        self.path(cell).mkdir(parents=True, exist_ok=True)
        write(record, self.path(cell) / RECORD)

    def path(self, cell: Cell) -> Path:
        """The cell's folder."""
        return self.folder / CELLS / cell.folder

    def start(self, cell: Cell) -> Path | None:
        """The folder of the stage 1 that the cell shares with others; None: it has its own."""
        return self.folder / GENERAL / cell.start if cell.start else None

    @contextmanager
    def lock(self, cell: Cell) -> Iterator[bool]:
        """Whether this process may work on the cell, and on the stage 1 that it shares. Freed when a process dies."""
        with ExitStack() as locks:
            folders = [self.path(cell), *filter(None, [self.start(cell)])]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            yield all(locks.enter_context(_locked(folder)) for folder in folders)

    @contextmanager
    def alone(self, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
        """The whole folder for this process (its report, the closing phase); waits for another one, after ``waits``."""
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waits()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _recorded(self) -> list[Path]:
        """The folders of cells that have a record."""
        return [folder for folder in self._folders(CELLS) if (folder / RECORD).exists()]

    def _folders(self, name: str) -> list[Path]:
        folder = self.folder / name
        return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _read(folder: Path) -> Record:
    """The record of a cell's folder, whose name ends with the beginning of the cell's key. Raises InputError."""
    found = read(folder / RECORD)
    if not folder.name.endswith(f"-{found.key[:8]}"):
        raise InputError(
            f"record {folder / RECORD}: is of another cell ({found.method}, seed {found.seed}, key {found.key[:8]}); "
            "remove the folder to compute its cell again: a model in it may be the other one's too"
        )
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _without_places(grid: Grid) -> Grid:
    """The grid with file names for paths: where files lie is this machine's affair; records hold their hashes."""
    names = {name: tuple(map(_short, getattr(grid, name))) for name in ("models", "methods", "tasks")}
    names["baselines"] = tuple(
        ":".join([name, *([_short(argument)] if argument else [])])
        for name, _, argument in (entry.partition(":") for entry in grid.baselines)
    )
    variants = {
        name: variant.model_copy(update={"methods": tuple(map(_short, variant.methods))})
        for name, variant in grid.variants.items()
    }
    text = tuple(map(_short, grid.text)) if isinstance(grid.text, tuple) else _short(grid.text) if grid.text else None
    seeds = {_short(method): own for method, own in grid.method_seeds.items()}
    tasks = {_short(task): own for task, own in grid.per_task.items()}
    others = {"variants": variants, "method_seeds": seeds, "per_task": tasks}
    return grid.model_copy(update={**names, **others, "text": text, "data": "DIR" if grid.data else None})


def _short(name: str) -> str:
    return Path(name).name if Path(name).exists() else name
