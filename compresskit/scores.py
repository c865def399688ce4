"""What scores are counted together as, in one place: the mean over splits, and the share of the teacher's score."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean


def mean_over_splits(scores: Mapping[str, Mapping[str, float]], metric: str) -> float:
    """The metric's mean over all splits (MNLI has two: matched and mismatched). ``scores``: split -> metric -> value.

    Example:
        >>> mean_over_splits({"matched": {"accuracy": 0.5}, "mismatched": {"accuracy": 1.0}}, "accuracy")
        0.75
    """
    return fmean(values[metric] for values in scores.values())


def kept_over_splits(
    student: Mapping[str, Mapping[str, float]], teacher: Mapping[str, Mapping[str, float]], metric: str
) -> float | None:
    """Mean / the teacher's mean; None where the teacher's score says nothing on a split: it would lower both sums.

    Example:
        >>> kept_over_splits({"a": {"f1": 0.25}, "b": {"f1": 0.5}}, {"a": {"f1": 0.5}, "b": {"f1": 1.0}}, "f1")
        0.5
    """
    if any(values[metric] <= 0 for values in teacher.values()):
        return None
    return share_kept(mean_over_splits(student, metric), mean_over_splits(teacher, metric))


def share_kept(score: float, teacher: float) -> float | None:
    """Score / the teacher's; None where the teacher's says nothing (0 or below, as Matthews' coefficient may be).

    Example:
        >>> share_kept(0.45, 0.9)
        0.5
    """
    return score / teacher if teacher > 0 else None
