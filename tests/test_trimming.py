"""Trimmed vocabularies: the same outputs on text of kept tokens, for every kind of tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import outputs, same, weights
from families import FAMILIES
from tokenizers import Tokenizer, models, pre_tokenizers
from vocabularies import DOCUMENTS, KINDS, SPECIAL, Whole, checkpoint

import compresskit
from compresskit import InputError
from compresskit.vocabulary.rows import vocabulary_rows, with_rows


def _heads(name: str) -> list[str]:
    """The first head of a family, and that over the vocabulary."""
    heads = FAMILIES[name].heads()
    return [heads[0], *(["masked-lm"] if "masked-lm" in heads[1:] else [])]


@pytest.fixture(scope="module", params=sorted(KINDS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return checkpoint(request.param, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return checkpoint("word_piece", tmp_path_factory.mktemp("pieces"))


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
        whole = checkpoint(kind, tmp_path / kind)
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
        whole = checkpoint(kind, tmp_path)
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
    whole = checkpoint("word_piece", tmp_path, family, "masked-lm")
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
    whole = checkpoint("word_piece", tmp_path, "bert", "masked-lm")
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
    whole = checkpoint("byte_bpe", tmp_path)
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


def test_padding_that_positions_are_counted_from_keeps_its_number(tmp_path: Path) -> None:
    whole = checkpoint("word_piece", tmp_path)
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
