"""Which checkpoint this is: hashes of all that decides what it computes. Results are kept and found again by them."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compresskit.model.checkpoint import Checkpoint
from compresskit.model.output import EXPORT, MARKER, TOKENIZER_FILES, TRAINING
from compresskit.model.sentence import module_folders
from compresskit.model.weights import weight_files
from compresskit.storage.files import file_hash

#: Files that say how a folder was made; they decide nothing.
_RECORDS = (MARKER, TRAINING, EXPORT)
#: Endings of configurations, vocabularies and a checkpoint's own code.
_SMALL = (".json", ".txt", ".model", ".spm", ".py")
#: Entries of a configuration that say where a model came from and how it is run, not what it computes.
_PASSING = ("_name_or_path", "name_or_path", "transformers_version", "_attn_implementation", "attn_implementation")


def of_checkpoint(checkpoint: Checkpoint) -> dict[str, str]:
    """:func:`of_folder` of a checkpoint that was read from one, :func:`of_model` of one given as an object."""
    return of_model(checkpoint.model) if checkpoint.folder is None else of_folder(checkpoint.folder)


def of_folder(folder: Path) -> dict[str, str]:
    """SHA-256 of weights, configuration, tokenizer files, sentence modules and other small files: path -> hash.

    Raises:
        InputError: there are no weights.
    """
    weights = weight_files(folder)
    small = [
        path
        for path in folder.iterdir()
        if path.is_file() and path.name not in _RECORDS and not path.name.startswith(".")
        if TOKENIZER_FILES.fullmatch(path.name) or path.suffix in _SMALL
    ]
    modules = [path for name in module_folders(folder) for path in (folder / name).rglob("*") if path.is_file()]
    found = sorted({*weights, *small, *modules})
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in found}


def of_model(model: PreTrainedModel) -> dict[str, str]:
    """SHA-256 of the class, the configuration and the weights of a model in memory, whatever device they are on."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _PASSING}
    text = json.dumps([type(model).__name__, config], sort_keys=True, default=str)
    weights = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        plain = tensor.detach().cpu()
        plain = plain.float() if plain.is_floating_point() else plain  # numpy has no bfloat16
        weights.update(plain.contiguous().numpy().tobytes())
    return {"config": hashlib.sha256(text.encode()).hexdigest(), "weights": weights.hexdigest()}


def of_tokenizer(tokenizer: Any) -> dict[str, str]:
    """SHA-256 of the files that a tokenizer writes of itself: name -> hash; nothing of what writes none."""
    if not hasattr(tokenizer, "save_pretrained"):
        return {}
    with tempfile.TemporaryDirectory() as written:
        tokenizer.save_pretrained(written)
        return {path.name: file_hash(path) for path in sorted(Path(written).iterdir()) if path.is_file()}
