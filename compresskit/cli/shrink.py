"""``shrink``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compresskit.cli.common import (
    KINDS_OF_TEXT,
    TEXT,
    err,
    out,
    prepare,
    print_notes,
    printable,
    progress_bar,
    shared,
    trimming,
)
from compresskit.cli.train import neighbours, training_progress

if TYPE_CHECKING:
    from compresskit.shrinking.job import Schedule
    from compresskit.shrinking.run import Shrunk
    from compresskit.shrinking.steps import Step, Tools


def _names(_context: Any, _parameter: Any, value: str | None) -> tuple[str, ...]:
    """``onnx,onnx-int8`` as names."""
    return tuple(filter(None, (part.strip() for part in (value or "").split(","))))


@click.command()
@click.option(
    "--model",
    metavar="FOLDER|HUB_ID",
    help="What to make smaller. With a head for the task it is the teacher as it is, else one is fine-tuned from it. "
    "Default: the embedded MiniLM.",
)
@click.option("--task", metavar="NAME|FILE", help="What it should do: one of `compresskit tasks`, or a YAML file.")
@click.option("--data", metavar="DIR", help="Folder with the task's files. Default: the hub.")
@click.option("--text", metavar=TEXT, help=f"Text for sentence vectors. It takes the place of --task. {KINDS_OF_TEXT}")
@click.option("--ratio", type=float, help="Dense parameters / compressed parameters of the whole model, above 1.")
@click.option(
    "--size", metavar="SIZE", help="Largest size of the weight file, e.g. 5MB. It takes the place of --ratio."
)
@click.option(
    "--method",
    metavar="NAME",
    help="Method for every role. Default: auto, with --text low-rank.",
)
@trimming
@click.option("--export", callback=_names, metavar="A,B", help="Formats to write besides, such as onnx-int8.")
@click.option(
    "--runtime",
    metavar="any|onnxruntime",
    help="What ONNX exports are for. onnxruntime: faster there, unreadable elsewhere. Default: any.",
)
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Precision of trainings. Default: fp32.")
@click.option(
    "--epochs",
    type=float,
    help="Passes of the student over the rows or the text; a teacher that is fine-tuned keeps its own. "
    "Default: by how many rows there are.",
)
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Start again: remove the output, its exports, and <output>.shrink with the teacher that was trained.",
)
@click.option("--resume", is_flag=True, help="Continue a run that was stopped.")
@click.option("--dry-run", is_flag=True, help="Print the choices and the single commands. Nothing is written.")
@shared
def shrink(overwrite: bool, resume: bool, dry_run: bool, threads: int | None, debug: bool, **asked: Any) -> None:
    """Make a small model in one go: teacher, compression, distillation, scores.

    Every choice is made by what was measured, and said. The same by hand: --dry-run prints the single commands.
    """
    prepare(asked["seed"], threads)
    from compresskit.shrinking.job import Job
    from compresskit.shrinking.run import carry_out, check_outputs

    job = Job(**asked)
    if not dry_run:
        check_outputs(job, overwrite=overwrite, resume=resume)
    with err.status("reading model and data"):
        schedule = job.schedule()
    for choice in schedule.choices:
        style = "yellow" if choice.startswith("note: ") else None
        line = printable(f"{'# ' * dry_run}{choice}")
        out.print(line, markup=False, highlight=False, soft_wrap=True, style=style)
    if dry_run:  # a script
        out.print(_OF_A_SCRIPT, markup=False, highlight=False, soft_wrap=True)
        for step in schedule.steps:
            out.print(_command(step, threads), markup=False, highlight=False, soft_wrap=True)
        return
    try:
        done = carry_out(schedule, overwrite=overwrite, resume=resume, watch=_watch)
    except KeyboardInterrupt:
        if schedule.folder.exists():
            kept = f"{schedule.folder}/ keeps what was done: the same command with --resume continues it"
            err.print(kept, markup=False, soft_wrap=True)
        raise
    _report(schedule, done)


#: What is said in front of the commands of a dry run.
_OF_A_SCRIPT = (
    "# Each of these commands also names a next one; here the line below it is the next. None prints the closing table."
)


def _command(step: Step, threads: int | None) -> str:
    return shlex.join([*step.words(), *(["--threads", str(threads)] if threads is not None else [])])


@contextmanager
def _watch(step: Step | None) -> Iterator[Tools]:
    """Says what begins, and shows its progress."""
    from compresskit.shrinking.steps import Tools

    doing = "scoring and timing" if step is None else step.doing
    out.print(doing if step is None else f"{doing}: {step.output}/", markup=False, highlight=False, soft_wrap=True)
    if step is not None and step.trains:
        with training_progress(doing) as tools:
            yield Tools(**tools)
    else:
        with progress_bar() as progress:
            yield Tools(progress)


def _report(schedule: Schedule, done: Shrunk) -> None:
    from compresskit.cli.tables import table
    from compresskit.shrinking.figures import Figures, cells

    record = done.record
    columns = ("", f"{record['metric']}, %", "kept", "parameters", "MB", "ms", "speed-up")
    threads = f"{record['threads']} CPU thread{'s' * (record['threads'] > 1)}"
    scored = " and ".join(f"{rows:,} rows of {name.replace('_', ' ')}" for name, rows in record["scored"].items())
    timed = (
        f"{record['metric']}: on {scored}; ms: one text of {record['tokens']} tokens, {threads}, all models in turns; "
        "speed-up: median over the rounds"
    )
    rows = [cells(Figures(**row)) for row in record["rows"]]
    out.print(table(columns, rows, left=(0,), caption=timed))
    print_notes(done.notes)
    folders = ", ".join(f"{folder}/" for folder in (done.folder, *done.exports.values()))
    lines = [
        f"Written to {folders}",
        f"{done.working_folder}/ keeps what was made on the way, and shrink.json: choices, commands, figures. "
        "It may be deleted.",
    ]
    if schedule.steps[0].command == "finetune":
        again = shlex.join(["shrink", "--model", str(schedule.teacher)])
        lines.append(f"Other sizes of the same teacher: compresskit {again} --ratio ... --output ...")
    if schedule.data is None:
        following = neighbours(done.folder)
    else:
        texts = ["--pair", "TEXT", "TEXT"] if len(schedule.data.task.inputs) == 2 else ["--text", "TEXT"]
        following = ["predict", "--model", str(done.folder), *texts]
    lines.append(f"Next: compresskit {shlex.join(following)}")
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
