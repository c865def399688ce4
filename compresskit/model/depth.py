"""Which layers of a deep model stand for those of a model with fewer."""

from __future__ import annotations

from itertools import pairwise


def stretches(layers: int, count: int) -> list[range]:
    """The numbers of ``layers`` layers, cut into ``count`` stretches that are as equally long as they can be.

    Layer i of a model with ``count`` layers begins as the first layer of stretch i and learns from the last one.

    Args:
        layers: of the deep model.
        count: 1 to ``layers``.

    Example:
        >>> stretches(6, 4)
        [range(0, 2), range(2, 3), range(3, 5), range(5, 6)]
    """
    ends = [(2 * place * layers + count) // (2 * count) for place in range(count + 1)]  # rounded, a half upwards
    return [range(start, end) for start, end in pairwise(ends)]
