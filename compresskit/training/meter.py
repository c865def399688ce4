"""What a training logs: the mean of each loss term, and the speed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compresskit.planning.stage import LossName


class Meter:
    """Sums of the loss terms and tokens since the last reading, kept on the device until then."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.sums: dict[str, Tensor] = {}
        self.batches = 0
        self.since = time.perf_counter()

    def add(self, loss: Tensor, terms: Mapping[LossName, Tensor], tokens: Tensor) -> None:
        """One micro-batch; ``tokens`` is its share of the step's."""
        for name, value in {"loss": loss, **{f"loss_{k}": v for k, v in terms.items()}, "tokens": tokens}.items():
            value = value.detach().double() if value.device.type != "mps" else value.detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.batches += 1

    def read(self, steps: float, accelerator: Any) -> dict[str, float]:
        """Means per step, summed over processes, then reset."""
        seconds = time.perf_counter() - self.since
        names = sorted(self.sums)
        values = torch.stack([self.sums[name] for name in names])
        if accelerator.num_processes > 1:
            values = accelerator.gather(values[None]).sum(0)
        means = dict(zip(names, values.tolist(), strict=True))
        tokens = means.pop("tokens") / accelerator.num_processes  # every process counts the whole step
        self.reset()
        means = {name: value / steps for name, value in means.items()}
        return means | {"seconds": seconds, "tokens_per_second": tokens / seconds}
