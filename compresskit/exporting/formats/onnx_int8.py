"""ONNX with weights in 8 bits."""

from __future__ import annotations

from typing import Any

from compresskit.exporting.format import FORMATS
from compresskit.exporting.formats.onnx import Onnx


@FORMATS.register
class OnnxInt8(Onnx):
    """The graph of ``onnx`` with weights as codes and scales; sums stay in float32."""

    name = "onnx-int8"
    summary = "an ONNX graph with weights in 8 bits"
    tolerance = None
    exact = "onnx"

    def change(self, graph: Any) -> None:
        from compresskit.exporting.int8 import to_int8

        to_int8(graph)
