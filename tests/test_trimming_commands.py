"""Trimming on the way to a compression, by the commands, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import Run, refused, same, sentence_folder, tiny_model, write_tsv
from transformers import BertTokenizer
from vocabularies import Whole, checkpoint, word_piece

import compresskit
from compresskit import InputError
from compresskit.vocabulary.tokenizer_file import TokenizerFile


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return checkpoint("word_piece", tmp_path_factory.mktemp("pieces"))


def test_a_trimmed_model_goes_every_further_way(bench_folder: Path, tmp_path: Path) -> None:
    text = bench_folder / "text.txt"
    trimmed = tmp_path / "trimmed"
    compresskit.trim(bench_folder / "model", text=text, keep=60, output=trimmed)
    record = (trimmed / "trim.json").read_bytes()
    taught = compresskit.finetune(
        trimmed, task="sst2", data=bench_folder / "data", output=tmp_path / "teacher", max_length=32, max_steps=2
    )
    assert "student_after" in taught.record["scores"]
    assert (tmp_path / "teacher" / "trim.json").read_bytes() == record
    student = compresskit.compress(trimmed, method="low-rank", ratio=2, calibration=text)
    assert student.config.vocab_size == 60
    student.save_pretrained(tmp_path / "student")
    learnt = compresskit.distill(student, trimmed, text=text, max_steps=2, max_length=32, output=tmp_path / "learnt")
    assert learnt.record["steps"] == 2


def test_a_ratio_counts_against_the_model_before_trimming(run: Run, pieces: Whole) -> None:
    result = run(
        "compress", "--model", pieces.folder, "--trim-text", pieces.text, "--trim-keep", 500, "--method", "low-rank",
        "--ratio", 3, "--output", "small",
    )  # fmt: skip
    assert result.code == 0, result
    record = json.loads(Path("small/compression.json").read_text())
    dense = sum(parameter.numel() for parameter in pieces.model.parameters())
    rows = pieces.model.config.vocab_size
    assert record["parameters"]["before"] == dense
    assert record["ratio"] == dense / record["parameters"]["after"] >= 3
    assert record["trimmed"]["rows"] == {"before": rows, "after": 500}
    left = dense - 48 * (rows - 500)
    assert record["trimmed"]["parameters"] == {"before": dense, "after": left}
    for factor in (f"{dense / left:.2f}x", f"{left / record['parameters']['after']:.2f}x"):
        assert factor in result.out
        assert factor in Path("small/README.md").read_text()
    assert "--trim-text text.txt --trim-keep 500" in Path("small/README.md").read_text()
    assert f"compresskit distill --teacher {pieces.folder} --student small --text FILE" in result.out
    assert compresskit.verify("small") == []
    small = compresskit.load("small")
    tokenizer = transformers.AutoTokenizer.from_pretrained("small")
    assert len(tokenizer) == small.config.vocab_size == 500
    assert json.loads(Path("small/trim.json").read_text())["tokens"]["after"] == 500


def test_its_recipe_repeats_it(run: Run, pieces: Whole) -> None:
    shared = ("compress", "--model", pieces.folder, "--trim-text", pieces.text, "--trim-keep", 500)
    assert run(*shared, "--method", "low-rank", "--ratio", 3, "--output", "one").code == 0
    assert run(*shared, "--recipe", "one/recipe.yaml", "--output", "two").code == 0
    assert same(Path("one"), Path("two"))


def test_a_size_is_that_of_the_file(run: Run, pieces: Whole) -> None:
    result = run(
        "compress", "--model", pieces.folder, "--trim-text", pieces.text, "--trim-coverage", 0.95, "--method",
        "low-rank", "--size", "180kB", "--output", "small",
    )  # fmt: skip
    assert result.code == 0, result
    assert 160_000 < Path("small/model.safetensors").stat().st_size <= 180_000


@pytest.mark.sweep
def test_a_compressed_one_is_exported(run: Run, pieces: Whole) -> None:
    pytest.importorskip("onnxruntime")
    shared = ("compress", "--model", pieces.folder, "--trim-text", pieces.text, "--trim-keep", 500)
    assert run(*shared, "--method", "low-rank", "--ratio", 3, "--output", "small").code == 0
    assert run("export", "small", "--output", "device").code == 0
    assert Path("device/trim.json").read_bytes() == Path("small/trim.json").read_bytes()
    assert len(transformers.AutoTokenizer.from_pretrained("device")) == 500


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--trim-keep", 500), "give --trim-text"),
        (("--trim-coverage", 0.9), "give --trim-text"),
        (("--trim-text", "TEXT", "--trim-keep", 500, "--trim-coverage", 0.9), "not both"),
        (("--trim-text", "missing.txt"), "no such file"),
        (("--trim-text", "TEXT", "--trim-keep", 100), "trimming alone makes the model"),
        (("--trim-text", "TEXT", "--trim-keep", 5000), "there are only 900"),
    ],
)
def test_what_cannot_be_trimmed_is_not_compressed(
    run: Run, pieces: Whole, options: tuple[Any, ...], words: str
) -> None:
    options = tuple(pieces.text if option == "TEXT" else option for option in options)
    refused(run("compress", "--model", pieces.folder, "--method", "low-rank", "--ratio", 1.3, *options), words)


def test_an_object_is_not_trimmed_before_a_compression(pieces: Whole) -> None:
    from compresskit.pipeline import Request

    with pytest.raises(InputError, match="give the checkpoint's folder"):
        Request(model=pieces.model, method="low-rank", ratio=2, trim_text=pieces.text)


def test_the_command_writes_an_ordinary_folder(run: Run, pieces: Whole) -> None:
    result = run("trim", "--model", pieces.folder, "--text", pieces.text, "--keep", 500, "--output", "small")
    assert result.code == 0, result
    for word in ("907", "500", "1.8", "held-out text", "cut into other tokens"):
        assert word in result.out
    assert "trimmed from 907 to 500 rows" in Path("small/README.md").read_text()
    model = transformers.AutoModel.from_pretrained("small")
    assert not hasattr(model.config, "quantization_config")
    refused_again = run("trim", "--model", pieces.folder, "--text", pieces.text, "--output", "small")
    assert refused_again.code == 2
    assert "exists" in refused_again.err
    again = run("trim", "--model", pieces.folder, "--text", pieces.text, "--output", "small", "--overwrite")
    assert again.code == 0, again
    assert json.loads(Path("small/trim.json").read_text())["asked"] == {"coverage": 0.999}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--keep", 901), "keep 901: of 900 tokens, there are only 900"),
        (("--keep", 900), "trims nothing"),
        (("--keep", 0), "at least 1 token"),
        (("--keep", 3), "special tokens, bytes and the like take 5"),
        (("--coverage", 0), "above 0 and at most 1"),
        (("--coverage", 1.5), "above 0 and at most 1"),
        (("--coverage", "nan"), "above 0 and at most 1"),
        (("--keep", 500, "--coverage", 0.9), "not both"),
    ],
)
def test_bad_numbers(run: Run, pieces: Whole, options: tuple[Any, ...], words: str) -> None:
    refused(run("trim", "--model", pieces.folder, "--text", pieces.text, *options), words)


def test_a_text_with_none_of_the_tokens(run: Run, pieces: Whole, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("ᚠᚢᚦ ᚨᚱᚲ\n\nᚷᚹ <mask>\n", encoding="utf-8")
    refused(
        run("trim", "--model", pieces.folder, "--text", tmp_path / "other.txt"),
        "text other.txt: has none of the model's tokens",
    )


def test_a_text_that_cannot_be_read(run: Run, pieces: Whole, tmp_path: Path) -> None:
    refused(run("trim", "--model", pieces.folder, "--text", "missing.txt"), "text missing.txt: no such file")
    (tmp_path / "empty.txt").write_text("\n\n")
    refused(run("trim", "--model", pieces.folder, "--text", tmp_path / "empty.txt"), "holds no text")


def test_a_text_too_short_to_hold_a_part_out(pieces: Whole, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the object is a class of the module\n", encoding="utf-8")
    record = compresskit.trim(pieces.folder, text=tmp_path / "short.txt", coverage=1).record
    assert record["held_out"] is None
    assert record["coverage"] == 1


def test_a_tokenizer_that_is_not_fast(run: Run, pieces: Whole, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    tiny_model().save_pretrained(slow)
    words = "".join(f"{token} {number}\n" for number, token in enumerate(["的", "是", "a", "b"]))
    (slow / "vocab.json").write_text(json.dumps({token: n for n, token in enumerate(["<unk>", "a", "b", "</w>"])}))
    (slow / "merges.txt").write_text("a b 1\n" + words)
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XLMTokenizer"}))
    result = run("trim", "--model", slow, "--text", pieces.text)
    refused(result, "tokenizer")


def test_kinds_that_are_not_known_are_refused() -> None:
    data = json.loads(word_piece().to_str())
    data["model"]["type"] = "Characters"
    with pytest.raises(InputError, match="tokenizer: is of kind Characters; only BPE, Unigram, WordLevel, WordPiece"):
        TokenizerFile(data)


def test_no_tokenizer_and_compressed_models(run: Run, bench_folder: Path, pieces: Whole, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "bare")
    refused(run("trim", "--model", tmp_path / "bare", "--text", pieces.text), "has no tokenizer")
    refused(run("trim", "--model", bench_folder / "student", "--text", pieces.text), "is compressed already")


def test_the_words_of_a_prompt_stay(bench_folder: Path, tmp_path: Path) -> None:
    prompts = {"query": "ugly one: ", "document": "awful plot "}
    general = {"prompts": prompts, "default_prompt_name": "query"}
    folder = sentence_folder(bench_folder / "model", tmp_path / "model", general=general)
    (tmp_path / "text.txt").write_text("the film of the actor\n\nthe movie was fine\n" * 40, encoding="utf-8")
    made = compresskit.trim(folder, text=tmp_path / "text.txt", coverage=0.9, output=tmp_path / "trimmed")
    before = BertTokenizer.from_pretrained(folder)
    for prompt in prompts.values():
        assert made.tokenizer.tokenize(prompt) == before.tokenize(prompt)
    assert "nice" not in made.tokenizer.get_vocab()
    task = tmp_path / "pairs.yaml"
    task.write_text(
        "version: 1\nname: pairs\ndescription: pairs\nkind: similarity\ninputs: [a, b]\nlabel: s\n"
        "files: {dev: pairs.tsv}\nmetrics: [pearson]\n"
    )
    rows = [("the film", "the actor", "1"), ("of the film", "the movie was", "3"), ("the", "the movie", "2")]
    write_tsv(tmp_path / "pairs.tsv", "a\tb\ts", rows)
    scores = [
        compresskit.evaluate(one, task=task, data=tmp_path, device="cpu").record["scores"]["dev"]["pearson"]
        for one in (folder, tmp_path / "trimmed")
    ]
    assert scores[0] == scores[1]


def test_text_is_counted_as_the_model_reads_it(bench_folder: Path, tmp_path: Path) -> None:
    """A folder may ask for lower case, whatever its tokenizer does by itself."""
    folder = sentence_folder(bench_folder / "model", tmp_path / "model", encoder={"do_lower_case": True})
    BertTokenizer(vocab=str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("THE FILM was Fine\n\nTHE Movie OF the ACTOR\n" * 40, encoding="utf-8")
    made = compresskit.trim(folder, text=tmp_path / "text.txt", coverage=1)
    words = {"the", "film", "was", "fine", "movie", "of", "actor"}
    assert words <= made.tokenizer.get_vocab().keys()
