"""The tokenizer that belongs to a checkpoint."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.modeling_layers import GenericForSequenceClassification

from compresskit.errors import InputError, no_panic, one_line
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint

#: Shows what tokenizers of one vocabulary may do differently: case, accents, signs, white space, Chinese.
_PROBE = " The naïve Café, 3.5% don't  stop—\t東京 WORLD"
#: The column that says which tokens are no padding.
MASK = "attention_mask"


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer of a checkpoint's folder; None where it has none. Raises InputError if it cannot be loaded."""
    if checkpoint.tokenizer_files is not None:
        with tempfile.TemporaryDirectory() as place:
            checkpoints.write_tokenizer(checkpoint, Path(place))
            checkpoint.model.config.save_pretrained(place)  # may say which class the tokenizer is of
            return _load(Path(place), checkpoint.origin)
    # transformers makes an empty tokenizer where there are no files.
    if checkpoint.folder is None or not any(map(checkpoints.is_vocabulary, checkpoint.folder.iterdir())):
        return None
    return _load(checkpoint.folder, checkpoint.origin)


def _load(folder: Path, origin: str) -> Any:
    try:
        with no_panic("its files"):
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust library raises plain ones
        raise InputError(f"model {origin}: its tokenizer cannot be loaded: {one_line(error)}") from None


def find_tokenizer(given: Any, *owners: Checkpoint) -> Any:
    """The tokenizer for a run: the given one, else that of the first checkpoint that has one.

    Raises:
        InputError: there is none, it does not fit the embedding, or the checkpoints' tokenizers differ.
    """
    found = [(owner, load_tokenizer(owner)) for owner in owners] if given is None else []
    tokenizers = [(owner, tokenizer) for owner, tokenizer in found if tokenizer is not None]
    if given is None and not tokenizers:
        names = " and ".join(owner.origin for owner in owners)
        raise InputError(f"model {names}: has no tokenizer (no tokenizer.json or vocabulary in its folder)")
    chosen = given if given is not None else tokenizers[0][1]
    for owner, tokenizer in tokenizers[1:]:
        if not one_vocabulary(tokenizer, chosen):
            raise InputError(f"{tokenizers[0][0].origin} and {owner.origin} have different vocabularies")
        if not reads_alike(tokenizer, chosen):
            raise InputError(
                f"{tokenizers[0][0].origin} and {owner.origin} have one vocabulary, but their tokenizers read texts "
                "differently (case, accents, white space, special tokens or which end is cut): put the files of one "
                "tokenizer into both folders"
            )
    if getattr(chosen, "pad_token", None) is None:
        where = tokenizers[0][0].origin if tokenizers else type(chosen).__name__
        raise InputError(f"tokenizer of {where}: has no pad token to fill batches with; name one (pad_token)")
    for owner in owners:
        if owner.model.config.pad_token_id is None and isinstance(owner.model, GenericForSequenceClassification):
            raise InputError(
                f"model {owner.origin}: {type(owner.model).__name__} needs pad_token_id in its configuration"
            )
        embedding: Any = owner.model.get_input_embeddings()
        rows: int = embedding.num_embeddings
        if len(chosen) > rows:
            raise InputError(f"model {owner.origin}: the tokenizer has {len(chosen)} tokens, the embedding {rows}")
        token, number = max(chosen.get_vocab().items(), key=lambda pair: pair[1], default=("", 0))
        if number >= rows:  # numbers may have gaps
            raise InputError(
                f"model {owner.origin}: the tokenizer gives {token!r} the number {number}, the embedding has {rows} "
                "rows"
            )
    return chosen


def padding_for(model: Any, tokenizer: Any) -> Any:
    """A copy that pads where ``model`` may be padded, whatever the tokenizer's own side, which is made for another use.

    That is behind the tokens: positions, tags and answers are counted from the beginning of a row, and heads read its
    first token. A head that reads the last one (XLNet) takes padding in front. The copy always says which tokens are
    real (``attention_mask``), which FNet's own does not.
    """
    copied = copy.copy(tokenizer)
    summary = getattr(getattr(model, "sequence_summary", None), "summary_type", None)
    copied.padding_side = "left" if summary in ("last", "cls_index") else "right"
    copied.model_input_names = list(dict.fromkeys([*copied.model_input_names, MASK]))
    return copied


def split(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[list[int]]]:
    """The token sequences of every text, with special tokens and of at most ``max_length``: nothing is cut off.

    Raises:
        InputError: the tokenizer cannot split, and where its special tokens stand cannot be seen.
    """
    if not is_fast(tokenizer):
        return [_split(tokenizer, text, max_length) for text in texts]
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_overflowing_tokens=True)
    found: list[list[list[int]]] = [[] for _ in texts]
    for ids, owner in zip(encoded["input_ids"], encoded["overflow_to_sample_mapping"], strict=True):
        found[owner].append(ids)
    return found


def pieces(tokenizer: Any, text: str, max_length: int) -> list[tuple[str, int]]:
    """A text in pieces of at most ``max_length`` tokens, special ones among them, each with the number of its own
    tokens. It is cut where there is white space; where there is none in so many tokens, between any two of them.

    Args:
        tokenizer: a fast one.
        text: the pieces make up all of it.
        max_length: tokens, special ones among them.

    Raises:
        InputError: ``max_length`` leaves no room for a token.
    """
    special = tokenizer.num_special_tokens_to_add()
    room = max_length - special
    if room < 1:
        raise InputError(f"max length {max_length}: {type(tokenizer).__name__} puts {special} special tokens around it")
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans: list[tuple[int, int]] = read["offset_mapping"]
    found = []
    start = begin = 0
    while start < len(spans):
        end = min(start + room, len(spans))
        if end < len(spans):
            end = next((place for place in range(end, start, -1) if _is_gap(text, spans, place)), end)
        stop = spans[end - 1][1] if end < len(spans) else len(text)
        found.append((text[begin:stop], end - start))
        start, begin = end, max(begin, stop)
    return [(piece, tokens) for piece, tokens in found if piece.strip()]


def _is_gap(text: str, spans: Sequence[tuple[int, int]], place: int) -> bool:
    """Whether white space stands before a token, or begins it."""
    return any(map(str.isspace, text[spans[place - 1][1] : spans[place][0] + 1]))


def one_vocabulary(first: Any, second: Any) -> bool:
    """Whether two tokenizers have the same tokens with the same numbers."""
    return bool(first.get_vocab() == second.get_vocab())


def reads_alike(first: Any, second: Any) -> bool:
    """Whether two tokenizers of one vocabulary make the same tokens of a text and of a pair, as a probe shows."""
    if getattr(first, "truncation_side", None) != getattr(second, "truncation_side", None):
        return False
    try:
        return all(first(*texts)["input_ids"] == second(*texts)["input_ids"] for texts in ((_PROBE,), (_PROBE, _PROBE)))
    except Exception:  # some read words with their places on a page, and no text
        return True


def is_fast(tokenizer: Any) -> bool:
    """Whether the tokenizer can split texts and say from which characters a token is."""
    return bool(getattr(tokenizer, "is_fast", False))


def _split(tokenizer: Any, text: str, max_length: int) -> list[list[int]]:
    """The same for a tokenizer that cannot: its tokens without special ones are cut, and those are put around."""
    whole, inner = (
        list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]) for special in (True, False)
    )
    extra = len(whole) - len(inner)
    start = next((i for i in range(extra + 1) if whole[i : i + len(inner)] == inner), None)
    name = type(tokenizer).__name__
    if extra < 0 or start is None:
        raise InputError(f"{name} cannot split texts (it is no fast one), and its special tokens are not around a text")
    room = max_length - extra
    if room < 1:
        raise InputError(f"max length {max_length}: {name} puts {extra} special tokens around every text")
    before, behind = whole[:start], whole[start + len(inner) :]
    return [[*before, *inner[at : at + room], *behind] for at in range(0, max(len(inner), 1), room)]
