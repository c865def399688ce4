"""From a request to a compressed folder: the steps one by one, and what is refused before a model is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, weights

import compresskit
from compresskit import InputError
from compresskit.decomposers.registry import METHODS
from compresskit.pipeline import Compression, Request
from compresskit.planning.recipe import for_method, load_recipe

NOWHERE = "no/such/model"  # what is refused for another reason is refused before it is looked for


def test_the_steps_one_by_one_are_what_compress_does(bench_folder: Path, tmp_path: Path) -> None:
    options = {"method": "low-rank", "ratio": 3, "calibration": bench_folder / "text.txt"}
    work = Request(model=bench_folder / "model", **options).read()
    assert work.statistics is None
    known = work.calibrated()
    plan = known.plan()
    again = Compression(work.checkpoint, work.recipe, statistics=known.statistics)  # as a benchmark has them
    assert again.plan() == plan
    measured = again.apply(plan)
    assert all(a.error is not None for a in measured.assignments)
    again.write(measured, tmp_path, "small")
    assert compresskit.verify(tmp_path) == []
    ours = compresskit.compress(bench_folder / "model", **options).state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either a method"),
        ({"method": "low-rank"}, "needs a ratio or a size"),
        ({"method": "low-rank", "ratio": 2, "recipe": "kroneckerbert-19"}, "not both"),
        ({"method": "low-rank", "ratio": 2, "size": "5MB"}, "give a ratio or a size, not both"),
        ({"method": "low-rank", "size": "5 apples"}, "give a number with kB, MB or GB"),
        ({"method": "low-rank", "ratio": 1}, "must be a finite number above 1"),
        ({"method": "low-rank", "ratio": 2, "allocation": "eror"}, "did you mean 'error'"),
        ({"method": "low-rank", "ratio": 2, "objective": "speed"}, "unknown objective 'speed'"),
        ({"recipe": "kroneckerbert-19", "size": "5MB"}, "gives explicit shapes, so a ratio or size cannot be chosen"),
        ({"recipe": "kroneckerbert-19", "allocation": "error"}, "so an allocation cannot be chosen"),
        ({"method": "low-rank", "ratio": 2, "data": "."}, "data belongs to a task"),
        ({"method": "low-rank", "ratio": 2, "calibration": True, "calibration_task": "sst2"}, "not on both"),
    ],
)
def test_what_needs_no_model_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(model=NOWHERE, **options)


def test_a_text_is_looked_for_before_the_model() -> None:
    request = Request(model=NOWHERE, method="low-rank", ratio=2, calibration="missing.txt")
    with pytest.raises(InputError, match=r"text missing.txt"):
        request.read()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", [*METHODS.all(), "auto"])
def test_the_weight_file_has_at_most_the_size_that_was_asked_for(
    method: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_model(hidden_size=96, vocab_size=1999).to(dtype).save_pretrained(tmp_path / "dense")
    # A class that leaves the pooler out: it is stored all the same.
    dense = (tmp_path / "dense" / "model.safetensors").stat().st_size
    for share in (0.31, 0.52):
        size = int(share * dense)
        work = Request(model=tmp_path / "dense", as_class="masked-lm", method=method, size=f"{size / 1e3}kB").read()
        small = tmp_path / f"small-{share}"
        small.mkdir()
        work.write(work.apply(work.plan()), small, "compresskit compress")
        assert 0.95 * size <= (small / "model.safetensors").stat().st_size <= size


def test_a_size_out_of_reach_names_one_that_can_be_had() -> None:
    with pytest.raises(InputError, match=r"too small: with group-reduce .* at least ([0-9.]+) MB") as caught:
        Request(model=tiny_model(), method="group-reduce", size="9kB").read().plan()
    size = str(caught.value).split("at least ")[1].split(" MB")[0]
    assert Request(model=tiny_model(), method="group-reduce", size=f"{size}MB").read().plan().ratio > 1


@pytest.mark.parametrize("asked", [{"ratio": 400}, {"size": "9kB"}, {"size": "1GB"}])
def test_what_is_out_of_reach_is_known_without_a_plan(asked: dict[str, Any]) -> None:
    work = Request(model=tiny_model(), method="group-reduce", **asked).read()
    with pytest.raises(InputError) as planned:
        work.plan()
    with pytest.raises(InputError) as known:
        work.check_reachable()
    assert str(known.value) == str(planned.value)
    Request(model=tiny_model(), method="group-reduce", ratio=3).read().check_reachable()


def test_a_size_amounts_to_a_ratio() -> None:
    plan = Request(model=tiny_model(), method="low-rank", size="90kB").read().plan()
    assert plan.ratio_asked == pytest.approx(3.4, abs=0.4)
    assert plan.ratio >= plan.ratio_asked
    with pytest.raises(InputError, match="not below the dense model's"):
        Request(model=tiny_model(), method="low-rank", size="1GB").read().plan()


def test_options_change_a_recipe() -> None:
    recipe = for_method("low-rank", 3)
    changed = Request(model=tiny_model(), recipe=recipe, ratio=2, allocation="error", allow_slow=True).read().recipe
    assert (changed.ratio, changed.allocation, changed.allow_slow, changed.name) == (2.0, "error", True, "low-rank")
    same = Request(model=tiny_model(), recipe="kroneckerbert-19").read().recipe
    assert same == load_recipe("kroneckerbert-19")


def test_a_plan_takes_what_compress_takes() -> None:
    model = tiny_model()
    plan = compresskit.plan(model, method="low-rank", ratio=3)
    assert all(a.error is not None for a in plan.assignments)
    with pytest.raises(TypeError, match="rato"):
        compresskit.plan(model, method="low-rank", rato=3)
