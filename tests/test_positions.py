"""How many tokens a model takes decides what it is measured, compared, timed, calibrated and trained with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny_model
from transformers import PreTrainedModel

import compresskit
from compresskit.calibration.statistics import Calibration, _watch
from compresskit.calibration.tokens import RealTokens
from compresskit.errors import InputError
from compresskit.model.inputs import fitted
from compresskit.model.measure import count_flops
from compresskit.model.positions import check_length, positions, shortened


def test_a_model_with_128_positions_is_measured_at_128() -> None:
    short, long = (tiny_model(max_position_embeddings=size) for size in (128, 512))
    assert positions(short) == 128
    assert count_flops(short) == count_flops(long)
    assert shortened(short, 128) == 128
    exported: Any = SimpleNamespace(config=short.config)  # knows its configuration alone
    assert shortened(exported, 128) == 128
    assert shortened(exported, 200) == 128


def test_relative_positions_have_no_limit() -> None:
    config = transformers.DebertaV2Config(
        vocab_size=160,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        position_biased_input=False,
        relative_attention=True,
    )
    model: PreTrainedModel = transformers.DebertaV2Model(config)
    assert positions(model) is None
    check_length(model, 500)
    assert count_flops(model).total > count_flops(model, 40).total


def test_a_factorised_table_of_positions_has_the_same_limit() -> None:
    model = tiny_model("roberta", max_position_embeddings=130)
    student = compresskit.compress(model, method="auto", ratio=3)
    assert positions(student) == positions(model) == 128  # two rows lie before the first token
    check_length(student, 128)
    with pytest.raises(InputError, match="has 128 positions; choose at most 128"):
        check_length(student, 129)


def test_calibration_counts_the_positions_of_every_real_token() -> None:
    model = tiny_model()
    lengths = [[11, 7, 3], [5, 9, 9]]
    batches = []
    for row in lengths:
        mask = (torch.arange(max(row)) < torch.tensor(row)[:, None]).long()
        batches.append({"input_ids": torch.full_like(mask, 9), "attention_mask": mask})
    found = Calibration({})
    _watch(model, batches, found, lambda *_: None, every_table=True)
    counts = found._counts["embeddings.position_embeddings"]
    assert counts.sum() == found.tokens == 44
    assert counts[:12].tolist() == [6, 6, 6, 5, 5, 4, 4, 3, 3, 1, 1, 0]
    assert found._counts["embeddings.word_embeddings"].tolist()[9] == 44
    assert found._counts["embeddings.token_type_embeddings"].tolist() == [44, 0]


@pytest.mark.parametrize(
    ("ids", "shape"),
    [
        ([[1, 2, 0], [3, 0, 0]], "sequences"),
        ([[[1, 2, 0]], [[3, 0, 0]]], "choices"),
        ([[1, 3], [2, 0], [0, 0]], "turned"),
    ],
)
def test_padding_is_left_out_however_a_family_lays_its_tokens(ids: list[Any], shape: str) -> None:
    given = torch.tensor(ids)
    rows = given.T if shape == "turned" else given
    tokens = RealTokens({"input_ids": rows, "attention_mask": (rows > 0).long()})
    inside = given if shape == "turned" else rows.reshape(-1, rows.shape[-1])
    tokens.see_words(inside)
    assert sorted(tokens.ids(inside).tolist()) == [1, 2, 3]
    values = torch.stack([inside, inside], -1).float()
    assert sorted(tokens.rows(values)[:, 0].tolist()) == [1, 2, 3]
    assert tokens.count == 3


def test_layers_that_see_whole_windows_count_real_tokens() -> None:
    rows = torch.tensor([[1, 2, 0], [3, 4, 5]])
    tokens = RealTokens({"input_ids": rows, "attention_mask": (rows > 0).long()})
    padded = torch.nn.functional.pad(rows, (0, 1))
    assert sorted(tokens.ids(padded).tolist()) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("family", "types"), [("roberta", 1), ("bert", 2)])
def test_token_types_that_a_model_does_not_tell_apart_are_type_0(family: str, types: int) -> None:
    model = tiny_model(family, type_vocab_size=types)
    ids = torch.arange(5, 17)[None]
    given = torch.tensor([[0] * 6 + [1] * 6])
    found = fitted(model, {"input_ids": ids, "token_type_ids": given})
    assert found["token_type_ids"].tolist() == (given * (types > 1)).tolist()
    assert given.sum() == 6  # the caller's is not changed
    model(**found)


def test_inputs_that_a_family_lacks_are_left_out() -> None:
    batch = {name: torch.ones(1, 12, dtype=torch.long) for name in ("input_ids", "token_type_ids", "attention_mask")}
    assert fitted(tiny_model("distilbert"), batch).keys() == {"input_ids", "attention_mask"}
