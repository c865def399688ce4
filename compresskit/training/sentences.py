"""Students that learn their teacher's sentence vectors: the models as encoders, texts, and the vectors of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from compresskit.errors import InputError, no_panic
from compresskit.model import identity, sentence
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.positions import check_length
from compresskit.model.sentence_vectors import SentenceModel, has_sentence_model
from compresskit.planning.stage import Stage
from compresskit.progress import Progress
from compresskit.tasks.encoding import text_vectors
from compresskit.tasks.kind import Scoring
from compresskit.tasks.metrics import OF_NUMBERS
from compresskit.training.alignment import teacher_inputs
from compresskit.training.projections import least_squares
from compresskit.training.vectors import keep_vectors

#: Texts that are held out, to compare the student before and after.
HELD_OUT = 512
#: Column with the number of a row's text.
TEXT = "text_number"
#: What held-out texts are scored by, the primary metric first.
METRICS = ("similarity", "cosine")
_BATCH = 64
#: Texts that a projection is fitted to before it is trained.
_FITTED = 2048


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

    @property
    def reading(self) -> tuple[Any, ...]:
        """How texts are read, beside the tokenizer: length, prompt, and case."""
        return self.max_length, self.how.prompt, self.how.include_prompt, self.how.lower

    @cached_property
    def prompt_tokens(self) -> int:
        """How many tokens in front of a text are not pooled."""
        return self.how.prompt_tokens(self.how.tokenizer(self.tokenizer), _LONG)

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
        teacher: (N, D) vectors of the texts, memory-mapped; or the teacher, which makes them of its hidden states,
            where it computes at every step anyway and reads the same tokens or has its own in the batch.
        projection: of the student's vectors to the length of the teacher's, trained with the student; None where they
            are equally long.
    """

    how: SentenceModel
    prompt_tokens: int
    teacher: Tensor | Encoder
    projection: nn.Linear | None = None

    def pair(self, outputs: Any, taught: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Vectors of student and teacher, each (B, D).

        Args:
            outputs, taught: of student and teacher; the teacher's may be None where its vectors are kept.
            inputs: the batch; ``inputs[TEXT]`` names the texts of its rows.
        """
        hidden, mask = outputs.last_hidden_state, inputs["attention_mask"]
        ours = self.how.vectors(hidden, mask, self.prompt_tokens)
        if self.projection is not None:
            ours = self.projection(ours)
        if isinstance(self.teacher, Encoder):
            seen = teacher_inputs(inputs).get("attention_mask", mask)
            with torch.no_grad():
                return ours, self.teacher.how.vectors(taught.last_hidden_state, seen, self.teacher.prompt_tokens)
        return ours, self.teacher[inputs[TEXT].cpu()].to(hidden.device)


@dataclass(frozen=True)
class Sentences:
    """Texts, and the two encoders.

    Attributes:
        student, teacher: who learns from whom.
        texts: that are trained on, in the order of the rows.
        held_out: texts on which the two are compared.
        half: the teacher's vectors are computed in bf16.
        projection: as of :class:`VectorsOfBatch`; it becomes a module of the output folder.
        by_words: the rows hold the teacher's own tokens too (:mod:`compresskit.training.alignment`).
        progress: called with (what, done, total).
    """

    student: Encoder
    teacher: Encoder
    texts: list[str]
    held_out: list[str]
    half: bool
    projection: nn.Linear | None = None
    by_words: bool = False
    progress: Progress | None = None

    @classmethod
    def of(
        cls,
        student: Encoder,
        teacher: Encoder,
        texts: list[str],
        held_out: list[str],
        stage: Stage,
        *,
        half: bool,
        by_words: bool,
        progress: Progress | None,
    ) -> Sentences:
        """With a projection where loss ``pooled`` compares vectors of different lengths. It begins as the one that
        brings the untrained student's vectors of some texts nearest to the teacher's.

        Raises:
            InputError: a prefix of ``stage.dims`` that is no shorter than the vector; several processes and a
                projection, whose gradients would not be shared.
        """
        ours, theirs = (each.encode(held_out[:1]).shape[1] for each in (student, teacher))
        projection = None
        if ours != theirs and stage.losses.get("pooled"):
            if PartialState().num_processes > 1:
                raise InputError(
                    f"teacher and student have sentence vectors of {theirs} and {ours} numbers, and the projection "
                    "between them is trained by one process alone; or give --loss pooled=0, so that similarity teaches"
                )
            projection = least_squares(*(each.encode(texts[:_FITTED]) for each in (student, teacher)))
        width = ours if projection is None else theirs
        for size in stage.dims:
            if size >= width:
                raise InputError(f"dims {size}: the student's vectors have {width} numbers; give fewer")
        return cls(student, teacher, texts, held_out, half, projection, by_words, progress)

    def rows(self, source: str) -> Dataset:
        """The texts as the student's token sequences. Raises InputError."""
        columns = self.student.tokens(self.texts, source)
        lengths = [len(ids) for ids in columns["input_ids"]]
        return Dataset.from_dict({**columns, "length": lengths, TEXT: range(len(self.texts))})

    def taught(self, folder: Path, *, at_every_step: bool) -> VectorsOfBatch:
        """With the teacher's vectors of all texts, kept in ``folder``; or with those of its outputs for each batch,
        where it computes ``at_every_step`` and reads what the student reads, or has its own tokens in the rows.

        Raises:
            WorkError: see :func:`keep_vectors`.
        """
        how, before = self.student.how, self.student.prompt_tokens
        if at_every_step and (self.by_words or self.same_tokens):
            return VectorsOfBatch(how, before, self.teacher, self.projection)
        run = partial(self.teacher.encode, half=self.half)
        vectors = keep_vectors(run, self.texts, folder, [*self.teacher.identity(), self.half], self.progress)
        return VectorsOfBatch(how, before, vectors, self.projection)

    @cached_property
    def same_tokens(self) -> bool:
        """Whether both models read the same tokens of a text, and leave the same ones out of the pooling."""
        first, second = ((identity.of_tokenizer(one.tokenizer), one.reading) for one in (self.student, self.teacher))
        return first == second

    def write_modules(self, folder: Path) -> None:
        """Say in the student's folder how its vectors are made, where its own files do not say all of it."""
        own, taught_by = self.student.checkpoint, self.teacher.checkpoint.folder
        if not has_sentence_model(folder) and taught_by is not None and has_sentence_model(taught_by):
            sentence.copy(taught_by, folder, getattr(own.model.config, "hidden_size", None))
        if self.projection is not None:
            whole = replace(self.student, how=replace(self.student.how, size=None)).encode(self.held_out[:1])
            sentence.append_linear(
                folder,
                self.projection.weight,
                width=whole.shape[1],
                normalised=_lengths_are_one(self._teacher_vectors),
                hidden_size=own.model.config.hidden_size,
            )

    def measure(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """How near a model's vectors of the held-out texts come to the teacher's; the model is one of the two."""
        taught = model is self.teacher.checkpoint.model
        ours = self._teacher_vectors if taught else self.student.encode(self.held_out)
        if self.projection is not None and not taught:
            with torch.inference_mode():
                ours = functional.linear(ours, self.projection.weight.cpu())
        return {"held_out": agreement(ours, self._teacher_vectors)}

    @cached_property
    def _teacher_vectors(self) -> Tensor:
        return self.teacher.encode(self.held_out)


def agreement(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Two figures for vectors (N, D) and (N, D') of the same texts.

    ``similarity``: Spearman correlation of the cosines of all pairs of texts; 0 where one pair alone, or cosines that
    are all alike, have none. ``cosine``: mean cosine of the two vectors of a text, where they are equally long.
    """
    upper = np.triu_indices(len(ours), 1)
    first, second = ((unit @ unit.T).numpy()[upper] for unit in map(_unit, (ours, theirs)))
    found = {"similarity": OF_NUMBERS["spearman"](first, second, 0)}
    if ours.shape == theirs.shape:
        found["cosine"] = float(functional.cosine_similarity(ours, theirs, dim=1).mean())
    return found


def _lengths_are_one(vectors: Tensor) -> bool:
    return bool((vectors.norm(dim=1) - 1).abs().max() < 1e-3)


def _unit(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors.float().cpu(), dim=1)


#: Tokens beyond those of any prompt.
_LONG = 1 << 20
