"""The part of a paragraph that answers a question, as in SQuAD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.model.heads import has_head
from compresskit.storage.files import Rows
from compresskit.tasks import losses, squad
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.predictions import Counts, Form, Output, Predictions
from compresskit.tasks.registry import register
from compresskit.tasks.rows import Split, TaskData

#: Tokens that two windows of one paragraph share.
STRIDE = 128
_SIDES = ("start", "end")


class SpanPredictions(Predictions):
    """Two distributions over the tokens of a sequence: where an answer starts, and where it ends."""

    targets = ("start_positions", "end_positions")
    outputs = ("start_logits", "end_logits")

    def fits(self, model: PreTrainedModel) -> bool:
        return has_head(model, "question-answering")

    def over_tokens(self, logits: Tensor) -> bool:
        return True

    def count(self, batch: Mapping[str, Tensor]) -> int:
        return 2 * len(batch["start_positions"]) if "start_positions" in batch else 0

    def supervised_loss(self, student: Output, mask: Tensor, targets: Mapping[str, Tensor], count: Counts) -> Tensor:
        terms = []
        for side in _SIDES:
            logits = student[f"{side}_logits"].float().masked_fill(~mask.bool(), torch.finfo(torch.float32).min)
            terms.append(losses.supervised_loss(logits, targets[f"{side}_positions"], count.labels))
        return torch.stack(terms).sum()

    def logits_loss(
        self,
        student: Output,
        teacher: Output,
        mask: Tensor,
        targets: Mapping[str, Tensor],
        count: Counts,
        *,
        form: Form,
        temperature: float,
    ) -> Tensor:
        terms = []
        for name in self.outputs:
            closed = torch.where(mask.bool(), teacher[name].float(), -torch.inf)
            number = 2 * count.sequences
            terms.append(losses.logits_loss(student[name], closed, number, form=form, temperature=temperature))
        return torch.stack(terms).sum()

    def distributions(self, outputs: Output, mask: Tensor) -> list[Tensor]:
        return [outputs[name].masked_fill(~mask, -1e9) for name in self.outputs]


@register
class Spans(TaskKind):
    """Targets are :class:`~compresskit.tasks.squad.Answers`, answers of a model are texts."""

    name = "spans"
    summary = "the part of a paragraph that answers a question (SQuAD's JSON)"
    head = "question-answering"
    metrics = ("span_f1", "exact_match")
    predictions = SpanPredictions()
    inputs = ("question", "context")

    def read(self, task: Task, path: Path) -> tuple[Rows, None]:
        return squad.read_rows(path), None

    def columns(self, task: Task) -> tuple[str, ...]:
        return task.inputs

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> squad.Answers:
        return squad.Answers.of(row, where)

    def windows(self, split: Split, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Overlapping windows of question and context, with ``example`` (row number) and ``offsets`` (character span of
        each context token, else None).
        """
        stride = min(STRIDE, max_length // 3)
        return squad.windows(tokenizer, split.texts, split.targets, max_length, stride)

    def numbered(
        self, data: TaskData, split: Split, columns: Mapping[str, list[Any]], model: PreTrainedModel
    ) -> dict[str, list[Any]]:
        return {}  # the windows have them

    def cut(self, split: Split, rows: Dataset, max_length: int) -> None:
        """Nothing is cut: long paragraphs are split."""

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[str]:
        dataset, logits = self.logits(scoring, data, split)
        columns = {name: dataset[name] for name in ("example", "offsets")}
        allow_none = squad.may_lack_answers(split.targets)
        starts, ends = logits["start_logits"], logits["end_logits"]
        return squad.best_answers(starts, ends, columns, split.texts, allow_none=allow_none)

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[str]) -> dict[str, float]:
        return squad.scores(answers, split.targets)
