"""How near the cosine of two sentence vectors comes to people's judgement. No head, no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from compresskit.model.sentence import Pooling, pooling
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.metrics import METRICS
from compresskit.tasks.predicting import BATCH_SIZE, Progress
from compresskit.tasks.registry import register
from compresskit.tasks.regression import number
from compresskit.tasks.rows import Split, TaskData


@register
class Similarity(TaskKind):
    """Targets are numbers, answers are cosines. A model's head is not used."""

    name = "similarity"
    summary = "how near the cosine of two sentence vectors comes to a number"
    head = None
    inputs = ("sentence", "sentence")

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> float:
        return number(row.get(task.label), f"{where}: column {task.label!r}")

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[float]:
        vectors = sentence_vectors(
            scoring.model,
            scoring.tokenizer,
            [text for pair in split.texts for text in pair],
            scoring.max_length,
            pooling(scoring.folder),
            scoring.batch_size,
            scoring.progress,
        )
        return torch.cosine_similarity(vectors[0::2], vectors[1::2]).tolist()

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[float]) -> dict[str, float]:
        targets, cosines = np.array(split.targets), np.array(answers)
        return {metric: METRICS[metric](targets, cosines, 0) for metric in data.task.metrics}


def sentence_vectors(
    model: PreTrainedModel,
    tokenizer: Any,
    texts: list[str],
    max_length: int,
    pooling: Pooling = "mean",
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> Tensor:
    """(N, H) vectors of texts in float32: of the last layer the mean over the tokens, or the first token (``cls``)."""
    base: Any = model.base_model
    was_training = base.training
    base.eval()
    encoded = tokenizer(texts, truncation=True, max_length=max_length)
    collate: Any = DataCollatorWithPadding(tokenizer)
    order = np.argsort([-len(ids) for ids in encoded["input_ids"]], kind="stable").tolist()
    found: dict[int, Tensor] = {}
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = collate([{name: encoded[name][row] for name in encoded} for row in rows]).to(base.device)
            hidden = base(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            vectors = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
            found |= dict(zip(rows, vectors.cpu(), strict=True))
            if progress is not None:
                progress("encoding", min(start + batch_size, len(order)), len(order))
    base.train(was_training)
    return torch.stack([found[row] for row in range(len(texts))])
