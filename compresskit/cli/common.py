"""What the commands share: consoles, flags, and quiet libraries."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape

from compresskit.errors import InputError

if TYPE_CHECKING:
    from compresskit.progress import Progress

F = TypeVar("F", bound=Callable[..., Any])

AS_CHOICES = (
    "base",
    "masked-lm",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "multiple-choice",
)
#: What a flag for a text takes, and how it is read.
TEXT = "FILE|FOLDER|HUB_ID"
KINDS_OF_TEXT = (
    "A file: .txt with blank lines between documents, or .jsonl with one a line, in the field text; also .gz. Or a "
    "folder of such files. Or a data set of the hub, of which the column text is read."
)
#: Width of tables that go to a file or a pipe.
PIPE_WIDTH = 160
#: A narrower terminal would leave no room for the columns of a table. It wraps the lines of one of this width.
LEAST_WIDTH = 80

_narrow = shutil.get_terminal_size().columns < LEAST_WIDTH
out = Console(width=PIPE_WIDTH if not sys.stdout.isatty() else LEAST_WIDTH if _narrow else None)
err = Console(stderr=True)


def shared(command: F) -> F:
    """The flags that mean the same in every command that computes."""
    options = (
        click.option(
            "--seed",
            type=click.IntRange(0, 2**32 - 1),
            default=0,
            show_default=True,
            help="Seed of every random choice.",
        ),
        click.option("--threads", type=click.IntRange(1, 256), help="CPU threads. Default: all."),
        click.option("--debug", is_flag=True, help="Show the traceback of an error."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def trimming(command: F) -> F:
    """The flags that trim a vocabulary before a compression."""
    options = (
        click.option("--trim-text", metavar=TEXT, help="Trim the vocabulary to this text first; see `trim`."),
        click.option("--trim-keep", type=int, metavar="N", help="How many tokens to keep then."),
        click.option(
            "--trim-coverage", type=float, metavar="S", help="Or which share of the text's tokens. Default: 0.999."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def units(command: F) -> F:
    """The flags that say how texts become units, beside `--unit` itself."""
    options = (
        click.option(
            "--field", "fields", multiple=True, metavar="NAME", help="With --unit: column of a table with texts."
        ),
        click.option("--language", metavar="CODE", help="With --unit: language of the sentences. Default: en."),
        click.option(
            "--max-texts", type=click.IntRange(4), help="With --unit: at most so many texts, chosen at random."
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def common(command: F) -> F:
    """The flags of the commands that read a dense model in a class of choice."""
    options = (
        click.option("--model", metavar="FOLDER|HUB_ID", help="Dense checkpoint. Default: the embedded MiniLM."),
        click.option("--as", "as_class", type=click.Choice(AS_CHOICES), help="Model class. Default: the checkpoint's."),
        click.option("--device", default="cpu", show_default=True, help="Where to compute, e.g. cpu or cuda."),
    )
    command = shared(command)
    for option in reversed(options):
        command = option(command)
    return command


def prepare(seed: int, threads: int | None, device: str = "cpu", *, rows: bool = True) -> None:
    """Libraries, seed, threads and device, before any work. Only the first of several processes reports.

    ``rows``: whether the command reads texts or rows of a task. Without, what only these need is not loaded.
    """
    if os.environ.get("RANK", "0") != "0":
        out.quiet = err.quiet = True
    if threads is not None:
        # Read by the linear algebra libraries when they are loaded, which is below.
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # NotImplementedError among them
        raise InputError(f"device {device!r}: cannot be used: {str(error).splitlines()[0][:150]}") from None
    # Nearly everything that any command needs: extension modules make other errors of an interrupt.
    for name in ("compresskit.training.stages" if rows else "compresskit.pipeline", "tensorly.decomposition"):
        import_module(name)
    begin()


def begin() -> None:
    """From here on an interrupt is an exception, so that what was begun is cleared up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(_signal: int, _frame: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # a second one must not stop the clearing up
    raise KeyboardInterrupt


@contextmanager
def reading(model: str | None) -> Iterator[None]:
    """A spinner while a model is read."""
    with err.status(escape(f"reading {model or 'the embedded checkpoint'}")):
        yield


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress callback drawn as a bar with the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>12}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield update


def print_notes(notes: tuple[str, ...], console: Console = out) -> None:
    for note in notes:
        console.print(f"Note: {printable(note)}", style="yellow", markup=False)


def printable(text: str) -> str:
    """The text without what steers a terminal: names in it may come from a stranger's file."""
    return "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text)
