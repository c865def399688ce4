"""Exported models against the dense one in ONNX: milliseconds side by side, MB, score, cold start and memory.

    python experiments/export.py --dense TEACHER --students STUDENT... --task sst2 --data GLUE

Steps, all of them unless `--steps` names some: `write` (every graph, into `--graphs`), `score`, `cold` (start and
memory of a process of its own) and `time`. Each thing that was measured goes into `records.json` at once, and is not
measured again; scores may be taken on a busy machine, times not. `README.md` and `export.png` are made of the
records, also alone (`--steps` without a name).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from export_graphs import Row, rows_of, write
from export_page import draw, page
from export_runs import cold_start, timed
from timing import REPORT, made_on
from transformers import AutoTokenizer

from compresskit.benchmark.provenance import digest
from compresskit.exporting.agreement import example_inputs
from compresskit.model import checkpoint, identity
from compresskit.model.positions import shortened
from compresskit.scores import mean_over_splits
from compresskit.tasks.kind import Scoring
from compresskit.tasks.loading import load_data, load_task
from compresskit.training.evaluation import score

STEPS = ("write", "score", "cold", "time")
DENSE = "dense"


class Records:
    """What was measured, in a file that is whole after every measurement."""

    def __init__(self, path: Path) -> None:
        self._path = path
        empty: dict[str, Any] = {"models": {}, "rows": {}, "scores": {}, "cold": {}, "times": {}}
        self.found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else empty

    def save(self) -> None:
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)

    def add(self, kind: str, name: str, value: object) -> None:
        self.found[kind][name] = value
        self.save()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="the dense model's folder")
    parser.add_argument("--students", type=Path, nargs="*", default=[], help="folders that compresskit wrote")
    parser.add_argument("--task", help="what the models are scored on; default: no scores")
    parser.add_argument("--data", type=Path, help="folder with the task's files; default: the hub")
    parser.add_argument("--shapes", nargs="*", default=["1x128"], help="sequences x tokens, such as 1x32 32x128")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--rounds", type=int, default=30, help="of one shape, at most")
    parser.add_argument("--seconds", type=float, default=600, help="of one shape, about; at least five rounds are made")
    parser.add_argument("--output", type=Path, default=REPORT.parent / "export")
    parser.add_argument("--graphs", type=Path, default=Path("runs/export"), help="where graphs are kept")
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=STEPS)
    asked = parser.parse_args(arguments)
    asked.output.mkdir(parents=True, exist_ok=True)
    records = Records(asked.output / "records.json")
    if asked.steps:
        if asked.dense is None:
            parser.error("--dense is needed, or --steps without a name")
        measure(asked, records)
    (asked.output / "README.md").write_text(page(records.found), encoding="utf-8")
    draw(records.found, asked.output / "export.png")


def measure(asked: argparse.Namespace, records: Records) -> None:
    """The steps that were asked for."""
    models = {DENSE: asked.dense} | {path.name: path for path in asked.students}
    if len(models) != 1 + len(asked.students):
        raise SystemExit("two students have folders of one name, or one is called dense")
    rows = [row for name in models for row in rows_of(name, dense=name == DENSE)]
    _forget_others(models, rows, asked.graphs, records)
    torch.set_num_threads(1)
    if "write" in asked.steps:
        for row in rows:
            if row.name not in records.found["rows"] or not row.folder(asked.graphs).is_dir():
                found = write(row, models[row.model], asked.graphs, asked.task, asked.data)
                records.add("rows", row.name, found)
                print(f"{row.name}: {found['megabytes']:.2f} MB", flush=True)
        order = {row.name: records.found["rows"][row.name] for row in rows}
        records.found["rows"] = order
        records.save()
    if "score" in asked.steps and asked.task:
        _score(asked, models, rows, records)
    if "cold" in asked.steps:
        missing = [row for row in rows if row.name not in records.found["cold"]]
        tokens = shortened(checkpoint.read(asked.dense).model, 128)
        for name, found in cold_start(missing, asked.graphs, tokens).items():
            records.add("cold", name, found)
    if "time" in asked.steps:
        _time(asked, rows, records)


def _forget_others(models: dict[str, Path], rows: list[Row], graphs: Path, records: Records) -> None:
    """Forget what was written and measured of models that are others now, or are not asked for."""
    hashes = {name: digest(identity.of_folder(path)) for name, path in models.items()}
    for name in models:
        if records.found["models"].get(name) != hashes[name]:
            shutil.rmtree(graphs / name, ignore_errors=True)
    names = {row.name for row in rows if records.found["models"].get(row.model) == hashes[row.model]}
    records.found["models"] = hashes
    for kind in ("rows", "scores", "cold"):
        records.found[kind] = {name: found for name, found in records.found[kind].items() if name in names}
    records.save()


def _score(asked: argparse.Namespace, models: dict[str, Path], rows: list[Row], records: Records) -> None:
    """The task's primary metric, mean over its splits, of every row that has none."""
    task = load_task(asked.task)
    records.found["task"] = {"name": task.name, "metric": task.primary}
    data = load_data(task, asked.data, train=False)
    for model, path in models.items():
        missing = [row for row in rows if row.model == model and row.name not in records.found["scores"]]
        if not missing:
            continue
        read = checkpoint.read(path, compressed=model != DENSE)
        tokenizer = AutoTokenizer.from_pretrained(path)
        for row in missing:
            run = row.load(asked.graphs)
            scoring = Scoring(read.model.float().eval(), tokenizer, task.max_length, run=run, folder=path)
            found = mean_over_splits(score(scoring, data), task.primary)
            records.add("scores", row.name, found)
            print(f"{row.name}: {found:.4f}", flush=True)


def _time(asked: argparse.Namespace, rows: list[Row], records: Records) -> None:
    """All rows in turn for each shape and number of threads; what lacks a row is timed again as a whole."""
    read = checkpoint.read(asked.dense)
    for threads, shape in itertools.product(asked.threads, asked.shapes):
        key = f"{shape}, {threads} thread{'s' * (threads > 1)}"
        known = records.found["times"].get(key)
        models = {row.model: records.found["models"][row.model] for row in rows}
        if known and known["models"] == models and known["milliseconds"].keys() == {row.name for row in rows}:
            continue
        torch.set_num_threads(threads)
        batch, length = map(int, shape.split("x"))
        inputs = example_inputs(read.model, batch, length)
        inputs["attention_mask"].fill_(1)
        load = os.getloadavg()[0]
        found = timed(rows, asked.graphs, inputs, asked.rounds, asked.seconds)
        records.add("times", key, found | {"models": models, "load average": load, "made on": made_on()})
        print(f"timed: {key}, {found['rounds']} rounds", flush=True)


if __name__ == "__main__":
    main()
