"""Plug-ins that are tried without installing them: what works, what is broken, and twins."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from conftest import Run, tiny_model

import compresskit
from compresskit.decomposers import Group, Target
from compresskit.decomposers.low_rank import LowRank, LowRankSpec
from compresskit.decomposers.registry import METHODS, get, register
from compresskit.testing import Matrices

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "plugins" / "method"


@pytest.fixture
def fresh() -> Iterator[list[EntryPoint]]:
    """The entry points that the registry will find once it is asked; none so far."""
    points: list[EntryPoint] = []
    with METHODS.with_plugins(points):
        yield points


class Renamed(LowRank):
    name = "renamed"


class Twin(LowRank):
    pass


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name=name, value=value, group=METHODS.group)


def test_a_plugin_is_a_method(fresh: list[EntryPoint]) -> None:
    fresh.append(point("renamed", "test_plugins:Renamed"))
    assert "renamed" in METHODS.all()
    assert METHODS.source("renamed") == "test_plugins:Renamed"
    assert METHODS.source("low-rank") == "compresskit"
    assert compresskit.compress(tiny_model(), method="renamed", ratio=3)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("gone", "no_such_module:Method", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("empty", "test_plugins:Nothing", "AttributeError"),
        ("group", "compresskit.decomposers.groups:Group", "no subclass of compresskit's Decomposer"),
        ("another", "test_plugins:Renamed", "calls itself 'renamed', its entry point says 'another'"),
    ],
)
def test_a_broken_plugin_is_listed_and_refused(
    fresh: list[EntryPoint], run: Run, name: str, value: str, reason: str
) -> None:
    fresh.append(point(name, value))
    listed = run("methods")
    assert listed.code == 0
    assert "BROKEN" in listed.out
    assert reason in " ".join(listed.out.replace("│", " ").split())
    answer = run("compress", "--method", name, "--ratio", "3", "--model", "anything")
    assert answer.code == 2
    assert f"method {name!r} cannot be loaded: plug-in of {value}" in answer.err
    assert reason in answer.err
    # The others are not harmed.
    assert get("low-rank").name == "low-rank"


def test_plugins_may_register_themselves(fresh: list[EntryPoint]) -> None:
    register(Renamed)  # as a module with @register does when it is imported
    fresh.append(point("renamed", "test_plugins:Renamed"))
    assert get("renamed").name == "renamed"


def test_two_methods_of_one_name_are_refused(fresh: list[EntryPoint], run: Run) -> None:
    fresh.append(point("low-rank", "test_plugins:Twin"))
    for _ in range(2):  # the second answer is the first one's
        answer = run("methods")
    assert answer.code == 2
    assert "method 'low-rank' of test_plugins:Twin is already registered by compresskit: uninstall one" in answer.err


def test_the_example_is_near_the_best_low_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE / "src")
    from compresskit_randomized_svd import RandomizedSvd

    group = Group("layer", (Target("layer", "linear", "ffn", (48, 96)),))
    source, spec = Matrices.random(group.targets), LowRankSpec(rank=8)
    (error,) = RandomizedSvd().errors(group, [spec], source)
    (best,) = get("low-rank").errors(group, [spec], source)
    assert best <= error < 1.01 * best
    zero = Matrices({"layer": torch.zeros(48, 96)})
    assert RandomizedSvd().errors(group, [spec], zero) == [0.0]
