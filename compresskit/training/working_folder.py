"""The state of an unfinished run on disk."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from filelock import FileLock, Timeout

from compresskit.errors import InputError
from compresskit.storage.writing import write_text
from compresskit.training.checkpoints import checkpoints

_SETTINGS = "settings.json"
_LOCK = ".lock"


def working_folder(output: Path) -> Path:
    """The folder beside ``output`` that holds the state of its unfinished run."""
    return output.with_name(output.name + ".checkpoints")


def check_ours(path: Path) -> None:
    """Refuse a folder that is there and is no working folder. Raises InputError."""
    if not (path / _SETTINGS).is_file():
        raise InputError(f"{path}: exists and is no working folder of compresskit; move it away")


def check_idle(path: Path) -> None:
    """Refuse a working folder in which another process is at work; nothing is refused where there is no folder. Raises
    InputError.
    """
    if path.exists():
        lock = FileLock(path / _LOCK)
        _acquire(lock, path)
        lock.release()


def _acquire(lock: FileLock, path: Path) -> None:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        what = "another process works on this run; wait for it, or choose another output"
        raise InputError(f"{path}: {what}") from None


class WorkingFolder:
    """Where a run keeps its state, such as ``<output>.checkpoints``. Locked until :meth:`close`, or until the process
    dies.

    Args:
        path: the folder.
        settings: what decides the run's result, as plain data.
        resume: continue the run that the folder holds.
        overwrite: forget that run.

    Raises:
        InputError: it exists and neither ``resume`` nor ``overwrite`` was asked for; it belongs to other settings, or
            to a process that is at work.
    """

    def __init__(self, path: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        self.path = path
        #: Whether there was a run to continue.
        self.found = self.path.exists()
        state = PartialState()
        text = json.dumps(settings, indent=2, sort_keys=True, default=str)
        if self.path.exists():
            check_ours(self.path)
            if resume:
                self._check_same(json.loads((self.path / _SETTINGS).read_text(encoding="utf-8")), json.loads(text))
            elif not overwrite:
                raise InputError(
                    f"{self.path}: holds an unfinished run; --resume continues it, --overwrite starts it again"
                )
        state.wait_for_everyone()
        self._lock = FileLock(self.path / _LOCK)
        if state.is_main_process:
            if self.path.exists():
                _acquire(self._lock, self.path)
            if self.path.exists() and not resume:
                shutil.rmtree(self.path)
                self.close()
            if not self.path.exists():
                try:
                    part = self.path.with_name(self.path.name + ".part")
                    shutil.rmtree(part, ignore_errors=True)
                    part.mkdir(parents=True)
                    (part / _SETTINGS).write_text(text, encoding="utf-8")
                    part.rename(self.path)
                except OSError as error:
                    raise InputError(f"output {self.path}: cannot be written: {error.strerror or error}") from None
                _acquire(self._lock, self.path)
        state.wait_for_everyone()

    def close(self) -> None:
        """Let other processes continue the run."""
        self._lock.release()

    def _check_same(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                before, now = _difference(old.get(key), new.get(key))
                raise InputError(
                    f"{self.path}: belongs to a run with another {key} ({before}; now {now}); --overwrite starts again"
                )

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        found = checkpoints(self.path)
        return found[-1] if found else None

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The result of ``compute()`` (plain data), kept in the folder so that a resumed run need not repeat it."""
        path = self.path / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        value = compute()
        if PartialState().is_main_process:
            write_text(path, json.dumps(value))
        return value

    def remove(self) -> None:
        """Forget the run."""
        if PartialState().is_main_process:
            shutil.rmtree(self.path, ignore_errors=True)
        self.close()


def _difference(old: Any, new: Any) -> tuple[str, str]:
    """Two settings for a message: models and data by their names; of equal names, and of hashes, what differs."""
    both = isinstance(old, dict) and isinstance(new, dict)
    if not both or (_short(old) != _short(new) and any(name in old for name in ("name", "source", "task"))):
        return _short(old), _short(new)
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    pairs = [_difference(old.get(name, "none"), new.get(name, "none")) for name in names]
    before, now = (", ".join(f"{name} {pair[i]}" for name, pair in zip(names, pairs, strict=True)) for i in (0, 1))
    return _short(before), _short(now)


def _short(value: Any) -> str:
    """A setting for a message: a model or data set by its name."""
    if isinstance(value, dict):
        value = value.get("name") or value.get("source") or value.get("task", {}).get("name") or value
    text = str(value)
    if re.fullmatch("[0-9a-f]{64}", text):  # a hash
        return text[:8]
    return text if len(text) <= 80 else text[:77] + "..."
