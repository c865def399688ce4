"""What an engineer would pick instead of factors: every rival of its own size or ratio, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, count, refused, tiny_bench, tiny_model
from transformers import AutoModel

from compresskit.benchmark.runner import BenchResult
from compresskit.model.depth import stretches


@pytest.fixture(scope="module")
def deep(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like ``bench_folder``, with a model of three layers."""
    root = tmp_path_factory.mktemp("deep")
    tiny_model(num_hidden_layers=3, seed=5).save_pretrained(root / "model")
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, root / "model")
    shutil.copy(bench_folder / "text.txt", root)
    return root


def find(result: BenchResult, method: str, ratio: float | None = None) -> Any:
    return next(r for r in result.records if (r.method, r.ratio_asked) == (method, ratio))


def test_fewer_layers_learn_from_the_end_of_their_stretch(deep: Path, tmp_path: Path) -> None:
    baselines = ("dense", "layers:2", "layers:3", "fewer-layers")
    result = tiny_bench(deep, tmp_path / "out", baselines=baselines, ratios=(1.4, 30.0))
    two, three = find(result, "layers 2"), find(result, "layers 3")
    assert (two.status, two.made_by.layers) == ("finished", "2 of 3")
    assert two.score > two.score_before
    assert (three.status, three.message) == (
        "unreachable",
        "layers:3: K must be below 3, the number of layers of the model",
    )
    dense = AutoModel.from_pretrained(deep / "model")
    sizes = {left: count(tiny_model(num_hidden_layers=left)) for left in (1, 2)}
    for ratio in (1.4, 30.0):
        made = find(result, "fewer-layers", ratio)
        nearest = min(sizes, key=lambda left: abs(count(dense) / sizes[left] / ratio - 1))
        assert made.made_by.layers == f"{nearest} of 3"
        assert made.ratio == count(dense) / sizes[nearest]
    text = (result.folder / "README.md").read_text()
    assert "- layers 2: 2 layers of model, evenly spread" not in text  # it says of how many
    assert "- layers 2: 2 of 3 layers of model, evenly spread" in text
    assert f"at {find(result, 'fewer-layers', 30.0).ratio:.3g}x" in text  # no row of that name is 30 times smaller


@pytest.mark.parametrize("layers", range(1, 13))
def test_stretches_are_whole_and_as_equal_as_can_be(layers: int) -> None:
    for kept in range(1, layers + 1):
        found = stretches(layers, kept)
        assert [number for stretch in found for number in stretch] == list(range(layers))
        lengths = {len(stretch) for stretch in found}
        assert lengths <= {layers // kept, -(-layers // kept)}
        if layers % kept == 0:
            assert [stretch[-1] for stretch in found] == list(range(layers // kept - 1, layers, layers // kept))


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("layers", "baseline layers: give layers:K"),
        ("layers:0", "baseline layers:0: K must be a whole number of at least 1, e.g. layers:3"),
        ("layers:-1", "K must be a whole number"),
        ("layers:1.5", "K must be a whole number"),
        ("layers:two", "K must be a whole number"),
        ("fewer-layers:2", "baseline fewer-layers:2: takes no argument"),
    ],
)
def test_what_no_rival_can_be_is_refused_before_any_cell(run: Run, entry: str, says: str) -> None:
    refused(run("bench", "--baselines", entry, "--output", "out"), says)
