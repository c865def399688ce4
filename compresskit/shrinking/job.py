"""What is asked of ``shrink``, and the steps that this comes to, by what was measured (docs/results.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compresskit.data.corpus import Corpus, find_corpus
from compresskit.decomposers import AUTO
from compresskit.errors import InputError
from compresskit.exporting.exported import options_of, takes
from compresskit.exporting.format import FORMATS
from compresskit.model import checkpoint as checkpoints
from compresskit.model import identity
from compresskit.model.checkpoint import MODEL_CLASSES, Checkpoint
from compresskit.model.heads import has_head
from compresskit.model.output import EXPORT
from compresskit.model.positions import positions
from compresskit.model.sentence_vectors import unsaid
from compresskit.pipeline import Request
from compresskit.planning.stage import DEFAULTS
from compresskit.shrinking.rows import doubted, found_rows
from compresskit.shrinking.steps import Cut, Distil, Export, FineTune, Step
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.registry import KINDS
from compresskit.tasks.rows import TRAIN, TaskData
from compresskit.training import data as training_data
from compresskit.training.reading import with_new_head
from compresskit.training.settings import with_settings
from compresskit.validation import read_json

#: The pages that choices point to, as a checkout has them.
_SEE, _BY_WORDS = "docs/results.md", "docs/algorithms.md#training"
#: Training rows from which on a task has many, and the fewest of a task that was measured. Measured were 2,490 to
#: 8,551 rows, and 67,349 (results, "Five GLUE tasks").
MANY, FEWEST = 20_000, 2_490
#: Epochs of the teacher and of the student, of a task with few rows and of one with many (the same section).
FEW_ROWS, MANY_ROWS = (5, 4), (3, 1)
#: So many times as many epochs at most, where there are fewer rows than were measured.
MORE = 6
#: Sequences per step of the student: more steps from the same rows ("Students of the teacher at 19x").
BATCH = 8
#: Characters of a text that has 60,000 sentences or so: one with fewer is read more often, in smaller batches, up to so
#: many times ("The budget of a benchmark").
ENOUGH, PASSES, FEW_BATCH = 6_000_000, 10, 16
#: Method that keeps most of sentence vectors ("Sentence vectors on STS-B").
_OF_VECTORS = "low-rank"
#: Heads that answer some task; a model with another one is none yet.
_HEADS = tuple(name for name in MODEL_CLASSES if name not in ("base", "masked-lm"))


@dataclass(frozen=True)
class Schedule:
    """What is to be done.

    Attributes:
        output: folder of the student.
        steps: in their order; the student's distillation comes before its exports.
        choices: what was found and decided, and why, a line each.
        decides: what decides the result, as plain data.
        teacher: the folder or hub id of the teacher; None for the embedded checkpoint.
        data: the task's rows; None for sentence vectors.
        max_length: tokens of a sequence where the task's own are too many for the model.
        notes: what the user should know of the teacher before it is trained from; the choices have them too.
    """

    output: Path
    steps: tuple[Step, ...]
    choices: tuple[str, ...]
    decides: dict[str, Any]
    teacher: str | Path | None
    data: TaskData | None
    max_length: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The working folder: the teacher, the student before it is trained, and the record of all."""
        return working_folder_of(self.output)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that may be asked of :func:`compresskit.shrink`, which says what it means.

    Raises:
        InputError: neither or both of task and text, or of ratio and size; data without a task, an unknown method or
            format, a format whose packages are missing, a runtime that no format takes, outputs that are or hold the
            model, how much to trim without a text for it, epochs that are no passes.
    """

    output: Path
    model: str | Path | None = None
    task: str | Path | None = None
    data: str | Path | None = None
    text: str | Path | None = None
    ratio: float | None = None
    size: str | None = None
    method: str | None = None
    export: Sequence[str] = ()
    runtime: str | None = None
    seed: int = 0
    precision: str | None = None
    epochs: float | None = None
    trim_text: str | Path | None = None
    trim_keep: int | None = None
    trim_coverage: float | None = None

    def __post_init__(self) -> None:
        if (self.task is None) == (self.text is None):
            both = "not both" if self.task is not None else "such as --task sst2 or --text texts.txt.gz"
            raise InputError(f"give a task (what the small model should do) or a text (sentence vectors), {both}")
        if self.text is not None and self.data is not None:
            raise InputError("data belongs to a task; leave it out with a text")
        Request(**self._smaller)  # refuses what needs no model
        if self.epochs is not None:
            with_settings(DEFAULTS["task"], {"epochs": self.epochs})
        if self.trim_text is not None:
            find_corpus(self.trim_text)
        for form in self.export:
            FORMATS.installed(form)
            options_of(FORMATS.get(form), self._options(form))
        if self.runtime is not None and not any(map(self._options, self.export)):
            raise InputError("a runtime is that of an ONNX export: give --export onnx-int8 too")
        if self.model is not None:
            self._check_apart(Path(self.model))

    @property
    def chosen(self) -> str:
        """The method: the one that was asked for, else what kept most of tasks, or of sentence vectors."""
        return self.method or (AUTO if self.text is None else _OF_VECTORS)

    @property
    def _smaller(self) -> dict[str, Any]:
        """What makes the student small, as arguments of :class:`~compresskit.pipeline.Request`."""
        smaller = {"method": self.chosen, "ratio": self.ratio, "size": self.size}
        trimming = {"trim_text": self.trim_text, "trim_keep": self.trim_keep, "trim_coverage": self.trim_coverage}
        return {**smaller, **trimming}

    def _check_apart(self, model: Path) -> None:
        """Refuse outputs that hold the model: --overwrite would remove it before it is read. Raises InputError."""
        if model.resolve() == self.output.resolve():
            raise InputError(f"output {self.output}: is also the model that is read; choose another folder")
        exports = (*self.outputs.values(), *earlier_exports(self.output))
        for folder in (self.output, working_folder_of(self.output), *exports):
            if model.exists() and folder.resolve() in (model.resolve(), *model.resolve().parents):
                raise InputError(f"output {self.output}: {folder} holds the model that is read; choose another folder")

    @property
    def outputs(self) -> dict[str, Path]:
        """Format -> folder of every export."""
        return {form: export_folder(self.output, form) for form in dict.fromkeys(self.export)}

    def schedule(self) -> Schedule:
        """The steps, once model and data are known to allow them.

        Raises:
            InputError: data or a model that cannot be read or do not fit, a ratio or size out of reach.
        """
        return self._of_text() if self.task is None else self._of_task(self.task)

    # -- the two kinds -------------------------------------------------------------------------------------------------

    def _of_task(self, name: str | Path) -> Schedule:
        data = load_data(load_task(name), None if self.data is None else Path(self.data))
        whole, given = self._teacher(data)
        vocabulary = self._checked(whole)
        task, rows, limit = data.task, len(data.splits[TRAIN]), positions(whole.model)
        length = limit if limit is not None and limit < task.max_length else None
        teacher_epochs, usual = _epochs(rows)
        epochs = usual if self.epochs is None else self.epochs
        source = {"task": name, "data": self.data}
        how = {"max_length": length, "precision": self.precision}
        made = working_folder_of(self.output) / "teacher"
        teacher = self.model if given else made
        tuning = FineTune(made, {"model": self.model, **source, "epochs": teacher_epochs, **how}, self.seed)
        steps = self._steps(
            teacher,
            calibration={"calibration_task": name, "data": self.data},
            lesson={**source, "epochs": epochs, "batch_size": BATCH, **how},
        )
        size = f"{rows:,} training rows, {'fewer than' if rows < MANY else 'at least'} {MANY:,}"
        unknown = f"; fewer than {FEWEST:,} were not measured, and take more epochs" * (rows < FEWEST)
        head = f"as it is: its head answers {task.name}"
        no_head = f"fine-tuned for {teacher_epochs} epochs: it has no head for {task.name}; {size}"
        losses = ", ".join(f"{term} {weight:g}" for term, weight in DEFAULTS["task"].losses.items())
        measured = f"{size}{unknown} ({_SEE}#five-glue-tasks-students-of-the-teacher)"
        by_words = f"; word by word, without attention, as vocabularies differ ({_BY_WORDS})"
        says = f"as {task.name} says" if "max_length" in task.model_fields_set else "the default of a task's max_length"
        own = f"{task.max_length} tokens, {says}"
        short = f"{length} tokens, all positions of the model; {task.name} has {task.max_length}"
        notes = self._notes(whole, data, length or task.max_length) if given else ()
        choices = (
            f"data: {found_rows(data)}",
            f"teacher: {whole.origin}, {head if given else no_head}",
            *(f"note: {note}" for note in notes),
            f"start: the teacher, cut down; no stage of general text ({_SEE}#students-of-the-teacher-at-19x)",
            *vocabulary,
            self._method(),
            f"calibration: the training rows of {task.name} ({_SEE}#what-predictions-depend-on)",
            f"losses: {losses}: what is inside of the teacher decides ({_SEE}#what-each-idea-is-worth)"
            f"{by_words if vocabulary else ''}",
            f"batches of {BATCH}: more steps from the same rows ({_SEE}#students-of-the-teacher-at-19x)",
            f"epochs of the student: {epochs:g}: {measured if self.epochs is None else 'as asked'}",
            f"length: {short if length else own}",
        )
        content: dict[str, Any] = {"task": task.model_dump(mode="json", exclude_defaults=True), "rows": data.record()}
        if task.labels is not None:  # equal mappings may have another order
            content["order of the labels"] = list(task.labels)
        steps = steps if given else (tuning, *steps)
        return Schedule(self.output, steps, choices, self._decides(whole, content), teacher, data, length, notes)

    def _of_text(self) -> Schedule:
        corpus = find_corpus(self.text)
        whole = checkpoints.read(self.model)
        vocabulary = self._checked(whole)
        terms = ", ".join(f"{name} {weight:g}" for name, weight in DEFAULTS["sentences"].losses.items())
        note = unsaid(whole.folder)
        by_words = f"; word by word, as vocabularies differ ({_BY_WORDS})"
        passes = _passes(corpus)
        few: dict[str, Any] = {"epochs": passes, "batch_size": FEW_BATCH} if passes > 1 else {}
        how_often = f"epochs: 1, the default of distill --unit ({_SEE}#sentence-vectors-on-sts-b)"
        if few:
            why = f"as the text is short ({_SEE}#the-budget-of-a-benchmark)"
            how_often = f"epochs: {passes}, in batches of {FEW_BATCH}, {why}"
        if self.epochs is not None:
            few["epochs"], how_often = self.epochs, f"epochs: {self.epochs:g}, as asked"
        choices = (
            f"teacher: {whole.origin} as it is{'' if note is None else f'; {note}'}",
            *vocabulary,
            self._method(),
            f"calibration: the text, so that outputs on it are kept ({_SEE}#calibration-least-error-auto)",
            f"losses: {terms}, on each sentence of the text: the defaults of distill --unit "
            f"({_SEE}#sentence-vectors-on-sts-b){by_words if vocabulary else ''}",
            how_often,
        )
        steps = self._steps(
            self.model,
            calibration={"calibration": self.text},
            lesson={"text": self.text, "unit": "sentence", **few, "precision": self.precision},
        )
        return Schedule(self.output, steps, choices, self._decides(whole, {"text": corpus.record()}), self.model, None)

    def _options(self, form: str) -> dict[str, Any]:
        """The export format's options, where they are not its defaults."""
        asked = self.runtime is not None and takes(FORMATS.get(form), "runtime")
        return {"runtime": self.runtime} if asked else {}

    # -- parts --------------------------------------------------------------------------------------------------------

    def _steps(
        self, teacher: str | Path | None, *, calibration: dict[str, Any], lesson: dict[str, Any]
    ) -> tuple[Step, ...]:
        """From the teacher on."""
        cut = working_folder_of(self.output) / "cut"
        return (
            Cut(cut, {"model": teacher, **self._smaller, **calibration}, self.seed),
            Distil(self.output, {"teacher": teacher, "student": cut, **lesson}, self.seed),
            *(
                Export(folder, {"format": form, **self._options(form)}, model=self.output)
                for form, folder in self.outputs.items()
            ),
        )

    def _method(self) -> str:
        if self.text is None:
            best, why = AUTO, f"keeps most, or as much as any ({_SEE}#five-glue-tasks-students-of-the-teacher)"
        else:
            best, why = _OF_VECTORS, f"keeps more than {AUTO} ({_SEE}#sentence-vectors-on-sts-b)"
        return f"method: {best}: {why}" if self.chosen == best else f"method: {self.chosen}: as asked; {best} {why}"

    def _teacher(self, data: TaskData) -> tuple[Checkpoint, bool]:
        """The model in the class that the task needs, and whether its own head answers the task.

        Raises:
            InputError: it has the head of another task, or one for other labels.
        """
        kind = KINDS.get(data.task.kind)
        read = checkpoints.read(self.model)
        if any(has_head(read.model, head) for head in _HEADS):
            training_data.check_head(kind, data.task, read)
            if _trained(read):
                try:
                    kind.match(data, read.model)
                except InputError as error:
                    advice = "`compresskit finetune --new-head` makes a teacher of it"
                    raise InputError(f"model {read.origin}: {error}; {advice}") from None
                return read, True
        whole = with_new_head(self.model, data.task, data.labels)
        if _trained(whole):
            raise InputError(f"model {read.origin}: {read.unused_head}; name its class there, under architectures")
        return whole, False

    @staticmethod
    def _notes(teacher: Checkpoint, data: TaskData, max_length: int) -> tuple[str, ...]:
        """How classes of a given teacher are matched where names do not say it, and whether that seems to be wrong."""
        fit = KINDS.get(data.task.kind).match(data, teacher.model)
        return tuple(note for note in (fit, doubted(teacher, data, max_length)) if note is not None)

    def _checked(self, whole: Checkpoint) -> tuple[str, ...]:
        """Refuse a vocabulary that cannot be trimmed, a ratio or a size before hours of training; what is trimmed, if
        anything is. Raises InputError.
        """
        work = Request(**self._smaller).of(whole)
        work.check_reachable()
        if work.untrimmed is None:
            return ()
        smaller = work.untrimmed.smaller
        rest = "the rest" if self.ratio is None else f"{self.ratio / smaller:.2f}x of {self.ratio:g}x"
        rows = f"{work.untrimmed.rows:,} to {work.untrimmed.rows_left:,} rows, chosen by {work.untrimmed.text}"
        return (f"vocabulary: {rows}: {smaller:.2f}x smaller; {rest} is left to factors",)

    def _decides(self, whole: Checkpoint, content: dict[str, Any]) -> dict[str, Any]:
        asked: dict[str, Any] = {"method": self.chosen}
        asked |= {name: asdict(self)[name] for name in ("ratio", "size", "seed", "precision")}
        if self.trim_text is not None:
            text = find_corpus(self.trim_text).record()
            asked |= {"trim_text": text, "trim_keep": self.trim_keep, "trim_coverage": self.trim_coverage}
        model = {"name": whole.origin, "content": identity.of_checkpoint(whole)}
        if self.runtime is not None:
            asked["runtime"] = self.runtime
        if self.epochs is not None:
            asked["epochs"] = self.epochs
        return {"model": model, **content, **asked, "export": sorted(self.outputs)}


def working_folder_of(output: Path) -> Path:
    """The folder beside ``output`` for what is made on the way."""
    return output.with_name(output.name + ".shrink")


def export_folder(output: Path, form: str) -> Path:
    """The folder beside ``output`` for the small model in another format."""
    return output.with_name(f"{output.name}-{form}")


def earlier_exports(output: Path) -> list[Path]:
    """The exports of the model in ``output`` that lie beside it: beside another model they would pass for that one's.
    Raises InputError: the record of one cannot be read.
    """
    folders = [export_folder(output, form) for form in FORMATS.all()]
    return [folder for folder in folders if (folder / EXPORT).is_file() and _exported_from(folder) == output.name]


def _exported_from(folder: Path) -> Any:
    return read_json(folder / EXPORT, "cannot be read").get("model")


def _trained(checkpoint: Checkpoint) -> bool:
    try:
        training_data.check_trained(checkpoint)
    except InputError:
        return False
    return True


def _passes(corpus: Corpus) -> int:
    """How often a text is read by a student of sentence vectors, so that it sees as much as of a long one."""
    found = 0
    for document in corpus.documents():
        found += len(document)
        if found >= ENOUGH:
            return 1
    return min(PASSES, math.ceil(ENOUGH / found))


def _epochs(rows: int) -> tuple[int, int]:
    """Epochs of the teacher and of the student. Fewer rows than were measured take as many steps, if that is no more
    than :data:`MORE` times as many epochs.
    """
    teacher, student = FEW_ROWS if rows < MANY else MANY_ROWS
    more = min(MORE, max(1, FEWEST / rows))
    return math.ceil(teacher * more), math.ceil(student * more)
