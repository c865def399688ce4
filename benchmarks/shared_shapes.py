"""Of equally large Tucker cores and tensor trains: which are nearest to real matrices in one shot.

This is what orders the candidates of both methods. Relative Frobenius error on the embedded checkpoint.

Run: python benchmarks/shared_shapes.py
Writes README.md and results.json into reports/minilm-shared-shapes/.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from compresskit.decomposers import registry
from compresskit.decomposers.base import COST_TOKENS, Group, Spec
from compresskit.decomposers.tensor_train import TensorTrainSpec
from compresskit.decomposers.tucker import TuckerSpec
from compresskit.markup import markdown
from compresskit.model import checkpoint, demo
from compresskit.model.sources import ModelSource
from compresskit.model.targets import find_targets

OUTPUT = Path(__file__).resolve().parents[1] / "reports" / "minilm-shared-shapes"
RATIOS = (5, 8, 19, 30)
#: Rank on the output side / rank on the input side.
PROPORTIONS = (0.5, 1.0, 2.0, 4.0)
BLOCKS = {
    "attention": ((2, 2), (4, 4), (8, 8), (2, 8), (8, 2)),
    "ffn": ((2, 2), (8, 2), (4, 4), (8, 8), (2, 8)),
    "embedding": ((2, 2), (4, 2), (8, 2), (16, 2), (2, 4)),
}
COLUMNS = ("matrices", "ratio", "form", "parameters", "FLOPs / dense", "error")


def row(what: str, ratio: float, form: str, method: str, groups: list[Group], specs: list[Spec], source: Any) -> Any:
    """One form of all groups together."""
    decomposer = registry.get(method)
    costs = [decomposer.cost(group, spec) for group, spec in zip(groups, specs, strict=True)]
    norms = [math.hypot(*(float(source.read(t).norm()) for t in group.targets)) for group in groups]
    errors = [decomposer.errors(group, [spec], source)[0] for group, spec in zip(groups, specs, strict=True)]
    dense = 2 * COST_TOKENS * sum(group.parameters for group in groups)
    return {
        "matrices": what,
        "ratio": ratio,
        "form": form,
        "parameters": sum(cost.parameters for cost in costs),
        "flops": sum(cost.flops for cost in costs) / dense,
        "error": math.hypot(*(e * n for e, n in zip(errors, norms, strict=True))) / math.hypot(*norms),
    }


def tucker_specs(group: Group, parameters: int) -> Iterable[tuple[str, TuckerSpec]]:
    """Two-sided cores in several proportions, and one-sided ones."""
    (m, n), count = group.shape, len(group.targets)
    for proportion in PROPORTIONS:
        square, linear = count * proportion, m * proportion + n
        rank = int((-linear + (linear**2 + 4 * square * parameters) ** 0.5) / (2 * square))
        if 1 <= rank < n and 1 <= int(proportion * rank) < m:
            yield f"tucker, ranks {proportion:g}:1", TuckerSpec(rank_out=int(proportion * rank), rank_in=rank)
    yield "tucker, input side only", TuckerSpec(rank_in=max(1, int(parameters / (count * m + n))))
    yield "tucker, output side only", TuckerSpec(rank_out=max(1, int(parameters / (count * n + m))))


def train_spec(group: Group, blocks: tuple[int, int], parameters: int) -> TensorTrainSpec | None:
    """The train with equal ranks in these blocks."""
    (m, n), (m2, n2) = group.shape, blocks
    m1, n3 = math.ceil(m / m2), n // n2
    linear, square = m1 + n3, m2 * n2
    rank = int((-linear + (linear**2 + 4 * square * parameters) ** 0.5) / (2 * square))
    return TensorTrainSpec(blocks=blocks, ranks=(rank, rank)) if 1 <= rank <= min(m1, n3) else None


def measure() -> list[dict[str, Any]]:
    """Every row."""
    model = checkpoint.read(None).model
    source, targets = ModelSource(model), find_targets(model)
    rows = []
    for what in ("attention", "ffn", "embedding"):
        chosen = [t for t in targets if t.role == what and (what != "ffn" or t.shape[0] > t.shape[1])]
        alone = [Group(t.name, (t,)) for t in chosen]
        (together,) = registry.get("tucker").groups(chosen)
        for ratio in RATIOS:
            budget = together.parameters / ratio
            (m, n), each = together.shape, budget / len(chosen)
            rank = registry.get("low-rank").parse_spec({"method": "low-rank", "rank": int(each / (m + n))})
            rows.append(row(what, ratio, "low-rank", "low-rank", alone, [rank] * len(alone), source))
            if len(chosen) > 1:
                for form, spec in tucker_specs(together, int(budget)):
                    rows.append(row(what, ratio, form, "tucker", [together], [spec], source))
            for blocks in BLOCKS[what]:
                train = train_spec(alone[0], blocks, int(each))
                if train is not None:
                    form = f"tensor-train, {blocks[0]}x{blocks[1]} blocks"
                    rows.append(row(what, ratio, form, "tensor-train", alone, [train] * len(alone), source))
            print(what, ratio, flush=True)
    return rows


def main() -> None:
    """Measure, write the report."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = measure()
    versions = {name: version(name) for name in ("compresskit", "torch", "transformers")}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    data = {"model": demo.ORIGIN, "sha256": demo.SHA256, "machine": platform.machine(), "versions": versions}
    (OUTPUT / "results.json").write_text(json.dumps({**data, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    best: dict[tuple[Any, Any], float] = {}
    for r in rows:
        best[r["matrices"], r["ratio"]] = min(r["error"], best.get((r["matrices"], r["ratio"]), math.inf))
    lines = []
    for r in rows:
        error = f"{r['error']:.4f}"
        if r["error"] == best[r["matrices"], r["ratio"]]:
            error = f"**{error}**"
        lines.append((r["matrices"], f"{r['ratio']}x", r["form"], f"{r['parameters']:,}", f"{r['flops']:.2f}", error))
    text = f"""# Tucker cores and tensor trains of about equal size, in one shot

Relative Frobenius error over all matrices of a kind together, no training; bold: the least of its kind and ratio.
attention: Q, K, V and O of all layers (384x384); ffn: the first FFN matrices (1536x384); embedding: 30522x384.

Tucker shares outer factors over all layers. From about 19x it is nearer to the attention matrices than low rank, with
twice the rank on the output side; for FFN matrices equal ranks are best. A tensor train of a linear is never nearer
than low rank: its outer factors serve several blocks; the fewest blocks with equally long outer factors lose least. Of
the embedding it is about as near.

{markdown(COLUMNS, lines)}

`python benchmarks/shared_shapes.py` with {", ".join(f"{name} {number}" for name, number in versions.items())}.
"""
    (OUTPUT / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
