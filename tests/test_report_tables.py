"""The tables of a benchmark against figures worked out by hand."""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from compresskit.benchmark import latency
from compresskit.benchmark.grid import GENERAL, Grid
from compresskit.benchmark.quality import Encoded, Passages, closeness, retrieval
from compresskit.benchmark.records import RECORD, Record, frame, write
from compresskit.benchmark.report import comparison, plots
from compresskit.benchmark.report.render import command, web_page
from compresskit.benchmark.report.rivals import of_baselines

MADE_BY = {
    "model": {"name": "bert", "sha256": {}},
    "recipe": None,
    "text": {"source": "text.txt", "sha256": None},
    "general": {},
    "versions": {},
    "hardware": {
        "machine": "m", "processor": "p", "cores": 1, "memory_gib": None, "threads": 1, "device": "cpu",
    },
    "git": None,
}  # fmt: skip


def record(method: str, asked: float | None, task: str, seed: int, score: float | None, **changes: Any) -> Record:
    """A record with what the tables read."""
    student = asked is not None
    size = asked or 1.0
    done = score is not None
    fields: dict[str, Any] = {
        "key": f"{method}{asked}{task}{seed}",
        "status": "finished" if done else "failed",
        "message": "" if done else "out of luck",
        "model": "bert",
        "method": method,
        "kind": "student" if student else "baseline",
        "ratio_asked": asked,
        "task": task,
        "seed": seed,
        "made_by": MADE_BY,
    }
    if done:
        timing = {"milliseconds": 10 / size, "spread": 0.5, "speedup": size**0.5}
        fields |= {
            "ratio": size,
            "parameters": int(1000 / size),
            "megabytes": 4 / size,
            "score": score,
            "score_teacher": 0.8,
            "latency": {
                "phase": "p",
                "tokens": 8,
                "threads": 1,
                "device": "cpu",
                "rounds": 3,
                "batches": {"1": timing, "32": timing},
            },
        }
    return Record.model_validate(fields | changes)


def example() -> pd.DataFrame:
    """Two tasks, two methods, two ratios, two seeds; one cell of rte failed, and all of a third method."""
    records = [record("dense", None, task, 0, 0.8) for task in ("sst2", "rte")]
    scores = {
        ("low-rank", 4): 0.76,
        ("low-rank", 8): 0.6,
        ("kronecker", 4): 0.7,
        ("kronecker", 8): 0.64,
        ("tucker", 8): 0.0,
    }
    for task, less in (("sst2", 0.0), ("rte", 0.1)):
        for (method, ratio), score in scores.items():
            for seed in (0, 1):
                broken = (method, ratio, task, seed) == ("kronecker", 8, "rte", 1) or (method, ratio) == ("tucker", 8)
                records.append(record(method, ratio, task, seed, None if broken else score - less + 0.02 * seed))
    return frame(records)


def test_means_and_spread_over_seeds() -> None:
    table = comparison.by_seed(example())
    row = table[(table["method"] == "low-rank") & (table["ratio_asked"] == 4) & (table["task"] == "sst2")].iloc[0]
    assert row["score"] == pytest.approx(0.77)
    assert row["score_kept"] == pytest.approx(0.77 / 0.8)
    assert row["kept_spread"] == pytest.approx(np.std([0.76 / 0.8, 0.78 / 0.8], ddof=1))
    assert row["seeds"] == 2
    half = table[(table["method"] == "kronecker") & (table["ratio_asked"] == 8) & (table["task"] == "rte")].iloc[0]
    assert (half["status"], half["seeds"], half["message"]) == ("finished in part", 1, "out of luck")


def test_summary_marks_the_best_of_each_ratio() -> None:
    table = comparison.by_seed(example())
    columns, rows = comparison.summary(table[table["task"] == "sst2"])
    assert columns == ["kept ↑", "4x", "8x", "own ratio"]
    assert rows == [
        ["dense", "", "", "100.0 % at 1x"],
        ["low-rank", "**96.2 ± 1.8 %**", "76.2 ± 1.8 %", ""],
        ["kronecker", "88.8 ± 1.8 %", "**81.2 ± 1.8 %**", ""],
        ["tucker", "", "failed", ""],
    ]


def test_kept_over_tasks_is_mean_over_mean_and_needs_every_task() -> None:
    table = comparison.by_seed(comparison.over_tasks(example()))
    low = table[(table["method"] == "low-rank") & (table["ratio_asked"] == 4)].iloc[0]
    assert low["score_kept"] == pytest.approx(((0.77 + 0.67) / 2) / 0.8)
    assert comparison.summary(table)[1][2][2] == "**73.8 % (1 of 2 seeds)**"  # one finished both tasks
    both = table[(table["method"] == "kronecker") & (table["ratio_asked"] == 8)].iloc[0]
    assert both["status"] == "finished in part"


def test_every_table_has_its_own_pictures(tmp_path: Path) -> None:
    cells = frame([record("dense", None, task, 0, 0.8) for task in ("a.b", "a-b", "A.b")])
    made = [name for name, _ in plots.draw(comparison.sections(cells), pd.DataFrame(), tmp_path)]
    assert len(set(made)) == len(made) >= 4 * 2


def test_a_ratio_that_is_missed_is_shown_with_it() -> None:
    table = comparison.by_seed(frame([record("dense", None, "", 0, 0.8), record("x", 4, "", 0, 0.4, ratio=5.0)]))
    assert comparison.summary(table)[1][1] == ["x", "**50.0 %** at 5x", ""]


def test_kept_needs_a_teacher_that_says_something() -> None:
    """Matthews' coefficient may be 0 or negative: no share of that is kept, and nothing is best by it."""
    for teacher in (0.0, -0.05):
        cells = [record("dense", None, "cola", 0, teacher, score_teacher=teacher)]
        cells += [
            record("x", 4, "cola", 0, -0.5, score_teacher=teacher),
            record("y", 4, "cola", 0, 0.2, score_teacher=teacher),
        ]
        table = comparison.by_seed(frame(cells))
        assert table["score_kept"].isna().all()
        assert not table["best"].any()
        assert [row[1] for row in comparison.summary(table)[1]] == ["", "N/A", "N/A"]
        assert comparison.over_tasks(frame(cells))["score_kept"].isna().all()


def test_kept_needs_a_teacher_that_says_something_on_every_split() -> None:
    """As after a training and in `shrink`: a split at -0.1 would lower both means. Exports have no share either."""
    splits = {"dev": {"matthews": 0.5}, "hard": {"matthews": -0.1}}
    more = {"metric": "matthews", "score_teacher": 0.2, "exports": {"onnx": {"score": 0.3, "megabytes": 1.0}}}
    cells = [record("dense", None, "cola", 0, 0.2, scores=splits, **more), record("x", 4, "cola", 0, 0.3, **more)]
    others = [record("dense", None, "sst2", 0, 0.8), record("x", 4, "sst2", 0, 0.4)]
    found = frame([*cells, *others])
    assert found[found["task"] == "cola"]["score_kept"].isna().all()
    assert found[found["task"] == "sst2"]["score_kept"].tolist() == [1.0, 0.5]
    together = comparison.by_seed(comparison.over_tasks(found))
    assert together["score_kept"].isna().all()
    assert "all tasks: kept is N/A, since the teacher scores 0 or below on cola" in comparison.problems(together)


def test_a_task_without_a_share_leaves_none_over_tasks() -> None:
    """A teacher at -0.05 would lower both sums: a student that keeps 90 % of the other task would seem to keep 93 %."""
    cells = []
    for seed in (0, 1):
        for task, teacher, student in (("cola", -0.05, -0.04), ("sst2", 0.9, 0.81)):
            cells.append(record("dense", None, task, seed, teacher, score_teacher=teacher))
            cells.append(record("x", 4, task, seed, student, score_teacher=teacher))
    table = comparison.by_seed(comparison.over_tasks(frame(cells)))
    assert table["score_kept"].isna().all()
    assert [row[1] for row in comparison.summary(table)[1]] == ["", "N/A"]
    assert comparison.summary(table)[1][0][-1] == "N/A"
    assert comparison.problems(table) == ["all tasks: kept is N/A, since the teacher scores 0 or below on cola"]
    assert table[table["method"] == "x"].iloc[0]["score"] == pytest.approx((0.81 - 0.04) / 2)


@pytest.mark.parametrize(
    ("seeds", "kept", "count"),
    [
        ({"sst2": {0: 0.8}, "rte": {5: 0.7}}, [1.5], 1),
        ({"sst2": {0: 0.8, 1: 0.6}, "rte": {5: 0.7}}, [1.5, 1.3], 2),
        ({"sst2": {0: 0.8, 1: 0.6}, "rte": {0: 0.7, 1: 0.5}}, [1.5, 1.1], 2),
    ],
)
def test_no_cell_counts_as_two_seeds_over_tasks(seeds: Any, kept: list[float], count: int) -> None:
    """One seed for each task is one seed, whichever it is: it has no spread of 0."""
    cells = [record("dense", None, task, next(iter(scores)), 0.9) for task, scores in seeds.items()]
    cells += [record("x", 4, task, seed, score) for task, found in seeds.items() for seed, score in found.items()]
    table = comparison.by_seed(comparison.over_tasks(frame(cells)))
    row = table[table["method"] == "x"].iloc[0]
    assert row["seeds"] == count
    teacher = sum(entry.score_teacher for entry in cells[:2])
    assert row["score_kept"] == pytest.approx(np.mean(kept) / teacher)
    spread = np.std(kept, ddof=1) / teacher if count > 1 else np.nan
    assert row["kept_spread"] == pytest.approx(spread, nan_ok=True)


def test_seeds_of_another_method_are_not_missing_over_tasks() -> None:
    """A method with more seeds of its own (method_seeds) made others, which have all theirs, lack a task."""
    cells = [record("dense", None, task, 0, 0.8) for task in ("sst2", "rte")]
    cells += [record("y", 4, task, seed, 0.7) for task in ("sst2", "rte") for seed in (0, 1, 2)]
    cells += [record("x", 4, "sst2", 0, 0.8), record("x", 4, "sst2", 1, 0.6), record("x", 4, "rte", 0, 0.4)]
    table = comparison.by_seed(comparison.over_tasks(frame(cells)))
    row = table[table["method"] == "x"].iloc[0]
    assert (row["status"], row["seeds"], row["asked"]) == ("finished", 2, 2)
    assert row["score_kept"] == pytest.approx((0.6 + 0.5) / 2 / 0.8)


def test_a_failed_first_cell_takes_no_seed_with_it_over_tasks() -> None:
    """The row over tasks took its status from the first cell of all, so that every seed counted as failed."""
    cells = [record("dense", None, task, 0, 0.8) for task in ("sst2", "rte")]
    for task in ("sst2", "rte"):
        cells += [record("x", 4, task, seed, score) for seed, score in ((0, None), (1, 0.6), (2, 0.4))]
    table = comparison.by_seed(comparison.over_tasks(frame(cells)))
    row = table[table["method"] == "x"].iloc[0]
    assert (row["status"], row["seeds"], row["asked"]) == ("finished in part", 2, 3)
    assert row["score_kept"] == pytest.approx(0.5 / 0.8)
    assert row["megabytes"] > 0


def test_a_failed_seed_of_a_task_with_seeds_of_its_own_hides_no_other() -> None:
    cells = [record("dense", None, task, 0, 0.8) for task in ("sst2", "rte")]
    cells += [record("x", 4, "sst2", seed, 0.6) for seed in (0, 1, 2)]
    cells += [record("x", 4, "rte", 5, None), record("x", 4, "rte", 6, 0.4)]
    row = comparison.by_seed(comparison.over_tasks(frame(cells))).set_index("method").loc["x"]
    assert (row["status"], row["seeds"]) == ("finished", 3)
    assert row["score_kept"] == pytest.approx(0.5 / 0.8)


def test_a_baseline_says_its_rate_though_a_variant_has_it_too() -> None:
    """The report's line on training is of students without a variant, whose rate would seem to be the baseline's."""

    def at(rate: float) -> dict[str, Any]:
        stage = {"learning_rate": rate, "losses": {"logits": 1}, "max_steps": 1, "max_tokens": None}
        return {"made_by": MADE_BY | {"task_stage": stage | {"precision": "fp32"}}}

    grid = Grid(tasks=("sst2",), methods=("low-rank",), variants={"slow": {"task": {"learning_rate": 1e-4}}})
    cells = [
        record("half-layers", None, "sst2", 0, 0.7, **at(1e-4)),
        record("low-rank", 4, "sst2", 0, 0.7, **at(5e-4)),
        record("low-rank + slow", 4, "sst2", 0, 0.7, **at(1e-4)),
    ]
    assert "learning rate 0.0001 in stage 2" in dict(of_baselines(cells, grid))["half-layers"]
    assert "learning rate" not in dict(of_baselines([cells[0], cells[2]], grid))["half-layers"]


def test_stage_1_is_told_for_each_model_whose_losses_differ(tmp_path: Path) -> None:
    """A model without a head has no logits to compare; the line of the first model stood for every student."""
    limits = {"learning_rate": 1e-3, "max_steps": 1, "max_tokens": None, "precision": "fp32"}
    for model, losses in (("bare", {"hidden": 1}), ("headed", {"hidden": 1, "logits": 1})):
        made = {"made_by": MADE_BY | {"general": limits | {"losses": losses}}, "model": model}
        for method, asked in (("dense", None), ("low-rank", 4.0)):
            key = f"{model[:2]}-{method}"[:8].ljust(8, "0")
            (tmp_path / "cells" / f"x-{key}").mkdir(parents=True)
            write(record(method, asked, "sst2", 0, 0.7, key=key, **made), tmp_path / "cells" / f"x-{key}" / RECORD)
    grid = Grid(models=("bare", "headed"), tasks=("sst2",), methods=("low-rank",), ratios=(4.0,))
    (tmp_path / "bench.json").write_text(json.dumps({"format_version": 1, "grid": grid.model_dump(mode="json")}))
    text = web_page(tmp_path, "plotly.js")
    for model, losses in (("bare", "hidden"), ("headed", "hidden, logits")):
        assert re.search(rf"Stage 1, every student of {model}\b[^§]{{0,200}}losses {losses}, fp32", text)


def test_an_unreachable_cell_stays_unreachable_over_tasks() -> None:
    cells = [record("dense", None, task, 0, 0.8) for task in ("sst2", "rte")]
    cells += [record("x", 90, task, 0, None, status="unreachable", message="out of reach") for task in ("sst2", "rte")]
    table = comparison.by_seed(comparison.over_tasks(frame(cells)))
    assert comparison.summary(table)[1][1] == ["x", "unreachable", ""]


def test_a_task_that_has_not_run_yet_is_no_failure_over_tasks() -> None:
    cells = [record("dense", None, task, 0, 0.8) for task in ("sst2", "rte")] + [record("x", 8, "sst2", 0, 0.7)]
    table = comparison.by_seed(comparison.over_tasks(frame(cells)))
    assert comparison.summary(table)[1][1] == ["x", "not run", ""]


def test_nothing_without_a_result_is_left_out() -> None:
    table = comparison.by_seed(frame([record("dense", None, "", 0, 0.8), record("x", 4, "", 0, None)]))
    columns, rows = comparison.full(table)
    assert rows[1][0] == "x"
    assert rows[1][-1] == "failed"
    assert set(rows[1][2:-1]) == {"N/A"}
    assert len(columns) == len(rows[1])
    assert comparison.problems(table) == ["x 4x: failed: out of luck"]
    assert "failed" in comparison.latex(table)


def test_pareto() -> None:
    points = pd.DataFrame({"x": [1, 2, 2, 3, 4, np.nan], "y": [9, 8, 7, 8, 1, 99]})
    assert comparison.pareto(points["x"], points["y"]) == [0, 3, 4]


def equal_bytes() -> pd.DataFrame:
    """A student and its export: as many parameters, fewer bytes; and a rival that is faster than both."""
    timing = {"phase": "p", "tokens": 8, "threads": 1, "device": "cpu", "rounds": 3}
    batch = {"milliseconds": 4.0, "spread": 0.1, "speedup": 2.5}
    export = {"megabytes": 0.3, "score": 0.76, "latency": {**timing, "batches": {"1": batch}}}
    fast = {**timing, "batches": {"1": {"milliseconds": 1.0, "spread": 0.1, "speedup": 10.0}}}
    return frame(
        [
            record("dense", None, "", 0, 0.8),
            record("static", None, "", 0, 0.4, latency=fast, megabytes=0.5, ratio=8.0),
            record("low-rank", 4, "", 0, 0.768, exports={"onnx-int8": export}),
        ]
    )


def test_an_export_of_fewer_seeds_than_were_asked_says_so() -> None:
    export = {"megabytes": 1.0, "score": 0.7}
    cells = [record("dense", None, "sst2", 0, 0.8)]
    cells += [record("low-rank", 4, "sst2", seed, 0.76, exports={"onnx": export}) for seed in (0, 1)]
    cells += [record("low-rank", 4, "sst2", 2, None)]
    for found in (frame(cells), comparison.over_tasks(frame(cells))):
        shown = {row[0]: row[1] for row in comparison.summary(comparison.by_seed(found))[1]}
        assert shown["low-rank"].strip("*").endswith("(2 of 3 seeds)")
        assert shown["low-rank onnx"].endswith("(2 of 3 seeds)")


def test_fronts_by_bytes_and_milliseconds_have_exports_in_them() -> None:
    table = comparison.by_seed(equal_bytes()).set_index("method")
    marks = {name: tuple(row[["pareto", "pareto_mb", "pareto_ms"]]) for name, row in table.iterrows()}
    assert marks == {
        "dense": (True, True, True),
        "static": (True, False, True),  # its file is larger than the export's, which keeps more
        "low-rank": (True, True, True),
        "low-rank onnx-int8": (False, True, False),
    }
    _, rows = comparison.full(comparison.by_seed(equal_bytes()))
    assert [row[-1] for row in rows] == ["● MB ms", "● ms", "● MB ms", "MB"]


def test_winners_are_read_from_the_table() -> None:
    table = comparison.by_seed(equal_bytes())
    assert comparison.winners(table) == (
        "Of what keeps at least 99 %: the smallest file is that of dense (4.00 MB) and the fastest is dense (10.0 ms); "
        "95 %: low-rank onnx-int8 4x (0.30 MB) and low-rank 4x (2.5 ms); "
        "50 %: low-rank onnx-int8 4x (0.30 MB) and static (1.0 ms)."
    )
    assert comparison.winners(table) in comparison.summary_markdown([("", table)])
    assert comparison.winners(table[table["method"] == "none"]) == ""
    without = comparison.by_seed(frame([record("dense", None, "", 0, 0.8, latency=None)]))
    assert comparison.winners(without) == "Of what keeps at least 99 %: the smallest file is that of dense (4.00 MB)."


def test_retrieval_and_closeness_by_hand() -> None:
    document = np.array([0, 0, 1, 1])
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.8, 0.3]])
    assert retrieval(vectors, document) == 0.75  # only the last one is nearest to a row of the other document
    passages = Passages(torch.zeros(4, 3, dtype=torch.long), document)
    assert passages.chance == pytest.approx(1 / 3)
    torch.manual_seed(0)
    layers = tuple(torch.randn(4, 3, 2) for _ in range(3))
    teacher = Encoded(layers, layers[-1].mean(1))
    same = closeness(teacher, teacher, passages)
    assert (same["sentence similarity"], same["hidden error"]) == (pytest.approx(1.0), 0.0)
    constant = Encoded(tuple(torch.ones(4, 3, 2) for _ in range(3)), torch.ones(4, 2))
    assert closeness(constant, teacher, passages)["sentence similarity"] == pytest.approx(0.0, abs=1e-6)
    # A student with half the layers is compared with every second one of the teacher.
    half = Encoded((layers[0], layers[2]), teacher.vectors)
    assert closeness(half, teacher, passages)["hidden error"] == 0.0
    # A narrower one through the linear maps that fit best on other passages.
    wider = torch.randn(2, 5)
    wide = Encoded(tuple(layer @ wider for layer in layers), teacher.vectors @ wider)
    found = closeness(teacher, wide, passages, (teacher, wide))
    assert found["sentence similarity"] == pytest.approx(1.0, abs=1e-3)
    assert found["hidden error"] == pytest.approx(0.0, abs=1e-2)
    assert found["retrieval"] == closeness(teacher, teacher, passages)["retrieval"]


def test_speedup_is_the_median_of_the_rounds() -> None:
    timing = latency.timing([0.010, 0.020, 0.011], [0.030, 0.030, 0.022])
    assert timing.milliseconds == pytest.approx(11)
    assert timing.speedup == pytest.approx(2.0)  # of 3, 1.5 and 2
    assert timing.spread == pytest.approx(5.0)


def test_models_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=20,
        max_position_embeddings=12,
    )  # fmt: skip
    models = {name: BertModel(config).eval() for name in "abc"}
    order: list[tuple[int, int]] = []
    monkeypatch.setattr(latency, "LEAST", 0.0)
    monkeypatch.setattr(latency, "forward", lambda model, batch: order.append((id(model), len(batch["input_ids"]))))
    found = latency.time_models(models, dict.fromkeys("abc", "a"), "phase", 3, lambda *_: None)
    turns = [turn for turn, _ in groupby(order)]  # torch's timer warms up before each measurement
    assert turns == [(id(model), size) for size in (1, 32) for model in models.values()] * 4  # the first: how long?
    assert found["a"].batches["1"].speedup == 1.0
    assert found["b"].tokens == 12  # all positions there are


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "compresskit bench --unit none"),
        (
            {"methods": ("low-rank",), "ratios": (2, 8), "tasks": ("sst2",), "data": "DIR", "seeds": (0, 1)},
            "compresskit bench --methods low-rank --ratios 2,8 --task sst2 --data DIR --seeds 0,1",
        ),
        (
            {"general": GENERAL | {"max_tokens": 5}, "task": {"epochs": 2}, "precision": "bf16"},
            "compresskit bench --unit none --precision bf16 --general-tokens 5 --task-epochs 2",
        ),
        (
            {"models": ("a", "b c"), "ratios": (12.3456789,)},
            "compresskit bench --model a --model 'b c' --ratios 12.3456789 --unit none",
        ),
        ({"general": False, "tasks": ("rte",)}, "compresskit bench --task rte --general-tokens 0"),
        ({"task": {"batch_size": 8}, "data": "DIR"}, "compresskit bench --recipe grid.yaml --data DIR"),
        (
            Grid.of_vectors().model_dump()
            | {"text": ("a b.txt", "c.tsv"), "fields": ("x", "y"), "unit": ("line",), "max_texts": 9, "language": "de"},
            "compresskit bench --text 'a b.txt' --text c.tsv --field x --field y --unit line --language de "
            "--max-texts 9",
        ),
        (
            {"text": ("a.txt", "b.txt"), "unit": ("line",), "method_seeds": {"low-rank": (0, 1)}},
            "compresskit bench --recipe grid.yaml --text FILE --text FILE",
        ),
    ],
)
def test_command(changes: dict[str, Any], expected: str) -> None:
    assert command(Grid(**changes)) == expected
