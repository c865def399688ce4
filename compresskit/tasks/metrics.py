"""Scores by name. All are fractions, higher is better."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy import stats
from sklearn import metrics as sklearn_metrics

Values = np.ndarray
#: ``(targets, predictions, number of the model's classes) -> score``.
Metric = Callable[[Values, Values, int], float]


def _correlation(function: Callable[[Values, Values], tuple[float, float]]) -> Callable[[Values, Values], float]:
    def score(targets: Values, predictions: Values) -> float:
        if len(targets) < 2:
            return 0.0  # one row has no correlation either
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant predictions have no correlation: scored as none
            value = float(function(targets, predictions)[0])
        return value if np.isfinite(value) else 0.0

    return score


_pearson = _correlation(stats.pearsonr)
_spearman = _correlation(stats.spearmanr)


def _f1(targets: Values, predictions: Values, classes: int) -> float:
    # Of class 1 alone, or over all classes: also where the rows at hand or the answers lack some of them.
    labels = [1] if classes == 2 else list(range(classes))
    return float(sklearn_metrics.f1_score(targets, predictions, labels=labels, average="macro", zero_division=0))


#: Metrics of class numbers. ``f1`` is that of class 1 with two classes, as GLUE has it, and with more the mean over all
#: of the model's classes; a class without rows or answers has 0.
OF_CLASSES: dict[str, Metric] = {
    "accuracy": lambda targets, predictions, _: float(sklearn_metrics.accuracy_score(targets, predictions)),
    "f1": _f1,
    "matthews": lambda targets, predictions, _: float(sklearn_metrics.matthews_corrcoef(targets, predictions)),
}

#: Metrics of numbers.
OF_NUMBERS: dict[str, Metric] = {
    "pearson": lambda targets, predictions, _: _pearson(targets, predictions),
    "spearman": lambda targets, predictions, _: _spearman(targets, predictions),
    "pearson_spearman": lambda targets, predictions, _: (
        (_pearson(targets, predictions) + _spearman(targets, predictions)) / 2
    ),
}
