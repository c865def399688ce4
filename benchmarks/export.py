"""Exported classifiers: size, quality, speed, and what they need on a small device. Writes reports/export/.

    python benchmarks/export.py --data GLUE --teacher DENSE_FOLDER STUDENT_FOLDER...

Folders are classifiers for SST-2, such as `compresskit bench --task sst2` leaves in cells/*/model. About ten minutes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from timing import made_on, side_by_side
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import compresskit
from compresskit.exporting.graph import to_graph
from compresskit.markup import markdown
from compresskit.model.checkpoint import copy_tokenizer
from compresskit.tasks.task import load_data, load_task

REPORT = Path(__file__).resolve().parents[1] / "reports" / "export"
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "classify_onnx.py"
LENGTH = 128

#: A process that classifies one text: seconds from its start to the answer, and its largest resident memory.
COLD = """
import runpy, sys, time
began = time.perf_counter()
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
seconds = time.perf_counter() - began
status = open("/proc/self/status").read()
print(seconds, int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6)
"""


FORMATS = ("onnx", "onnx-int8")


def runner(path: Path):
    """Numpy inputs -> logits, on one thread of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    return lambda inputs: session.run(["logits"], inputs)[0]


def torch_runner(model):
    """Numpy inputs -> logits, in torch."""

    def run(inputs):
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.numpy()

    return run


def accuracy(run, tokenizer, dev, labels) -> float:
    """Share of right answers, one text at a time; ``labels``: names by number."""
    right = 0
    for (text,), label in zip(dev.texts, dev.targets, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="np")
        right += labels[int(run({name: np.asarray(value) for name, value in inputs.items()}).argmax())] == label
    return right / len(dev)


def export_dense(folder: Path, output: Path) -> None:
    """The dense model's graph in float32, to compare with."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    output.mkdir()
    onnx_ir.save(to_graph(model, 20), output / "model.onnx")
    model.config.save_pretrained(output)
    copy_tokenizer(folder, output)


def cold(folder: Path) -> tuple[float, float]:
    """Seconds from start to answer and MB of memory of the example program, median of five processes."""
    line = [sys.executable, "-c", COLD, str(EXAMPLE), str(folder), "a lovely film"]
    answers = [subprocess.run(line, capture_output=True, text=True, check=True).stdout for _ in range(5)]
    seconds, memory = np.median([[float(word) for word in answer.split()[-2:]] for answer in answers], axis=0)
    return float(seconds), float(memory)


def main() -> None:
    """Measure, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("students", type=Path, nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dev = load_data(load_task("sst2"), options.data, train=False).splits["dev"]
    with tempfile.TemporaryDirectory() as name:
        rows = measure(Path(name), options.teacher, options.students, dev)
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    columns = ("model", "run by", "MB", "smaller", "dev accuracy", "ms", "speed-up", "cold start, s", "memory, MB")
    table = [
        (
            row["model"],
            row["format"],
            f"{row['megabytes']:.2f}",
            f"{rows[0]['megabytes'] / row['megabytes']:.1f}x",
            f"{100 * row['accuracy']:.2f} %",
            f"{1e3 * row['seconds']:.1f} ± {1e3 * row['spread']:.1f}",
            f"{row['speed-up']:.2f}x",
            f"{row['cold'][0]:.2f}" if row["cold"] else "",
            f"{row['cold'][1]:.0f}" if row["cold"] else "",
        )
        for row in rows
    ]
    (REPORT / "README.md").write_text(TEXT.format(table=markdown(columns, table), made_on=made_on()), encoding="utf-8")


TEXT = """# Exported models

SST-2 classifiers (all-MiniLM-L6-v2), made by `benchmarks/export.py`. MB: weight file (10^6 bytes); smaller: than the
dense model's own file. Milliseconds: one sequence of 128 tokens, one thread, all models in turn, median and half the
interquartile range. Speed-up: against the dense model run by the same program (torch or ONNX Runtime). Cold start and
memory: a process that runs `examples/classify_onnx.py` on one text, from its first line to the answer, largest resident
memory; median of five. `dynamic int8` is ONNX Runtime's own `quantize_dynamic` (matrix products and look-ups), to
compare with. The machine ran other work at the same time (load average below): times are rough.

{table}

{made_on}"""


def measure(work: Path, teacher: Path, students: list[Path], dev) -> list[dict]:
    """One row for each model and way to run it, dense ones first."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    labels = AutoConfig.from_pretrained(teacher).id2label
    export_dense(teacher, work / "dense-onnx")
    files = {("dense", "torch"): teacher, ("dense", "onnx"): work / "dense-onnx"}
    for folder in students:
        model = json.loads((folder / "compression.json").read_text(encoding="utf-8"))
        label = f"{model['recipe']} {model['ratio']:.3g}x"
        files[label, "torch"] = folder
        for form in FORMATS:
            files[label, form] = work / f"{label}-{form}"
            compresskit.export(folder, format=form, output=files[label, form])
        files[label, "dynamic int8"] = work / f"{label}-dynamic"
        files[label, "dynamic int8"].mkdir()
        quantize_dynamic(
            files[label, "onnx"] / "model.onnx",
            files[label, "dynamic int8"] / "model.onnx",
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm", "Gather"],
        )
    runs, sizes = {}, {}
    for key, folder in files.items():
        if key[1] == "torch":
            runs[key] = torch_runner(AutoModelForSequenceClassification.from_pretrained(folder).eval())
            sizes[key] = (folder / "model.safetensors").stat().st_size / 1e6
        else:
            runs[key] = runner(folder / "model.onnx")
            sizes[key] = (folder / "model.onnx").stat().st_size / 1e6
    ids = np.random.default_rng(0).integers(1000, 30000, (1, LENGTH))
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    times = side_by_side({"/".join(key): lambda run=run: run(inputs) for key, run in runs.items()}, rounds=15)
    rows = []
    for (label, form), run in runs.items():
        time = times[f"{label}/{form}"]
        dense = times["dense/torch" if form == "torch" else "dense/onnx"]
        rows.append(
            {
                "model": label,
                "format": form,
                "megabytes": sizes[label, form],
                "accuracy": accuracy(run, tokenizer, dev, labels),
                "seconds": time.median,
                "spread": time.spread,
                "speed-up": dense.median / time.median,
                "cold": cold(files[label, form]) if form in FORMATS else None,
            }
        )
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
