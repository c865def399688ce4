"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from compresskit.planning.planner import Plan
from compresskit.planning.summary import plan_columns, plan_rows, total_rows


def plan_table(plan: Plan) -> Table:
    """The plan, group by group."""
    caption = "error: ||W - W'|| / ||W||, mean over the matrices"
    if plan.calibration is not None:
        caption += f"; output error: ||(W - W') X|| / ||W X|| on {plan.calibration['tokens']:,} tokens X of calibration"
        if any(assignment.error is not None and assignment.error >= 1 for assignment in plan.assignments):
            caption += (
                ". Calibrated factors keep outputs and not weights, so that an error above 1 is no fault: the output "
                "error counts"
            )
    return table(plan_columns(plan), plan_rows(plan), left=(0, 3, 4), caption=caption)


def totals_table(plan: Plan, megabytes: tuple[float, float] | None = None) -> Table:
    """The totals, before and after."""
    return table(
        ("total", "before", "after", "ratio"),
        total_rows(plan, megabytes),
        left=(0, 3),
        caption="MB = 10^6 bytes; FLOPs = 2 x multiply-adds, one sequence of 128 tokens, or all that the model takes",
    )


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int],
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """A table with the columns ``left`` aligned left, the others right. Long cells fold, nothing is cut off. Above it
    stands the ``title``, which says what it is of, below it the ``caption``, which explains its columns.
    """
    made = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, name in enumerate(columns):
        made.add_column(name, justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made
