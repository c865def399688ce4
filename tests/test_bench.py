"""The benchmark: figures against their sources, resuming, failures, two processes, what is refused."""

from __future__ import annotations

import csv
import json
import re
import shutil
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from conftest import BUDGET, Run, count, tiny_bench
from filelock import FileLock
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

import compresskit
from compresskit import InputError
from compresskit.benchmark import shared
from compresskit.benchmark.records import read, write
from compresskit.benchmark.report.render import command
from compresskit.benchmark.runner import BenchResult
from compresskit.benchmark.store import Store
from compresskit.decomposers.low_rank import LowRank
from compresskit.decomposers.registry import METHODS


@pytest.fixture(scope="module")
def whole(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    """Two methods, a ratio that both reach and one that none does, and every baseline."""
    output = tmp_path_factory.mktemp("whole") / "out"
    methods, baselines = ("low-rank", "kronecker"), ("dense", "int8", "half-layers")
    return tiny_bench(bench_folder, output, methods=methods, ratios=(3.0, 90.0), baselines=baselines)


def find(result: BenchResult, method: str, ratio: float | None = None) -> Any:
    return next(r for r in result.records if (r.method, r.ratio_asked) == (method, ratio))


def model_of(result: BenchResult, method: str) -> Any:
    (folder,) = (result.folder / "cells").glob(f"model-{method}*-seed0-*/model")
    return folder, AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("method", ["low-rank", "kronecker", "half-layers"])
def test_figures_are_those_of_the_saved_model(whole: BenchResult, bench_folder: Path, method: str) -> None:
    record = find(whole, method, None if method == "half-layers" else 3.0)
    folder, model = model_of(whole, method)
    dense = AutoModel.from_pretrained(bench_folder / "model")
    assert record.parameters == count(model) == sum(record.parameters_by_role.values())
    assert record.ratio == count(dense) / count(model)
    assert record.megabytes == (folder / "model.safetensors").stat().st_size / 1e6
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.full((1, 40), 7))  # its 40 positions, as FLOPs are counted for every family
    assert record.flops == counter.get_total_flops()
    training = json.loads((folder / "training.json").read_text())["stages"]
    assert record.seconds_distill == sum(stage["seconds"] for stage in training)
    assert record.latency.batches["1"].milliseconds > 0
    assert record.latency.batches["32"].speedup > 0


def test_error_and_scores_are_those_of_the_models(whole: BenchResult, bench_folder: Path) -> None:
    record = find(whole, "low-rank", 3.0)
    dense = AutoModel.from_pretrained(bench_folder / "model")
    student = compresskit.compress(bench_folder / "model", method="low-rank", ratio=3)
    residual = norm = 0.0
    for entry in record.errors:
        weight = dense.get_submodule(entry.name).weight.detach()
        difference = weight - student.get_submodule(entry.name).dense_weight().detach()
        residual += float(difference.square().sum())
        norm += float(weight.square().sum())
        assert entry.error == pytest.approx(float(difference.norm() / weight.norm()), rel=1e-4)
    assert record.error == pytest.approx((residual / norm) ** 0.5, rel=1e-4)
    assert record.score == record.scores["sentence similarity"] == record.kept
    assert record.score > record.score_before  # it was trained on documents of the same kind
    assert find(whole, "dense").score == pytest.approx(1.0)
    assert 0 < record.scores["retrieval chance"] < 0.2


def test_baselines(whole: BenchResult) -> None:
    dense, int8, half = (find(whole, name) for name in ("dense", "int8", "half-layers"))
    assert dense.ratio == int8.ratio == 1.0
    assert dense.latency.batches["1"].speedup == 1.0
    assert int8.megabytes < dense.megabytes
    assert 0.9 < int8.score < 1.0
    assert half.parameters < dense.parameters
    assert half.errors == ()
    student = find(whole, "low-rank", 3.0)  # dense matrices take smaller steps than factors
    assert half.made_by.general.learning_rate == pytest.approx(0.2 * student.made_by.general.learning_rate)
    text = (whole.folder / "README.md").read_text()
    assert re.search(r"- Latency: 40 tokens, .*; GFLOPs at as many: all that a model takes", text)  # and not 128
    assert re.search(rf"- half-layers: .*learning rate {half.made_by.general.learning_rate:g} in stage 1", text)


def test_report(whole: BenchResult) -> None:
    folder = whole.folder
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(whole.records) == 7
    columns = [
        "task",
        "method",
        "ratio_asked",
        "ratio",
        "parameters",
        "megabytes",
        "flops",
        "latency_ms",
        "speedup",
        "score",
        "score_kept",
    ]
    assert set(columns) <= set(rows[0])
    assert [row["status"] for row in rows].count("unreachable") == 2
    text = (folder / "README.md").read_text()
    best = max((r for r in whole.records if r.ratio_asked == 3), key=lambda r: r.score)
    assert f"**{100 * best.kept:.1f} %**" in text
    assert "low-rank 90x: unreachable: ratio 90 is out of reach" in text
    assert command(Store(folder).grid()) in text
    for name in ("results.json", "table.tex", "index.html", "errors.png", "kept-without-labels.png"):
        assert (folder / name).stat().st_size > 100
    data = json.loads((folder / "results.json").read_text())
    assert [r["key"] for r in data["records"]] == [r.key for r in whole.records]
    assert "/tmp" not in text + (folder / "results.json").read_text()


def test_record_says_how_to_do_it_again(whole: BenchResult) -> None:
    made = find(whole, "kronecker", 3.0).made_by
    assert len(made.model.sha256["model.safetensors"]) == 64
    assert made.text.sha256
    assert made.general.max_tokens == 3000
    assert made.general.losses == {"embedding": 1.0, "hidden": 1.0}  # a base model predicts nothing
    assert {"torch", "transformers", "compresskit", "python"} <= set(made.versions)
    assert made.hardware.threads == torch.get_num_threads()
    assert made.recipe["rules"][0]["method"] == "kronecker"


def test_finished_cells_are_kept_and_more_may_be_added(bench_folder: Path, tmp_path: Path) -> None:
    first = tiny_bench(bench_folder, tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in first.folder.glob("cells/*/model/model.safetensors")}
    tables = [(first.folder / name).read_bytes() for name in ("README.md", "results.csv", "table.tex")]
    again = tiny_bench(bench_folder, tmp_path / "out")
    assert [(again.folder / name).read_bytes() for name in ("README.md", "results.csv", "table.tex")] == tables
    more = tiny_bench(bench_folder, tmp_path / "out", ratios=(3.0, 2.0))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(more.records) == 3
    assert len({record.latency.phase for record in more.records}) == 1  # all timed together again
    with pytest.raises(InputError, match=r"holds 1 cells of another configuration.*low-rank-2x.*--overwrite"):
        tiny_bench(bench_folder, tmp_path / "out")
    assert len(tiny_bench(bench_folder, tmp_path / "out", overwrite=True).records) == 2
    for path in stamps:  # whoever deletes models to save room still gets all timed
        shutil.rmtree(path.parent)
    third = tiny_bench(bench_folder, tmp_path / "out", ratios=(3.0, 2.0), baselines=("dense", "int8"))
    assert not any(path.exists() for path in stamps)
    assert len({record.latency.phase for record in third.records}) == 1


def test_cells_of_another_machine(bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in (False, True):
        tiny_bench(bench_folder, tmp_path / str(flag), any_machine=flag)
    real = shared.hardware()
    monkeypatch.setattr(shared, "hardware", lambda: real.model_copy(update={"processor": "another one"}))
    with pytest.raises(InputError, match="of another configuration, model, data, version or machine"):
        tiny_bench(bench_folder, tmp_path / "False", ratios=(2.0,))
    result = tiny_bench(bench_folder, tmp_path / "True", any_machine=True, ratios=(3.0, 2.0))
    processors = {record.ratio_asked: record.made_by.hardware.processor for record in result.records}
    assert processors == {None: real.processor, 3.0: real.processor, 2.0: "another one"}
    assert len({record.latency.phase for record in result.records}) == 1
    text = (result.folder / "README.md").read_text()
    assert all(processor in text for processor in processors.values())


def test_task(bench_folder: Path, tmp_path: Path) -> None:
    stages = {"max_length": 32, "learning_rate": 3e-3}
    result = tiny_bench(
        bench_folder,
        tmp_path / "out",
        tasks=("sst2",),
        data=str(bench_folder / "data"),
        seeds=(0, 1),
        general=False,
        teacher={**stages, "epochs": 6},
        task={**stages, "epochs": 6},
    )
    teacher, student = find(result, "dense"), find(result, "low-rank", 3.0)
    assert teacher.metric == "accuracy"
    assert teacher.score > 0.9
    assert student.score == student.scores["dev"]["accuracy"]
    assert student.score_before == pytest.approx(0.5, abs=0.2)
    assert student.score > 0.7
    assert student.kept == student.score / teacher.score
    folder = next((result.folder / "cells").glob("*low-rank*seed0*/model"))
    scored = compresskit.evaluate(folder, task="sst2", data=bench_folder / "data", max_length=32)
    assert scored.record["scores"]["dev"]["accuracy"] == student.score
    assert [r.seed for r in result.records if r.method == "low-rank"] == [0, 1]
    assert " ± " in (result.folder / "README.md").read_text()


class Moody(LowRank):
    """Low rank that may fail at work."""

    name = "moody"
    fails = True

    def factorise(self, *given: Any, **options: Any) -> dict[str, torch.Tensor]:
        if Moody.fails:
            raise RuntimeError("no luck\nat all")
        return super().factorise(*given, **options)


def test_failed_cell_is_a_row_and_the_others_go_on(
    bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    grid = {
        "version": 1,
        "methods": ["moody", "low-rank"],
        "ratios": [3],
        "baselines": ["dense"],
        "general": BUDGET,
    }
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    flags = ("--recipe", tmp_path / "grid.yaml", "--model", bench_folder / "model", "--text", bench_folder / "text.txt")
    with METHODS.with_plugins([EntryPoint("moody", "test_bench:Moody", METHODS.group)]):
        answer = run("bench", *flags, "--output", tmp_path / "out")
        rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
        readme = (tmp_path / "out" / "README.md").read_text()
        monkeypatch.setattr(Moody, "fails", False)
        again = run("bench", *flags, "--output", tmp_path / "out")  # a failed cell is tried again
    assert answer.code == 1
    assert "moody 3x: failed: RuntimeError: no luck at all" in answer.out
    assert "1 cells failed" in answer.err
    assert {row["method"]: row["status"] for row in rows} == {
        "dense": "finished", "moody": "failed", "low-rank": "finished",
    }  # fmt: skip
    assert "| moody | failed |" in readme
    assert again.code == 0, again.err
    assert "failed" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text.replace('"status": "finished"', '"status": "great"'), "status"),
        (lambda text: text.replace('"score": ', '"score": 1'), "was edited"),
        (lambda text: text[: len(text) // 2], "truncated or not JSON"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "this compresskit reads 1: upgrade"),
        (lambda text: "[]", "is no record"),
    ],
)
def test_damaged_records_are_refused(
    whole: BenchResult, tmp_path: Path, run: Run, damage: Callable[[str], str], says: str
) -> None:
    (path,) = (whole.folder / "cells").glob("*low-rank-3x*/record.json")
    before = path.read_text()
    path.write_text(damage(before))
    try:
        answer = run("report", whole.folder)
        assert answer.code == 2
        assert says in answer.err
        assert path.name in answer.err
    finally:
        path.write_text(before)
    assert read(path).status == "finished"


def test_records_that_do_not_belong_are_refused(whole: BenchResult, tmp_path: Path, run: Run) -> None:
    """A table would count one seed twice, or take one cell's result for another's."""
    folder = tmp_path / "mixed"
    shutil.copytree(whole.folder, folder)
    one, other = sorted((folder / "cells").iterdir())[:2]
    record = read(one / "record.json")
    foreign = folder / "cells" / (one.name[:-8] + "f" * 8)
    foreign.mkdir()
    write(record.model_copy(update={"key": "f" * len(record.key)}), foreign / "record.json")
    mixed = run("report", folder)
    shutil.rmtree(foreign)
    assert mixed.code == 2
    assert f"holds 1 cells that its grid (bench.json) does not ask for, e.g. {foreign.name}" in mixed.err
    shutil.copy(one / "record.json", other / "record.json")
    swapped = run("report", folder)
    assert swapped.code == 2
    assert f"{other.name}/record.json: is of another cell" in swapped.err.replace("\n", "")
    shutil.copytree(one, folder / "cells" / "copy")
    shutil.copy(next(whole.folder.glob(f"cells/{other.name}/record.json")), other / "record.json")
    assert "copy/record.json: is of another cell" in run("report", folder).err.replace("\n", "")


def test_report_says_that_it_waits(whole: BenchResult, run: Run) -> None:
    held = Event()

    def other_process() -> None:
        with FileLock(whole.folder / ".lock"):
            held.set()
            time.sleep(0.3)

    thread = Thread(target=other_process)
    thread.start()
    held.wait()
    answer = run("report", whole.folder)
    thread.join()
    assert answer.code == 0
    assert "waiting for another process" in answer.out
    assert "waiting" not in run("report", whole.folder).out


def test_report_again_and_paste(whole: BenchResult, tmp_path: Path, run: Run) -> None:
    before = (whole.folder / "README.md").read_text()
    (whole.folder / "README.md").unlink()
    document = tmp_path / "doc.md"
    document.write_text(f"above\n<!-- bench: {whole.folder} -->\nold\n<!-- /bench -->\nbelow\n")
    assert run("report", whole.folder, "--paste", document).code == 0
    assert (whole.folder / "README.md").read_text() == before
    text = document.read_text()
    assert "| kept ↑ |" in text
    assert "old" not in text
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    # Wherever the place is; the end of another folder's tables is not the end of these.
    place = f"<!-- bench: {whole.folder} -->\nold\n<!-- /bench -->\n"
    document.write_text(place + "between\n" + place)
    assert run("report", whole.folder, "--paste", document).code == 0
    text = document.read_text()
    assert "old" not in text
    assert text.count("| kept ↑ |") == 2
    begun = f"<!-- bench: {whole.folder} -->\nmine\n<!-- bench: other -->\n| theirs |\n<!-- /bench -->\n"
    document.write_text(begun)
    answer = run("report", whole.folder, "--paste", document)
    assert answer.code == 2
    assert "have no end" in answer.err
    assert document.read_text() == begun
    document.write_text("no place")
    answer = run("report", whole.folder, "--paste", document)
    assert answer.code == 2
    assert "<!-- /bench -->" in answer.err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--methods", "kroneker"), ["unknown method or recipe 'kroneker'", "did you mean 'kronecker'"]),
        (("--task", "sst3", "--data", "."), ["unknown task 'sst3'", "sst2"]),
        (("--ratios", "4,many"), ["--ratios 4,many", "'many' is no number"]),
        (("--ratios", "4,0.5"), ["ratio 0.5", "above 1"]),
        (("--ratios", "4,4"), ["4.0 is there twice"]),
        (("--ratios", ","), ["ratios"]),
        (("--seeds", "-1"), ["seed -1"]),
        (("--baselines", "int4"), ["unknown baseline 'int4': did you mean 'int8'?", "half-layers"]),
        (("--data", "."), ["data belongs to a task"]),
        (("--task", "imdb"), ["imdb", "evaluation only"]),
        (("--general-tokens", "0"), ["nothing would be trained"]),
        (("--recipe", "nothing"), ["unknown bench recipe 'nothing'", "bench-glue"]),
        (("--recipe", "bad.yaml"), ["bad.yaml", "unknown key 'ratio'", "'ratios'"]),
        (("--recipe", "worse.yaml"), ["general", "unknown key 'learning_rat'", "'learning_rate'"]),
        (("--model", "nowhere/at/all"), ["nowhere/at/all"]),
        (("--text", "nothing.txt"), ["nothing.txt", "no such file"]),
        (("--output", "taken"), ["taken", "holds no benchmark"]),
    ],
)
def test_refused(run: Run, bench_folder: Path, flags: tuple[str, ...], says: list[str]) -> None:
    Path("bad.yaml").write_text("version: 1\nratio: 4\n")
    Path("worse.yaml").write_text("version: 1\ngeneral: {learning_rat: 1}\n")
    Path("taken").mkdir()
    Path("taken", "thesis.txt").touch()
    given = {"--model": bench_folder / "model", "--text": bench_folder / "text.txt", "--output": "out"}
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    answer = run("bench", *(part for pair in given.items() for part in pair))
    assert answer.code == 2, answer
    for word in says:
        assert word in answer.err
    assert not Path("out").exists()


def test_times_of_several_phases_are_told(whole: BenchResult, tmp_path: Path, run: Run) -> None:
    """A record of the same cell from another folder was timed beside other models."""
    folder = shutil.copytree(whole.folder, tmp_path / "mixed")
    file = sorted(folder.glob("cells/*/record.json"))[0]
    found = read(file)
    assert found.latency is not None
    latency = found.latency.model_copy(update={"phase": "another"})
    write(found.model_copy(update={"latency": latency}), file)
    assert run("report", folder).code == 0
    assert "of 2 phases, whose times do not compare" in (folder / "README.md").read_text()
    assert "phases" not in (whole.folder / "README.md").read_text()


def test_report_of_nothing(run: Run, tmp_path: Path) -> None:
    assert run("report", tmp_path / "nowhere").code == 2
    (tmp_path / "newer").mkdir()
    (tmp_path / "newer" / "bench.json").write_text('{"format_version": 7, "grid": {}}')
    answer = run("report", tmp_path / "newer")
    assert answer.code == 2
    assert "format version 7, this compresskit reads 1: upgrade" in answer.err
    for version in ("true", "1.0"):
        (tmp_path / "newer" / "bench.json").write_text(f'{{"format_version": {version}, "grid": {{}}}}')
        assert "this compresskit reads 1" in run("report", tmp_path / "newer").err


@pytest.mark.parametrize("cells", [5, "x", [1], ["../elsewhere"]])
def test_a_damaged_list_of_cells_is_refused(tmp_path: Path, run: Run, cells: Any) -> None:
    (tmp_path / "bench.json").write_text(json.dumps({"format_version": 1, "grid": {}, "cells": cells}))
    answer = run("report", tmp_path)
    assert answer.code == 2
    assert "cells must be a list of names of folders" in answer.err.replace("\n", " ")
