"""A small tokenizer of every kind, and a tiny checkpoint with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import transformers
from conftest import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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


class Whole(NamedTuple):
    """A checkpoint of one kind with the text to trim it on."""

    folder: Path
    text: Path
    tokenizer: Any
    model: Any


def checkpoint(kind: str, root: Path, family: str = "roberta", head: str = "base") -> Whole:
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
