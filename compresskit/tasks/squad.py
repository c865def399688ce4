"""SQuAD: reading its JSON, windows with a stride, the best span, and the official scores."""

from __future__ import annotations

import collections
import json
import re
import string
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from compresskit.errors import InputError, one_line, shown
from compresskit.model.tokenizer import is_fast
from compresskit.storage.files import open_text

#: Spans longer than this many tokens are not answers (as in BERT's own evaluation).
MAX_ANSWER_TOKENS = 30
#: Longer questions are cut (likewise).
MAX_QUESTION = 64
#: Starts and ends that are paired with each other per window.
_BEST = 20
_BEGINNING = re.compile(r'\s*\{\s*("version"\s*:\s*"[^"]*"\s*,\s*)?"data"\s*:\s*\[')


@dataclass(frozen=True)
class Answers:
    """The accepted answers to a question.

    Attributes:
        texts: the answers; none where the question has no answer.
        starts: where each starts in the context.
        optional: whether the file is one in which questions may have no answer (SQuAD 2.0), which has scores of its
            own.
    """

    texts: tuple[str, ...]
    starts: tuple[int, ...]
    optional: bool = False

    @classmethod
    def of(cls, row: Mapping[str, Any], where: str = "row") -> Answers:
        """From a row of :func:`read_rows` or of the hub's data set.

        Raises:
            InputError: answers of another form, or beyond the context.
        """
        answers = row.get("answers")
        texts, starts = (
            answers.get(name) if isinstance(answers, Mapping) else None for name in ("text", "answer_start")
        )
        if (
            not isinstance(texts, list | tuple)
            or not isinstance(starts, list | tuple)
            or len(texts) != len(starts)
            or not all(isinstance(text, str) for text in texts)
            or not all(isinstance(start, int) and not isinstance(start, bool) and start >= 0 for start in starts)
        ):
            raise InputError(
                f"{where}: answers must be texts, each with the number of its first character (answer_start), "
                f"not {shown(answers)}"
            )
        context = row.get("context")
        for text, start in zip(texts, starts, strict=True):
            if isinstance(context, str) and start + len(text) > len(context):
                raise InputError(
                    f"{where}: the answer {text[:50]!r} at character {start} reaches beyond the context, which has "
                    f"{len(context)}"
                )
        return cls(tuple(texts), tuple(starts), bool(row.get("optional")))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows (question, context, answers) of a file in SQuAD's own JSON format, as the hub's data set has them.

    Raises:
        InputError: not JSON, or of another form.
    """
    try:
        with open_text(path) as stream:
            data = json.load(stream)
        rows = []
        second = str(data.get("version", "")).lstrip("vV").startswith("2")
        for article in data["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = [] if question.get("is_impossible") else question["answers"]
                    rows.append(
                        {
                            "question": question["question"],
                            "context": paragraph["context"],
                            "answers": {
                                "text": [answer["text"] for answer in answers],
                                "answer_start": [answer["answer_start"] for answer in answers],
                            },
                            "optional": second or "is_impossible" in question,
                        }
                    )
    except (OSError, ValueError, RecursionError, EOFError, zlib.error) as error:
        raise InputError(f"data {path}: not valid JSON: {one_line(error)}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"data {path}: not in SQuAD's format: {type(error).__name__} {error}") from None
    if not rows:
        raise InputError(f"data {path}: holds no questions")
    return rows


def is_squad(path: Path) -> bool:
    """Whether a file begins as one in SQuAD's own JSON format does, and not as rows do. Raises InputError."""
    if ".json" not in path.suffixes:
        return False
    try:
        with open_text(path) as stream:
            return _BEGINNING.match(stream.read(1000)) is not None
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise InputError(f"data {path}: cannot be read: {one_line(error)}") from None


def windows(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], answers: Sequence[Answers], max_length: int, stride: int
) -> dict[str, list[Any]]:
    """Overlapping windows of question + context.

    Args:
        stride: tokens of the context that two windows share; fewer where the questions leave no room for so many.

    Returns:
        Columns: the tokenizer's own, ``start_positions`` and ``end_positions`` (those of the [CLS] token where the
        window lacks the answer), ``example`` (row number), ``offsets`` (character span of each context token, else
        None) and ``none`` (the place of the [CLS] token: the last one in XLNet).

    Raises:
        InputError: the tokenizer is no fast one; ``max_length`` leaves no room for a token of the context.
    """
    if not is_fast(tokenizer):
        raise InputError(
            f"{type(tokenizer).__name__} is no fast tokenizer (tokenizer.json): it does not say where in a text its "
            "tokens stand, as answers need"
        )
    limit = min(MAX_QUESTION, max_length // 2)
    questions = [question for question, _ in _short_questions(tokenizer, texts, limit)]
    longest = max(map(len, tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]))
    room = max_length - longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise InputError(
            f"max length {max_length}: leaves no room for the context beside a question of {longest} tokens; "
            f"{max_length - room + 1} are the least"
        )
    encoded = tokenizer(
        questions,
        [context for _, context in texts],
        truncation="only_second",
        max_length=max_length,
        stride=min(stride, room - 1),  # the library panics at more
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    columns: dict[str, list[Any]] = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
    columns |= {"start_positions": [], "end_positions": [], "example": [], "offsets": [], "none": []}
    for window, example in enumerate(encoded["overflow_to_sample_mapping"]):
        sequence = encoded.sequence_ids(window)
        spans = zip(encoded["offset_mapping"][window], sequence, strict=True)
        offsets = [span if owner == 1 else None for span, owner in spans]
        none = _none_place(tokenizer, encoded["input_ids"][window])
        start, end = _token_span(offsets, answers[example]) or (none, none)
        columns["none"].append(none)
        columns["start_positions"].append(start)
        columns["end_positions"].append(end)
        columns["example"].append(example)
        columns["offsets"].append(offsets)
    return columns


def lost_of_questions(tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int) -> list[int]:
    """How many tokens of each question :func:`windows` leaves out."""
    return [lost for _, lost in _short_questions(tokenizer, texts, min(MAX_QUESTION, max_length // 2))]


def _short_questions(tokenizer: Any, texts: Sequence[tuple[str, ...]], limit: int) -> list[tuple[str, int]]:
    """The questions, cut after ``limit`` tokens as the context needs the room, and how many tokens that cost."""
    questions = [question.strip() for question, _ in texts]
    found = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = found["offset_mapping"]
    return [
        (q, 0) if len(s) <= limit else (q[: s[limit - 1][1]], len(s) - limit)
        for q, s in zip(questions, spans, strict=True)
    ]


def _none_place(tokenizer: Any, ids: Sequence[int]) -> int:
    """The token that stands for no answer: [CLS], else the one that begins a text, else the first."""
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None and token in ids:
            return list(ids).index(token)
    return 0


def _token_span(offsets: Sequence[tuple[int, int] | None], answers: Answers) -> tuple[int, int] | None:
    """The first token of the answer and its last; None where the window lacks it, or there is none."""
    if not answers.texts:
        return None
    first, last = answers.starts[0], answers.starts[0] + len(answers.texts[0])
    inside = [i for i, span in enumerate(offsets) if span is not None and span[0] < last and span[1] > first]
    if not inside or offsets[inside[0]][0] > first or offsets[inside[-1]][1] < last:  # type: ignore[index]
        return None
    return inside[0], inside[-1]


@dataclass(frozen=True)
class Span:
    """The best span of a context, over all windows.

    Attributes:
        text: what it says; empty where no window has a span.
        start, end: its characters in the context.
        score: the sum of its two logits.
        none: the same sum of the [CLS] token, which stands for no answer; the least one of the windows.
        probability: of start times end in its window.
        no_answer: the same of the [CLS] token in that window.
    """

    text: str = ""
    start: int = 0
    end: int = 0
    score: float = -np.inf
    none: float = np.inf
    probability: float = 0.0
    no_answer: float = 1.0


def best_answers(
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    columns: dict[str, list[Any]],
    texts: Sequence[tuple[str, ...]],
    *,
    allow_none: bool,
) -> list[str]:
    """The best span of each question over its windows, as text; empty where no answer scores higher, if allowed."""
    spans = best_spans(start_logits, end_logits, columns, texts)
    return ["" if allow_none and span.none > span.score else span.text for span in spans]


def best_spans(
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    columns: dict[str, list[Any]],
    texts: Sequence[tuple[str, ...]],
) -> list[Span]:
    """The best span of each question over its windows.

    Args:
        start_logits, end_logits: of each window, (tokens,) or more.
        columns: ``example``, ``offsets`` and ``none`` of :func:`windows`.
        texts: question and context of each example.
    """
    best: dict[int, Span] = {}
    none: dict[int, float] = {}
    for window, example in enumerate(columns["example"]):
        offsets = columns["offsets"][window]
        start, end = start_logits[window][: len(offsets)], end_logits[window][: len(offsets)]
        place = columns["none"][window]
        nothing = float(start[place] + end[place])
        none[example] = min(none.get(example, np.inf), nothing)
        context = texts[example][1]
        valid = np.array([span is not None for span in offsets])
        starts = [i for i in np.argsort(-start, kind="stable")[:_BEST] if valid[i]]
        ends = [i for i in np.argsort(-end, kind="stable")[:_BEST] if valid[i]]
        whole = float(np.logaddexp.reduce(start.astype(float)) + np.logaddexp.reduce(end.astype(float)))
        for i in starts:
            for j in ends:
                if i <= j < i + MAX_ANSWER_TOKENS:
                    score = float(start[i] + end[j])
                    if example not in best or score > best[example].score:
                        first, last = offsets[i][0], offsets[j][1]
                        probability, no_answer = np.exp(score - whole), np.exp(nothing - whole)
                        best[example] = Span(
                            context[first:last], first, last, score, 0.0, float(probability), float(no_answer)
                        )
    return [replace(best.get(example, Span()), none=none[example]) for example in range(len(texts))]


def scores(predictions: Sequence[str], answers: Sequence[Answers], *, optional: bool | None = None) -> dict[str, float]:
    """``span_f1`` and ``exact_match`` by the official scripts: best over the accepted answers, mean over questions.

    The scripts differ in texts of which nothing is left once articles and punctuation are gone. That of SQuAD 1.1 gives
    them no F1. That of 2.0, for files whose questions may have no answer, takes such an accepted answer as none, and
    gives F1 where answer and prediction are both nothing.

    Args:
        optional: whether these are of such a file. Default: where one of them says so.
    """
    optional = may_lack_answers(answers) if optional is None else optional
    f1, exact = [], []
    for prediction, accepted in zip(predictions, answers, strict=True):
        texts = [text for text in accepted.texts if normalise(text)] if optional else list(accepted.texts)
        f1.append(max(_f1(prediction, text, optional) for text in texts or [""]))
        exact.append(max(float(normalise(prediction) == normalise(text)) for text in texts or [""]))
    return {"span_f1": float(np.mean(f1)), "exact_match": float(np.mean(exact))}


def may_lack_answers(answers: Sequence[Answers]) -> bool:
    """Whether these are questions of which some may have no answer (SQuAD 2.0)."""
    return any(one.optional or not one.texts for one in answers)


def normalise(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def _f1(prediction: str, answer: str, optional: bool) -> float:
    given, wanted = normalise(prediction).split(), normalise(answer).split()
    if optional and (not given or not wanted):
        return float(given == wanted)
    common = sum((collections.Counter(given) & collections.Counter(wanted)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
