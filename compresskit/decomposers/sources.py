"""What a method reads: the weights of its matrices, and what calibration saw of their inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from compresskit.decomposers.groups import Target

#: Rows of a large matrix that are worked on at a time.
BLOCK_ROWS = 8192


class WeightSource(Protocol):
    """Hands out weights, from a live model or from files."""

    def read(self, target: Target) -> Tensor:
        """The whole weight, (m, n), in its stored dtype."""
        ...

    def rows(self, target: Target, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the weight, (stop - start, n): for matrices too large to hold twice."""
        ...


class Statistics(Protocol):
    """What calibration knows about the inputs of the targets. Always optional."""

    def second_moment(self, target: Target) -> Tensor | None:
        """X^T X of a linear's input, (n, n); None if not known."""
        ...

    def token_counts(self, target: Target) -> Tensor | None:
        """How often each row of an embedding was looked up, (m,); None if not known."""
        ...

    def sensitivity(self, target: Target) -> float | None:
        """How much the model's predictions lose, to second order, per squared relative error of the target's output, as
        a multiple of the mean over targets; None if not known.
        """
        ...


def moment_of(target: Target, statistics: Statistics | None) -> Tensor | None:
    """The second moment of a linear's input, where it is known."""
    return statistics.second_moment(target) if statistics is not None and target.kind == "linear" else None


def counts_of(target: Target, statistics: Statistics | None) -> Tensor | None:
    """How often each row of an embedding was looked up, where it is known."""
    return statistics.token_counts(target) if statistics is not None and target.kind == "embedding" else None


def row_blocks(source: WeightSource, target: Target) -> Iterator[Tensor]:
    """The weight of ``target`` in blocks of at most :data:`BLOCK_ROWS` rows."""
    m = target.shape[0]
    if m <= BLOCK_ROWS:
        yield source.read(target)
        return
    for start in range(0, m, BLOCK_ROWS):
        yield source.rows(target, start, min(start + BLOCK_ROWS, m))
