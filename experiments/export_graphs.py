"""The rows of the report on exports: what is written of each model, and what runs it."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onnxruntime.quantization import QuantType, quantize_dynamic

from compresskit.calibration.statistics import sample
from compresskit.data.corpus import find_corpus
from compresskit.exporting import exported
from compresskit.exporting.format import FORMATS
from compresskit.exporting.formats.onnx import GRAPH, graph_of
from compresskit.exporting.onnx_model import OnnxModel
from compresskit.exporting.openvino_model import OpenVinoModel
from compresskit.exporting.static_int8 import quantise
from compresskit.model import checkpoint
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.output import EXPORT
from compresskit.model.tokenizer import find_tokenizer
from compresskit.tasks.loading import evaluation_only, load_data, load_task
from compresskit.tasks.predicting import Runnable

By = Literal["ONNX Runtime", "OpenVINO"]
#: ONNX Runtime's own 8 bits of the dense graph, to compare with.
DYNAMIC, STATIC = "dynamic int8", "static int8"
#: Format, what the graph is for, and what runs it.
WAYS: tuple[tuple[str, str, By], ...] = (
    ("onnx", "any", "ONNX Runtime"), ("onnx", "onnxruntime", "ONNX Runtime"), ("onnx-int8", "any", "ONNX Runtime"),
    ("onnx-int8", "onnxruntime", "ONNX Runtime"), ("onnx-int4", "onnxruntime", "ONNX Runtime"),
    ("openvino", "any", "OpenVINO"), ("onnx-int8", "any", "OpenVINO"),
)  # fmt: skip
#: Tokens that the ranges of the static quantisation are taken from.
_TOKENS = 16_384


@dataclass(frozen=True)
class Row:
    """One way of one model.

    Attributes:
        model: its name in the report.
        format: a format of compresskit, or one of ONNX Runtime's own.
        runtime: what the graph is for.
        by: what runs it here.
    """

    model: str
    format: str
    runtime: str
    by: By

    @property
    def name(self) -> str:
        return f"{self.model}, {self.format}, {self.runtime}, {self.by}"

    def folder(self, graphs: Path) -> Path:
        return graphs / self.model / f"{self.format}-{self.runtime}".replace(" ", "-")

    def file(self, graphs: Path) -> Path:
        """What the runtime loads."""
        folder = self.folder(graphs)
        return FORMATS.get("openvino").weight_files(folder)[0] if self.format == "openvino" else graph_of(folder)

    def load(self, graphs: Path) -> Runnable:
        """The row, ready to run on as many threads as torch has."""
        kind = OpenVinoModel if self.by == "OpenVINO" else OnnxModel
        return kind(self.folder(graphs), self.file(graphs))


def rows_of(model: str, *, dense: bool) -> list[Row]:
    """All rows of a model; the dense one has no 4 bits, and ONNX Runtime's own 8 bits beside."""
    rows = [Row(model, *way) for way in WAYS if not (dense and way[0] == "onnx-int4")]
    return rows + [Row(model, form, "any", "ONNX Runtime") for form in (DYNAMIC, STATIC) if dense]


def write(row: Row, path: Path, graphs: Path, task: str | None, data: Path | None) -> dict[str, Any]:
    """Write the graph of a row, unless another row has written it; its MB and its error.

    Args:
        row: what to write.
        path: the model's folder.
        graphs: where the graphs lie.
        task: whose training rows the static quantisation reads; without any the text of the package.
        data: folder of the task's files.
    """
    folder = row.folder(graphs)
    read = _read(path, row.model != "dense")
    if row.format == DYNAMIC:
        whole = _copied(Row(row.model, "onnx", "any", row.by).folder(graphs), folder)
        quantize_dynamic(whole, folder / GRAPH, weight_type=QuantType.QInt8)
    elif row.format == STATIC:
        whole = _copied(Row(row.model, "onnx", "any", row.by).folder(graphs), folder)
        inputs = json.loads((whole.parent / EXPORT).read_text(encoding="utf-8"))["inputs"]
        quantise(whole, folder / GRAPH, _calibration(read, task, data), inputs)
    else:
        if not (folder / EXPORT).is_file():
            form = FORMATS.get(row.format)
            options = form.options_type(**({} if row.format == "openvino" else {"runtime": row.runtime}))
            folder.parent.mkdir(parents=True, exist_ok=True)
            exported.write(read, folder, row.format, options)
        record = json.loads((folder / EXPORT).read_text(encoding="utf-8"))
        error = next(iter(record["agreement"].values()))["relative error"]
        return vars(row) | {"megabytes": record["megabytes"]["exported"], "error": error}
    return vars(row) | {"megabytes": (folder / GRAPH).stat().st_size / 1e6, "error": None}


@functools.lru_cache(maxsize=1)
def _read(path: Path, compressed: bool) -> Checkpoint:
    return checkpoint.read(path, compressed=compressed)


def _copied(whole: Path, folder: Path) -> Path:
    """An empty folder with the configuration of the exact graph; that graph."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
    return graph_of(whole)


def _calibration(read: Checkpoint, task: str | None, data: Path | None) -> list[dict[str, Any]]:
    declared = None if task is None else load_task(task)
    rows = None if declared is None or evaluation_only(declared) else load_data(declared, data)
    return sample(read.model, find_tokenizer(None, read), rows or find_corpus(None), _TOKENS)
