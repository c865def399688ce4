"""``distill``, ``finetune``, ``evaluate`` and ``tasks``."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.markup import escape

from compresskit.cli.common import (
    AS_CHOICES,
    KINDS_OF_TEXT,
    TEXT,
    err,
    out,
    prepare,
    print_notes,
    printable,
    progress_bar,
    shared,
    units,
)
from compresskit.errors import InputError, unknown

if TYPE_CHECKING:
    from compresskit.training.run import Result

F = TypeVar("F", bound=Callable[..., Any])


def _loss(_context: Any, _parameter: Any, values: tuple[str, ...]) -> dict[str, float] | None:
    """``hidden=2`` as a weight."""
    from compresskit.planning.stage import LOSS_NAMES

    weights: dict[str, float] = {}
    for value in values:
        name, _, weight = value.partition("=")
        if name not in LOSS_NAMES:
            raise unknown("loss", name, LOSS_NAMES)
        if name in weights:
            raise InputError(f"--loss {name}: is given twice; give one weight")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise InputError(f"--loss {value}: give NAME=WEIGHT, such as hidden=1") from None
    return weights or None


def _sizes(_context: Any, _parameter: Any, value: str | None) -> tuple[int, ...] | None:
    """``256,128`` as numbers."""
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise InputError(f"--dims {value}: give numbers with commas, such as 256,128,64") from None


def _class_weights(_context: Any, _parameter: Any, values: tuple[str, ...]) -> dict[str, float] | str | None:
    """``balanced``, or ``spam=2`` as a weight."""
    if "balanced" in values:
        if len(values) > 1:
            raise InputError("--class-weight balanced: takes no other weights beside it")
        return "balanced"
    weights: dict[str, float] = {}
    for value in values:
        name, _, weight = value.rpartition("=")
        if name in weights:
            raise InputError(f"--class-weight {name}: is given twice; give one weight")
        try:
            weights[name] = float(weight)
        except ValueError:
            name = ""
        if not name:
            raise InputError(f"--class-weight {value}: give balanced, or NAME=WEIGHT, such as spam=2")
    return weights or None


def training(command: F) -> F:
    """The flags of both training commands. None of them has a default here: the stage's settings have."""
    options = (
        click.option("--epochs", type=float, help="Passes over the data. Default: distill 1, finetune 3."),
        click.option("--max-steps", type=int, help="Optimizer steps. They take the place of epochs."),
        click.option("--max-tokens", type=int, help="Real (non-padding) tokens. They take the place of epochs."),
        click.option(
            "--learning-rate",
            type=float,
            help="Peak learning rate. Default: general and with --unit 2e-3, task 5e-4, finetune 5e-5.",
        ),
        click.option(
            "--batch-size", type=int, help="Sequences per step over all devices. Default: general 8, else 32."
        ),
        click.option(
            "--max-length",
            type=int,
            help="Tokens per sequence. Default: the task's, else 128; of sentence vectors the model's, or fewer.",
        ),
        click.option("--warmup", type=float, help="Share of the steps in which the learning rate rises. Default: 0.1."),
        click.option(
            "--schedule",
            type=click.Choice(["linear", "cosine", "constant"]),
            help="How the learning rate falls after the warm-up. Default: linear.",
        ),
        click.option("--weight-decay", type=float, help="Weight decay of AdamW. Default: 0.01."),
        click.option(
            "--dropout",
            help="Dropout probability, or keep for the checkpoint's own. Default: distill 0, finetune keep.",
        ),
        click.option(
            "--class-weight",
            "class_weights",
            multiple=True,
            metavar="balanced|NAME=WEIGHT",
            callback=_class_weights,
            help="Weight of a class's labels; balanced: rare classes count as much as frequent ones. Default: 1.",
        ),
        click.option(
            "--early-stopping",
            type=int,
            metavar="SCORES",
            help="Stop after so many scores of dev, by the primary metric, that are not above the best; keep the best.",
        ),
        click.option("--score-every", type=int, help="Steps between these scores. Default: a pass over the data."),
        click.option("--accumulation", type=int, help="Micro-batches per step. More of them take less memory."),
        click.option(
            "--gradient-checkpointing",
            is_flag=True,
            help="Compute activations twice instead of keeping them: less memory, the same result.",
        ),
        click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Precision of training. Default: fp32."),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu"]),
            help="Where to compute. auto takes a GPU where there is one. Default: auto.",
        ),
        click.option(
            "--new-head",
            is_flag=True,
            help="Replace the last layer of the head that the model (of distill: the student) has, for another task.",
        ),
        click.option("--save-every", type=int, help="Steps between checkpoints. Default: a tenth of the run."),
        click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write."),
        click.option("--overwrite", is_flag=True, help="Replace an output or unfinished run of compresskit."),
        click.option("--resume", is_flag=True, help="Continue an unfinished run."),
    )
    command = shared(command)
    for option in reversed(options):
        command = option(command)
    return command


_task = click.option(
    "--task", metavar="NAME|FILE", help="A task that `compresskit tasks` lists, or a YAML file of your own."
)
_as = click.option(
    "--as", "as_class", type=click.Choice(AS_CHOICES), help="Model class to read. Default: the checkpoint's."
)
_data = click.option("--data", type=click.Path(path_type=Path), help="Folder with the task's files. Default: the hub.")


@click.command()
@click.option("--student", required=True, metavar="FOLDER", help="A compressed model.")
@click.option("--teacher", metavar="FOLDER|HUB_ID", help="The dense model. Default: the embedded MiniLM.")
@_task
@_data
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar=TEXT,
    help=f"Text. {KINDS_OF_TEXT} With --unit also several, and tables. Default: the embedded text.",
)
@click.option(
    "--unit",
    multiple=True,
    type=click.Choice(["sentence", "passage", "line"]),
    help="Learn the teacher's sentence vectors, of each such piece of the text.",
)
@units
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME=WEIGHT",
    callback=_loss,
    help="Weight of a loss term: embedding, attention, hidden, logits, supervised; with --unit pooled, similarity. "
    "Default: 1 each; similarity 4; attention 0 but for a task.",
)
@click.option(
    "--logits-loss",
    type=click.Choice(["kl", "mse", "margin"]),
    help="Form of the logits term. margin is for kind ranking. Default: kl.",
)
@click.option("--temperature", type=float, help="Temperature of kl. Default: 1.")
@click.option("--pooled-loss", type=click.Choice(["cosine", "mse"]), help="Form of the pooled term. Default: cosine.")
@click.option("--similarity-loss", type=click.Choice(["mse", "kl"]), help="Form of the similarity term. Default: mse.")
@click.option("--similarity-temperature", type=float, help="Temperature of the similarity term's kl. Default: 0.05.")
@click.option("--dims", callback=_sizes, help="Prefixes of the vector that should serve too, such as 256,128,64.")
@click.option(
    "--teacher-outputs",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the teacher's outputs in this folder for all its students. On a GPU sentence vectors alone are kept.",
)
@training
def distill(
    student: str,
    teacher: str | None,
    texts: tuple[str, ...],
    unit: tuple[str, ...],
    debug: bool,
    threads: int | None,
    **flags: Any,
) -> None:
    """Bring a compressed student back to its teacher.

    Settings that are not given come from the recipe in the student's folder, where it has some.

    Without --task the general stage: the pre-trained teacher, on plain text. With --task the task stage: the teacher
    that was fine-tuned on the task (`compresskit finetune`). With --unit sentence vectors: the student learns the
    vector that the teacher gives each text. Several devices: the same command under torchrun.
    """
    if flags["data"] is not None and flags["task"] is None:
        raise InputError("--data belongs to --task; for the general stage give --text")
    prepare(flags["seed"], threads)
    from compresskit.training import stages

    flags |= {"text": texts if len(texts) > 1 else next(iter(texts), None), "unit": unit or None}
    if flags["language"] is None:
        del flags["language"]
    with _progress("distilling", flags["output"]) as tools:
        result = stages.distill(student, teacher, **flags, **tools)
    following = ["distill", "--teacher", "TASK_TEACHER", "--student", str(result.folder), "--task", "TASK"]
    if unit and result.folder is not None:
        following = neighbours(result.folder)
    _report(result, [] if flags["task"] else following)


@click.command()
@click.option(
    "--model", metavar="FOLDER|HUB_ID", help="Model to train, dense or compressed. Default: the embedded MiniLM."
)
@_task
@_data
@_as
@training
def finetune(model: str | None, task: str | None, debug: bool, threads: int | None, **flags: Any) -> None:
    """Train a model on a task by its labels: the teacher of the task stage."""
    if task is None:
        raise InputError("--task is needed: what to train on; `compresskit tasks` lists what is there")
    prepare(flags["seed"], threads)
    from compresskit.model.quantizer import is_compressed
    from compresskit.training import stages

    with _progress("fine-tuning", flags["output"]) as tools:
        result = stages.finetune(model, task=task, **flags, **tools)
    data = ["--data", str(flags["data"])] if flags["data"] is not None else []
    following = ["distill", "--teacher", str(result.folder), "--student", "STUDENT", "--task", task, *data]
    _report(result, [] if is_compressed(result.model) else following)


@click.command()
@click.option(
    "--model",
    metavar="FOLDER|HUB_ID",
    required=True,
    help="Model to score, dense, compressed or exported, with a head for the task; similarity and retrieval need none.",
)
@_task
@_data
@_as
@click.option(
    "--documents-model",
    metavar="FOLDER|HUB_ID",
    help="Another model for the documents of a retrieval, such as the teacher of a student that embeds the queries.",
)
@click.option("--max-length", type=int, help="Tokens per sequence. Default: the task's, of vectors the model's.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
@click.option(
    "--report",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="Also the scores in parts: by class, label, type of entity or size. DIR: a folder to write them to.",
)
@click.option("--overwrite", is_flag=True, help="Replace a folder of a report.")
@shared
def evaluate(
    model: str, task: str | None, report: str | None, debug: bool, threads: int | None, seed: int, **flags: Any
) -> None:
    """Score a model on a task."""
    if task is None:
        raise InputError("--task is needed: what to score; `compresskit tasks` lists what is there")
    prepare(seed, threads)
    from compresskit.answering import evaluating
    from compresskit.cli.tables import table
    from compresskit.folders.evaluation import table_of

    with progress_bar() as progress:
        result = evaluating.evaluate(model, task=task, report=report or report is not None, progress=progress, **flags)
    rows = [
        (split.replace("_", " "), metric, f"{100 * value:.2f}", f"{result.record['data'][split]['rows']:,}")
        for split, values in result.record["scores"].items()
        for metric, value in values.items()
    ]
    out.print(table(("split", "metric", "score, %", "rows"), rows, left=(0, 1)))
    for split, parts in result.record.get("report", {}).items():
        for title, part in parts["tables"].items():
            columns, cells = table_of(part)
            shown = [[escape(printable(cell)) for cell in row] for row in cells]
            out.print(table(columns, shown, left=(0,), title=f"{split.replace('_', ' ')}, {title}"))
        if not parts["tables"]:
            out.print(f"{split}: this kind of task has no report beyond its metrics", markup=False)
    print_notes(result.notes)
    if result.folder is not None:
        out.print(f"Written to {result.folder}/ (report.json, README.md, pictures)", markup=False, soft_wrap=True)


#: The kinds that most users look for, in this order; further ones follow.
_FIRST = ("classification", "multi-label", "tags", "regression", "ranking", "spans", "similarity", "retrieval")


@click.command()
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def tasks(debug: bool) -> None:
    """List the tasks that come with compresskit, and the task kinds."""
    from compresskit.cli.tables import table
    from compresskit.tasks.loading import load_task, shipped_tasks
    from compresskit.tasks.registry import KINDS

    first = [name for name in _FIRST if name in KINDS.all()]
    order = [*first, *(name for name in KINDS.all() if name not in first)]
    declared = sorted(
        (load_task(name) for name in shipped_tasks()), key=lambda task: (order.index(task.kind), task.name)
    )
    rows = [
        (
            task.name,
            task.kind,
            ", ".join(task.metrics),
            task.description,
            "; ".join(", ".join(names) for names in (*task.files.values(), *task.tables.values())),
        )
        for task in declared
    ]
    kinds = [(name, KINDS.get(name)) for name in order]
    cells = [(name, kind.summary, ", ".join(kind.metrics), KINDS.source(name)) for name, kind in kinds]
    cells += [(name, f"BROKEN: {reason}", "", "") for name, reason in KINDS.broken().items()]
    columns = ("task kind", "what is predicted", "metrics", "package")
    out.print(table(columns, cells, left=(0, 1, 2, 3), title="Kinds: kind and metrics of a YAML file of your own"))
    headings = ("task", "kind", "metrics", "what it asks", "files below --data")
    out.print(table(headings, rows, left=(0, 1, 2, 3, 4), title="Tasks that come with compresskit: --task NAME"))


@contextmanager
def training_progress(what: str) -> Iterator[dict[str, Any]]:
    """Progress of predictions and of training, for a stage."""
    from compresskit.cli.training_bar import ProgressBar

    bar = ProgressBar(err, what)
    try:
        with err.status(escape(f"{what}: reading models and data")) as status:

            def predicting(who: str, done: int, total: int) -> None:
                name = "scoring" if who in ("predicting", "encoding") else who
                status.update(escape(f"{what}: {name}, {done:,}" + (f" of {total:,}" if total else "")))

            bar.before_start = status.stop
            yield {"progress": predicting, "callbacks": [bar]}
    finally:
        bar.close()


@contextmanager
def _progress(what: str, output: Path) -> Iterator[dict[str, Any]]:
    """The same, and what an interrupted run keeps."""
    from compresskit.training.working_folder import working_folder

    try:
        with training_progress(what) as tools:
            yield tools
    except KeyboardInterrupt:
        if working_folder(output).exists():
            err.print(
                f"{working_folder(output)}/ keeps what was done: the same command with --resume continues it",
                markup=False,
                soft_wrap=True,
            )
        raise


def neighbours(folder: Path) -> list[str]:
    """The command that looks at an encoder of sentences."""
    return ["predict", "--model", str(folder), "--text", "TEXT", "--among", "FILE_OR_FOLDER"]


def _report(result: Result, following: list[str]) -> None:
    """What a run gave; ``following`` is the command that should come next, if any."""
    from compresskit.cli.tables import table
    from compresskit.folders.training import score_rows, view

    record = result.record
    columns, rows = score_rows(view(record))
    out.print(table(columns, rows, left=(0, 1)))
    speed = f"{record['tokens_per_second']:,.0f} tokens/s"
    out.print(
        f"{record['steps']:,} steps, {record['tokens']:,} tokens, {record['seconds']:.0f} s ({speed})", highlight=False
    )
    print_notes(result.notes)
    out.print(f"Written to {result.folder}/ (weights, training.json, losses.png, model card)", markup=False)
    if following:
        out.print(f"Next: compresskit {shlex.join(following)}", markup=False, highlight=False, soft_wrap=True)
