"""Scores by name. All are fractions, higher is better.

scipy and scikit-learn are loaded by the first score: most commands need none, and both together take half a second.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

Values = np.ndarray
#: ``(targets, predictions, number of the model's classes) -> score``.
Metric = Callable[[Values, Values, int], float]


def _correlation(function: Callable[..., tuple[float, float]], targets: Values, predictions: Values) -> float:
    if len(targets) < 2:
        return 0.0  # one row has no correlation either
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant predictions have no correlation: scored as none
        value = float(function(targets, predictions)[0])
    return value if np.isfinite(value) else 0.0


def _pearson(targets: Values, predictions: Values, _: int) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, targets, predictions)


def _spearman(targets: Values, predictions: Values, _: int) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, targets, predictions)


def _pearson_spearman(targets: Values, predictions: Values, classes: int) -> float:
    return (_pearson(targets, predictions, classes) + _spearman(targets, predictions, classes)) / 2


def _accuracy(targets: Values, predictions: Values, _: int) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(targets, predictions))


def _f1(targets: Values, predictions: Values, classes: int) -> float:
    from sklearn.metrics import f1_score

    # Of class 1 alone, or over all classes: also where the rows at hand or the answers lack some of them.
    labels = [1] if classes == 2 else list(range(classes))
    return float(f1_score(targets, predictions, labels=labels, average="macro", zero_division=0))


def _matthews(targets: Values, predictions: Values, _: int) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(targets, predictions))


#: Metrics of class numbers. ``f1`` is that of class 1 with two classes, as GLUE has it, and with more the mean over all
#: of the model's classes; a class without rows or answers has 0.
OF_CLASSES: dict[str, Metric] = {"accuracy": _accuracy, "f1": _f1, "matthews": _matthews}

#: Metrics of numbers.
OF_NUMBERS: dict[str, Metric] = {
    "pearson": _pearson,
    "spearman": _spearman,
    "pearson_spearman": _pearson_spearman,
}
