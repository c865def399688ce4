"""What a run trains on and how it is scored: a task's rows, a text, or a data set given from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel

from compresskit.data import corpus as corpora
from compresskit.data.units import Units
from compresskit.errors import InputError
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.classes import class_names
from compresskit.model.heads import has_head
from compresskit.model.positions import check_length, positions
from compresskit.model.sentence_vectors import reader_of_text
from compresskit.model.targets import base_prefix
from compresskit.model.tokenizer import one_vocabulary, padding_for
from compresskit.planning.stage import Stage
from compresskit.progress import Progress
from compresskit.tasks.class_weights import class_weights
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.predictions import PLAIN, Predictions
from compresskit.tasks.registry import KINDS, predictions_of
from compresskit.tasks.rows import DEV, TRAIN, Split, TaskData
from compresskit.training.alignment import PairCollator, Texts, pair_columns, paired, teacher_rows
from compresskit.training.batches import MaskingCollator, PaddingCollator, TokenLabelCollator
from compresskit.training.evaluation import Scores, held_out_losses, score
from compresskit.training.projections import of_hidden_states
from compresskit.training.sentences import HELD_OUT as HELD_OUT_TEXTS
from compresskit.training.sentences import METRICS, Encoder, Sentences
from compresskit.training.settings import Options
from compresskit.training.targets import checked_rows, input_columns, numbered
from compresskit.training.terms import compared

#: Sequences of a general text that are held out, to compare the student before and after.
HELD_OUT = 64
#: Tokens per sequence where neither settings nor task say.
DEFAULT_LENGTH = 128
_EIGHT = 8
#: Texts that are counted together to fill a budget.
_TEXTS = 512


@dataclass(frozen=True)
class Models:
    """Who learns from whom.

    Attributes:
        student: the model that is trained.
        teacher: None where labels alone teach.
        tokenizer: of both, or the student's own.
        teacher_tokenizer: the teacher's own, where it has another vocabulary than the student.
    """

    student: Checkpoint
    teacher: Checkpoint | None
    tokenizer: Any
    teacher_tokenizer: Any = None

    @classmethod
    def of_encoders(cls, student: Encoder, teacher: Encoder, stage: Stage) -> Models:
        """Of encoders of sentences, each with its own tokenizer where a loss compares what is inside them and their
        vocabularies differ.
        """
        differ = not one_vocabulary(student.tokenizer, teacher.tokenizer)
        theirs = teacher.tokenizer if compared(stage) and differ else None
        return cls(student.checkpoint, teacher.checkpoint, student.tokenizer, theirs)

    @property
    def padding(self) -> Any:
        """The (student's) tokenizer as the models may be padded."""
        return padding_for(self.student.model, self.tokenizer)

    @property
    def by_words(self) -> bool:
        """Whether each reads texts with a tokenizer of its own (:mod:`compresskit.training.alignment`)."""
        return self.teacher_tokenizer is not None

    @property
    def teacher_padding(self) -> Any:
        """The teacher's own tokenizer as it may be padded."""
        assert self.teacher is not None
        return padding_for(self.teacher.model, self.teacher_tokenizer)

    def reader(self, model: PreTrainedModel) -> Any:
        """The tokenizer of one of the two."""
        is_teacher = self.teacher is not None and model is self.teacher.model
        return self.teacher_tokenizer if self.by_words and is_teacher else self.tokenizer

    def for_text(self) -> Models:
        """The same with the tokenizers that read plain text. Raises InputError: see :func:`reader_of_text`."""
        if self.teacher is None or self.teacher_tokenizer is None:
            return replace(self, tokenizer=reader_of_text(self.teacher or self.student, self.tokenizer))
        theirs = reader_of_text(self.teacher, self.teacher_tokenizer)
        return replace(self, tokenizer=reader_of_text(self.student, self.tokenizer), teacher_tokenizer=theirs)

    def collator(self, own: Any) -> Any:
        """What makes batches of rows, ``own`` being what makes them of the student's columns."""
        return PairCollator(own, self.padding, self.teacher_padding) if self.by_words else own

    def paired(self, rows: Dataset, texts: Texts, max_length: int, source: str) -> tuple[Dataset, str]:
        """The student's rows with the teacher's reading of the same texts, and a note. Raises InputError."""
        of_tokens = has_head(self.student.model, "token-classification")
        readers = self.tokenizer, self.teacher_tokenizer
        found = paired(rows, texts, *readers, max_length, source=source, of_tokens=of_tokens)
        sizes = " and ".join(f"{len(reader):,}" for reader in readers)
        note = f"student and teacher have vocabularies of {sizes} tokens, so they are compared word by word"
        lost = (
            f"{found.left_out:,} of {found.words:,} words of {source} are left out: one of the two does not read them"
        )
        return found.rows, f"{note}; {lost} to their end" if found.left_out else note

    def all(self) -> list[Checkpoint]:
        """The student, and the teacher if there is one."""
        return [self.student] if self.teacher is None else [self.student, self.teacher]


@dataclass(frozen=True)
class TrainingData:
    """Encoded rows with all that a run needs of them.

    Attributes:
        rows: ``input_ids``, ``length`` and the targets.
        collator: makes a padded batch of rows.
        max_length: tokens of the longest sequence there may be.
        record: which data this is, for ``training.json``.
        measure: scores a model; before and after the run.
        sentences: the texts of the rows and their encoders, where sentence vectors are learned.
        primary: the metric of ``measure`` that says how much of the teacher is kept; None: scores are losses.
        notes: what the user should know.
        predictions: what the task's kind says the head predicts; None: what the head says.
        dev: the primary metric of a model on the task's dev rows; None without a task.
        together: so many rows after each other stay in one batch (2: pairs).
        projections: of the student's hidden states to the teacher's width; None where they are equally wide.
    """

    rows: Dataset
    collator: Any
    max_length: int
    record: dict[str, Any]
    measure: Callable[[PreTrainedModel], Scores]
    primary: str | None = None
    notes: tuple[str, ...] = ()
    sentences: Sentences | None = None
    predictions: Predictions | None = None
    dev: Callable[[PreTrainedModel], float] | None = None
    together: int = 1
    projections: nn.ModuleList | None = None

    @property
    def masked(self) -> bool:
        """Whether words are hidden anew in every epoch."""
        return isinstance(self.collator, MaskingCollator)

    @property
    def learned_beside(self) -> dict[str, nn.Module]:
        """What is trained with the student and is no part of it, by the name that checkpoints have for it."""
        sentences = None if self.sentences is None else self.sentences.projection
        found = {"sentence_projection": sentences, "hidden_projections": self.projections or None}
        return {name: module for name, module in found.items() if module is not None}


def from_task(data: TaskData, models: Models, stage: Stage, progress: Progress | None = None) -> TrainingData:
    """The task's ``train`` rows; the score is the task's on the others. Raises InputError."""
    task, kind = data.task, KINDS.get(data.task.kind)
    length = sequence_length(stage.max_length, task, *models.all())
    for checkpoint in reversed(models.all()):
        check_head(kind, task, checkpoint)
    found = [kind.match(data, models.student.model)]
    if models.teacher is not None:
        found.append(kind.match_teacher(data, models.student.model, models.teacher.model))
    pairs = models.teacher is not None and stage.margins
    split = _pairs(kind, data.splits[TRAIN]) if pairs else data.splits[TRAIN]
    rows = kind.encode(data, split, models.tokenizer, length, models.student.model)
    cut = kind.cut(split, rows, length)
    if models.by_words:
        rows, words = models.paired(rows, kind.sequences(split), length, split.source)
        found.append(words)
    dev = replace(data, splits={DEV: data.splits[DEV]})
    collator = kind.collator(models.padding)
    projections, note = _projections(models.student, models.teacher, stage, rows, collator, kind.predictions.targets)
    found.append(note)
    if pairs:
        found.append(f"{len(split) // 2} pairs of a relevant and an irrelevant text are trained on")
    return TrainingData(
        rows=rows,
        collator=models.collator(collator),
        max_length=length,
        record={"task": task.model_dump(mode="json", exclude_defaults=True), "splits": data.record()},
        measure=lambda model: score(
            Scoring(model, models.reader(model), length, progress=progress, numbered_by=models.student.model), data
        ),
        primary=task.primary,
        notes=(*data.notes, *(note for note in (*found, cut) if note)),
        dev=lambda model: score(Scoring(model, models.tokenizer, length, progress=progress), dev)[DEV][task.primary],
        predictions=_weighing(kind, data, rows, stage, models.student.model),
        together=2 if pairs else 1,
        projections=projections,
    )


def _projections(
    student: Checkpoint,
    teacher: Checkpoint | None,
    stage: Stage,
    rows: Dataset,
    collator: Any,
    targets: Sequence[str] = (),
) -> tuple[nn.ModuleList | None, str | None]:
    """Of the student's hidden states to the teacher's width, where they differ; and a note that says so."""
    if teacher is None:
        return None, None
    found = of_hidden_states(student.model, teacher.model, stage, rows, collator, targets)
    if not found:
        return found, None
    ours, theirs = student.model.config.hidden_size, teacher.model.config.hidden_size
    return found, (
        f"hidden states of {ours} numbers are compared with the teacher's of {theirs} through linear maps, which are "
        "learned beside and dropped in the end"
    )


def _weighing(kind: TaskKind, data: TaskData, rows: Dataset, stage: Stage, student: PreTrainedModel) -> Predictions:
    """What the kind predicts, with the stage's class weights. Raises InputError: it has no classes to weigh."""
    if stage.class_weights is None:
        return kind.predictions
    numbers = kind.class_numbers(data, student)
    weights = class_weights(stage.class_weights, rows["labels"][:], numbers, len(class_names(student.config)))
    return kind.predictions.weighing(weights)


def _pairs(kind: TaskKind, split: Split) -> Split:
    """Rows in pairs, each beside the other. Raises InputError: the kind or the rows have none."""
    rows = kind.pairs(split)
    if not rows:
        raise InputError(f"data {split.source}: logits loss margin: no query has relevant and irrelevant texts")
    return split.take(rows, "in pairs")


def from_text(corpus: corpora.Corpus, models: Models, stage: Stage, options: Options) -> TrainingData:
    """Plain text, read no further than the run needs. Raises InputError."""
    length = sequence_length(stage.max_length, None, *models.all())
    limit = options.max_tokens
    if options.max_steps is not None:
        limit = options.max_steps * stage.batch_size * length
    # Some more than is trained on: the held-out part.
    tokens = limit + 2 * HELD_OUT * length if limit else None
    models = models.for_text()
    if not models.by_words:
        rows = corpora.sequences(corpus, models.tokenizer, length, tokens)
        return from_dataset(rows, corpus.record(), models, stage, options)
    texts = [(text,) for text in corpora.windows(corpus, models.tokenizer, length, tokens)]
    read = models.tokenizer([text for (text,) in texts], truncation=True, max_length=length)
    rows = Dataset.from_dict({"input_ids": read["input_ids"]})
    rows, note = models.paired(rows, texts, length, corpus.name)
    return from_dataset(rows, corpus.record(), models, stage, options, (note,))


def from_dataset(
    dataset: Dataset,
    record: dict[str, Any],
    models: Models,
    stage: Stage,
    options: Options,
    notes: tuple[str, ...] = (),
) -> TrainingData:
    """Token sequences; the loss terms on held-out ones are the score. Raises InputError."""
    rows = _checked(dataset, record["source"], models, stage)
    order = np.random.default_rng(0).permutation(len(rows))
    count = min(HELD_OUT, max(1, len(rows) // 10))
    held_out, training = rows.select(order[:count]), rows.select(np.sort(order[count:]))
    collators = [_collator(rows, models, stage, options) for _ in range(2)]  # masks of training move on with the epochs
    targets = predictions_of(models.student.model).targets
    projections, note = _projections(models.student, models.teacher, stage, training, collators[0], targets)

    def measure(model: PreTrainedModel) -> Scores:
        assert models.teacher is not None  # distillation alone trains on a data set
        student, teacher = models.student.model, models.teacher.model
        sequences, collator = held_out, collators[0]
        if models.by_words and model is teacher:
            sequences, collator = teacher_rows(held_out), PaddingCollator(models.teacher_padding)
        own = projections if model is student else None
        return {"held_out": held_out_losses(model, student, teacher, sequences, collator, stage, own)}

    return TrainingData(
        rows=training,
        collator=collators[1],
        max_length=max(rows["length"]),
        record={**record, "sequences": len(training), "held_out": count},
        measure=measure,
        notes=(*notes, note) if note else notes,
        projections=projections,
    )


def from_units(
    units: Units, student: Encoder, teacher: Encoder, stage: Stage, options: Options, progress: Progress | None = None
) -> TrainingData:
    """Texts that get one vector each, no more than the run needs; the score is how near the student's vectors of some
    held-out ones come to the teacher's. Raises InputError.
    """
    count = min(HELD_OUT_TEXTS, max(2, len(units.texts) // 10))
    if len(units.texts) < count + 2:
        raise InputError(f"text {units.record['source']}: {len(units.texts)} texts are too few; four are the least")
    texts = _enough(units.texts[count:], student, stage, options)
    half = options.precision == "bf16"
    models, held_out = Models.of_encoders(student, teacher, stage), units.texts[:count]
    by_words = models.by_words
    sentences = Sentences.of(student, teacher, texts, held_out, stage, half=half, by_words=by_words, progress=progress)
    rows = sentences.rows(units.record["source"])
    cut = sum(length >= student.max_length for length in rows["length"])
    found = [f"{cut} of {len(rows)} texts reach {student.max_length} tokens; what is longer was cut there"] * (cut > 0)
    for which, reader in (("student", student), ("teacher", teacher)):
        if stage.max_length is not None and reader.max_length < stage.max_length:
            found.append(f"max length {stage.max_length}: the {which} reads {reader.max_length}, as its folder says")
    if by_words:
        whole = [(student.how.prompt + text,) for text in texts]
        rows, words = models.paired(rows, whole, student.max_length, units.record["source"])
        found.append(words)
    collator = PaddingCollator(models.padding, pad_to_multiple_of=_multiple(student))
    projections, note = _projections(student.checkpoint, teacher.checkpoint, stage, rows, collator)
    return TrainingData(
        rows=rows,
        collator=models.collator(collator),
        max_length=student.max_length,
        record={**units.record, "sentences": len(texts), "held_out": count, "teacher_max_length": teacher.max_length},
        measure=sentences.measure,
        primary=METRICS[0],
        notes=(*found, *((note,) if note else ())),
        sentences=sentences,
        projections=projections,
    )


def _multiple(student: Encoder) -> int | None:
    """What padded lengths are multiples of; None where a table of positions is too short for that.

    Fewer shapes are faster, padding included, as kernels are made for each one: on a CPU in bf16 a sixth more tokens a
    second, and two thirds of the memory.
    """
    limit = positions(student.checkpoint.model)
    longest = -(-student.max_length // _EIGHT) * _EIGHT
    return _EIGHT if limit is None or longest <= limit else None


def _enough(texts: list[str], student: Encoder, stage: Stage, options: Options) -> list[str]:
    """The first texts that fill the budget: the teacher computes no vector that is not used."""
    if options.max_steps is not None:
        return texts[: options.max_steps * stage.batch_size]
    if options.max_tokens is None:
        return texts
    found = 0
    for start in range(0, len(texts), _TEXTS):
        found += sum(map(len, student.tokens(texts[start : start + _TEXTS], "")["input_ids"]))
        if found >= options.max_tokens:
            return texts[: start + _TEXTS]
    return texts


def check_head(kind: TaskKind, task: Task, checkpoint: Checkpoint) -> None:
    """Refuse a model without the head of the task; where its checkpoint holds one unseen, say so. Raises InputError."""
    try:
        kind.check_head(task, checkpoint.model)
    except InputError as error:
        raise InputError(f"{error} ({checkpoint.unused_head})" if checkpoint.unused_head else str(error)) from None


def check_trained(checkpoint: Checkpoint) -> None:
    """Refuse a head of random numbers, whose score says nothing. Raises InputError naming what the checkpoint lacks."""
    prefix = base_prefix(checkpoint.model)
    lacking = [name for name in checkpoint.untrained if prefix and not name.startswith(prefix)]
    if lacking:
        raise InputError(
            f"model {checkpoint.origin}: lacks {', '.join(lacking)}, so its head would answer at random: "
            "give a fine-tuned one"
        )


def sequence_length(max_length: int | None, task: Task | None, *models: Checkpoint) -> int:
    """Tokens per sequence: as set, else the task's, else :data:`DEFAULT_LENGTH`. Raises InputError if too long."""
    length = max_length or (task.max_length if task is not None else DEFAULT_LENGTH)
    for checkpoint in models:
        check_length(checkpoint.model, length)
    return length


def _checked(dataset: Dataset, source: str, models: Models, stage: Stage) -> Dataset:
    """The columns that are used, with ``length``, once they are known to fit the models."""
    dataset = numbered(checked_rows(dataset, source), models.student.model, source)
    targets = predictions_of(models.student.model).targets
    inputs = input_columns(dataset, models.student.model, models.tokenizer, targets, source)
    pairs = pair_columns(dataset.column_names) if models.by_words else []
    used = ["input_ids", *inputs, *(name for name in targets if name in dataset.column_names), *pairs]
    dataset = dataset.select_columns(used)
    dataset = dataset.add_column("length", [len(ids) for ids in dataset["input_ids"]])
    if len(dataset) < 2:
        raise InputError(f"{source}: {len(dataset)} sequences are too few; two are the least")
    length, longest = max((length, row) for row, length in enumerate(dataset["length"]))
    limit = min(positions(checkpoint.model) or length for checkpoint in models.all())
    if length > limit:
        raise InputError(f"{source}: row {longest} has {length} tokens, the models take {limit}: cut it")
    embedding: Any = models.student.model.get_input_embeddings()
    if (token := max(map(max, dataset["input_ids"]))) >= embedding.num_embeddings:
        raise InputError(f"{source}: token {token} is beyond the vocabulary of {embedding.num_embeddings}")
    if stage.max_length is not None and length > stage.max_length:
        raise InputError(f"{source}: holds {length} tokens in a row, max length is {stage.max_length}")
    return dataset


def _collator(dataset: Dataset, models: Models, stage: Stage, options: Options) -> Any:
    """Masks words where the class predicts them and the data has no labels; pads labels of tokens."""
    predictions, names = predictions_of(models.student.model), models.tokenizer.model_input_names
    collator: Any = PaddingCollator(models.padding)
    if models.by_words:  # words cannot be masked alike in two vocabularies
        return models.collator(collator)
    if "labels" not in dataset.column_names:
        if type(models.student.model).__name__.endswith("ForMaskedLM"):
            if models.tokenizer.mask_token is None:
                name = type(models.tokenizer).__name__
                raise InputError(f"tokenizer {name}: has no mask token to hide words with; name one (mask_token)")
            collator = MaskingCollator(models.padding, stage.mask_probability, options.seed)
    elif isinstance(dataset[0]["labels"], list) and predictions is PLAIN:
        collator = TokenLabelCollator(models.padding)
    others = {"length", *names, *predictions.targets}
    collator.columns = tuple(name for name in dataset.column_names if name not in others)
    return collator
