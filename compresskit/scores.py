"""What scores are counted together as, in one place: the mean over splits, the share of the teacher's score, and
whether training lowered it.
"""

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
    if says_nothing(teacher, metric):
        return None
    return share_kept(mean_over_splits(student, metric), mean_over_splits(teacher, metric))


def says_nothing(teacher: Mapping[str, Mapping[str, float]], metric: str) -> bool:
    """Whether a teacher scores 0 or below on a split.

    Example:
        >>> says_nothing({"a": {"matthews": -0.1}, "b": {"matthews": 0.9}}, "matthews")
        True
    """
    return any(values[metric] <= 0 for values in teacher.values())


def share_kept(score: float, teacher: float) -> float | None:
    """Score / the teacher's; None where the teacher's says nothing (0 or below, as Matthews' coefficient may be).

    Example:
        >>> share_kept(0.45, 0.9)
        0.5
    """
    return score / teacher if teacher > 0 else None


def worsened(
    before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]], metric: str | None
) -> tuple[str, ...]:
    """A note with what to try, where a training lowered the mean over all splits by as much as is shown of it; none
    where it did not, and without a metric, as of held-out losses.

    Example:
        >>> worsened({"dev": {"f1": 0.5}}, {"dev": {"f1": 0.4}}, "f1")[0].partition(":")[0]
        'training made the model worse, f1 fell from 50.00 to 40.00 %'
        >>> worsened({"dev": {"f1": 0.5}}, {"dev": {"f1": 0.49999}}, "f1")
        ()
    """
    if metric is None:
        return ()
    old, new = (f"{100 * mean_over_splits(scores, metric):.2f}" for scores in (before, after))
    if float(new) >= float(old):
        return ()
    return (
        f"training made the model worse, {metric} fell from {old} to {new} %: try a lower learning rate "
        "(--learning-rate), more rows or texts, or more epochs (--epochs)",
    )
