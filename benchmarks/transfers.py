"""What a benchmark's students keep out of distribution: SST-2 to IMDb, MRPC to PAWS-Wiki, RTE to HANS.

Run: python benchmarks/transfers.py --report reports/glue-minilm --data OOD [--rows N] [--threads 1]
Needs the students that the benchmark left beside its records. Writes transfers.md and transfers.json into the report;
models that are in it already, scored on the same rows, are kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers

from compresskit.benchmark.cells import MODEL
from compresskit.benchmark.store import Store
from compresskit.data.tasks import TaskData, load_data, load_task
from compresskit.model import checkpoint
from compresskit.model.output import write_text
from compresskit.model.tokenizer import find_tokenizer
from compresskit.reporting.tables import markdown
from compresskit.training.evaluation import score

TRANSFERS = {"sst2": "imdb", "mrpc": "paws", "rte": "hans"}
_FIGURES = ("in_score", "in_teacher", "out_score", "out_teacher")


def read(task: str, folder: Path, rows: int | None) -> TaskData:
    """The transfer's rows, or some of them drawn with seed 0."""
    data = load_data(load_task(task), folder, train=False)
    for name, split in data.splits.items():
        if rows is not None and len(split) > rows:
            chosen = np.sort(np.random.default_rng(0).permutation(len(split))[:rows])
            data.splits[name] = split.take(chosen.tolist(), f"{rows:,} rows drawn with seed 0")
    return data


def measure(folder: Path, data: TaskData) -> float:
    """Accuracy of a model on the transfer."""
    model = checkpoint.read(folder, compressed=None)
    found = score(model.model.float(), find_tokenizer(None, model), data, data.task.max_length)
    return float(np.mean([values["accuracy"] for values in found.values()]))


def table(rows: list[dict[str, Any]]) -> str:
    """Kept in and out of distribution, means over seeds."""
    frame = pd.DataFrame(rows).groupby(["task", "transfer", "method", "asked"], sort=False, dropna=False)
    lines = []
    for (task, transfer, method, asked), seeds in frame[list(_FIGURES)].mean().iterrows():
        inside, outside = seeds["in_score"] / seeds["in_teacher"], seeds["out_score"] / seeds["out_teacher"]
        lines.append(
            [
                f"{task} to {transfer}", str(method), f"{asked:g}x" if pd.notna(asked) else "-",
                *(f"{100 * seeds[name]:.2f}" for name in ("in_score", "out_score")),
                *(f"{100 * kept:.1f} %" for kept in (inside, outside)), f"{100 * (outside - inside):+.1f}",
            ]
        )  # fmt: skip
    columns = ("transfer", "method", "asked", "accuracy inside", "accuracy outside", "kept inside", "kept outside", "points")
    return markdown(columns, lines)


def main() -> None:
    """Score every finished student of the tasks that have a transfer."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with imdb*, paws* and hans* files")
    parser.add_argument("--rows", type=int, help="of each transfer at most; default: all")
    parser.add_argument("--threads", type=int, help="default: all")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    output = options.report / "transfers.json"
    kept = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"data": {}, "rows": []}
    cells = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in Store(options.report).folder.glob("cells/*/record.json")}
    for task, transfer in TRANSFERS.items():
        data = read(transfer, options.data, options.rows)
        if kept["data"].get(transfer) != data.record():
            kept["rows"] = [row for row in kept["rows"] if row["transfer"] != transfer]
        kept["data"][transfer] = data.record()
        known = {row["key"] for row in kept["rows"] if row["transfer"] == transfer}
        mine = {folder: record for folder, record in cells.items() if record["task"] == task and record["status"] == "finished"}
        teacher = next(folder for folder, record in mine.items() if record["method"] == "dense")
        taught = None
        for folder, record in mine.items():
            if record["key"] in known or not (folder / MODEL).is_dir():
                continue
            taught = measure(teacher / MODEL, data) if taught is None else taught
            accuracy = {name: np.mean([values["accuracy"] for values in cells[where]["scores"].values()]) for name, where in (("in_score", folder), ("in_teacher", teacher))}
            row = {"key": record["key"], "task": task, "transfer": transfer, "method": record["method"], "asked": record["ratio_asked"], "seed": record["seed"], **accuracy, "out_score": measure(folder / MODEL, data), "out_teacher": taught}
            kept["rows"].append(row)
            write_text(output, json.dumps(kept, indent=1) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
