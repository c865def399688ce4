"""What a benchmark's students keep out of distribution: SST-2 to IMDb, MRPC to PAWS-Wiki, RTE to HANS.

Run: python benchmarks/transfers.py --report reports/glue-minilm --data OOD [--task sst2] [--rows N] [--threads 1]
Needs the students that the benchmark left beside its records. Writes transfers.md and transfers.json into the report;
models that are in it already, scored on the same rows, are kept.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers

from compresskit.benchmark.cells import MODEL
from compresskit.markup import markdown
from compresskit.model import checkpoint
from compresskit.model.tokenizer import find_tokenizer
from compresskit.storage.writing import write_text
from compresskit.tasks.task import TaskData, load_data, load_task
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
    for (task, transfer, method, asked), found in frame:
        seeds = found[list(_FIGURES)].mean()
        inside, outside = seeds["in_score"] / seeds["in_teacher"], seeds["out_score"] / seeds["out_teacher"]
        lines.append(
            [
                f"{task} to {transfer}", str(method), f"{asked:g}x" if pd.notna(asked) else "-", str(len(found)),
                *(f"{100 * seeds[name]:.2f}" for name in ("in_score", "out_score")),
                *(f"{100 * kept:.1f} %" for kept in (inside, outside)), f"{100 * (outside - inside):+.1f}",
            ]
        )  # fmt: skip
    columns = ("transfer", "method", "asked", "seeds", "inside", "outside", "kept inside", "kept outside", "points")
    return markdown(columns, lines)


def accuracy(scores: dict[str, dict[str, float]]) -> float:
    """Mean over the splits."""
    return float(np.mean([values["accuracy"] for values in scores.values()]))


def run(report: Path, folder: Path, tasks: Sequence[str], rows: int | None) -> dict[str, Any]:
    """Score every finished student of these tasks."""
    output = report / "transfers.json"
    kept = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {"data": {}, "rows": []}
    paths = sorted(report.glob("cells/*/record.json"))
    records = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    keys = {one["key"] for one in records.values()}
    kept["rows"] = [row for row in kept["rows"] if row["key"] in keys]
    for task in tasks:
        transfer = TRANSFERS[task]
        mine = {path: one for path, one in records.items() if one["task"] == task and one["status"] == "finished"}
        ready = [path for path in mine if (path / MODEL).is_dir()]
        teacher = next((path for path in ready if mine[path]["method"] == "dense"), None)
        if teacher is None:
            print(f"{task}: no teacher with its model in {report}", flush=True)
            continue
        data = read(transfer, folder, rows)
        if kept["data"].get(transfer) != data.record():
            kept["rows"] = [row for row in kept["rows"] if row["transfer"] != transfer]
            kept["data"][transfer] = data.record()
        known = {row["key"] for row in kept["rows"] if row["transfer"] == transfer}
        todo = [path for path in ready if mine[path]["key"] not in known]
        if not todo:
            continue
        taught = {"in_teacher": accuracy(mine[teacher]["scores"]), "out_teacher": measure(teacher / MODEL, data)}
        for path in todo:
            one = mine[path]
            row = {"task": task, "transfer": transfer, "key": one["key"], "method": one["method"]}
            row |= {"asked": one["ratio_asked"], "seed": one["seed"], "in_score": accuracy(one["scores"]), **taught}
            kept["rows"].append(row | {"out_score": measure(path / MODEL, data)})
            write_text(output, json.dumps(kept, indent=1) + "\n")
            print(kept["rows"][-1], flush=True)
    write_text(output, json.dumps(kept, indent=1) + "\n")
    return kept


def main() -> None:
    """Score, then write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with imdb*, paws* and hans* files")
    parser.add_argument("--task", action="append", choices=list(TRANSFERS), help="may be repeated; default: all")
    parser.add_argument("--rows", type=int, help="of each transfer at most; default: all")
    parser.add_argument("--threads", type=int, help="default: all")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    kept = run(options.report, options.data, options.task or list(TRANSFERS), options.rows)
    if not kept["rows"]:
        parser.error(
            f"{options.report} has no finished students of {', '.join(options.task or TRANSFERS)} with their models"
        )
    lines = [
        f"- {name}: {part['source']}, {part['rows']:,} rows" + (f" ({part['remark']})" if part["remark"] else "")
        for name, splits in kept["data"].items()
        for part in splits.values()
    ]
    text = ["# Out of distribution", "", "Accuracy, means over seeds; kept: a student's over its teacher's.", ""]
    command = f"python benchmarks/transfers.py --report {options.report} --data DIR"
    text += [table(kept["rows"]), "", *lines, "", f"`{command}` (with `--rows` where only some rows were drawn)"]
    write_text(options.report / "transfers.md", "\n".join(text) + "\n")


if __name__ == "__main__":
    main()
