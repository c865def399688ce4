"""Calibration: what the statistics count, that nothing else changes, the command, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Run, same, tiny_bench, tiny_model, weights, write_tsv
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

import compresskit
from compresskit import InputError
from compresskit.calibration.moments import Moments
from compresskit.calibration.statistics import Calibration, calibrate
from compresskit.calibration.tokens import RealTokens
from compresskit.data.corpus import find_corpus, sequences
from compresskit.decomposers.registry import METHODS
from compresskit.model.positions import positions
from compresskit.model.sources import ModelWeights
from compresskit.model.targets import find_targets
from compresskit.planning.apply import apply_plan
from compresskit.planning.planner import make_plan
from compresskit.planning.recipe import for_method
from compresskit.tasks.loading import load_data, load_task


@pytest.fixture(scope="module")
def dense(bench_folder: Path) -> tuple[PreTrainedModel, Any]:
    return AutoModel.from_pretrained(bench_folder / "model").eval(), AutoTokenizer.from_pretrained(
        bench_folder / "model"
    )


@pytest.fixture(scope="module")
def found(dense: tuple[PreTrainedModel, Any], bench_folder: Path) -> Calibration:
    return calibrate(*dense, find_corpus(bench_folder / "text.txt"), 2000)


def test_statistics_are_those_of_the_real_tokens(
    dense: tuple[PreTrainedModel, Any], found: Calibration, bench_folder: Path
) -> None:
    model, tokenizer = dense
    targets = {target.name: target for target in find_targets(model)}
    first, ids, tokens = torch.zeros(48, 48), torch.zeros(499), 0
    text = sequences(find_corpus(bench_folder / "text.txt"), tokenizer, 40)
    with torch.no_grad():
        for row in text["input_ids"]:
            if tokens < 2000:
                states = model(torch.tensor([row]), output_hidden_states=True).hidden_states[0][0]
                first += states.T @ states
                ids += torch.bincount(torch.tensor(row), minlength=499)
                tokens += len(row)
    assert 2000 <= found.tokens == tokens < 2040
    words = targets["embeddings.word_embeddings"]
    assert torch.equal(found.token_counts(words), ids)
    query, key = (targets[f"encoder.layer.0.attention.self.{name}"] for name in ("query", "key"))
    assert torch.allclose(found.second_moment(query), first, rtol=1e-4, atol=1e-3)
    assert found.second_moment(query) is found.second_moment(key)  # held once
    assert found.second_moment(targets["encoder.layer.1.output.dense"]).shape == (96, 96)


SMALL: dict[str, Any] = {"vocab_size": 499, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


SMALL |= {"intermediate_size": 48, "max_position_embeddings": 60}


#: Families whose layers see more rows than tokens, or fewer, or mix what stands beside a token into it.
OF_OTHER_ROWS = {
    "longformer": lambda: transformers.LongformerModel(transformers.LongformerConfig(**SMALL, attention_window=32)),
    "fnet": lambda: transformers.FNetModel(
        transformers.FNetConfig(**{key: value for key, value in SMALL.items() if key != "num_attention_heads"})
    ),
    "convbert": lambda: transformers.ConvBertModel(transformers.ConvBertConfig(**SMALL)),
    "funnel": lambda: transformers.FunnelModel(
        transformers.FunnelConfig(vocab_size=499, block_sizes=[1, 1], d_model=32, n_head=2, d_head=16, d_inner=48)
    ),
}


def test_each_input_is_multiplied_once_for_all_that_see_it() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    tokens, moments, generator = RealTokens({"input_ids": ids, "attention_mask": ids}), Moments(), torch.Generator()
    hidden, others = (torch.randn(2, 3, 4, generator=generator.manual_seed(seed)) for seed in range(2))
    squares = [x.flatten(0, 1).T @ x.flatten(0, 1) for x in (hidden, others)]
    for target in ("query", "key", "value"):
        moments.see(target, hidden, tokens)
    hidden.zero_()  # as a model may do with what it has read
    moments.see("key", others, tokens)
    found = moments.found()
    assert found["query"] is found["value"]
    torch.testing.assert_close(found["query"], squares[0])
    torch.testing.assert_close(found["key"], squares[0] + squares[1])


@pytest.mark.parametrize("family", OF_OTHER_ROWS)
def test_statistics_do_not_depend_on_how_sequences_are_batched(family: str, bench_folder: Path) -> None:
    """The same sequences one by one; Longformer computes with (T, B, H), padded to its window."""
    torch.manual_seed(0)
    model, corpus = OF_OTHER_ROWS[family]().eval(), find_corpus(bench_folder / "text.txt")
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    targets = {t.name: t for t in find_targets(model) if t.kind == "linear"}
    moments = {name: torch.zeros(target.shape[1], target.shape[1]) for name, target in targets.items()}
    length = 0

    def hook(name: str) -> Any:
        def before(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].transpose(0, 1) if arguments[0].dim() == 3 and arguments[0].shape[1] == 1 else arguments[0]
            rows = x[:, :length] if x.dim() == 3 else x
            rows = rows.reshape(-1, rows.shape[-1])
            moments[name] += rows.T @ rows

        return before

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in targets]
    text, read = sequences(corpus, tokenizer, min(128, positions(model) or 128)), 0
    with torch.no_grad():
        for row in text["input_ids"]:
            if read < 1500:
                length, read = len(row), read + len(row)
                model(torch.tensor([row]))
    for handle in handles:
        handle.remove()
    found = calibrate(model, tokenizer, corpus, 1500)
    assert found.tokens == read
    for name, target in targets.items():
        moment = found.second_moment(target)
        if moment is not None:
            torch.testing.assert_close(moment, moments[name], rtol=1e-3, atol=1e-3 * float(moments[name].abs().max()))


@pytest.mark.parametrize(("family", "tokens"), [("roberta", 500), ("bert", 1)])
def test_a_text_says_nothing_of_positions(family: str, tokens: int, bench_folder: Path) -> None:
    """Neither where every sequence looks up its own (RoBERTa) nor in a batch of one sequence, which looks the same."""
    model = tiny_model(family)
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    found = calibrate(model, tokenizer, find_corpus(bench_folder / "text.txt"), tokens)
    words, positions = (
        next(target for target in find_targets(model) if target.name == f"embeddings.{name}_embeddings")
        for name in ("word", "position")
    )
    assert found.token_counts(words).sum() == found.tokens
    assert found.token_counts(positions) is None


def test_tables_that_pairs_of_tokens_look_up_are_not_counted(bench_folder: Path, tmp_path: Path) -> None:
    """MPNet's relative positions are looked up once for all sequences of a batch."""
    config = transformers.MPNetConfig(
        vocab_size=499, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    model = transformers.MPNetForSequenceClassification(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    found = calibrate(model, tokenizer, load_data(load_task("sst2"), bench_folder / "data"), 500)
    counts = {target.name: found.token_counts(target) for target in find_targets(model) if target.kind == "embedding"}
    assert counts.pop("mpnet.encoder.relative_attention_bias") is None
    assert len(counts) == 2
    for each in counts.values():
        assert each is not None
        assert each.sum() == found.tokens


def test_statistics_leave_the_model_alone(bench_folder: Path) -> None:
    model = tiny_model()
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one, other = (calibrate(model, tokenizer, find_corpus(bench_folder / "text.txt"), 500) for _ in range(2))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(one._moments[name], other._moments[name]) for name in one._moments)


@pytest.mark.parametrize("method", sorted(METHODS.all()))
def test_every_method_from_the_api(method: str, bench_folder: Path, tmp_path: Path) -> None:
    given = {"method": method, "ratio": 3, "calibration": bench_folder / "text.txt"}
    model = compresskit.compress(bench_folder / "model", **given)
    plain = compresskit.compress(bench_folder / "model", method=method, ratio=3)
    assert {name: t.shape for name, t in model.state_dict().items()} == {
        n: t.shape for n, t in plain.state_dict().items()
    }
    again = compresskit.compress(bench_folder / "model", **given).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path)
    loaded = compresskit.load(tmp_path).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


def test_least_error_means_outputs(dense: tuple[PreTrainedModel, Any], found: Calibration, bench_folder: Path) -> None:
    def total(allocation: str) -> float:
        model = AutoModel.from_pretrained(bench_folder / "model")
        source = ModelWeights(model)
        plan = make_plan(model, for_method("low-rank", 3, allocation), source, statistics=found, predict_errors=True)
        predicted = {a.group.name: a.output_error for a in plan.assignments}
        plan = apply_plan(model, plan, statistics=found)
        assert {a.group.name: a.output_error for a in plan.assignments} == pytest.approx(predicted, abs=1e-3)
        assert all(a.error is not None for a in plan.assignments)
        weights = [(10 if a.group.role == "embedding" else 1) * len(a.group.targets) for a in plan.assignments]
        return sum(weight * a.output_error**2 for weight, a in zip(weights, plan.assignments, strict=True))

    assert total("error") < 0.98 * total("uniform")


def test_the_command(bench_folder: Path, run: Run) -> None:
    model, text = str(bench_folder / "model"), str(bench_folder / "text.txt")
    line = ["compress", "--model", model, "--method", "kronecker", "--ratio", "3"]
    result = run(*line, "--calibration", text, "--output", "first")
    assert result.code == 0, result.err
    assert "output error" in result.out
    record = json.loads(Path("first/compression.json").read_text())
    assert record["calibration"]["text"]["source"] == "text.txt"
    assert record["calibration"]["tokens"] > 1000
    assert all(0 < group["output_error"] < group["error"] + 0.2 for group in record["groups"])
    assert "fitted to what the layers see" in Path("first/README.md").read_text()
    result = run(
        "compress", "--model", model, "--recipe", "first/recipe.yaml", "--calibration", text, "--output", "again"
    )
    assert result.code == 0, result.err
    assert same(Path("first"), Path("again"))
    assert "--calibration text.txt --recipe" in Path("first/README.md").read_text()
    result = run("compress", "--model", model, "--recipe", "first/recipe.yaml", "--output", "other", "--dry-run")
    assert "made with another calibration text" in result.out
    result = run(*line, "--calibration", "--output", "embedded", "--dry-run")  # alone: the embedded text
    assert result.code == 0, result.err
    assert "output error" in result.out
    assert run(*line, "--output", "plain").code == 0
    assert not same(Path("first"), Path("plain"))
    assert "calibration" not in json.loads(Path("plain/compression.json").read_text())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of pairs: 60 rows, the label sorted."""
    root = tmp_path_factory.mktemp("pairs")
    (root / "pairs.yaml").write_text(
        "version: 1\nname: pairs\ninputs: [one, two]\nlabel: label\nmetrics: [accuracy]\n"
        "files: {train: rows.tsv, dev: dev.tsv}\n"
    )
    rows = [("the film was good", "it was " + ("good" if i < 30 else "bad"), str(int(i < 30))) for i in range(60)]
    write_tsv(root / "rows.tsv", "one\ttwo\tlabel", rows)
    write_tsv(root / "dev.tsv", "one\ttwo\tlabel", rows[25:35])
    return root


def test_statistics_of_a_task_are_those_of_its_pairs(dense: tuple[PreTrainedModel, Any], pairs: Path) -> None:
    model, tokenizer = dense
    data = load_data(load_task(pairs / "pairs.yaml"), pairs)
    found = calibrate(model, tokenizer, data, 100_000)
    words = model.embeddings.word_embeddings
    first, ids = torch.zeros(48, 48), torch.zeros(499)
    with torch.no_grad():
        for texts in data.splits["train"].texts:
            inputs = tokenizer(*texts, return_tensors="pt")
            assert inputs["token_type_ids"].any()  # the second text is known as such
            states = model(**inputs, output_hidden_states=True).hidden_states[0][0]
            first += states.T @ states
            ids += torch.bincount(inputs["input_ids"][0], minlength=words.num_embeddings)
    targets = {target.name: target for target in find_targets(model)}
    assert torch.equal(found.token_counts(targets["embeddings.word_embeddings"]), ids)
    moment = found.second_moment(targets["encoder.layer.0.attention.self.query"])
    assert torch.allclose(moment, first, rtol=1e-4, atol=1e-3)
    assert found.record()["text"]["task"] == "pairs"
    some = calibrate(model, tokenizer, data, 200)
    assert 200 <= some.tokens < 220  # a part of the rows, of both labels though the file is sorted
    good, bad = tokenizer.convert_tokens_to_ids(["good", "bad"])
    counts = some.token_counts(targets["embeddings.word_embeddings"])
    rows = int(counts[tokenizer.cls_token_id])
    assert 0 < counts[bad] < rows < counts[good] < 2 * rows


def test_a_task_in_commands_and_from_python(bench_folder: Path, pairs: Path, run: Run) -> None:
    model, task = bench_folder / "model", str(pairs / "pairs.yaml")
    line = ["compress", "--model", str(model), "--method", "low-rank", "--ratio", "3"]
    rows = ["--calibration-task", task, "--data", str(pairs)]
    result = run(*line, *rows, "--output", "first")
    assert result.code == 0, result.err
    lesson = f"--student first --task {task} --data {pairs} --output first-pairs"
    assert f"distill --teacher TASK_TEACHER {lesson}" in result.out  # this model has no head
    assert """python -c 'import compresskit; model = compresskit.load("first")'""" in result.out
    record = json.loads(Path("first/compression.json").read_text())["calibration"]
    assert (record["text"]["source"], record["text"]["task"]) == ("rows.tsv", "pairs")
    card = Path("first/README.md").read_text()
    assert "--calibration-task pairs --data DIR --recipe" in card
    assert "tokens of rows.tsv (pairs)" in card
    made = compresskit.compress(model, method="low-rank", ratio=3, calibration_task=task, data=pairs).state_dict()
    assert all(torch.equal(tensor, made[name]) for name, tensor in weights(Path("first")).items())
    again = ["compress", "--model", str(model), "--recipe", "first/recipe.yaml"]
    result = run(*again, *rows, "--output", "again")
    assert same(Path("first"), Path("again"))
    assert "another calibration text" not in result.out
    for more, message in (
        ([*rows, "--calibration"], "calibrate on a text or on a task, not on both"),
        (["--data", str(pairs)], "data belongs to a task: give a calibration task too"),
        (["--calibration-task", "hans", "--data", str(pairs)], "is for evaluation only"),
        (["--calibration-task", "pears"], "pears"),
    ):
        result = run(*line, *more, "--output", "bad")
        assert (result.code, result.err.count("\n")) == (2, 1), result.err
        assert message in result.err


def test_refused(bench_folder: Path, tiny_folder: Path, run: Run, tmp_path: Path) -> None:
    line = ["compress", "--model", str(bench_folder / "model"), "--method", "kronecker", "--ratio", "3"]
    result = run(*line, "--calibration", "missing.txt")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "text missing.txt: no such file" in result.err
    (tmp_path / "empty.txt").write_text("\n")
    result = run(*line, "--calibration", str(tmp_path / "empty.txt"))
    assert result.code == 2
    assert "holds no text" in result.err
    with pytest.raises(InputError, match="no tokenizer"):
        compresskit.compress(tiny_model(), method="low-rank", ratio=3, calibration=True)
    broken = tiny_model()
    broken.embeddings.LayerNorm.weight.data.fill_(3e38)
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    with pytest.raises(InputError, match="NaN or infinity on text"):
        compresskit.compress(broken, method="low-rank", ratio=3, calibration=True, tokenizer=tokenizer)


def test_in_a_benchmark(bench_folder: Path, tmp_path: Path) -> None:
    plain = tiny_bench(bench_folder, tmp_path / "plain").records
    fitted = tiny_bench(bench_folder, tmp_path / "fitted", calibration_tokens=2000).records
    ours, theirs = (next(record for record in records if record.method == "low-rank") for records in (fitted, plain))
    assert ours.key != theirs.key
    assert ours.parameters == theirs.parameters
    assert ours.error > theirs.error  # of the weights
    assert ours.score_before > theirs.score_before
    made = ours.made_by
    assert made.calibration.text == made.text.model_copy(update={"part": "training"})
    assert made.recipe["calibration_tokens"] == 2000
    assert theirs.made_by.calibration is None
