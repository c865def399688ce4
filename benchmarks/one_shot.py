"""What one-shot compression of the embedded checkpoint reaches without any training: ratio, size, FLOPs, and the errors
of weights and of outputs, with and without calibration.

Run: python benchmarks/one_shot.py [--text FILE]
Writes README.md and results.json into reports/minilm-one-shot/; rows that are there already are kept, if they were made
with the same text and versions.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import compresskit
from compresskit.calibration.statistics import Calibration, calibrate
from compresskit.data.corpus import Corpus, find_corpus
from compresskit.decomposers.base import FactorisedEmbedding, FactorisedLinear, output_error
from compresskit.markup import markdown
from compresskit.model import checkpoint, demo
from compresskit.model.sources import ModelSource
from compresskit.model.tokenizer import find_tokenizer
from compresskit.planning.apply import apply_plan
from compresskit.planning.planner import make_plan
from compresskit.planning.recipe import for_method

METHODS = ("kronecker", "low-rank", "tensor-train", "tucker")
WAYS = [*((method, allocation) for method in METHODS for allocation in ("uniform", "error")), ("auto", "error")]
RATIOS = (2, 8, 19)
#: Where calibrated factors are measured too.
CALIBRATED = (19,)
OUTPUT = Path(__file__).resolve().parents[1] / "reports" / "minilm-one-shot"
COLUMNS = ("method", "allocation", "factors from", "asked", "achieved", "MB", "FLOPs", "error", "output error")


@cache
def statistics(text: Corpus, part: Any) -> Calibration:
    """Of the dense model, on a part of the text."""
    dense = checkpoint.read(None)
    return calibrate(dense.model, find_tokenizer(None, dense), Corpus(text.name, text.path, part))


def measure(method: str, allocation: Any, ratio: float, calibrated: bool, *, text: Corpus) -> dict[str, Any]:
    """One row."""
    dense, original = checkpoint.read(None), checkpoint.read(None)
    known = statistics(text, "training") if calibrated else None
    recipe = for_method(method, ratio, allocation)
    plan = apply_plan(
        dense.model, make_plan(dense.model, recipe, ModelSource(dense.model), statistics=known), statistics=known
    )
    source, residual, norm, outputs = ModelSource(original.model), 0.0, 0.0, []
    for target in (target for assignment in plan.assignments for target in assignment.group.targets):
        layer, weight = dense.model.get_submodule(target.name), source.read(target)
        assert isinstance(layer, FactorisedLinear | FactorisedEmbedding)
        made = layer.dense_weight().detach()
        residual += float((weight - made).double().square().sum())
        norm += float(weight.double().square().sum())
        outputs.append(output_error([(target, weight, made)], statistics(text, "held-out")))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(dense, Path(folder))
        size = (Path(folder) / "model.safetensors").stat().st_size
    return {
        "method": method,
        "allocation": allocation,
        "calibrated": calibrated,
        "ratio_asked": ratio,
        "ratio": plan.ratio,
        "parameters": plan.parameters_after,
        "megabytes": size / 1e6,
        "flops": plan.flops_after.total,
        "flops_dense": plan.flops_before.total,
        "error": math.sqrt(residual / norm),
        "output_error": sum(outputs) / len(outputs),
    }


def row(record: dict[str, Any]) -> tuple[str, ...]:
    """Cells of the table."""
    return (
        record["method"],
        record["allocation"],
        "outputs" if record["calibrated"] else "weights",
        f"{record['ratio_asked']}x",
        f"{record['ratio']:.2f}x",
        f"{record['megabytes']:.2f}",
        f"{record['flops_dense'] / record['flops']:.1f}x fewer",
        f"{record['error']:.3f}",
        f"{record['output_error']:.3f}",
    )


def main() -> None:
    """Measure every row that is missing, write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--text", help="to calibrate on and to measure outputs with; default: the embedded text")
    text = find_corpus(parser.parse_args().text)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    environment = {
        "model": demo.ORIGIN,
        "model_sha256": demo.SHA256,
        "text": text.record(),
        "tokens": {part: statistics(text, part).tokens for part in ("training", "held-out")},
        "versions": {"python": platform.python_version(), "compresskit": compresskit.__version__}
        | {name: version(name) for name in ("torch", "transformers", "scipy", "numpy")},
    }
    OUTPUT.mkdir(parents=True, exist_ok=True)
    path = OUTPUT / "results.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = kept.get("records", []) if kept.get("environment") == environment else []
    found = {(r["method"], r["allocation"], r["ratio_asked"], r["calibrated"]): r for r in known}
    order = [
        (method, allocation, ratio, calibrated)
        for ratio in RATIOS
        for method, allocation in WAYS
        for calibrated in ((False, True) if ratio in CALIBRATED else (False,))
    ]
    for key in order:
        if key not in found:
            found[key] = measure(*key, text=text)
        records = [found[key] for key in order if key in found]
        data = {"format_version": 2, "environment": environment, "records": records}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        print(*row(found[key]), sep="  ", flush=True)
    versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items())
    tokens = environment["tokens"]
    report = f"""# One-shot compression of {demo.NAME}

No training: how far each method gets by itself. A model at these errors is a starting point for distillation, not a
result. MB: 10^6 bytes of the weight file. FLOPs: whole model, one sequence of 128 tokens. Times are in reports/speed.

- error: ||W - W'||_F / ||W||_F over all factorised matrices together; lower is better, as below.
- output error: ||(W - W') X||_F / ||W X||_F, mean over the matrices, on {tokens["held-out"]:,} tokens that calibration
  did not see (of the embedding: its rows, weighted by how often they occur).
- factors from: weights (least error), or outputs (`--calibration`: least output error on {tokens["training"]:,} tokens
  of the same text).

{markdown(COLUMNS, [row(record) for record in records])}

Made by `python benchmarks/one_shot.py{"" if text.path is None else " --text FILE"}`; text: {text.name}; {versions};
SHA-256 of the checkpoint {demo.SHA256}.
"""
    (OUTPUT / "README.md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
