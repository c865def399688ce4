"""Baselines of other packages, and what a benchmark asks of them."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, count, tiny_bench, tiny_model, token_ids
from transformers import PreTrainedModel

from compresskit import InputError
from compresskit.benchmark.baselines.base import Asked, Baseline, Made
from compresskit.benchmark.baselines.int8 import quantise
from compresskit.benchmark.baselines.registry import BASELINES, find, row_name
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.provenance import MadeBy
from compresskit.model.checkpoint import Checkpoint


class FirstLayers(Baseline):
    """The first K layers as they are: an argument, and nothing trained."""

    name = "first"
    summary = "the first K layers"
    argument = "K"

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        model = dense.model
        model.encoder.layer = model.encoder.layer[: int(asked.argument)]
        model.config.num_hidden_layers = int(asked.argument)
        return Made(dense, {"facts": {"layers left": asked.argument}})

    def megabytes(self, made: Checkpoint) -> float:
        return 4 * count(made.model) / 1e6

    def fact(self, model: str, made_by: MadeBy) -> str:
        assert made_by.facts is not None
        return f"the first {made_by.facts['layers left']} layers of {model}"


class Shallower(FirstLayers):
    """A stand-in for a model with fewer layers: one row for each ratio and seed, trained as the students are."""

    name = "shallower"
    summary = "fewer layers by the ratio"
    argument = ""
    rated = True
    trained = True
    exported = False

    def make(self, dense: Checkpoint, asked: Asked) -> Made:
        assert asked.ratio is not None
        made = super().make(dense, Asked("1"))
        return replace(made, made_by={"facts": {"layers left": f"{asked.ratio:g}"}})

    def counted(self, dense: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
        return dense


class Method(FirstLayers):
    name = "kronecker"
    argument = ""


@pytest.fixture
def others() -> Iterator[None]:
    """The baselines above, as those of another package."""
    classes = (FirstLayers, Shallower, Method)
    points = [EntryPoint(one.name, f"test_baselines:{one.__name__}", BASELINES.group) for one in classes]
    with BASELINES.with_plugins(points):
        yield


@pytest.mark.usefixtures("others")
def test_rows_of_another_package(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    grid = {"methods": ("low-rank",), "ratios": (3.0,), "baselines": ("first:1", "shallower"), "seeds": (0, 1)}
    result = tiny_bench(bench_folder, tmp_path / "out", **grid)
    rows = {(record.method, record.ratio_asked, record.seed): record for record in result.records}
    assert list(rows) == [
        ("dense", None, 0),  # always there
        ("first 1", None, 0),
        ("shallower", 3.0, 0),
        ("shallower", 3.0, 1),
        ("low-rank", 3.0, 0),
        ("low-rank", 3.0, 1),
    ]
    assert {record.status for record in result.records} == {"finished"}
    first, shallower, dense = rows["first 1", None, 0], rows["shallower", 3.0, 0], rows["dense", None, 0]
    assert (first.kind, shallower.kind) == ("baseline", "baseline")
    model = tiny_model()
    model.encoder.layer = model.encoder.layer[:1]
    assert first.parameters == count(model)
    assert first.megabytes == 4 * count(model) / 1e6
    assert shallower.parameters == dense.parameters
    assert shallower.seconds_distill > 0
    assert first.seconds_distill is None
    assert first.seconds_compress is not None
    assert first.made_by.versions.keys() == dense.made_by.versions.keys()
    folders = {path.name.rpartition("-")[0] for path in (tmp_path / "out" / "cells").iterdir()}
    assert {"model-first-1-seed0", "model-shallower-3x-seed1"} <= folders
    assert not list((tmp_path / "out").glob("cells/*first*/model"))
    assert len(list((tmp_path / "out").glob("cells/*shallower*/model"))) == 2
    text = (result.folder / "README.md").read_text()
    assert "- first 1: the first 1 layers of model" in text
    listed = run("methods")
    assert "the first K layers" in listed.out
    # Where the package is missing the report still renders; the benchmark itself says what is missing.
    with BASELINES.with_plugins([]):
        assert run("report", result.folder).code == 0
        assert "the first 1 layers" not in (result.folder / "README.md").read_text()
        with pytest.raises(InputError, match="unknown baseline 'first'"):
            tiny_bench(bench_folder, tmp_path / "out", **grid)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("first", "baseline first: give first:K"),
        ("shallower:2", "baseline shallower:2: takes no argument; give shallower"),
        ("kronecker", "baseline kronecker: is called like a method"),
        ("int8 ", "unknown baseline 'int8 ': did you mean 'int8'"),
    ],
)
def test_refused(entry: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Grid(baselines=(entry,)).checked()


def test_names_of_rows_are_safe() -> None:
    assert row_name("other:some/model|x_1") == "other model-x_1"
    assert find("half-layers")[1] == ""


def test_what_made_a_cell_has_no_misspelt_field() -> None:
    path = next((Path(__file__).resolve().parents[1] / "reports" / "minilm-default" / "cells").glob("*/record.json"))
    made = json.loads(path.read_text(encoding="utf-8"))["made_by"]
    assert MadeBy.model_validate(made).model_dump(mode="json") == made
    for wrong in ({"layer": "3 of 6"}, {"hardware": {**made["hardware"], "core": 2}}):
        with pytest.raises(ValueError, match="Extra inputs"):
            MadeBy.model_validate({**made, **wrong})


def test_int8_rounds_as_torch_does() -> None:
    model = tiny_model(head="classifier")
    made = quantise(model)
    ids = token_ids()
    with torch.no_grad():
        ours, exact = made(ids).logits, model(ids).logits
    assert 0 < (ours - exact).abs().max() < 0.05
    layer: Any = made.get_submodule("bert.encoder.layer.0.output.dense")
    weight = model.get_submodule("bert.encoder.layer.0.output.dense").weight
    step = 2 * weight.abs().max() / 255
    assert (layer.weight() - weight).abs().max() <= 0.51 * step
    if not hasattr(torch, "ao"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch drop it
        theirs = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        assert torch.equal(ours, theirs(ids).logits)
