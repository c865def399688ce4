"""Every family of :mod:`families`: compressed by every method, saved, reloaded, trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Run, count
from families import FAMILIES, REFUSED, Family, table
from transformers import MODEL_MAPPING, AutoModel, PreTrainedModel

import compresskit
from compresskit.decomposers import FactorisedEmbedding, FactorisedLinear, TiedHead
from compresskit.decomposers.registry import METHODS
from compresskit.errors import InputError, WorkError
from compresskit.model.positions import positions
from compresskit.model.targets import find_targets, tied_heads
from compresskit.planning.stage import DEFAULTS
from compresskit.training.objective import Objective

ROOT = Path(__file__).parent.parent
PAIRS = [(family, method) for family in FAMILIES for method in METHODS.all()]


def _pairs() -> list[Any]:
    """Two methods for each family; the others are left to `make test-slow`."""
    several = len(METHODS.all())
    rare = [sum(divmod(number, several)) % several >= 2 for number in range(len(PAIRS))]
    return [pytest.param(*pair, marks=pytest.mark.sweep if r else ()) for pair, r in zip(PAIRS, rare, strict=True)]


TRIPLES = [(family, head, method) for family, method in PAIRS for head in FAMILIES[family].heads()]
#: The families whose embedding or attention is no ordinary one.
SPECIAL = ["t5 encoder", "mt5 encoder", "umt5 encoder", "bert-generation", "xlnet", "bros", "gemma3 (bidirectional)"]


def output(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(0)  # BigBird's random blocks
    found = model(**batch)
    return next(value for value in found.values() if torch.is_tensor(value))


def check(family: Family, head: str, method: str, folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Everything that must hold of a compressed model; returns the dense and the reloaded one."""
    dense, batch = family.build(head), family.batch(head)
    student = compresskit.compress(dense, method=method, ratio=1.3)
    assert count(dense) / count(student) >= 1.3
    student.save_pretrained(folder)
    again = compresskit.load(folder)
    ours, theirs = student.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert count(again) == count(student)
    with torch.no_grad():
        # Weights read from a file lie elsewhere in memory, which may change the last bit of a product.
        torch.testing.assert_close(output(again, batch), output(student, batch), rtol=1e-5, atol=1e-5)
    if type(dense.config) in MODEL_MAPPING and "DPR" not in head:  # its AutoModel is always the question encoder
        base = AutoModel.from_pretrained(folder).state_dict()
        inner = student.base_model.state_dict()
        assert all(torch.equal(inner[key], base[key]) for key in inner if key in base)
        assert inner.keys() & base.keys()
    again.train()
    for module in again.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    output(again, batch).square().sum().backward()
    factors = {n: p for n, p in again.named_parameters() if n.rpartition(".")[2] in ("a", "b", "core")}
    lost = {n for n, p in factors.items() if p.grad is None or not p.grad.any()}
    assert factors
    assert {name for name in lost if not re.search(family.idle, name)} == set()
    return dense, again.eval()


@pytest.mark.parametrize(("family", "method"), _pairs())
def test_family(family: str, method: str, tmp_path: Path) -> None:
    heads = FAMILIES[family].heads()  # one for each method, others for the next family
    number = list(FAMILIES).index(family) + list(METHODS.all()).index(method)
    check(FAMILIES[family], heads[number % len(heads)], method, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize(("family", "head", "method"), TRIPLES)
def test_every_head(family: str, head: str, method: str, tmp_path: Path) -> None:
    _, student = check(FAMILIES[family], head, method, tmp_path / "first")
    student.save_pretrained(tmp_path / "second")
    again = compresskit.load(tmp_path / "second")
    assert all(map(torch.equal, again.state_dict().values(), student.state_dict().values()))
    batch = FAMILIES[family].batch(head)
    with torch.no_grad():
        dense = output(compresskit.to_dense(again), batch)
        torch.testing.assert_close(dense, output(again, batch), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compressed_is_refused_in_one_line(name: str) -> None:
    family, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason) as error:
        compresskit.compress(family.build(family.heads()[0]), method="low-rank", ratio=1.1)
    assert "\n" not in str(error.value)


def test_the_way_to_the_encoder_of_a_model_with_a_decoder_is_said(bench_folder: Path, tmp_path: Path) -> None:
    model = REFUSED["t5 (encoder and decoder)"][0].build("T5ForConditionalGeneration")
    folder = tmp_path / "t5"
    model.save_pretrained(folder)
    says = r"holds a decoder.*its encoder alone can be read: in Python, transformers\.T5EncoderModel\.from_pretrained\("
    options: dict[str, Any] = {"task": "sst2", "data": bench_folder / "data"}
    for given in (folder, model):
        for call in (
            lambda given: compresskit.compress(given, method="low-rank", ratio=2),
            lambda given: compresskit.distill(bench_folder / "student", given, **options),
            lambda given: compresskit.evaluate(given, **options),
        ):
            with pytest.raises(InputError, match=says):
                call(given)
    encoder = transformers.T5EncoderModel.from_pretrained(folder)
    encoder.save_pretrained(tmp_path / "encoder")
    compresskit.compress(tmp_path / "encoder", method="low-rank", ratio=1.5)


@pytest.mark.parametrize("name", FAMILIES)
def test_as_many_tokens_as_a_model_takes(name: str) -> None:
    family = FAMILIES[name]
    head = family.heads()[0]
    model = family.build(head)
    limit = positions(model)
    with torch.no_grad():
        model(**family.batch(head, tokens=limit or 96))
        if limit is not None and name != "tapas":  # counts anew in every cell of a table
            with pytest.raises((RuntimeError, IndexError, ValueError)):
                model(**family.batch(head, tokens=limit + 1))


def test_the_families_are_listed() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    _, _, listed = text.partition("<!-- families: python tests/families.py -->\n")
    assert listed.startswith(table() + "\n"), "run `python tests/families.py` and paste what it prints"
    assert all(name.partition(" (")[0] in " ".join(text.split()) for name in REFUSED)


@pytest.mark.parametrize("name", ["bert", "rembert", "deberta-v2", "xlm", "modernbert"])
def test_a_tied_decoder_computes_with_the_factors_of_the_embedding(name: str, tmp_path: Path) -> None:
    dense, student = check(FAMILIES[name], "masked-lm", "low-rank", tmp_path)
    heads = tied_heads(dense)
    assert bool(heads) == (name != "rembert")  # whose decoder is a matrix of its own
    embedding = student.get_input_embeddings()
    assert isinstance(embedding, FactorisedEmbedding)
    for head in heads:
        tied = student.get_submodule(head)
        assert isinstance(tied, TiedHead)
        assert tied.embedding is embedding


@pytest.mark.parametrize("name", [*SPECIAL, "longformer", "yoso", "fnet"])
def test_a_step_of_distillation(name: str) -> None:
    from datasets import Dataset

    family = FAMILIES[name]
    teacher = family.build(family.heads()[0])
    student = compresskit.compress(teacher, method="kronecker", ratio=1.3)
    words = [f"w{i}" for i in range(160)]
    rows = Dataset.from_dict({"input_ids": torch.randint(5, 160, (8, 12)).tolist()})
    result = compresskit.distill(
        student, teacher, dataset=rows, tokenizer=word_tokenizer(words), max_steps=1, batch_size=4, device="cpu"
    )
    assert "loss hidden" not in " ".join(result.notes)
    loss = Objective(student, teacher, DEFAULTS["task"], ["input_ids"])
    assert ("attention" in loss.dropped) == (name in ("longformer", "yoso", "fnet")), loss.dropped
    if "attention" in loss.dropped:
        assert "attention maps" in loss.dropped["attention"]
        with pytest.raises(InputError, match="attention maps"):
            Objective(student, teacher, DEFAULTS["task"], ["input_ids"], explicit=["attention"])


@pytest.mark.sweep
@pytest.mark.parametrize("name", [name for name in SPECIAL if name != "bros"])
def test_export_to_onnx(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    student = compresskit.compress(family.build(family.heads()[0]), method="low-rank", ratio=1.3)
    student.save_pretrained(tmp_path / "student")
    exported = compresskit.export(tmp_path / "student", output=tmp_path / "onnx")  # refuses what differs
    assert exported.record["agreement"]["last_hidden_state"]["largest difference"] < 1e-4


def test_bros_cannot_be_exported_and_says_why(tmp_path: Path) -> None:
    student = compresskit.compress(FAMILIES["bros"].build("encoder"), method="low-rank", ratio=1.3)
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(WorkError, match="BrosModel cannot be written as ONNX: You have to specify bbox"):
        compresskit.export(tmp_path / "student", output=tmp_path / "onnx")


def word_tokenizer(words: list[str]) -> Any:
    from tokenizers import Tokenizer, models

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", *words[2:]])}
    inner = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


def test_embeddings_of_gemma_stay_scaled() -> None:
    family = FAMILIES["gemma3 (bidirectional)"]
    dense = family.build("Gemma3TextModel")
    student = compresskit.compress(dense, method="low-rank", ratio=1.3)
    ids = torch.arange(20)
    table = student.get_input_embeddings()
    assert isinstance(table, FactorisedEmbedding)
    torch.testing.assert_close(table(ids), table.dense_weight()[:20] * 32**0.5)
    again = compresskit.to_dense(student).get_input_embeddings()
    assert type(again) is type(dense.get_input_embeddings())
    torch.testing.assert_close(again(ids), table(ids))


def test_reading_the_dtype_of_a_weight_costs_nothing() -> None:
    family = FAMILIES["t5 encoder"]
    student = compresskit.compress(family.build("T5EncoderModel"), method="low-rank", ratio=1.3)
    layer = next(module for module in student.modules() if isinstance(module, FactorisedLinear))

    def refuse() -> torch.Tensor:
        raise AssertionError("multiplied out")

    layer.dense_weight = refuse  # type: ignore[method-assign]
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device, weight.shape) == (torch.float32, torch.device("cpu"), (32, 32))
    with pytest.raises(AssertionError, match="multiplied out"):
        weight.sum()


def test_shared_layers_are_factorised_once() -> None:
    dense = FAMILIES["albert"].build("masked-lm")
    student = compresskit.compress(dense, method="low-rank", ratio=1.3)
    inner = [m for m in student.modules() if isinstance(m, FactorisedLinear)]
    assert len(inner) == len([t for t in find_targets(dense) if t.kind == "linear" and t.role])
    assert student.config.num_hidden_layers == 2


def test_fused_matrices_of_modernbert_have_their_roles() -> None:
    roles = {target.name: target.role for target in find_targets(FAMILIES["modernbert"].build("classifier"))}
    assert roles["model.layers.0.attn.Wqkv"] == "attention"
    assert roles["model.layers.0.mlp.Wi"] == "ffn"


def test_convolutions_stay_dense_and_inspect_says_so(run: Run, tmp_path: Path) -> None:
    for name in ("squeezebert", "convbert"):
        dense = FAMILIES[name].build("classifier")
        dense.save_pretrained(tmp_path / name)
        shown = run("inspect", "--model", tmp_path / name)
        assert shown.code == 0, shown.err
        assert "a convolution stays dense" in " ".join(shown.out.split())
        student = compresskit.compress(dense, method="low-rank", ratio=1.3)
        kinds = (torch.nn.Conv1d, torch.nn.Conv2d)
        before, after = (sum(isinstance(m, kinds) for m in model.modules()) for model in (dense, student))
        assert before == after > 0
