"""How well texts answer a query: a cross-encoder reads both at once, and the texts of each query are ranked."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model.classes import class_names, several_at_once
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.labels import check_order, map_labels
from compresskit.tasks.predictions import Counts, Form, Output, Predictions
from compresskit.tasks.registry import register
from compresskit.tasks.regression import number
from compresskit.tasks.rows import TRAIN, Place, Split, TaskData

#: Of ``mrr@10`` and ``ndcg@10``: how many texts of a query count.
DEPTH = 10
#: What the two classes of a reranker are called, in upper or lower case, where the task declares no labels.
_RELEVANT = ("label_1", "1", "true", "yes", "relevant", "positive")
_IRRELEVANT = ("label_0", "0", "false", "no", "irrelevant", "not_relevant", "not relevant", "negative")


class Relevance(Predictions):
    """A score for each pair of a query and a text: one number, or two classes whose difference is the score.

    Scores are raw logits, in losses and in rankings. A sigmoid is nearly flat for all pairs that a model is sure of, so
    that little of their order would be left to learn.
    """

    forms = ("kl", "mse", "margin")

    def fits(self, model: PreTrainedModel) -> bool:
        """No head says of itself that its number is for ranking: the task's kind does."""
        return False

    def supervised_loss(self, student: Output, mask: Tensor, targets: Mapping[str, Tensor], count: Counts) -> Tensor:
        """Of two classes the cross-entropy, of one number the binary one with a relevance from 0 to 1."""
        logits, labels = student["logits"].float(), targets["labels"]
        if not labels.is_floating_point():
            return super().supervised_loss(student, mask, targets, count)
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.float(), reduction="sum") / count.labels

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
        """``margin``: squared error of the margin between the scores of a relevant text and an irrelevant one to the
        same query (Hofstaetter et al., 2020, arXiv 2010.02666), the mean over pairs; rows 2i and 2i + 1 of the batch
        are a pair. Other forms as everywhere: a head with one number takes ``mse``.
        """
        if form != "margin":
            return super().logits_loss(student, teacher, mask, targets, count, form=form, temperature=temperature)
        ours, theirs = (_scores(output["logits"].float()).view(-1, 2) for output in (student, teacher))
        return (ours[:, 0] - ours[:, 1] - theirs[:, 0] + theirs[:, 1]).square().sum() / (count.sequences / 2)


def _scores(logits: Tensor) -> Tensor:
    """(B, 1) or (B, 2) -> (B,). Which of two classes is the relevant one does not matter to a squared margin."""
    return logits[:, 0] if logits.shape[-1] == 1 else logits[:, 1] - logits[:, 0]


@register
class Ranking(TaskKind):
    """Targets are relevances, answers are scores. Rows with the same query belong together.

    Queries with only relevant texts or only irrelevant ones are left out of the metrics, with a note: no order of their
    texts is better than another.
    """

    name = "ranking"
    summary = "how well a text answers a query, to rank the texts of each query (cross-encoder)"
    head = "sequence-classification"
    metrics = ("map", f"mrr@{DEPTH}", f"ndcg@{DEPTH}")
    predictions = Relevance()
    inputs = ("query", "text")
    takes_labels = True

    def check(self, task: Task) -> None:
        super().check(task)
        if task.labels is not None and sorted(task.labels.values()) != ["0", "1"]:
            raise InputError(
                "labels of kind ranking name the two classes of a head, such as {irrelevant: '0', relevant: '1'}; "
                "without labels a new head gives one number"
            )

    def labels(self, task: Task, rows: Iterable[tuple[Place, Mapping[str, Any]]]) -> tuple[str, ...]:
        return tuple(task.labels or ())

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> float:
        found = number(row.get(task.label), f"{where}: column {task.label!r}")
        if found < 0:
            raise InputError(f"{where}: column {task.label!r}: a relevance must be at least 0, not {found:g}")
        return found

    def groups(self, split: Split) -> Sequence[Hashable]:
        """The query of each row."""
        return [texts[0] for texts in split.texts]

    def pairs(self, split: Split) -> list[int]:
        """Each irrelevant text after a relevant one to the same query. Of the fewer ones each is taken several times,
        so that all have their turn. Queries that have only one sort give no pairs.
        """
        found: list[int] = []
        for rows in self._queries(split).values():
            good = [row for row in rows if split.targets[row] > 0]
            bad = [row for row in rows if split.targets[row] == 0]
            if good and bad:
                for place in range(max(len(good), len(bad))):
                    found += [good[place % len(good)], bad[place % len(bad)]]
        return found

    def head_config(self, labels: Sequence[str]) -> dict[str, Any]:
        if not labels:
            return {"num_labels": 1, "problem_type": None}
        return {
            "num_labels": 2,
            "id2label": dict(enumerate(labels)),
            "label2id": {label: place for place, label in enumerate(labels)},
            "problem_type": "single_label_classification",
        }

    def check_head(self, task: Task, model: PreTrainedModel) -> None:
        super().check_head(task, model)
        several, outputs = several_at_once(model), len(class_names(model.config))
        if several is not None or outputs > 2:
            has = f"predicts {several}" if several is not None else f"has {outputs} classes"
            raise InputError(f"task {task.name} needs a head with one number or two classes; the model {has}")

    def match(self, data: TaskData, model: PreTrainedModel) -> str | None:
        self._relevant(data, model)
        notes = []
        for name, split in data.splits.items():
            if name == TRAIN:
                continue
            queries = list(self._queries(split).values())
            only = [{split.targets[row] > 0 for row in rows} for rows in queries]
            good, bad = only.count({True}), only.count({False})
            if good + bad == len(queries):
                raise InputError(
                    f"data {split.source}: no query has relevant texts (above 0) as well as irrelevant ones (0)"
                )
            if good + bad:
                notes.append(
                    f"{name}: {good + bad} of {len(queries)} queries are left out of the scores: {bad} have no "
                    f"relevant text, {good} no other"
                )
        return "; ".join(notes) or None

    def match_teacher(self, data: TaskData, student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
        ours, theirs = (self._relevant(data, model) for model in (student, teacher))
        if ours is not None and theirs is not None:
            wanted, found = ({"irrelevant": 1 - number, "relevant": number} for number in (ours, theirs))
            check_order(data.task, student, teacher, wanted, found)
        return None

    def class_numbers(self, data: TaskData, model: PreTrainedModel) -> dict[str, int]:
        if self._relevant(data, model) is None:
            raise InputError("class weights: are for heads with classes; this one gives one number")
        if data.labels:
            return map_labels(data.task, data.labels, model).single
        return {name: place for place, name in enumerate(class_names(model.config))}

    def numbered(
        self, data: TaskData, split: Split, columns: Mapping[str, list[Any]], model: PreTrainedModel
    ) -> dict[str, list[Any]]:
        """For two classes their numbers. For one number the relevance as a share of the highest one in ``train``, or of
        1 where that is more.
        """
        relevant = self._relevant(data, model)
        if relevant is not None:
            return {"labels": [relevant if target > 0 else 1 - relevant for target in split.targets]}
        highest = max(1.0, *data.splits.get(TRAIN, split).targets)
        return {"labels": [target / highest for target in split.targets]}

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[float]:
        """The raw number, or the logit of the relevant class less that of the other."""
        relevant = self._relevant(data, scoring.model)
        _, logits = self.logits(scoring, data, split)
        if relevant is None:
            return [float(row[0]) for row in logits["logits"]]
        return [float(row[relevant] - row[1 - relevant]) for row in logits["logits"]]

    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[float]) -> dict[str, float]:
        """The means over the queries that have relevant texts (above 0) as well as irrelevant ones (0)."""
        targets, scores = np.array(split.targets, dtype=float), np.array(answers, dtype=float)
        found = [of_query(targets[rows], scores[rows]) for rows in self._queries(split).values()]
        values = [value for value in found if value is not None]
        return dict(zip(self.metrics, np.mean(values, axis=0).tolist(), strict=True))

    @staticmethod
    def _queries(split: Split) -> dict[str, list[int]]:
        """Query -> its rows."""
        rows: dict[str, list[int]] = {}
        for row, texts in enumerate(split.texts):
            rows.setdefault(texts[0], []).append(row)
        return rows

    @staticmethod
    def _relevant(data: TaskData, model: PreTrainedModel) -> int | None:
        """The number of the relevant class; None of a head with one number. Raises InputError: no name says which."""
        if model.config.num_labels == 1:
            return None
        if data.labels:
            name = next(name for name, value in (data.task.labels or {}).items() if value == "1")
            return map_labels(data.task, data.labels, model).single[name]
        names = [name.casefold() for name in class_names(model.config)]
        for relevant in (1, 0):
            if names[relevant] in _RELEVANT and names[1 - relevant] in _IRRELEVANT:
                return relevant
        first, second = class_names(model.config)
        raise InputError(
            f"task {data.task.name}: which class of the model is the relevant one, {first} or {second}? Say it in the "
            f"declaration: labels: {{{first}: '0', {second}: '1'}}, or the other way round"
        )


def of_query(targets: np.ndarray, scores: np.ndarray) -> tuple[float, float, float] | None:
    """Average precision, reciprocal rank and normalised discounted gain of one query; the last two of :data:`DEPTH`.

    Texts with equal scores count in the worst order, so that a model that does not tell texts apart gains nothing by
    the order of the file. The gain of a text is its relevance, its discount log2(1 + rank), as in trec_eval and
    scikit-learn.

    Args:
        targets: relevance of each text; above 0 is relevant.
        scores: of each text; the highest one is ranked first.

    Returns:
        None where all texts are relevant, or none is.

    Example:
        >>> of_query(np.array([0.0, 1.0, 1.0]), np.array([3.0, 2.0, 1.0]))[:2]
        (0.5833333333333333, 0.5)
    """
    relevant = targets > 0
    if relevant.all() or not relevant.any():
        return None
    order = np.lexsort((targets, -scores))
    gains, hits = targets[order], relevant[order]
    ranks = np.arange(1, len(targets) + 1)
    precision = float((np.cumsum(hits) / ranks)[hits].mean())
    first = int(ranks[hits][0])
    discounts = 1 / np.log2(1 + ranks[:DEPTH])
    best = np.sort(targets)[::-1][:DEPTH]
    gain = float((gains[:DEPTH] * discounts).sum() / (best * discounts).sum())
    return precision, 1 / first if first <= DEPTH else 0.0, gain
