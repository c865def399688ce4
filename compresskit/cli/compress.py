"""``compress``, ``inspect`` and ``methods``."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compresskit.cli.common import (
    KINDS_OF_TEXT,
    TEXT,
    common,
    out,
    prepare,
    print_notes,
    progress_bar,
    reading,
    trimming,
)
from compresskit.data import EMBEDDED

if TYPE_CHECKING:
    from compresskit.model.checkpoint import Checkpoint
    from compresskit.pipeline import Compression, Request
    from compresskit.planning.planner import Plan


@click.command()
@common
@click.option("--method", metavar="NAME", help="Method for every role, or auto. `compresskit methods` lists them.")
@click.option("--recipe", metavar="NAME|FILE", help="A shipped recipe or a YAML file. It takes the place of --method.")
@click.option("--ratio", type=float, help="Dense parameters / compressed parameters of the whole model, above 1.")
@click.option(
    "--size",
    metavar="SIZE",
    help="Largest size of the weight file, e.g. 5MB (10^6 bytes). It takes the place of --ratio.",
)
@click.option(
    "--allocation",
    type=click.Choice(["uniform", "error"]),
    help="uniform: about the same ratio for every matrix. error: the least total error.",
)
@click.option(
    "--objective",
    type=click.Choice(["size", "latency"]),
    help="latency: take the plan that is estimated fastest among equally small ones.",
)
@click.option(
    "--calibration",
    is_flag=False,
    flag_value=EMBEDDED,
    metavar=f"[{TEXT}]",
    help=f"Fit factors so that outputs on this text are kept. {KINDS_OF_TEXT} Without a value: on the embedded text.",
)
@click.option(
    "--calibration-task",
    metavar="NAME|FILE",
    help="Fit factors to this task's training rows; best for a fine-tuned model.",
)
@click.option("--data", metavar="DIR", help="Folder with the task's files. Default: the hub.")
@trimming
@click.option("--allow-slow", is_flag=True, help="Also offer shapes that take more than 1.1 x the dense FLOPs.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write. Default: <model>-<method>-<ratio>x.")
@click.option("--overwrite", is_flag=True, help="Replace an output that compresskit wrote.")
@click.option("--dry-run", is_flag=True, help="Show the plan and its totals. Nothing is written.")
def compress(
    output: Path | None, overwrite: bool, dry_run: bool, seed: int, threads: int | None, debug: bool, **options: Any
) -> None:
    """Compress a checkpoint into a folder that transformers loads."""
    rows = any(options[name] is not None for name in ("recipe", "calibration", "calibration_task", "trim_text"))
    prepare(seed, threads, options["device"], rows=rows)
    from compresskit.decomposers import registry
    from compresskit.model.output import check_output
    from compresskit.pipeline import Request

    request = Request(**options)
    if output is not None and not dry_run:
        check_output(output, overwrite)
    with reading(options["model"]):
        work = request.read()
    folder = output or Path(_default_name(request, work))
    if not dry_run:
        check_output(folder, overwrite)
    with progress_bar() as progress:
        work = work.calibrated(progress)
        plan = work.plan(predict_errors=dry_run, progress=progress)
    if dry_run:
        show(work.checkpoint, plan)
        out.print("Dry run: nothing written.")
        return
    with progress_bar() as progress:
        plan, megabytes = work.write_to(folder, plan, overwrite=overwrite, progress=progress)
    show(work.checkpoint, plan, megabytes)
    out.print(f"Written to {folder}/ (weights, tokenizer, recipe.yaml, compression.json, model card)", markup=False)
    gains = any(registry.get(assignment.method).gains_by_calibration for assignment in plan.assignments)
    if gains and not work.recipe.calibration_tokens:
        out.print("Nearer to the original at the same size: --calibration", highlight=False)
    load = f"import compresskit; model = compresskit.load({json.dumps(str(folder), ensure_ascii=False)})"
    out.print(
        f"Next: a one-shot {plan.ratio:.3g}x student needs distilling before it is useful:\n"
        f"  compresskit distill {shlex.join(_lesson(request, work, folder))}\n"
        f"Load it:\n  python -c {shlex.quote(load)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _default_name(request: Request, work: Compression) -> str:
    """``<model>-<method>-<ratio>x``, or the size instead of the ratio; nothing of both for explicit shapes. A trimmed
    vocabulary is named too.
    """
    trimmed = "trimmed" if work.untrimmed is not None else ""
    ratio = f"{work.recipe.ratio:.4g}x" if work.recipe.ratio else ""
    suffix = request.size.strip() if request.size else ratio
    return "-".join(part for part in (work.checkpoint.name, trimmed, work.recipe.name, suffix) if part)


def _lesson(request: Request, work: Compression, folder: Path) -> list[str]:
    """Arguments of the ``distill`` that should come next: on the task of the calibration, or on any text, of which an
    encoder of sentences learns the sentences' vectors.
    """
    from compresskit.model.sentence_vectors import has_sentence_model

    teacher = None if request.model is None else str(request.model)
    if request.calibration_task is None:
        unit = ["--unit", "sentence"] if has_sentence_model(folder) else []
        lesson = ["--text", "FILE", *unit, "--output", f"{folder}-{'sentences' if unit else 'general'}"]
    else:
        task = str(request.calibration_task)
        lesson = ["--task", task, *(["--data", str(request.data)] if request.data is not None else [])]
        lesson += ["--output", f"{folder}-{Path(task).stem}"]
        teacher = teacher if _predicts(work) else "TASK_TEACHER"
    return [*(["--teacher", teacher] if teacher else []), "--student", str(folder), *lesson]


def _predicts(work: Compression) -> bool:
    """Whether the model can teach the task of its calibration."""
    from compresskit.calibration.sensitivity import NoPredictionsError, check_predicts
    from compresskit.tasks.rows import TaskData

    if not isinstance(work.text, TaskData):
        return False
    try:
        check_predicts(work.checkpoint.model, work.text, work.checkpoint.untrained)
    except NoPredictionsError:
        return False
    return True


@click.command()
@common
def inspect(model: str | None, as_class: str | None, seed: int, threads: int | None, device: str, **_: Any) -> None:
    """Show every matrix: role, shape, share of the model, and how compressible it is."""
    prepare(seed, threads, device, rows=False)

    from compresskit.cli.inspection import inspection_tables
    from compresskit.model import checkpoint as checkpoints

    with reading(model):
        dense = checkpoints.read(model, as_class, device)
    with progress_bar() as progress:
        tables = inspection_tables(dense.model, progress)
    print_notes(dense.notes)
    for table in tables:
        out.print(table)


@click.command()
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def methods(**_: Any) -> None:
    """List the registered methods, the shipped recipes, and the baselines of a benchmark."""
    from compresskit.benchmark.baselines.registry import BASELINES
    from compresskit.cli.tables import table
    from compresskit.decomposers import AUTO
    from compresskit.decomposers.registry import METHODS
    from compresskit.planning.recipe import load_recipe, shipped_recipes

    rows = [(name, method.summary, method.reference, METHODS.source(name)) for name, method in METHODS.all().items()]
    rows.append((AUTO, "for every matrix the method and shape with the least error, best with --calibration", "", ""))
    rows += [(name, f"BROKEN: {reason}", "", "") for name, reason in METHODS.broken().items()]
    out.print(table(("method", "what it does", "published in", "package"), rows, left=(0, 1, 2, 3)))
    recipes = [(name, load_recipe(name).description) for name in sorted(shipped_recipes())]
    out.print(table(("recipe", "what it is"), recipes, left=(0, 1)))
    rivals = [(name, rival.summary, BASELINES.source(name)) for name, rival in BASELINES.all().items()]
    rivals += [(name, f"BROKEN: {reason}", "") for name, reason in BASELINES.broken().items()]
    out.print(table(("baseline", "what `compresskit bench` compares with", "package"), rivals, left=(0, 1, 2)))


def show(dense: Checkpoint, plan: Plan, megabytes: tuple[float, float] | None = None) -> None:
    """The plan's two tables and its notes."""
    from compresskit.cli.tables import plan_table, totals_table

    out.print(plan_table(plan))
    out.print(totals_table(plan, megabytes))
    print_notes((*dense.notes, *plan.notes))
