"""The embedding whose frequent words have more rank: which words these are, and what the factors keep."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel

from compresskit import InputError
from compresskit.decomposers import Group, Target, output_error
from compresskit.decomposers.group_reduce import GroupReduceOptions, GroupReduceSpec
from compresskit.decomposers.registry import get
from compresskit.planning.planner import make_plan
from compresskit.planning.recipe import for_method

V, D = 300, 40
TABLE = Target("words", "embedding", "embedding", (V, D), padding_idx=0)
WORDS = Group("words", (TABLE,))
SPEC = GroupReduceSpec(rank=3, words=50, extra=6)
METHOD = get("group-reduce")


class Known:
    """A table and the counts of its rows."""

    def __init__(self, weight: Tensor, counts: Tensor | None = None) -> None:
        self.weight, self.counts = weight, counts

    def read(self, _: Target) -> Tensor:
        return self.weight

    def rows(self, _: Target, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]

    def second_moment(self, _: Target) -> None:
        return None

    def token_counts(self, _: Target) -> Tensor | None:
        return self.counts

    def sensitivity(self, _: Target) -> None:
        return None


def made(known: Known, spec: GroupReduceSpec = SPEC) -> tuple[Tensor, Tensor]:
    """The table of the factors, and which rows are frequent."""
    factors = METHOD.factorise(WORDS, spec, known, known)
    a, b, more, basis, frequent = (
        factors[f"words.{name}"] for name in ("a", "b", "frequent_a", "frequent_b", "frequent")
    )
    assert frequent.dtype == torch.int32
    return (a @ b).index_add(0, frequent.long(), more @ basis), frequent.long()


def test_a_table_of_that_form_is_recovered() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randperm(V, generator=generator)[:50].sort().values
    first = first[first != 0]
    weight = torch.randn(V, 3, generator=generator) @ torch.randn(3, D, generator=generator)
    weight[first] += torch.randn(len(first), 6, generator=generator) @ torch.randn(6, D, generator=generator)
    counts = torch.ones(V)
    counts[first] = 100.0
    spec = GroupReduceSpec(rank=3, words=len(first), extra=6)
    known = Known(weight.double(), counts)
    table, frequent = made(known, spec)
    assert torch.equal(frequent, first)
    torch.testing.assert_close(table, weight.double(), rtol=1e-5, atol=1e-5)
    assert METHOD.output_errors(WORDS, [spec], known, known) == pytest.approx([0.0], abs=1e-5)
    plain = get("low-rank").cost(WORDS, get("low-rank").parse_spec({"method": "low-rank", "rank": 3}))
    assert METHOD.cost(WORDS, spec).parameters == plain.parameters + 6 * (len(first) + D)


def test_frequent_words_are_kept_best_and_errors_are_as_predicted() -> None:
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(1)).double()
    counts = 1000.0 / torch.arange(1, V + 1)  # as Zipf has it
    known = Known(weight, counts)
    table, frequent = made(known)
    assert frequent.tolist() == list(range(1, 51))  # of these the padding does not count
    errors = (weight - table).norm(dim=1)
    assert errors[frequent].mean() < 0.92 * errors[51:].mean()
    predicted = METHOD.output_errors(WORDS, [SPEC], known, known)
    assert predicted == pytest.approx([output_error([(TABLE, weight, table)], known)], rel=1e-6)
    budget = METHOD.cost(WORDS, SPEC).parameters
    low = get("low-rank")
    plain = low.parse_spec({"method": "low-rank", "rank": budget // (V + D)})
    assert predicted[0] < 0.95 * low.output_errors(WORDS, [plain], known, known)[0]


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_a_table_of_low_rank_is_recovered_though_nothing_is_left_for_frequent_words(scale: float) -> None:
    """What is left is rounding noise, whose directions must not be counted twice."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(V, 4, generator=generator) @ torch.randn(4, D, generator=generator)
    weight[:50] *= scale
    spec = GroupReduceSpec(rank=8, words=50, extra=20)
    table, _ = made(Known(weight), spec)
    assert float((table - weight).norm() / weight.norm()) < 1e-5
    assert METHOD.errors(WORDS, [spec], Known(weight)) == pytest.approx([0.0], abs=1e-3)


def test_without_counts_the_first_rows_are_frequent() -> None:
    weight = torch.randn(V, D, generator=torch.Generator().manual_seed(2)).double()
    known = Known(weight)
    table, frequent = made(known)
    assert frequent.tolist() == list(range(1, 51))
    assert METHOD.errors(WORDS, [SPEC], known) == pytest.approx([float((weight - table).norm() / weight.norm())])


def test_candidates_lie_near_the_budget_and_small_budgets_are_plain() -> None:
    table = Group("words", (Target("words", "embedding", "embedding", (30522, 384)),))
    for share in (8, 19, 40):
        budget = table.parameters // share
        specs = METHOD.candidates(table, budget)
        assert len(specs) >= 4
        sizes = [METHOD.cost(table, spec).parameters for spec in specs]
        assert all(0.9 * budget < size <= budget for size in sizes)
        for spec in specs:
            METHOD.check(table, spec)
    (first, *_) = METHOD.candidates(table, 100)
    assert isinstance(first, GroupReduceSpec)
    assert (first.rank, first.words) == (1, None)


@pytest.mark.parametrize("ratio", [4, 8, 19])
def test_uniform_plans_take_the_preferred_form(ratio: float) -> None:
    """All forms have nearly one size: which of them is nearest to it is chance."""
    with torch.device("meta"):
        sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
        model = BertModel(BertConfig(**sizes))
    plan = make_plan(model, for_method("group-reduce", ratio))
    (words,) = (a for a in plan.assignments if a.group.role == "embedding")
    size = METHOD.cost(words.group, words.spec).parameters
    share = words.spec.rank * sum(words.group.shape) / size
    usual = words.group.shape[0] / 2 * (size / words.group.parameters) ** (2 / 3)
    assert 0.45 < share < 0.55
    assert words.spec.words / usual == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": 50, "extra": 6}, "give rank, of an embedding also words and extra"),
        ({"rank": 3, "words": 50}, "give rank, of an embedding also words and extra"),
        ({"rank": 3, "words": 300, "extra": 6}, "words 300 must be below 300"),
        ({"rank": 30, "words": 50, "extra": 20}, "must be at most 40"),
        ({"rank": 30, "words": 299, "extra": 10}, "saves no parameters"),
        ({"rank": 36}, "saves no parameters"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        METHOD.resolve(WORDS, GroupReduceOptions.model_validate(options))


def test_words_are_for_embeddings() -> None:
    linear = Group("layer", (Target("layer", "linear", "ffn", (48, 48)),))
    with pytest.raises(InputError, match="words and extra are for embeddings"):
        METHOD.check(linear, SPEC)
    with pytest.raises(InputError, match="give words and extra, or neither"):
        METHOD.parse_spec({"method": "group-reduce", "rank": 3, "words": 4})
