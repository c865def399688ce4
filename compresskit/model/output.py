"""Output folders: complete or not there, and never over what compresskit did not write."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from compresskit.errors import InputError, WorkError
from compresskit.model import sentence

#: One of them is present in every folder that compresskit wrote.
MARKER = "compression.json"
TRAINING = "training.json"
EXPORT = "export.json"

TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.json|tokenizer\.model|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|.*\.spm|sentencepiece.*\.model|spiece\.model|bpe\.codes|dict\.txt"
)
_OUR_FILES = re.compile(
    rf"{TOKENIZER_FILES.pattern}|config\.json|generation_config\.json|model.*\.safetensors(\.index\.json)?"
    rf"|README\.md|recipe\.yaml|losses\.png|model\.onnx|{sentence.FILES.pattern}"
    rf"|{re.escape(MARKER)}|{re.escape(TRAINING)}|{re.escape(EXPORT)}"
)


@contextmanager
def output_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name once the block ends well, and vanishes otherwise.

    Raises:
        InputError: before the block: ``output`` exists (and may not be overwritten) or cannot be written.
    """
    check_output(output, overwrite)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.part-", dir=output.parent))
    except OSError as error:
        raise InputError(f"output {output}: cannot be written: {error.strerror or error}") from None
    try:
        yield temporary
        _open_permissions(temporary)
        _move_into_place(temporary, output)
    except (OSError, SafetensorError) as error:
        raise WorkError(f"output {output}: could not be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be overwritten and holds nothing but what compresskit writes."""
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise InputError(f"output {output}: exists; choose another with --output, or give --overwrite")
    if not output.is_dir() or output.is_symlink():
        raise InputError(f"output {output}: is not a folder, so it is not overwritten")
    if output.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise InputError(f"output {output}: holds the current folder, so it is not overwritten")
    found = sorted(output.iterdir())
    if found and not any((output / marker).is_file() for marker in (MARKER, TRAINING, EXPORT)):
        raise InputError(f"output {output}: was not written by compresskit, so it is not overwritten")
    modules = sentence.module_folders(output)
    for path in found:
        if path.name not in modules and not (path.is_file() and is_ours(path.name)):
            raise InputError(f"output {output}: holds {path.name}, which compresskit did not write; move it away first")


def is_ours(name: str) -> bool:
    """Whether compresskit writes files of this name."""
    return _OUR_FILES.fullmatch(name) is not None


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


def one_line(error: BaseException) -> str:
    """The error's text, short and on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
