"""The errors a user can meet. Each carries one clear line; the command line turns the class into an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class CompresskitError(Exception):
    """Base class of every error raised on purpose."""

    exit_code = 1


class InputError(CompresskitError, ValueError):
    """Refused before any work was done: the request or its input is wrong (exit code 2)."""

    exit_code = 2


class UnreachableError(InputError):
    """A ratio that a method cannot give for a model."""


class WorkError(CompresskitError, RuntimeError):
    """Failed while working: the request was fine, something on the way was not (exit code 1)."""


def unknown(what: str, given: str, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not among ``allowed``: names the nearest one and lists them all."""
    names = sorted(allowed)
    return InputError(f"unknown {what} {given!r}: {did_you_mean(given, names)}known: {', '.join(names) or 'none'}")


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """A question that names the nearest known name, whatever its upper and lower case, or else the first one that ends
    with what was given behind a dash (``f1``: ``entity_f1``); empty where none is near.
    """
    folded = {name.casefold(): name for name in known}
    ending = [name for name in folded if name.endswith((f"_{given.casefold()}", f"-{given.casefold()}"))]
    near = difflib.get_close_matches(given.casefold(), list(folded), n=1, cutoff=0.5) or ending
    return f"did you mean {folded[near[0]]!r}? " if near else ""


def shown(value: Any, most: int = 100) -> str:
    """A value as messages show it: as Python writes it, of ``most`` characters at most."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def one_line(error: BaseException) -> str:
    """The error's text, short and on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def is_panic(error: BaseException) -> bool:
    """Whether an error is a panic of a library in Rust (tokenizers, safetensors), which is no ``Exception``."""
    return type(error).__name__ == "PanicException"


@contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Turns a panic of a library in Rust, which ``except Exception`` would miss, into a WorkError about ``what``."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise WorkError(f"{what}: a library failed: {one_line(error)}") from None
