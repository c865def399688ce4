"""Batches of sequences of similar length, in an order that (seed, epoch) alone decides, and what pads them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from compresskit.tasks.losses import IGNORED

#: Batches that are sorted by length together: enough for little padding, few enough to stay random.
_POOL = 50


class LengthBatchSampler(Sampler[list[int]]):
    """Micro-batches of this process, of sequences of similar length.

    One optimizer step takes ``batch_size`` sequences, cut into ``parts`` micro-batches (devices x accumulation steps)
    in a fixed way: the same sequences meet in the same step however many processes share it. A rest with fewer
    sequences than micro-batches is left out: others in every epoch, of any length. The order is a function of
    (seed, epoch) alone, so that a resumed run continues exactly.

    Args:
        lengths: tokens of each sequence.
        batch_size: sequences per optimizer step.
        world, rank: number of processes, and which one this is.
        accumulation: micro-batches of each process per step.
        seed: of the order.
        drop_last: leave out steps of fewer than ``batch_size`` sequences.
        together: so many sequences after each other stay together, 2 where they are pairs; ``batch_size`` and every
            micro-batch hold whole groups.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        world: int = 1,
        rank: int = 0,
        accumulation: int = 1,
        seed: int = 0,
        drop_last: bool = False,
        together: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.world, self.rank, self.accumulation = world, rank, accumulation
        self.seed = seed
        self.together = together
        self.least = batch_size if drop_last else world * accumulation * together
        self.epoch = 0
        self.steps = len(self.step_batches(0))

    @property
    def left_out(self) -> int:
        """How many sequences of each epoch are in no step."""
        rest = len(self.lengths) % self.batch_size
        return rest if rest < self.least else 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        parts = self.world * self.accumulation
        for batch in self.step_batches(self.epoch):
            for part in np.array_split(batch.reshape(-1, self.together), parts)[self.rank :: self.world]:
                yield part.ravel().tolist()

    def step_batches(self, epoch: int) -> list[np.ndarray]:
        """The sequences of every optimizer step of an epoch."""
        generator = np.random.default_rng((self.seed, epoch))
        groups = np.arange(len(self.lengths)).reshape(-1, self.together)
        longest = self.lengths[groups].max(axis=1, initial=0)
        size = self.batch_size // self.together
        # What is left out goes before the pools are sorted: after that it would always be the shortest.
        order = generator.permutation(len(groups))[: len(groups) - self.left_out // self.together]
        batches = []
        for start in range(0, len(order), size * _POOL):
            chunk = order[start : start + size * _POOL]
            chunk = chunk[np.argsort(-longest[chunk], kind="stable")]
            batches += [groups[chunk[i : i + size]].ravel() for i in range(0, len(chunk), size)]
        return [batches[i] for i in generator.permutation(len(batches))]

    def steps_for_tokens(self, tokens: int) -> int:
        """Optimizer steps until at least ``tokens`` real (non-padding) tokens were seen."""
        steps, seen, epoch = 0, 0, 0
        while seen < tokens:
            for batch in self.step_batches(epoch):
                seen += int(self.lengths[batch].sum())
                steps += 1
                if seen >= tokens:
                    break
            epoch += 1
        return steps

    def tokens(self, steps: int) -> int:
        """Real tokens in the first ``steps`` optimizer steps."""
        seen, epoch = 0, 0
        while steps > 0:
            batches = self.step_batches(epoch)[:steps]
            seen += sum(int(self.lengths[batch].sum()) for batch in batches)
            steps -= len(batches)
            epoch += 1
        return seen


class _TokenColumns:
    """A collator of transformers that also pads, with zeros, columns that no tokenizer knows, such as ``bbox``.

    Attributes:
        columns: their names. Each has an integer for every token, or a list of a fixed number of them.
    """

    columns: tuple[str, ...] = ()

    def __call__(self, rows: list[dict[str, Any]], return_tensors: str | None = None) -> Any:
        known = [{name: value for name, value in row.items() if name not in self.columns} for row in rows]
        batch = super().__call__(known)  # type: ignore[misc]
        tokenizer: Any = self.tokenizer  # type: ignore[attr-defined]
        tokens = batch["input_ids"].shape[1]
        for name in self.columns:
            values = [torch.tensor(row[name]) for row in rows]
            padded = torch.zeros(len(rows), tokens, *values[0].shape[1:], dtype=torch.long)
            for place, value in zip(padded, values, strict=True):
                start = tokens - len(value) if tokenizer.padding_side == "left" else 0
                place[start : start + len(value)] = value
            batch[name] = padded
        return batch


def is_masking(collator: Any) -> bool:
    """Whether a collator hides words, other ones in every epoch, and gives labels for them."""
    return isinstance(collator, DataCollatorForLanguageModeling) and bool(collator.mlm)


class PaddingCollator(_TokenColumns, DataCollatorWithPadding):
    """Padded batches."""


class TokenLabelCollator(_TokenColumns, DataCollatorForTokenClassification):
    """Padded batches with a label for each token."""


class MaskingCollator(_TokenColumns, DataCollatorForLanguageModeling):
    """Masked-LM batches whose masks follow from (seed, epoch, the sequence): the same after a resume and in any split
    over processes.
    """

    def __init__(self, tokenizer: Any, mask_probability: float, seed: int) -> None:
        super().__init__(tokenizer=tokenizer, mlm=True, mlm_probability=mask_probability, seed=seed)
        self.base_seed = seed
        self.epoch = 0

    def create_rng(self) -> None:
        """Called by the parent once per worker; the generator is set per sequence instead."""

    def torch_mask_tokens(
        self, inputs: Tensor, special_tokens_mask: Any | None = None, offset_mapping: Any | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mask each sequence (without its padding) by itself."""
        labels = torch.full_like(inputs, IGNORED)
        for row, label in zip(inputs, labels, strict=True):
            real = row != self.tokenizer.pad_token_id
            own = row[real]
            entropy = (self.base_seed, self.epoch, zlib.crc32(own.numpy().tobytes()))
            seed = int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
            self.generator = torch.Generator().manual_seed(seed)
            masked, wanted = super().torch_mask_tokens(own[None])
            row[real], label[real] = masked[0], wanted[0]
        return inputs, labels
