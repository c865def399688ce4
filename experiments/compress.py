"""How long compression takes: against reading and writing the checkpoint, full SVDs and tensorly.

Run: python experiments/compress.py
A BERT_BASE-shaped random checkpoint at 19x. Writes compression.md and compression.json into reports/speed/.
"""

from __future__ import annotations

import copy
import cProfile
import json
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorly
import torch
from tensorly.decomposition import partial_tucker
from timing import REPORT, made_on
from transformers import BertConfig, BertModel, PreTrainedModel

from compresskit.decomposers import Group
from compresskit.decomposers.kronecker import KroneckerSpec
from compresskit.decomposers.registry import METHODS, get
from compresskit.decomposers.tucker import TuckerSpec
from compresskit.markup import markdown
from compresskit.model.sources import ModelWeights
from compresskit.model.targets import find_targets
from compresskit.planning.apply import apply_plan
from compresskit.planning.planner import make_plan
from compresskit.planning.recipe import for_method

RATIO = 19
REPEATS = 3


_NAMES = {"eigh": "eigenvectors", "gram": "Gram matrices", "truncated_svd": "one step of iteration"}


def best(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest of a few runs, and the last result."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def read_and_write(model: PreTrainedModel, folder: Path) -> float:
    """Seconds to read every weight of a checkpoint into memory and to write it again."""
    model.save_pretrained(folder / "dense")

    def run() -> None:
        read = BertModel.from_pretrained(folder / "dense")
        for parameter in read.parameters():
            parameter.data = parameter.data.clone()  # the file is only mapped until it is looked at
        read.save_pretrained(folder / "again")

    return best(run)[0]


def whole(model: PreTrainedModel, seconds: float) -> list[dict[str, Any]]:
    """Plan and factorise, every method, in multiples of reading and writing."""
    rows = []
    for method in METHODS.all():
        for allocation in ("uniform", "error"):
            times = []
            for _ in range(REPEATS if allocation == "uniform" else 1):
                student = copy.deepcopy(model)
                start = time.perf_counter()
                plan = make_plan(student, for_method(method, RATIO, allocation), ModelWeights(student))
                planned = time.perf_counter()
                apply_plan(student, plan)
                times.append((time.perf_counter() - start, planned - start))
            total, planning = min(times)
            row = {"method": method, "allocation": allocation, "plan": planning, "factorise": total - planning}
            rows.append({**row, "multiple": total / seconds, "profile": _profile(model, method, allocation)})
            print(rows[-1], flush=True)
    return rows


def _profile(model: PreTrainedModel, method: str, allocation: Any) -> str:
    """The functions that take most of the time of planning and factorising, with their shares."""
    student, profile = copy.deepcopy(model), cProfile.Profile()
    profile.enable()
    apply_plan(student, make_plan(student, for_method(method, RATIO, allocation), ModelWeights(student)))
    profile.disable()
    times = {name: entry[2] for (_, _, name), entry in pstats.Stats(profile).stats.items()}  # type: ignore[attr-defined]
    total = sum(times.values())
    top = sorted(times.items(), key=lambda item: -item[1])[:3]
    return ", ".join(f"{_NAMES.get(name, name)} {time / total:.0%}" for name, time in top)


def spectra(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Errors of the planner's candidates for one matrix of each shape, against svdvals of every arrangement."""
    source = ModelWeights(model)
    layer = "encoder.layer.0."
    wanted = ("attention.self.query", "intermediate.dense", "output.dense")
    targets = [target for target in find_targets(model) if target.name in {layer + name for name in wanted}]
    rows = []
    for method in ("kronecker", "low-rank"):
        decomposer = get(method)
        for target in targets:
            group = Group(target.name, (target,))
            specs = list(
                dict.fromkeys(
                    spec
                    for share in (RATIO / 4, RATIO / 2, RATIO, RATIO * 2, RATIO * 4)
                    for spec in decomposer.candidates(group, round(target.parameters / share))
                )
            )
            ours, errors = best(lambda: decomposer.errors(group, specs, source))  # noqa: B023
            weight = source.read(target)
            arranged = {}
            for spec in specs:
                if isinstance(spec, KroneckerSpec):
                    (m1, n1), (m2, n2) = spec.a, spec.b
                    blocks = weight.view(m1, m2, n1, n2).permute(0, 2, 1, 3).reshape(m1 * n1, m2 * n2)
                    arranged[spec.a] = blocks
                else:
                    arranged["matrix"] = weight
            vals, values = best(lambda: {key: torch.linalg.svdvals(matrix) for key, matrix in arranged.items()})  # noqa: B023
            full, _ = best(lambda: [torch.linalg.svd(matrix, full_matrices=False) for matrix in arranged.values()])  # noqa: B023
            for spec, error in zip(specs, errors, strict=True):
                key, count = (spec.a, spec.terms) if isinstance(spec, KroneckerSpec) else ("matrix", spec.rank)
                exact = float(values[key][count:].norm() / values[key].norm())
                assert abs(error - exact) < 1e-4, (spec, error, exact)
            row = {"method": method, "matrix": target.name, "shape": list(target.shape), "candidates": len(specs)}
            rows.append({**row, "arrangements": len(arranged), "ours": ours, "svdvals": vals, "full_svd": full})
            print(rows[-1], flush=True)
    return rows


def against_tensorly(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The factors themselves: a truncated SVD of one matrix, and Tucker over twelve."""
    source = ModelWeights(model)
    targets = [target for target in find_targets(model) if target.name.endswith("attention.self.query")]
    rows = []
    with tensorly.backend_context("pytorch"):
        weight = source.read(targets[0])
        low_rank = get("low-rank")
        group = Group(targets[0].name, (targets[0],))
        spec = low_rank.candidates(group, group.parameters // RATIO)[0]
        ours, _ = best(lambda: low_rank.factorise(group, spec, source))
        theirs, _ = best(lambda: tensorly.svd_interface(weight, n_eigenvecs=spec.rank, method="truncated_svd"))
        rows.append({"what": f"truncated SVD, 768x768, rank {spec.rank}", "ours": ours, "tensorly": theirs})
        group = Group("queries", tuple(targets))
        tucker = TuckerSpec(rank_out=120, rank_in=60)
        ours, _ = best(lambda: get("tucker").factorise(group, tucker, source))
        stacked = torch.stack([source.read(target) for target in targets])
        theirs, _ = best(lambda: partial_tucker(stacked, rank=[120, 60], modes=[1, 2], n_iter_max=3, tol=0))
        what = f"Tucker, {len(targets)} matrices of 768x768, ranks 120 and 60, three sweeps"
        rows.append({"what": what, "ours": ours, "tensorly": theirs})
    return rows


def main() -> None:
    """Measure and write the report."""
    torch.manual_seed(0)
    model = BertModel(BertConfig()).eval()
    with tempfile.TemporaryDirectory() as folder:
        seconds = read_and_write(model, Path(folder))
    print(f"read and write: {seconds:.2f} s", flush=True)
    found = {
        "read_and_write": seconds,
        "threads": torch.get_num_threads(),
        "whole": whole(model, seconds),
        "spectra": spectra(model),
        "tensorly": against_tensorly(model),
    }
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "compression.json").write_text(json.dumps(found, indent=1) + "\n")
    whole_rows = [
        [
            row["method"], row["allocation"], f"{row['plan']:.2f}", f"{row['factorise']:.2f}",
            f"{row['multiple']:.1f}x",
            "" if row["allocation"] == "error" else "met" if row["multiple"] <= 3 else "**not met**",
            row["profile"],
        ]
        for row in found["whole"]
    ]  # fmt: skip
    spectra_rows = [
        [
            row["method"], "x".join(map(str, row["shape"])), str(row["candidates"]), str(row["arrangements"]),
            f"{1e3 * row['ours']:.0f}", f"{1e3 * row['svdvals']:.0f}", f"{1e3 * row['full_svd']:.0f}",
            f"{row['full_svd'] / row['ours']:.1f}x",
        ]
        for row in found["spectra"]
    ]  # fmt: skip
    total = sum(row["full_svd"] for row in found["spectra"]) / sum(row["ours"] for row in found["spectra"])
    text = [
        "# Compression", "",
        f"A BERT_BASE-shaped random checkpoint at {RATIO}x, {found['threads']} threads;",
        f"fastest of {REPEATS} runs (allocation error: one). Reading it into memory and writing it again takes "
        f"{seconds:.2f} s.", "",
        "Goal for uniform: at most three times that.", "",
        markdown(
            ("method", "allocation", "plan s", "factorise s", "of reading + writing", "goal", "where the time goes"),
            whole_rows,
        ), "",
        "Errors of all candidates that the planner weighs for one matrix (ms), against torch.linalg.svdvals and svd",
        f"(float32) of every arrangement. Goal: 10x faster than full SVDs over all; measured {total:.1f}x",
        f"({'met' if total >= 10 else '**not met**'}).", "",
        markdown(
            ("method", "matrix", "candidates", "arrangements", "ours", "svdvals", "full SVDs", "faster"), spectra_rows
        ), "",
        "The factors, against tensorly (ms):", "",
        markdown(
            ("what", "ours", "tensorly", "faster"),
            [
                [row["what"], f"{1e3 * row['ours']:.0f}", f"{1e3 * row['tensorly']:.0f}",
                 f"{row['tensorly'] / row['ours']:.1f}x"]
                for row in found["tensorly"]
            ],
        ), "",
        made_on(),
    ]  # fmt: skip
    (REPORT / "compression.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
