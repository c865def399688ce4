"""Compress, save, reload: every family and head, bit for bit."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, HEADS, count, every_pair, outputs, tiny_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel

import compresskit
from compresskit import InputError
from compresskit.decomposers import FactorisedEmbedding, FactorisedLinear, TiedHead
from compresskit.decomposers.registry import METHODS
from compresskit.model import checkpoint
from compresskit.model.quantizer import quantizer_of
from compresskit.model.targets import find_targets
from compresskit.planning.recipe import Recipe

METHODS = list(METHODS.all())


def factorised(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FactorisedLinear | FactorisedEmbedding)}


@pytest.mark.parametrize(("family", "head", "method"), every_pair(FAMILIES, HEADS, METHODS))
def test_compress_save_reload(family: str, head: str, method: str, tmp_path: Path) -> None:
    dense = tiny_model(family, head)
    before = copy.deepcopy(dense.state_dict())
    student = compresskit.compress(dense, method=method, ratio=2.5)

    assert type(student) is type(dense)
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())  # untouched
    assert count(dense) / count(student) >= 2.5
    assert set(factorised(student)) == {target.name for target in find_targets(dense) if target.role is not None}
    expected = outputs(student)
    assert not torch.equal(expected, outputs(dense))

    student.save_pretrained(tmp_path / "one")
    again = HEADS[head].from_pretrained(tmp_path / "one")
    assert type(again) is type(dense)
    assert torch.equal(outputs(again), expected)
    assert count(again) == count(student) == count(compresskit.load(tmp_path / "one"))
    again.save_pretrained(tmp_path / "two")
    assert torch.equal(outputs(compresskit.load(tmp_path / "two")), expected)
    assert (tmp_path / "one" / "config.json").read_bytes() == (tmp_path / "two" / "config.json").read_bytes()
    assert not list(tmp_path.glob("*/*.bin"))


@pytest.mark.parametrize(("family", "head", "method"), every_pair(FAMILIES, HEADS, METHODS))
def test_to_dense_is_an_ordinary_model(family: str, head: str, method: str, tmp_path: Path) -> None:
    student = compresskit.compress(tiny_model(family, head), method=method, ratio=2.5)
    expected = outputs(student)
    dense = compresskit.to_dense(student)
    assert not factorised(dense)
    assert factorised(student)
    torch.testing.assert_close(outputs(dense), expected, rtol=1e-4, atol=1e-5)
    assert count(dense) == count(tiny_model(family, head))  # ties are ties again
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    torch.testing.assert_close(outputs(HEADS[head].from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-5)

    assert student.dequantize() is student
    assert not factorised(student)
    torch.testing.assert_close(outputs(student), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "head", "method"), every_pair(FAMILIES, HEADS, METHODS))
def test_folder_loads_under_other_heads(family: str, head: str, method: str, tmp_path: Path) -> None:
    student = compresskit.compress(tiny_model(family, head), method=method, ratio=2)
    student.save_pretrained(tmp_path)
    hidden = student.base_model(input_ids=token_ids())[0]
    for other in HEADS:
        loaded = HEADS[other].from_pretrained(tmp_path)
        assert torch.equal(loaded.base_model(input_ids=token_ids())[0], hidden)
        assert all(parameter.isfinite().all() for parameter in loaded.parameters())
        if other == "masked-lm" and head != "masked-lm":
            assert loaded.get_output_embeddings().bias.abs().sum() == 0
        if other == "masked-lm":
            assert any(isinstance(module, TiedHead) for module in loaded.modules())


def test_tied_decoder_neither_grows_nor_forms_the_table(tmp_path: Path) -> None:
    dense = tiny_model("bert", "masked-lm")
    student = compresskit.compress(dense, method="low-rank", ratio=2.5)
    decoder = student.get_output_embeddings()
    assert isinstance(decoder, TiedHead)
    assert [name for name, _ in decoder.named_parameters()] == ["bias"]
    assert decoder.bias is student.cls.predictions.bias
    table = student.get_input_embeddings()
    expected = torch.nn.functional.linear(torch.ones(2, 48), table.dense_weight(), decoder.bias)
    torch.testing.assert_close(decoder(torch.ones(2, 48)), expected)
    # Training the head trains the embedding: there is one set of factors.
    decoder(torch.ones(2, 48)).sum().backward()
    assert table.a.grad is not None
    twin = copy.deepcopy(student)
    assert twin.get_output_embeddings().embedding is twin.get_input_embeddings()
    student.tie_weights()  # what accelerate and resizing call: must not resurrect the dense tie
    student.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not any(tensor.shape[-1] == 48 and tensor.shape[0] == 499 for tensor in stored.values())


def test_untied_decoder_is_a_head_of_its_own(tmp_path: Path) -> None:
    dense = tiny_model("bert", "masked-lm", tie_word_embeddings=False)
    roles = {target.name: target.role for target in find_targets(dense)}
    assert roles["cls.predictions.decoder"] == "head"
    student = compresskit.compress(dense, method="low-rank", ratio=3)
    student.save_pretrained(tmp_path)
    assert torch.equal(outputs(compresskit.load(tmp_path)), outputs(student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    dense = tiny_model().to(dtype)
    dense.save_pretrained(tmp_path / "dense")
    student = compresskit.compress(tmp_path / "dense", method="kronecker", ratio=2)
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}
    student.save_pretrained(tmp_path / "small")
    again = compresskit.load(tmp_path / "small")
    assert again.dtype == dtype
    assert torch.equal(outputs(again), outputs(student))
    assert again.float().dtype == torch.float32  # a quantised model would refuse
    assert again.half().dtype == torch.float16


def test_low_precision_weights_are_factorised_in_high_precision() -> None:
    dense = tiny_model()
    exact = compresskit.compress(dense.to(torch.bfloat16).float(), method="low-rank", ratio=2)
    rounded = compresskit.compress(dense.to(torch.bfloat16), method="low-rank", ratio=2)
    for (name, one), two in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        torch.testing.assert_close(one.to(torch.bfloat16), two, rtol=1e-2, atol=1e-3, msg=name)


def test_sharded_and_bin_checkpoints(tmp_path: Path) -> None:
    dense = tiny_model("bert", "classifier")
    dense.save_pretrained(tmp_path / "whole")
    dense.save_pretrained(tmp_path / "shards", max_shard_size="50kB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    dense.config.save_pretrained(tmp_path / "bin")
    torch.save(dense.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    results = [
        outputs(compresskit.compress(tmp_path / kind, method="low-rank", ratio=2))
        for kind in ("whole", "shards", "bin")
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    student = compresskit.compress(dense, method="low-rank", ratio=2)
    student.save_pretrained(tmp_path / "small-shards", max_shard_size="20kB")
    assert len(list((tmp_path / "small-shards").glob("*.safetensors"))) > 1
    assert torch.equal(outputs(compresskit.load(tmp_path / "small-shards")), results[0])


def test_the_student_shares_nothing_with_the_dense_model() -> None:
    dense = tiny_model("bert", "masked-lm")
    rules = [{"role": "ffn", "method": "low-rank", "rank": 4}]  # everything else stays dense
    recipe = Recipe.model_validate({"version": 1, "name": "ffn-only", "rules": rules})
    student = compresskit.compress(dense, recipe=recipe)
    shared = {p.data_ptr() for p in dense.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert not shared
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight  # its own tie is kept


def test_inplace_changes_the_given_model() -> None:
    dense = tiny_model()
    assert compresskit.compress(dense, method="low-rank", ratio=2, inplace=True) is dense
    assert factorised(dense)


def test_training_mode_and_frozen_parameters_are_kept() -> None:
    dense = tiny_model().train()
    dense.encoder.layer[0].requires_grad_(False)
    student = compresskit.compress(dense, method="low-rank", ratio=2)
    assert all(module.training for module in student.modules())
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in student.named_parameters() if name.startswith("encoder.layer.0.")}


@pytest.mark.parametrize("method", METHODS)
def test_trainer_trains_a_reloaded_model(method: str, tmp_path: Path) -> None:
    compresskit.compress(tiny_model("bert", "classifier"), method=method, ratio=2).save_pretrained(tmp_path / "small")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    before = copy.deepcopy(model.state_dict())
    rows = [{"input_ids": ids, "labels": int(ids[0]) % 2} for ids in token_ids(16, 9)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=3, per_device_train_batch_size=8, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key for key in before if key.endswith((".a", ".b"))} <= changed
    model.save_pretrained(tmp_path / "trained")
    torch.testing.assert_close(outputs(compresskit.load(tmp_path / "trained")), outputs(model.eval()))


@pytest.mark.parametrize("extra", [{}, {"bert.pooler.dense.bias": torch.ones(48)}], ids=["own", "kept"])
def test_a_given_state_dict_is_what_is_saved(extra: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Loops of one's own give that of a sharded model, or the mean over training."""
    student = compresskit.compress(tiny_model("bert", "masked-lm"), method="low-rank", ratio=2)
    quantizer_of(student).extra_tensors = extra
    other = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    student.save_pretrained(tmp_path / "given", state_dict=other.state_dict())
    student.save_pretrained(tmp_path / "by place", True, other.state_dict())
    student.save_pretrained(tmp_path / "own")
    for name, expected in (("given", other), ("by place", other), ("own", student)):
        again = compresskit.load(tmp_path / name)
        assert torch.equal(outputs(again), outputs(expected))
        assert quantizer_of(again).extra_tensors.keys() == extra.keys()
    dense = compresskit.to_dense(student)
    dense.save_pretrained(tmp_path / "dense", state_dict={k: 2 * v for k, v in dense.state_dict().items()})
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path / "dense").embeddings.LayerNorm.bias,
        2 * dense.get_submodule("bert.embeddings.LayerNorm").bias,
    )


def test_kept_tensors_of_the_base_model(tmp_path: Path) -> None:
    """bert-base-uncased is stored as a masked-LM with a pooler that this class does not use."""
    full = transformers.BertForPreTraining(tiny_model().config)
    state = {key: value.clone() for key, value in full.state_dict().items() if "decoder" not in key}
    folder = tmp_path / "dense"
    full.config.architectures = ["BertForMaskedLM"]
    full.config.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    read = checkpoint.read(folder)
    assert type(read.model).__name__ == "BertForMaskedLM"
    assert set(read.kept) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}

    from compresskit.planning.apply import apply_plan
    from compresskit.planning.planner import make_plan
    from compresskit.planning.recipe import for_method

    apply_plan(read.model, make_plan(read.model, for_method("low-rank", 2)))
    checkpoint.save(read, tmp_path / "small")
    base = AutoModel.from_pretrained(tmp_path / "small")
    assert torch.equal(base.pooler.dense.weight, full.bert.pooler.dense.weight)
    assert type(compresskit.load(tmp_path / "small")).__name__ == "BertForMaskedLM"
    compresskit.compress(folder, method="low-rank", ratio=2).save_pretrained(tmp_path / "from-python")
    assert torch.equal(
        AutoModel.from_pretrained(tmp_path / "from-python").pooler.dense.weight, base.pooler.dense.weight
    )


def test_layers_beyond_the_configuration_are_noted(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    (tiny_folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    (note,) = checkpoint.read(tiny_folder).notes
    assert "not used by this model: encoder.layer.1." in note


def test_a_head_that_is_taken_for_another_is_named(tmp_path: Path) -> None:
    """Heads for classes call their last layer alike: one made for whole texts would tag words, without a word."""
    tiny_model(head="classifier", num_labels=3).save_pretrained(tmp_path / "texts")
    says = "its head (classifier.bias, classifier.weight) is that of BertForSequenceClassification, and was taken for"
    for given in ({"as_class": "token-classification"}, {"adopt": tiny_model(head="tokens", num_labels=3)}):
        notes = checkpoint.read(tmp_path / "texts", **given).notes
        assert any(says in note for note in notes), notes
    assert not any("taken for" in note for note in checkpoint.read(tmp_path / "texts").notes)
    changes = {"adopt": tiny_model(head="tokens", num_labels=3), "new_head": True}
    assert not any("taken for" in note for note in checkpoint.read(tmp_path / "texts", **changes).notes)


def test_another_class_can_be_asked_for(tiny_folder: Path) -> None:
    read = checkpoint.read(tiny_folder, "sequence-classification")
    assert type(read.model).__name__ == "BertForSequenceClassification"
    assert "classifier.weight" in read.notes[0]


@pytest.mark.parametrize(
    "imports",
    [
        pytest.param("import compresskit", marks=pytest.mark.sweep),
        "import transformers; transformers.AutoModel; import compresskit",
    ],
)
def test_import_is_what_makes_transformers_read_a_folder(imports: str, tmp_path: Path) -> None:
    """In both orders of import, in a fresh interpreter."""
    student = compresskit.compress(tiny_model(), method="kronecker", ratio=2)
    student.save_pretrained(tmp_path)
    torch.save(outputs(student), tmp_path / "expected.pt")
    code = """
import sys, torch, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1])
with torch.no_grad():
    got = model(input_ids=torch.load(sys.argv[1] + "/ids.pt"))[0]
assert torch.equal(got, torch.load(sys.argv[1] + "/expected.pt"))
"""
    torch.save(token_ids(), tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", imports + code, str(tmp_path)], check=True)


def test_load_is_strict(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        compresskit.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is not compressed"):
        compresskit.load(tiny_folder)
    student = compresskit.compress(tiny_model(), method="low-rank", ratio=2)
    student.save_pretrained(tmp_path / "small")
    weights = tmp_path / "small" / "model.safetensors"
    tensors = load_file(weights)
    lost = {key: value for key, value in tensors.items() if key != "encoder.layer.1.output.dense.a"}
    save_file(lost, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weight encoder\.layer\.1\.output\.dense\.a"):
        compresskit.load(tmp_path / "small")
    save_file(tensors | {"junk": torch.ones(2)}, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds an unknown weight, junk"):
        compresskit.load(tmp_path / "small")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="damaged or incomplete"):
        compresskit.load(tmp_path / "small")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"base": {"encoder.layer.9.output.dense": {"method": "low-rank", "rank": 3}}}, "does not have"),
        ({"base": {"encoder.layer.0.output.dense": {"method": "magic"}}}, "unknown method 'magic'"),
        ({"base": {"encoder.layer.0.output.dense": {"method": "low-rank", "rank": 10**9}}}, "saves no parameters"),
        ({"base": {"encoder.layer.0.output.dense": {"method": "low-rank", "rank": "3x"}}}, "low-rank spec: rank"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change: dict, message: str, tmp_path: Path) -> None:
    compresskit.compress(tiny_model(), method="low-rank", ratio=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        compresskit.load(tmp_path)
    with pytest.raises(InputError, match=message):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_a_factorised_vocabulary_keeps_its_size(method: str, tmp_path: Path) -> None:
    student = compresskit.compress(tiny_model("bert", "masked-lm"), method=method, ratio=2)
    student.save_pretrained(tmp_path)
    for model in (student, compresskit.load(tmp_path), copy.deepcopy(student)):
        assert model.resize_token_embeddings(499) is model.resize_token_embeddings()
        with pytest.raises(InputError, match="499 rows cannot become 510: add tokens to the dense model"):
            model.resize_token_embeddings(510)
        with pytest.raises(InputError, match="cannot become more"):
            model.resize_token_embeddings(pad_to_multiple_of=8)
        with pytest.raises(InputError, match="cannot become 510"):
            model.base_model.resize_token_embeddings(510)
    dense = compresskit.to_dense(student)
    dense.resize_token_embeddings(510)
    assert dense.get_input_embeddings().num_embeddings == 510
    with pytest.raises(InputError, match="is compressed already; start from the dense checkpoint"):
        compresskit.compress(student, method=method, ratio=3)


@pytest.mark.parametrize("method", METHODS)
def test_a_pooler_survives_a_class_that_has_none(method: str, tmp_path: Path) -> None:
    """From base model through masked-LM (general stage) to classifier (task stage)."""
    compresskit.compress(tiny_model(), method=method, ratio=2).save_pretrained(tmp_path / "base")
    before = compresskit.load(tmp_path / "base").pooler.dense.dense_weight()
    words = checkpoint.read(tmp_path / "base", compressed=True, adopt=tiny_model("bert", "masked-lm"))
    (tmp_path / "words").mkdir()
    checkpoint.save(words, tmp_path / "words")
    classes = checkpoint.read(tmp_path / "words", compressed=True, adopt=tiny_model("bert", "classifier"))
    assert torch.equal(classes.model.bert.pooler.dense.dense_weight(), before)


@pytest.mark.parametrize("method", METHODS)
def test_a_factorised_layer_that_no_file_holds_is_initialised(method: str, tmp_path: Path) -> None:
    """Saved by transformers from a class without it: like any new head, not whatever was in memory."""
    compresskit.compress(tiny_model("bert", "masked-lm"), method=method, ratio=2).save_pretrained(tmp_path / "words")
    AutoModel.from_pretrained(tmp_path / "words").save_pretrained(tmp_path / "base")
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "base")
    new = again.cls.predictions.transform.dense
    assert not new.bias.any()
    assert float(new.dense_weight().std()) == pytest.approx(0.02, rel=1e-3)
