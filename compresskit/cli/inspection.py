"""What ``compresskit inspect`` shows of a dense model."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from rich.table import Table
from transformers import PreTrainedModel

from compresskit.cli.tables import table
from compresskit.decomposers import Target, linalg, row_blocks
from compresskit.model.sources import ModelWeights
from compresskit.model.targets import convolutions, count_parameters, find_targets, tied_heads
from compresskit.progress import Progress

#: Share of the squared norm that the column "rank 90 %" asks for.
ENERGY = 0.9


def inspection_tables(model: PreTrainedModel, progress: Progress) -> list[Table]:
    """Two tables: every matrix with its spectrum, and the sums per role."""
    targets = find_targets(model)
    source = ModelWeights(model)
    total = count_parameters(model)
    heads = tied_heads(model)
    rows = []
    sums: dict[str, int] = defaultdict(int)
    compressible = [target for target in targets if target.role is not None]
    done = 0
    for target in targets:
        sums[target.role or "dense"] += target.parameters
        share = f"{100 * target.parameters / total:.2f} %"
        what = target.reason
        spectrum = "-"
        if target.role is not None:
            spectrum = _spectrum_text(source, target)
            what = f"tied to {', '.join(heads)}" if target.role == "embedding" and heads else ""
            done += 1
            progress("spectra", done, len(compressible))
        m, n = target.shape
        rows.append((target.name, target.role or "dense", f"{m}x{n}", f"{target.parameters:,}", share, spectrum, what))
    for name, layer in convolutions(model).items():
        count = sum(parameter.numel() for parameter in layer.parameters())
        sums["dense"] += count
        shape = "x".join(map(str, next(layer.parameters()).shape))
        share = f"{100 * count / total:.2f} %"
        rows.append((name, "dense", shape, f"{count:,}", share, "-", "a convolution stays dense"))
    rest = total - sum(sums.values())
    rows.append(("biases, norms, others", "dense", "", f"{rest:,}", f"{100 * rest / total:.2f} %", "-", "not matrices"))
    sums["dense"] += rest
    every = table(
        ("matrix", "role", "shape", "parameters", "share", "rank 90 %", "remark"),
        rows,
        left=(0, 1, 6),
        caption="rank 90 %: singular values that hold 90 % of the squared norm, and their share of all; "
        "the fewer, the more compressible by low rank",
    )
    per_role = table(
        ("role", "parameters", "share"),
        [(role, f"{count:,}", f"{100 * count / total:.1f} %") for role, count in sums.items()]
        + [("whole model", f"{total:,}", "100.0 %")],
        left=(0,),
    )
    return [every, per_role]


def _spectrum_text(source: ModelWeights, target: Target) -> str:
    m, n = target.shape
    blocks = row_blocks(source, target) if m >= n else iter([source.read(target).T])
    squares = linalg.spectrum(linalg.gram(blocks))
    kept = np.cumsum(squares) / max(squares.sum(), np.finfo(float).tiny)
    rank = int(np.searchsorted(kept, ENERGY) + 1)
    return f"{rank} ({100 * rank / min(m, n):.0f} %)"
