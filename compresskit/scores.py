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


def share_kept(score: float, teacher: float) -> float | None:
    """Score / the teacher's; None where the teacher's says nothing (0 or below, as Matthews' coefficient may be).

    Example:
        >>> share_kept(0.45, 0.9)
        0.5
    """
    return score / teacher if teacher > 0 else None
