"""Benchmarks whose students learn sentence vectors: their texts, and one student for every task."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, refused, reviews, same, sentence_folder, tiny_bench, write_tsv
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, BertModel, TrainerCallback

import compresskit
from compresskit.benchmark.grid import GENERAL, GENERAL_OF_VECTORS, Grid, load_grid, shipped_grids
from compresskit.benchmark.quality import find_passages
from compresskit.benchmark.report.render import command
from compresskit.benchmark.runner import usual_grid
from compresskit.benchmark.todo import Watcher
from compresskit.data.corpus import find_corpus
from compresskit.errors import InputError
from compresskit.training.sentences import agreement


@pytest.mark.sweep
def test_students_of_vectors(bench_folder: Path, tmp_path: Path) -> None:
    """Stage 1 teaches vectors; a task that compares vectors is scored, and nothing is fine-tuned."""
    data = tmp_path / "data"
    pairs = [(*(text for text, _ in reviews(2, seed=seed)), str(seed % 6)) for seed in range(30)]
    write_tsv(data / "dev.tsv", "sentence1\tsentence2\tscore", pairs)
    options: dict[str, Any] = {"unit": ("line", "passage"), "baselines": ("dense", "half-layers")}
    options |= {"text": str(bench_folder / "text.txt"), "general": {"max_steps": 4}, "exports": ("onnx",)}
    result = tiny_bench(
        bench_folder, tmp_path / "out", tasks=("stsb-similarity",), data=str(data), share_general=True, **options
    )
    assert not result.failed, [record.message for record in result.failed]
    dense, _, student = result.records
    expected = compresskit.evaluate(bench_folder / "model", task="stsb-similarity", data=data, device="cpu")
    assert dense.score == expected.record["scores"]["dev"]["spearman"]
    assert dense.made_by.teacher is None
    assert student.made_by.task_stage is None
    assert student.made_by.unit == ("line", "passage")
    assert set(student.made_by.general.losses) == {"embedding", "hidden", "pooled", "similarity"}  # type: ignore[union-attr]
    assert student.exports["onnx"].score == pytest.approx(student.score, abs=1e-4)
    folder = next(result.folder.glob("cells/*low-rank*/model"))
    again = compresskit.evaluate(folder, task="stsb-similarity", data=data, device="cpu")
    assert again.record["scores"]["dev"]["spearman"] == student.score
    text = (result.folder / "README.md").read_text()
    assert "vectors of lines and passages" in text


def test_vectors_without_labels(bench_folder: Path, tmp_path: Path) -> None:
    """The score is what the training of vectors calls similarity, of the vectors that the model's folder asks for."""
    pooling = {"word_embedding_dimension": 48, "pooling_mode_max_tokens": True}
    model = sentence_folder(bench_folder / "model", tmp_path / "model", pooling)
    options: dict[str, Any] = {"unit": ("line",), "baselines": ("dense", "half-layers"), "exports": ("onnx",)}
    options |= {"models": (str(model),), "general": {"max_steps": 4}}
    result = tiny_bench(bench_folder, tmp_path / "out", **options)
    assert not result.failed, [record.message for record in result.failed]
    dense, _, student = result.records
    assert dense.metric == student.metric == "similarity"
    assert dense.score == pytest.approx(1.0, abs=1e-6)
    # Ranks jump where two cosines are nearly one, so rounding moves their correlation more than the vectors.
    assert student.exports["onnx"].score == pytest.approx(student.score, abs=1e-3)
    small = next(result.folder.glob("cells/*low-rank*/model"))
    corpus = replace(find_corpus(bench_folder / "text.txt"), part="held-out")
    tokens = find_passages(corpus, AutoTokenizer.from_pretrained(model), 40).tokens
    with torch.inference_mode():
        first, second = (AutoModel.from_pretrained(m)(tokens).last_hidden_state.amax(1) for m in (model, small))
    assert student.score == pytest.approx(agreement(first, second)["similarity"], abs=1e-6)
    text = (result.folder / "README.md").read_text()
    assert "Score: similarities of passages, compared with the teacher's, on held-out text." in text
    assert "**score** is the similarity, Spearman's correlation" in text
    # Without a unit all that is trained, and how all is scored, is another.
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3
    with pytest.raises(InputError, match="3 cells of another configuration"):
        tiny_bench(
            bench_folder, tmp_path / "out", **options | {"unit": (), "general": {"max_steps": 4, "max_length": 32}}
        )


def test_models_of_sentences_are_compared_by_their_vectors(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    plain = str(bench_folder / "model")
    sentences = str(sentence_folder(bench_folder / "model", tmp_path / "model"))
    usual = usual_grid({})
    assert (usual.unit, usual.general) == (("sentence",), GENERAL_OF_VECTORS)
    assert usual.calibration_tokens > 0
    assert usual.methods[0] == "auto"
    assert command(usual) == "compresskit bench"
    assert command(usual_grid({"models": [sentences]})) == f"compresskit bench --model {sentences} --unit sentence"
    assert usual_grid({"models": [plain]}) == usual_grid({"models": [sentences, plain]}) == Grid()
    assert usual_grid({"models": [plain], "unit": ["line"]}) == Grid.of_vectors((plain,))
    assert usual_grid({"tasks": ["sst2"]}) == usual_grid({"unit": ()}) == Grid()
    assert command(Grid()) == "compresskit bench --unit none"
    small = ["--methods", "low-rank", "--ratios", "3", "--baselines", "dense", "--general-tokens", "200"]
    small += ["--text", str(bench_folder / "text.txt"), "--model", sentences, "--output", str(tmp_path / "out")]
    assert run("bench", *small).code == 0
    grid = json.loads((tmp_path / "out" / "bench.json").read_text())["grid"]
    assert (grid["unit"], grid["general"]["max_tokens"], grid["general"]["batch_size"]) == (["sentence"], 200, 16)
    assert grid["calibration_tokens"] == usual.calibration_tokens
    # Hidden states are read at 128 tokens, of which this model has not as many positions.
    refused(run("bench", *small, "--unit", "none"), "max length 128: BertModel has 40 positions")


def test_vectors_are_compared_only_where_students_learn_some(bench_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"stsb-similarity: compares vectors.*--unit sentence"):
        tiny_bench(bench_folder, tmp_path / "out", tasks=("stsb-similarity",), data=str(tmp_path))
    with pytest.raises(InputError, match="stsb-similarity: nothing would be trained without stage 1"):
        tiny_bench(
            bench_folder, tmp_path / "out", tasks=("stsb-similarity",), data=str(tmp_path), unit=("line",),
            general=False,
        )  # fmt: skip


def test_vectors_have_a_usual_stage_1_of_their_own() -> None:
    assert Grid(unit=("sentence",)).general == GENERAL_OF_VECTORS
    assert Grid(unit=("sentence",), general={"max_steps": 3}).general == {"max_steps": 3}
    assert Grid().general == GENERAL


# -- several tasks ----------------------------------------------------------------------------------------------------


def similar_and_found(folder: Path) -> dict[str, Any]:
    """A similarity and a retrieval in a folder of data."""
    pairs = [(*(text for text, _ in reviews(2, seed=seed)), str(seed % 6)) for seed in range(30)]
    write_tsv(folder / "STS-B" / "dev.tsv", "sentence1\tsentence2\tscore", pairs)
    paragraphs = []
    for text, _ in reviews(12, seed=50):
        answers = [{"text": text[:3], "answer_start": 0}]
        paragraphs.append({"context": text, "qas": [{"id": text, "question": text[-12:], "answers": answers}]})
    (folder / "dev-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return {"tasks": ("stsb-similarity", "squad-retrieval"), "data": str(folder)}


class Trainings(TrainerCallback):
    """Counts trainings, and stops one of them in its middle."""

    def __init__(self, stops: int | None = None) -> None:
        self.begun, self.stops = 0, stops

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.begun == self.stops and state.global_step == 5:
            raise KeyboardInterrupt


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def test_one_student_for_all_tasks_that_compare_vectors(bench_folder: Path, tmp_path: Path) -> None:
    static = ("static",) if installed("model2vec") else ()
    grid = similar_and_found(tmp_path / "data") | {
        "unit": ("line",),
        "seeds": (3,),
        "method_seeds": {"low-rank": (0, 1)},
        "baselines": ("dense", "layers:1", *static),
        "general": {"max_steps": 8, "max_length": 32},
    }
    stopped, whole = Trainings(stops=3), Trainings()
    with pytest.raises(KeyboardInterrupt):
        tiny_bench(bench_folder, tmp_path / "out", watcher=Watcher((stopped,)), **grid)
    result = tiny_bench(bench_folder, tmp_path / "out", watcher=Watcher((whole,)), **grid)
    calm = tiny_bench(bench_folder, tmp_path / "calm", **grid)
    assert [(record.method, record.message) for record in result.records if record.status != "finished"] == []
    assert [record.score for record in result.records] == [record.score for record in calm.records]
    assert (stopped.begun, whole.begun) == (3, 1)  # one layer, low rank twice; the last one again
    starts = [folder.name.rpartition("-")[0] for folder in sorted((tmp_path / "out" / "general").iterdir())]
    assert starts == ["model-layers-1", "model-low-rank-3x", "model-low-rank-3x"]
    rows = {(record.task, record.method, record.seed): record for record in result.records}
    tasks = grid["tasks"]
    trained = (("layers 1", 3), ("low-rank", 0), ("low-rank", 1))
    assert [key for key in rows if key[1:] in trained] == [(task, *row) for task in sorted(tasks) for row in trained]
    folders = [sorted(result.folder.glob(f"cells/model-low-rank-3x-{task}-seed1-*/model")) for task in tasks]
    assert [len(found) for found in folders] == [1, 1]
    assert same(folders[0][0], folders[1][0])
    similar, found = (rows[task, "low-rank", 1] for task in tasks)
    assert similar.latency == found.latency  # timed once
    assert similar.seconds_distill == found.seconds_distill

    options: dict[str, Any] = {"task": "squad-retrieval", "data": tmp_path / "data", "device": "cpu"}
    own = compresskit.evaluate(folders[1][0], **options).record["scores"]["dev"]
    mixed = compresskit.evaluate(folders[1][0], documents_model=bench_folder / "model", **options)
    assert found.scores["dev"] == own
    assert found.score == own["ndcg@10"]
    assert found.scores["documents by the dense model"] == mixed.record["scores"]
    assert set(rows["squad-retrieval", "dense", 3].scores) == {"dev"}
    with (result.folder / "results.csv").open(newline="") as file:
        cells = {(row["task"], row["method"], row["seed"]): row for row in csv.DictReader(file)}
    shown = cells["squad-retrieval", "low-rank", "1"]["score_asymmetric"]
    assert float(shown) == pytest.approx(mixed.record["scores"]["dev"]["ndcg@10"])
    assert cells["stsb-similarity", "low-rank", "1"]["score_asymmetric"] == ""
    text = (result.folder / "README.md").read_text()
    parts = {part.partition("\n")[0]: "asymmetric ↑" in part for part in text.split("## Everything, ")[1:]}
    assert parts == {"all tasks": False, "squad-retrieval": True, "stsb-similarity": False}
    assert "where the dense model embeds the documents" in text
    assert "- Seeds: 0, 1\n" in text  # those of the method, not the grid's


def test_seeds_of_a_method_that_is_not_there(bench_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unknown method of method_seeds 'tucker'"):
        tiny_bench(bench_folder, tmp_path / "out", method_seeds={"tucker": (0, 1)})
    recipe = Grid(methods=("low-rank", "tucker"), method_seeds={"tucker": (0, 1)}, text="nothing.txt")
    with pytest.raises(InputError, match=r"nothing\.txt"):  # what a recipe says of other methods does not matter
        compresskit.bench(recipe, output=tmp_path / "out", methods=("low-rank",))
    with pytest.raises(InputError, match="1 is there twice"):
        tiny_bench(bench_folder, tmp_path / "out", method_seeds={"low-rank": (1, 1)})


# -- several texts ----------------------------------------------------------------------------------------------------


def test_several_texts(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    """As `distill` takes them; all decide the key."""
    line = [
        "bench",
        "--model",
        bench_folder / "model",
        "--methods",
        "low-rank",
        "--ratios",
        "3",
        "--baselines",
        "dense",
    ]
    line += ["--text", bench_folder / "text.txt", "--text", bench_folder / "data" / "SST-2" / "train.tsv"]
    line += ["--field", "sentence", "--unit", "line", "--max-texts", "64", "--general-tokens", "300"]
    answer = run(*line, "--output", tmp_path / "out", "--calibration-tokens", "100")
    assert answer.code == 0, answer.err
    (path,) = (tmp_path / "out").glob("cells/*low-rank*/record.json")
    record = json.loads(path.read_text())
    texts = record["made_by"]["text"]
    assert [text["source"] for text in texts] == ["text.txt", "train.tsv"]
    assert texts[1]["fields"] == ["sentence"]
    assert record["made_by"]["max_texts"] == 64
    assert record["made_by"]["calibration"]["text"]["source"] == "text.txt"  # the first one
    (model,) = (tmp_path / "out").glob("cells/*low-rank*/model")
    stage = json.loads((model / "training.json").read_text())["stages"][-1]
    assert stage["data"]["source"] == "text.txt, train.tsv"
    assert stage["data"]["limit"] == 64
    text = (tmp_path / "out" / "README.md").read_text()
    assert "text.txt, train.tsv, vectors of lines, at most 64 of them: 300 tokens" in text
    again = run("report", tmp_path / "out")
    assert again.code == 0, again.err
    for change in (("--max-texts", "65"), ("--text", bench_folder / "data" / "SST-2" / "dev.tsv")):
        refused(run(*line, "--output", tmp_path / "out", *change), "cells of another configuration")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text": ("a.txt", "b.txt")}, "several texts are read in units alone"),
        ({"text": ("a.txt", "a.txt"), "unit": ("line",)}, "a.txt is there twice"),
        ({"text": "a.txt", "fields": ("x",)}, "fields, max_texts and language belong to unit"),
        ({"text": "a.txt", "max_texts": 9}, "fields, max_texts and language belong to unit"),
        ({"text": "a.txt", "fields": ("x",), "unit": ("line",)}, "fields are columns of tables; text a.txt is none"),
        ({"text": "c.tsv", "unit": ("line",)}, "c.tsv: is a table; give plain text"),
        ({"text": "a.txt", "language": "de", "unit": ("line",)}, "language de: is that of sentences"),
        ({"text": "a.txt", "language": "German", "unit": ("sentence",)}, "language 'German': give a code"),
        ({"text": "a.txt", "max_texts": 3, "unit": ("line",)}, "max_texts: .*greater than or equal to 4"),
        ({"text": ("a.txt", "gone.txt"), "unit": ("line",)}, "gone.txt: no such file"),
    ],
)
def test_texts_that_do_not_go_together(
    bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("one\n\ntwo\n")
    Path("c.tsv").write_text("x\ty\n1\t2\n")
    with pytest.raises(InputError, match=says):
        tiny_bench(bench_folder, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_one_text_in_a_list_is_that_text() -> None:
    assert Grid(text=("a.txt",)) == Grid(text="a.txt")
    assert "fields" not in Grid(text="a.txt").model_dump()


def test_shipped_grids() -> None:
    for name in shipped_grids():
        assert list(load_grid(name).rows())
    grid = load_grid("bench-sentences")
    if installed("model2vec"):
        grid.checked()
    seeds: dict[str, set[int]] = {}
    for row in grid.rows():
        seeds.setdefault(row.name, set()).add(row.seed)
    assert {name for name, found in seeds.items() if len(found) == 3} == {"low-rank", "auto"}
    assert {"fewer-layers", "static"} <= set(seeds)


def test_a_rounded_model_makes_the_vectors_that_its_folder_asks_for(bench_folder: Path, tmp_path: Path) -> None:
    """Its graph lies in a folder that does not say how, where a graph does not hold the vectors."""
    pytest.importorskip("onnxruntime")
    pooling = {"word_embedding_dimension": 48, "pooling_mode_max_tokens": True}
    model = sentence_folder(bench_folder / "model", tmp_path / "model", pooling, behind=("Dense",))
    layer = torch.nn.Linear(48, 8)
    save_file({f"linear.{n}": p.detach() for n, p in layer.named_parameters()}, model / "2_Dense" / "model.safetensors")
    (model / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 48, "out_features": 8}))
    options: dict[str, Any] = {"models": (str(model),), "unit": ("line",), "general": {"max_steps": 1}}
    options |= {"baselines": ("dense", "int8", "onnx-int8"), "exports": ("onnx",)}
    result = tiny_bench(bench_folder, tmp_path / "out", **options)
    assert not result.failed, [record.message for record in result.failed]
    dense, torch_int8, rounded, _ = result.records
    assert rounded.scores["cosine"] > 0.99
    assert rounded.score > 0.95
    assert rounded.parameters == dense.parameters
    # What lies behind the encoder counts in every row.
    behind = (model / "2_Dense" / "model.safetensors").stat().st_size
    whole = [
        behind + next(result.folder.glob(f"cells/*-{name}-*/**/*.onnx")).stat().st_size
        for name in ("dense", "onnx-int8")
    ]
    assert [dense.exports["onnx"].megabytes, rounded.megabytes] == [pytest.approx(size / 1e6) for size in whole]
    encoder = BertModel.from_pretrained(model)
    linear = [layer for layer in encoder.modules() if isinstance(layer, torch.nn.Linear)]
    saved = sum(3 * layer.weight.numel() - 4 for layer in linear)  # of four bytes three, and a scale
    assert torch_int8.megabytes == pytest.approx((behind + 4 * encoder.num_parameters() - saved) / 1e6)
