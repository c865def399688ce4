"""What an export format owes, and the registry of all of them.

This module and the formats themselves are light: torch, transformers and what an extra brings are imported inside the
methods that need them, so that the formats can be listed without.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from compresskit.errors import InputError
from compresskit.registry import Registry

if TYPE_CHECKING:
    from compresskit.model.checkpoint import Checkpoint
    from compresskit.tasks.predicting import Runnable


@dataclass(frozen=True)
class NoOptions:
    """For formats without options."""


@dataclass(frozen=True)
class Runtime:
    """What runs a format in a benchmark.

    Attributes:
        name: as a report prints it, e.g. ``ONNX Runtime``.
        package: the distribution whose version the report prints. It is one of the format's ``packages``.
    """

    name: str
    package: str


@dataclass(frozen=True)
class Written:
    """What a format says of the model that it wrote.

    Attributes:
        record: what ``export.json`` holds beside the entries that all formats have.
        notes: what the user should know.
    """

    record: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def left_out(read: Checkpoint) -> tuple[str, ...]:
    """A note on the tensors of the checkpoint that its class does not use, for formats that cannot keep them."""
    if not read.kept:
        return ()
    return (f"left out, since {type(read.model).__name__} does not use it: {', '.join(read.kept)}",)


O = TypeVar("O")  # noqa: E741


class ExportFormat(ABC, Generic[O]):
    """One format that :func:`compresskit.export` writes. One registered class, in one file.

    A folder in any format also gets ``config.json``, the tokenizer files and ``export.json``; the format writes what
    holds the model.

    Attributes:
        name: what ``--format`` takes.
        summary: what the format is, in one line, for help texts and pages.
        options_type: a frozen dataclass of the options, each with a default. It refuses wrong values when it is made
            (InputError). Default: no options.
        packages: distributions, as pip names them, that writing and running need beyond those of compresskit itself.
        extra: the extra of the format's own distribution that brings these packages; empty: there is none.
        files: the files that hold the weights, relative to the folder. A format whose files are not always the same
            overrides :meth:`weight_files` instead.
        largest: bytes of weights in float32 that a model may have at most; None: any number.
        tolerance: the largest difference from torch that is accepted, as a share of the largest value of an output
            (where that is below 1: absolute); None: any.
        runtime: what runs the format in a benchmark; None: benchmarks have no rows for it.
        exact: the name of the format that holds the same model unrounded. A benchmark then writes the dense model in
            that one too, to compare with. None: the format rounds nothing.
    """

    name: str
    summary: str
    options_type: type[Any] = NoOptions
    packages: tuple[str, ...] = ()
    extra: str = ""
    files: tuple[str, ...] = ()
    largest: int | None = None
    tolerance: float | None = None
    runtime: Runtime | None = None
    exact: str | None = None

    @abstractmethod
    def write(self, read: Checkpoint, folder: Path, options: O) -> Written:
        """Write the model of a checkpoint into an empty folder. The checkpoint must not be changed.

        Args:
            read: a checkpoint; compressed, or in a benchmark also dense. ``read.model`` may be without a head.
            folder: where to write.
            options: an instance of ``options_type``.

        Raises:
            WorkError: the model cannot be written in this format.
        """

    def load(self, folder: Path) -> Runnable | None:
        """What was written, ready to run on the CPU, on as many threads as torch has; None where nothing here can.

        It is called like the transformers model (``input_ids``, ``attention_mask``, ..., int64 tensors of shape (batch,
        length)) and gives a mapping from transformers' names of the outputs (``logits``, ``last_hidden_state``) to
        float32 tensors. Inputs that the model does not read are ignored.
        """
        return None

    def weight_files(self, folder: Path) -> list[Path]:
        """The files that hold the weights: their sizes are the MB of the export.

        Raises:
            InputError: one is missing.
        """
        for name in self.files:
            if not (folder / name).is_file():
                raise InputError(f"export {folder}: {name} is missing")
        return [folder / name for name in self.files]


FORMATS: Registry[ExportFormat[Any]] = Registry(
    "format",
    ExportFormat,  # type: ignore[type-abstract]
    "compresskit.exporting.formats",
    "compresskit.export_formats",
    needs=("summary",),
)
