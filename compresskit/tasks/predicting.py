"""Run a model over a data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import DataCollatorWithPadding

from compresskit.errors import WorkError
from compresskit.model.inputs import fitted
from compresskit.progress import Progress

if TYPE_CHECKING:
    from datasets import Dataset

#: Sequences at a time where nobody says.
BATCH_SIZE = 32
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
    *,
    alike: bool = False,
) -> Logits:
    """Logits of every sequence, in the data set's order; computed in batches of similar length, without padding work
    that a shorter batch would not have. ``alike``: of equal length, for a model that does not tell padding from tokens.

    Raises:
        WorkError: NaN among the logits, which would count as an answer.
    """
    state = PartialState()
    columns = [name for name in tokenizer.model_input_names if name in dataset.column_names]
    inputs = dataset.select_columns(columns)
    lengths = np.asarray(dataset["length"])
    order = np.argsort(-lengths, kind="stable")[state.process_index :: state.num_processes]
    parts = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if alike else [order]
    batches = [part[start : start + batch_size].tolist() for part in parts for start in range(0, len(part), batch_size)]
    collate = DataCollatorWithPadding(tokenizer)
    found: list[tuple[int, dict[str, np.ndarray]]] = []
    with torch.inference_mode():
        for rows in batches:
            batch = collate([inputs[row] for row in rows])
            output = model(**fitted(model, {key: value.to(model.device) for key, value in batch.items()}))
            logits = {key: _array(value) for key, value in output.items() if key.endswith("logits")}
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


def _array(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.float().cpu().numpy()
    return array
