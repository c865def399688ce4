"""The dense model in fewer bits, as a file that one would ship."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.registry import register
from compresskit.exporting import exported
from compresskit.exporting.format import FORMATS
from compresskit.model.checkpoint import Checkpoint
from compresskit.tasks.registry import KINDS


class _Rounded(Baseline):
    """The dense model in the format that bears the baseline's name, in ONNX Runtime. Its MB are those of that file.
    Where no head is asked for the encoder alone is written, since a head gives no hidden states.
    """

    exported = False  # it is one
    cpu_only = True
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        """The graph in the cell's folder, written unless it is there."""
        folder = asked.folder / self.name
        with_head = asked.rows is not None and KINDS.get(asked.rows.task.kind).head is not None
        encoder: Any = dense.model if with_head else dense.model.base_model
        if not exported.is_whole(self.name, folder):
            exported.write(replace(dense, model=encoder), folder, self.name, overwrite=True)
        return Made(replace(dense, folder=folder), run=FORMATS.get(self.name).load(folder))

    def megabytes(self, made: Checkpoint) -> float:
        """Of the graph's files."""
        assert made.folder is not None
        return sum(file.stat().st_size for file in FORMATS.get(self.name).weight_files(made.folder)) / 1e6


@register
class OnnxInt8(_Rounded):
    """All weights in 8 bits."""

    name = "onnx-int8"
    summary = "the dense model as an ONNX file with weights in 8 bits, in ONNX Runtime"


@register
class OnnxInt4(_Rounded):
    """Embeddings in 4 bits, the other weights in 8."""

    name = "onnx-int4"
    summary = "the dense model as an ONNX file with embeddings in 4 bits and the rest in 8, in ONNX Runtime"
