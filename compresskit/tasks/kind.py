"""What a task kind owes: how rows become examples, which head answers them, and how answers are scored.

One file per kind, registered under the name that a declaration's ``kind`` gives. Reading, fine-tuning, distillation,
calibration, evaluation and the benchmark then work for it without a change elsewhere.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import DataCollatorWithPadding, PreTrainedModel

from compresskit.errors import InputError, no_panic, unknown
from compresskit.model.heads import has_head
from compresskit.model.tokenizer import padding_for
from compresskit.progress import Progress
from compresskit.storage import files
from compresskit.storage.files import Rows
from compresskit.tasks import reports
from compresskit.tasks.answer import Answer
from compresskit.tasks.declaration import Task
from compresskit.tasks.label_column import check_declared
from compresskit.tasks.predicting import BATCH_SIZE, Logits, Runnable, predict
from compresskit.tasks.predictions import PLAIN, Predictions
from compresskit.tasks.rows import Place, Split, Table, TaskData, placed

if TYPE_CHECKING:
    from datasets import Dataset


#: After so many refused rows of a file the others are not read.
_MOST_REFUSED = 100
#: Where an error begins to say what is allowed, and what to do.
_HINT = re.compile(r": (?:did you mean|known:|fill) |; ")


@dataclass(frozen=True)
class Scoring:
    """How a model is scored.

    Attributes:
        model: what the outputs mean is read from it; it computes them too, unless ``run`` does.
        tokenizer: the model's own.
        max_length: tokens of a sequence.
        batch_size: sequences at a time.
        progress: called with (what, done, total).
        run: computes the outputs in the place of ``model``, such as an exported graph.
        folder: where the model was read from; None for one given as an object.
        numbered_by: whose class numbers count in metrics of one class, where the task declares no labels, so that
            teacher and student are measured by the same class. Default: ``model``.
        documents: the model that embeds the documents, where the kind has some and another one does it.
        notes: what the user should know of the scores is added here.
    """

    model: PreTrainedModel
    tokenizer: Any
    max_length: int
    batch_size: int = BATCH_SIZE
    progress: Progress | None = None
    run: Runnable | None = None
    folder: Path | None = None
    numbered_by: PreTrainedModel | None = None
    documents: Scoring | None = None
    notes: list[str] = field(default_factory=list)


class TaskKind(ABC):
    """A kind of task. One subclass, one file; registered under ``name``.

    Attributes:
        name: what a declaration's ``kind`` says.
        summary: one line for readers.
        head: key of :data:`compresskit.model.checkpoint.MODEL_CLASSES`, the class that answers it; None where a task of
            this kind needs no head. Then nothing can be trained on it.
        metrics: the names of the metrics that a declaration may list.
        predictions: what the head predicts and how it is learnt. Default: one tensor of logits.
        inputs: names of the two inputs where there must be two; empty: one or two are fine.
        takes_labels: whether a declaration may list labels.
        takes_threshold: whether a declaration may say from which probability on a label counts.
        tables: the further tables that a declaration may name: all of them or none.
        has_documents: whether a second model may embed the documents (:attr:`Scoring.documents`).
        window: tokens of the windows that ``predict`` reads long texts in; None where it cuts them.
        lost_unit: what :meth:`lost` counts.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    head: ClassVar[str | None]
    metrics: ClassVar[tuple[str, ...]]
    predictions: ClassVar[Predictions] = PLAIN
    inputs: ClassVar[tuple[str, ...]] = ()
    takes_labels: ClassVar[bool] = False
    takes_threshold: ClassVar[bool] = False
    tables: ClassVar[tuple[str, ...]] = ()
    has_documents: ClassVar[bool] = False
    window: ClassVar[int | None] = None
    lost_unit: ClassVar[str] = "tokens"

    # -- the declaration ----------------------------------------------------------------------------------------------

    def check(self, task: Task) -> None:
        """Refuse a declaration that does not fit the kind.

        Raises:
            InputError: a metric that the kind does not have, labels or a threshold where it has none, a wrong number of
                inputs, tables that it does not read.
        """
        for metric in task.metrics:
            if metric not in self.metrics:
                raise unknown("metric", metric, self.metrics)
        if task.labels is not None:
            if not self.takes_labels:
                raise InputError(f"labels are for kinds with classes, such as classification, not for {self.name}")
            check_declared(task.labels)
        if task.threshold is not None and not self.takes_threshold:
            raise InputError(
                f"threshold is for kinds with several labels for a text (multi-label), not for {self.name}"
            )
        for what, names in (("inputs and label", (*task.inputs, task.label)), ("columns", task.columns or ())):
            if twice := [name for name in names if names.count(name) > 1]:
                raise InputError(f"{what}: {twice[0]!r} comes twice")
        if self.inputs and len(task.inputs) != len(self.inputs):
            raise InputError(f"kind {self.name} takes {len(self.inputs)} inputs: {' and '.join(self.inputs)}")
        if task.tables and task.tables.keys() != set(self.tables):
            takes = f"takes {' and '.join(self.tables)}, or none" if self.tables else "takes none"
            raise InputError(f"tables: {', '.join(task.tables)}; kind {self.name} {takes}")
        if task.hub is not None and task.hub.tables.keys() != task.tables.keys():
            raise InputError("hub.tables must name the same tables as tables")

    # -- from files to examples ---------------------------------------------------------------------------------------

    def read(self, task: Task, path: Path) -> tuple[Rows, str | None]:
        """The rows of a file as dictionaries, and a note on what is not as it stands there. Default: a table or JSON
        lines.
        """
        skip = task.bad_lines == "skip"
        rows, skipped = files.read_rows(path, task.columns, self.columns(task), skip_bad_lines=skip)
        notes = [f"{skipped} lines with the wrong number of fields were skipped"] if skipped else []
        if path.name.removesuffix(".gz").endswith((".tsv", ".txt")):
            quoted = sum(files.quoted(row, task.inputs) for row in rows if set(task.inputs) <= set(row))
            marks = (
                f"{quoted} rows have texts in quotation marks, which stay: tables with tabs are read without quoting"
            )
            notes += [marks] if quoted else []
        return rows, "; ".join(notes) or None

    def from_hub(self, task: Task, rows: Rows) -> Rows:
        """Rows of the hub's data set, with our names of columns, as a file would give them. Default: as they are."""
        return rows

    def columns(self, task: Task) -> tuple[str, ...]:
        """The columns that every file must have. Default: inputs and label."""
        return (*task.inputs, task.label)

    def labels(self, task: Task, rows: Iterable[tuple[Place, Mapping[str, Any]]]) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers, declared or found in ``rows``. Default: none.

        Raises:
            InputError: what is found cannot be told apart.
        """
        return ()

    def example(self, task: Task, row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
        """The inputs of a row; ``where`` names it in errors. Default: texts. Raises InputError."""
        for column in task.inputs:
            if not isinstance(row.get(column), str):
                raise InputError(f"{where}: column {column!r} holds no text: {row.get(column)!r}")
        return tuple(row[column] for column in task.inputs)

    def split(
        self, task: Task, rows: Rows, about: Split, labels: Mapping[str, str], tables: Mapping[str, Table]
    ) -> tuple[Split, tuple[str, ...]]:
        """The rows of a split as examples and targets, and notes for the user. Default: one of each for every row.

        Args:
            about: the split without rows: its source, hash and remark.
            labels: a label's value in the files -> its name; empty where the task has no labels.
            tables: the further tables that the declaration names.

        Raises:
            InputError: rows that cannot be read; the first three of them are shown.
        """
        texts, targets = [], []
        refused: list[tuple[Place, InputError]] = []
        for place, row in placed(rows, about.source):
            try:
                texts.append(self.example(task, row, str(place)))
                targets.append(self.target(task, row, str(place), labels))
            except InputError as error:
                refused.append((place, error))
                if len(refused) > _MOST_REFUSED:
                    break
        if refused:
            raise _refused(refused)
        found = replace(about, texts=texts, targets=targets)
        return found, empty_note(
            about.source, [text for row in texts for text in row if isinstance(text, str)], "texts"
        )

    @abstractmethod
    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> Any:
        """What is to be predicted for a row.

        Args:
            where: names the row in errors.
            labels: a label's value in the files -> its name; empty where the task has no labels.

        Raises:
            InputError: the row has no such value.
        """

    def groups(self, split: Split) -> Sequence[Hashable]:
        """Which rows belong together, by equal values: where some of ``train`` are held out, whole groups are. Default:
        each row is a group.
        """
        return range(len(split))

    def pairs(self, split: Split) -> list[int]:
        """Numbers of rows, two by two, whose difference the logits loss ``margin`` compares with the teacher's. A row
        may stand in several pairs.

        Raises:
            InputError: the kind has no pairs (default).
        """
        raise InputError(f"logits loss margin: is for kind ranking, whose rows make pairs, not for {self.name}")

    # -- models -------------------------------------------------------------------------------------------------------

    def head_config(self, labels: Sequence[str]) -> dict[str, Any]:
        """Configuration of a new head for tasks with these labels. Default: nothing special."""
        return {}

    def check_head(self, task: Task, model: PreTrainedModel) -> None:
        """Refuse a model with another kind of head.

        Raises:
            InputError: says which head the model has and which the task needs.
        """
        if self.head is not None and not has_head(model, self.head):
            name = type(model).__name__
            has = "no head" if model.base_model is model else "another head"
            what = self.head.replace("-", " ")
            raise InputError(f"task {task.name} needs a model for {what}; {name} has {has}: give a fine-tuned one")

    def match(self, data: TaskData, model: PreTrainedModel) -> str | None:
        """Refuse a model whose head does not fit the task's labels; a note where names alone did not say how they fit.
        Default: every head of the kind fits.
        """
        return None

    def match_teacher(self, data: TaskData, student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
        """Refuse a teacher whose classes cannot be told from the student's; a note as of :meth:`match`. Default: every
        teacher with the student's head fits.
        """
        return None

    def length(self, task: Task, model: PreTrainedModel, tokenizer: Any, folder: Path | None) -> int:
        """Tokens of a sequence where the user does not say, for a model from ``folder``. Default: as declared."""
        return task.max_length

    def dtype(self, model: PreTrainedModel, folder: Path | None) -> torch.dtype:
        """What a model from ``folder`` computes in where it is scored by itself. Default: float32."""
        return torch.float32

    def note(self, folder: Path | None) -> str | None:
        """What to tell the user of how a model from ``folder`` is scored. Default: nothing."""
        return None

    # -- sequences ----------------------------------------------------------------------------------------------------

    def encode(
        self, data: TaskData, split: Split, tokenizer: Any, max_length: int, model: PreTrainedModel | None = None
    ) -> Dataset:
        """The split as a data set of token sequences.

        Columns: the tokenizer's (without ``attention_mask``, which the collator makes), ``length`` and, with
        ``model``, the targets of :attr:`predictions` as the head of this model numbers them.
        """
        from datasets import Dataset

        with no_panic(f"data {split.source}, cut into tokens"):
            columns = self.windows(split, tokenizer, max_length)
        if model is not None:
            columns |= self.numbered(data, split, columns, model)
        columns.pop("attention_mask", None)
        columns["length"] = [len(ids) for ids in columns["input_ids"]]
        return Dataset.from_dict(columns)

    def windows(self, split: Split, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """The inputs of the split as columns of token sequences. Default: one sequence a row, cut at the end."""
        encoded = tokenizer(
            *(list(column) for column in zip(*split.texts, strict=True)), truncation=True, max_length=max_length
        )
        return {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}

    def sequences(self, split: Split) -> list[tuple[str, ...]]:
        """The text, or the two, that each sequence of :meth:`windows` is made of: a teacher with a vocabulary of its
        own reads them too. Default: the inputs as they are.

        Raises:
            InputError: sequences are not whole texts.
        """
        return list(split.texts)

    def numbered(
        self, data: TaskData, split: Split, columns: Mapping[str, list[Any]], model: PreTrainedModel
    ) -> dict[str, list[Any]]:
        """The columns of targets for training, beside those of :meth:`windows`. Default: the targets as they are."""
        return {"labels": list(split.targets)}

    def cut(self, split: Split, rows: Dataset, max_length: int) -> str | None:
        """A note on what sequences of ``max_length`` cut off; None where nothing is.

        Args:
            split: what was encoded.
            rows: the result of :meth:`encode`.
            max_length: tokens.
        """
        cut = sum(size >= max_length for size in rows["length"])
        what = f"{cut} of {len(rows)} texts of {split.source} reach {max_length} tokens; what is longer was cut there"
        return what if cut else None

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        """Makes a batch of rows of :meth:`encode`, padded as ``tokenizer`` says. Default: its columns."""
        collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]] = DataCollatorWithPadding(tokenizer)
        return collate

    def class_numbers(self, data: TaskData, model: PreTrainedModel) -> Mapping[str, int]:
        """The classes of the model by their names, where each text or token has one of them, for class weights.

        Raises:
            InputError: the kind has no such classes (default).
        """
        raise InputError(f"class weights: are for kinds with one class for a text or word, not for {self.name}")

    # -- scores -------------------------------------------------------------------------------------------------------

    def score(self, scoring: Scoring, data: TaskData, split: Split) -> dict[str, float]:
        """Every metric of the task on one split, as fractions.

        Raises:
            InputError: the model's head or its labels do not fit the task.
        """
        self.check_head(data.task, scoring.model)
        return self._score_of(scoring, data, split, self.answers(scoring, data, split))

    def reported(self, scoring: Scoring, data: TaskData, split: Split) -> tuple[dict[str, float], reports.Report]:
        """:meth:`score`, and the same in parts (:meth:`report`). Raises InputError as it does."""
        self.check_head(data.task, scoring.model)
        answers = self.answers(scoring, data, split)
        return self._score_of(scoring, data, split, answers), self.report(scoring, data, split, answers)

    def _score_of(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Any]) -> dict[str, float]:
        found = self.measure(scoring, data, split, answers)
        return {metric: found[metric] for metric in data.task.metrics}

    @abstractmethod
    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> Sequence[Any]:
        """What the model says of each row of the split, in the form of the targets; mostly from :meth:`logits`."""

    def logits(self, scoring: Scoring, data: TaskData, split: Split) -> tuple[Dataset, Logits]:
        """The encoded split, and the model's logits for every row of it; a note on what was cut off."""
        dataset = self.encode(data, split, scoring.tokenizer, scoring.max_length)
        if (note := self.cut(split, dataset, scoring.max_length)) is not None:
            scoring.notes.append(note)
        run, padding = scoring.run or scoring.model, padding_for(scoring.model, scoring.tokenizer)
        return dataset, predict(run, padding, dataset, scoring.batch_size, scoring.progress)

    @abstractmethod
    def measure(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Any]) -> Mapping[str, float]:
        """The metrics of these answers to the split: at least those that the task names."""

    def report(self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Any]) -> reports.Report:
        """The scores of these answers in parts, for ``evaluate --report``. Default: by class where targets and answers
        are names, by size where they are numbers, else nothing.
        """
        return reports.of_anything(split.targets, answers)

    # -- answers for people -------------------------------------------------------------------------------------------

    def asked(self, task: Task, row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
        """The inputs of a row that ``predict`` is asked about, as texts mostly. Default: :meth:`example`."""
        return self.example(task, row, where)

    def labels_of(self, task: Task, model: PreTrainedModel) -> tuple[str, ...]:
        """The labels, where there are no rows to find them in. Default: those declared."""
        return tuple(task.labels or ())

    def described(self, scoring: Scoring, data: TaskData, split: Split, most: int) -> list[Answer]:
        """What the model says of each row, as ``predict`` shows it. Default: :meth:`answers` as they are.

        Args:
            scoring: the model.
            data: the task, with the labels of :meth:`labels_of`.
            split: what is asked; its targets are None.
            most: at most so many classes, or texts that were found, are told of a row.
        """
        return [Answer.of(answer) for answer in self.answers(scoring, data, split)]

    def lost(self, scoring: Scoring, split: Split) -> list[int]:
        """Of each row how many tokens (:attr:`lost_unit`) are not read. Default: what :meth:`windows` cuts off."""
        columns = (list(column) for column in zip(*split.texts, strict=True))
        read = scoring.tokenizer(*columns, verbose=False)["input_ids"]
        return [max(0, len(ids) - scoring.max_length) for ids in read]


def _refused(rows: Sequence[tuple[Place, InputError]]) -> InputError:
    """The error of the first of some refused rows, with what the next two hold, and how many they are."""
    (_, first), *others = rows
    if not others:
        return first
    # What a row holds stands in front of what is allowed and what to do, which the first error says.
    says = [_HINT.split(str(error).removeprefix(str(place)).lstrip(":, "))[0] for place, error in others]
    shown = "; ".join(f"row {place.row}: {said}" for (place, _), said in zip(others[:2], says, strict=False))
    count = len(others) if len(rows) <= _MOST_REFUSED else f"at least {_MOST_REFUSED}"
    return InputError(f"{first} ({count} more refused: {shown}{'; ...' if len(others) > 2 else ''})")


def empty_note(source: str, texts: Sequence[str], what: str) -> tuple[str, ...]:
    """A note on texts without a character, which are read like others (as in sentence-transformers)."""
    empty = sum(not text.strip() for text in texts)
    return (f"data {source}: {empty} of {len(texts)} {what} are empty; they are taken as they are",) if empty else ()
