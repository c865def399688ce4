"""Batches by length: complete, repeatable, the same in any split over processes."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from conftest import vocabulary

from compresskit.training.batches import LengthBatchSampler, MaskingCollator

LENGTHS = np.random.default_rng(0).integers(1, 60, 1003)


def test_every_sequence_once_and_an_order_of_seed_and_epoch() -> None:
    sampler = LengthBatchSampler(LENGTHS, 16, seed=3)
    first = list(sampler)
    assert sorted(i for batch in first for i in batch) == list(range(len(LENGTHS)))
    assert len(first) == len(sampler)
    assert list(sampler) == first
    assert list(LengthBatchSampler(LENGTHS, 16, seed=3)) == first
    assert list(LengthBatchSampler(LENGTHS, 16, seed=4)) != first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_little_padding() -> None:
    padded = sum(len(batch) * LENGTHS[batch].max() for batch in LengthBatchSampler(LENGTHS, 16))
    assert padded < 1.1 * LENGTHS.sum()


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (1, 2), (2, 3)])
def test_the_same_sequences_meet_in_a_step(world: int, accumulation: int) -> None:
    whole = list(LengthBatchSampler(LENGTHS, 24, seed=1))
    ranks = [
        list(LengthBatchSampler(LENGTHS, 24, world=world, rank=rank, accumulation=accumulation, seed=1))
        for rank in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    for step, batch in enumerate(whole[:-1]):
        parts = [part for batches in ranks for part in batches[step * accumulation : (step + 1) * accumulation]]
        assert all(parts)
        assert sorted(i for part in parts for i in part) == sorted(batch)


def test_a_remainder_too_small_to_share_is_left_out_whatever_its_length() -> None:
    """What was cut off behind the sort by length was always the shortest sequence, in every epoch."""
    lengths = LENGTHS[: 24 * 10 + 1]  # the last batch has one sequence
    one = list(LengthBatchSampler(lengths, 24))
    ranks = [LengthBatchSampler(lengths, 24, world=2, rank=rank) for rank in range(2)]
    missed = set()
    for epoch in range(30):
        for sampler in ranks:
            sampler.set_epoch(epoch)
        joined = [[*a, *b] for a, b in zip(*ranks, strict=True)]
        assert all(len(batch) == 24 for batch in joined)
        missed |= set(range(len(lengths))) - {i for batch in joined for i in batch}
    assert len(missed) > 20
    short = LengthBatchSampler(np.arange(1, 28), 24, drop_last=True)  # one pool alone
    seen = set()
    for epoch in range(40):
        short.set_epoch(epoch)
        seen |= {i for batch in short for i in batch}
    assert len(seen) == 27
    pairs = LengthBatchSampler(LENGTHS[:28], 8, drop_last=True, together=2)
    assert [len(batch) for batch in pairs] == [8] * 3
    assert all(a + 1 == b and a % 2 == 0 for batch in pairs for a, b in zip(batch[::2], batch[1::2], strict=True))
    assert [LengthBatchSampler(lengths, 24, world=world).left_out for world in (1, 2)] == [0, 1]
    assert LengthBatchSampler(LENGTHS, 16, world=4).left_out == 0  # 11 are enough for 4
    assert len(one) == len(joined) + 1


def test_token_budget() -> None:
    sampler = LengthBatchSampler(LENGTHS, 16)
    for tokens in (1, 1000, int(LENGTHS.sum()), int(2.5 * LENGTHS.sum())):
        steps = sampler.steps_for_tokens(tokens)
        assert sampler.tokens(steps) >= tokens
        assert steps == 1 or sampler.tokens(steps - 1) < tokens


def test_masks_follow_from_seed_epoch_and_sequence(tmp_path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary()), encoding="utf-8")
    tokenizer = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    rows = [{"input_ids": [2, *range(6, 6 + n), 3]} for n in (30, 20, 25)]

    def masked(rows: list, seed: int = 0, epoch: int = 0) -> dict:
        collator = MaskingCollator(tokenizer, 0.3, seed)
        collator.epoch = epoch
        return collator([dict(row) for row in rows])

    whole = masked(rows)
    for i, row in enumerate(rows):
        alone = masked([row])
        n = len(row["input_ids"])
        assert whole["input_ids"][i, :n].tolist() == alone["input_ids"][0].tolist()
        assert whole["labels"][i, :n].tolist() == alone["labels"][0].tolist()
        assert (whole["labels"][i, n:] == -100).all()
        assert whole["labels"][i, 0] == -100  # [CLS] is never hidden
    hidden = whole["labels"] != -100
    assert 10 <= hidden.sum() <= 40
    original = [
        row["input_ids"][j] for row, line in zip(rows, hidden.tolist(), strict=True) for j, h in enumerate(line) if h
    ]
    assert whole["labels"][hidden].tolist() == original
    assert masked(rows, epoch=1)["labels"].tolist() != whole["labels"].tolist()
    assert masked(rows, seed=1)["labels"].tolist() != whole["labels"].tolist()
