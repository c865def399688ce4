"""How near the similarity of two sentence vectors comes to people's judgement. No head, no training."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from compresskit.errors import InputError, WorkError
from compresskit.model.inputs import fitted
from compresskit.model.kept import mode_kept
from compresskit.model.positions import positions
from compresskit.model.sentence_vectors import SentenceModel, read_sentence_model
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.metrics import OF_NUMBERS
from compresskit.tasks.registry import register
from compresskit.tasks.regression import number
from compresskit.tasks.rows import Split, TaskData

#: Tokens of a text of a model that takes any length.
_NO_LIMIT = 1 << 20


@register
class Similarity(TaskKind):
    """Targets are numbers, answers are cosines (or what the model's folder compares by). A head is not used."""

    name = "similarity"
    summary = "how near the cosine of two sentence vectors comes to a number"
    metrics = tuple(OF_NUMBERS)
    head = None
    inputs = ("sentence", "sentence")

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> float:
        return number(row.get(task.label), f"{where}: column {task.label!r}")

    def length(self, task: Task, model: PreTrainedModel, tokenizer: Any, folder: Path | None) -> int:
        """As sentence-transformers: the folder's ``max_seq_length``, else what tokenizer and configuration say, also
        where positions are relative. What the declaration says counts where it is less.
        """
        said = read_sentence_model(folder).max_length
        limits = [positions(model), *([said] if said else [tokenizer.model_max_length, _configured(model)])]
        limits += [task.max_length] if "max_length" in task.model_fields_set else []
        return int(min([_NO_LIMIT, *(limit for limit in limits if limit is not None)]))

    def dtype(self, model: PreTrainedModel, folder: Path | None) -> torch.dtype:
        """As sentence-transformers: what the model is stored in, unless the folder says otherwise."""
        return read_sentence_model(folder).dtype or model.dtype

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[float]:
        how = read_sentence_model(scoring.folder)
        # In the batches of sentence-transformers, so that sentences that are nearly equal get its last digits too.
        first, second = (sentence_vectors(scoring, how, list(texts)) for texts in zip(*split.texts, strict=True))
        return [float(value) for value in how.likeness(first, second)]

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[float]) -> dict[str, float]:
        targets, found = np.array(split.targets), np.array(answers)
        return {metric: OF_NUMBERS[metric](targets, found, 0) for metric in data.task.metrics}


def _configured(model: PreTrainedModel) -> int | None:
    """Tokens that the configuration names; None where there are none (XLNet has -1)."""
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def sentence_vectors(scoring: Scoring, how: SentenceModel, texts: list[str]) -> Tensor:
    """(N, size) vectors of texts, in float32, as ``how`` makes them of the last hidden states, in the model's dtype.

    Raises:
        InputError: padding would move the positions of tokens.
        WorkError: vectors that are not finite.
    """
    base: Any = scoring.model.base_model
    tokenizer = how.tokenizer(scoring.tokenizer)
    if getattr(tokenizer, "padding_side", "right") == "left" and positions(base) is not None:
        raise InputError(
            f"tokenizer of {scoring.model.config.name_or_path or type(base).__name__}: pads on the left, where "
            f"{type(base).__name__} counts positions: a sentence would get another vector in another batch; set "
            "padding_side to right in its tokenizer_config.json"
        )
    before = how.prompt_tokens(tokenizer, scoring.max_length)
    encoded = tokenizer([how.prompt + text for text in texts], truncation=True, max_length=scoring.max_length)
    taken = inspect.signature(base.forward).parameters
    columns = [name for name in encoded if name in taken]
    collate: Any = DataCollatorWithPadding(tokenizer)
    order = np.argsort([-len(text) for text in texts]).tolist()
    found: dict[int, Tensor] = {}
    with mode_kept(base), torch.inference_mode():
        base.eval()
        for start in range(0, len(order), scoring.batch_size):
            rows = order[start : start + scoring.batch_size]
            batch = collate([{name: encoded[name][row] for name in columns} for row in rows]).to(base.device)
            vectors = how.vectors(base(**fitted(base, batch)).last_hidden_state, batch["attention_mask"], before)
            if not vectors.isfinite().all():
                raise WorkError(f"{type(base).__name__} computes vectors in {base.dtype} that are not finite")
            found |= dict(zip(rows, vectors.cpu(), strict=True))
            if scoring.progress is not None:
                scoring.progress("encoding", min(start + scoring.batch_size, len(order)), len(order))
    return torch.stack([found[row] for row in range(len(texts))])
