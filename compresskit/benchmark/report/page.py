"""The benchmark as a web page without a network: a table that sorts and filters, plots that answer the mouse."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from compresskit.benchmark.report.comparison import NOT_KNOWN, Column, pareto, row_name, used_columns
from compresskit.benchmark.report.plots import FRONTS, GREY, GREY_MARKERS, MARKERS, styles, torch_row

_SYMBOLS = dict(
    zip(MARKERS, ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"), strict=True)
) | dict(
    zip(
        GREY_MARKERS,
        ("star", "pentagon", "hexagon2", "triangle-left", "triangle-right", "diamond-tall", "octagon", "hexagon"),
        strict=True,
    )
)

#: Beside those of the report's table.
_ASKED = Column("asked", "ratio_asked", 0, "times smaller, as asked")
_SPREAD = Column("± kept", "kept_spread", 1, "standard deviation over the seeds, points", 100)


def page(
    title: str,
    found: Sequence[tuple[str, pd.DataFrame]],
    facts: Mapping[str, Any],
    version: str,
    script: str | None = None,
) -> str:
    """The page as text.

    Args:
        title: of the page.
        found: (title, table) of :func:`compresskit.benchmark.report.comparison.sections`.
        facts: what the report says beside its tables: ``lead``, ``quality`` and ``lines`` (name, text).
        version: of compresskit.
        script: Where the page finds the file of :func:`plotly_script`, as a link of the page. Default: the page holds
            the script itself, which is 4.8 MB.
    """
    used = [_ASKED, *used_columns(table for _, table in found)]
    used += [_SPREAD] if any(table[_SPREAD.name].notna().any() for _, table in found) else []
    rows = []
    for section, table in found:
        for _, row in table.iterrows():
            cells = [_cell(row[column.name], column) for column in used]
            marks = ("best " if row["best"] else "") + ("pareto" if row["pareto"] else "")
            rows.append({"section": section, "method": row["method"], "cells": cells, "class": marks, **_state(row)})
    plots = []
    for number, (section, table) in enumerate(found):
        figures = {"ratio": _against_ratio(table), "speed": _against_speed(table)}
        figures |= {x: _against_cost(table, x, mark, label) for x, mark, label in FRONTS}
        for name, figure in figures.items():
            if figure is not None:
                plots.append({"id": f"plot-{number}-{name}", "section": section, "json": _safe(figure.to_json())})
    folder = resources.files("compresskit.benchmark.report")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((folder / "page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        columns=[{"title": column.title, "help": column.help} for column in used],
        rows=rows,
        sections=[section for section, _ in found],
        plots=plots,
        choices=_safe(json.dumps({section: _choices(table) for section, table in found})),
        facts=facts,
        script=script,
        plotly=plotly_script() if script is None else "",
        version=version,
    )


def plotly_script() -> str:
    """The script that draws the plots: plotly.js, which several pages may share."""
    text: str = get_plotlyjs()
    return text


def _cell(value: Any, column: Column) -> dict[str, str]:
    if pd.isna(value):
        return {"value": "", "text": NOT_KNOWN}
    # An asked ratio is shown as it was asked.
    text = f"{value:g}" if column is _ASKED else column.text(value, unit=False)
    return {"value": repr(float(value) * column.factor), "text": text}


def _choices(table: pd.DataFrame) -> list[dict[str, Any]]:
    """What the sliders choose from: every row with a score; a figure that is not known is null."""

    def known(value: Any) -> float | None:
        return None if pd.isna(value) else float(value)

    found = []
    for _, row in table[table["score_kept"].notna()].iterrows():
        mb, ms = known(row["megabytes"]), known(row["latency_ms"])
        says = [f"keeps {100 * row['score_kept']:.1f} %"]
        says += [f"{mb:.2f} MB"] if mb is not None else []
        says += [f"{ms:.1f} ms"] if ms is not None else []
        found.append({"name": row_name(row), "kept": row["score_kept"], "mb": mb, "ms": ms, "says": ", ".join(says)})
    return found


def _state(row: Any) -> dict[str, Any]:
    return {"status": row["status"], "message": row["message"], "seeds": int(row["seeds"])}


def _safe(text: str | None) -> str:
    """JSON that cannot end the script element it stands in."""
    return (text or "").replace("<", "\\u003c")


def _against_ratio(table: pd.DataFrame) -> go.Figure | None:
    return _figure(table, "ratio", "times smaller (parameters)", "Quality kept by size", log=True)


def _against_speed(table: pd.DataFrame) -> go.Figure | None:
    return _figure(table, "speedup", "times faster than the dense model (batch 1)", "Quality kept by speed", log=False)


def _against_cost(table: pd.DataFrame, x: str, mark: str, label: str) -> go.Figure | None:
    """Exports take part, in open symbols."""
    rows = table[table[x].notna() & table["score_kept"].notna()]
    if rows.empty:
        return None
    figure, style = go.Figure(), styles(table)
    front = rows[rows[mark]].sort_values(x)
    _add_front(figure, front[x], front["score_kept"])
    for method, mine in rows.groupby("method", sort=False):
        exported = mine["kind"].iloc[0] == "export"
        colour, marker = style[torch_row(str(method), style) if exported else str(method)]
        figure.add_scatter(
            x=mine[x].tolist(),
            y=(100 * mine["score_kept"]).tolist(),
            mode="markers",
            name=html.escape(str(method)),
            marker={"color": colour, "symbol": _SYMBOLS[marker] + "-open" * exported, "size": 11},
            text=[_hover(row) for _, row in mine.iterrows()],
            hovertemplate="%{text}<extra></extra>",
        )
    _lay_out(figure, f"Quality kept by {label}", label, {"type": "log"})
    return figure


def _add_front(figure: go.Figure, x: pd.Series, kept: pd.Series) -> None:
    line = {"color": GREY, "width": 1, "dash": "dot"}
    figure.add_scatter(
        x=x.tolist(), y=(100 * kept).tolist(), mode="lines", line=line, name="Pareto front", hoverinfo="skip"
    )


def _figure(table: pd.DataFrame, x: str, label: str, title: str, *, log: bool) -> go.Figure | None:
    rows = table[table[x].notna() & table["score_kept"].notna() & (table["kind"] != "export")]
    if rows.empty:
        return None
    figure = go.Figure()
    if not log:
        front = rows.loc[pareto(rows[x], rows["score_kept"])].sort_values(x)
        _add_front(figure, front[x], front["score_kept"])
    for method, (colour, marker) in styles(table).items():
        mine = rows[rows["method"] == method].sort_values(x)
        if mine.empty:
            continue
        lines = log and mine["kind"].iloc[0] == "student"
        spread = (100 * mine["kept_spread"]).fillna(0)
        figure.add_scatter(
            x=mine[x].tolist(),
            y=(100 * mine["score_kept"]).tolist(),
            error_y={"type": "data", "array": spread.tolist(), "visible": bool(spread.any())},
            mode="lines+markers" if lines else "markers",
            name=html.escape(method),
            marker={"color": colour, "symbol": _SYMBOLS[marker], "size": 11},
            text=[_hover(row) for _, row in mine.iterrows()],
            hovertemplate="%{text}<extra></extra>",
        )
    ticks = sorted({1.0, *table["ratio_asked"].dropna()})
    axis = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}x" for tick in ticks]} if log else {}
    _lay_out(figure, title, label, axis)
    return figure


def _lay_out(figure: go.Figure, title: str, label: str, axis: Mapping[str, Any]) -> None:
    figure.update_layout(
        title={"text": title, "x": 0, "xref": "paper"},
        xaxis={"title": label, **axis},
        yaxis={"title": "kept, %"},
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 60, "r": 20, "t": 50, "b": 60},
        legend={"orientation": "h", "y": -0.22},
        height=430,
    )


def _hover(row: Any) -> str:
    method = html.escape(row["method"])  # plotly takes some HTML
    lines = [f"<b>{method}</b>, {row['ratio']:.2f}x smaller", f"kept {100 * row['score_kept']:.1f} %"]
    if pd.notna(row["speedup"]):
        lines.append(f"{row['speedup']:.2f}x faster ({row['latency_ms']:.1f} ms)")
    return "<br>".join([*lines, f"{row['parameters']:,.0f} parameters, {row['megabytes']:.2f} MB"])
