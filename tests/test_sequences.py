"""What is public, one after the other on one model, in any order: it works, or is refused in one clear line."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, HEADS, tiny_model, weights
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from transformers import PreTrainedModel

import compresskit
from compresskit.decomposers import FactorisedEmbedding
from compresskit.decomposers.registry import METHODS
from compresskit.errors import InputError, UnreachableError
from compresskit.model.checkpoint import save
from compresskit.model.quantizer import is_compressed
from compresskit.pipeline import Request
from compresskit.planning.recipe import Recipe

#: What 16 bits may lose of outputs, relative to the largest.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
IDS = torch.arange(5, 25)[None]


class Sequences(RuleBasedStateMachine):
    """One model, its outputs as they should be, and whether it is compressed."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.made = 0
        self.traced = False

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    def folder(self) -> Path:
        self.made += 1
        return self.root / str(self.made)

    def outputs(self, model: Any = None) -> torch.Tensor:
        with torch.no_grad():
            return (self.model if model is None else model)(input_ids=IDS)[0].float()

    def hold(self, model: PreTrainedModel, compressed: bool) -> None:
        """From now on this is the model; the outputs are to be what they were."""
        self.model, self.compressed = model.eval(), compressed

    def lose(self, dtype: torch.dtype) -> None:
        """From now on weights have this dtype; what they lost stays lost."""
        assert {parameter.dtype for parameter in self.model.parameters()} == {dtype}
        self.tolerance = max(self.tolerance, TOLERANCE[dtype])
        self.dtype = dtype

    @initialize(
        family=st.sampled_from(sorted(FAMILIES)),
        head=st.sampled_from(sorted(HEADS)),
        method=st.sampled_from(sorted(METHODS.all())),
        dense_words=st.booleans(),
    )
    def compress(self, family: str, head: str, method: str, dense_words: bool) -> None:
        words = [{"role": "embedding", "method": "dense"}] if dense_words else []
        rules = [*words, {"role": ["embedding", "attention", "ffn"], "method": method}]
        recipe = Recipe.model_validate({"version": 1, "name": "some", "ratio": 1.3, "rules": rules})
        self.model = compresskit.compress(tiny_model(family, head), recipe=recipe)
        self.compressed, self.dtype, self.tolerance = True, torch.float32, TOLERANCE[torch.float32]
        self.expected = self.outputs()

    @invariant()
    def computes_what_it_did(self) -> None:
        if not hasattr(self, "model"):
            return
        assert is_compressed(self.model) == self.compressed
        assert self.model.dtype == self.dtype
        got = self.outputs()
        words = min(got.shape[-1], self.expected.shape[-1])  # a larger vocabulary has more logits
        near = (got[..., :words] - self.expected[..., :words]).abs().max()
        assert near <= self.tolerance * (1 + self.expected.abs().max()), near

    @rule()
    def save_and_load(self) -> None:
        folder = self.folder()
        self.model.save_pretrained(folder)
        if self.compressed:
            again = compresskit.load(folder)
        else:
            with pytest.raises(InputError, match="is not compressed"):
                compresskit.load(folder)
            again = type(self.model).from_pretrained(folder)
        ours, theirs = self.model.state_dict(), again.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        self.hold(again, self.compressed)

    @rule()
    def save(self) -> None:
        self.model.save_pretrained(self.folder())

    @rule(dtype=st.sampled_from([None, torch.float16, torch.float32]))
    def dequantize(self, dtype: torch.dtype | None) -> None:
        if not self.compressed:
            with pytest.raises(ValueError, match="quantize"):
                self.model.dequantize()
            return
        self.hold(self.model.dequantize() if dtype is None else self.model.dequantize(dtype=dtype), False)
        self.lose(self.dtype if dtype is None else dtype)

    @rule()
    def to_dense(self) -> None:
        if not self.compressed:
            with pytest.raises(InputError, match="is not compressed"):
                compresskit.to_dense(self.model)
            return
        dense = compresskit.to_dense(self.model)
        assert is_compressed(self.model)  # the one that was given stays as it is
        self.hold(dense, False)

    @rule(more=st.integers(0, 9))
    def resize(self, more: int) -> None:
        rows = self.model.config.vocab_size
        if more and isinstance(self.model.get_input_embeddings(), FactorisedEmbedding):
            with pytest.raises(InputError, match="cannot become"):
                self.model.resize_token_embeddings(rows + more)
            return
        self.model.resize_token_embeddings(rows + more, mean_resizing=False)
        assert self.model.config.vocab_size == rows + more

    @rule(dtype=st.sampled_from(sorted(TOLERANCE, key=str)), by_name=st.booleans())
    def cast(self, dtype: torch.dtype, by_name: bool) -> None:
        names = {torch.float64: "double", torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat16"}
        model = getattr(self.model, names[dtype])() if by_name else self.model.to(dtype)
        assert model is self.model
        self.lose(dtype)

    @precondition(lambda self: not self.traced)  # dynamo takes seconds
    @rule(in_place=st.booleans())
    def compile(self, in_place: bool) -> None:
        self.traced = True
        before = self.outputs()
        if in_place:
            self.model.compile(backend="eager")
        compiled = self.model if in_place else torch.compile(self.model, backend="eager")
        torch.testing.assert_close(self.outputs(compiled), before)
        if not in_place:
            with pytest.raises(InputError, match="give a PreTrainedModel"):
                compresskit.compress(compiled, method="low-rank", ratio=2)
            with pytest.raises(InputError, match="give the PreTrainedModel itself"):
                compresskit.to_dense(compiled)

    @rule()
    def deepcopy(self) -> None:
        twin = copy.deepcopy(self.model)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        self.hold(twin, self.compressed)

    @rule()
    def export(self) -> None:
        folder, dense = self.folder(), self.folder()
        self.model.save_pretrained(folder)
        if not self.compressed:
            with pytest.raises(InputError, match="is not compressed"):
                compresskit.export(folder, output=dense, format="dense")
            return
        compresskit.export(folder, output=dense, format="dense")
        self.hold(type(self.model).from_pretrained(dense), False)

    @rule(method=st.sampled_from(sorted(METHODS.all())))
    def compress_again(self, method: str) -> None:
        if self.compressed:
            with pytest.raises(InputError, match="is compressed already"):
                compresskit.compress(self.model, method=method, ratio=2)
            return
        try:
            model = compresskit.compress(self.model, method=method, ratio=1.5, inplace=True)
        except UnreachableError:
            return
        assert model is self.model
        self.hold(model, True)
        self.expected = self.outputs()

    @rule()
    def ties(self) -> None:
        self.model.tie_weights()
        self.model.load_state_dict(self.model.state_dict())

    @rule()
    def plan(self) -> None:
        if self.compressed:
            with pytest.raises(InputError, match="is compressed already"):
                compresskit.plan(self.model, method="low-rank", ratio=2)
        else:
            assert compresskit.plan(self.model, method="low-rank", ratio=1.5).ratio >= 1.5


def test_any_sequence_of_public_methods_works_or_is_refused() -> None:
    run_state_machine_as_test(
        Sequences,
        settings=settings(
            max_examples=8,
            stateful_step_count=10,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],
        ),
    )


@pytest.mark.sweep
def test_long_sequences_of_public_methods_work_or_are_refused() -> None:
    run_state_machine_as_test(Sequences, settings=settings(max_examples=200, stateful_step_count=40, deadline=None))


@pytest.mark.parametrize("dtype", [torch.float16, "float16"])
def test_a_saved_model_is_dequantized_in_its_own_dtype_or_the_one_asked_for(dtype: Any, tmp_path: Path) -> None:
    model = compresskit.compress(tiny_model(), method="low-rank", ratio=2)
    model.save_pretrained(tmp_path)  # leaves a text in config.dtype
    own = copy.deepcopy(model).half().dequantize()
    assert {parameter.dtype for parameter in own.parameters()} == {torch.float16}
    asked = copy.deepcopy(model).dequantize(dtype=dtype)
    assert {parameter.dtype for parameter in asked.parameters()} == {torch.float16}
    with pytest.raises(InputError, match="'int8': give a floating point dtype"):
        model.dequantize(dtype="int8")
    assert is_compressed(model)


def test_what_a_class_does_not_use_survives_any_number_of_saves(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "dense")  # with a pooler, which a masked LM lacks
    work = Request(model=tmp_path / "dense", as_class="masked-lm", method="low-rank", ratio=2).read()
    checkpoint = work.checkpoint
    work.apply(work.plan())
    save(checkpoint, tmp_path / "0")
    for number in range(3):
        compresskit.load(tmp_path / str(number)).half().save_pretrained(tmp_path / str(number + 1))
    first, last = weights(tmp_path / "0"), weights(tmp_path / "3")
    assert "bert.pooler.dense.bias" in first
    assert first.keys() == last.keys()
    assert {tensor.dtype for tensor in last.values()} == {torch.float16}


@pytest.mark.parametrize("method", sorted(METHODS.all()))
def test_what_was_frozen_is_frozen_in_the_dense_model(method: str) -> None:
    frozen = compresskit.compress(tiny_model().requires_grad_(False), method=method, ratio=2)
    assert not any(parameter.requires_grad for parameter in compresskit.to_dense(frozen).parameters())
    assert all(parameter.requires_grad for parameter in compresskit.to_dense(frozen.requires_grad_()).parameters())
