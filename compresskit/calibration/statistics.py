"""Second moments of the targets' inputs, how often each token occurs, and what a task's predictions depend on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.calibration import sensitivity
from compresskit.calibration.moments import Moments
from compresskit.calibration.tokens import RealTokens
from compresskit.data import corpus as corpora
from compresskit.data.corpus import Corpus
from compresskit.decomposers import Target, exact_products
from compresskit.errors import InputError
from compresskit.model.inputs import fitted
from compresskit.model.kept import mode_kept
from compresskit.model.positions import positions
from compresskit.model.sources import check_weights
from compresskit.model.targets import find_targets, users
from compresskit.progress import Progress
from compresskit.tasks.registry import KINDS
from compresskit.tasks.rows import TRAIN, TaskData

#: Tokens that are read where nobody says: a second moment of 3072 columns needs some tens of thousands.
TOKENS = 65_536
#: Tokens in a sequence, and sequences in a batch.
_LENGTH, _BATCH = 128, 16


class Calibration:
    """The :class:`~compresskit.decomposers.Statistics` of one model on one text or task.

    Memory: one (n, n) float32 matrix for every different input; query, key and value of a layer share theirs. Weighing
    takes a float32 copy of the model while it lasts.

    Attributes:
        tokens: how many were read, padding not counted.
        text: which text it was, as plain data; of a task its name and the file of its training rows.
        notes: what the user should know.
    """

    def __init__(self, text: dict[str, Any]) -> None:
        self.tokens = 0
        self.text = text
        self.notes: tuple[str, ...] = ()
        self._moments: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._sensitivities: dict[str, float] = {}

    def second_moment(self, target: Target) -> Tensor | None:
        """X^T X of a linear's input over all tokens, (n, n) float32; None if the layer never ran."""
        return self._moments.get(target.name)

    def token_counts(self, target: Target) -> Tensor | None:
        """How often each row of an embedding was looked up, (m,) float32; None if it never was."""
        return self._counts.get(target.name)

    def sensitivity(self, target: Target) -> float | None:
        """What an error of the target's output costs in predictions, as a multiple of the mean over targets; None where
        it was not asked for, or there are no predictions. See :mod:`~compresskit.calibration.sensitivity`.
        """
        return self._sensitivities.get(target.name)

    def record(self) -> dict[str, Any]:
        """What was read, as plain data."""
        weighed = {"weighed_by": "predictions"} if self._sensitivities else {}
        return {"text": self.text, "tokens": self.tokens, **weighed}


@exact_products  # moments of a caller's 16 bits would be coarse
def calibrate(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Corpus | TaskData,
    tokens: int = TOKENS,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    *,
    weigh: bool = False,
    untrained: Sequence[str] = (),
) -> Calibration:
    """Read about ``tokens`` tokens with the dense model and watch what its matrices see.

    Args:
        model: dense; its weights and mode are left as they are.
        tokenizer: the model's own.
        text: what to read: a text from its beginning, or a task's training rows as the model gets them (pairs as
            pairs), in a random order that is always the same.
        tokens: about how many; whole sequences are read.
        progress: called with (what, done, total) after each batch.
        weigh: also find how much predictions depend on each matrix, where ``text`` is a task, from fewer of its tokens;
            of a model without a trained head for it a note says that this cannot be.
        untrained: names of tensors that were initialised at random.

    Raises:
        InputError: unreadable or empty text, a text on which the model computes NaN, a model without weights.
    """
    check_weights(model)
    if isinstance(text, TaskData):
        name, record = f"task {text.task.name}", _task_record(text)
    else:
        name, record = f"text {text.name}", text.record()
    found, batches = Calibration(record), sample(model, tokenizer, text, tokens)
    _watch(model, batches, found, progress, every_table=isinstance(text, TaskData))
    for target, moment in found._moments.items():
        if not torch.isfinite(moment).all():
            raise InputError(f"calibration: the inputs of {target} hold NaN or infinity on {name}")
    if weigh and isinstance(text, TaskData):
        try:
            sensitivity.check_predicts(model, text, untrained)
            size = sensitivity.BATCH_TOKENS // _length(model, text)
            rows = sample(model, tokenizer, text, min(tokens, sensitivity.TOKENS), size)
            found._sensitivities = sensitivity.sensitivities(model, rows, progress)
        except sensitivity.NoPredictionsError as error:
            found.notes = (f"matrices are not weighed by predictions: {error}",)
    return found


def sample(
    model: PreTrainedModel, tokenizer: Any, text: Corpus | TaskData, tokens: int, size: int = _BATCH
) -> list[dict[str, Tensor]]:
    """What a calibration reads, in batches of at most ``size`` equally long sequences or 1; arguments as of
    :func:`calibrate`. Raises InputError.
    """
    length = _length(model, text)
    if isinstance(text, TaskData):
        return _task_batches(text, tokenizer, tokens, length, size)
    return corpora.batches(text, tokenizer, tokens, length, size)


def _length(model: PreTrainedModel, text: Corpus | TaskData) -> int:
    """Tokens of a sequence."""
    usual, limit = text.task.max_length if isinstance(text, TaskData) else _LENGTH, positions(model)
    return min(usual, limit or usual)


def _task_record(data: TaskData) -> dict[str, Any]:
    rows = data.splits[TRAIN]
    return {"source": rows.source, "sha256": rows.sha256, "task": data.task.name}


def _task_batches(data: TaskData, tokenizer: Any, tokens: int, length: int, size: int) -> list[dict[str, Tensor]]:
    """Training rows of the task, to about ``tokens`` tokens, in batches of at most ``size`` or 1. Files may be sorted,
    by label or topic: not the first.
    """
    rows = data.splits[TRAIN]
    order = np.random.default_rng(0).permutation(len(rows))[:tokens]  # a row has a token or more
    encoded = KINDS.get(data.task.kind).encode(data, rows.take(order.tolist(), ""), tokenizer, length)
    columns = [name for name in tokenizer.model_input_names if name in encoded.column_names]
    return corpora.in_batches(encoded.select_columns([*columns, "length"]), tokens, max(size, 1))


@torch.inference_mode()
def _watch(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    found: Calibration,
    progress: Progress,
    *,
    every_table: bool,
) -> None:
    """Run ``batches`` and add up what every target sees; positions that the attention mask hides are not counted.

    ``every_table``: also count in tables other than the word embedding, such as that of positions. A text is cut into
    short sequences, which says nothing of what positions the model will need; rows of a task are as they come. A table
    that is looked up for pairs of tokens is not counted: that is done once for all sequences of a batch.
    """
    tokens: RealTokens
    of_pairs: set[str] = set()
    moments = Moments()

    def count(target: Target, ids: Tensor) -> None:
        if target.role == "embedding":
            tokens.see_words(ids)
        elif not every_table:
            return
        real = tokens.ids(ids)
        if real is None:
            of_pairs.add(target.name)
            return
        counts = found._counts.setdefault(target.name, torch.zeros(target.shape[0], device=ids.device))
        counts += torch.bincount(real, minlength=target.shape[0])

    def hook(target: Target) -> Any:
        def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            if target.kind == "embedding":
                count(target, arguments[0])
            else:
                moments.see(target.name, arguments[0], tokens)

        return before

    targets = find_targets(model)
    handles = [module.register_forward_pre_hook(hook(target)) for target in targets for module in users(model, target)]
    with mode_kept(model), ExitStack() as stack:
        for handle in handles:
            stack.callback(handle.remove)
        model.eval()
        for number, batch in enumerate(batches, start=1):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            tokens = RealTokens(inputs)
            found.tokens += tokens.count
            model(**fitted(model, inputs))
            moments.settle()
            progress("calibrating", number, len(batches))
    for name in of_pairs:  # where there are as many tokens as sequences, pairs look like tokens
        found._counts.pop(name, None)
    found._moments = moments.found()
