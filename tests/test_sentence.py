"""sentence-transformers: a compressed model pools and normalises as its original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, refused, sentence_folder, tiny_model, write_tsv
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from scipy import stats
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, BertTokenizer

import compresskit
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.shared import Shared
from compresskit.data.corpus import find_corpus
from compresskit.decomposers import FactorisedEmbedding
from compresskit.model import checkpoint, sentence
from compresskit.model.targets import find_targets
from compresskit.pipeline import Request
from compresskit.planning.stage import DEFAULTS
from compresskit.storage import hub
from compresskit.training.data import from_text
from compresskit.training.reading import teacher_and_student
from compresskit.training.settings import Options

SENTENCES = ["A man is eating food.", "Someone has a meal.", "The stock market fell sharply on Monday."]


def test_a_compressed_folder_is_a_sentence_transformer(small_sentence: Path, embedded: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(small_sentence), device="cpu")
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Normalize"]
    assert model.max_seq_length == SentenceTransformer(str(embedded), device="cpu").max_seq_length
    assert isinstance(model[0].auto_model.get_input_embeddings(), FactorisedEmbedding)
    vectors = model.encode(SENTENCES)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    # Mean over the tokens that are there, by hand.
    tokens = AutoTokenizer.from_pretrained(small_sentence)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(small_sentence)(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None]
    means = (hidden * mask).sum(1) / mask.sum(1)
    np.testing.assert_allclose(vectors, torch.nn.functional.normalize(means).numpy(), rtol=1e-4, atol=1e-5)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > far + 0.2

    model.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu").encode(SENTENCES)
    np.testing.assert_allclose(again, vectors, rtol=1e-5, atol=1e-6)


def test_a_sentence_transformer_is_compressed_in_place(embedded: Path) -> None:
    model = SentenceTransformer(str(embedded), device="cpu")
    before = model.encode(SENTENCES)
    compresskit.compress(model[0].auto_model, method="low-rank", ratio=1.5, inplace=True)
    assert isinstance(model[0].auto_model.get_input_embeddings(), FactorisedEmbedding)
    after = model.encode(SENTENCES)
    assert after[0] @ after[1] > after[0] @ after[2] + 0.2
    assert not np.allclose(after, before)


def test_compress_keeps_the_modules(run: Run, embedded: Path) -> None:
    arguments = ("compress", "--recipe", "kroneckerbert-8", "--output", "small")
    assert run(*arguments).code == 0
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json"):
        assert (Path("small") / name).read_bytes() == (embedded / name).read_bytes()
    assert run(*arguments, "--overwrite").code == 0  # folders that modules.json names are ours
    Path("small/2_Mine").mkdir()
    result = run(*arguments, "--overwrite")
    assert result.code == 2
    assert "holds 2_Mine, which compresskit did not write" in result.err


def test_layers_behind_the_encoder_are_named_where_they_are_not_counted(
    run: Run, bench_folder: Path, tmp_path: Path
) -> None:
    model = sentence_folder(bench_folder / "model", tmp_path / "model", behind=("Dense",))
    save_file({"linear.weight": torch.zeros(8, 48)}, model / "2_Dense" / "model.safetensors")
    flags = ("--method", "low-rank", "--ratio", 2)
    found = run("compress", "--model", model, *flags, "--output", "small")
    assert found.code == 0, found.err
    says = "layers behind the encoder stay as they are: 384 parameters, which ratio, size and MB leave out"
    assert says in found.out.replace("\n", " ")
    plain = run("compress", "--model", bench_folder / "model", *flags)
    assert "behind the encoder" not in plain.out


def test_a_classifier_is_no_sentence_transformer(embedded: Path, tmp_path: Path) -> None:
    model = tiny_model("bert", "classifier")
    checkpoint.save(checkpoint.Checkpoint("x", "x", embedded, model), tmp_path)
    assert not (tmp_path / "modules.json").exists()
    assert (tmp_path / "tokenizer.json").is_file()


def test_modules_are_downloaded_with_a_checkpoint() -> None:
    names = ["modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "onnx/model.onnx", "tf_model.h5"]
    assert list(filter_repo_objects(names, allow_patterns=list(hub._SMALL_FILES))) == names[:3]


def _by_its_card(folder: Path) -> list[str]:
    """The loading code of a folder's card, which has run for this folder."""
    card = (folder / "README.md").read_text()
    assert "library_name: sentence-transformers\n" in card
    assert "pipeline_tag: sentence-similarity\n" in card
    code = card.partition("## Load\n\n```python\n")[2].partition("\n```\n")[0]
    found: dict[str, Any] = {}
    exec(code.replace("FOLDER_OR_REPOSITORY", str(folder)), found)
    assert found["vectors"].shape[0] == 2
    assert type(found["model"]).__name__ == "SentenceTransformer"
    return code.splitlines()


def test_cards_load_sentence_encoders_as_such(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    dense = sentence_folder(bench_folder / "model", tmp_path / "dense")
    made = run("compress", "--model", dense, "--method", "low-rank", "--ratio", 3, "--output", "cut")
    assert f"distill --teacher {dense} --student cut --text FILE --unit sentence --output cut-sentences" in made.out
    assert _by_its_card(Path("cut"))[0].startswith("import compresskit")
    assert "--student FOLDER --teacher MODEL --text FILE --unit sentence`" in Path("cut/README.md").read_text()
    text = bench_folder / "text.txt"
    compresskit.trim(dense, text=text, keep=60, output="trimmed")
    assert "import compresskit" not in _by_its_card(Path("trimmed"))[0]
    compresskit.distill("cut", dense, text=text, unit="sentence", max_steps=1, output="taught")
    assert _by_its_card(Path("taught")) == _by_its_card(Path("cut"))
    # With a head it is no sentence encoder any more.
    settings: dict[str, Any] = {"task": "sst2", "data": bench_folder / "data", "max_steps": 1, "max_length": 32}
    compresskit.finetune("taught", **settings, output="classifier")
    assert "model = BertForSequenceClassification.from_pretrained(" in Path("classifier/README.md").read_text()
    # Nor was it one before, where its teacher's folder said nothing.
    plain = ("compress", "--model", bench_folder / "model", "--method", "low-rank", "--ratio", 3, "--output", "plain")
    assert run(*plain).code == 0
    assert "model = BertModel.from_pretrained(" in Path("plain/README.md").read_text()
    compresskit.distill("plain", bench_folder / "model", text=text, unit="sentence", max_steps=1, output="mean")
    assert 'model = SentenceTransformer("FOLDER_OR_REPOSITORY")' in Path("mean/README.md").read_text()


@pytest.mark.parametrize("listed", ["../outside", "/etc", "..", ".hidden", "missing"])
def test_modules_elsewhere_are_left_alone(listed: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / ".hidden").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": listed}]))
    assert sentence.module_folders(folder) == []


PAIRS = [
    ("A man is eating food.", "A man eats something.", "4.5"),
    ("A man is eating food.", "Someone has a meal.", "3.8"),
    ("A girl is playing a guitar.", "A woman plays an instrument.", "3.2"),
    ("A girl is playing a guitar.", "Stocks fell on Monday after the bank cut its forecast.", "0.0"),
    ("The stock market fell.", "Shares dropped sharply.", "4.0"),
    ("The stock market fell.", "The cat sleeps.", "0.2"),
]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_similarity_is_that_of_sentence_transformers(
    run: Run, small_sentence: Path, tmp_path: Path, pooling: str
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(small_sentence, folder)
    modes = {"pooling_mode": "cls"} if pooling == "cls" else {"pooling_mode_mean_tokens": True}  # since 6, and before
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 384, **modes}))
    write_tsv(tmp_path / "STS-B" / "dev.tsv", "sentence1\tsentence2\tscore", PAIRS)
    scores = compresskit.evaluate(folder, task="stsb-similarity", data=tmp_path, device="cpu").record["scores"]["dev"]
    model = SentenceTransformer(str(folder), device="cpu")
    assert model[1].pooling_mode == pooling
    first, second = (model.encode([pair[place] for pair in PAIRS]) for place in (0, 1))
    cosines, targets = (first * second).sum(1), [float(pair[2]) for pair in PAIRS]
    assert scores["spearman"] == pytest.approx(stats.spearmanr(cosines, targets)[0])
    assert scores["pearson"] == pytest.approx(stats.pearsonr(cosines, targets)[0], rel=1e-4)
    shown = run("evaluate", "--model", folder, "--task", "stsb-similarity", "--data", tmp_path)
    assert shown.code == 0, shown.err
    assert f"{100 * scores['spearman']:.2f}" in shown.out


def test_similarity_takes_any_encoder_and_trains_none(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    write_tsv(tmp_path / "dev.tsv", "sentence1\tsentence2\tscore", PAIRS)
    for folder in ("student", "teacher"):  # an encoder without modules.json, a classifier
        found = compresskit.evaluate(
            bench_folder / folder, task="stsb-similarity", data=tmp_path, max_length=32, device="cpu"
        )
        assert -1 <= found.record["scores"]["dev"]["spearman"] <= 1
    arguments = ("finetune", "--model", bench_folder / "model", "--data", tmp_path, "--output", "out")
    refused(run(*arguments, "--task", "stsb-similarity"), "is for evaluation only (of kind similarity)")
    refused(
        run("bench", "--task", "stsb-similarity", "--data", tmp_path, "--output", "out"), "nothing can be trained on it"
    )


def test_plain_text_is_read_in_lower_case_where_the_folder_asks_for_that(bench_folder: Path, tmp_path: Path) -> None:
    """Whatever the tokenizer does by itself: calibration, the general stage and a benchmark's passages."""
    folder = sentence_folder(bench_folder / "model", tmp_path / "model", encoder={"do_lower_case": True})
    BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    compresskit.compress(folder, method="low-rank", ratio=2).save_pretrained(tmp_path / "student")
    plain = (bench_folder / "text.txt").read_text(encoding="utf-8")
    (tmp_path / "lower.txt").write_text(plain, encoding="utf-8")
    (tmp_path / "upper.txt").write_text(plain.upper(), encoding="utf-8")
    read = []
    for text in (tmp_path / "lower.txt", tmp_path / "upper.txt"):
        request = Request(model=folder, method="low-rank", ratio=2, calibration=text)
        statistics = request.read().calibrated().statistics
        assert statistics is not None
        moments = [statistics.second_moment(target) for target in find_targets(checkpoint.read(folder).model)]
        models = teacher_and_student(folder, tmp_path / "student", None, allow_dense=False, new_head=False)
        stage = DEFAULTS["general"].model_copy(update={"max_length": 32})
        rows = from_text(find_corpus(text), models, stage, Options()).rows["input_ids"][:]
        passages = Shared(Grid(models=(str(folder),), text=str(text))).passages(str(folder), "all").tokens
        read.append((moments, rows, passages))
    (moments, rows, passages), (others, other_rows, other_passages) = read
    for ours, theirs in zip(moments, others, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert rows == other_rows
    assert torch.equal(passages, other_passages)
