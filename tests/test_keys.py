"""Keys of cells: the committed records have today's, and equal cells are one."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest

from compresskit.benchmark import keys
from compresskit.benchmark.baselines.registry import find, row_name
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.machine import host
from compresskit.benchmark.provenance import digest
from compresskit.benchmark.records import read
from compresskit.benchmark.rows import Cell, Row
from compresskit.planning.recipe import Recipe, for_method

REPORTS = Path(__file__).resolve().parents[1] / "reports"


@pytest.mark.parametrize("report", sorted(path.parent.name for path in REPORTS.glob("*/bench.json")))
def test_committed_records_have_the_keys_of_today(report: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else no committed benchmark could be continued, and no user's either: they would have to choose another folder.

    Every key is computed from what the record says made it and from its folder's grid; that of a baseline that was
    trained at another learning rate than today's, from that rate.
    """
    grid = Grid.model_validate(json.loads((REPORTS / report / "bench.json").read_text(encoding="utf-8"))["grid"])
    entries = {row_name(entry): entry for entry in grid.baselines}
    for path in (REPORTS / report / "cells").glob("*/record.json"):
        record, plain = read(path), json.loads(path.read_text(encoding="utf-8"))
        made = plain["made_by"]
        assert json.dumps(record.made_by.model_dump(mode="json")) == json.dumps(made)  # nothing is lost in between
        recipe = Recipe.model_validate(made["recipe"]) if made["recipe"] is not None else None
        row = Row(None, record.task, record.seed, record.method, recipe=recipe, ratio=record.ratio_asked)
        variant = record.method.partition(" + ")[2]  # "METHOD + VARIANT"
        row = row._replace(baseline="" if recipe is not None else entries[record.method], variant=variant)
        machine = None if grid.any_machine else host(record.made_by.hardware)
        if row.baseline and find(row.baseline)[0].trained:
            what = "task" if made.get("task_stage") else "general"
            usual = grid.of(row.task).stage(what)["learning_rate"]
            rate = made["task_stage" if what == "task" else "general"]["learning_rate"]
            monkeypatch.setattr(type(find(row.baseline)[0]), "pace", rate / usual)
        task, data = made.get("task"), made.get("data")
        ground = keys.Ground(made["model"], made["text"], made["versions"], machine, task, data)
        assert digest(keys.settings(row, grid, ground)) == record.key
        assert path.parent.name.endswith(f"-{record.key[:8]}")


def test_equal_cells_are_one() -> None:
    def cell(seed: int) -> Cell:
        return Cell("bert", None, "low-rank", for_method("low-rank", 4), 4.0, None, "", seed, f"key {seed}")

    assert cell(0) == pickle.loads(pickle.dumps(cell(0)))  # as a cluster's node gets it
    assert {cell(0): "found"}[cell(0)] == "found"
    assert cell(0) != cell(1)


def test_what_students_learn_from_is_not_of_the_dense_model() -> None:
    ground = keys.Ground({"name": "bert"}, {"source": "text"}, {}, None, {"name": "sst2"}, {})
    dense = Row(None, "sst2", 0, "dense", baseline="dense")
    student = Row(None, "sst2", 0, "low-rank", recipe=for_method("low-rank", 4), ratio=4.0)
    usual = Grid(tasks=("sst2",))
    for other in (Grid(tasks=("sst2",), general=False), Grid(tasks=("sst2",), task={"epochs": 3})):
        assert keys.settings(dense, usual, ground) == keys.settings(dense, other, ground)
        assert keys.settings(student, usual, ground) != keys.settings(student, other, ground)
    taught = Grid(tasks=("sst2",), teacher={"epochs": 1})
    for row in (dense, student):
        assert keys.settings(row, usual, ground) != keys.settings(row, taught, ground)


def test_what_a_baseline_is_made_of_is_in_the_name_of_what_its_cells_share() -> None:
    """Else a cell with a new file would start from what another cell learned with the old one."""
    grid = Grid(tasks=("sst2",), methods=("low-rank",), share_general=True, baselines=("dense", "half-layers"))
    (row,) = (row for row in grid.rows() if row.baseline == "half-layers")

    def name(content: dict[str, str]) -> str:
        ground = keys.Ground({"name": "bert"}, {"source": "text"}, {}, None, {"name": "sst2"}, {}, content)
        return keys.start(row, grid, keys.settings(row, grid, ground), "bert", "sst2")

    assert name({"weights": "1"}) == name({"weights": "1"}) != name({"weights": "2"})
