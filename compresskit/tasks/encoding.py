"""Vectors of texts by a model, as sentence-transformers makes them, for the kinds that compare vectors."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedModel

from compresskit.errors import InputError, WorkError
from compresskit.model.inputs import fitted
from compresskit.model.kept import mode_kept
from compresskit.model.positions import positions
from compresskit.model.sentence_vectors import Role, SentenceModel, read_sentence_model, unsaid
from compresskit.model.tokenizer import MASK
from compresskit.tasks.answer import Answer
from compresskit.tasks.declaration import Task
from compresskit.tasks.kind import Scoring, TaskKind
from compresskit.tasks.rows import Split, TaskData


class OfVectors(TaskKind):
    """A kind that compares vectors of texts: it needs no head, and nothing can be trained on it."""

    head = None

    def length(self, task: Task, model: PreTrainedModel, tokenizer: Any, folder: Path | None) -> int:
        """As sentence-transformers: the folder's ``max_seq_length``, else what tokenizer and model take. What the
        declaration says counts where it is less.
        """
        limit = read_sentence_model(folder).limit(model, tokenizer)
        return min(limit, task.max_length) if "max_length" in task.model_fields_set else limit

    def dtype(self, model: PreTrainedModel, folder: Path | None) -> torch.dtype:
        """As sentence-transformers: what the model is stored in, unless the folder says otherwise."""
        return read_sentence_model(folder).dtype or model.dtype

    def described(self, scoring: Scoring, data: TaskData, split: Split, most: int) -> list[Answer]:
        """The vector of each text."""
        vectors = text_vectors(scoring, read_sentence_model(scoring.folder), [text for (text,) in split.texts])
        found = []
        for vector in vectors.tolist():
            beginning = ", ".join(f"{value:.3f}" for value in vector[:4])
            found.append(Answer(f"{len(vector)} numbers: {beginning}, ...", {"vector": vector}))
        return found

    def role(self, split: Split) -> Role:
        """What the texts of a split are, which decides the prompt in front of them."""
        return "text"

    def lost(self, scoring: Scoring, split: Split) -> list[int]:
        """Each text of a row is read by itself, with the prompt in front of it."""
        how = read_sentence_model(scoring.folder, self.role(split))
        tokenizer = how.tokenizer(scoring.tokenizer)
        rows = (tokenizer([how.prompt + text for text in texts], verbose=False) for texts in split.texts)
        return [sum(max(0, len(ids) - scoring.max_length) for ids in row["input_ids"]) for row in rows]

    def note(self, folder: Path | None) -> str | None:
        return unsaid(folder)


def text_vectors(scoring: Scoring, how: SentenceModel, texts: Sequence[str]) -> Tensor:
    """(N, size) vectors of texts in float32, as ``how`` makes them of the last hidden states.

    Batches are those of sentence-transformers, so that texts that are nearly equal get its last digits too.

    Raises:
        InputError: padding would move the positions of tokens; an export gives no hidden states.
        WorkError: a vector that is not finite, with its text.
    """
    base: Any = scoring.model.base_model
    run: Any = scoring.run or base
    tokenizer = how.tokenizer(scoring.tokenizer)
    if getattr(tokenizer, "padding_side", "right") == "left" and positions(base) is not None:
        raise InputError(
            f"tokenizer of {scoring.model.config.name_or_path or type(base).__name__}: pads on the left, where "
            f"{type(base).__name__} counts positions: a sentence would get another vector in another batch; set "
            "padding_side to right in its tokenizer_config.json"
        )
    if MASK not in tokenizer.model_input_names:
        raise InputError(
            f"tokenizer of {scoring.model.config.name_or_path or type(base).__name__}: does not say which tokens are "
            f"padding: a sentence would get another vector in another batch; add {MASK} to model_input_names in its "
            "tokenizer_config.json"
        )
    before = how.prompt_tokens(tokenizer, scoring.max_length)
    encoded = tokenizer([how.prompt + text for text in texts], truncation=True, max_length=scoring.max_length)
    cut = sum(len(ids) >= scoring.max_length for ids in encoded["input_ids"])
    if cut:
        scoring.notes.append(
            f"{cut} of {len(texts)} texts reach {scoring.max_length} tokens; what is longer was cut there"
        )
    taken = inspect.signature(base.forward).parameters
    columns = [name for name in encoded if name in taken]
    collate: Any = DataCollatorWithPadding(tokenizer)
    order = np.argsort([-len(text) for text in texts]).tolist()
    found: dict[int, Tensor] = {}
    with mode_kept(base), torch.inference_mode():
        base.eval()
        for start in range(0, len(order), scoring.batch_size):
            rows = order[start : start + scoring.batch_size]
            batch = collate([{name: encoded[name][row] for name in columns} for row in rows]).to(run.device)
            outputs = run(**fitted(base, batch))
            if "last_hidden_state" not in outputs:
                raise InputError("an export with a head gives no vectors of tokens: give the model that was exported")
            hidden = outputs["last_hidden_state"]
            vectors = how.vectors(hidden, batch["attention_mask"], before, hidden.dtype)
            found |= dict(zip(rows, vectors.cpu(), strict=True))
            if scoring.progress is not None:
                scoring.progress("encoding", min(start + scoring.batch_size, len(order)), len(order))
    whole = torch.stack([found[row] for row in range(len(texts))])
    bad = (~whole.isfinite().all(1)).nonzero().flatten().tolist()
    if bad:
        raise WorkError(
            f"{type(scoring.model).__name__}: the vectors of {len(bad)} of {len(texts)} texts are not finite (NaN or "
            f"infinite), so they have no score; the first one is that of {texts[bad[0]][:60]!r}"
        )
    return whole
