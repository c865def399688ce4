"""The part of a paragraph that answers a question, as in SQuAD."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.errors import InputError, shown
from compresskit.model.heads import has_head
from compresskit.storage.files import Rows
from compresskit.tasks import losses, reports, squad
from compresskit.tasks.answer import Answer, with_score
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.predictions import Counts, Form, Output, Predictions
from compresskit.tasks.registry import register
from compresskit.tasks.rows import Split, TaskData

if TYPE_CHECKING:
    from datasets import Dataset

#: Tokens that two windows of one paragraph share.
STRIDE = 128
#: Tokens of such a window where no declaration says, as in BERT's own training on SQuAD.
WINDOW = 384
_SIDES = ("start", "end")
#: Rows of a report: name -> words of an answer, at most.
_LENGTHS = {"no answer": 0, "1 word": 1, "2 or 3 words": 3, "4 to 7 words": 7, "8 words or more": math.inf}


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
    window = WINDOW
    lost_unit = "tokens of their questions"

    def read(self, task: Task, path: Path) -> tuple[Rows, None]:
        return squad.read_rows(path), None

    def columns(self, task: Task) -> tuple[str, ...]:
        return task.inputs

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> squad.Answers:
        return squad.Answers.of(row, where)

    def windows(self, split: Split, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Overlapping windows of question and context, with ``example`` (row number), ``offsets`` (character span of
        each context token, else None) and ``none`` (place of the token that stands for no answer).
        """
        stride = min(STRIDE, max_length // 3)
        return squad.windows(tokenizer, split.texts, split.targets, max_length, stride)

    def sequences(self, split: Split) -> list[tuple[str, ...]]:
        """None. Raises InputError: which part of a paragraph a window shows is counted in tokens."""
        raise InputError(
            f"kind {self.name}: answers are places among tokens, so a teacher with another vocabulary cannot teach "
            "them: trim the teacher like the student (compresskit trim)"
        )

    def numbered(
        self, data: TaskData, split: Split, columns: Mapping[str, list[Any]], model: PreTrainedModel
    ) -> dict[str, list[Any]]:
        """None beside the windows', which have them. Raises InputError: an answer stands elsewhere."""
        for (question, context), accepted in zip(split.texts, split.targets, strict=True):
            for text, start in list(zip(accepted.texts, accepted.starts, strict=True))[:1]:  # the one that is learnt
                found = context[start : start + len(text)]
                if found.casefold() != text.casefold():
                    raise InputError(
                        f"data {split.source}: the answer {shown(text)} to {shown(question)} does not stand at "
                        f"character {start} of its context, where {shown(found)} is: answer_start counts characters "
                        "(not bytes) from 0 on"
                    )
        return {}

    def cut(self, split: Split, rows: Dataset, max_length: int) -> None:
        """Nothing is cut: long paragraphs are split."""

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[str]:
        return squad.best_answers(
            *self._read(scoring, data, split), split.texts, allow_none=squad.may_lack_answers(split.targets)
        )

    def _read(
        self, scoring: Scoring, data: TaskData, split: Split
    ) -> tuple[list[np.ndarray], list[np.ndarray], dict[str, list[Any]]]:
        """Logits of start and end for every window, and what the windows are of."""
        dataset, logits = self.logits(scoring, data, split)
        columns = {name: dataset[name] for name in ("example", "offsets", "none")}
        return logits["start_logits"], logits["end_logits"], columns

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[str]) -> dict[str, float]:
        return squad.scores(answers, split.targets)

    def report(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[str]) -> reports.Report:
        """The metrics by how many words the shortest accepted answer has."""
        groups: dict[str, list[int]] = {name: [] for name in (*_LENGTHS, "all")}
        for row, accepted in enumerate(split.targets):
            words = min((len(text.split()) for text in accepted.texts), default=0)
            name = next(name for name, most in _LENGTHS.items() if words <= most)
            for group in (name, "all"):
                groups[group].append(row)
        rows: reports.Rows = {}
        for name, places in groups.items():
            if places:
                # Which of the official scripts counts is decided by all questions, not by those of a row.
                given, wanted = [answers[row] for row in places], [split.targets[row] for row in places]
                optional = squad.may_lack_answers(split.targets)
                rows[name] = {**squad.scores(given, wanted, optional=optional), "support": len(places)}
        return reports.Report({"by words of the answer": rows})

    def described(self, scoring: Scoring, data: TaskData, split: Split, most: int) -> list[Answer]:
        """The best span with its characters in the context, and the probability of no answer beside it: whether some
        questions have none, a head does not say.
        """
        unknown = replace(split, targets=[squad.Answers((), ())] * len(split))
        found = []
        for span in squad.best_spans(*self._read(scoring, data, unknown), split.texts):
            told = {"answer": span.text, "start": span.start, "end": span.end, "score": span.probability}
            line = with_score(span.text, span.probability)
            found.append(Answer(f"{line} (no answer {span.no_answer:.3f})", {**told, "no_answer": span.no_answer}))
        return found

    def lost(self, scoring: Scoring, split: Split) -> list[int]:
        """Of long questions; contexts are read whole."""
        return squad.lost_of_questions(scoring.tokenizer, split.texts, scoring.max_length)
