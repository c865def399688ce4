"""What makes a checkpoint a sentence-transformers model: the files beside its weights that say how to pool."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Literal

from compresskit.errors import InputError

#: How the vector of a sentence is made of those of its tokens.
Pooling = Literal["mean", "cls"]

#: Its files; the folders that ``modules.json`` lists come with them.
FILES = re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json")


def module_folders(folder: Path) -> list[str]:
    """Sub-folders of the modules behind the encoder (``1_Pooling``, ...), as ``modules.json`` lists them.

    None where the folder holds no sentence-transformers model. A path that leads elsewhere is left alone.
    """
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path for path in paths if re.fullmatch(r"\w[\w.-]*", path) and (folder / path).is_dir()]


def pooling(folder: Path | None) -> Pooling:
    """How the sentence vectors of a checkpoint are made; ``mean`` where it says nothing.

    Raises:
        InputError: they are made in another way, or pass through further layers.
    """
    if folder is None or not (folder / "modules.json").is_file():
        return "mean"
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
        settings = json.loads((folder / kinds["Pooling"] / "config.json").read_text(encoding="utf-8"))
        mode = settings.get("pooling_mode")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"model {folder}: its sentence-transformers modules cannot be read: {error!r}") from None
    # Before version 6 there was a switch for every mode.
    names: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    on = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value]
    found = mode if mode is not None else names.get(on[0]) if len(on) == 1 else None
    further = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    if further or found not in ("mean", "cls"):
        what = f"pass through {', '.join(sorted(further))}" if further else f"are pooled by {mode or ', '.join(on)}"
        raise InputError(f"model {folder}: its sentence vectors {what}; only mean and cls pooling can be scored")
    return "cls" if found == "cls" else "mean"


def copy(source: Path, destination: Path) -> None:
    """Copy pooling, normalisation, prompts and sequence length of a sentence-transformers model, if it is one."""
    for file in source.iterdir():
        if file.is_file() and FILES.fullmatch(file.name):
            shutil.copyfile(file, destination / file.name)
    for name in module_folders(source):
        shutil.copytree(source / name, destination / name)
