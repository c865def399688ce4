"""The dense model in fewer bits, as a file that one would ship."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.calibration.statistics import sample
from compresskit.errors import InputError
from compresskit.exporting import exported
from compresskit.exporting.format import FORMATS
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.output import EXPORT
from compresskit.model.sentence_vectors import reader_of_text
from compresskit.model.tokenizer import find_tokenizer
from compresskit.storage.writing import new_folder
from compresskit.tasks.registry import KINDS
from compresskit.tasks.rows import TRAIN

#: Tokens that the ranges of a static quantisation are taken from.
_TOKENS = 16_384


class _Rounded(Baseline):
    """The dense model as a file for ONNX Runtime. Its MB are those of that file. Where no head is asked for the encoder
    alone is written, since a head gives no hidden states.

    Attributes:
        format: of the file.
    """

    format: ClassVar[str]

    exported = False  # it is one
    cpu_only = True
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The graph in the cell's folder, written unless it is there."""
        folder = asked.folder / self.name
        with_head = asked.rows is not None and KINDS.get(asked.rows.task.kind).head is not None
        encoder: Any = dense.model if with_head else dense.model.base_model
        if not exported.is_whole(self.format, folder):
            self._write(replace(dense, model=encoder), folder, asked)
        return Made(replace(dense, folder=folder), run=FORMATS.get(self.format).load(folder))

    def _write(self, read: Checkpoint, folder: Path, asked: Asked) -> None:
        exported.write(read, folder, self.format, overwrite=True)

    def megabytes(self, made: Checkpoint) -> float:
        """Of the graph's files."""
        assert made.folder is not None
        return sum(file.stat().st_size for file in FORMATS.get(self.format).weight_files(made.folder)) / 1e6


@register
class OnnxInt8(_Rounded):
    """All weights in 8 bits."""

    name = format = "onnx-int8"
    summary = "the dense model as an ONNX file with weights in 8 bits, in ONNX Runtime"


@register
class OnnxInt4(_Rounded):
    """Embeddings in 4 bits, the other weights in 8."""

    name = format = "onnx-int4"
    summary = "the dense model as an ONNX file with embeddings in 4 bits and the rest in 8, in ONNX Runtime"


@register
class OnnxInt8Static(_Rounded):
    """Weights in 8 bits with a scale for each channel, and the inputs of products in 8 bits with fixed ranges, those of
    the task's training rows or else of the general text: what :mod:`onnxruntime.quantization` makes of ``onnx``.
    """

    name = "onnx-int8-static"
    format = "onnx"
    summary = "the dense model as an ONNX file quantised statically and per channel, by ONNX Runtime's own tools"

    def _write(self, read: Checkpoint, folder: Path, asked: Asked) -> None:
        """Raises InputError: there is neither a training row nor a text to take ranges from."""
        from compresskit.exporting.static_int8 import quantise

        rows = asked.rows if asked.rows is not None and TRAIN in asked.rows.splits else None
        text = rows or asked.text
        if text is None:
            raise InputError(f"baseline {self.name}: takes ranges from a task's training rows or a text; give one")
        tokenizer = find_tokenizer(None, read)
        batches = sample(read.model, tokenizer if rows else reader_of_text(read, tokenizer), text, _TOKENS)
        with tempfile.TemporaryDirectory() as place, new_folder(folder) as temporary:
            whole = exported.write(read, Path(place) / self.format, self.format)
            left_out = shutil.ignore_patterns("*.onnx", EXPORT)  # the record is that of the exact graph
            shutil.copytree(whole.folder, temporary, dirs_exist_ok=True, ignore=left_out)
            (graph,) = FORMATS.get(self.format).weight_files(whole.folder)
            quantise(graph, temporary / graph.name, batches, whole.record["inputs"])
