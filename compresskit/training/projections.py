"""Linear maps between the widths of two models: learned beside a student, from the best ones at the start.

Those of hidden states are dropped afterwards (TinyBERT, arXiv 1909.10351); that of sentence vectors becomes a module.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model.depth import stretches
from compresskit.model.inputs import fitted
from compresskit.model.kept import mode_kept
from compresskit.planning.stage import LossName, Stage
from compresskit.training.attention import lacking

#: Loss terms that compare hidden states.
_TERMS: tuple[LossName, ...] = ("embedding", "hidden")
#: Sequences that the maps are fitted to before they are trained, and sequences at a time.
_FITTED, _BATCH = 64, 16


def least_squares(ours: Tensor, theirs: Tensor) -> nn.Linear:
    """The linear map (D -> D') with the least squared error over (N, D) and (N, D') vectors, kept small where N is."""
    first, second = ours.double(), theirs.double()
    gram = first.T @ first
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    found = nn.Linear(first.shape[1], second.shape[1], bias=False)
    found.weight.data = torch.linalg.solve(gram, first.T @ second).T.float().contiguous()
    return found


def of_hidden_states(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    stage: Stage,
    rows: Dataset,
    collator: Any,
    targets: Sequence[str] = (),
) -> nn.ModuleList | None:
    """Maps of the student's hidden states to the teacher's: the embedding output's, then one for each layer.

    They begin as those that bring the untrained student's states nearest to the teacher's on some of the rows.

    Args:
        rows: token sequences.
        collator: makes a padded batch of rows.
        targets: columns that are no inputs of the models.

    Returns:
        None where the two are equally wide; no map where no loss compares hidden states, or a model gives none.

    Raises:
        InputError: several processes, which would not share the gradients.
    """
    ours, theirs = (getattr(model.config, "hidden_size", None) for model in (student, teacher))
    if ours == theirs:
        return None
    weighed = any(stage.losses.get(name) for name in _TERMS)
    if not weighed or any(lacking(model, "hidden_states") for model in (student, teacher)):
        return nn.ModuleList()
    check_processes(student, teacher)
    parameters = inspect.signature(student.forward).parameters
    inputs = [name for name in rows.column_names if name in parameters and name not in targets]
    rows = rows.select_columns(inputs).select(range(min(_FITTED, len(rows))))
    states: tuple[list[list[Tensor]], ...] = ([], [])
    for start in range(0, len(rows), _BATCH):
        batch = collator(list(rows.select(range(start, min(start + _BATCH, len(rows))))))
        for model, found in zip((student, teacher), states, strict=True):
            found.append(_real_states(model, batch))
    mine, others = ([torch.cat(layer) for layer in zip(*found, strict=True)] for found in states)
    ends = [stretch[-1] for stretch in stretches(len(others) - 1, len(mine) - 1)]
    return nn.ModuleList(map(least_squares, mine, [others[0], *(others[1 + end] for end in ends)]))


def check_processes(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse several processes where hidden states need projections, whose gradients they would not share. Raises
    InputError.
    """
    ours, theirs = (getattr(model.config, "hidden_size", None) for model in (student, teacher))
    if ours != theirs and PartialState().num_processes > 1:
        raise InputError(
            f"teacher and student have hidden sizes of {theirs} and {ours}, and the projections between them are "
            "trained by one process alone; or give --loss embedding=0 --loss hidden=0"
        )


@torch.no_grad()
def _real_states(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The hidden states (N, H) of every token that is no padding, the embedding output first."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    with mode_kept(model):
        model.eval()
        states = model(**fitted(model, inputs), output_hidden_states=True).hidden_states
    return [state[inputs["attention_mask"] > 0].float().cpu() for state in states]


@contextmanager
def beside(student: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Modules are parts of the student while it trains, so that they are optimised and in checkpoints."""
    for name, module in modules.items():
        student.add_module(name, module.train())
    try:
        yield
    finally:
        for name in modules:
            delattr(student, name)
