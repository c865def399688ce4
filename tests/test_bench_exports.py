"""Benchmarks with exports: rows in ONNX Runtime beside those in torch."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterator
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import Run, tiny_bench, tiny_model
from test_export import Box, Lacking
from transformers import AutoModel

from compresskit import InputError
from compresskit.benchmark.cells import clear
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.quality import find_passages
from compresskit.benchmark.report.render import command
from compresskit.benchmark.runner import BenchResult
from compresskit.benchmark.shared import Shared
from compresskit.benchmark.store import Store
from compresskit.errors import WorkError
from compresskit.exporting.exported import write
from compresskit.exporting.format import FORMATS
from compresskit.exporting.formats.onnx import Onnx
from compresskit.model.checkpoint import Checkpoint


def find(result: BenchResult, method: str) -> Any:
    return next(record for record in result.records if record.method == method)


def folder_of(result: BenchResult, method: str) -> Path:
    (folder,) = (result.folder / "cells").glob(f"model-{method}*-seed0-*")
    return folder


def one_layer(bench_folder: Path, folder: Path, head: str = "base") -> tuple[str, ...]:
    """A checkpoint with one layer: every layer adds seconds to an export."""
    tiny_model(head=head, num_hidden_layers=1).save_pretrained(folder)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, folder)
    return (str(folder),)


@pytest.fixture(scope="module")
def origin(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return one_layer(bench_folder, tmp_path_factory.mktemp("one-layer") / "model")[0]


@pytest.fixture(scope="module")
def whole(bench_folder: Path, origin: str, tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    """Without labels; exports are asked for once the cells are finished."""
    output = tmp_path_factory.mktemp("exports") / "out"
    grid = {"models": (origin,), "baselines": ("dense", "int8")}
    first = tiny_bench(bench_folder, output, **grid)
    assert all(not record.exports for record in first.records)
    models = [path.stat().st_mtime_ns for path in sorted(output.glob("cells/*/model/model.safetensors"))]
    again = tiny_bench(bench_folder, output, **grid, exports=("onnx-int8",))
    assert [p.stat().st_mtime_ns for p in sorted(output.glob("cells/*/model/model.safetensors"))] == models
    return again


def test_every_model_but_int8_is_exported_and_timed_with_the_others(whole: BenchResult) -> None:
    forms = {record.method: list(record.exports) for record in whole.records}
    assert forms == {"dense": ["onnx", "onnx-int8"], "int8": [], "low-rank": ["onnx-int8"]}
    phases = {record.latency.phase for record in whole.records}
    for record in whole.records:
        for form, export in record.exports.items():
            file = folder_of(whole, record.method) / form / "model.onnx"
            assert export.megabytes == file.stat().st_size / 1e6
            assert export.latency.batches["1"].milliseconds > 0
            assert export.latency.batches["32"].speedup > 0
            phases.add(export.latency.phase)
    assert len(phases) == 1
    student = find(whole, "low-rank")
    assert student.exports["onnx-int8"].megabytes < student.megabytes
    assert student.exports["onnx-int8"].score == pytest.approx(student.score, abs=0.02)
    assert find(whole, "dense").exports["onnx"].score == pytest.approx(1, abs=1e-4)


def test_quality_is_that_of_onnx_runtime(whole: BenchResult, bench_folder: Path, origin: str) -> None:
    """Sentence similarity by hand: the file in ONNX Runtime against the dense model in torch."""
    sources = Shared(Store(whole.folder).grid().model_copy(update={
        "models": (origin,), "text": str(bench_folder / "text.txt"),
    }))  # fmt: skip
    passages = find_passages(sources.corpus("held-out"), sources.tokenizer(origin), 40)
    tokens = passages.tokens
    session = onnxruntime.InferenceSession(folder_of(whole, "low-rank") / "onnx-int8" / "model.onnx")
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    (ours,) = session.run(["last_hidden_state"], {name: ids.numpy() for name, ids in inputs.items()})
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(origin)(input_ids=tokens).last_hidden_state.numpy()
    ours, theirs = (vectors.mean(1) - vectors.mean((0, 1)) for vectors in (ours, theirs))
    cosines = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    export = find(whole, "low-rank").exports["onnx-int8"]
    assert export.score == export.scores["sentence similarity"] == pytest.approx(float(cosines.mean()), abs=1e-4)


def test_report(whole: BenchResult, run: Run) -> None:
    with (whole.folder / "results.csv").open(newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert len(rows) == 6
    exported = rows["low-rank onnx-int8"]
    assert (exported["kind"], exported["status"], exported["ratio_asked"]) == ("export", "finished", "3.0")
    assert float(exported["megabytes"]) < float(rows["low-rank"]["megabytes"])
    assert exported["seconds_distill"] == exported["error"] == ""  # not measured on the file
    text = (whole.folder / "README.md").read_text()
    kept = find(whole, "low-rank").exports["onnx-int8"].score / find(whole, "dense").score
    assert f"| low-rank onnx-int8 | {100 * kept:.1f} % |" in text  # never the bold one: the same student once more
    assert f"ONNX Runtime {onnxruntime.__version__}" in text
    assert command(Grid(exports=("onnx-int8",))) == "compresskit bench --unit none --export onnx-int8"
    assert "dense onnx" in (whole.folder / "index.html").read_text()
    before = (whole.folder / "README.md").read_bytes()
    assert run("report", whole.folder).code == 0
    assert (whole.folder / "README.md").read_bytes() == before


@pytest.mark.sweep
def test_task_quality_and_a_tied_head_without_labels(bench_folder: Path, tmp_path: Path) -> None:
    stages = {"max_length": 32, "learning_rate": 3e-3, "epochs": 2}
    result = tiny_bench(
        bench_folder,
        tmp_path / "task",
        models=one_layer(bench_folder, tmp_path / "model"),
        tasks=("sst2",),
        data=str(bench_folder / "data"),
        general=False,
        teacher=stages,
        task=stages,
        exports=("onnx",),
    )
    for record in result.records:
        assert record.exports["onnx"].score == pytest.approx(record.score, abs=0.02)
        assert record.exports["onnx"].score == record.exports["onnx"].scores["dev"]["accuracy"]
    words = one_layer(bench_folder, tmp_path / "words-model", "masked-lm")
    result = tiny_bench(bench_folder, tmp_path / "words", models=words, methods=("tucker",), exports=("onnx",))
    for record in result.records:
        assert record.exports["onnx"].score == pytest.approx(record.score, abs=1e-3)


class Moody(Onnx):
    """Fails as often as it has errors."""

    name = "moody"
    errors: ClassVar[list[Exception]] = []

    def change(self, graph: Any, *given: Any) -> None:
        if self.errors:
            raise self.errors.pop(0)


@pytest.mark.slow
@pytest.mark.usefixtures("plugins")
def test_failed_exports_are_rows_and_tried_again_until_dropped(bench_folder: Path, tmp_path: Path) -> None:
    models = one_layer(bench_folder, tmp_path / "model")
    Moody.errors[:] = [WorkError("no luck"), ZeroDivisionError("division by zero")]  # the second is not one of ours
    result = tiny_bench(bench_folder, tmp_path / "out", models=models, exports=("moody",))
    assert [record.status for record in result.records] == ["finished", "finished"]
    assert len(result.failed) == 2
    found = {record.exports["moody"].message for record in result.records}
    assert found == {"no luck", "ZeroDivisionError: division by zero"}
    assert "ZeroDivisionError" in "".join(path.read_text() for path in tmp_path.glob("out/cells/*/error.txt"))
    text = (result.folder / "README.md").read_text()
    assert "- dense moody: failed: no luck" in text
    assert "| low-rank moody | failed |" in text
    phase = result.records[0].latency.phase
    again = tiny_bench(bench_folder, tmp_path / "out", models=models, exports=("moody",))
    assert not again.failed
    assert {record.exports["moody"].latency.phase for record in again.records}.isdisjoint({phase, None})
    assert "no luck" not in (again.folder / "README.md").read_text()
    more = tiny_bench(bench_folder, tmp_path / "out", models=models, ratios=(3.0, 2.0))
    assert [record.exports for record in more.records] == [{}, {}, {}]  # they leave with the next latency phase


class Mute(Box):
    """Can be written, but nothing here runs it."""

    name = "mute"
    runtime = None


@pytest.fixture
def plugins() -> Iterator[None]:
    """Formats as other packages bring them."""
    found = (Box, Lacking, Moody, Mute)
    with FORMATS.with_plugins(
        EntryPoint(form.name, f"{form.__module__}:{form.__name__}", FORMATS.group) for form in found
    ):
        yield


def test_a_format_of_another_package_is_a_row_and_read_without_it(
    bench_folder: Path, origin: str, tmp_path: Path, plugins: None, run: Run
) -> None:
    result = tiny_bench(bench_folder, tmp_path / "out", models=(origin,), exports=("box",))
    for record in result.records:
        box = record.exports["box"]
        assert box.megabytes == (folder_of(result, record.method) / "box/inside/weights.box").stat().st_size / 1e6
        assert box.score == pytest.approx(record.score, abs=1e-6)
        assert box.latency.batches["1"].milliseconds > 0
    text = (result.folder / "README.md").read_text()
    assert f"- Exports: box: the same models, scored and timed in Torch {version('torch')}, CPU" in text
    with FORMATS.with_plugins([]):  # uninstalled
        assert run("report", result.folder).code == 0
    again = (result.folder / "README.md").read_text()
    assert "- Exports: box: the same models, scored and timed, CPU" in again
    assert [line for line in again.splitlines() if "low-rank box" in line] == [
        line for line in text.splitlines() if "low-rank box" in line
    ]


@pytest.mark.usefixtures("plugins")
@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("lacking", "format lacking: no-such-package missing; install the extra 'boxes'"),
        ("mute", "format mute: cannot be run in a benchmark"),
        ("dense", "format dense: cannot be run in a benchmark"),
        ("onnx-int3", "unknown format 'onnx-int3': did you mean 'onnx-int8'"),
    ],
)
def test_what_cannot_be_a_row_is_refused_before_any_cell(
    bench_folder: Path, tmp_path: Path, form: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        tiny_bench(bench_folder, tmp_path / "out", exports=(form,))
    assert not (tmp_path / "out").exists()


def test_models_without_token_types_run_in_onnx_runtime(tmp_path: Path) -> None:
    """Inputs that a graph does not read are left out, token types that are not given are zeros."""
    for family in ("distilbert", "bert"):
        model = tiny_model(family, **{"n_layers" if family == "distilbert" else "num_hidden_layers": 1})
        write(Checkpoint(family, family, None, model), tmp_path / family, "onnx")
        onnx = FORMATS.get("onnx").load(tmp_path / family)
        ids = torch.randint(5, 499, (2, 9))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        extra = {"token_type_ids": torch.zeros_like(ids)} if family == "distilbert" else {}
        with torch.no_grad():
            expected = model(**given).last_hidden_state
        torch.testing.assert_close(onnx(**given, **extra)["last_hidden_state"], expected, rtol=1e-4, atol=1e-4)


def test_a_killed_export_leaves_no_folder_behind(tmp_path: Path) -> None:
    for name in (".onnx-int8.part-x", ".model.part-y", "model", "onnx-int8"):
        (tmp_path / name).mkdir()
    clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "onnx-int8"}
