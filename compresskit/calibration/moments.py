"""Second moments of inputs while a model runs: each is multiplied once, however many layers see it."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from compresskit.calibration.tokens import RealTokens
from compresskit.decomposers import linalg


class Moments:
    """X^T X of what every target sees, added up call by call.

    Query, key and value of a layer see one tensor, one after the other. It is multiplied once for all of them, and what
    always goes together is held once. A target may also see what others do not (DeBERTa's shared keys), so there is a
    sum for every set of targets that some tensor went to, and a target's moment is the sum of its sums.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._last: Tensor | None = None
        self._rows = torch.zeros(0)
        self._names: list[str] = []

    def see(self, target: str, x: Tensor, tokens: RealTokens) -> None:
        """Told of a target's input; only real tokens count."""
        if x is not self._last:
            self.settle()
            # A copy: the model may go on to change its tensor in place.
            self._last, self._rows = x, tokens.rows(x).to(torch.float32, copy=True)
        self._names.append(target)

    def settle(self) -> None:
        """Add up what was seen last. To be called after a batch, whose tensors are then let go."""
        if self._last is not None:
            names, n = tuple(self._names), self._rows.shape[-1]
            if names not in self._sums:
                self._sums[names] = self._rows.new_zeros(n, n)
            linalg.add_square(self._sums[names], self._rows.reshape(-1, n))
        self._last, self._rows, self._names = None, torch.zeros(0), []

    def found(self) -> dict[str, Tensor]:
        """(n, n) float32 of every target that saw something; one tensor for those with the same inputs."""
        self.settle()
        sums: dict[str, list[tuple[str, ...]]] = defaultdict(list)
        for names in self._sums:
            for name in names:
                sums[name].append(names)
        whole = {names: linalg.whole_square(total) for names, total in self._sums.items()}
        added: dict[tuple[tuple[str, ...], ...], Tensor] = {}
        for parts in map(tuple, sums.values()):
            if parts not in added:
                first, *others = (whole[names] for names in parts)
                added[parts] = sum(others, first)
        return {name: added[tuple(parts)] for name, parts in sums.items()}
