"""Models as strangers give them: with adapters that were not merged, with heads that config.json does not announce."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run, outputs, refused, tiny_model
from datasets import Dataset
from safetensors import safe_open
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import BertTokenizer, DataCollatorWithPadding, PreTrainedModel, TrainingArguments

import compresskit
from compresskit import InputError
from compresskit.model import checkpoint


class LoraLinear(nn.Module):
    """What stands in a layer's place where an adapter was added."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return found


class PromptedClassifier(nn.Module):
    """The wrapper that prompt tuning puts around a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model, self.config = model, model.config
        self.prompt_encoder = nn.ModuleDict({"default": nn.Embedding(4, 48)})
        self.peft_config = {"default": SimpleNamespace(peft_type="PROMPT_TUNING")}


def with_layer(name: str = "bert.encoder.layer.0.attention.self") -> PreTrainedModel:
    model = tiny_model("bert", "classifier")
    parent = model.get_submodule(name)
    parent.query = LoraLinear(parent.query)
    return model


def from_a_package() -> PreTrainedModel:
    model = tiny_model("bert", "classifier")
    layer = type("Linear", (nn.Linear,), {"__module__": "peft.tuners.other.layer"})(48, 48)
    model.get_submodule("bert.encoder.layer.1.attention.self").value = layer
    return model


def marked() -> PreTrainedModel:
    model = tiny_model("bert", "classifier")
    model._hf_peft_config_loaded = True
    model.peft_config = {"default": SimpleNamespace(peft_type="LORA")}
    return model


def with_a_parameter() -> PreTrainedModel:
    model = tiny_model("bert", "classifier")
    model.get_submodule("bert.pooler").ia3_l = nn.Parameter(torch.ones(48))
    return model


@pytest.mark.parametrize("make", [with_layer, from_a_package, marked, with_a_parameter])
def test_adapters_that_are_not_merged_are_refused(make: Any, bench_folder: Path, tmp_path: Path) -> None:
    says = "holds an adapter .*merge it into the model first"
    tokenizer = BertTokenizer.from_pretrained(bench_folder / "model")
    options = {"task": "sst2", "data": bench_folder / "data", "tokenizer": tokenizer}
    plain = tiny_model("bert", "classifier")
    for model in (make(), PromptedClassifier(tiny_model("bert", "classifier"))):
        with pytest.raises(InputError, match=says):
            compresskit.compress(model, method="low-rank", ratio=2)
        with pytest.raises(InputError, match=says):
            compresskit.plan(model, method="low-rank", ratio=2)
        with pytest.raises(InputError, match=says):
            compresskit.evaluate(model, **options)
        with pytest.raises(InputError, match=says):
            compresskit.finetune(model, **options)
        for pair in ((plain, model), (model, plain)):
            with pytest.raises(InputError, match=says):
                compresskit.distill(*pair, allow_dense=True, **options)
            with pytest.raises(InputError, match=says):
                compresskit.DistillationTrainer(
                    *pair,
                    stage=compresskit.Stage(),
                    args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
                    train_dataset=few_rows(),
                    data_collator=DataCollatorWithPadding(tokenizer),
                )


def few_rows() -> Dataset:
    return Dataset.from_dict({"input_ids": [[2, 5, 3]] * 4, "labels": [0, 1, 0, 1]})


def test_a_merged_adapter_leaves_no_trace() -> None:
    model = with_layer()
    attention = model.get_submodule("bert.encoder.layer.0.attention.self")
    merged = attention.query.base_layer
    merged.weight.data += attention.query.lora_B["default"].weight @ attention.query.lora_A["default"].weight
    attention.query = merged
    compresskit.compress(model, method="low-rank", ratio=1.5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "weight"),
        (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "bias"),
        (parametrizations.weight_norm, "weight"),
        (torch.nn.utils.weight_norm, "weight"),
    ],
)
@pytest.mark.parametrize("place", ["encoder.layer.0.attention.self.query", "embeddings.LayerNorm"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed_are_refused(place: str, change: Any, name: str, bench_folder: Path) -> None:
    model = tiny_model("bert", "classifier")
    change(model.get_submodule(f"bert.{place}"))
    tokenizer = BertTokenizer.from_pretrained(bench_folder / "model")
    says = re.escape(f"bert.{place}.{name} is computed from other tensors (a parametrization or pruning mask)")
    with pytest.raises(InputError, match=says):
        compresskit.compress(model, method="low-rank", ratio=2)
    with pytest.raises(InputError, match=says):
        compresskit.finetune(model, task="sst2", data=bench_folder / "data", tokenizer=tokenizer)


def test_what_was_pruned_for_good_is_an_ordinary_weight() -> None:
    model = tiny_model("bert", "classifier")
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    prune.remove(prune.l1_unstructured(layer, "weight", 0.5), "weight")
    compresskit.compress(model, method="low-rank", ratio=1.5)


def test_a_model_that_was_trained_with_checkpointing_goes_every_further_way(bench_folder: Path) -> None:
    """It holds handles of hooks, which torch copies only once."""
    teacher = tiny_model("bert", "classifier")
    teacher.gradient_checkpointing_enable()
    student = compresskit.compress(teacher, method="low-rank", ratio=1.5)
    student.gradient_checkpointing_enable()
    again = copy.deepcopy(student)
    assert torch.equal(outputs(compresskit.to_dense(again)), outputs(compresskit.to_dense(student)))
    made = compresskit.distill(
        again,
        copy.deepcopy(teacher),
        task="sst2",
        data=bench_folder / "data",
        tokenizer=BertTokenizer.from_pretrained(bench_folder / "model"),
        max_length=16,
        max_steps=1,
        device="cpu",
        gradient_checkpointing=True,
    )
    smaller = compresskit.compress(compresskit.to_dense(made.model), method="low-rank", ratio=2)
    assert smaller.num_parameters() < student.num_parameters()


QUERY, WORDS = "bert.encoder.layer.1.attention.self.query", "bert.embeddings.word_embeddings"


def _with_own_forward(layer: nn.Module) -> None:
    before = layer.forward
    layer.forward = lambda x: 2 * before(x)  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        (QUERY, lambda layer: layer.register_forward_hook(lambda *_: None), "has a hook (<lambda>"),
        (QUERY, lambda layer: layer.register_forward_pre_hook(lambda *_: None), "has a hook"),
        (QUERY, lambda layer: layer.register_full_backward_hook(lambda *_: None), "has a hook"),
        (QUERY, lambda layer: layer.register_full_backward_pre_hook(lambda *_: None), "has a hook"),
        (QUERY, _with_own_forward, "has its own forward"),
        (WORDS, lambda layer: layer.register_forward_hook(lambda *_: None), "has a hook"),
        ("cls.predictions.decoder", lambda layer: layer.register_forward_hook(lambda *_: None), "has a hook"),
        (WORDS, lambda layer: setattr(layer, "max_norm", 0.1), "has max_norm=0.1"),
        (WORDS, lambda layer: setattr(layer, "scale_grad_by_freq", True), "has scale_grad_by_freq=True"),
        (WORDS, lambda layer: setattr(layer, "sparse", True), "has sparse=True"),
    ],
)
def test_what_a_layer_does_beside_its_product_is_not_lost(place: str, change: Any, says: str) -> None:
    """What takes its place would not do it: in the compressed model, and in the dense one that is made of that."""
    model = tiny_model("bert", "masked-lm")
    change(model.get_submodule(place))
    before = outputs(model)
    with pytest.raises(InputError, match=re.escape(f"{place} {says}")):
        compresskit.compress(model, method="low-rank", ratio=2, inplace=True)
    assert torch.equal(outputs(model), before)
    if place == QUERY:
        small = compresskit.compress(tiny_model("bert", "masked-lm"), method="low-rank", ratio=2)
        change(small.get_submodule(place))
        before = outputs(small)
        for undo in (compresskit.to_dense, lambda model: model.dequantize()):
            with pytest.raises(InputError, match=re.escape(f"{place} {says}")):
                undo(small)
        assert torch.equal(outputs(small), before)


def test_hooks_on_layers_that_stay_are_the_callers_affair() -> None:
    model, seen = tiny_model("bert", "classifier"), []
    model.classifier.register_forward_hook(lambda *_: seen.append(1))
    again = compresskit.to_dense(compresskit.compress(model, method="low-rank", ratio=2))
    seen.clear()
    again(torch.tensor([[5, 6]]))
    assert seen == [1]


def test_other_objects_are_refused(bench_folder: Path) -> None:
    for given in (nn.Linear(2, 2), 5):
        with pytest.raises(InputError, match="give a PreTrainedModel, a folder or a hub id, not a"):
            compresskit.evaluate(given, task="sst2", data=bench_folder / "data")  # type: ignore[arg-type]


@pytest.fixture
def unannounced(bench_folder: Path, tmp_path: Path) -> Path:
    """A trained classifier whose config.json does not say that it is one."""
    folder = tmp_path / "plain"
    shutil.copytree(bench_folder / "teacher", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


UNUSED = "unused: classifier.bias, classifier.weight; --as sequence-classification keeps it"


def test_compress_says_which_head_stays_unused(run: Run, unannounced: Path) -> None:
    options = ("compress", "--model", unannounced, "--method", "low-rank", "--ratio", 1.5, "--output")
    told = run(*options, "small")
    assert told.code == 0
    assert UNUSED in " ".join(told.out.split())
    kept = run(*options, "whole", "--as", "sequence-classification")
    assert kept.code == 0
    assert "unused" not in kept.out
    with safe_open("whole/model.safetensors", "pt") as stored:
        assert "classifier.weight" in set(stored.keys())
    with pytest.warns(UserWarning, match=UNUSED):
        compresskit.compress(unannounced, method="low-rank", ratio=1.5)


def test_evaluate_and_finetune_take_the_class(run: Run, unannounced: Path, bench_folder: Path) -> None:
    data = ("--task", "sst2", "--data", bench_folder / "data", "--max-length", 32)
    refused(run("evaluate", "--model", unannounced, *data), "BertModel has no head", "classifier.weight", "--as")
    scored = run("evaluate", "--model", unannounced, *data, "--as", "sequence-classification")
    assert scored.code == 0
    wanted = compresskit.evaluate(bench_folder / "teacher", task="sst2", data=bench_folder / "data", max_length=32)
    assert f"{100 * wanted.record['scores']['dev']['accuracy']:.2f}" in scored.out
    refused(
        run("evaluate", "--model", bench_folder / "model", *data, "--as", "sequence-classification"),
        "lacks classifier.bias, classifier.weight, so its head would answer at random",
    )
    refused(
        run("finetune", "--model", unannounced, *data, "--as", "masked-lm", "--output", "out"),
        "--as masked-lm: task sst2 needs sequence-classification",
    )
    trained = run(
        "finetune",
        "--model",
        unannounced,
        *data,
        "--as",
        "sequence-classification",
        "--max-steps",
        1,
        "--output",
        "out",
    )
    assert trained.code == 0
    assert "initialised at random" not in trained.out
    models = ("--teacher", unannounced, "--student", bench_folder / "student")
    taught = run("distill", *models, *data, "--output", "other")
    assert taught.code == 2
    assert "--as sequence-classification keeps it" in taught.err


def test_labels_of_an_unannounced_head_count(unannounced: Path) -> None:
    """Without this a head would be taken for new, and its classes be given other names."""
    names = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    with pytest.raises(InputError, match="labels differ"):
        checkpoint.read(unannounced, "sequence-classification", **names)
    turned = {"num_labels": 2, "id2label": {0: "positive", 1: "negative"}}
    held = checkpoint.read(unannounced, "sequence-classification").model.config.id2label
    assert checkpoint.read(unannounced, "sequence-classification", **turned).model.config.id2label == held


@pytest.mark.parametrize(
    "word", ["masked-lm", "sequence-classification", "token-classification", "question-answering", "multiple-choice"]
)
def test_every_head_is_found(word: str, tmp_path: Path) -> None:
    checkpoint.MODEL_CLASSES[word].from_config(tiny_model("bert").config).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert f"--as {word} keeps it" in checkpoint.read(tmp_path).unused_head
    assert checkpoint.read(tmp_path, word).unused_head == ""
    # A class that is announced, but not that of the head.
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    assert f"--as {word} keeps it" in checkpoint.read(tmp_path).unused_head
