"""``compresskit.shrink``: carry out the steps, where they stopped, and say what came of them."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.errors import InputError
from compresskit.folders.training import last_stage
from compresskit.model import output as outputs
from compresskit.scores import worsened
from compresskit.shrinking.figures import STUDENT, figures
from compresskit.shrinking.job import Job, Schedule, earlier_exports, working_folder_of
from compresskit.shrinking.steps import FineTune, Step, Tools
from compresskit.training.working_folder import WorkingFolder, check_idle, check_ours, working_folder

#: The share of its teacher's score that a student may keep before the teacher is doubted.
_MORE = 1.1
#: What is written last: the record of a shrinking.
_RECORD = "shrink"

#: Called with what begins, a step or None for the closing figures; its block lasts as long as that.
Watch = Callable[[Step | None], AbstractContextManager[Tools]]


@dataclass(frozen=True)
class Shrunk:
    """What a shrinking made.

    Attributes:
        folder: of the student.
        exports: format -> folder.
        working_folder: holds the teacher, if one was made, the student before it was trained, and ``shrink.json``.
        record: what ``shrink.json`` holds: choices, commands, and a row of figures for teacher, student and exports.
        notes: what the user should know.
    """

    folder: Path
    exports: dict[str, Path]
    working_folder: Path
    record: dict[str, Any]
    notes: tuple[str, ...] = ()


@contextmanager
def unwatched(_step: Step | None) -> Iterator[Tools]:
    """A :data:`Watch` that shows nothing."""
    yield Tools()


def shrink(
    model: str | Path | None = None,
    *,
    output: str | Path,
    task: str | Path | None = None,
    data: str | Path | None = None,
    text: str | Path | None = None,
    ratio: float | None = None,
    size: str | None = None,
    method: str | None = None,
    export: str | Sequence[str] = (),
    runtime: str | None = None,
    seed: int = 0,
    precision: str | None = None,
    epochs: float | None = None,
    trim_text: str | Path | None = None,
    trim_keep: int | None = None,
    trim_coverage: float | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Shrunk:
    """Make a small model of a checkpoint in the best way that was measured: teacher, compression, distillation, scores.

    Args:
        model: folder or hub id. With a trained head for the task it is the teacher as it is; otherwise a teacher is
            fine-tuned from it. Default: the embedded checkpoint.
        output: folder of the small model. Beside it ``<output>.shrink`` keeps what was made on the way, and
            ``<output>-<format>`` each export.
        task: what the small model should do: the name of a shipped task or a YAML file.
        data: folder with the task's files; without one they come from the hub.
        text: instead of a task: text whose sentences' vectors the small model learns from ``model``: a file, folder or
            hub data set as for :func:`compresskit.distill`.
        ratio: dense parameters / compressed parameters of the whole model, above 1.
        size: instead of ``ratio``: the largest size of the weight file, such as ``5MB``.
        method: as for :func:`compresskit.compress`. Default: ``auto``, for sentence vectors ``low-rank``.
        export: formats that the small model is written in besides, such as ``onnx-int8``.
        runtime: what ONNX exports are for, as for :func:`compresskit.export`: ``onnxruntime`` alone is faster.
        seed: of every random choice.
        precision: ``fp32`` (default) or ``bf16``, of trainings.
        epochs: passes of the student over the rows or the text. Default: by how many there are. A teacher that is
            fine-tuned here always takes as many as its rows ask for.
        trim_text: also trim the vocabulary, to the tokens that this text uses most; ratio and size then count against
            the model before that. The student learns word by word from a teacher that keeps its vocabulary.
        trim_keep: how many tokens to keep.
        trim_coverage: instead: which share of the text's tokens. Default: 0.999.
        overwrite: remove what an earlier run for the same output wrote, and start again.
        resume: continue a run that was stopped.

    Raises:
        InputError: refused before anything is trained: says what is wrong with model, data, ratio, formats or output.
        WorkError: a loss that is not finite, an export that computes something else than torch.
    """
    job = Job(
        output=Path(output),
        model=model,
        task=task,
        data=data,
        text=text,
        ratio=ratio,
        size=size,
        method=method,
        export=(export,) if isinstance(export, str) else tuple(export),
        runtime=runtime,
        seed=seed,
        precision=precision,
        epochs=epochs,
        trim_text=trim_text,
        trim_keep=trim_keep,
        trim_coverage=trim_coverage,
    )
    check_outputs(job, overwrite=overwrite, resume=resume)
    return carry_out(job.schedule(), overwrite=overwrite, resume=resume)


def check_outputs(job: Job, *, overwrite: bool, resume: bool) -> None:
    """Refuse what is in the way of the outputs, before models and data are read. Raises InputError."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("shrink runs as one process; --dry-run shows its single commands, for torchrun")
    if resume and overwrite:
        raise InputError("give --resume (continue a run) or --overwrite (start again), not both")
    work = working_folder_of(job.output)
    if work.exists():
        check_ours(work)
    written = (job.output, *job.outputs.values())
    if resume:
        if not work.exists():
            raise InputError(f"{work}: is not there, so there is nothing to resume; leave --resume out")
        if (work / f"{_RECORD}.json").is_file() and all(folder.exists() for folder in written):
            raise InputError(f"output {job.output}: exists, so the run is finished: nothing to resume")
        return
    for folder in (*written, *(earlier_exports(job.output) if overwrite else ())):
        outputs.check_output(folder, overwrite)
    training = working_folder(job.output)
    if training.exists():
        check_ours(training)
    if training.exists() and not overwrite:
        raise InputError(f"{training}: holds an unfinished run of distill; choose another output")
    if work.exists() and not overwrite:
        raise InputError(f"{work}: is there from an earlier run; --resume continues it, --overwrite starts it again")


def carry_out(schedule: Schedule, *, overwrite: bool = False, resume: bool = False, watch: Watch = unwatched) -> Shrunk:
    """Take every step whose output is not there yet, then the closing figures. :func:`shrink` says what it raises."""
    if overwrite:
        _remove(schedule)
    work = WorkingFolder(schedule.folder, schedule.decides, resume=resume, overwrite=overwrite)
    notes: dict[str, str] = {}  # each once, with what was done when it came
    try:
        for step in schedule.steps:
            if step.output.exists():
                shutil.rmtree(working_folder(step.output), ignore_errors=True)  # of a run killed right at its end
            else:
                with watch(step) as tools:
                    for note in step.run(tools):
                        notes.setdefault(note, step.doing)
        with watch(None) as tools:
            record = work.once(_RECORD, lambda: _record(schedule, tools))
    except InputError:
        if not any(path.exists() for step in schedule.steps for path in (step.output, working_folder(step.output))):
            work.remove()  # the first step was refused
        raise
    finally:
        work.close()
    exports = {step.settings["format"]: step.output for step in schedule.steps if step.command == "export"}
    said = (f"{doing}: {note}" for note, doing in notes.items())
    before = (note for note in schedule.notes if not any(note in other for other in notes))
    doubts = (note for note in _doubts(schedule, record) if note not in notes)
    return Shrunk(schedule.output, exports, schedule.folder, record, (*before, *said, *doubts))


def _doubts(schedule: Schedule, record: dict[str, Any]) -> Iterator[str]:
    """Notes where the teacher that was made here has learnt less than its student, and where the student was better
    before it was trained, which may have been in a run that was stopped.
    """
    kept = {row["name"]: row["kept"] for row in record["rows"]}[STUDENT]
    if schedule.steps[0].command == FineTune.command and (kept is None or kept > _MORE):
        says = (
            "the teacher scores 0 or below: it"
            if kept is None
            else (f"the student scores higher than its teacher ({100 * kept:.0f} %), which")
        )
        yield (
            f"{says} has learnt too little: fine-tune one for more epochs, or with a higher learning rate "
            "(`compresskit finetune`), and give it with --model"
        )
    stage = last_stage(schedule.output)
    if stage is not None:
        yield from worsened(stage.scores["student_before"], stage.scores["student_after"], stage.primary_metric)


def _record(schedule: Schedule, tools: Tools) -> dict[str, Any]:
    commands = [shlex.join(step.words()) for step in schedule.steps]
    found = figures(schedule, tools.progress)
    return {"choices": list(schedule.choices), "commands": commands, **found}


def _remove(schedule: Schedule) -> None:
    """Remove the outputs of an earlier run: what stayed would pass for done. Raises InputError: it is at work."""
    for folder in (schedule.folder, working_folder(schedule.output)):
        check_idle(folder)
    written = [step.output for step in schedule.steps if schedule.folder not in step.output.parents]
    for folder in (*earlier_exports(schedule.output), *written, working_folder(schedule.output)):
        if folder.exists():
            shutil.rmtree(folder)
