"""Students that learn their teacher's sentence vectors: the models as encoders, texts, and the vectors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from compresskit.errors import InputError, no_panic
from compresskit.model import identity
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.positions import check_length
from compresskit.model.sentence_vectors import SentenceModel
from compresskit.planning.stage import Stage
from compresskit.tasks.encoding import text_vectors
from compresskit.tasks.kind import Scoring
from compresskit.tasks.predicting import Progress
from compresskit.training.vectors import keep_vectors

#: Texts that are held out, to compare the student before and after.
HELD_OUT = 512
#: Column with the number of a row's text.
TEXT = "text_number"
#: What held-out texts are scored by, the primary metric first.
METRICS = ("similarity", "cosine")
_BATCH = 64


@dataclass(frozen=True)
class Encoder:
    """A model with all that makes sentence vectors of it.

    Attributes:
        checkpoint: the encoder, without a head.
        tokenizer: its own.
        how: pooling and what follows.
        max_length: tokens of a text.
    """

    checkpoint: Checkpoint
    tokenizer: Any
    how: SentenceModel
    max_length: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, tokenizer: Any, how: SentenceModel, max_length: int | None) -> Encoder:
        """With texts of ``max_length`` tokens, or of what the folder says. Raises InputError: the model takes less."""
        if max_length is not None:
            check_length(checkpoint.model, max_length)
        own = how.limit(checkpoint.model, tokenizer)
        return cls(checkpoint, tokenizer, how, own if max_length is None else min(own, max_length))

    def encode(self, texts: Sequence[str], *, half: bool = False) -> Tensor:
        """(N, D) vectors in float32; ``half``: computed under bf16 autocast."""
        model = self.checkpoint.model
        scoring = Scoring(model, self.tokenizer, self.max_length, _BATCH)
        with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=half):
            return text_vectors(scoring, self.how, texts).float()

    def tokens(self, texts: Sequence[str], source: str) -> dict[str, list[Any]]:
        """Columns of token sequences of the texts, with the prompt in front. Raises InputError."""
        own = self.how.tokenizer(self.tokenizer)
        with no_panic(f"text {source}, cut into tokens"):
            encoded = own([self.how.prompt + text for text in texts], truncation=True, max_length=self.max_length)
        return {name: encoded[name] for name in own.model_input_names if name in encoded and name != "attention_mask"}

    def identity(self) -> list[Any]:
        """What decides its vectors, as plain data."""
        return [
            identity.of_checkpoint(self.checkpoint),
            identity.of_tokenizer(self.tokenizer),
            repr(self.how),
            self.max_length,
            torch.__version__,
            transformers.__version__,
        ]


@dataclass(frozen=True)
class VectorsOfBatch:
    """Finds the vectors of student and teacher for a batch.

    Attributes:
        how: pooling of the student and what follows.
        prompt_tokens: tokens in front of every text that are not pooled.
        teacher: (N, D) vectors of the texts, memory-mapped.
    """

    how: SentenceModel
    prompt_tokens: int
    teacher: Tensor

    def pair(self, outputs: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors of student and teacher, each (B, D), of the rows that ``inputs[TEXT]`` names."""
        hidden = outputs.last_hidden_state
        ours = self.how.vectors(hidden, inputs["attention_mask"], self.prompt_tokens)
        return ours, self.teacher[inputs[TEXT].cpu()].to(hidden.device)


@dataclass(frozen=True)
class Sentences:
    """Texts, and the two encoders.

    Attributes:
        student, teacher: who learns from whom.
        texts: that are trained on, in the order of the rows.
        held_out: texts on which the two are compared.
        half: the teacher's vectors are computed in bf16.
        progress: called with (what, done, total).
    """

    student: Encoder
    teacher: Encoder
    texts: list[str]
    held_out: list[str]
    half: bool
    progress: Progress | None = None

    def check(self, stage: Stage) -> None:
        """Refuse vectors that cannot be compared. Raises InputError."""
        ours, theirs = (each.encode(self.held_out[:1]).shape[1] for each in (self.student, self.teacher))
        if ours != theirs and stage.losses.get("pooled"):
            raise InputError(
                f"teacher and student have sentence vectors of {theirs} and {ours} numbers: loss pooled cannot compare "
                "them; give --loss pooled=0, so that similarity alone teaches"
            )
        for size in stage.dims:
            if size >= ours:
                raise InputError(f"dims {size}: the student's vectors have {ours} numbers; give fewer")

    def rows(self, source: str) -> Dataset:
        """The texts as the student's token sequences. Raises InputError."""
        columns = self.student.tokens(self.texts, source)
        lengths = [len(ids) for ids in columns["input_ids"]]
        return Dataset.from_dict({**columns, "length": lengths, TEXT: range(len(self.texts))})

    def taught(self, folder: Path) -> VectorsOfBatch:
        """With the teacher's vectors of all texts, kept in ``folder``. Raises WorkError: see :func:`keep_vectors`."""
        run = partial(self.teacher.encode, half=self.half)
        vectors = keep_vectors(run, self.texts, folder, [*self.teacher.identity(), self.half], self.progress)
        how = self.student.how
        return VectorsOfBatch(how, how.prompt_tokens(how.tokenizer(self.student.tokenizer), _LONG), vectors)

    def measure(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """How near a model's vectors of the held-out texts come to the teacher's; the model is one of the two."""
        taught = model is self.teacher.checkpoint.model
        ours = self._teacher_vectors if taught else self.student.encode(self.held_out)
        return {"held_out": agreement(ours, self._teacher_vectors)}

    @cached_property
    def _teacher_vectors(self) -> Tensor:
        return self.teacher.encode(self.held_out)


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Two figures for vectors (N, D) and (N, D') of the same texts.

    ``similarity``: Spearman correlation of the cosines of all pairs of texts. ``cosine``: mean cosine of the two
    vectors of a text, where they are equally long.
    """
    upper = np.triu_indices(len(ours), 1)
    first, second = ((unit @ unit.T).numpy()[upper] for unit in map(_unit, (ours, theirs)))
    found = {"similarity": float(spearmanr(first, second).statistic)}
    if ours.shape == theirs.shape:
        found["cosine"] = float(functional.cosine_similarity(ours, theirs, dim=1).mean())
    return found


def _unit(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors.float().cpu(), dim=1)


#: Tokens beyond those of any prompt.
_LONG = 1 << 20
