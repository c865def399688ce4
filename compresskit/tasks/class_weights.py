"""How much the labels of each class count."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compresskit.errors import InputError, unknown
from compresskit.model.classes import Lookup
from compresskit.tasks.losses import IGNORED


def class_weights(
    given: Literal["balanced"] | Mapping[str, float], labels: list[Any], numbers: Mapping[str, int], classes: int
) -> Tensor:
    """The weight of every class of a head, scaled so that the mean over the labels at hand is 1: a loss is as large as
    without weights, as the weighted mean of ``torch.nn.CrossEntropyLoss`` is.

    Args:
        given: weights by name, 1 where a class is not named; or ``balanced``: labels / (classes that occur x labels of
            the class), as in scikit-learn.
        labels: class numbers of the training rows, one for each row or a list of them; -100 is left out.
        numbers: name of a class -> its number.
        classes: of the head.

    Returns:
        (classes,), float32.

    Raises:
        InputError: a class that the task does not have, or one of two weights; no label of any weight.
    """
    flat = np.array(list(chain.from_iterable(labels)) if isinstance(labels[0], list) else labels)
    counts = np.bincount(flat[flat != IGNORED], minlength=classes)
    weights = np.ones(classes)
    if given == "balanced":
        occur = counts > 0
        weights[occur] = counts.sum() / (occur.sum() * counts[occur])
    else:
        find = Lookup(list(numbers))
        named: dict[str, str] = {}
        for name, weight in given.items():
            known = find(name)
            if known is None:
                raise unknown("class of class_weights", name, list(numbers))
            if (before := named.setdefault(known, name)) != name:
                raise InputError(f"class weights: {before!r} and {name!r} are both class {known}; give one weight")
            weights[numbers[known]] = weight
    total = float((counts * weights).sum())
    if total == 0:
        raise InputError("class weights: no class that occurs in the training rows has a weight above 0")
    return torch.tensor(weights * counts.sum() / total, dtype=torch.float32)
