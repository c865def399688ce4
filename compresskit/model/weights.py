"""The files of a checkpoint folder, as a stranger may have made them: names, links, sizes and hashes, looked at before
transformers reads any of it.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compresskit.errors import InputError, one_line
from compresskit.model.output import EXPORT, MARKER
from compresskit.model.sentence import module_folders
from compresskit.storage.files import file_hash
from compresskit.validation import read_json

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, EOFError, SafetensorError)


@dataclass(frozen=True)
class Stored:
    """What the weight files of a folder hold, from their headers.

    Attributes:
        shapes: of every tensor, by name.
        files: where each lies.
        size: bytes of all files together.
    """

    shapes: Mapping[str, tuple[int, ...]]
    files: Mapping[str, Path]
    size: int

    @property
    def numbers(self) -> int:
        """How many numbers all tensors have together."""
        return sum(map(prod, self.shapes.values()))


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers would read, in its order of preference.

    Raises:
        InputError: there are none, one is missing, or its name leads out of the folder.
    """
    name = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if name is None and (folder / EXPORT).is_file():
        raise InputError(
            f"model {folder}: is an export, which predict and evaluate run; give the folder that it was made of"
        )
    if name is None:
        raise InputError(f"model {folder}: has no weights ({', '.join(_WEIGHTS)})")
    path = folder / name
    if not name.endswith(".index.json"):
        return [path]
    shards = read_json(path, "not a valid shard index").get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise InputError(f"{path}: not a valid shard index: weight_map must map tensors to file names")
    for shard in sorted(set(shards.values())):
        if Path(shard).name != shard:
            raise InputError(f"{path}: names {shard}, which is no file name in this folder")
        if not (folder / shard).is_file():
            raise InputError(f"{path}: names {shard}, which is missing")
    return [folder / shard for shard in sorted(set(shards.values()))]


def check_folder(folder: Path) -> None:
    """Refuse files that lie elsewhere, and an adapter, which transformers would add to the weights.

    The folders of a sentence-transformers model count too: they are copied as they are, with what is behind links. A
    link to a folder there could make copies without end.

    Raises:
        InputError: names the file.
    """
    root = folder.resolve()
    # A snapshot in the hub's cache consists of links into the blobs beside it.
    allowed = (root, root.parent.parent / "blobs") if root.parent.name == "snapshots" else (root,)
    modules = [folder / name for name in module_folders(folder)]
    inner = [path for module in modules for path in module.rglob("*")]
    for path in filter(Path.is_symlink, sorted([*folder.iterdir(), *inner])):
        target = Path(os.path.realpath(path))  # resolve() raises where a link leads to itself
        if not any(target.is_relative_to(place) for place in allowed):
            raise InputError(f"{path}: is a link out of the folder; put the file itself there")
        if path.is_dir() and (path in modules or path.parent != folder):
            raise InputError(f"{path}: is a link to a folder; put the folder itself there")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"model {folder}: holds an adapter (adapter_config.json); merge it into the model first")
    settings = folder / "tokenizer_config.json"
    for key, value in read_json(settings, "not a valid configuration").items() if settings.is_file() else ():
        named = Path(value) if key.endswith("_file") and isinstance(value, str) and "\0" not in value else None
        # Many published folders name a file of the machine they were made on: harmless where there is none.
        if named is not None and named.is_file() and not named.resolve().is_relative_to(root):
            raise InputError(f"{settings}: {key} names {value}, a file outside the folder; remove the entry")


def read_headers(folder: Path) -> Stored:
    """What the folder's weight files hold; no weight is read.

    Raises:
        InputError: a file is missing, damaged, or holds more than plain tensors.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    files: dict[str, Path] = {}
    size = 0
    for file in weight_files(folder):
        size += file.stat().st_size
        try:
            found = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file)
        except pickle.UnpicklingError as error:
            reason = one_line(error).split(". ")[0]
            raise InputError(f"{file}: refused, it holds more than plain tensors: {reason}") from None
        except _ERRORS as error:
            raise InputError(f"{file}: damaged or incomplete: {one_line(error)}") from None
        shapes |= found
        files |= dict.fromkeys(found, file)
    return Stored(shapes, files, size)


def _safetensors(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, framework="pt") as tensors:
        return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 (no mapping)


def _pickled(file: Path) -> dict[str, tuple[int, ...]]:
    size = file.stat().st_size
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as parts:
            if sum(part.file_size for part in parts.infolist()) > size:  # torch stores what it saves as it is
                raise ValueError("unpacks to more than its size")
    tensors = torch.load(file, map_location="meta", weights_only=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if sum(map(prod, shapes.values())) > size:
        raise ValueError("says that it holds more numbers than it has bytes")
    return shapes


def read_tensor(stored: Stored, key: str) -> Tensor:
    """One tensor, as it is stored."""
    file = stored.files[key]
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(key)
    tensor: Tensor = torch.load(file, map_location="cpu", weights_only=True)[key]
    return tensor


def fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of every weight file, as ``compression.json`` holds them under ``weights``."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": file_hash(file)} for file in weight_files(folder)}


def changed_files(folder: Path, recorded: Any) -> list[str]:
    """One line for each weight file that is not as recorded; none where nothing was recorded."""
    if recorded is None:
        return []
    if not isinstance(recorded, dict) or not all(isinstance(entry, dict) for entry in recorded.values()):
        return [f"{MARKER}: its entry weights is no list of files"]
    found = fingerprints(folder)
    problems = [f"{name}: is missing, {MARKER} records it" for name in recorded if name not in found]
    problems += [f"{name}: is not recorded in {MARKER}" for name in found if name not in recorded]
    for name in found.keys() & recorded.keys():
        for what in ("bytes", "sha256"):
            ours, theirs = found[name][what], recorded[name].get(what)
            if ours != theirs:
                label = "SHA-256" if what == "sha256" else what
                problems.append(f"{name}: damaged or changed: {label} {ours}, recorded is {theirs}")
                break
    return sorted(problems)


def recorded_weights(folder: Path) -> Any:
    """What ``compression.json`` holds under ``weights``, unchecked; None without such a file or entry."""
    path = folder / MARKER
    return read_json(path, "cannot be read").get("weights") if path.is_file() else None


def check_unchanged(folder: Path) -> None:
    """Refuse weights that are not those ``compression.json`` records, where the folder has one with hashes.

    Raises:
        InputError: names the first such file.
    """
    for problem in changed_files(folder, recorded_weights(folder)):
        raise InputError(f"{folder}: {problem} (weights that you changed yourself load once {MARKER} is removed)")
