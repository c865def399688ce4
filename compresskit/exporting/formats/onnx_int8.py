"""ONNX with weights in 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.exporting.format import FORMATS
from compresskit.exporting.formats.onnx import Onnx, OnnxOptions

if TYPE_CHECKING:
    from compresskit.exporting.fused.rounded import Rounded


@FORMATS.register
class OnnxInt8(Onnx):
    """The graph of ``onnx`` with weights as codes and scales; sums stay in float32. For ONNX Runtime alone, large
    products are computed with codes too.
    """

    name = "onnx-int8"
    summary = "an ONNX graph with weights in 8 bits"
    tolerance = None
    exact = "onnx"
    hub_name = "model_quantized.onnx"
    eight_bits = True

    def change(self, graph: Any, options: OnnxOptions, rounded: tuple[Rounded, ...]) -> None:
        from compresskit.exporting.int8 import to_int8

        axes = {product.name: None if product.kept == "float32" else product.axis for product in rounded}
        to_int8(graph, scaled_once=options.runtime == "onnxruntime", axes=axes)
