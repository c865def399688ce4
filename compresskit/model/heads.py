"""The heads that a model may have, by the words that ``--as`` takes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from compresskit.errors import InputError
from compresskit.internals.transformers import builder, initialise

#: Word -> family -> class name. Names alone: the classes of all families would take seconds to import.
_NAMES = {
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "multiple-choice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
}

#: Endings of the classes whose last layers have one name and shape.
_ALIKE = ("ForSequenceClassification", "ForTokenClassification", "ForMultipleChoice")


def has_head(model: PreTrainedModel, head: str) -> bool:
    """Whether the model's class has this head, e.g. ``token-classification``."""
    return type(model).__name__ in _NAMES[head].values()


def class_name(config: Any, head: str) -> str:
    """The class of this family with this head."""
    return str(_NAMES[head][config.model_type])


def output_tensors(loader: Any, config: Any) -> tuple[str, ...]:
    """The tensors of a class whose shape follows the number of labels: those of the last layer of its head.

    Args:
        loader: a model class or an Auto class.
        config: of the checkpoint.
    """
    shapes = []
    for more in (0, 1):
        changed = copy.deepcopy(config)
        changed.num_labels = config.num_labels + more
        with torch.device("meta"):
            model = builder(loader)(changed)
        shapes.append({name: tensor.shape for name, tensor in model.state_dict().items()})
    return tuple(name for name, shape in shapes[0].items() if shapes[1][name] != shape)


def renew(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Give the layers of these tensors new values, as the model's family begins with.

    Raises:
        InputError: a layer is factorised, so that it has no such tensors.
    """
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        module = model.get_submodule(path)
        if not {name.rpartition(".")[2] for name in names} <= dict(module.named_parameters()).keys():
            raise InputError(f"the last layer of the head, {path}, is factorised and cannot be replaced")
        initialise(model, module)


def taken_for(model: PreTrainedModel, announced: str, held: Collection[str]) -> str:
    """What to tell where a stored head was read as one of another sort: heads for classes call their last layer alike.

    Args:
        model: as it was read.
        announced: the class that the checkpoint's configuration names.
        held: the tensors of the checkpoint that the model has taken.

    Returns:
        A note; empty where there is nothing to tell.
    """
    name = type(model).__name__
    kinds = [next((kind for kind in _ALIKE if one.endswith(kind)), None) for one in (announced, name)]
    head = {tensor for tensor in model.state_dict() if not tensor.startswith(f"{model.base_model_prefix}.")}
    taken = ", ".join(sorted(head & {*held}))
    if None in kinds or kinds[0] == kinds[1] or not taken:
        return ""
    return f"its head ({taken}) is that of {announced}, and was taken for that of {name}"


def stored_head(config: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str | None, tuple[str, ...]]:
    """Which head the tensors of a checkpoint belong to, whatever its configuration announces.

    Args:
        config: of the checkpoint.
        shapes: of its tensors, by name.

    Returns:
        The word that ``--as`` takes for it, and the names of its tensors; (None, ()) where no class has them.
    """
    best: tuple[tuple[int, ...], str | None, tuple[str, ...]] = ((), None, ())
    for word, names in _NAMES.items():
        found = getattr(transformers, str(names.get(config.model_type)), None)
        if found is None:
            continue
        with torch.device("meta"):
            model = found(config)
        prefix = f"{model.base_model_prefix}."
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        head = {name: shape for name, shape in own.items() if not name.startswith(prefix)}
        labelled = word in ("sequence-classification", "token-classification")  # of any number of labels
        held = [
            name
            for name, shape in head.items()
            if name in shapes and (shapes[name] == shape or (labelled and shapes[name][1:] == shape[1:]))
        ]
        known = {name.removeprefix(prefix) for name in own}
        lacking = len(known - {name.removeprefix(prefix) for name in shapes})
        left = sum(name.removeprefix(prefix) not in known for name in shapes)
        rank = (len(held), sum(shapes[name] == head[name] for name in held), -lacking, -left)
        if held and (best[1] is None or rank > best[0]):
            best = (rank, word, tuple(held))
    return best[1:]
