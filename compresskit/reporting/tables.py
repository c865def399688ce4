"""Rich tables for the terminal, and the same rows for Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from rich.table import Table

from compresskit.planning.planner import Assignment, Plan

_COLUMNS = ("role", "matrices", "shape", "method", "factors", "parameters", "after", "smaller", "error")


def plan_columns(plan: Plan) -> tuple[str, ...]:
    """Names of the columns of :func:`plan_rows`."""
    return _COLUMNS if plan.calibration is None else (*_COLUMNS, "output error")


def plan_rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row per (role, shape, spec), equal ones together; errors are their mean. Columns: :func:`plan_columns`."""
    alike: dict[tuple[str, ...], list[Assignment]] = defaultdict(list)
    for a in plan.assignments:
        m, n = a.group.shape
        alike[a.group.role or "-", f"{m}x{n}", a.method, a.spec.describe()].append(a)
    rows = []
    for (role, shape, method, factors), members in alike.items():
        before = sum(a.group.parameters for a in members)
        after = sum(a.parameters for a in members)
        errors = [_mean([a.error for a in members])]
        if plan.calibration is not None:
            errors.append(_mean([a.output_error for a in members]))
        count = sum(len(a.group.targets) for a in members)
        sizes = (f"{before:,}", f"{after:,}", f"{before / after:.1f}x")
        rows.append((role, str(count), shape, method, factors, *sizes, *errors))
    dense_before = plan.parameters_before - sum(a.group.parameters for a in plan.assignments)
    dense_after = plan.parameters_after - sum(a.parameters for a in plan.assignments)
    zeros = ["0"] * (len(plan_columns(plan)) - len(_COLUMNS) + 1)
    return [*rows, ("the rest", "", "", "dense", "", f"{dense_before:,}", f"{dense_after:,}", "1.0x", *zeros)]


def _mean(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def total_rows(plan: Plan, megabytes: tuple[float, float] | None = None) -> list[tuple[str, str, str, str]]:
    """Totals as (what, before, after, ratio)."""
    asked = f"asked {plan.ratio_asked:g}x" if plan.ratio_asked is not None else "shapes given"
    before, after = plan.flops_before, plan.flops_after
    rows = [
        (
            "parameters",
            f"{plan.parameters_before:,}",
            f"{plan.parameters_after:,}",
            f"{plan.ratio:.2f}x smaller ({asked})",
        )
    ]
    if megabytes is not None:
        rows.append(("MB", f"{megabytes[0]:.2f}", f"{megabytes[1]:.2f}", f"{megabytes[0] / megabytes[1]:.2f}x smaller"))
    for what, old, new in (
        ("FLOPs, whole model", before.total, after.total),
        ("FLOPs, linear layers", before.linear, after.linear),
    ):
        rows.append((what, f"{old / 1e9:.3f} G", f"{new / 1e9:.3f} G", f"{old / new:.2f}x fewer"))
    return rows


def plan_table(plan: Plan) -> Table:
    """The plan, group by group."""
    caption = "error: ||W - W'|| / ||W||, mean over the matrices"
    if plan.calibration is not None:
        caption += f"; output error: ||(W - W') X|| / ||W X|| on {plan.calibration['tokens']:,} tokens X of calibration"
    return grid(plan_columns(plan), plan_rows(plan), left=(0, 3, 4), caption=caption)


def totals_table(plan: Plan, megabytes: tuple[float, float] | None = None) -> Table:
    """The totals, before and after."""
    return grid(
        ("total", "before", "after", "ratio"),
        total_rows(plan, megabytes),
        left=(0, 3),
        caption="MB = 10^6 bytes; FLOPs = 2 x multiply-adds, one sequence of 128 tokens",
    )


def grid(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int],
    caption: str | None = None,
) -> Table:
    """A table with the columns ``left`` aligned left, the others right. Long cells fold, nothing is cut off."""
    table = Table(caption=caption, caption_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
