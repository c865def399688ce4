"""``bench`` and ``report``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compresskit.cli.common import KINDS_OF_TEXT, TEXT, begin, err, out, prepare, print_notes, units
from compresskit.errors import InputError

if TYPE_CHECKING:
    from compresskit.benchmark.runner import BenchResult, Executor

#: What ``--quick`` replaces, where the flag itself is not given.
QUICK: dict[str, Any] = {"ratios": (19.0,), "latency_rounds": 3}
QUICK_TOKENS = 15_000
#: The same where students learn vectors, which takes longer to say anything.
QUICK_OF_VECTORS = QUICK | {"ratios": (8.0,)}
#: And where nothing else is scored.
FEW = {"methods": ("auto", "low-rank", "kronecker"), "baselines": ("dense", "int8")}
OUTPUT = Path("reports/local")
#: Name that ``--task`` takes beside those of tasks.
SENTENCES = "sentences"


def _list(kind: Callable[[str], Any]) -> Callable[..., Any]:
    def parse(_context: Any, parameter: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        if value is None:
            return None
        entries = []
        for entry in filter(None, (part.strip() for part in value.split(","))):
            try:
                entries.append(kind(entry))
            except ValueError:
                name = parameter.opts[0]
                raise InputError(f"{name} {value}: {entry!r} is no number; give them like {name} 4,8,19") from None
        return tuple(entries)

    return parse


@click.command()
@click.option("--recipe", metavar="NAME|FILE", help="A bench recipe (YAML). The other flags change it.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="FOLDER|HUB_ID",
    help="Dense checkpoint to compress. Default: the embedded MiniLM.",
)
@click.option(
    "--methods",
    callback=_list(str),
    metavar="A,B",
    help="Methods or recipes to compare. Default: every method; without a task, of vectors also auto.",
)
@click.option(
    "--ratios",
    callback=_list(float),
    metavar="X,Y",
    help="How many times smaller. Default: 4,8,19; without a task, of vectors 8,19.",
)
@click.option(
    "--task",
    "tasks",
    callback=_list(str),
    metavar="A,B",
    help="Tasks to score on; sentences: vectors of sentences (STS-B with --data). Default: quality without labels.",
)
@click.option("--data", metavar="DIR", help="Folder with the tasks' files. Default: the hub.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar=TEXT,
    help=f"Text of stage 1. {KINDS_OF_TEXT} With --unit also several, and tables. Default: the embedded text.",
)
@click.option(
    "--unit",
    callback=_list(str),
    metavar="A,B",
    help="Stage 1 teaches the vectors of such pieces of the text: sentence, passage, line; none: hidden states. "
    "Default without a task: sentence, where the model is made for vectors of sentences; else none.",
)
@units
@click.option("--seeds", callback=_list(int), metavar="A,B", help="One run of every student for each seed. Default: 0.")
@click.option(
    "--baselines",
    callback=_list(str),
    metavar="A,B",
    help="Rows to compare with; `compresskit methods` lists them. Default: dense,int8,half-layers.",
)
@click.option(
    "--students-from",
    type=click.Choice(["checkpoint", "teacher"]),
    help="What students are made from: the pre-trained checkpoint or each task's teacher. Default: checkpoint.",
)
@click.option(
    "--allocation", type=click.Choice(["uniform", "error"]), help="How methods share out parameters. Default: uniform."
)
@click.option(
    "--calibration-tokens",
    type=click.IntRange(0),
    help="Tokens that methods fit their factors to. Default: 0, none; without a task, of vectors 16384.",
)
@click.option(
    "--general-tokens",
    type=click.IntRange(0),
    help="Tokens of stage 1 for every student; 0 leaves it out. Default: 40000; of vectors 240000.",
)
@click.option("--task-epochs", type=float, help="Epochs of stage 2 for every student. Default: 1.")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="Precision of all training. Default: fp32.")
@click.option(
    "--export",
    "exports",
    callback=_list(str),
    metavar="A,B",
    help="Formats, such as onnx,onnx-int8. Every model gets a row in each.",
)
@click.option(
    "--quick",
    is_flag=True,
    help="A first look in a few minutes: every method at 19x, with very short training; without a task, of vectors "
    "three methods at 8x.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder to write. Default: reports/local/<recipe or default>."
)
@click.option("--overwrite", is_flag=True, help="Remove cells of another configuration from the output.")
@click.option(
    "--executor",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="Where cells run: here, or on a Ray cluster.",
)
@click.option(
    "--ray-address", metavar="HOST:PORT", help="Address of the Ray cluster. Default: the one of this machine."
)
@click.option(
    "--gpus-per-cell",
    type=click.FloatRange(0),
    default=0.0,
    help="GPUs that a cell takes on the Ray cluster. Default: 0.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="CPU threads. Default: all.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def bench(
    recipe: str | None,
    output: Path | None,
    overwrite: bool,
    threads: int | None,
    debug: bool,
    quick: bool,
    texts: tuple[str, ...],
    fields: tuple[str, ...],
    general_tokens: int | None,
    task_epochs: float | None,
    executor: Executor,
    ray_address: str | None,
    gpus_per_cell: float,
    **changes: Any,
) -> None:
    """Compare methods across ratios: size, speed, and the quality that is kept.

    Every student gets the same budget. Finished cells are kept: the same command continues, and more methods, ratios or
    seeds may be added. Without --task quality is measured without labels, on text that no student saw.
    """
    prepare(0, threads)
    from compresskit.benchmark.grid import GENERAL_OF_VECTORS, NONE, load_grid
    from compresskit.benchmark.runner import bench as run
    from compresskit.benchmark.runner import usual_grid
    from compresskit.cli.bench_screen import Screen

    changes |= {"text": texts or None, "fields": fields or None, "models": changes["models"] or None}
    changes = {name: value for name, value in changes.items() if value is not None}
    if changes.get("unit") == (NONE,):
        changes["unit"] = ()
    given = load_grid(recipe) if recipe is not None else None
    changes = _with_sentences(changes, given.data if given is not None else None)
    start = given or usual_grid(changes)
    tokens = general_tokens
    if quick and changes.get("unit", start.unit):
        changes = QUICK_OF_VECTORS | (FEW if recipe is None and not changes.get("tasks") else {}) | changes
    elif quick:
        changes = QUICK | changes
        tokens = QUICK_TOKENS if tokens is None and start.general is not False else tokens
    if tokens is not None:
        usual = GENERAL_OF_VECTORS if changes.get("unit") and recipe is None else start.general or {}
        changes["general"] = _budget(usual, max_tokens=tokens) if tokens else False
    if task_epochs is not None:
        changes["task"] = _budget(start.task, epochs=task_epochs)
    name = "quick" if quick and recipe is None else Path(recipe).stem if recipe else "default"
    folder = output or OUTPUT / name
    began = time.monotonic()
    with Screen(err) as screen:
        spread: dict[str, Any] = {"executor": executor, "ray_address": ray_address, "gpus_per_cell": gpus_per_cell}
        result = run(start, output=folder, overwrite=overwrite, watcher=screen, **spread, **changes)
    _closing_words(result, time.monotonic() - began)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--paste",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Also paste the tables of kept quality into this file.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def report(folder: Path, paste: Path | None, debug: bool) -> None:
    """Render a benchmark's report again from its records.

    --paste FILE replaces what stands in FILE between `<!-- bench: FOLDER -->` and `<!-- /bench -->`.
    """
    from compresskit.benchmark.report import render as reports
    from compresskit.benchmark.store import Store

    begin()
    store = Store(folder)
    store.grid()  # refused before a lock is made
    with store.alone(lambda: out.print(f"{folder}: waiting for another process", markup=False)):
        records = reports.render(store)
    if paste is not None:
        reports.paste(folder, paste)
        out.print(f"Pasted into {paste}", markup=False)
    out.print(f"{len(records)} cells rendered: {folder / 'README.md'}, {folder / 'index.html'}", markup=False)


def _with_sentences(changes: dict[str, Any], data: str | None) -> dict[str, Any]:
    """``--task sentences`` in the grid's words: students learn vectors of sentences, which STS-B scores where there is
    data (``--data``, or ``data`` of the recipe), and else their nearness to the teacher's.
    """
    tasks = changes.get("tasks", ())
    if SENTENCES not in tasks:
        return changes
    scored = ("stsb-similarity",) if changes.get("data") or data else ()
    others = tuple(task for task in tasks if task not in (SENTENCES, *scored))
    return {"unit": ("sentence",)} | changes | {"tasks": others + scored}


def _budget(settings: dict[str, Any], **budget: float) -> dict[str, Any]:
    """The settings with this budget in place of theirs."""
    return {k: v for k, v in settings.items() if k not in ("epochs", "max_steps", "max_tokens")} | budget


def _closing_words(result: BenchResult, seconds: float) -> None:
    from compresskit.benchmark.records import frame
    from compresskit.benchmark.report import comparison
    from compresskit.cli.tables import table

    for title, kept in comparison.sections(frame(result.records)):
        columns, rows = comparison.summary(kept)
        plain = [[cell.replace("**", "") for cell in row] for row in rows]
        out.print(table(columns, plain, left=(0,), title=title))
        print_notes(tuple(comparison.problems(kept)))
    folder = result.folder
    lines = (
        f"{len(result.records)} cells, {seconds:.0f} s",
        f"Report: {folder}/README.md, tables: {folder}/results.csv, page: {folder}/index.html",
        f"Checkpoints: {folder}/cells/*/model",
    )
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    if result.failed:
        err.print(f"compresskit: {len(result.failed)} cells failed", style="bold red", highlight=False)
        sys.exit(1)


__all__: Sequence[str] = ["bench", "report"]
