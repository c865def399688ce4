"""Output folders: complete or not there, and never over what compresskit did not write."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compresskit.errors import InputError
from compresskit.model import sentence
from compresskit.storage.writing import new_folder

#: One of them is present in every folder that compresskit wrote.
MARKER = "compression.json"
TRAINING = "training.json"
EXPORT = "export.json"
#: In the folder of `evaluate --report`, with a picture for each split.
REPORT = "report.json"
#: Belongs to the tokenizer: it goes with it into every later folder.
TRIM = "trim.json"

TOKENIZER_FILES = re.compile(
    r"tokenizer.*\.json|chat_template\.jinja|tokenizer\.model|vocab.*|merges\.txt|special_tokens_map\.json|added_tokens\.json"
    r"|.*\.spm|sentencepiece.*\.model|spiece\.model|bpe\.codes|dict\.txt"
    rf"|{re.escape(TRIM)}"
)
_OUR_FILES = re.compile(
    rf"{TOKENIZER_FILES.pattern}|config\.json|generation_config\.json|model.*\.safetensors(\.index\.json)?"
    rf"|README\.md|recipe\.yaml|losses\.png|model\.onnx|{sentence.FILES.pattern}"
    rf"|{re.escape(REPORT)}|confusion-[\w.-]*\.png"
    rf"|{re.escape(MARKER)}|{re.escape(TRAINING)}|{re.escape(EXPORT)}"
)


@contextmanager
def output_folder(output: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside ``output`` that takes its name once the block ends well, and vanishes otherwise.

    Raises:
        InputError: before the block: ``output`` exists (and may not be overwritten) or cannot be written.
        WorkError: after the block: ``output`` was made meanwhile (and may not be overwritten).
    """
    check_output(output, overwrite)
    with new_folder(output, replace=overwrite) as temporary:
        yield temporary


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
    if found and not any((output / marker).is_file() for marker in (MARKER, TRAINING, EXPORT, TRIM, REPORT)):
        raise InputError(f"output {output}: was not written by compresskit, so it is not overwritten")
    modules, exported = sentence.module_folders(output), _exported(output)
    for path in found:
        ours = path.name in modules or (path.is_file() and is_ours(path.name))
        files = [file for file in path.rglob("*") if not file.is_dir()] if path.is_dir() else [path]
        names = {file.relative_to(output).as_posix() for file in files}
        if not ours and not (names and names <= exported):  # an empty folder is nobody's export
            raise InputError(f"output {output}: holds {path.name}, which compresskit did not write; move it away first")


def _exported(output: Path) -> set[str]:
    """The files that ``export.json`` lists, relative to the folder: a format of another package has its own names."""
    try:
        return set(json.loads((output / EXPORT).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def is_ours(name: str) -> bool:
    """Whether compresskit writes files of this name."""
    return _OUR_FILES.fullmatch(name) is not None
