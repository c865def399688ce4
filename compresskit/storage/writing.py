"""Files and folders that are written complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from compresskit.errors import InputError, WorkError, one_line


@contextmanager
def new_folder(output: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name once the block ends well, and vanishes otherwise.

    Args:
        output: the folder.
        replace: whether it takes the place of a folder of that name.

    Raises:
        InputError: before the block: ``output`` cannot be written.
        WorkError: in the block or after it: a file could not be written, or ``output`` is there and is not replaced.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.part-", dir=output.parent))
    except OSError as error:
        raise InputError(f"output {output}: cannot be written: {error.strerror or error}") from None
    try:
        yield temporary
        _open_permissions(temporary)
        if replace:
            _move_into_place(temporary, output)
        elif output.exists():  # the rename below fails too, unless it is empty
            raise WorkError(f"output {output}: was written by another process meanwhile; it is left as it is")
        else:
            temporary.rename(output)
    except (OSError, SafetensorError) as error:
        raise WorkError(f"output {output}: could not be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a file complete or not at all; several processes may do so at once, the last one stays."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def reserve(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes and take their room on the disk now. Raises OSError where there is none."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)


def _open_permissions(folder: Path) -> None:
    """The permissions that any new file gets: those of temporary folders and of safetensors are for secrets."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _move_into_place(temporary: Path, output: Path) -> None:
    if not output.exists():
        temporary.rename(output)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    try:
        output.rename(retired / output.name)
        temporary.rename(output)
    except BaseException:  # an interrupt between the two renames must not lose the old result
        if not output.exists() and (retired / output.name).exists():
            (retired / output.name).rename(output)
        with suppress(OSError):
            retired.rmdir()  # only if empty: what could not be put back stays where it is
        raise
    shutil.rmtree(retired, ignore_errors=True)
