"""Scores of sentence vectors: how near their cosines come to people's judgements. No head, no training."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from compresskit.model.sentence import Pooling
from compresskit.tasks.metrics import METRICS
from compresskit.tasks.task import TaskData
from compresskit.training.evaluation import BATCH_SIZE, Progress


def score_similarity(
    model: PreTrainedModel,
    tokenizer: Any,
    data: TaskData,
    max_length: int,
    *,
    pooling: Pooling = "mean",
    batch_size: int = BATCH_SIZE,
    progress: Progress | None = None,
) -> dict[str, dict[str, float]]:
    """Every metric of a task of kind ``similarity`` on every split, in the model's dtype: ``{split: {metric: score}}``.

    The prediction for two sentences is the cosine of their vectors; a model's head is not used.
    """
    scores = {}
    for name, split in data.splits.items():
        texts = [text for pair in split.texts for text in pair]
        vectors = sentence_vectors(model, tokenizer, texts, max_length, pooling, batch_size, progress)
        cosines = torch.cosine_similarity(vectors[0::2], vectors[1::2]).numpy()
        targets = np.array(split.targets)
        scores[name] = {metric: METRICS[metric](targets, cosines, 0) for metric in data.task.metrics}
    return scores


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
