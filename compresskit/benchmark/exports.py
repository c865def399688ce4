"""The exports of the closing phase: every finished model as ONNX, its size, and its score through ONNX Runtime."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.benchmark import cells as work
from compresskit.benchmark import quality
from compresskit.benchmark.grid import Cell, Export, Grid
from compresskit.benchmark.records import ExportRecord, Record
from compresskit.benchmark.sources import Sources
from compresskit.exporting import formats
from compresskit.exporting.agreement import in_onnxruntime


class OnnxModel:
    """An ONNX file on the CPU, called like the transformers model it was made from."""

    device = torch.device("cpu")

    def __init__(self, path: Path, config: Any) -> None:
        self.config = config
        self._run = in_onnxruntime(path)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {name: torch.from_numpy(values) for name, values in self._run(inputs).items()}


def wanted(cell: Cell, grid: Grid) -> tuple[Export, ...]:
    """The formats of a cell: those of the grid, of the dense model plain ONNX too, none of the int8 baseline."""
    if not grid.exports or (cell.recipe is None and cell.method == "int8"):
        return ()
    plain: tuple[Export, ...] = ("onnx",) if cell.recipe is None and cell.method == "dense" else ()
    return tuple(dict.fromkeys((*plain, *grid.exports)))


def lacks(cell: Cell, record: Record, grid: Grid) -> bool:
    """Whether a finished cell has exports still to be made; one that failed is tried again."""
    made = {form for form, exported in record.exports.items() if not exported.message}
    return record.status == "finished" and not made.issuperset(wanted(cell, grid))


def export_all(cell: Cell, record: Record, sources: Sources, folder: Path, dense: Path) -> Record:
    """The record with every wanted export, and no other; what is there is kept."""
    made = {}
    for form in wanted(cell, sources.grid):
        known = record.exports.get(form)
        whole = known is not None and not known.message and (folder / form / formats.GRAPH).is_file()
        made[form] = known if known is not None and whole else _export(cell, form, sources, folder, dense)
    return record.model_copy(update={"exports": made})


def load(cell: Cell, form: str, sources: Sources, folder: Path, dense: Path) -> OnnxModel:
    """An exported model, for timing."""
    return OnnxModel(folder / form / formats.GRAPH, work.read_own(cell, sources, folder, dense).model.config)


def _export(cell: Cell, form: Export, sources: Sources, folder: Path, dense: Path) -> ExportRecord:
    """One export with its score; why there is none is a result too."""
    try:
        read = work.read_own(cell, sources, folder, dense)
        done = formats.write(read, folder / form, form, overwrite=True)
        found = _score(cell, form, sources, read.model.float().eval(), done.folder / formats.GRAPH)
    except Exception as error:  # one export must not stop the others
        return ExportRecord(message=work.reason(error, folder))
    return ExportRecord(
        megabytes=done.record["megabytes"]["exported"],
        score=found["score"],
        scores=found["scores"],
        versions=done.record["versions"],
    )


def _score(cell: Cell, form: Export, sources: Sources, model: PreTrainedModel, graph: Path) -> dict[str, Any]:
    if cell.task is not None:
        return work.score_on_task(cell, sources, model, OnnxModel(graph, model.config))
    passages = sources.passages(cell.origin)
    with tempfile.TemporaryDirectory() as temporary:
        if model.base_model is not model:  # a head's graph gives no hidden states: its encoder is written for them
            graph = Path(temporary) / formats.GRAPH
            encoder: Any = model.base_model
            formats.write_graph(encoder, graph, form == "onnx-int8")
        ours = quality.encode_exported(OnnxModel(graph, model.config), sources.tokenizer(cell.origin), passages)
    scores = quality.closeness(ours, sources.encoded(cell.origin)[0], passages)
    return {"score": scores[quality.METRIC], "scores": scores}
