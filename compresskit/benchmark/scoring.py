"""Scores of a cell's model: on its task, or against the dense one without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compresskit.benchmark import quality
from compresskit.benchmark.quality import Encoded, Passages
from compresskit.benchmark.records import WITH_DENSE
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.shared import Shared
from compresskit.scores import mean_over_splits
from compresskit.tasks.kind import Scoring
from compresskit.tasks.predicting import Runnable
from compresskit.tasks.registry import KINDS
from compresskit.training.data import sequence_length
from compresskit.training.evaluation import score


def trained_length(cell: Cell, shared: Shared) -> int:
    """Tokens of a sequence of a task that models are fine-tuned on."""
    assert cell.task is not None
    return sequence_length(shared.grid.of(cell.task).stage("task")["max_length"], shared.task(cell.task)[0])


def on_task(
    cell: Cell,
    shared: Shared,
    model: PreTrainedModel,
    run: Runnable | None = None,
    *,
    tokenizer: Any = None,
    folder: Path | None = None,
    asymmetric: bool = True,
    numbered_by: PreTrainedModel | None = None,
) -> dict[str, Any]:
    """Metric, score (its mean over the splits) and every metric of a model on the cell's task; of a retrieval also
    those where the dense model embeds the documents.

    Args:
        run: computes in the model's place, e.g. ONNX Runtime.
        tokenizer: of the model, where it is not the dense model's.
        folder: of the model, which says how vectors of texts are made.
        asymmetric: False leaves out the scores with the dense model's documents.
        numbered_by: the dense model, where the order of the model's classes may be another one, as of :class:`Scoring`.
    """
    assert cell.task is not None
    task, data = shared.task(cell.task)
    words = tokenizer or shared.tokenizer(cell.origin)
    kind = KINDS.get(task.kind)
    length = trained_length(cell, shared) if cell.tuned else kind.length(task, model, words, folder)
    scoring = Scoring(model, words, length, run=run, folder=folder, numbered_by=numbered_by)
    found = score(scoring, data)
    scores: dict[str, Any] = dict(found)
    # Vectors of another tokenizer's model lie in another space.
    if asymmetric and kind.has_documents and tokenizer is None and not cell.is_teacher:
        scores[WITH_DENSE] = score(replace(scoring, documents=_dense(cell, shared, model.device)), data)
    return {"metric": task.primary, "score": mean_over_splits(found, task.primary), "scores": scores}


def _dense(cell: Cell, shared: Shared, device: Any) -> Scoring:
    """The dense model, to embed documents."""
    assert cell.task is not None
    task, read = shared.task(cell.task)[0], shared.read_dense(cell.origin)
    words, model = shared.tokenizer(cell.origin), read.model.float().eval()
    moved: Any = model
    length = KINDS.get(task.kind).length(task, model, words, read.folder)
    return Scoring(moved.to(device), words, length, folder=read.folder)


def without_labels(cell: Cell, shared: Shared, encode: Callable[[Passages], Encoded]) -> dict[str, Any]:
    """The same of what a model, by ``encode``, makes of the held-out passages."""
    passages = shared.passages(cell.origin)
    ours, (teacher, _) = encode(passages), shared.encoded(cell.origin)
    others = None
    if ours.last.shape != teacher.last.shape:
        seen = shared.passages(cell.origin, "training")
        others = encode(seen), shared.encoded(cell.origin, "training")[0]
    of_vectors = bool(shared.grid.unit)
    scores = quality.closeness(ours, teacher, passages, others, of_vectors=of_vectors)
    metric = quality.OF_VECTORS if of_vectors else quality.METRIC
    return {"metric": metric, "score": scores[metric], "scores": dict(scores)}
