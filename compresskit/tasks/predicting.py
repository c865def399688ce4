"""Run a model over a data set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import DataCollatorWithPadding

from compresskit.errors import WorkError
from compresskit.model.inputs import fitted
from compresskit.model.tokenizer import MASK
from compresskit.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset

#: Sequences at a time where nobody says.
BATCH_SIZE = 32
#: Difference of logits, as a share of the largest one, that rounding makes at most.
_NEAR = 1e-3
#: Name of an output -> the logits of every row.
Logits = dict[str, list[np.ndarray]]


class Runnable(Protocol):
    """A transformers model, or what is called like one and gives its outputs by their names."""

    config: Any

    @property
    def device(self) -> torch.device:
        """Where inputs must lie."""

    def __call__(self, **inputs: Tensor) -> Any:
        """The outputs."""


def predict(
    model: Runnable,
    tokenizer: Any,
    dataset: Dataset,
    batch_size: int,
    progress: Progress | None = None,
) -> Logits:
    """Logits of every sequence, in the data set's order; computed in batches of similar length, without padding work
    that a shorter batch would not have. A model whose answer depends on the padding beside a sequence gets none: its
    batches are of equal length.

    Raises:
        WorkError: NaN among the logits, which would count as an answer.
    """
    state = PartialState()
    columns = [name for name in tokenizer.model_input_names if name in dataset.column_names]
    inputs = dataset.select_columns(columns)
    lengths = np.asarray(dataset["length"])
    order = np.argsort(-lengths, kind="stable")[state.process_index :: state.num_processes]
    collate = DataCollatorWithPadding(tokenizer)
    parts = [order]
    if _mixes_padding(model, collate, inputs, lengths):
        parts = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1)
    batches = [part[start : start + batch_size].tolist() for part in parts for start in range(0, len(part), batch_size)]
    found: list[tuple[int, dict[str, np.ndarray]]] = []
    with torch.inference_mode():
        for rows in batches:
            logits = _logits(model, collate([inputs[row] for row in rows]))
            if any(np.isnan(value).any() for value in logits.values()):
                raise WorkError(
                    f"{type(model).__name__} computes NaN: it cannot be scored (are its weights too large?)"
                )
            found += [(row, {key: value[i] for key, value in logits.items()}) for i, row in enumerate(rows)]
            if progress is not None:
                progress("predicting", len(found), len(order))
    if state.num_processes > 1:
        found = gather_object(found)
    ordered = dict(found)
    return {key: [ordered[row][key] for row in range(len(dataset))] for key in found[0][1]}


def _logits(model: Runnable, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    output = model(**fitted(model, {key: value.to(model.device) for key, value in batch.items()}))
    return {key: _array(value) for key, value in output.items() if key.endswith("logits")}


@torch.inference_mode()
def _mixes_padding(model: Runnable, collate: Any, inputs: Dataset, lengths: np.ndarray) -> bool:
    """Whether the shortest sequence gets other logits beside the longest one than alone, as in families that mix tokens
    by other means than masked attention: convolutions (ConvBERT, Nystromformer), pooling (Funnel), FNet.
    """
    rows = [inputs[int(lengths.argmin())], inputs[int(lengths.argmax())]]
    if lengths.min() == lengths.max():
        return False
    batch = collate(rows)
    real = batch[MASK][0].bool().numpy()
    alone, beside = _logits(model, collate(rows[:1])), _logits(model, batch)
    for key, value in alone.items():
        ours, theirs = value[0], beside[key][0]
        if theirs.shape != ours.shape:  # one prediction for each token
            theirs = theirs[real]
        most = np.abs(ours[np.isfinite(ours)]).max(initial=0)
        if not np.allclose(ours, theirs, rtol=0, atol=_NEAR * most):
            return True
    return False


def _array(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.float().cpu().numpy()
    return array
