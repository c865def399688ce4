"""Second moments of the targets' inputs, and how often each token occurs, from one pass of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.data import corpus as corpora
from compresskit.data.corpus import Corpus
from compresskit.data.encoding import positions
from compresskit.decomposers.base import Target
from compresskit.errors import InputError
from compresskit.model.targets import find_targets

#: Tokens that are read where nobody says: a second moment of 3072 columns needs some tens of thousands.
TOKENS = 65_536
#: Tokens in a sequence, and sequences in a batch.
_LENGTH, _BATCH = 128, 16

Progress = Callable[[str, int, int], None]


class Calibration:
    """The :class:`~compresskit.decomposers.base.Statistics` of one model on one text.

    Memory: one (n, n) float32 matrix for every different input; query, key and value of a layer share theirs.

    Attributes:
        tokens: how many were read, padding not counted.
        text: which text it was, as plain data.
    """

    def __init__(self, text: dict[str, Any]) -> None:
        self.tokens = 0
        self.text = text
        self._moments: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def second_moment(self, target: Target) -> Tensor | None:
        """X^T X of a linear's input over all tokens, (n, n) float32; None if the layer never ran."""
        return self._moments.get(target.name)

    def token_counts(self, target: Target) -> Tensor | None:
        """How often each row of an embedding was looked up, (m,) float32; None if it never was."""
        return self._counts.get(target.name)

    def record(self) -> dict[str, Any]:
        """What was read, as plain data."""
        return {"text": self.text, "tokens": self.tokens}


def calibrate(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Corpus,
    tokens: int = TOKENS,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Calibration:
    """Read about ``tokens`` tokens of a text with the dense model and watch what its matrices see.

    Args:
        model: dense; its weights and mode are left as they are.
        tokenizer: the model's own.
        corpus: what to read, from its beginning.
        tokens: about how many; whole documents are read.
        progress: called with (what, done, total) after each batch.

    Raises:
        InputError: unreadable or empty text, a text on which the model computes NaN.
    """
    length = min(_LENGTH, positions(model) or _LENGTH)
    found = Calibration(corpus.record())
    batches = corpora.batches(corpus, tokenizer, tokens, length, _BATCH)
    _watch(model, batches, found, progress)
    for name, moment in found._moments.items():
        if not torch.isfinite(moment).all():
            raise InputError(f"calibration: the inputs of {name} hold NaN or infinity on text {corpus.name}")
    return found


@torch.inference_mode()
def _watch(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], found: Calibration, progress: Progress
) -> None:
    """Run ``batches`` and add up what every target sees; positions that the attention mask hides are not counted."""
    mask = torch.ones(0, dtype=torch.bool)
    seen: list[tuple[Tensor, Tensor]] = []  # inputs of this batch that were multiplied already, and the products

    def count(target: Target, ids: Tensor) -> None:
        counts = found._counts.setdefault(target.name, torch.zeros(target.shape[0], device=ids.device))
        counts += torch.bincount(ids[mask] if ids.shape == mask.shape else ids.flatten(), minlength=target.shape[0])

    def add(target: Target, x: Tensor) -> None:
        product = next((product for other, product in seen if other is x), None)
        if product is None:
            rows = (x[mask] if x.shape[:-1] == mask.shape else x.flatten(0, -2)).float()
            product = rows.T @ rows
            seen.append((x, product))
        moment = found._moments.setdefault(target.name, torch.zeros_like(product))
        moment += product  # each its own: a layer may see what another does, and more (DeBERTa's shared keys)

    def hook(target: Target) -> Any:
        def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            (count if target.kind == "embedding" else add)(target, arguments[0])

        return before

    training = model.training
    model.eval()
    targets = find_targets(model)
    handles = [model.get_submodule(target.name).register_forward_pre_hook(hook(target)) for target in targets]
    try:
        for number, batch in enumerate(batches, start=1):
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            mask = inputs["attention_mask"].bool()
            found.tokens += int(mask.sum())
            with torch.autocast(model.device.type, enabled=False):  # moments of a caller's 16 bits would be coarse
                model(**inputs)
            seen.clear()
            progress("calibrating", number, len(batches))
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    _hold_once(found._moments)


def _hold_once(moments: dict[str, Tensor]) -> None:
    """Let targets whose moments are equal share one tensor (query, key and value of a layer)."""
    kept: dict[tuple[int, float], Tensor] = {}
    for name, moment in moments.items():
        same = kept.setdefault((len(moment), float(moment.sum())), moment)
        if torch.equal(same, moment):
            moments[name] = same
