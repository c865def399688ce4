"""``compress``, ``inspect`` and ``methods``."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compresskit.cli.common import common, out, prepare, print_notes, progress_bar, reading
from compresskit.data import EMBEDDED
from compresskit.errors import InputError

if TYPE_CHECKING:
    from compresskit.model.checkpoint import Checkpoint
    from compresskit.planning.planner import Plan
    from compresskit.planning.recipe import Recipe
    from compresskit.tasks.rows import TaskData


@click.command()
@common
@click.option("--method", metavar="NAME", help="For every role, or auto; see `compresskit methods`.")
@click.option("--recipe", metavar="NAME|FILE", help="A shipped recipe or a YAML file, instead of --method.")
@click.option("--ratio", type=float, help="Dense parameters / compressed parameters, whole model, above 1.")
@click.option("--size", metavar="SIZE", help="Instead of --ratio: the weight file's size, e.g. 5MB (10^6 bytes).")
@click.option("--allocation", type=click.Choice(["uniform", "error"]), help="Same ratio for all, or least error.")
@click.option(
    "--objective",
    type=click.Choice(["size", "latency"]),
    help="latency: of equally small plans the fastest by estimate.",
)
@click.option(
    "--calibration",
    is_flag=False,
    flag_value=EMBEDDED,
    metavar="[FILE|HUB_ID]",
    help="Keep outputs on this text, not weights. Alone: on the embedded text.",
)
@click.option(
    "--calibration-task", metavar="NAME|FILE", help="Instead: on this task's training rows, for a fine-tuned model."
)
@click.option("--data", metavar="DIR", help="Folder with the task's files. Default: the hub.")
@click.option("--allow-slow", is_flag=True, help="Also offer shapes above 1.1 x the dense FLOPs.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write. Default: <model>-<method>-<ratio>x.")
@click.option("--overwrite", is_flag=True, help="Replace an output that compresskit wrote.")
@click.option("--dry-run", is_flag=True, help="Show the plan and its totals, write nothing.")
def compress(
    model: str | None,
    as_class: str | None,
    seed: int,
    threads: int | None,
    device: str,
    method: str | None,
    recipe: str | None,
    ratio: float | None,
    size: str | None,
    allocation: Any,
    objective: Any,
    calibration: str | None,
    calibration_task: str | None,
    data: str | None,
    allow_slow: bool,
    output: Path | None,
    overwrite: bool,
    dry_run: bool,
    **_: Any,
) -> None:
    """Compress a checkpoint into a folder that transformers loads."""
    if ratio is not None and size is not None:
        raise InputError("give --ratio or --size, not both")
    size_bytes = None if size is None else parse_size(size)
    prepare(seed, threads, device)
    from compresskit.api import choose_recipe, find_calibration, find_statistics
    from compresskit.folders.compressed import write_compressed
    from compresskit.model import checkpoint as checkpoints
    from compresskit.model import output as outputs
    from compresskit.model.sources import ModelSource
    from compresskit.planning.apply import apply_plan
    from compresskit.planning.planner import make_plan
    from compresskit.tasks.rows import TaskData

    def chosen(at_ratio: float | None) -> Recipe:
        options = {"allocation": allocation, "objective": objective, "allow_slow": allow_slow}
        calibrated = calibration is not None or calibration_task is not None
        return choose_recipe(method=method, recipe=recipe, ratio=at_ratio, calibrated=calibrated, **options)

    # What needs no model is refused before one is read; a size becomes a ratio once the model is known.
    asked = chosen(2.0 if size is not None else ratio)
    text = find_calibration(calibration, calibration_task, data)
    if output is not None and not dry_run:
        outputs.check_output(output, overwrite)
    with reading(model):
        dense = checkpoints.read(model, as_class, device)
    if size_bytes is not None:
        asked = chosen(_ratio_of_size(dense, size_bytes))
    source = ModelSource(dense.model)
    if dry_run:
        with progress_bar() as progress:
            statistics = find_statistics(dense, asked, text, progress=progress)
            plan = make_plan(dense.model, asked, source, statistics=statistics, predict_errors=True, progress=progress)
        show(dense, plan)
        out.print("Dry run: nothing written.")
        return
    suffix = size.strip() if size else f"{asked.ratio:.4g}x" if asked.ratio else ""
    folder = output or Path("-".join(part for part in (dense.name, asked.name, suffix) if part))
    outputs.check_output(folder, overwrite)
    with progress_bar() as progress:
        statistics = find_statistics(dense, asked, text, progress=progress)
        plan = make_plan(dense.model, asked, source, statistics=statistics, progress=progress)
    with outputs.output_folder(folder, overwrite) as temporary:
        with progress_bar() as progress:
            plan = apply_plan(dense.model, plan, progress, statistics=statistics)
        megabytes = write_compressed(dense, plan, temporary, folder.name)
    show(dense, plan, megabytes)
    out.print(f"Written to {folder}/ (weights, tokenizer, recipe.yaml, compression.json, model card)", markup=False)
    if calibration_task is None:
        lesson = ["--text", "FILE", "--output", f"{folder}-general"]
    else:
        lesson = ["--task", calibration_task, *(["--data", data] if data is not None else [])]
        lesson += ["--output", f"{folder}-{Path(calibration_task).stem}"]
    teacher = model if not isinstance(text, TaskData) or _predicts(dense, text) else "TASK_TEACHER"
    following = [*(["--teacher", teacher] if teacher else []), "--student", str(folder), *lesson]
    load = f"import compresskit; model = compresskit.load({json.dumps(str(folder), ensure_ascii=False)})"
    methods = {assignment.method for assignment in plan.assignments}
    out.print(
        # Not for Kronecker products, which lose by it (docs/results.md).
        (
            "Nearer to the original at the same size: --calibration\n"
            if not asked.calibration_tokens and methods != {"kronecker"}
            else ""
        )
        + f"Next: a one-shot {plan.ratio:.3g}x student needs distilling before it is useful:\n"
        f"  compresskit distill {shlex.join(following)}\n"
        f"Load it:\n  python -c {shlex.quote(load)}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _predicts(dense: Checkpoint, rows: TaskData) -> bool:
    """Whether the model can teach the task."""
    from compresskit.calibration.sensitivity import NoPredictionsError, check_predicts

    try:
        check_predicts(dense.model, rows, dense.untrained)
    except NoPredictionsError:
        return False
    return True


@click.command()
@common
def inspect(model: str | None, as_class: str | None, seed: int, threads: int | None, device: str, **_: Any) -> None:
    """Show every matrix: role, shape, share of the model, and how compressible it is."""
    prepare(seed, threads, device)

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
    from compresskit.decomposers.base import AUTO
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


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5MB``, ``500kB`` or ``0.2GB`` (powers of ten). Raises InputError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(kB|MB|GB)\s*", text, flags=re.IGNORECASE)
    if match is None:
        raise InputError(f"size {text!r}: give a number with kB, MB or GB, such as 5MB")
    return int(float(match[1]) * {"kb": 1e3, "mb": 1e6, "gb": 1e9}[match[2].lower()])


def _ratio_of_size(dense: Checkpoint, size: int) -> float:
    """The ratio that makes the weight file at most ``size`` bytes; its header and kept tensors are allowed for."""
    from compresskit.model.targets import count_parameters

    tensors = [*dense.model.state_dict().items(), *dense.kept.items()]
    # A factorised matrix has two tensors in the file; one entry of the header takes about 80 bytes and the name.
    header = 256 + sum(2 * (len(name) + 80) for name, _ in tensors)
    kept = sum(tensor.nbytes for tensor in dense.kept.values())
    total = sum(parameter.nbytes for parameter in dense.model.parameters())
    parameters = count_parameters(dense.model)
    room = (size - header - kept) / (total / parameters)
    if room <= 0 or parameters / room <= 1:
        what = "too small for its header alone" if room <= 0 else f"not below the dense model's {total / 1e6:.1f} MB"
        raise InputError(f"size {size / 1e6:g} MB: {what}")
    return parameters / room


def show(dense: Checkpoint, plan: Plan, megabytes: tuple[float, float] | None = None) -> None:
    """The plan's two tables and its notes."""
    from compresskit.cli.tables import plan_table, totals_table

    out.print(plan_table(plan))
    out.print(totals_table(plan, megabytes))
    print_notes((*dense.notes, *plan.notes))
