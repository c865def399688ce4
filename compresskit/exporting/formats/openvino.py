"""OpenVINO's own format, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from compresskit.exporting.format import FORMATS, ExportFormat, NoOptions, Runtime, Written
from compresskit.exporting.formats.onnx import GRAPH, Onnx, OnnxOptions

if TYPE_CHECKING:
    from compresskit.model.checkpoint import Checkpoint
    from compresskit.tasks.predicting import Runnable

#: Where optimum-intel and the OpenVINO backend of sentence-transformers look for a model.
MODEL = "openvino/openvino_model.xml"
_WEIGHTS = "openvino/openvino_model.bin"


@FORMATS.register
class OpenVino(ExportFormat[NoOptions]):
    """The graph of ``onnx``, converted by OpenVINO. Weights stay in float32, and so do the sums when it is run here."""

    name = "openvino"
    summary = "an OpenVINO model in float32"
    packages = (*Onnx.packages, "openvino")
    extra = "openvino"
    files = (MODEL, _WEIGHTS)
    largest = Onnx.largest
    tolerance = Onnx.tolerance
    runtime = Runtime("OpenVINO", "openvino")

    def write(self, read: Checkpoint, folder: Path, options: NoOptions) -> Written:
        import openvino

        written = Onnx().write(read, folder, OnnxOptions())
        graph = folder / GRAPH
        converted = openvino.Core().read_model(graph)  # openvino.convert_model would send telemetry
        (folder / MODEL).parent.mkdir()
        openvino.save_model(converted, folder / MODEL, compress_to_fp16=False)
        graph.unlink()
        record = {name: value for name, value in written.record.items() if name in ("inputs", "outputs")}
        return Written(record, written.notes)

    def load(self, folder: Path) -> Runnable:
        from compresskit.exporting.openvino_model import OpenVinoModel

        return OpenVinoModel(folder, self.weight_files(folder)[0])
