"""Rows of a data set from Python, checked against the head that learns them, with labels as the head numbers them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedModel

from compresskit.errors import InputError, did_you_mean, shown
from compresskit.model.classes import Lookup, class_names, class_order, cleaned, unnamed, whole_number
from compresskit.model.heads import has_head
from compresskit.tasks.losses import IGNORED
from compresskit.tasks.regression import LARGEST

_SPANS = ("start_positions", "end_positions")
#: Names of the column of labels, as transformers' collators take them.
_LABELS = ("labels", "label", "label_ids")


def checked_rows(dataset: Any, source: str = "data set") -> Dataset:
    """The data set with its labels in a column ``labels``.

    Raises:
        InputError: another kind of data set, no ``input_ids``, or a row of them that is no list of one token number or
            more; two columns of labels.
    """
    if not isinstance(dataset, Dataset):
        raise InputError(f"data set: give a datasets.Dataset, not a {type(dataset).__name__}")
    if "input_ids" not in dataset.column_names:
        columns = ", ".join(dataset.column_names) or "none"
        raise InputError(f"data set: has no column 'input_ids'; tokenise it first (its columns: {columns})")
    labels = [name for name in _LABELS if name in dataset.column_names]
    if len(labels) > 1:
        raise InputError(f"{source}: has the columns {' and '.join(labels)}: remove those that are not the labels")
    if labels and labels != ["labels"]:
        dataset = dataset.rename_column(labels[0], "labels")
    for row, ids in enumerate(dataset.with_format(None)["input_ids"]):
        # A column holds one type, but for missing values.
        if not isinstance(ids, list) or not ids or not _is_integer(ids[0]) or None in ids or min(ids) < 0:
            raise InputError(f"{source}: row {row}: input_ids must be one token number or more, not {shown(ids)}")
    return dataset


def input_columns(
    dataset: Dataset, model: PreTrainedModel, tokenizer: Any, targets: Sequence[str], source: str = "data set"
) -> list[str]:
    """The columns beside ``input_ids`` that the model or its tokenizer takes, but for ``targets``.

    Raises:
        InputError: one of them has not one integer, or a list of so and so many, for each token.
    """
    taken = {*inspect.signature(model.forward).parameters, *tokenizer.model_input_names} - {"input_ids", *targets}
    found = [name for name in dataset.column_names if name in taken]
    plain = dataset.with_format(None)
    for name in found:
        for row, (value, ids) in enumerate(zip(plain[name], plain["input_ids"], strict=True)):
            if not isinstance(value, list) or len(value) != len(ids) or not _are_integers(value):
                raise InputError(
                    f"{source}: row {row}: {name}, an input of {type(model).__name__}, must be one integer "
                    f"(or a list of them) for each of {len(ids)} tokens, not {shown(value)}; remove it, or give "
                    "DistillationTrainer a collator that knows it"
                )
    return found


def numbered(dataset: Dataset, model: PreTrainedModel, source: str = "data set") -> Dataset:
    """The rows of :func:`checked_rows` with targets that the model's head can learn.

    Classes may be numbers, which are the model's, or names; a ``ClassLabel`` column is matched by its names. A head for
    one number takes integers and floats. ``-100`` is left out of the loss, as in transformers.

    Raises:
        InputError: a target that the head cannot learn; its row is named.
    """
    plain = dataset.with_format(None)
    if has_head(model, "question-answering"):
        _check_spans(plain, source)
        return dataset
    if "labels" not in dataset.column_names:
        return dataset
    if has_head(model, "sequence-classification"):
        one_number = model.config.num_labels == 1 and model.config.problem_type in (None, "regression")
        if model.config.problem_type == "multi_label_classification":
            found = _converted(plain, _flags(len(class_names(model.config))), source)
        else:
            found = _converted(plain, _number if one_number else _class_number(plain, model, source), source)
    elif has_head(model, "token-classification"):
        found = _converted(plain, _of_tokens(_class_number(plain, model, source)), source)
    elif has_head(model, "masked-lm"):
        found = _converted(plain, _of_tokens(_below(model.config.vocab_size, "token")), source)
    else:
        return dataset
    if found is None:
        return dataset
    changed = dataset.remove_columns("labels").add_column("labels", found)
    return changed.with_format(dataset.format["type"], **dataset.format["format_kwargs"])


def _converted(plain: Dataset, convert: Callable[[Any, int], Any], source: str) -> list[Any] | None:
    """The labels as the head takes them; None where they are so already. ``convert`` also gets a row's tokens."""
    values, found = plain["labels"][:], []
    for row, (value, ids) in enumerate(zip(values, plain["input_ids"], strict=True)):
        try:
            found.append(convert(value, len(ids)))
        except InputError as error:
            raise InputError(f"{source}: row {row}: {error}") from None
    if found and all(value == ([IGNORED] * len(value) if isinstance(value, list) else IGNORED) for value in found):
        raise InputError(f"{source}: its labels are all {IGNORED}, which losses leave out: remove the column")
    same = found == values and {type(value) for value in found} == {type(value) for value in values}
    return None if same else found


def _of_tokens(convert: Callable[[Any, int], int]) -> Callable[[Any, int], list[int]]:
    """A label for each token."""

    def each(value: Any, tokens: int) -> list[int]:
        if not isinstance(value, list):
            raise InputError(f"labels must be a list, one for each token, not {shown(value)}")
        if len(value) != tokens:
            raise InputError(f"has {len(value)} labels for {tokens} tokens")
        return [convert(one, tokens) for one in value]

    return each


def _flags(count: int) -> Callable[[Any, int], list[float]]:
    """For each label of several whether it holds, as a probability."""

    def convert(value: Any, tokens: int) -> list[float]:
        if not isinstance(value, list) or len(value) != count or not all(isinstance(one, int | float) for one in value):
            raise InputError(
                f"the head predicts several labels: give a list of {count} zeros and ones, not {shown(value)}"
            )
        if not all(0 <= one <= 1 for one in value):
            raise InputError(f"labels must lie from 0 to 1, not {shown(value)}")
        return [float(one) for one in value]

    return convert


def _class_number(dataset: Dataset, model: PreTrainedModel, source: str) -> Callable[[Any, int], int]:
    """Turns a name or a number of a class into the model's number of it."""
    names = class_names(model.config)
    known, places = Lookup(names), {name: number for number, name in enumerate(names)}
    feature = dataset.features["labels"]
    feature = getattr(feature, "feature", feature)  # of a list of classes
    number = _below(len(names), "label", names)
    order: Sequence[int] | None = None
    spelt: dict[int, str] = {}
    if isinstance(feature, ClassLabel):
        order = _order(feature.names, names)
        if order is None:
            theirs = ", ".join(feature.names)
            raise InputError(f"{source}: labels differ: the model has {', '.join(names)}; the data set has {theirs}")

    def convert(value: Any, tokens: int) -> int:
        if isinstance(value, list | tuple | dict):
            raise InputError(
                f"holds several labels, {shown(value)}; the head predicts one (several: problem_type "
                "multi_label_classification)"
            )
        if isinstance(value, str):
            text = cleaned(value)
            name = known(text)
            if name is not None:
                place = places[name]
            elif unnamed(names) and (found := whole_number(text)) is not None:
                place = number(found, tokens)
            else:
                hint = did_you_mean(text, names)
                raise InputError(f"unknown label {shown(value)}: {hint}known: {', '.join(names)}")
            if (before := spelt.setdefault(place, text)) != text:
                raise InputError(f"label {shown(value)} stands above as {before!r}: write it alike in all rows")
            return place
        if order is not None and _is_integer(value) and 0 <= value < len(order):
            return order[value]
        return number(value, tokens)

    return convert


def _order(theirs: Sequence[str], ours: Sequence[str]) -> tuple[int, ...] | None:
    """For each class of the data set, which may lack some, the number of the model's."""
    order = class_order(theirs, ours)
    if order is not None or len(theirs) >= len(ours):
        return order
    known, places = Lookup(ours), {name: number for number, name in enumerate(ours)}
    found = [known(name) for name in theirs]
    return tuple(places[name] for name in found if name is not None) if None not in found else None


def _below(count: int, what: str, names: Sequence[str] = ()) -> Callable[[Any, int], int]:
    def convert(value: Any, tokens: int) -> int:
        if not _is_integer(value):
            raise InputError(f"{shown(value)} is no {what}: give an integer from 0 to {count - 1}")
        if value != IGNORED and not 0 <= value < count:
            known = f" ({', '.join(names)})" if names else ""
            raise InputError(f"{what} {value} is not from 0 to {count - 1}{known}")
        return int(value)

    return convert


def _number(value: Any, tokens: int) -> float:
    found = value[0] if isinstance(value, list) and len(value) == 1 else value
    if not isinstance(found, int | float) or isinstance(found, bool) or found != found:
        raise InputError(f"the head predicts one number, the label is {shown(value)}")
    if abs(found) > LARGEST:
        raise InputError(f"label {shown(value)} is larger than numbers of 32 bits")
    return float(found)


def _check_spans(dataset: Dataset, source: str) -> None:
    given = [name for name in _SPANS if name in dataset.column_names]
    if len(given) == 1:
        raise InputError(f"{source}: has {given[0]} alone; give {' and '.join(_SPANS)}, or neither")
    for name in given:
        for row, (ids, place) in enumerate(zip(dataset["input_ids"], dataset[name], strict=True)):
            if not _is_integer(place) or not 0 <= place < len(ids):
                raise InputError(f"{source}: row {row}: {name} {shown(place)} is no token of its {len(ids)}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_integers(values: list[Any]) -> bool:
    """Whether these are integers, or lists of equally many."""
    if isinstance(values[0], list):
        return all(
            isinstance(one, list) and len(one) == len(values[0]) and all(isinstance(part, int) for part in one)
            for one in values
        )
    return all(isinstance(value, int) for value in values)
