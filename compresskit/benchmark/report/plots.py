"""The pictures of a benchmark: kept against ratio, speed-up, MB and milliseconds; error per matrix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from compresskit.benchmark.report.comparison import pareto
from compresskit.decomposers import AUTO
from compresskit.decomposers.registry import METHODS

#: Okabe and Ito's colours, which most eyes tell apart; baselines are grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
#: Baselines have markers that no method has.
GREY, GREY_MARKERS = "#6b7280", ("*", "p", "h", "<", ">", "d", "8", "H")
#: What files and models are compared by, every row of a table taking part: figure, mark of its Pareto front, label.
FRONTS = (("megabytes", "pareto_mb", "MB of files"), ("latency_ms", "pareto_ms", "ms, one sequence"))


def styles(table: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Colour and marker of every method, the same in every report for registered ones; baselines grey."""
    students = dict.fromkeys(table[table["kind"] == "student"]["method"])
    everyone = dict.fromkeys([*sorted(METHODS.all()), AUTO, *students])
    looks = {name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(everyone)}
    found = {name: looks[name] for name in students}
    for i, name in enumerate(dict.fromkeys(table[table["kind"] == "baseline"]["method"])):
        found[name] = (GREY, GREY_MARKERS[i % len(GREY_MARKERS)])
    return found


def draw(found: Sequence[tuple[str, pd.DataFrame]], errors: pd.DataFrame, folder: Path) -> list[tuple[str, str]]:
    """Write the pictures; returns (file name, what it shows) of those that there was something to draw for."""
    made = []
    slugs: list[str] = []
    for title, cells in found:
        table = cells[cells["kind"] != "export"]  # the same models once more
        slug = "".join(c if c.isalnum() else "-" for c in title.lower()).strip("-")
        slug += f"-{len(slugs)}" * (slug in slugs)  # tasks a.b and a-b have a picture each
        slugs.append(slug)
        if table["score_kept"].notna().any():
            _kept_against_ratio(title, table).savefig(folder / f"kept-{slug}.png", dpi=140)
            made.append((f"kept-{slug}.png", f"kept against ratio, {title}"))
        if table["speedup"].notna().any():
            _kept_against_speed(title, table).savefig(folder / f"speed-{slug}.png", dpi=140)
            made.append((f"speed-{slug}.png", f"kept against speed-up, {title}"))
        if cells["score_kept"].notna().any() and cells["latency_ms"].notna().any():
            _fronts(title, cells).savefig(folder / f"fronts-{slug}.png", dpi=140)
            made.append((f"fronts-{slug}.png", f"kept against MB and against milliseconds, {title}"))
    if not errors.empty:
        _errors(errors, styles(found[0][1])).savefig(folder / "errors.png", dpi=140)
        made.append(("errors.png", "error of every matrix before training"))
    return made


def _axes(title: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    return figure, axes


def _kept_against_ratio(title: str, table: pd.DataFrame) -> Figure:
    figure, axes = _axes(f"Quality kept, {title}")
    for method, (colour, marker) in styles(table).items():
        rows = table[(table["method"] == method) & table["score_kept"].notna()].sort_values("ratio")
        if rows.empty:
            continue
        student = rows["kind"].iloc[0] == "student"
        axes.errorbar(
            rows["ratio"],
            100 * rows["score_kept"],
            yerr=100 * rows["kept_spread"].fillna(0) if rows["kept_spread"].notna().any() else None,
            color=colour,
            marker=marker,
            linestyle="-" if student else "none",
            capsize=3,
            label=method,
        )
    axes.set(xscale="log", xlabel="times smaller (parameters)", ylabel="kept, % of the teacher's score")
    ticks = sorted({1.0, *table["ratio_asked"].dropna()})
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:g}x" for tick in ticks])
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _kept_against_speed(title: str, table: pd.DataFrame) -> Figure:
    figure, axes = _axes(f"Quality kept and speed, batch 1, {title}")
    rows = table[table["score_kept"].notna() & table["speedup"].notna()]
    front = rows.loc[pareto(rows["speedup"], rows["score_kept"])].sort_values("speedup")
    axes.plot(front["speedup"], 100 * front["score_kept"], color="black", linewidth=1, alpha=0.4, label="Pareto front")
    for method, (colour, marker) in styles(table).items():
        mine = rows[rows["method"] == method]
        if mine.empty:
            continue
        axes.scatter(
            mine["speedup"], 100 * mine["score_kept"], color=colour, marker=marker, s=45, label=method, zorder=3
        )
        for _, row in mine.iterrows():
            label = f"{row['ratio']:.3g}x"
            at = (row["speedup"], 100 * row["score_kept"])
            axes.annotate(label, at, xytext=(5, 5), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xlabel="times faster than the dense model", ylabel="kept, % of the teacher's score")
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def _fronts(title: str, table: pd.DataFrame) -> Figure:
    """Kept against MB of files and against milliseconds, with every row."""
    figure = Figure(figsize=(9.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    style = styles(table)
    for axes, (x, mark, label) in zip(panels, FRONTS, strict=True):
        front = table[table[mark]].sort_values(x)
        axes.plot(front[x], 100 * front["score_kept"], color="black", linewidth=1, alpha=0.4, label="Pareto front")
        for method, rows in table[table["score_kept"].notna() & table[x].notna()].groupby("method", sort=False):
            exported = rows["kind"].iloc[0] == "export"
            colour, marker = style[torch_row(str(method), style) if exported else str(method)]
            face = "none" if exported else colour
            named = None if exported else str(method)
            axes.scatter(
                rows[x], 100 * rows["score_kept"], edgecolors=colour, facecolors=face, marker=marker, s=40, label=named,
                zorder=3,
            )  # fmt: skip
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    hollow = "; hollow: exports" if (table["kind"] == "export").any() else ""
    panels[0].set(ylabel="kept, % of the teacher's score")
    panels[0].set_title(f"Quality kept, {title}{hollow}", loc="left", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


def torch_row(method: str, names: Iterable[str]) -> str:
    """The row that an export is of: ``low-rank`` for ``low-rank onnx-int8``."""
    return max((name for name in names if method.startswith(f"{name} ")), key=len)


def _errors(errors: pd.DataFrame, style: Mapping[str, tuple[str, str]]) -> Figure:
    """One panel per ratio; columns ``method, ratio_asked, name, role, error``, matrices in the model's order."""
    ratios = list(errors.groupby("ratio_asked", dropna=False, sort=True))
    figure = Figure(figsize=(9, 1.2 + 2.1 * len(ratios)), layout="constrained")
    panels = figure.subplots(len(ratios), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    names = list(dict.fromkeys(errors["name"]))
    for axes, (ratio, rows) in zip(panels, ratios, strict=True):
        for method, cells in rows.groupby("method", sort=False):
            colour, marker = style.get(str(method), (GREY, "o"))
            places = [names.index(name) for name in cells["name"]]
            axes.plot(places, cells["error"], color=colour, marker=marker, markersize=3, linewidth=0.8, label=method)
        title = "explicit shapes" if pd.isna(ratio) else f"{float(str(ratio)):g}x"
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel("error")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("matrix or group of matrices, in the model's order")
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False)
    return figure
