"""ONNX in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.errors import InputError
from compresskit.exporting.format import FORMATS, ExportFormat, Runtime, Written, left_out

if TYPE_CHECKING:
    from compresskit.model.checkpoint import Checkpoint
    from compresskit.tasks.predicting import Runnable

GRAPH = "model.onnx"
#: Operator sets that can be written and that ONNX Runtime reads. 20 has an operator for GELU.
OPSETS = range(18, 26)


@dataclass(frozen=True)
class OnnxOptions:
    """Options of the ONNX formats.

    Attributes:
        opset: ONNX operator set, 18 to 25.
    """

    opset: int = 20

    def __post_init__(self) -> None:
        if self.opset not in OPSETS:
            raise InputError(f"opset {self.opset}: can be written from {OPSETS[0]} to {OPSETS[-1]}")


@FORMATS.register
class Onnx(ExportFormat[OnnxOptions]):
    """A graph in which factors stay factors, with any batch and length."""

    name = "onnx"
    summary = "an ONNX graph in float32"
    options_type = OnnxOptions
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"
    files = (GRAPH,)
    largest = 2**31  # what protobuf, the format of ONNX files, can hold
    tolerance: float | None = 1e-4
    runtime = Runtime("ONNX Runtime", "onnxruntime")

    def write(self, read: Checkpoint, folder: Path, options: OnnxOptions) -> Written:
        import onnx_ir

        from compresskit.exporting.graph import to_graph

        graph = to_graph(read.model, options.opset)
        self.change(graph)
        onnx_ir.save(graph, folder / GRAPH)
        names = {
            kind: [value.name for value in values]
            for kind, values in (("inputs", graph.graph.inputs), ("outputs", graph.graph.outputs))
        }
        return Written({"opset": options.opset, **names}, left_out(read))

    def change(self, graph: Any) -> None:
        """What a format derived from this one does to the graph (an ``onnx_ir.Model``) before it is saved."""

    def load(self, folder: Path) -> Runnable:
        from compresskit.exporting.onnx_model import OnnxModel

        return OnnxModel(folder)
