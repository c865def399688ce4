"""Exported models against the dense one in ONNX: milliseconds side by side, MB and score.

    python experiments/export.py --dense TEACHER --students STUDENT... --task sst2 --data GLUE

Every model is written for any runtime and for ONNX Runtime alone, in float32 and 8 bits (students in 4 bits too),
beside ONNX Runtime's own dynamic int8 of the dense model. `records.json` in the output holds what was measured;
`README.md` is made of it, also alone (`--render`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from timing import REPORT, made_on, milliseconds, side_by_side
from transformers import AutoTokenizer

from compresskit.exporting import exported
from compresskit.exporting.agreement import example_inputs
from compresskit.exporting.format import FORMATS
from compresskit.exporting.formats.onnx import graph_of
from compresskit.exporting.onnx_model import OnnxModel
from compresskit.model import checkpoint
from compresskit.model.checkpoint import Checkpoint
from compresskit.scores import mean_over_splits
from compresskit.tasks.kind import Scoring
from compresskit.tasks.loading import load_data, load_task
from compresskit.training.evaluation import score

#: Format and runtime of each row.
WAYS = (
    ("onnx", "any"), ("onnx", "onnxruntime"), ("onnx-int8", "any"), ("onnx-int8", "onnxruntime"),
    ("onnx-int4", "onnxruntime"),
)  # fmt: skip
DYNAMIC = "dynamic int8"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, help="the dense model's folder")
    parser.add_argument("--students", type=Path, nargs="*", default=[], help="folders that compresskit wrote")
    parser.add_argument("--task", help="what the models are scored on; default: no scores")
    parser.add_argument("--data", type=Path, help="folder with the task's files; default: the hub")
    parser.add_argument("--shapes", nargs="*", default=["1x128"], help="sequences x tokens, such as 1x32 32x128")
    parser.add_argument("--threads", type=int, nargs="*", default=[1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--output", type=Path, default=REPORT.parent / "export")
    parser.add_argument("--render", action="store_true", help="make README.md of the records that are there")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    records = asked.output / "records.json"
    if not asked.render:
        if asked.dense is None:
            parser.error("--dense is needed, or --render")
        records.write_text(json.dumps(measure(asked), indent=1) + "\n", encoding="utf-8")
    page = render(json.loads(records.read_text(encoding="utf-8")))
    (asked.output / "README.md").write_text(page, encoding="utf-8")


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """Write, score and time every row; the dense model's first one is what speed-ups refer to."""
    with tempfile.TemporaryDirectory() as temporary:
        folders, rows = {}, []
        for path in (asked.dense, *asked.students):
            read = checkpoint.read(path, compressed=path != asked.dense)
            for name, folder, record in _written(read, path == asked.dense, Path(temporary)):
                folders[name] = folder
                found = _score(read, folder, asked) if asked.task else None
                megabytes = (folder / "model.onnx").stat().st_size / 1e6
                rows.append({"name": name, "megabytes": megabytes, "score": found, **record})
                print(f"{name}: {megabytes:.2f} MB", flush=True)
        times = {}
        for threads, shape in itertools.product(asked.threads, asked.shapes):
            torch.set_num_threads(threads)
            batch, length = map(int, shape.split("x"))
            inputs = example_inputs(read.model, batch, length)
            inputs["attention_mask"].fill_(1)
            runs = {name: _run(OnnxModel(folder, graph_of(folder)), inputs) for name, folder in folders.items()}
            times[f"{shape}, {threads} thread{'s' * (threads > 1)}"] = milliseconds(side_by_side(runs, asked.rounds))
    return {"rows": rows, "times": times, "task": asked.task, "made on": made_on()}


def _written(read: Checkpoint, dense: bool, root: Path) -> list[tuple[str, Path, dict[str, Any]]]:
    """Every way of a model: name, folder, and what it is."""
    found = []
    model = "dense" if dense else read.name
    for form, runtime in WAYS:
        if dense and form == "onnx-int4":
            continue
        folder = root / f"{model}-{form}-{runtime}"
        options = FORMATS.get(form).options_type(runtime=runtime)
        exported.write(replace(read, notes=()), folder, form, options)
        found.append((f"{model}, {form}, {runtime}", folder, {"model": model, "format": form, "runtime": runtime}))
    if dense:
        folder = root / "dense-dynamic"
        folder.mkdir()
        whole = found[0][1]
        (folder / "config.json").write_bytes((whole / "config.json").read_bytes())
        quantize_dynamic(whole / "model.onnx", folder / "model.onnx", weight_type=QuantType.QInt8)
        found.append((f"dense, {DYNAMIC}", folder, {"model": model, "format": DYNAMIC, "runtime": "onnxruntime"}))
    return found


def _score(read: Checkpoint, folder: Path, asked: argparse.Namespace) -> float:
    """The task's primary metric, mean over its splits."""
    task = load_task(asked.task)
    data = load_data(task, asked.data, train=False)
    tokenizer = AutoTokenizer.from_pretrained(read.folder)
    scoring = Scoring(
        read.model.float().eval(), tokenizer, 128, run=OnnxModel(folder, graph_of(folder)), folder=read.folder
    )
    return mean_over_splits(score(scoring, data), task.primary)


def _run(model: OnnxModel, inputs: dict[str, torch.Tensor]) -> Any:
    return lambda: model(**inputs)


def render(found: dict[str, Any]) -> str:
    """The page."""
    base, *_ = found["rows"]
    heads = ["model", "format", "runtime", "MB", "smaller", *([found["task"]] if found["task"] else [])]
    for name in found["times"]:
        heads += [f"ms, {name}", "speed-up"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for row in found["rows"]:
        cells = [row["model"], row["format"], row["runtime"], f"{row['megabytes']:.2f}"]
        cells.append(f"{base['megabytes'] / row['megabytes']:.1f}x")
        if found["task"]:
            cells.append(f"{100 * row['score']:.2f} %")
        for times in found["times"].values():
            median, spread = times["milliseconds"], times["spread"]
            cells.append(f"{median[row['name']]:.2f} ± {spread[row['name']]:.2f}")
            cells.append(f"{median[base['name']] / median[row['name']]:.2f}x")
        lines.append(f"| {' | '.join(cells)} |")
    intro = (
        "# Exported models\n\n`make bench-export` made this page. MB: the file `model.onnx` (10^6 bytes); smaller, "
        "speed-up:\nthan the dense model's `onnx` for any runtime. Milliseconds: sequences x tokens in ONNX Runtime, "
        "all rows in turn,\nmedian and half the interquartile range. "
        "`dynamic int8` is ONNX Runtime's own `quantize_dynamic`.\n\n"
    )
    return intro + "\n".join(lines) + "\n\n" + found["made on"]


if __name__ == "__main__":
    main()
