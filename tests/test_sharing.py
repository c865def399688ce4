"""Parameters that several modules share beyond the family's own ties: counted, factorised, stored and trained once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import count, outputs, tiny_model, token_ids
from transformers import PreTrainedModel

import compresskit
from compresskit.calibration.statistics import Calibration, _watch
from compresskit.decomposers.registry import METHODS
from compresskit.model.targets import find_targets

LAYERS = 3


def _each(change: Callable[[Any, Any], None]) -> Callable[[Any], None]:
    """A change of every layer after the first, given the first."""

    def apply(layers: Any) -> None:
        for layer in layers[1:]:
            change(layer, layers[0])

    return apply


def _ffn(layer: Any, first: Any) -> None:
    layer.intermediate.dense.weight = first.intermediate.dense.weight
    layer.output.dense.weight = first.output.dense.weight


def _attention(layer: Any, first: Any) -> None:
    for name in ("query", "key", "value"):
        getattr(layer.attention.self, name).weight = getattr(first.attention.self, name).weight


def _key(layer: Any, first: Any) -> None:
    layer.attention.self.key.weight = layer.attention.self.query.weight


def _norm(layer: Any, first: Any) -> None:
    layer.output.LayerNorm = first.output.LayerNorm
    layer.intermediate.dense.bias = first.intermediate.dense.bias


def _module(layer: Any, first: Any) -> None:
    layer.intermediate = first.intermediate


def _layers(layers: Any) -> None:
    for number in range(1, len(layers)):
        layers[number] = layers[0]


SHARING: dict[str, Callable[[Any], None]] = {
    "weights of the FFN": _each(_ffn),
    "weights of attention": _each(_attention),
    "two weights of one layer": _each(_key),
    "norms and biases": _each(_norm),
    "modules": _each(_module),
    "whole layers": _layers,
}


def sharing_model(kind: str, head: str = "classifier") -> PreTrainedModel:
    model = tiny_model(head=head, num_hidden_layers=LAYERS)
    SHARING[kind](model.base_model.encoder.layer)
    return model


@pytest.mark.parametrize("method", METHODS.all())
@pytest.mark.parametrize("kind", SHARING)
def test_what_is_shared_stays_shared(kind: str, method: str, tmp_path: Path) -> None:
    head = "masked-lm" if kind == "weights of the FFN" else "classifier"
    dense = sharing_model(kind, head)
    before, expected = count(dense), outputs(dense)
    student = compresskit.compress(dense, method=method, ratio=3)
    assert torch.equal(outputs(dense), expected)
    assert before / count(student) >= 3
    student.save_pretrained(tmp_path / "first")
    again = compresskit.load(tmp_path / "first")
    assert count(again) == count(student)
    torch.testing.assert_close(outputs(again), outputs(student), rtol=1e-6, atol=1e-6)
    again.save_pretrained(tmp_path / "second")
    assert count(compresskit.load(tmp_path / "second")) == count(student)
    assert count(copy.deepcopy(again).half()) == count(student)
    base = transformers.AutoModel.from_pretrained(tmp_path / "first")
    for name, tensor in student.base_model.state_dict().items():
        assert torch.equal(base.state_dict()[name], tensor)
    back = compresskit.to_dense(again)
    assert count(back) == before
    torch.testing.assert_close(outputs(back), outputs(student), rtol=2e-3, atol=2e-4)
    again.train()(input_ids=token_ids())[0].sum().backward()
    compresskit.export(tmp_path / "first", output=tmp_path / "dense", format="dense")  # which cannot say what is shared
    ordinary = type(dense).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(outputs(ordinary), outputs(student), rtol=2e-3, atol=2e-4)


def test_a_shared_weight_is_one_target_with_all_its_places() -> None:
    targets = {target.name: target for target in find_targets(sharing_model("weights of the FFN"))}
    name = "bert.encoder.layer.{}.intermediate.dense"
    assert targets[name.format(0)].shared == tuple(map(name.format, range(1, LAYERS)))
    assert name.format(1) not in targets


def test_a_decoder_that_only_this_model_ties_stays_tied(tmp_path: Path) -> None:
    model = tiny_model(head="masked-lm", tie_word_embeddings=False)
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
    student = compresskit.compress(model, method="low-rank", ratio=3)
    student.save_pretrained(tmp_path)
    again = compresskit.load(tmp_path)
    assert count(again) == count(student)
    assert torch.equal(again.get_output_embeddings().weight, again.get_input_embeddings().weight)
    torch.testing.assert_close(outputs(again), outputs(student), rtol=1e-6, atol=1e-6)


def test_a_weight_that_another_kind_of_module_uses_stays_dense() -> None:
    model = tiny_model(num_hidden_layers=LAYERS)
    layers = model.encoder.layer
    model.register_parameter("borrowed", layers[0].output.dense.weight)
    assert "encoder.layer.0.output.dense" not in {target.name for target in find_targets(model)}
    student = compresskit.compress(model, method="low-rank", ratio=2)
    assert student.borrowed is student.encoder.layer[0].output.dense.weight


def test_calibration_sees_every_place() -> None:
    batch = {"input_ids": token_ids(), "attention_mask": torch.ones_like(token_ids())}

    def moment(model: PreTrainedModel) -> torch.Tensor:
        found = Calibration({})
        _watch(model, [batch], found, lambda *_: None, every_table=True)
        return torch.stack([m for n, m in found._moments.items() if "intermediate" in n]).sum(0)

    shared = sharing_model("weights of the FFN")
    apart = copy.deepcopy(shared)
    for layer in apart.base_model.encoder.layer:
        layer.intermediate.dense.weight = torch.nn.Parameter(layer.intermediate.dense.weight.clone())
    torch.testing.assert_close(moment(shared), moment(apart))
