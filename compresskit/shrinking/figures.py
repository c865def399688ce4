"""The closing figures of a shrinking: teacher, student and exports side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compresskit.benchmark import latency
from compresskit.errors import WorkError
from compresskit.exporting.format import FORMATS
from compresskit.folders.training import StageRecord, last_stage
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint, weight_files
from compresskit.model.sentence_vectors import bytes_behind, numbers_behind
from compresskit.model.targets import count_parameters
from compresskit.model.tokenizer import find_tokenizer
from compresskit.progress import Progress
from compresskit.scores import kept_over_splits, mean_over_splits
from compresskit.shrinking.job import Schedule
from compresskit.shrinking.steps import Export
from compresskit.tasks.kind import Scoring
from compresskit.tasks.predicting import Runnable
from compresskit.training.evaluation import Scores, score
from compresskit.training.sentences import METRICS

#: How often every model is timed; the figures are medians.
ROUNDS = 5
TEACHER, STUDENT = "teacher", "student"


@dataclass(frozen=True)
class Figures:
    """One model. What is not known is None.

    Attributes:
        name: ``teacher``, ``student`` or the format of an export.
        score: in ``metric``, a fraction; the mean over the splits.
        kept: of the teacher's score.
        parameters: of the model; of exports None, they have the student's.
        megabytes: of the weight files, 10^6 bytes.
        milliseconds: of one full sequence on the CPU, median; all models were timed in turns.
        speedup: against the teacher, the median of the rounds' own ratios.
    """

    name: str
    score: float | None = None
    kept: float | None = None
    parameters: int | None = None
    megabytes: float | None = None
    milliseconds: float | None = None
    speedup: float | None = None


def figures(schedule: Schedule, progress: Progress) -> dict[str, Any]:
    """Metric, how many rows of which split it is of, tokens and threads of the timing, and a row for each model, as
    plain data.

    Raises:
        InputError, WorkError: a folder that was made on the way is not there any more.
    """
    teacher, student = checkpoints.read(schedule.teacher), checkpoints.read(schedule.output, compressed=True)
    exports = {step.settings["format"]: step.output for step in schedule.steps if isinstance(step, Export)}
    running = {form: run for form, folder in exports.items() if (run := FORMATS.get(form).load(folder)) is not None}
    models: dict[str, Runnable] = {TEACHER: _ready(teacher), STUDENT: _ready(student), **running}
    stage = last_stage(schedule.output)
    if stage is None:
        raise WorkError(f"{schedule.output}: has no record of a training; --overwrite makes it again")
    metric, scores = _scores(schedule, stage, student, running, progress)
    dense = dict.fromkeys(models, TEACHER)
    times = latency.time_models(models, dense, "shrink", ROUNDS, progress)
    rows = []
    for name in (TEACHER, STUDENT, *exports):
        found = scores.get(name)
        timed = times[name].batches["1"] if name in times else None
        read = {TEACHER: teacher, STUDENT: student}.get(name)
        row = Figures(
            name=name,
            score=None if found is None else mean_over_splits(found, metric),
            kept=None if found is None else kept_over_splits(found, scores[TEACHER], metric),
            parameters=None if read is None else count_parameters(read.model) + numbers_behind(read.folder),
            megabytes=_bytes(name, read or student, exports) / 1e6,
            milliseconds=None if timed is None else timed.milliseconds,
            speedup=None if timed is None else timed.speedup,
        )
        rows.append(asdict(row))
    first = times[STUDENT]
    splits = {} if schedule.data is None else schedule.data.splits
    scored = {name: len(splits[name]) if name in splits else stage.data.held_out for name in scores[STUDENT]}
    timing = {"tokens": first.tokens, "threads": first.threads}
    return {"metric": metric, "scored": scored, **timing, "rows": rows}


def _ready(read: Checkpoint) -> PreTrainedModel:
    return read.model.float().eval()


def _bytes(name: str, read: Checkpoint, exports: dict[str, Path]) -> int:
    """Of the files of a model, and of layers behind its encoder; an export has those of its checkpoint ``read``."""
    if name in exports:
        files = FORMATS.get(name).weight_files(exports[name])
    else:
        files = [] if read.folder is None else weight_files(read.folder)
    return sum(file.stat().st_size for file in files) + bytes_behind(read.folder)


def _scores(
    schedule: Schedule, stage: StageRecord, student: Checkpoint, running: dict[str, Runnable], progress: Progress
) -> tuple[str, dict[str, Scores]]:
    """The metric that counts, and the scores of teacher and student, which their training recorded, and of exports,
    which are computed here; of sentence vectors exports have none.
    """
    found = {TEACHER: stage.scores["teacher"], STUDENT: stage.scores["student_after"]}
    if schedule.data is None:
        return METRICS[0], found
    task, data = schedule.data.task, schedule.data
    length = schedule.max_length or task.max_length
    words = find_tokenizer(None, student)
    for form, run in running.items():
        found[form] = score(Scoring(student.model, words, length, progress=progress, run=run), data)
    return task.primary, found


def cells(row: Figures) -> tuple[str, ...]:
    """The row as text, in the order of the columns."""

    def each() -> Iterator[str]:
        yield row.name
        yield "-" if row.score is None else f"{100 * row.score:.2f}"
        yield "-" if row.kept is None else f"{100 * row.kept:.1f} %"
        yield "-" if row.parameters is None else f"{row.parameters:,}"
        yield "-" if row.megabytes is None else f"{row.megabytes:.2f}"
        yield "-" if row.milliseconds is None else f"{row.milliseconds:.1f}"
        yield "-" if row.speedup is None else f"{row.speedup:.2f}x"

    return tuple(each())
