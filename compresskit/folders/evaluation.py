"""The folder of ``evaluate --report``: the scores in parts, as data, as a page and as pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compresskit import __version__
from compresskit.markup import markdown, plain
from compresskit.model.output import REPORT, output_folder
from compresskit.tasks.reports import Report, Rows

FORMAT_VERSION = 1
#: Classes whose counts are written into the picture: more of them leave no room.
_NUMBERED = 20


def write_report(record: Mapping[str, Any], reports: Mapping[str, Report], folder: Path, *, overwrite: bool) -> None:
    """Write ``report.json``, ``README.md`` and a picture for each split with a confusion of classes.

    Args:
        record: of :func:`compresskit.evaluate`, with its ``report``.
        reports: of each split.
        folder: to write; complete or not there.
        overwrite: replace a folder that compresskit wrote.

    Raises:
        InputError: the folder exists, or cannot be written.
    """
    with output_folder(folder, overwrite) as temporary:
        data = {"format_version": FORMAT_VERSION, "compresskit": __version__, **record}
        (temporary / REPORT).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        pictures = {}
        for split, report in reports.items():
            if report.confusion is not None:
                pictures[split] = f"confusion-{split}.png"
                _picture(report, temporary / pictures[split])
        (temporary / "README.md").write_text("\n".join(_page(record, reports, pictures)), encoding="utf-8")


def table_of(rows: Rows) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a table as text: whole numbers as they are, others with four digits behind the point."""
    columns = tuple(dict.fromkeys(name for values in rows.values() for name in values))
    cells = [
        (name, *("" if column not in values else _cell(values[column]) for column in columns))
        for name, values in rows.items()
    ]
    return ("", *columns), cells


def _cell(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _page(record: Mapping[str, Any], reports: Mapping[str, Report], pictures: Mapping[str, str]) -> Iterator[str]:
    yield f"# {plain(str(record['model']))} on {plain(str(record['task']))}\n"
    for split, report in reports.items():
        data = record["data"][split]
        yield f"## {plain(split)}\n\n{data['rows']:,} rows of {plain(str(data['source']))}\n"
        scores = [(plain(name), f"{value:.4f}") for name, value in record["scores"][split].items()]
        yield markdown(("metric", "score"), scores) + "\n"
        for title, rows in report.tables.items():
            columns, cells = table_of(rows)
            yield f"### {title}\n\n" + markdown(columns, [[plain(cell) for cell in row] for row in cells]) + "\n"
        if split in pictures:
            yield f"### Confusion of classes\n\n![true classes by row, predicted ones by column]({pictures[split]})\n"
    for note in record["notes"]:
        yield f"Note: {plain(note)}\n"


def _picture(report: Report, path: Path) -> None:
    """For each true class (row) the share that was taken for each class (column)."""
    from matplotlib.figure import Figure

    counts, classes = np.array(report.confusion), report.classes
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = min(3 + 0.5 * len(classes), 20)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [name.replace("$", r"\$") for name in classes]
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="true")
    if len(classes) <= _NUMBERED:
        for row, column in np.ndindex(*counts.shape):
            dark = shares[row, column] > 0.5
            axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color="w" if dark else "k")
    figure.colorbar(image, label="share of the true class")
    figure.savefig(path, dpi=120)
