"""Quality without labels: how close a student is to its teacher on held-out text, and what it still finds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from compresskit.data.corpus import Corpus
from compresskit.errors import InputError
from compresskit.model.depth import stretches
from compresskit.model.inputs import fitted
from compresskit.model.sentence_vectors import SentenceModel
from compresskit.model.tokenizer import split
from compresskit.training.projections import least_squares
from compresskit.training.sentences import METRICS, agreement

#: Tokens of a passage; passages of one document; about so many passages in all.
PASSAGE, PER_DOCUMENT, PASSAGES = 64, 12, 512
#: Passages whose hidden states are compared: those of all would not fit everywhere.
HIDDEN = 64
METRIC = "sentence similarity"
#: What counts where students learn vectors of sentences: what their training calls it too.
OF_VECTORS = METRICS[0]
_BATCH = 32


@dataclass(frozen=True)
class Passages:
    """Equally long pieces of held-out documents.

    Attributes:
        tokens: (N, T) token ids with special tokens; every passage is full.
        document: (N,) number of the document of each passage; every document has at least two.
    """

    tokens: Tensor
    document: np.ndarray

    @property
    def chance(self) -> float:
        """Share of the other passages that come from the same document: retrieval by guessing."""
        counts = np.bincount(self.document)[self.document]
        return float(np.mean((counts - 1) / (len(self.document) - 1)))

    def spread(self) -> Passages:
        """Evenly spread ones, as many as there are hidden states of."""
        chosen = np.linspace(0, len(self.tokens) - 1, min(HIDDEN, len(self.tokens))).round().astype(int)
        return Passages(self.tokens[chosen], self.document[chosen])


@dataclass(frozen=True)
class Encoded:
    """What a model makes of the passages.

    Attributes:
        hidden: hidden states of the first :data:`HIDDEN` passages, one (HIDDEN, T, H) tensor a layer, embeddings first;
            none of what gives its last ones alone.
        vectors: (N, H) mean over the tokens of the last layer, or what else the model's folder makes of them.
        alone: the last hidden states of the same passages, (HIDDEN, T, H), of what gives no others.
    """

    hidden: tuple[Tensor, ...]
    vectors: Tensor
    alone: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """The last hidden states of the first :data:`HIDDEN` passages."""
        return self.hidden[-1] if self.alone is None else self.alone


def find_passages(corpus: Corpus, tokenizer: Any, length: int = PASSAGE) -> Passages:
    """Passages of ``length`` tokens from documents that are long enough for two; of a long one evenly spread ones.

    Raises:
        InputError: there are fewer than two such documents.
    """
    pieces: list[list[int]] = []
    owners: list[int] = []
    number = 0
    documents = corpus.documents()
    while len(pieces) < PASSAGES and (batch := list(islice(documents, _BATCH))):
        for document in split(tokenizer, batch, length):
            if len(pieces) >= PASSAGES:
                break
            own = [ids for ids in document if len(ids) == length]
            if len(own) >= 2:
                spread = np.linspace(0, len(own) - 1, min(PER_DOCUMENT, len(own))).round().astype(int)
                pieces += [own[place] for place in spread]
                owners += [number] * len(spread)
                number += 1
    if number < 2:
        raise InputError(f"text {corpus.name}: holds too few documents of {2 * length} tokens to measure quality on")
    return Passages(torch.tensor(pieces), np.array(owners))


def encode(model: PreTrainedModel, tokenizer: Any, passages: Passages, how: SentenceModel | None = None) -> Encoded:
    """The passages through a model; ``how`` makes vectors of their last hidden states, in place of the mean."""
    base = model.base_model
    device = next(model.parameters()).device
    collate = DataCollatorWithPadding(tokenizer)
    hidden: list[list[Tensor]] = []
    vectors: list[Tensor] = []
    with torch.inference_mode():
        for batch in passages.tokens.split(_BATCH):
            inputs = collate([{"input_ids": row.tolist()} for row in batch])
            output = base(**fitted(base, {k: v.to(device) for k, v in inputs.items()}), output_hidden_states=True)
            vectors.append(_pooled(output.hidden_states[-1].float(), how).cpu())
            if len(hidden) * _BATCH < HIDDEN:
                hidden.append([state.float().cpu() for state in output.hidden_states])
    return Encoded(tuple(torch.cat(states) for states in zip(*hidden, strict=True)), torch.cat(vectors))


def encode_run(
    run: Callable[..., Mapping[str, Tensor]], tokenizer: Any, passages: Passages, how: SentenceModel | None = None
) -> Encoded:
    """The passages through what gives its last hidden states alone, such as an exported encoder, on the CPU."""
    collate = DataCollatorWithPadding(tokenizer)
    states: list[Tensor] = []
    vectors: list[Tensor] = []
    with torch.inference_mode():
        for batch in passages.tokens.split(_BATCH):
            inputs = collate([{"input_ids": row.tolist()} for row in batch])
            last = run(**fitted(run, inputs))["last_hidden_state"]
            vectors.append(_pooled(last, how))
            if len(states) * _BATCH < HIDDEN:
                states.append(last)
    return Encoded((), torch.cat(vectors), torch.cat(states))


def _pooled(hidden: Tensor, how: SentenceModel | None) -> Tensor:
    """(B, T, H) last hidden states of passages, none of which is padded -> (B, D) vectors."""
    if how is None:
        return hidden.mean(1)
    return how.vectors(hidden, torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device))


def closeness(
    student: Encoded,
    teacher: Encoded,
    passages: Passages,
    others: tuple[Encoded, Encoded] | None = None,
    *,
    of_vectors: bool = False,
) -> dict[str, float]:
    """Figures for a student; ``hidden error`` is missing where only its last hidden states are known.

    ``sentence similarity``: mean over the passages of cos(v, v'), v and v' the sentence vectors of teacher and student,
    both without the mean over all passages, so that a constant vector scores 0. ``hidden error``: ||H - H'||_F /
    ||H||_F over the layers that both have, H without its mean. ``retrieval``: share of passages whose nearest other
    passage (cosine) comes from the same document.

    Args:
        others: what student and teacher make of other passages, where they are not equally wide. All but retrieval and
            ``similarity`` then compares what linear maps make of the student's states, those that fit best on the other
            passages.
        of_vectors: the student learned vectors: ``similarity`` and ``cosine``, see
            :func:`compresskit.training.sentences.agreement`, stand in the place of ``sentence similarity``.
    """
    compared = student if others is None else _as_wide(student, *others)
    if of_vectors:
        found = agreement(student.vectors, teacher.vectors)
    else:
        ours, theirs = (vectors - vectors.mean(0) for vectors in (compared.vectors, teacher.vectors))
        found = {METRIC: float(torch.cosine_similarity(ours, theirs).mean())}
    if student.hidden:
        found["hidden error"] = _hidden_error(compared.hidden, teacher.hidden)
    return found | {"retrieval": retrieval(student.vectors, passages.document)}


def _as_wide(student: Encoded, ours: Encoded, theirs: Encoded) -> Encoded:
    """What maps make of the student's states that bring ``ours`` nearest to ``theirs``, token by token."""

    def mapped(wanted: Tensor, known: Tensor, *states: Tensor) -> list[Tensor]:
        linear = least_squares(known.flatten(0, -2), wanted.flatten(0, -2))
        with torch.inference_mode():
            return [linear(state) for state in states]

    (vectors,) = mapped(theirs.last, ours.last, student.vectors)
    if not student.hidden:
        return Encoded((), vectors)
    wanted = [theirs.hidden[0], *_learnt_from(len(ours.hidden), theirs.hidden)]
    layers = [mapped(*each)[0] for each in zip(wanted, ours.hidden, student.hidden, strict=True)]
    return Encoded(tuple(layers), vectors)


def _learnt_from(count: int, teacher: Sequence[Tensor]) -> list[Tensor]:
    """The teacher's states that the layers of a student learn from that has ``count`` states, embeddings among them."""
    return [teacher[1 + stretch[-1]] for stretch in stretches(len(teacher) - 1, count - 1)]


def _hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> float:
    residual = total = 0.0
    for ours, theirs in zip(student[1:], _learnt_from(len(student), teacher), strict=True):
        residual += float((ours - theirs).square().sum())
        total += float((theirs - theirs.mean((0, 1))).square().sum())
    return float((residual / total) ** 0.5)


def retrieval(vectors: Tensor, document: Sequence[int] | np.ndarray) -> float:
    """Share of rows of ``vectors`` (N, H) whose nearest other row, by cosine, has the same document number."""
    unit = torch.nn.functional.normalize(vectors, dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-2.0)
    nearest = similarity.argmax(1).numpy()
    owners = np.asarray(document)
    return float(np.mean(owners[nearest] == owners))
