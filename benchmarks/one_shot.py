"""What one-shot compression reaches on the embedded checkpoint: ratio, size, FLOPs and error, without any training.

Run: python benchmarks/one_shot.py
Writes README.md and results.json into reports/minilm-one-shot/.
"""

from __future__ import annotations

import json
import math
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import compresskit
from compresskit.data import demo
from compresskit.model import checkpoint
from compresskit.model.sources import ModelSource
from compresskit.planning.apply import apply_plan
from compresskit.planning.planner import make_plan
from compresskit.planning.recipe import for_method
from compresskit.reporting.tables import markdown

METHODS = ("kronecker", "low-rank")
ALLOCATIONS = ("uniform", "error")
RATIOS = (2, 5, 8, 19)
OUTPUT = Path(__file__).resolve().parents[1] / "reports" / "minilm-one-shot"
COLUMNS = ("method", "allocation", "asked", "achieved", "parameters", "MB", "FLOPs", "error", "seconds")


def measure(method: str, allocation: Any, ratio: float) -> dict[str, Any]:
    """One row."""
    dense = checkpoint.read(None)
    weights = {name: tensor.clone() for name, tensor in dense.model.state_dict().items()}
    start = time.perf_counter()
    plan = make_plan(dense.model, for_method(method, ratio, allocation), ModelSource(dense.model))
    plan = apply_plan(dense.model, plan)
    seconds = time.perf_counter() - start
    norms = [
        math.hypot(*(float(weights[f"{t.name}.weight"].norm()) for t in a.group.targets)) for a in plan.assignments
    ]
    residual = math.hypot(*((a.error or 0.0) * norm for a, norm in zip(plan.assignments, norms, strict=True)))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(dense, Path(folder))
        size = (Path(folder) / "model.safetensors").stat().st_size
    return {
        "method": method,
        "allocation": allocation,
        "ratio_asked": ratio,
        "ratio": plan.ratio,
        "parameters": plan.parameters_after,
        "megabytes": size / 1e6,
        "flops": plan.flops_after.total,
        "flops_dense": plan.flops_before.total,
        "error": residual / math.hypot(*norms),
        "seconds": seconds,
    }


def bert_base_seconds(method: str, allocation: Any) -> float:
    """Seconds to plan and compress a BERT_BASE-shaped model (random weights) at 19x."""
    torch.manual_seed(0)
    dense = transformers.BertModel(transformers.BertConfig())
    start = time.perf_counter()
    compresskit.compress(dense, method=method, ratio=19, allocation=allocation, inplace=True)
    return time.perf_counter() - start


def main() -> None:
    """Measure every row, write the report."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    records = [measure(m, a, r) for r in RATIOS for m in METHODS for a in ALLOCATIONS]
    timings = [{"method": m, "allocation": a, "seconds": bert_base_seconds(m, a)} for m in METHODS for a in ALLOCATIONS]
    environment = {
        "model": demo.ORIGIN,
        "model_sha256": demo.SHA256,
        "command": "python benchmarks/one_shot.py",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "compresskit": compresskit.__version__,
    } | {name: version(name) for name in ("torch", "transformers", "scipy", "numpy")}
    rows = [
        (
            r["method"],
            r["allocation"],
            f"{r['ratio_asked']}x",
            f"{r['ratio']:.2f}x",
            f"{r['parameters']:,}",
            f"{r['megabytes']:.2f}",
            f"{r['flops_dense'] / r['flops']:.1f}x fewer",
            f"{r['error']:.3f}",
            f"{r['seconds']:.1f}",
        )
        for r in records
    ]
    timing_rows = [(t["method"], t["allocation"], f"{t['seconds']:.1f}") for t in timings]
    text = f"""# One-shot compression of {demo.NAME}

No training: how far each method gets by itself. A model at these errors is a starting point for distillation, not a
result. Error: ||W - W'||_F / ||W||_F over all factorised matrices together (lower is better). MB: 10^6 bytes of the
weight file. FLOPs: whole model, one sequence of 128 tokens. Seconds: plan and factorise, one run, for orientation.

{markdown(COLUMNS, rows)}

A BERT_BASE-shaped model (109.5M parameters, random weights) at 19x, plan and compress, one run:

{markdown(("method", "allocation", "seconds"), timing_rows)}

Made by `{environment["command"]}` with {", ".join(f"{k} {v}" for k, v in environment.items() if k != "command")}.
"""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "README.md").write_text(text, encoding="utf-8")
    (OUTPUT / "results.json").write_text(
        json.dumps(
            {"format_version": 1, "environment": environment, "records": records, "bert_base": timings}, indent=2
        )
        + "\n"
    )
    print(text)


if __name__ == "__main__":
    main()
