"""A plan as rows of text, for every table of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

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
    removed = plan.untrimmed.removed if plan.untrimmed is not None else 0
    dense_before = plan.parameters_before - removed - sum(a.group.parameters for a in plan.assignments)
    dense_after = plan.parameters_after - sum(a.parameters for a in plan.assignments)
    zeros = ["0"] * (len(plan_columns(plan)) - len(_COLUMNS) + 1)
    return [*rows, ("the rest", "", "", "dense", "", f"{dense_before:,}", f"{dense_after:,}", "1.0x", *zeros)]


def _mean(errors: Sequence[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{sum(known) / len(known):.3f}" if known else "-"


def two_factors(plan: Plan) -> str:
    """How much smaller trimming and factors make a model, each by itself and together; empty if nothing was trimmed."""
    if plan.untrimmed is None:
        return ""
    by_factors = plan.untrimmed.parameters_left / plan.parameters_after
    return (
        f"{plan.ratio:.2f}x smaller: {plan.untrimmed.smaller:.2f}x by the vocabulary ({plan.untrimmed.rows:,} to "
        f"{plan.untrimmed.rows_left:,} rows), {by_factors:.2f}x by factors"
    )


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
    if plan.untrimmed is not None:
        whole, left = plan.untrimmed.parameters, plan.untrimmed.parameters_left
        tokens = f"{plan.untrimmed.rows:,} to {plan.untrimmed.rows_left:,} rows"
        rows = [
            (f"by the vocabulary, {tokens}", f"{whole:,}", f"{left:,}", f"{whole / left:.2f}x smaller"),
            ("by factors", f"{left:,}", f"{plan.parameters_after:,}", f"{left / plan.parameters_after:.2f}x smaller"),
            *rows,
        ]
    if megabytes is not None:
        rows.append(("MB", f"{megabytes[0]:.2f}", f"{megabytes[1]:.2f}", f"{megabytes[0] / megabytes[1]:.2f}x smaller"))
    for what, old, new in (
        ("FLOPs, whole model", before.total, after.total),
        ("FLOPs, linear layers", before.linear, after.linear),
    ):
        rows.append((what, f"{old / 1e9:.3f} G", f"{new / 1e9:.3f} G", f"{old / new:.2f}x fewer"))
    return rows
