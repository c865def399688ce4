"""Read dense checkpoints, write and reload compressed ones. A folder is complete or not there."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel

from compresskit.errors import InputError, one_line
from compresskit.model import demo, heads, sentence
from compresskit.model.adapters import check_given
from compresskit.model.classes import HEADS_OF_CLASSES, class_names, class_order, ordered, unnamed
from compresskit.model.heads import stored_head
from compresskit.model.output import TOKENIZER_FILES, TRIM
from compresskit.model.quantizer import QUANT_METHOD, is_compressed, mount_config, quantizer_of
from compresskit.model.sizes import check_config, check_sizes
from compresskit.model.sources import check_finite
from compresskit.model.targets import base_prefix, check_supported, find_targets
from compresskit.model.weights import Stored, check_folder, check_unchanged, read_headers, read_tensor, weight_files
from compresskit.storage import hub
from compresskit.validation import read_json

__all__ = [
    "MODEL_CLASSES",
    "SETTINGS_ONLY",
    "Checkpoint",
    "in_memory",
    "is_vocabulary",
    "load_compressed",
    "read",
    "save",
    "weight_files",
    "write_tokenizer",
]

#: What ``--as`` takes.
MODEL_CLASSES = {
    "base": transformers.AutoModel,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "multiple-choice": transformers.AutoModelForMultipleChoice,
}

#: Files of a tokenizer that hold no vocabulary.
SETTINGS_ONLY = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", TRIM)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_SEVERAL = "multi_label_classification"
_LOAD_ERRORS = (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, EOFError, SafetensorError)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        name: short, for output names: the folder's name or the last part of the hub id.
        origin: hub id, or the short name; what a model card may print.
        folder: where its files lie; None for a model given as an object.
        model: in its stored dtype, eval mode.
        kept: tensors of the base model that this class does not use, by their full name; saved along.
        notes: what the user should know, e.g. a head that the checkpoint lacks.
        as_class: the class that was asked for, if any.
        untrained: names of tensors that the checkpoint lacks and that were initialised at random.
        replaced_head: what the classes of a head were called whose last layer was replaced; None: none was.
        unused_head: where the checkpoint holds a head that nobody asked for: which, and what keeps it.
        tokenizer_files: text of the tokenizer files by name, in the place of those in ``folder``, where the vocabulary
            was trimmed.
    """

    name: str
    origin: str
    folder: Path | None
    model: PreTrainedModel
    kept: dict[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    as_class: str | None = None
    untrained: tuple[str, ...] = ()
    unused_head: str = ""
    replaced_head: tuple[str, ...] | None = None
    tokenizer_files: Mapping[str, str] | None = None


def read(
    model: str | Path | None,
    as_class: str | None = None,
    device: str = "cpu",
    *,
    compressed: bool | None = False,
    adopt: PreTrainedModel | None = None,
    new_head: bool = False,
    **config_changes: Any,
) -> Checkpoint:
    """Read a checkpoint of a family that can be compressed.

    Args:
        model: a folder or a hub id; None for the embedded demo checkpoint.
        as_class: a key of :data:`MODEL_CLASSES`; default: ``config.architectures[0]``, else the base model.
        device: where to put the model.
        compressed: whether it must be a compressed one; None takes both. Default: it must be dense.
        adopt: a model whose class is taken, and whose head weights are copied where the checkpoint lacks them and is as
            wide.
        new_head: leave the last layer of a stored head out, whatever it predicts, as if the checkpoint lacked it.
        config_changes: passed on to ``from_pretrained``, e.g. ``num_labels``.

    Raises:
        InputError: missing, unreadable or damaged files, another kind of model, compressed or not against
            ``compressed``, no network.
    """
    if model is None:
        folder, origin = demo.folder(), demo.ORIGIN
        name = demo.NAME
    else:
        folder, origin = _locate(str(model))
        name = origin.rpartition("/")[2]
    config, stored = _open(folder, compressed)
    if adopt is not None and config.model_type != adopt.config.model_type:
        theirs = adopt.config.model_type
        raise InputError(
            f"teacher and student have different families (model_type): {theirs} and {config.model_type} ({folder})"
        )
    if not config.architectures and (as_class is not None or adopt is not None):
        head, _ = stored_head(config, stored.shapes)
        config.architectures = [] if head is None else [heads.class_name(config, head)]  # its labels count too
    loader = _model_class(config, folder, as_class) if adopt is None else type(adopt)
    held = heads.output_tensors(loader, config) if new_head else ()
    replaced = class_names(config) if any(name in stored.shapes for name in held) else None
    if replaced is None:
        config_changes, named = _check_labels(config, folder, adopt, as_class, config_changes)
    else:
        named = (f"model {folder.name}: the last layer of its head ({', '.join(replaced)}) is replaced",)
    check_sizes(loader, config, folder, stored)
    options = {"dtype": "auto", "local_files_only": True, "trust_remote_code": False, **config_changes}
    options |= {"ignore_mismatched_sizes": True} if replaced is not None else {}
    try:
        loaded, info = loader.from_pretrained(folder, output_loading_info=True, **options)  # type: ignore[misc]
    except pickle.UnpicklingError as error:
        raise InputError(f"{folder}: weights are refused: {one_line(error)} (only plain tensors are read)") from None
    except _LOAD_ERRORS as error:
        raise InputError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    if not is_compressed(loaded):
        check_supported(loaded)
    # Belongs to a file in the folder it was read from (`push --auto-map`), which no output holds.
    vars(loaded.config).pop("auto_map", None)
    if replaced is not None:
        heads.renew(loaded, held)
    missing = sorted({*info["missing_keys"], *(held if replaced is not None else ())})
    notes = named + _check_missing(loaded, missing, folder, adopt)
    taken = heads.taken_for(loaded, (config.architectures or [""])[0], {*stored.shapes} - {*missing})
    notes += (f"model {folder.name}: {taken}",) if taken else ()
    check_finite(loaded)
    kept = _kept(loaded, stored)
    notes += _unused(loaded, sorted(info["unexpected_keys"]), kept)
    unused = _unused_head(loaded, info["unexpected_keys"], stored) if as_class is None and adopt is None else ""
    new = tuple(missing) if adopt is None else ()
    notes += (unused,) if unused else ()
    return Checkpoint(name, origin, folder, loaded.to(device), kept, notes, as_class, new, unused, replaced)


def in_memory(model: Any) -> Checkpoint:
    """The checkpoint of a model that was given as an object, dense or compressed: it has no folder.

    Raises:
        InputError: it is no transformers model, or holds an adapter.
    """
    check_given(model)
    name = model.config.name_or_path or type(model).__name__
    kept = quantizer_of(model).extra_tensors if is_compressed(model) else {}
    return Checkpoint(Path(name).name, name, None, model, kept)


def _check_labels(
    config: Any, folder: Path, adopt: PreTrainedModel | None, as_class: str | None, changes: dict[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The changes without those to names of classes, where the stored head names its own; and notes.

    Raises:
        InputError: the stored head is for other classes, or predicts something else.
    """
    asked = type(adopt).__name__ if adopt is not None else f"For{(as_class or '').title().replace('-', '')}"
    stored = (config.architectures or [""])[0]
    same_head = any(stored.endswith(kind) and asked.endswith(kind) for kind in HEADS_OF_CLASSES)
    if not same_head or "num_labels" not in changes:
        return changes, ()
    ours, theirs = changes.get("problem_type"), config.problem_type
    # Where it is not set, a head is for one class at a time or for a number.
    if ours != theirs and ((ours and theirs) or _SEVERAL in (ours, theirs)):
        held, wanted = (kind or "one answer at a time (problem_type not set)" for kind in (theirs, ours))
        raise InputError(
            f"model {folder}: its head is for {held}; asked for is {wanted}; "
            "start from a model without this head, or replace it (--new-head)"
        )
    unknown = {number: f"LABEL_{number}" for number in range(changes["num_labels"])}
    names, others = class_names(config), ordered(changes.get("id2label") or unknown)
    if class_order(others, names) is None:
        raise InputError(
            f"model {folder}: labels differ: its head has {', '.join(names)}; asked for are {', '.join(others)}; "
            "start from a model without this head, or replace it (--new-head)"
        )
    if unnamed(names) and not unnamed(others):
        note = f"model {folder.name}: its head does not name its labels; taken as {', '.join(others)}, in this order"
        return changes, (note,)
    # Its own order of the labels is the one its head was trained with.
    return {key: value for key, value in changes.items() if key not in ("id2label", "label2id")}, ()


def _locate(model: str) -> tuple[Path, str]:
    path = Path(model)
    if path.exists():
        if not path.is_dir():
            raise InputError(f"model {model}: is a file; give the folder that holds config.json and the weights")
        # A folder may be called anything; records, cards and pages print this.
        return path, re.sub(r"[^\w .+-]", "_", path.resolve().name).lstrip(" .+-") or "model"
    if not _HUB_ID.fullmatch(model) or (model.count("/") == 1 and Path(model).parent.is_dir()):
        raise InputError(f"model {model}: no such folder (a hub id looks like google-bert/bert-base-uncased)")
    return hub.download(model), model


def _open(folder: Path, compressed: bool | None, *, check_hashes: bool = True) -> tuple[Any, Stored]:
    """The configuration and what the weight files hold, once both are known to be harmless.

    Raises:
        InputError: see :func:`read`.
    """
    if not any(folder.iterdir()):
        raise InputError(f"model {folder}: the folder is empty")
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"model {folder}: has no config.json")
    check_folder(folder)
    data = read_json(path, "not a valid configuration")
    described = data.get("quantization_config") or {}
    classes = data.get("architectures") or []
    if not isinstance(described, dict) or not all(isinstance(name, str) for name in classes):
        raise InputError(f"{path}: not a valid configuration: architectures or quantization_config is of another kind")
    quantized = described.get("quant_method")
    if quantized == QUANT_METHOD and compressed is False:
        raise InputError(f"model {folder}: is compressed already; start from the dense checkpoint")
    if quantized is None and compressed is True:
        raise InputError(f"model {folder}: is not compressed; make it with `compresskit compress`")
    if quantized not in (None, QUANT_METHOD):
        raise InputError(f"model {folder}: is quantised with {quantized}; start from the dense checkpoint")
    stored = read_headers(folder)
    check_config(data, path, stored)
    if quantized == QUANT_METHOD and check_hashes:
        check_unchanged(folder)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), stored
    except Exception as error:  # every family checks in its own way
        raise InputError(f"{path}: model type {data.get('model_type')!r} cannot be read: {one_line(error)}") from None


def _model_class(config: Any, folder: Path, as_class: str | None) -> Any:
    if as_class is not None:
        return MODEL_CLASSES[as_class]
    if not config.architectures:
        return AutoModel
    name = config.architectures[0]
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise InputError(f"{folder}: architecture {name!r} is not in transformers (a checkpoint's own code is not run)")
    return found


def _check_missing(
    model: PreTrainedModel, missing: list[str], folder: Path, adopt: PreTrainedModel | None
) -> tuple[str, ...]:
    """Heads and poolers that the checkpoint lacks are copied from ``adopt``, or new where there is none or it is not
    as wide, and named in a note; anything else is refused.
    """
    prefix = base_prefix(model)
    heads = {target.name for target in find_targets(model) if target.role == "head"}
    lost = [key for key in missing if key.startswith(prefix) and key.rpartition(".")[0] not in heads]
    if lost:
        raise InputError(f"model {folder}: lacks weight {lost[0]}" + (f" and {len(lost) - 1} more" * (len(lost) > 1)))
    if not missing:
        return ()
    widths = {getattr(each.config, "hidden_size", None) for each in (model, adopt) if each is not None}
    if len(widths) > 1:
        return (
            f"not in the student, whose width is not the teacher's, so initialised at random: {', '.join(missing)}",
        )
    if adopt is not None:
        theirs, ours = adopt.state_dict(), model.state_dict()
        for key in missing:
            if key not in theirs or theirs[key].shape != ours[key].shape:
                raise InputError(f"model {folder}: lacks weight {key}, and the teacher has none of that shape")
            ours[key].copy_(theirs[key])
        return (f"not in the student, so copied from the teacher: {', '.join(missing)}",)
    return (f"not in the checkpoint, so initialised at random: {', '.join(missing)}",)


def _unused(model: PreTrainedModel, unexpected: list[str], kept: dict[str, Tensor]) -> tuple[str, ...]:
    """A note on stored tensors of the base model that nothing uses, e.g. layers beyond ``num_hidden_layers``."""
    prefix = base_prefix(model)
    unused = [key for key in unexpected if prefix and key.startswith(prefix) and key not in kept]
    unused += [key for key in unexpected if not prefix and key.startswith(tuple(n for n, _ in model.named_children()))]
    return (f"in the checkpoint but not used by this model: {', '.join(unused)}",) if unused else ()


def _unused_head(model: PreTrainedModel, unexpected: Iterable[str], stored: Stored) -> str:
    """A note on a head that the checkpoint holds and its configuration does not announce; empty: there is none."""
    head, names = stored_head(model.config, stored.shapes) if unexpected else (None, ())
    left = sorted(set(names) & set(unexpected))
    if head is None or not left:
        return ""
    return (
        f"in the checkpoint, but config.json announces no such head, so unused: {', '.join(left)}; --as {head} keeps it"
    )


def _kept(model: PreTrainedModel, stored: Stored) -> dict[str, Tensor]:
    """Stored tensors of the base model that this class leaves out, e.g. the pooler of a masked-LM checkpoint."""
    prefix = base_prefix(model)
    if not prefix or type(model.config) not in MODEL_MAPPING:
        return {}
    with torch.device("meta"):
        base: PreTrainedModel = AutoModel.from_config(model.config)
    if type(base) is not type(model.base_model):  # no AutoModel is the base of this class (DPR, encoders of T5)
        return {}
    if is_compressed(model):
        mount_config(base, quantizer_of(model).quantization_config)
    base_keys = base.state_dict().keys()
    used = model.state_dict().keys()
    kept = {}
    for key in base_keys:
        full = prefix + key
        found = next((name for name in (full, key) if name in stored.shapes), None)
        if full not in used and found is not None:
            kept[full] = read_tensor(stored, found).to(model.dtype)
    return kept


def save(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the model of ``checkpoint`` with its kept tensors into ``folder``, and the tokenizer files it has; those of
    sentence-transformers too, where the model is a plain encoder.
    """
    if is_compressed(checkpoint.model):
        quantizer_of(checkpoint.model).extra_tensors = checkpoint.kept
    checkpoint.model.save_pretrained(folder)
    write_tokenizer(checkpoint, folder)
    if checkpoint.folder is not None and checkpoint.model.base_model is checkpoint.model:
        sentence.copy(checkpoint.folder, folder, getattr(checkpoint.model.config, "hidden_size", None))


def write_tokenizer(checkpoint: Checkpoint, destination: Path) -> None:
    """Write the tokenizer files of a checkpoint: copies of those in its folder, unless its vocabulary was trimmed."""
    if checkpoint.tokenizer_files is not None:
        for name, text in checkpoint.tokenizer_files.items():
            (destination / name).write_text(text, encoding="utf-8")
    elif checkpoint.folder is not None:
        for file in sorted(checkpoint.folder.iterdir()):
            if file.is_file() and TOKENIZER_FILES.fullmatch(file.name):
                shutil.copyfile(file, destination / file.name)


def is_vocabulary(path: Path) -> bool:
    """Whether a file holds a tokenizer's vocabulary, not only its settings."""
    return TOKENIZER_FILES.fullmatch(path.name) is not None and path.name not in SETTINGS_ONLY


def load_compressed(folder: Path, *, check_hashes: bool = True, **kwargs: Any) -> PreTrainedModel:
    """See :func:`compresskit.load`. Without ``check_hashes`` the weights need not be those that were recorded."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    config, stored = _open(folder, True, check_hashes=check_hashes)
    loader = _model_class(config, folder, None)
    check_sizes(loader, config, folder, stored)
    options = {"local_files_only": True, "trust_remote_code": False, **kwargs, "output_loading_info": True}
    try:
        model, info = loader.from_pretrained(folder, **options)
    except InputError:
        raise
    except _LOAD_ERRORS as error:
        raise InputError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    loaded: PreTrainedModel = model
    for keys, problem in ((info["missing_keys"], "lacks weight"), (_foreign(loaded, info), "holds an unknown weight,")):
        if keys:
            more = f" and {len(keys) - 1} more" * (len(keys) > 1)
            raise InputError(f"{folder}: {problem} {min(keys)}{more}")
    check_finite(loaded)
    quantizer_of(loaded).extra_tensors = _kept(loaded, stored)  # so that saving it again loses nothing
    return loaded


def _foreign(model: PreTrainedModel, info: dict[str, Any]) -> list[str]:
    """Unexpected keys, but for parts of the base model that this class leaves out (a kept pooler)."""
    prefix = base_prefix(model)
    modules = {name for name, _ in model.named_modules()}
    return [
        key
        for key in info["unexpected_keys"]
        if not (prefix and key.startswith(prefix)) or key.rpartition(".")[0] in modules
    ]
