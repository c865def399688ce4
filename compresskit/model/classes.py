"""The names of a head's classes. Where two heads or a head and a data set meet, names decide, not places."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from compresskit.errors import InputError

#: The same integer is written in these ways by programs that hold labels as floating-point numbers, or pad them.
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}(\.0+)?")
#: Characters that nobody sees: of the categories of control characters, byte order marks, joiners and marks of
#: direction, and what chooses between two pictures of an emoji.
_UNSEEN, _PICTURES = ("Cc", "Cf"), "\ufe0e\ufe0f"
#: Class endings of the heads whose outputs are the classes of ``id2label``.
HEADS_OF_CLASSES = ("ForSequenceClassification", "ForTokenClassification")


def class_names(config: Any) -> tuple[str, ...]:
    """The names of a configuration's classes, in the order of their numbers."""
    return ordered(config.id2label or {})


def ordered(id2label: Mapping[Any, Any]) -> tuple[str, ...]:
    """The names in an ``id2label``, in the order of their numbers.

    Raises:
        InputError: the numbers are not 0, 1, 2, ...: which name belongs to which output of the head is not known.
    """
    names = {int(number): str(name) for number, name in id2label.items()}
    if sorted(names) != list(range(len(id2label))):
        numbers = ", ".join(map(str, sorted(names)[:10])) + ", ..." * (len(names) > 10)
        raise InputError(
            f"id2label of the model numbers its {len(id2label)} classes {numbers}; the outputs of its head are "
            f"numbered 0 to {len(id2label) - 1}: mend id2label in its config.json"
        )
    return tuple(names[number] for number in range(len(names)))


def unnamed(names: Sequence[str]) -> bool:
    """Whether these are the names of a head that has none: ``LABEL_0``, ``LABEL_1``, ... ``LABEL_i`` is class i."""
    return all(name == f"LABEL_{number}" for number, name in enumerate(names))


def cleaned(name: str) -> str:
    """A name as it is kept and compared: composed (NFC), without byte order marks and white space around it."""
    return unicodedata.normalize("NFC", name.replace("\ufeff", "")).strip()


def likeness(name: str) -> str:
    """What all spellings of a name have in common that a reader takes for one: integers have their value; of other
    names upper and lower case, forms of a character, white space and characters that nobody sees do not count.

    Example:
        >>> likeness("00") == likeness("0"), likeness("Very  good") == likeness("very good")
        (True, True)
    """
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    if not plain.isascii() or not plain.isprintable():
        plain = "".join(c for c in plain if unicodedata.category(c) not in _UNSEEN and c not in _PICTURES).strip()
    number = whole_number(plain)
    return plain if number is None else str(number)


def whole_number(name: str) -> int | None:
    """The integer that a name stands for (``3``, ``03``, ``3.0``); None if it is another name."""
    return int(name.partition(".")[0]) if _WHOLE.fullmatch(name) else None


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Names found in a data set, in the order in which a new head numbers them: numbers by their value, ``LABEL_i`` by
    i, other names as text.
    """
    found = sorted(names)
    numbers = [whole_number(name.removeprefix("LABEL_")) for name in found]
    if None in numbers:
        return tuple(found)
    return tuple(name for _, name in sorted(zip(numbers, found, strict=True)))


class Lookup:
    """A name as one of ``known`` has it: exactly; else by its likeness, where that tells the known names apart."""

    def __init__(self, known: Sequence[str]) -> None:
        self.known = set(known)
        times = Counter(map(likeness, known))
        self.by_key = {likeness(name): name for name in known if times[likeness(name)] == 1}

    def __call__(self, name: str) -> str | None:
        """None where no known name is meant."""
        return name if name in self.known else self.by_key.get(likeness(name))


def class_order(wanted: Sequence[str], held: Sequence[str]) -> tuple[int, ...] | None:
    """For each class of ``wanted`` the number of the class of ``held`` that means the same.

    Names decide. A head without names has its classes in the order of their numbers.

    Returns:
        None where they have other names or another number of classes.

    Example:
        >>> class_order(("good", "bad"), ("BAD", "GOOD"))
        (1, 0)
    """
    same = tuple(range(len(wanted)))
    if len(wanted) != len(held):
        return None
    if tuple(wanted) == tuple(held) or unnamed(wanted) or unnamed(held):
        return same
    find, places = Lookup(held), {name: number for number, name in enumerate(held)}
    found = [find(name) for name in wanted]
    order = tuple(places[name] for name in found if name is not None)
    return order if tuple(sorted(order)) == same else None


def several_at_once(model: Any) -> str | None:
    """What a head predicts if that is more than one class or number for a text; None otherwise.

    Such heads take losses and scores of their own.
    """
    config = model.config
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return None
    if config.problem_type == "multi_label_classification":
        return "several labels at once (problem_type multi_label_classification)"
    if config.problem_type == "regression" and config.num_labels > 1:
        return f"{config.num_labels} numbers at once (problem_type regression)"
    return None
