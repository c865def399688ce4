"""The tables of a benchmark: rows methods, columns ratios; then everything. Data frames in, Markdown and LaTeX out.

The frame has one row per cell, as ``results.csv`` holds it; :func:`by_seed` makes one row of the seeds of a cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from compresskit.markup import markdown, plain
from compresskit.scores import share_kept

NOT_KNOWN = "N/A"
_GROUP = ["model", "task", "method", "kind", "ratio_asked"]


@dataclass(frozen=True)
class Column:
    """A column of the full table, here and on the page.

    Attributes:
        title: with an arrow where one way is better.
        name: in the frame.
        digits: decimals.
        help: what it means.
        factor: the frame's value times this is shown.
        unit: after the number.
        over_tasks: whether all tasks together show the mean over tasks; otherwise they show the first task's value.
    """

    title: str
    name: str
    digits: int
    help: str
    factor: float = 1.0
    unit: str = ""
    over_tasks: bool = False

    def text(self, value: Any, *, unit: bool = True) -> str:
        """The value as the table shows it."""
        return NOT_KNOWN if pd.isna(value) else f"{value * self.factor:,.{self.digits}f}" + self.unit * unit


COLUMNS = (
    Column("kept ↑", "score_kept", 1, "score / the teacher's, %", 100),
    Column("ratio ↑", "ratio", 2, "dense parameters / parameters", unit="x", over_tasks=True),
    Column("parameters ↓", "parameters", 0, "tied ones once"),
    Column("MB ↓", "megabytes", 2, "10^6 bytes of weight files"),
    Column("GFLOPs ↓", "flops", 3, "2 x multiply-adds, one sequence of 128 tokens", 1e-9),
    Column("ms ↓", "latency_ms", 1, "one sequence, median"),
    Column("speedup ↑", "speedup", 2, "over the dense model in the same phase, batch 1", unit="x"),
    Column("speedup, batch 32 ↑", "speedup_batch32", 2, "over the dense model in the same phase, batch 32", unit="x"),
    Column("peak MB ↓", "peak_memory_mb", 0, "memory added by the model and a pass of batch 32"),
    Column("compress s ↓", "seconds_compress", 1, "seconds to calibrate, plan and factorise"),
    Column("distill s", "seconds_distill", 0, "seconds of training", over_tasks=True),
    Column("error ↓", "error", 3, "relative Frobenius norm before training"),
    Column("before", "score_before", 2, "score before training, %", 100, over_tasks=True),
    Column("score ↑", "score", 2, "after training, %", 100, over_tasks=True),
    Column("asymmetric ↑", "score_asymmetric", 2, "score where the dense model embeds the documents, %", 100),
    Column("retrieval ↑", "retrieval", 2, "passages whose nearest other one is of the same document, %", 100),
    Column("hidden error ↓", "hidden_error", 3, "relative Frobenius norm of the hidden states"),
)

#: Figures that no column shows by itself.
_BESIDE = ("latency_spread", "latency_ms_batch32", "score_teacher", "chance")
#: Marks of the full table for what nothing beats in what is kept and another figure: column of the table -> the other
#: figure, whether more of it is better, and whether exports take part.
_FRONTS = {
    "pareto": ("ratio", True, False),
    "pareto_mb": ("megabytes", False, True),
    "pareto_ms": ("latency_ms", False, True),
}
_MARKS = {"pareto": "●", "pareto_mb": "MB", "pareto_ms": "ms"}
#: Shares that must be kept, for :func:`winners`.
_LEAST = (0.99, 0.95, 0.9, 0.75, 0.5)

#: What is the mean over the seeds of a cell.
_MEANS = (*(column.name for column in COLUMNS), *_BESIDE)


def by_seed(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per (model, task, method, ratio): means over the seeds that finished, ``kept_spread`` (standard
    deviation; NaN for one seed), ``seeds`` (finished) of ``asked``, ``status`` and the first ``message``, of what
    failed if something did.

    ``pareto`` marks rows to which no other of the same model and task is at least equal in ratio and kept and better
    in one, ``pareto_mb`` and ``pareto_ms`` the same by MB of files and by milliseconds; ``best`` the highest kept of
    the students at one asked ratio. An export has the parameters of its model: it takes part by MB and milliseconds.
    """
    rows = []
    for group, cells in frame.groupby(_GROUP, dropna=False, sort=False):
        finished = cells[cells["status"] == "finished"]
        means = {name: pd.to_numeric(finished[name]).mean() for name in _MEANS if name in cells and len(finished)}
        spread = pd.to_numeric(finished["score_kept"]).std() if len(finished) > 1 else np.nan
        bad, lost = cells[cells["status"] != "finished"], _without_export(frame, cells)
        bad = lost if bad.empty else bad
        status = "finished" if bad.empty else bad["status"].iloc[0] if finished.empty else "finished in part"
        message = next((text for text in (cells if bad.empty else bad)["message"] if text), "")
        row = dict(zip(_GROUP, group, strict=True)) | means
        counts = {"seeds": len(finished), "asked": len(cells) + len(lost)}
        rows.append(row | counts | {"kept_spread": spread, "status": status, "message": message})
    table = pd.DataFrame(rows).reindex(columns=[*_GROUP, *_MEANS, "kept_spread", "seeds", "asked", "status", "message"])
    table[[*_FRONTS, "best"]] = False
    for _, cells in table.groupby(["model", "task"], sort=False):
        for name, (figure, more, exports) in _FRONTS.items():
            taking_part = cells if exports else cells[cells["kind"] != "export"]
            values = taking_part[figure] if more else -taking_part[figure]
            table.loc[pareto(values, taking_part["score_kept"]), name] = True
        students = cells[(cells["kind"] == "student") & cells["score_kept"].notna()]
        for _, same in students.groupby("ratio_asked"):
            table.loc[same["score_kept"].idxmax(), "best"] = True
    return table


def _without_export(frame: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """Of the cells whose exports ``cells`` are those that failed, so that they have none; none of what is no export."""
    first = cells.iloc[0]
    of = (frame["method"] == str(first["method"]).rpartition(" ")[0]) & ~frame["seed"].isin(cells["seed"])
    for name in ("model", "task", "ratio_asked"):
        of &= frame[name].isna() if pd.isna(first[name]) else frame[name] == first[name]
    return frame[of & (frame["status"] != "finished")] if first["kind"] == "export" else frame.iloc[:0]


def pareto(first: pd.Series, second: pd.Series) -> list[Any]:
    """Index labels of the points to which no other is at least equal in both (higher is better) and better in one."""
    found = []
    points = pd.DataFrame({"x": first, "y": second}).dropna()
    for label, point in points.iterrows():
        reach = (points["x"] >= point["x"]) & (points["y"] >= point["y"])
        ahead = reach & ((points["x"] > point["x"]) | (points["y"] > point["y"]))
        if not ahead.any():
            found.append(label)
    return found


def over_tasks(frame: pd.DataFrame) -> pd.DataFrame:
    """Cells whose score is the mean over all tasks, of those that finished every task: kept is the mean of the scores
    over the mean of the teacher's, and N/A with a message where the teacher scores 0 or below on a task: such a score
    would take away from both sums. A task that has no such seed gives the mean over its finished seeds.
    """
    figures = [*(column.name for column in COLUMNS if column.over_tasks), "score_teacher"]
    seeds = {row: set(cells["seed"]) for row, cells in frame.groupby(["task", "method"])}  # methods may have their own
    rows = []
    for _, cells in frame.groupby(["model", "method", "kind", "ratio_asked"], dropna=False, sort=False):
        names = [cells["method"].iloc[0]]
        names += [names[0].rpartition(" ")[0]] if cells["kind"].iloc[0] == "export" else []  # those whose export failed
        own = {task: {seed for name in names for seed in seeds.get((task, name), ())} for task in set(cells["task"])}
        # A teacher has one seed for each task, whichever it is.
        several = cells["kind"].iloc[0] == "student" or cells.groupby("task")["seed"].nunique().max() > 1
        # One for each seed of the task that has most of them: where seeds differ, more would count some cells twice.
        most = max((of_task["seed"].unique() for _, of_task in cells.groupby("task", sort=False)), key=len)
        for seed in most if several else most[:1]:
            mine = [
                _finished(of_task) if not several or seed not in own[task] else of_task[of_task["seed"] == seed]
                for task, of_task in cells.groupby("task", sort=False)
            ]
            chosen = pd.concat(mine)
            row = chosen.iloc[0].to_dict() | {"task": "all tasks", "metric": "mean over tasks", "seed": seed}
            whole = chosen["task"].nunique() == frame["task"].nunique() and (chosen["status"] == "finished").all()
            row["score_asymmetric"] = np.nan  # not every task has one
            numbers = chosen[[*figures, "score_kept"]].apply(pd.to_numeric).groupby(chosen["task"]).mean()
            for name in figures:
                row[name] = numbers[name].mean() if whole else np.nan
            row["score_kept"] = share_kept(row["score"], row["score_teacher"]) if whole else np.nan
            silent = [task for task, of_task in numbers.iterrows() if pd.isna(of_task["score_kept"])]
            if whole and silent:
                row["score_kept"] = np.nan
                row["message"] = (
                    f"kept is {NOT_KNOWN}, since the teacher scores 0 or below on {', '.join(map(str, silent))}"
                )
            if not whole:
                bad = chosen[chosen["status"] != "finished"]
                row["status"], row["message"] = ("not run", "a task is missing")
                if not bad.empty:
                    row["status"], row["message"] = bad[["status", "message"]].iloc[0]
            rows.append(row)
    return pd.DataFrame(rows)


def _finished(cells: pd.DataFrame) -> pd.DataFrame:
    """The finished ones; all where none is."""
    found = cells[cells["status"] == "finished"]
    return cells if found.empty else found


def summary(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of kept for one model and task of :func:`by_seed`: rows methods, columns the asked ratios, and
    one for what has a ratio of its own (baselines, recipes with explicit shapes).
    """
    ratios = sorted(table["ratio_asked"].dropna().unique())
    own = table["ratio_asked"].isna().any()
    columns = ["kept ↑", *(f"{ratio:g}x" for ratio in ratios), *(["own ratio"] if own else [])]
    rows = []
    for method, cells in table.groupby("method", sort=False):
        by_ratio = {row["ratio_asked"]: row for _, row in cells.iterrows()}
        row = [str(method), *(_kept(by_ratio.get(ratio)) for ratio in ratios)]
        if own:
            alone = cells[cells["ratio_asked"].isna()]
            row.append("" if alone.empty else _kept(alone.iloc[0], own=True))
        rows.append(row)
    return columns, rows


def _kept(row: Any, *, own: bool = False) -> str:
    if row is None:
        return ""
    if pd.isna(row["score_kept"]):
        return str(row["status"]) if row["status"] != "finished" else NOT_KNOWN
    spread = f" ± {100 * row['kept_spread']:.1f}" if pd.notna(row["kept_spread"]) else ""
    part = f" ({row['seeds']} of {row['asked']} seeds)" if row["status"] == "finished in part" else ""
    text = f"{100 * row['score_kept']:.1f}{spread} %{part}"
    text = f"**{text}**" if row["best"] else text
    # What has another size than its column says so.
    off = own or (pd.notna(row["ratio_asked"]) and not 0.99 <= row["ratio"] / row["ratio_asked"] <= 1.02)
    return text + (f" at {row['ratio']:.3g}x" if off else "")


def winners(table: pd.DataFrame) -> str:
    """Which row has the smallest file and which is the fastest, where so much must be kept: one sentence, of every row
    of one model and task of :func:`by_seed`; empty where nothing is known.
    """
    parts: list[str] = []
    before = ("", "")
    for least in _LEAST:
        enough = table[table["score_kept"] >= least]
        found = (_first(enough, "megabytes", 2, "MB"), _first(enough, "latency_ms", 1, "ms"))
        if found != before and any(found):
            small, fast = found
            if not parts:  # the later ones go without these words
                small, fast = (small and f"the smallest file is that of {small}"), (fast and f"the fastest is {fast}")
            parts.append(f"{100 * least:g} %: {' and '.join(filter(None, (small, fast)))}")
        before = found
    return f"Of what keeps at least {'; '.join(parts)}." if parts else ""


def _first(rows: pd.DataFrame, figure: str, digits: int, unit: str) -> str:
    """The row with the least of a figure, which it names; empty: none has one."""
    values = pd.to_numeric(rows[figure]).dropna()
    if values.empty:
        return ""
    return f"{row_name(rows.loc[values.idxmin()])} ({values.min():.{digits}f} {unit})"


def row_name(row: Any) -> str:
    """Method and asked ratio, as sentences name a row."""
    return str(row["method"]) + (f" {row['ratio_asked']:g}x" if pd.notna(row["ratio_asked"]) else "")


def used_columns(tables: Iterable[pd.DataFrame]) -> list[Column]:
    """The columns in which some table has a value."""
    tables = list(tables)
    return [column for column in COLUMNS if any(table[column.name].notna().any() for table in tables)]


def full(table: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of everything, for one model and task of :func:`by_seed`; columns that nobody has are left out.

    The marks ●, MB and ms stand for Pareto-optimal in kept and ratio, MB, milliseconds; the best student of an asked
    ratio is bold.
    """
    used = used_columns([table])
    columns = ["method", "asked", *(column.title for column in used), ""]
    rows = []
    for _, row in table.iterrows():
        asked = f"{row['ratio_asked']:g}x" if pd.notna(row["ratio_asked"]) else "-"
        mark = " ".join(mark for name, mark in _MARKS.items() if row[name])
        mark = mark if row["status"] == "finished" else str(row["status"])
        rows.append([str(row["method"]), asked, *(_cell(row, column) for column in used), mark])
    return columns, rows


def _cell(row: Any, column: Column) -> str:
    value = row[column.name]
    if column.name == "score_kept" and pd.notna(value):
        return _kept(row).partition(" at ")[0]
    if column.name == "latency_ms" and pd.notna(row["latency_spread"]):
        return f"{value:.1f} ± {row['latency_spread'] / 2:.1f}"
    return column.text(value)


def problems(table: pd.DataFrame) -> list[str]:
    """One line per cell without a result, and one for the reason why kept is not known where all have results."""
    bad = table[table["message"] != ""]
    finished = bad["status"] == "finished"
    reasons = dict.fromkeys(f"{row['task']}: {row['message']}" for _, row in bad[finished].iterrows())
    return [*reasons] + [
        row_name(row) + (f", {row['task']}" if row["task"] else "") + f": {row['status']}: {row['message']}"
        for _, row in bad[~finished].iterrows()
    ]  # fmt: skip


def sections(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(title, :func:`by_seed` table) for every model and task, all tasks together first."""
    whole = by_seed(frame)
    tasks = list(dict.fromkeys(frame["task"]))
    several = frame["model"].nunique() > 1
    found = []
    for model in dict.fromkeys(frame["model"]):
        prefix = f"{model}: " if several else ""
        if len(tasks) > 1:
            found.append((f"{prefix}all tasks", by_seed(over_tasks(frame[frame["model"] == model]))))
        for task in tasks:
            mine = whole[(whole["model"] == model) & (whole["task"] == task)]
            found.append((f"{prefix}{task}" if task else f"{prefix}without labels", mine))
    return found


def latex(table: pd.DataFrame) -> str:
    """The full table for one model and task, for the package booktabs."""
    columns, rows = full(table)
    plain = [[cell.replace("**", "").replace("●", "*") for cell in row] for row in rows]
    titles = [title.replace(" ↑", "").replace(" ↓", "") for title in columns]
    made = pd.DataFrame(plain, columns=titles)
    return str(made.to_latex(index=False, escape=True, column_format="ll" + "r" * (len(titles) - 3) + "l"))


def summary_markdown(found: Sequence[tuple[str, pd.DataFrame]]) -> str:
    """The tables of kept under their titles, each with a sentence on what is smallest and fastest."""
    parts = []
    for title, table in found:
        parts += ([f"**{title}**", ""] if len(found) > 1 else []) + [markdown(*summary(table)), ""]
        parts += [plain(sentence), ""] if (sentence := winners(table)) else []
    return "\n".join(parts).rstrip()
