"""A tag for every word of a text, such as names of people and places (NER)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import DataCollatorForTokenClassification, PreTrainedModel

from compresskit.errors import InputError, shown
from compresskit.model.classes import class_names, in_order, whole_number
from compresskit.model.tokenizer import is_fast
from compresskit.storage import files
from compresskit.storage.files import Rows
from compresskit.tasks import reports
from compresskit.tasks.answer import Answer, with_score
from compresskit.tasks.conll import read_sentences
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.label_column import found_labels, label_text, not_a_label
from compresskit.tasks.labels import check_teacher, map_labels
from compresskit.tasks.losses import IGNORED
from compresskit.tasks.registry import register
from compresskit.tasks.rows import Place, Split, TaskData
from compresskit.tasks.words import Words, entities

if TYPE_CHECKING:
    from datasets import Dataset

#: Endings of tables; every other file holds CoNLL columns.
_TABLES = (".jsonl", ".json", ".parquet")
#: What is outside of every entity.
OUTSIDE = "O"
#: Prefixes of the schemes IOB2 and IOBES; those of BILOU mean the same as E and S.
_PREFIXES, _BILOU = "BIES", {"L": "E", "U": "S"}
_ENTITY = ("entity_f1", "entity_precision", "entity_recall")


@register
class Tags(TaskKind):
    """Token classification. Inputs are lists of words, targets are lists of tags.

    The first token of a word carries its tag; other tokens are left out of losses and scores. Entities are scored by
    seqeval: an entity counts where its type and both ends are right.
    """

    name = "tags"
    summary = "a tag for every word (NER: CoNLL columns, or lists of tokens and tags)"
    head = "token-classification"
    metrics = (*_ENTITY, "accuracy")
    takes_labels = True
    lost_unit = "words"

    def check(self, task: Task) -> None:
        super().check(task)
        if len(task.inputs) != 1:
            raise InputError(f"kind {self.name} takes one input: the column of the words")
        if _entities(task):
            prefixes = {_parts(tag, "labels")[0] for tag in task.labels or ()}
            if prefixes & set(_BILOU) and prefixes & set(_BILOU.values()):
                raise InputError("labels: have tags of IOBES (E, S) as well as of BILOU (L, U); name one scheme's")

    def read(self, task: Task, path: Path) -> tuple[Rows, str | None]:
        if path.name.removesuffix(".gz").endswith(_TABLES):
            rows, _ = files.read_rows(path, needed=self.columns(task))
            notes: list[str] = []
        else:
            rows, notes = read_sentences(task, path)
        changed = sum(_respell(task, row, Place(path.name, number)) for number, row in enumerate(rows, start=1))
        if changed:
            notes.append(f"{changed} tags were rewritten: an entity begins with B or S")
        return rows, "; ".join(notes) or None

    def from_hub(self, task: Task, rows: Rows) -> Rows:
        """The hub has class numbers; they count in the order of the declaration."""
        values = list((task.labels or {}).values())
        for row in rows:
            tags = row.get(task.label)
            if isinstance(tags, list):
                row[task.label] = [values[t] if isinstance(t, int) and 0 <= t < len(values) else t for t in tags]
        return rows

    def labels(self, task: Task, rows: Iterable[tuple[Place, Mapping[str, Any]]]) -> tuple[str, ...]:
        """Declared, or found; of every type of entity that is found, all its tags."""
        if task.labels is not None:
            return tuple(task.labels)
        # What is no list is refused with its row by `target`.
        lists = ((place, tags) for place, row in rows if isinstance(tags := row.get(task.label), list))
        tags = found_labels(task.name, ((place, tag) for place, tags in lists for tag in tags))
        if not _entities(task):
            return in_order(tags)
        parts = [_parts(tag, str(place)) for tag, place in tags.items()]
        prefixes = sorted({"B", "I", *(prefix for prefix, _ in parts if prefix)})
        kinds = sorted({kind for prefix, kind in parts if prefix})
        return (OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in prefixes))

    def example(self, task: Task, row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
        words = row.get(task.inputs[0])
        if words == []:
            raise InputError(f"{where}: column {task.inputs[0]!r} holds no words ([]): leave the row out")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise InputError(f"{where}: column {task.inputs[0]!r} must hold a list of words, not {shown(words)}")
        return (words,)

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> list[str]:
        tags, words = row.get(task.label), row[task.inputs[0]]
        if not isinstance(tags, list):
            one = ', such as ["O", "B-x"] in JSON' if isinstance(tags, str) else ""
            raise InputError(f"{where}: column {task.label!r} must hold a list of tags{one}, not {shown(tags)}")
        if len(tags) != len(words):
            raise InputError(f"{where}: has {len(words)} words and {len(tags)} tags")
        texts = [label_text(tag) for tag in tags]
        for number, (tag, text) in enumerate(zip(tags, texts, strict=True), start=1):
            if text not in labels:
                raise not_a_label(tag, f"{where}, tag {number}", labels, "tag")
        return [labels[text] for text in texts if text is not None]

    def head_config(self, labels: Sequence[str]) -> dict[str, Any]:
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: number for number, label in enumerate(labels)},
        }

    def match(self, data: TaskData, model: PreTrainedModel) -> str | None:
        return map_labels(data.task, data.labels, model, data.sources).note

    def match_teacher(self, data: TaskData, student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
        return check_teacher(data, student, teacher)

    def windows(self, split: Split, tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """One sequence a row, cut on the tokenizer's side; ``word`` is of a word's first token its number, else -1."""
        if not is_fast(tokenizer):
            raise InputError(
                f"{type(tokenizer).__name__} is no fast tokenizer (tokenizer.json): it does not say to which word a "
                "token belongs, as tags need"
            )
        encoded = tokenizer([text for (text,) in self.sequences(split)], truncation=True, max_length=max_length)
        columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
        columns["word"] = []
        for row, (words,) in enumerate(split.texts):
            owners = [-1] * len(encoded["input_ids"][row])
            start = 0
            for number, word in enumerate(words):
                places = (encoded.char_to_token(row, place) for place in range(start, start + len(word)))
                first = next((place for place in places if place is not None), None)
                if first is not None and owners[first] == -1:
                    owners[first] = number
                start += len(word) + 1
            columns["word"].append(owners)
        return columns

    def sequences(self, split: Split) -> list[tuple[str, ...]]:
        """The words with a space between any two."""
        return [(" ".join(words),) for (words,) in split.texts]

    def class_numbers(self, data: TaskData, model: PreTrainedModel) -> dict[str, int]:
        return map_labels(data.task, data.labels, model, data.sources).single

    def numbered(
        self, data: TaskData, split: Split, columns: Mapping[str, list[Any]], model: PreTrainedModel
    ) -> dict[str, list[Any]]:
        numbers = map_labels(data.task, data.labels, model, data.sources).single
        rows = zip(split.targets, columns["word"], strict=True)
        return {"labels": [[numbers[tags[word]] if word >= 0 else IGNORED for word in words] for tags, words in rows]}

    def cut(self, split: Split, rows: Dataset, max_length: int) -> str | None:
        words = sum(len(words) for (words,) in split.texts)
        kept = sum(word >= 0 for row in rows["word"] for word in row)
        what = (
            f"{words - kept} of {words} words of {split.source} have no token of their own within {max_length} tokens"
        )
        return what if kept < words else None

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Mapping[str, Any]]:
        collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]] = DataCollatorForTokenClassification(tokenizer)
        return collate

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[list[str]]:
        """The most probable tag of every word. A word that was cut off is outside of every entity; where there is no
        such tag, it has none, which is wrong.
        """
        return [[tag for tag, _ in row] for row in self._tagged(scoring, data, split)]

    def _tagged(self, scoring: Scoring, data: TaskData, split: Split) -> list[list[tuple[str, float]]]:
        """The tag of every word with its probability; 0 for a word without a token."""
        found = map_labels(data.task, data.labels, scoring.model, data.sources)
        names = {number: name for name, number in found.single.items()}
        dataset, logits = self.logits(scoring, data, split)
        nothing = OUTSIDE if OUTSIDE in names.values() else ""
        answers = []
        for (words,), owners, scores in zip(split.texts, dataset["word"], logits["logits"], strict=True):
            tags = [(nothing, 0.0)] * len(words)
            for place, word in enumerate(owners):
                if word >= 0:
                    row = scores[place].astype(np.float64)
                    best = int(scores[place].argmax())
                    tags[word] = names[best], float(1 / np.exp(row - row[best]).sum())
            answers.append(tags)
        return answers

    def asked(self, task: Task, row: Mapping[str, Any], where: str) -> tuple[Any, ...]:
        """Words, or a text that is split into words; there may be none."""
        text = row.get(task.inputs[0])
        if text == []:
            return ([],)
        return (Words.of(text),) if isinstance(text, str) else self.example(task, row, where)

    def labels_of(self, task: Task, model: PreTrainedModel) -> tuple[str, ...]:
        return tuple(task.labels or class_names(model.config))

    def described(self, scoring: Scoring, data: TaskData, split: Split, most: int) -> list[Answer]:
        """Words and tags; where the tags are those of entities, the entities. Of a text the places of an entity are
        those of its characters, else they are numbers of words; the last one is not part of it.
        """
        scheme = all(_is_of_scheme(name) for name in map_labels(data.task, data.labels, scoring.model).numbers)
        found = []
        for (words,), tagged in zip(split.texts, self._tagged(scoring, data, split), strict=True):
            tags = [tag for tag, _ in tagged]
            told: dict[str, Any] = {"words": list(words), "tags": tags, "scores": [score for _, score in tagged]}
            if scheme:
                told["entities"] = entities(words, [(_spelt(tag, _BILOU), score) for tag, score in tagged])
                line = ", ".join(with_score(f"{one['text']} [{one['type']}]", one["score"]) for one in told["entities"])
                found.append(Answer(line or "no entity", told))
            else:
                found.append(Answer(" ".join(f"{word}/{tag}" for word, tag in zip(words, tags, strict=True)), told))
        return found

    def lost(self, scoring: Scoring, split: Split) -> list[int]:
        """Words behind the last one with a token of its own; before the first, where the tokenizer cuts in front."""
        longest, in_front = scoring.max_length, scoring.tokenizer.truncation_side == "left"
        found = []
        rows = zip(split.texts, self.windows(split, scoring.tokenizer, longest)["word"], strict=True)
        for (words,), owners in rows:
            read = [word for word in owners if word >= 0]
            if len(owners) < longest:
                found.append(0)
            elif in_front:
                found.append(min(read, default=len(words)))
            else:
                found.append(len(words) - 1 - max(read, default=-1))
        return found

    def measure(
        self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        from seqeval import metrics

        wanted, given = split.targets, [list(tags) for tags in answers]
        right = [ours == theirs for row in zip(wanted, given, strict=True) for ours, theirs in zip(*row, strict=True)]
        found = {"accuracy": float(np.mean(right))}
        if _entities(data.task):
            wanted, given = ([[_spelt(tag, _BILOU) for tag in tags] for tags in rows] for rows in (wanted, given))
            scores = (metrics.f1_score, metrics.precision_score, metrics.recall_score)
            found |= {name: float(f(wanted, given, zero_division=0)) for name, f in zip(_ENTITY, scores, strict=True)}
        return found

    def report(
        self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Sequence[str]]
    ) -> reports.Report:
        """By type of entity where entities are scored, and by tag."""
        wanted, given = ([tag for tags in rows for tag in tags] for rows in (split.targets, answers))
        others = sorted({*given} - {*data.labels, ""})  # tags of the model that these rows do not have
        by_tag = reports.of_classes(wanted, given, [*data.labels, *others])
        tables = {"by tag": by_tag.tables["by class"]}
        if _entities(data.task):
            spelt = ([[_spelt(tag, _BILOU) for tag in tags] for tags in rows] for rows in (split.targets, answers))
            tables = {**reports.of_entities(*spelt).tables, **tables}
        return reports.Report(tables, by_tag.classes, by_tag.confusion)


def _respell(task: Task, row: dict[str, Any], place: Place) -> int:
    """Repairs the tags of a row in place, in the scheme of the declared labels; returns how many have changed.

    Raises:
        InputError: a tag of no scheme.
    """
    tags = row.get(task.label)
    if not _entities(task) or not isinstance(tags, list):
        return 0
    names = {label_text(value): name for name, value in (task.labels or {}).items()}
    texts = [label_text(tag) for tag in tags]
    spelt = [names.get(text, text) for text in texts]
    if None in spelt:
        return 0  # refused with the place of the tag by `target`
    found = repaired([tag for tag in spelt if tag is not None], str(place))
    if any(name.startswith(tuple(f"{prefix}-" for prefix in _BILOU)) for name in names.values()):
        back = {ours: theirs for theirs, ours in _BILOU.items()}
        found = [_spelt(tag, back) for tag in found]
    row[task.label] = [(task.labels or {}).get(tag, tag) for tag in found]
    return sum(ours != theirs for ours, theirs in zip(found, spelt, strict=True))


def _spelt(tag: str, prefixes: Mapping[str, str]) -> str:
    """A tag with another prefix, where ``prefixes`` have its own; a word without a tag is outside of every entity."""
    if not tag:
        return OUTSIDE
    prefix, dash, kind = tag.partition("-")
    return f"{prefixes.get(prefix, prefix)}-{kind}" if dash else tag


def repaired(tags: Sequence[str], where: str) -> list[str]:
    """Tags of IOB1, IOB2, IOBES or BILOU in the spelling of IOB2 and IOBES: an entity always begins with B or S.

    Raises:
        InputError: a tag of no such scheme.
    """
    found: list[str] = []
    before: tuple[str, str] = ("", "")
    for tag in tags:
        prefix, kind = _parts(tag, where)
        prefix = _BILOU.get(prefix, prefix)
        inside = before[1] == kind and before[0] in ("B", "I")
        if prefix == "I" and not inside:
            prefix = "B"
        elif prefix == "E" and not inside:
            prefix = "S"
        found.append(f"{prefix}-{kind}" if prefix else OUTSIDE)
        before = (prefix, kind)
    return found


def _parts(tag: str, where: str) -> tuple[str, str]:
    """Prefix and type of a tag; both empty outside of entities. Raises InputError."""
    if tag == OUTSIDE:
        return "", ""
    prefix, dash, kind = tag.partition("-")
    if whole_number(tag) is not None:
        raise InputError(f"{where}: tag {tag} is a number: list the tags under labels (name: number)")
    if not dash or not kind or prefix not in (*_PREFIXES, *_BILOU):
        raise InputError(f"{where}: tag {tag!r} is neither O nor of the form B-TYPE (prefixes B, I, E, S, L, U)")
    return prefix, kind


def _is_of_scheme(tag: str) -> bool:
    try:
        _parts(tag, "")
    except InputError:
        return False
    return True


def _entities(task: Task) -> bool:
    return any(metric in _ENTITY for metric in task.metrics)
