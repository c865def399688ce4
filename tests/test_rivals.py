"""What an engineer would pick instead of factors: every rival of its own size or ratio, and what it refuses."""

from __future__ import annotations

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BUDGET, Run, count, refused, reviews, same, tiny_bench, tiny_model, token_ids, weights, write_tsv
from transformers import AutoModel, AutoTokenizer, BertTokenizer, ModernBertConfig, ModernBertModel, TrainerCallback

import compresskit
from compresskit import InputError
from compresskit.benchmark.baselines.base import Asked
from compresskit.benchmark.baselines.layers import with_fewer_layers
from compresskit.benchmark.baselines.onnx import OnnxInt8Static
from compresskit.benchmark.baselines.pruned import KeepZeros, Pruned
from compresskit.benchmark.baselines.static import Static
from compresskit.benchmark.runner import BenchResult
from compresskit.data.corpus import find_corpus
from compresskit.errors import UnreachableError
from compresskit.model import checkpoint as checkpoints
from compresskit.model.depth import stretches
from compresskit.model.sentence_vectors import pool
from compresskit.tasks.declaration import Task
from compresskit.tasks.rows import Split, TaskData


@pytest.fixture(scope="module")
def deep(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like ``bench_folder``, with a model of three layers."""
    root = tmp_path_factory.mktemp("deep")
    tiny_model(num_hidden_layers=3, seed=5).save_pretrained(root / "model")
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, root / "model")
    shutil.copy(bench_folder / "text.txt", root)
    return root


def installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


#: Rows that are files of the dense model.
ONNX = ("onnx-int8", "onnx-int4", "onnx-int8-static")
with_static = pytest.mark.skipif(not installed("model2vec"), reason="the extra static is not installed")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ready encoder of another family, with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("ready") / "small one"
    tiny_model("electra", seed=3, vocab_size=60).save_pretrained(folder)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


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


def test_fewer_layers_stay_of_their_kind(tmp_path: Path) -> None:
    """ModernBERT's layers attend to all tokens or to those nearby; a kept one would have become one of the other kind,
    and no such model could be saved.
    """
    ids = torch.arange(5, 35)[None]
    widths = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 40}
    config = ModernBertConfig(
        num_hidden_layers=4, global_attn_every_n_layers=2, local_attention=4, pad_token_id=0, **widths
    )
    torch.manual_seed(0)
    model = ModernBertModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(20)
    smaller = with_fewer_layers(model, 2)
    smaller.save_pretrained(tmp_path)
    reread = ModernBertModel.from_pretrained(tmp_path)
    model.layers = torch.nn.ModuleList([model.layers[0], model.layers[2]])
    with torch.no_grad():
        found, expected = (one(input_ids=ids).last_hidden_state for one in (reread, model))
    assert reread.config.layer_types == ["full_attention", "full_attention"]
    torch.testing.assert_close(found, expected)


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


@pytest.mark.sweep
def test_rivals_on_a_task(bench_folder: Path, other: Path, tmp_path: Path) -> None:
    stage = {"epochs": 1, "max_length": 32, "learning_rate": 1e-3}
    result = tiny_bench(
        bench_folder,
        tmp_path / "out",
        ratios=(2.0, 90.0),
        tasks=("sst2",),
        data=str(bench_folder / "data"),
        baselines=("dense", *ONNX, "pruned", f"other:{other}/"),
        general=False,
        teacher={"epochs": 3, "max_length": 32, "learning_rate": 3e-3},
        task=stage,
    )
    dense, *files = (find(result, name) for name in ("dense", *ONNX))
    for rounded in files:
        assert rounded.status == "finished"
        (graph,) = (tmp_path / "out" / "cells").glob(f"model-{rounded.method}-*/{rounded.method}/model.onnx")
        assert rounded.megabytes == graph.stat().st_size / 1e6
        assert (rounded.ratio, rounded.parameters, rounded.flops) == (1.0, dense.parameters, dense.flops)
        assert rounded.score == pytest.approx(dense.score, abs=0.1)
        assert rounded.latency.batches["1"].speedup > 0
        assert rounded.made_by.versions["onnxruntime"] == version("onnxruntime")
    int8, int4, static = (file.megabytes for file in files)
    assert int4 < int8 < dense.megabytes
    assert static < dense.megabytes

    pruned, too_small = find(result, "pruned", 2.0), find(result, "pruned", 90.0)
    (folder,) = (tmp_path / "out" / "cells").glob("model-pruned-2x-*/model")
    zeros = sum(int((tensor == 0).sum()) for tensor in weights(folder).values() if tensor.dim() == 2)
    assert pruned.parameters == dense.parameters - zeros
    assert pruned.ratio == pytest.approx(2.0, rel=0.01)
    assert (
        pruned.megabytes
        == (folder / "model.safetensors").stat().st_size / 1e6
        == pytest.approx(dense.megabytes, rel=0.01)
    )
    assert too_small.status == "unreachable"
    assert "lie outside the matrices that are pruned" in too_small.message

    ready = find(result, "other small-one")
    assert (ready.status, ready.message) == ("finished", "")
    (folder,) = (tmp_path / "out" / "cells").glob("model-other-small-one-*/model")
    assert ready.parameters == count(tiny_model("electra", "classifier", vocab_size=60))
    again = compresskit.evaluate(folder, task="sst2", data=bench_folder / "data", max_length=32).record["scores"]
    assert ready.scores == again  # the tokenizer beside the model is its own
    assert (ready.seconds_distill > 0, ready.score_before) == (True, None)
    text = (result.folder / "README.md").read_text()
    stored = f"{count(AutoModel.from_pretrained(bench_folder / 'model')):,}"
    assert f"- pruned: its parameters are those of model that are not 0; its file stores all {stored}" in text
    assert "- other small-one: small one, fine-tuned on the labels alone, as the teacher was" in text
    assert str(other) not in text + (result.folder / "bench.json").read_text()


def test_the_class_that_f1_is_of_is_the_dense_models(bench_folder: Path, tmp_path: Path) -> None:
    """A ready encoder with a head of its own order was scored by its own class 1, beside the dense model's."""
    names = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    tiny_model(head="classifier", **names).save_pretrained(tmp_path / "ready")
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, tmp_path / "ready")
    for split, seed in (("train", 0), ("dev", 1)):
        rows = [(text, ("bad", "good")[int(label)]) for text, label in reviews(40, seed)]
        write_tsv(tmp_path / f"{split}.tsv", "text\tlabel", rows)
    (tmp_path / "own.yaml").write_text(
        "version: 1\nname: own\ninputs: [text]\nlabel: label\nfiles: {train: train.tsv, dev: dev.tsv}\nmetrics: [f1]\n"
    )
    grid = {"tasks": (str(tmp_path / "own.yaml"),), "data": str(tmp_path), "general": False}
    stage = {"max_steps": 3, "max_length": 32, "learning_rate": 3e-3}
    grid |= {"teacher": stage, "task": stage, "baselines": (f"other:{tmp_path / 'ready'}",)}
    ready = find(tiny_bench(bench_folder, tmp_path / "out", **grid), "other ready")
    (folder,) = (tmp_path / "out" / "cells").glob("model-other-ready-*/model")
    options = {"task": tmp_path / "own.yaml", "data": tmp_path, "max_length": 32, "device": "cpu", "report": True}
    classes = compresskit.evaluate(folder, **options).record["report"]["dev"]["tables"]["by class"]
    assert classes["good"]["f1"] != classes["bad"]["f1"]
    assert ready.score == pytest.approx(classes["good"]["f1"])


def test_rivals_where_vectors_are_compared(bench_folder: Path, other: Path, tmp_path: Path) -> None:
    (tmp_path / "near.yaml").write_text(
        "version: 1\nname: near\nkind: similarity\ninputs: [one, two]\nlabel: score\n"
        "files: {dev: rows.tsv}\nmetrics: [spearman]\n"
    )
    rows = [(a, b, str(float(a[0] == b[0]))) for a in ("good", "great", "bad") for b in ("good", "bad", "plot")]
    write_tsv(tmp_path / "rows.tsv", "one\ttwo\tscore", rows)
    static = ("static",) if installed("model2vec") else ()
    result = tiny_bench(
        bench_folder,
        tmp_path / "out",
        tasks=(str(tmp_path / "near.yaml"),),
        data=str(tmp_path),
        unit=("sentence",),
        baselines=("onnx-int8", *static, f"other:{other}"),
        general={"max_steps": 2, "max_length": 32},
    )
    assert [(record.method, record.message) for record in result.records if record.status != "finished"] == []
    int8, dense, ready = (find(result, name) for name in ("onnx-int8", "dense", "other small-one"))
    assert int8.score == pytest.approx(dense.score, abs=0.3)
    assert (ready.seconds_distill, ready.parameters) == (None, count(tiny_model("electra", vocab_size=60)))
    assert "- other small-one: small one, as it is" in (result.folder / "README.md").read_text()


def test_rivals_without_labels(bench_folder: Path, tmp_path: Path) -> None:
    baselines = ("dense", "onnx-int8", "onnx-int8-static", "pruned")
    result = tiny_bench(bench_folder, tmp_path / "out", baselines=baselines, ratios=(2.0,))
    int8, fixed, pruned = find(result, "onnx-int8"), find(result, "onnx-int8-static"), find(result, "pruned", 2.0)
    assert 0.9 < int8.score < 1
    assert 0.5 < fixed.score < 1
    assert "hidden error" not in int8.scores
    assert pruned.score > pruned.score_before
    with pytest.raises(InputError, match="baseline other:x: has a tokenizer of its own, so it needs a task"):
        tiny_bench(bench_folder, tmp_path / "none", baselines=("other:x",))


def test_static_quantisation_is_per_channel_and_needs_something_to_read(bench_folder: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    dense = checkpoints.read(bench_folder / "model")
    with pytest.raises(InputError, match="takes ranges from a task's training rows or a text; give one"):
        OnnxInt8Static().make(dense, Asked(folder=tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    asked = Asked(folder=tmp_path, text=find_corpus(bench_folder / "text.txt"))
    made = OnnxInt8Static().make(dense, asked)
    (path,) = tmp_path.glob("onnx-int8-static/*.onnx")
    graph = onnx.load(path).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert max(array.nbytes for array in held.values() if array.dtype == "float32") < 48 * 48 * 4
    scales = [array.size for name, array in held.items() if name.endswith("_scale")]
    assert max(scales) >= 96
    again = OnnxInt8Static().make(dense, asked)
    ids = {"input_ids": token_ids(), "attention_mask": torch.ones_like(token_ids())}
    ours, theirs = (one.run(**ids)["last_hidden_state"] for one in (made, again))
    assert torch.equal(ours, theirs)
    exact = dense.model(**ids).last_hidden_state
    assert (ours - exact).norm() / exact.norm() < 0.3


def test_other_files_are_another_cell(bench_folder: Path, other: Path, tmp_path: Path) -> None:
    stage = {"max_steps": 1, "max_length": 32}
    grid = {"tasks": ("sst2",), "data": str(bench_folder / "data"), "general": False, "teacher": stage, "task": stage}
    grid |= {"baselines": (f"other:{tmp_path / 'ready'}",), "methods": ("low-rank",)}
    with pytest.raises(InputError, match="ready: no such folder"):
        tiny_bench(bench_folder, tmp_path / "out", **grid)
    shutil.copytree(other, tmp_path / "ready")
    (first,) = (r.key for r in tiny_bench(bench_folder, tmp_path / "out", **grid).records if r.method == "other ready")
    tiny_model("electra", seed=4, vocab_size=60).save_pretrained(tmp_path / "ready")
    with pytest.raises(InputError, match="cells of another configuration"):
        tiny_bench(bench_folder, tmp_path / "out", **grid)
    (tmp_path / "ready" / "vocab.txt").unlink()
    (tmp_path / "ready" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="ready: has no tokenizer"):
        tiny_bench(bench_folder, tmp_path / "out", **grid)
    assert first


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_pruned_weights_stay_pruned_when_a_run_goes_on(bench_folder: Path, tmp_path: Path) -> None:
    pruned = Pruned()
    made = pruned.make(checkpoints.read(bench_folder / "model"), Asked("", 3.0))
    checkpoints.save(made.checkpoint, tmp_path / "start")
    zeros = {name: tensor == 0 for name, tensor in weights(tmp_path / "start").items() if tensor.dim() == 2}
    settings = {**BUDGET, "text": bench_folder / "text.txt", "allow_dense": True, "save_every": 2, "device": "cpu"}

    def train(output: str, *more: TrainerCallback, **options: Any) -> None:
        callbacks = (*pruned.callbacks(), *more)
        compresskit.distill(
            tmp_path / "start",
            bench_folder / "model",
            output=tmp_path / output,
            callbacks=callbacks,
            **settings,
            **options,
        )

    train("whole")
    with pytest.raises(KeyboardInterrupt):
        train("stopped", Stop())
    train("stopped", resume=True)
    assert same(tmp_path / "whole", tmp_path / "stopped")
    after = weights(tmp_path / "whole")
    assert all((after[name][mask] == 0).all() for name, mask in zeros.items())
    assert any((after[name] != weights(tmp_path / "start")[name]).any() for name in zeros)
    assert isinstance(pruned.callbacks()[0], KeepZeros)


@with_static
def test_static_is_model2vec_s_table(bench_folder: Path) -> None:
    from model2vec.distill import distill_from_model

    dense = checkpoints.read(bench_folder / "model")
    made = Static().make(dense, Asked("", 4.0))
    model: Any = made.checkpoint.model
    assert 4.0 <= count(dense.model) / count(model) < 4.2
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    axes = int(made.made_by["facts"]["axes"])
    theirs = distill_from_model(
        checkpoints.read(bench_folder / "model").model, tokenizer, device="cpu", pca_dims=axes, quantize_to="float32"
    )
    texts = ["the film was good", "awful plot", "one"]
    vectors = torch.from_numpy(theirs.encode(texts))
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    hidden = model(**inputs)["last_hidden_state"]
    for mode in ("mean", "cls", "lasttoken", "mean_sqrt_len_tokens"):  # by whatever token a folder pools
        ours = torch.nn.functional.normalize(pool(hidden, inputs["attention_mask"], (mode,)), dim=1)
        assert torch.allclose(ours @ ours.T, vectors @ vectors.T, atol=1e-5), mode
    again: Any = Static().make(dense, Asked("", 4.0)).run
    assert torch.equal(*(one(input_ids=token_ids())["last_hidden_state"] for one in (model, again)))
    with pytest.raises(UnreachableError, match=r"one number for each of 49\d tokens is larger"):
        Static().make(dense, Asked("", 1000.0))


@with_static
def test_static_ranks_by_one_number(bench_folder: Path) -> None:
    """The head of kind ranking says of no problem that it is one of numbers; classes were fitted to it, in vain."""
    dense = checkpoints.read(bench_folder / "model", "sequence-classification", num_labels=1, problem_type=None)
    found = [(("films", text), 1.0 + (label == "1")) for text, label in reviews(60, seed=3)]
    found[0] = (found[0][0], 0.0)
    split = Split([texts for texts, _ in found], [target for _, target in found], "rows.tsv")
    task = Task(version=1, name="rank", kind="ranking", inputs=("query", "text"), label="label", metrics=("map",))
    made: Any = Static().make(dense, Asked("", 4.0, rows=TaskData(task, {"train": split}, ()), max_length=32))
    inputs = AutoTokenizer.from_pretrained(bench_folder / "model")([("films", "good"), ("films", "bad")])
    good, bad = made.run(input_ids=torch.tensor(inputs["input_ids"]))["logits"].flatten().tolist()
    assert good > 0.6
    assert bad < good - 0.2


@with_static
def test_static_in_a_benchmark(bench_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "same.yaml").write_text(
        "version: 1\nname: same\nkind: classification\ninputs: [one, two]\nlabel: same\n"
        "files: {train: rows.tsv}\nmetrics: [accuracy]\n"
    )
    rows = [(a, b, "yes" if a == b else "no") for a in ("good", "bad", "film", "plot") for b in ("good", "bad", "film")]
    write_tsv(tmp_path / "data" / "rows.tsv", "one\ttwo\tsame", rows * 12)
    shutil.copytree(bench_folder / "data" / "SST-2", tmp_path / "data" / "SST-2")
    stage = {"epochs": 1, "max_length": 32, "learning_rate": 1e-3}
    grid = {"baselines": ("static",), "ratios": (4.0,), "methods": ("low-rank",)}
    tasks = {"tasks": ("sst2", str(tmp_path / "same.yaml")), "data": str(tmp_path / "data"), "general": False}
    result = tiny_bench(bench_folder, tmp_path / "tasks", **grid, **tasks, teacher=stage, task=stage)
    static = [record for record in result.records if record.method == "static"]
    assert [(record.status, record.message) for record in static] == [("finished", "")] * 2
    for record in static:
        assert 4.0 <= record.ratio < 4.3
        assert record.score > 0.9  # words decide, or whether they are the same
        assert record.megabytes == 4 * record.parameters / 1e6
    result = tiny_bench(bench_folder, tmp_path / "bare", **grid)
    bare = find(result, "static", 4.0)
    assert 0 < bare.score < 1
    assert bare.made_by.versions["model2vec"] == version("model2vec")
    assert "- static: a vector of" in (result.folder / "README.md").read_text()


def test_static_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Static, "packages", ("model2vec-that-is-not-there",))
    answer = run("bench", "--baselines", "static", "--output", "out")
    refused(answer, "baseline static: model2vec-that-is-not-there missing; install the extra 'static'")
