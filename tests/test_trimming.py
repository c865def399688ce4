"""Trimmed vocabularies: the same outputs on text of kept tokens, for every kind of tokenizer; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from conftest import Run, outputs, refused, same, tiny_model, weights
from families import FAMILIES
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import compresskit
from compresskit import InputError
from compresskit.vocabulary.rows import vocabulary_rows, with_rows
from compresskit.vocabulary.tokenizer_file import TokenizerFile

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
DOCUMENTS = [part for name in sorted(topics)[:60] for part in topics[name].split("\n\n") if part.strip()][:400]
SIZE = 900


def _around(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )


def word_piece() -> Tokenizer:
    """BERT's: special tokens first, an unknown token among them."""
    made = Tokenizer(models.WordPiece(unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(DOCUMENTS, trainers.WordPieceTrainer(vocab_size=SIZE, special_tokens=SPECIAL))
    made.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    return made


def byte_bpe() -> Tokenizer:
    """RoBERTa's; the mask is only added, behind the vocabulary."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL[:4], initial_alphabet=alphabet)
    made.train_from_iterator(DOCUMENTS, trainer)
    made.add_special_tokens(["<mask>"])
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def suffix_bpe() -> Tokenizer:
    """BPE of characters where the last symbol of a word has a mark, as in the first GPT and in XLM."""
    made = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>", fuse_unk=True))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=SPECIAL, end_of_word_suffix="</w>")
    made.train_from_iterator(DOCUMENTS, trainer)
    _around(made)
    return made


def fallback_bpe() -> Tokenizer:
    """BPE as SentencePiece has it: what cannot be read is spelled in bytes."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(DOCUMENTS, trainers.BpeTrainer(vocab_size=SIZE, special_tokens=[*SPECIAL, *spelled]))
    data = json.loads(made.to_str())  # the bytes are tokens of the vocabulary, no added ones
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(data))
    _around(made)
    return made


def unigram() -> Tokenizer:
    """SentencePiece's unigram, as in XLM-RoBERTa."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.train_from_iterator(
        DOCUMENTS, trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=SPECIAL, unk_token="<unk>")
    )
    _around(made)
    return made


def word_level() -> Tokenizer:
    """Whole words."""
    made = Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(DOCUMENTS, trainers.WordLevelTrainer(vocab_size=SIZE, special_tokens=SPECIAL))
    _around(made)
    return made


KINDS: dict[str, Callable[[], Tokenizer]] = {
    kind.__name__: kind for kind in (word_piece, byte_bpe, suffix_bpe, fallback_bpe, unigram, word_level)
}


def _heads(name: str) -> list[str]:
    """The first head of a family, and that over the vocabulary."""
    heads = FAMILIES[name].heads()
    return [heads[0], *(["masked-lm"] if "masked-lm" in heads[1:] else [])]


class Whole(NamedTuple):
    """A checkpoint of one kind with the text to trim it on."""

    folder: Path
    text: Path
    tokenizer: Any
    model: Any


def _checkpoint(kind: str, root: Path, family: str = "roberta", head: str = "base") -> Whole:
    folder = root / kind
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>"}
    names |= {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), **names)
    # More rows than tokens, as many published tables have.
    model = tiny_model(
        family,
        head,
        vocab_size=len(tokenizer) + 7,
        max_position_embeddings=520,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = root / "text.txt"
    text.write_text("\n\n".join(DOCUMENTS[:200]) + "\n", encoding="utf-8")
    return Whole(folder, text, transformers.AutoTokenizer.from_pretrained(folder), model)


@pytest.fixture(scope="module", params=sorted(KINDS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return _checkpoint(request.param, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return _checkpoint("word_piece", tmp_path_factory.mktemp("pieces"))


def _kept_text(tokenizer: Any, kept: set[str], words: int = 400) -> list[str]:
    """Sentences of words that ``tokenizer`` reads in kept tokens alone."""
    found = [
        word
        for word in dict.fromkeys(" ".join(DOCUMENTS).split())
        if set(tokenizer.tokenize("a " + word)) <= kept and set(tokenizer.tokenize(word)) <= kept
    ][:words]
    return [" ".join(found[start : start + 12]) for start in range(0, len(found), 12)]


def _vectors(model: Any, tokenizer: Any, sentence: str) -> torch.Tensor:
    return outputs(model, torch.tensor([tokenizer(sentence)["input_ids"]]))


def test_text_of_kept_tokens_gives_the_same_outputs_bit_for_bit(whole: Whole, tmp_path: Path) -> None:
    made = compresskit.trim(whole.folder, text=whole.text, keep=600, output=tmp_path / "small")
    model = transformers.AutoModel.from_pretrained(tmp_path / "small").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "small")
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().num_embeddings <= 600
    kept = set(tokenizer.get_vocab())
    assert kept < set(whole.tokenizer.get_vocab())
    sentences = _kept_text(whole.tokenizer, kept)
    assert len(sentences) >= 5
    for sentence in [*sentences, "<mask> " + sentences[0]]:
        assert tokenizer.tokenize(sentence) == whole.tokenizer.tokenize(sentence)
        assert torch.equal(_vectors(model, tokenizer, sentence), _vectors(whole.model, whole.tokenizer, sentence))
        assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == whole.tokenizer.decode(
            whole.tokenizer(sentence)["input_ids"]
        )
    pair = {"text": sentences[0], "text_pair": sentences[1]}
    ours, theirs = tokenizer(**pair)["input_ids"], whole.tokenizer(**pair)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ours) == whole.tokenizer.convert_ids_to_tokens(theirs)
    assert made.record == json.loads((tmp_path / "small" / "trim.json").read_text())


def test_special_tokens_stay_and_keep_their_numbers(whole: Whole) -> None:
    made = compresskit.trim(whole.folder, text=whole.text, keep=600)
    for name in ("bos", "pad", "eos", "unk", "mask"):
        number = getattr(made.tokenizer, f"{name}_token_id")
        assert getattr(made.tokenizer, f"{name}_token") == getattr(whole.tokenizer, f"{name}_token")
        if getattr(whole.tokenizer, f"{name}_token_id") < made.record["tokens"]["after"] - 1:
            assert number == getattr(whole.tokenizer, f"{name}_token_id")
        assert number < made.record["tokens"]["after"]
    config = made.model.config
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id) == (0, 1, 2)
    assert made.tokenizer.get_vocab().keys() >= set(SPECIAL)


def test_what_is_not_kept_is_cut_into_other_tokens_or_unknown(whole: Whole) -> None:
    record = compresskit.trim(whole.folder, text=whole.text, keep=600).record
    found = record["held_out"]
    assert found["kept"] + found["re_split"] + found["unknown"] == pytest.approx(1)
    assert 0.5 < found["kept"] < 1
    assert 0.5 < record["coverage"] < 1
    kind = whole.folder.name
    assert (found["unknown"] > 0) == (kind == "word_level")
    assert (found["re_split"] > 0) == (kind != "word_level")
    assert (found["longer"] > 0) == (kind != "word_level")
    assert sum(record["reasons"].values()) == record["tokens"]["after"]


def test_bytes_spell_everything(tmp_path: Path) -> None:
    for kind in ("byte_bpe", "fallback_bpe"):
        whole = _checkpoint(kind, tmp_path / kind)
        tokenizer = compresskit.trim(whole.folder, text=whole.text, keep=350).tokenizer
        assert "<unk>" not in tokenizer.tokenize("żółć 漢字 \N{GRINNING FACE}")


def test_coverage_keeps_as_much_as_it_says(whole: Whole) -> None:
    sizes = []
    for share in (0.9, 0.99):
        record = compresskit.trim(whole.folder, text=whole.text, coverage=share).record
        assert record["coverage"] >= share
        assert record["asked"] == {"coverage": share}
        assert "unseen" not in record["reasons"]
        sizes.append(record["tokens"]["after"])
    assert sizes[0] < sizes[1]


def test_merges_stay_consistent(tmp_path: Path) -> None:
    for kind in ("byte_bpe", "suffix_bpe", "fallback_bpe"):
        whole = _checkpoint(kind, tmp_path)
        tokenizer = compresskit.trim(whole.folder, text=whole.text, keep=500).tokenizer
        before, after = (
            json.loads(reader.backend_tokenizer.to_str())["model"] for reader in (whole.tokenizer, tokenizer)
        )
        vocabulary = after["vocab"]
        wanted = [
            [left, right]
            for left, right in before["merges"]
            if left in vocabulary and right in vocabulary and left + right in vocabulary
        ]
        assert after["merges"] == wanted
        products = {left + right for left, right in wanted}
        made_by_merging = {left + right for left, right in before["merges"]}
        assert all(token in products for token in vocabulary if token in made_by_merging)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "xlm-roberta", "electra"])
def test_heads_over_the_vocabulary_are_cut_with_it(family: str, tmp_path: Path) -> None:
    whole = _checkpoint("word_piece", tmp_path, family, "masked-lm")
    made = compresskit.trim(whole.folder, text=whole.text, keep=500, output=tmp_path / "small")
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "small").eval()
    sentence = _kept_text(whole.tokenizer, set(made.tokenizer.get_vocab()))[0]
    kept = [whole.tokenizer.get_vocab()[token] for token in made.tokenizer.convert_ids_to_tokens(range(500))]
    wanted = _vectors(whole.model, whole.tokenizer, sentence)[..., kept]
    assert torch.allclose(_vectors(model, made.tokenizer, sentence), wanted, atol=1e-6)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(("name", "head"), [(name, head) for name in FAMILIES for head in _heads(name)])
def test_every_family_gives_the_same_outputs_with_fewer_rows(name: str, head: str) -> None:
    model, batch = FAMILIES[name].build(head), FAMILIES[name].batch(head)
    order = [*range(10), *range(10, vocabulary_rows(model), 2)]
    smaller = with_rows(model, order)
    places = batch["input_ids"] % len(order)
    with torch.no_grad():
        wanted = model(**batch | {"input_ids": torch.tensor(order)[places]})[0]
        found = smaller(**batch | {"input_ids": places})[0]
    if head == "masked-lm":
        assert torch.allclose(found, wanted[..., order], atol=1e-5)
    else:
        assert torch.equal(found, wanted)


def test_an_untied_decoder_is_cut_too(tmp_path: Path) -> None:
    whole = _checkpoint("word_piece", tmp_path, "bert", "masked-lm")
    config = whole.model.config
    config.tie_word_embeddings = False
    model = transformers.BertForMaskedLM(config).eval()
    model.save_pretrained(whole.folder)
    made = compresskit.trim(whole.folder, text=whole.text, keep=500)
    kept = [whole.tokenizer.get_vocab()[token] for token in made.tokenizer.convert_ids_to_tokens(range(500))]
    decoder = made.model.get_output_embeddings()
    assert torch.equal(decoder.weight, model.get_output_embeddings().weight[kept])
    assert torch.equal(decoder.bias, model.get_output_embeddings().bias[kept])


def test_the_files_that_name_numbers_follow(tmp_path: Path) -> None:
    whole = _checkpoint("byte_bpe", tmp_path)
    model = json.loads(whole.tokenizer.backend_tokenizer.to_str())["model"]
    (whole.folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (whole.folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    (whole.folder / "added_tokens.json").write_text(json.dumps({"<mask>": whole.tokenizer.mask_token_id}))
    settings = json.loads((whole.folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(whole.tokenizer.get_vocab()[token]): {"content": token, "special": True} for token in SPECIAL
    }
    (whole.folder / "tokenizer_config.json").write_text(json.dumps(settings))
    made = compresskit.trim(whole.folder, text=whole.text, keep=500, output=tmp_path / "small")
    small, numbers = tmp_path / "small", made.tokenizer.get_vocab()
    assert json.loads((small / "added_tokens.json").read_text()) == {"<mask>": numbers["<mask>"]}
    described = json.loads((small / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {entry["content"]: int(number) for number, entry in described.items()} == {t: numbers[t] for t in SPECIAL}
    vocabulary, merges = models.BPE.read_file(str(small / "vocab.json"), str(small / "merges.txt"))
    reader = Tokenizer(models.BPE(vocabulary, merges))
    reader.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert (
        reader.encode("an object is").ids
        == made.tokenizer.backend_tokenizer.encode("an object is", add_special_tokens=False).ids
    )


def test_the_same_text_gives_the_same_folder(pieces: Whole, tmp_path: Path) -> None:
    for name in ("one", "two"):
        compresskit.trim(pieces.folder, text=pieces.text, keep=500, output=tmp_path / name)
    assert same(tmp_path / "one", tmp_path / "two")
    for file in ("tokenizer.json", "trim.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_trimmed_model_can_be_trimmed_again(pieces: Whole, tmp_path: Path) -> None:
    first = compresskit.trim(pieces.folder, text=pieces.text, keep=700, output=tmp_path / "first")
    second = compresskit.trim(tmp_path / "first", text=pieces.text, keep=500, output=tmp_path / "second")
    at_once = compresskit.trim(pieces.folder, text=pieces.text, keep=500)
    assert second.record["earlier"] == first.record
    assert second.tokenizer.get_vocab() == at_once.tokenizer.get_vocab()
    assert all(torch.equal(t, weights(tmp_path / "second")[name]) for name, t in at_once.model.state_dict().items())


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


# --- before a compression ---------------------------------------------------------------------------------------------


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


# --- the command, and what it refuses ---------------------------------------------------------------------------------


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


def test_padding_that_positions_are_counted_from_keeps_its_number(tmp_path: Path) -> None:
    whole = _checkpoint("word_piece", tmp_path)
    data = json.loads(whole.tokenizer.backend_tokenizer.to_str())
    moved = {"<pad>": 600, next(t for t, n in data["model"]["vocab"].items() if n == 600): 1}
    data["model"]["vocab"] |= moved
    data["added_tokens"] = sorted(
        ({**t, "id": moved.get(t["content"], t["id"])} for t in data["added_tokens"]), key=lambda t: t["id"]
    )
    (whole.folder / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((whole.folder / "config.json").read_text())
    config |= {"pad_token_id": 600, "max_position_embeddings": 700}
    transformers.RobertaModel(transformers.RobertaConfig(**config)).save_pretrained(whole.folder)
    with pytest.raises(InputError, match="counts positions from the padding token's number 600"):
        compresskit.trim(whole.folder, text=whole.text, keep=300)
    assert compresskit.trim(whole.folder, text=whole.text, keep=650).model.config.pad_token_id == 600


# --- the embedded checkpoint ------------------------------------------------------------------------------------------


def test_the_embedded_checkpoint(embedded: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    made = compresskit.trim(text=text, keep=4000, output=tmp_path / "small")
    assert (tmp_path / "small" / "1_Pooling" / "config.json").is_file()
    whole = transformers.AutoTokenizer.from_pretrained(embedded)
    assert made.tokenizer.unk_token_id == whole.unk_token_id == 100
    sentences = _kept_text(whole, set(made.tokenizer.get_vocab()), 60)
    transformer = pytest.importorskip("sentence_transformers").SentenceTransformer
    ours, theirs = (transformer(str(place), device="cpu").encode(sentences) for place in (tmp_path / "small", embedded))
    assert (ours == theirs).all()
    lines = (tmp_path / "small" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines == made.tokenizer.convert_ids_to_tokens(range(4000))
