"""ONNX with weights in 8 bits and embeddings in 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compresskit.errors import InputError
from compresskit.exporting.format import FORMATS
from compresskit.exporting.formats.onnx import OnnxOptions, Reader
from compresskit.exporting.formats.onnx_int8 import OnnxInt8

if TYPE_CHECKING:
    from compresskit.exporting.fused.rounded import Rounded


@dataclass(frozen=True)
class OnnxInt4Options(OnnxOptions):
    """Options of ``onnx-int4``.

    Attributes:
        runtime: ``onnxruntime`` alone: ONNX has no look-up of 4-bit rows.
    """

    runtime: Reader = "onnxruntime"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.runtime != "onnxruntime":
            raise InputError("format onnx-int4: ONNX has no look-up of 4-bit rows; it is for runtime onnxruntime alone")


@FORMATS.register
class OnnxInt4(OnnxInt8):
    """The graph of ``onnx-int8`` for ONNX Runtime, with 4-bit rows in tables that are only looked up."""

    name = "onnx-int4"
    summary = "an ONNX graph for ONNX Runtime with embeddings in 4 bits, the other weights in 8"
    options_type = OnnxInt4Options
    hub_name = "model_q4.onnx"

    def change(self, graph: Any, options: OnnxOptions, rounded: tuple[Rounded, ...]) -> None:
        from compresskit.exporting.int4 import rows_to_int4

        rows_to_int4(graph)
        super().change(graph, options, rounded)
