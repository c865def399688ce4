"""The example plug-ins as a stranger has them: built, installed, and used by the commands and from Python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import reviews, write_tsv

import compresskit
from compresskit import InputError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "plugins"

Command = Callable[..., str]

METHOD = """
import sys
from pathlib import Path
import compresskit, torch
from compresskit.decomposers.registry import METHODS
root, output = Path(sys.argv[1]), Path(sys.argv[2])
print("package:", METHODS.source("randomized-svd"))
plan = compresskit.plan(root / "model", method="randomized-svd", ratio=3, allocation="error")
assert 3 <= plan.ratio < 3.2, plan.ratio
student = compresskit.compress(root / "model", method="randomized-svd", ratio=3)
student.save_pretrained(output / "saved")
ids = torch.arange(5, 25)[None]
again = compresskit.load(output / "saved")
assert torch.equal(again(ids)[0], student.eval()(ids)[0])
"""

#: One benchmark with a plug-in at every door.
BENCH = """
import sys
from pathlib import Path
import compresskit
root, output = Path(sys.argv[1]), Path(sys.argv[2])
result = compresskit.bench(
    output=output / "bench",
    models=(str(root / "model"),), methods=("randomized-svd",), ratios=(3,), baselines=("dense", "first-layers:1"),
    tasks=(str(output / "stars.yaml"),), data=str(output), text=str(root / "text.txt"), exports=("torch-export",),
    teacher={"epochs": 4, "learning_rate": 3e-3, "max_length": 32}, task={"max_length": 32}, general=False,
    latency_rounds=1,
)
for record in result.records:
    export = record.exports["torch-export"]
    print(record.method, record.status, record.message, export.message, record.metric, record.score, export.score)
    assert abs(record.score - export.score) < 1e-3
print(result.records[-1].made_by.versions)
print((result.folder / "README.md").read_text(encoding="utf-8"))
"""

STARS = """version: 1
name: stars
kind: ordinal
inputs: [review]
label: stars
labels: {bad: "0", good: "1"}
files: {train: train.tsv, dev: dev.tsv}
metrics: [within_one, weighted_kappa, accuracy]
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs Python where all example packages are installed; what is printed."""
    place = tmp_path_factory.mktemp("packages")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    packages = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml"))
    assert len(packages) == 4
    subprocess.run([*pip, "wheel", *offline, "--wheel-dir", place / "wheels", *packages], check=True)
    wheels = sorted((place / "wheels").iterdir())
    subprocess.run([*pip, "install", *offline[:2], "--target", place / "site", *wheels], check=True)
    paths = [str(place / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}

    def run(*arguments: object) -> str:
        line = [sys.executable, *map(str, arguments)]
        answer = subprocess.run(line, env=environment, cwd=place, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    return run


@pytest.mark.sweep  # the benchmark below uses it too
def test_method(command: Command, bench_folder: Path, tmp_path: Path) -> None:
    said = command("-c", METHOD, bench_folder, tmp_path)
    assert "package: compresskit-randomized-svd 0.1.0" in said
    listed = command("-m", "compresskit", "methods")
    for name in ("randomized-svd", "first-layers"):
        assert name in listed
        assert f"compresskit-{name} 0.1.0" in listed
    # Its own tests are the checks that every method of compresskit passes.
    assert " passed" in command("-m", "pytest", "-q", "-p", "no:cacheprovider", EXAMPLES / "method" / "tests")
    # Without the package its folders are refused by name.
    with pytest.raises(InputError, match=r"unknown method 'randomized-svd'.*package that adds it installed"):
        compresskit.load(tmp_path / "saved")


@pytest.mark.slow
def test_a_benchmark_with_a_plugin_at_every_door(command: Command, bench_folder: Path, tmp_path: Path) -> None:
    write_tsv(tmp_path / "train.tsv", "review\tstars", reviews(120, seed=0))
    write_tsv(tmp_path / "dev.tsv", "review\tstars", reviews(40, seed=1))
    (tmp_path / "stars.yaml").write_text(STARS)
    said = command("-c", BENCH, bench_folder, tmp_path)
    assert "dense finished   within_one 1.0" in said
    assert "first-layers" in said
    assert "'compresskit-randomized-svd': '0.1.0'" in said
    assert "the first 1 of 2 layers of model" in said
    assert "torch-export: the same models, scored and timed in torch.export" in said
    answer = command("-m", "compresskit", "tasks")
    assert "ordinal" in answer
    # Without the package a task of its kind is refused by name.
    with pytest.raises(InputError, match="unknown task kind 'ordinal'"):
        compresskit.evaluate(bench_folder / "teacher", task=tmp_path / "stars.yaml", data=tmp_path)
