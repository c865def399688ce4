"""Awkward matrices and dtypes, the same result every time, and no traffic."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import outputs, same, tiny_model
from test_decomposers import build

import compresskit
from compresskit.decomposers import Group, Target
from compresskit.decomposers.registry import METHODS, get
from compresskit.testing import Matrices

METHODS = sorted(METHODS.all())
TARGET = Target("layer", "linear", "ffn", (48, 96), bias=True)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


MATRICES = {
    "rank deficient": noise(48, 2) @ noise(2, 96),
    "all zero": torch.zeros(48, 96),
    "one row": torch.zeros(48, 96).index_copy(0, torch.tensor([7]), noise(1, 96)),
    "one number": torch.zeros(48, 96).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(5.0)),
    "huge": noise(48, 96) * 1e18,
    "tiny": noise(48, 96) * 1e-18,
    "denormal": noise(48, 96) * 1e-40,
    "wide range": noise(48, 96) * torch.logspace(-12, 12, 96),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("method", METHODS)
def test_awkward_matrices(method: str, kind: str, dtype: torch.dtype) -> None:
    """Finite factors, and an error as predicted, never above that of leaving the matrix out."""
    decomposer, group, weight = get(method), Group("layer", (TARGET,)), MATRICES[kind].to(dtype)
    spec = decomposer.candidates(group, TARGET.parameters // 3, allow_slow=True)[0]
    layer = build(decomposer, group, spec, weight)
    assert all(parameter.isfinite().all() for parameter in layer.parameters())
    made, exact = layer.dense_weight().detach().double(), weight.double()
    assert made.isfinite().all()
    if not exact.any():
        assert not made.any()
        return
    scale = exact.abs().max()  # squares of these overflow or vanish
    measured = float(((exact - made) / scale).norm() / (exact / scale).norm())
    assert measured <= 1 + 1e-3
    if kind not in ("huge", "tiny", "denormal", "wide range"):
        assert decomposer.errors(group, [spec], Matrices({group.target.name: weight})) == pytest.approx(
            [measured], abs=2e-3
        )
    if kind in ("rank deficient", "one row", "one number") and method == "low-rank":
        assert measured < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_is_factorised_in_full(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The factors are those of the same numbers in float32, rounded once; they are stored in the checkpoint's dtype."""
    rounded = tiny_model().to(dtype)
    half = compresskit.compress(rounded, method=method, ratio=2)
    full = compresskit.compress(tiny_model().to(dtype).float(), method=method, ratio=2)
    assert {parameter.dtype for parameter in half.parameters()} == {dtype}
    half.save_pretrained(tmp_path)
    assert compresskit.load(tmp_path).dtype == dtype
    ours, theirs = outputs(half.float()), outputs(full.to(dtype).float())
    assert float((ours - theirs).norm() / theirs.norm()) < 0.05


@pytest.mark.parametrize("method", METHODS)
def test_the_same_every_time(method: str) -> None:
    one, two = (compresskit.compress(tiny_model(), method=method, ratio=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", ["low-rank", "tensor-train"])
def test_threads_change_little(method: str) -> None:
    """Sums in another order: the products agree within 1e-4 of the largest weight."""
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(compresskit.to_dense(compresskit.compress(tiny_model(), method=method, ratio=3)).state_dict())
    finally:
        torch.set_num_threads(before)
    for name, weight in made[0].items():
        assert float((weight - made[1][name]).abs().max()) <= 1e-4 * float(weight.abs().max()), name


def test_training_is_the_same_every_time(bench_folder: Path, tmp_path: Path) -> None:
    settings = {"task": "sst2", "data": bench_folder / "data", "max_steps": 8, "max_length": 32, "device": "cpu"}
    for name in ("one", "two"):
        models = (bench_folder / "student", bench_folder / "teacher")
        compresskit.distill(*models, output=tmp_path / name, seed=5, dropout=0.1, **settings)
    assert same(tmp_path / "one", tmp_path / "two")


@pytest.mark.sweep
def test_no_traffic_without_a_hub_id(bench_folder: Path, tmp_path: Path) -> None:
    """Every command on folders, with sockets that refuse and a hub that is not declared offline."""
    code = """
import socket, sys
def refuse(*_, **__):
    print("TRAFFIC", flush=True)
    raise OSError("no traffic")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import compresskit
from pathlib import Path
root, out = Path(sys.argv[1]), Path(sys.argv[2])
small = compresskit.compress(root / "model", method="low-rank", ratio=2)
small.save_pretrained(out / "small")
compresskit.load(out / "small")
task = {"task": "sst2", "data": root / "data", "max_length": 32}
compresskit.distill(root / "student", root / "teacher", output=out / "trained", max_steps=2, **task)
compresskit.distill(root / "student", root / "model", max_steps=2, max_length=32)
compresskit.finetune(root / "model", max_steps=2, **task)
compresskit.evaluate(out / "trained", **task)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    line = [sys.executable, "-c", code, str(bench_folder), str(tmp_path)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TRAFFIC" not in done.stdout + done.stderr
