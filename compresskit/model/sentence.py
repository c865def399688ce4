"""What makes a checkpoint a sentence-transformers model: the files beside its weights that say how to pool."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

#: Lists the modules; has prompts and similarity.
MODULES, CONFIG = "modules.json", "config_sentence_transformers.json"
#: The encoder's settings, under one of these names; the first one counts.
TRANSFORMER_FILES = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
#: Its files; the folders that ``modules.json`` lists come with them.
FILES = re.compile(r"modules\.json|config_sentence_transformers\.json|sentence_[\w-]+_config\.json")
#: What a pooling calls the width of what it pools, before version 6 of sentence-transformers and since.
_WIDTHS = ("word_embedding_dimension", "embedding_dimension")


def module_folders(folder: Path) -> list[str]:
    """Sub-folders of the modules behind the encoder (``1_Pooling``, ...), as ``modules.json`` lists them.

    None where the folder holds no sentence-transformers model. A path that leads elsewhere is left alone.
    """
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        paths = [str(module["path"]) for module in modules]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path for path in paths if re.fullmatch(r"\w[\w.-]*", path) and (folder / path).is_dir()]


def modules_behind(folder: Path) -> list[str]:
    """The kinds of the modules behind the encoder, such as ``Pooling``; none where there are none."""
    try:
        modules = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        return [str(module["type"]).rpartition(".")[2] for module in modules if module["path"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def append_linear(folder: Path, weight: Tensor, *, width: int, normalised: bool, hidden_size: int) -> None:
    """Let the vectors of a model pass through one more linear map, as a ``Dense`` module behind all that is there.

    Args:
        folder: of the model. One that says nothing of sentence vectors says from now on: the mean over the tokens.
        weight: (D', D), applied to the vectors of length D.
        width: their length before ``truncate_dim`` of the folder cuts them to D. That comes last in
            sentence-transformers, so the map leaves out the rest instead, and ``truncate_dim`` goes.
        normalised: bring the result to length 1.
        hidden_size: of the encoder, for a folder that says nothing yet.
    """
    modules = json.loads((folder / MODULES).read_text(encoding="utf-8")) if (folder / MODULES).is_file() else []

    def add(kind: str, path: str, settings: dict[str, Any]) -> Path:
        number = len(modules)
        entry = {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        modules.append(entry)
        (folder / path).mkdir(exist_ok=True)
        if settings:
            (folder / path / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        return folder / path

    if not modules:
        add("Transformer", "", {})
        add("Pooling", "1_Pooling", {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True})
    weight = functional.pad(weight.detach().float().cpu(), (0, width - weight.shape[1]))
    _keep_all(folder)
    outside, inside = weight.shape
    identity = "torch.nn.modules.linear.Identity"
    settings = {"in_features": inside, "out_features": outside, "bias": False, "activation_function": identity}
    dense = add("Dense", f"{len(modules)}_Dense", settings)
    save_file({"linear.weight": weight.contiguous()}, dense / "model.safetensors")
    if normalised:
        add("Normalize", f"{len(modules)}_Normalize", {})
    (folder / MODULES).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")


def _keep_all(folder: Path) -> None:
    """Vectors keep all of their numbers."""
    if not (folder / CONFIG).is_file():
        return
    general = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if general.pop("truncate_dim", None) is not None:
        (folder / CONFIG).write_text(json.dumps(general, indent=2) + "\n", encoding="utf-8")


def copy(source: Path, destination: Path, hidden_size: int | None = None) -> None:
    """Copy pooling, normalisation, prompts and sequence length of a sentence-transformers model, if it is one.

    Args:
        hidden_size: of the encoder in ``destination``, for the pooling, which names it; None: that of ``source``.
    """
    for file in source.iterdir():
        if file.is_file() and FILES.fullmatch(file.name):
            shutil.copyfile(file, destination / file.name)
    for name in module_folders(source):
        shutil.copytree(source / name, destination / name)
        if hidden_size is not None:
            _name_width(destination / name / "config.json", hidden_size)


def _name_width(path: Path, hidden_size: int) -> None:
    """Let a pooling's settings name the width of what it pools; those of other modules name none."""
    with suppress(OSError, ValueError, TypeError):  # what cannot be read is refused where it is needed
        settings = json.loads(path.read_text(encoding="utf-8"))
        names = [name for name in _WIDTHS if name in settings and settings[name] != hidden_size]
        if names:
            settings |= dict.fromkeys(names, hidden_size)
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
