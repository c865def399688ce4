"""How the rows of the report on exports are timed, and how much a fresh process needs."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from export_graphs import Row
from timing import milliseconds, side_by_side
from torch import Tensor

#: Tokens of a batch up to which all rows stay loaded; with more of them the runtimes' memory would not fit.
_LOADED = 1024
_LEAST_ROUNDS = 5
_COLD_ROUNDS = 5

#: From the first import to the first answer, and the largest resident memory.
_COLD = """
import time
start = time.perf_counter()
import json, sys
import numpy as np
by, file, length = sys.argv[1:]
tokens = np.ones((1, int(length)), np.int64)
if by == "OpenVINO":
    import openvino
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(file, "CPU", settings)
    model({value.any_name: tokens for value in model.inputs})
else:
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    session.run(None, {value.name: tokens for value in session.get_inputs()})
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # ru_maxrss would count the caller's memory
memory = int(status["VmHWM"].split()[0]) * 1024 / 1e6
print(json.dumps({"seconds": time.perf_counter() - start, "megabytes": memory}))
"""


def cold_start(rows: list[Row], graphs: Path, tokens: int) -> dict[str, dict[str, float]]:
    """Seconds and MB of a process that runs each row once on so many tokens, medians of five, all rows in turn."""
    found: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
    for _ in range(_COLD_ROUNDS):
        for row in rows:
            line = [sys.executable, "-c", _COLD, row.by, str(row.file(graphs)), str(tokens)]
            answer = subprocess.run(line, capture_output=True, text=True, check=True)
            found[row.name].append(json.loads(answer.stdout.splitlines()[-1]))
    return {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}


def timed(rows: list[Row], graphs: Path, inputs: Mapping[str, Tensor], rounds: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of every row, all in turn.

    Args:
        rows: what is timed.
        graphs: where the graphs lie.
        inputs: (batch, length).
        rounds: at most.
        seconds: of all rounds together, about; five are made at least.
    """
    if inputs["input_ids"].numel() > _LOADED:
        return _reloaded(rows, graphs, inputs, rounds, seconds)
    runs = {row.name: _run(row, graphs, inputs) for row in rows}
    rounds = _rounds(side_by_side(runs, 1), rounds, seconds)
    return milliseconds(side_by_side(runs, rounds)) | {"rounds": rounds}


def _reloaded(
    rows: list[Row], graphs: Path, inputs: Mapping[str, Tensor], rounds: int, seconds: float
) -> dict[str, Any]:
    """The same, where each row is loaded, warmed and dropped in every round."""
    found: dict[str, list[float]] = {row.name: [] for row in rows}
    start, done = time.perf_counter(), 0
    while done < rounds and (done < _LEAST_ROUNDS or time.perf_counter() - start < seconds):
        for row in rows:
            (middle, _), *_ = side_by_side({row.name: _run(row, graphs, inputs)}, 1).values()
            found[row.name].append(middle)
            gc.collect()
        done += 1
    quartiles = {name: np.percentile(times, [25, 50, 75]) * 1e3 for name, times in found.items()}
    return {
        "milliseconds": {name: float(middle) for name, (_, middle, _) in quartiles.items()},
        "spread": {name: float(high - low) / 2 for name, (low, _, high) in quartiles.items()},
        "rounds": done,
    }


def _run(row: Row, graphs: Path, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    model = row.load(graphs)
    return lambda: model(**inputs)


def _rounds(once: Mapping[str, Any], most: int, seconds: float) -> int:
    """How many rounds fit, given what one run of each row takes; a timing takes 0.02 s at least."""
    whole = sum(max(time.median, 0.02) for time in once.values())
    return max(min(_LEAST_ROUNDS, most), min(most, int(seconds / whole)))
