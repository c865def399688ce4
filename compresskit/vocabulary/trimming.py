"""Trim the vocabulary of a checkpoint: its tokenizer and its model keep the tokens that a text uses most."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedModel

from compresskit import __version__
from compresskit.data.corpus import Corpus, find_corpus
from compresskit.errors import InputError, WorkError
from compresskit.folders.card import CARD, trimmed_card
from compresskit.model import checkpoint as checkpoints
from compresskit.model import output as outputs
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.output import TRIM
from compresskit.model.sentence_vectors import SentenceModel, has_sentence_model, in_lower_case, prompts
from compresskit.model.targets import count_parameters
from compresskit.model.tokenizer import find_tokenizer, load_tokenizer
from compresskit.storage.files import file_hash
from compresskit.validation import read_json
from compresskit.vocabulary.choice import Asked, choose
from compresskit.vocabulary.counting import compare, count, plain_reader
from compresskit.vocabulary.record import BeforeAfter, HeldOutEntry, TrimRecord, earlier_record
from compresskit.vocabulary.rows import check_padding, named_tokens, vocabulary_rows, with_rows
from compresskit.vocabulary.tokenizer_file import TokenizerFile

_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Trimmed:
    """What :func:`trim` gives.

    Attributes:
        model: with the kept rows, an ordinary dense model of the same class.
        tokenizer: that belongs to it, as ``AutoTokenizer`` loads it.
        record: what ``trim.json`` holds.
        folder: where it was written; None without ``output``.
        notes: what the user should know.
    """

    model: PreTrainedModel
    tokenizer: Any
    record: dict[str, Any]
    folder: Path | None = None
    notes: tuple[str, ...] = ()


def trim(
    model: str | Path | None = None,
    *,
    text: str | Path | Corpus,
    keep: int | None = None,
    coverage: float | None = None,
    as_class: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> Trimmed:
    """Keep the tokens that a text uses most: a smaller word embedding (and decoder), and a tokenizer that fits it.

    Text that the original reads in kept tokens alone gives the same outputs, bit for bit. Special and added tokens are
    kept, and so is their number wherever there is still a row of it. The tokens of a sentence model's prompts are kept
    too, whether the text has them or not.

    Args:
        model: a dense checkpoint, a folder or a hub id, with a fast tokenizer of kind WordPiece, BPE, Unigram or
            WordLevel. Default: the embedded checkpoint.
        text: that the model will read: a file (.txt, .jsonl, also .gz), a folder of them or a data set of the hub; its
            first 20 million tokens are read. A fifth of its documents is held out.
        keep: how many tokens to keep, special ones among them.
        coverage: instead of ``keep``: as many as make up this share of the text's tokens. Default: 0.999.
        as_class: the class to read the model in, as for ``compresskit compress --as``. Default: the checkpoint's own.
        output: folder to write: an ordinary checkpoint with its tokenizer, ``trim.json`` and a model card.
        overwrite: replace a folder that compresskit wrote.

    Raises:
        InputError: a compressed model, no tokenizer or one that cannot be trimmed, a text that cannot be read or holds
            none of the model's tokens, ``keep`` above the vocabulary or below what is always needed, an output that
            exists.
        WorkError: the trimmed tokenizer would read text otherwise, or a file cannot be written.
    """
    asked = Asked(keep, coverage)
    corpus = find_corpus(text)
    target = None if output is None else Path(output)
    if target is not None:
        outputs.check_output(target, overwrite)
    read = checkpoints.read(model, as_class)
    made = trimmed(read, corpus, asked)
    if target is not None:
        with outputs.output_folder(target, overwrite) as temporary:
            checkpoints.save(made.checkpoint, temporary)
            sentences = has_sentence_model(temporary)
            card = trimmed_card(made.checkpoint, made.record.summary(), target.name, sentences=sentences)
            (temporary / CARD).write_text(card, encoding="utf-8")
    record = made.record.model_dump(mode="json")
    notes = (*read.notes, *corpus.notes)
    return Trimmed(made.checkpoint.model, load_tokenizer(made.checkpoint), record, target, notes)


@dataclass(frozen=True)
class TrimmedCheckpoint:
    """A checkpoint in memory whose vocabulary was trimmed, with the record of it."""

    checkpoint: Checkpoint
    record: TrimRecord


def trimmed(read: Checkpoint, corpus: Corpus, asked: Asked) -> TrimmedCheckpoint:
    """A checkpoint with a trimmed vocabulary; nothing is written. See :func:`trim`."""
    model, folder = read.model, read.folder
    if folder is None:
        raise InputError("a vocabulary is trimmed with its tokenizer: give the checkpoint's folder, not a model")
    rows = vocabulary_rows(model)
    own, how = find_tokenizer(None, read), SentenceModel(lower=in_lower_case(folder))
    tokenizer, reader = TokenizerFile(json.loads(_serialised(own))), _reader(how, own)
    asked.check(len(tokenizer.strings))
    if max(tokenizer.strings) >= rows:
        raise InputError(f"tokenizer: has a token of number {max(tokenizer.strings)}; the embedding has {rows} rows")
    counts = count(reader, tokenizer, corpus)
    pinned = tokenizer.always | (named_tokens(model) & tokenizer.strings.keys())
    choice = choose(tokenizer, counts.tokens, asked, pinned | _of_prompts(folder, tokenizer, reader))
    if len(choice.kept) == rows:
        raise InputError(f"text {corpus.name}: needs all {rows:,} tokens; ask for fewer with a number or a coverage")
    order = tokenizer.order(set(choice.kept), pinned)
    new = {old: number for number, old in enumerate(order)}
    check_padding(model, new)
    smaller = replace(
        read, model=with_rows(model, order), tokenizer_files=_files(folder, tokenizer, tokenizer.rebuilt(order))
    )
    after = _reloaded(smaller, how, {tokenizer.strings[old]: number for old, number in new.items()})
    held_out = compare(reader, after, new, tokenizer.vocabulary.unknown, corpus, counts)
    record = TrimRecord(
        model=read.origin,
        sha256=[file_hash(file) for file in checkpoints.weight_files(folder)],
        model_class=type(model).__name__,
        tokenizer=tokenizer.vocabulary.kind,
        text=corpus.record(),
        documents=counts.documents,
        asked={"coverage": asked.share} if asked.keep is None else {"keep": asked.keep},
        tokens=BeforeAfter(before=len(tokenizer.strings), after=len(order)),
        rows=BeforeAfter(before=rows, after=len(order)),
        parameters=BeforeAfter(before=count_parameters(model), after=count_parameters(smaller.model)),
        reasons=choice.reasons,
        coverage=choice.coverage,
        held_out=None if held_out is None else HeldOutEntry(**asdict(held_out)),
        versions={"compresskit": __version__} | {name: version(name) for name in ("tokenizers", "transformers")},
        earlier=earlier_record(folder),
    )
    files = {**(smaller.tokenizer_files or {}), TRIM: json.dumps(record.model_dump(mode="json"), indent=2) + "\n"}
    return TrimmedCheckpoint(replace(smaller, tokenizer_files=files), record)


def _serialised(tokenizer: Any) -> str:
    """The ``tokenizer.json`` of a tokenizer as it was loaded: a class may have changed what its file says.

    Raises:
        InputError: it has none, so that it cannot be trimmed.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        kind = type(tokenizer).__name__
        raise InputError(f"tokenizer: {kind} is none of the fast ones, so it has no {_TOKENIZER} that could be trimmed")
    try:
        text: str = backend.to_str()
    except Exception as error:  # the library raises plain ones
        raise InputError(f"tokenizer: cannot be written as {_TOKENIZER}: {error}") from None
    return text


def _files(folder: Path, tokenizer: TokenizerFile, data: dict[str, Any]) -> dict[str, str]:
    """The tokenizer files of a trimmed checkpoint by name: the settings of ``folder`` with new numbers, and the
    vocabulary in the forms in which it was there. SentencePiece's own file is left out, tokenizer.json holds it all.
    """
    new = {token["content"]: token["id"] for token in data["added_tokens"]}
    made = {_TOKENIZER: json.dumps(data, ensure_ascii=False)}
    for name, text in tokenizer.vocabulary.files(data["model"]).items():
        if (folder / name).is_file():
            made[name] = text
    for path in sorted(folder.iterdir()):
        if not (path.is_file() and path.name in checkpoints.SETTINGS_ONLY and path.name != TRIM):
            continue
        settings = read_json(path, "cannot be read")
        if path.name == "added_tokens.json":
            settings = {content: new[content] for content in settings if content in new}
        elif described := settings.get("added_tokens_decoder"):
            settings["added_tokens_decoder"] = {
                str(new[token["content"]]): token for token in described.values() if token["content"] in new
            }
        made[path.name] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return made


def _reader(how: SentenceModel, tokenizer: Any) -> Tokenizer:
    """What reads texts as the model gets them. Raises InputError as :func:`_serialised`."""
    _serialised(tokenizer)  # refused before it is asked to put texts in lower case
    return plain_reader(_serialised(how.tokenizer(tokenizer)))


def _of_prompts(folder: Path, tokenizer: TokenizerFile, reader: Tokenizer) -> set[int]:
    """The tokens of the prompts that the folder puts in front of texts, which no text has to hold."""
    found = {
        token for prompt in prompts(folder) for token in reader.encode(prompt, add_special_tokens=False).ids
    } & tokenizer.vocabulary.strings.keys()
    return found.union(*map(tokenizer.vocabulary.parts, found))


def _reloaded(checkpoint: Checkpoint, how: SentenceModel, wanted: dict[str, int]) -> Tokenizer:
    """The tokenizer of a trimmed checkpoint as ``AutoTokenizer`` loads it, for reading text.

    Raises:
        WorkError: it has other tokens than the kept ones, or other numbers.
    """
    loaded = load_tokenizer(checkpoint)
    if loaded.get_vocab() != wanted:
        found = loaded.get_vocab()
        wrong = min(string for string in {*found, *wanted} if found.get(string) != wanted.get(string))
        raise WorkError(
            f"tokenizer: its class {type(loaded).__name__} gives token {wrong!r} the number {found.get(wrong)} after "
            f"trimming, which should be {wanted.get(wrong)}"
        )
    return _reader(how, loaded)
