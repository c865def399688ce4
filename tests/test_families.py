"""Eighteen families, small and random: compressed 2x by every method, saved, reloaded, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Run, count, every_pair, token_ids
from transformers import PreTrainedModel

import compresskit
from compresskit.decomposers import FactorisedEmbedding, FactorisedLinear, TiedHead
from compresskit.decomposers.registry import METHODS
from compresskit.model.targets import find_targets, tied_heads

SIZES = {
    "vocab_size": 499,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
DEBERTA = {"pooler_hidden_size": 48, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
#: Configuration class and what differs from SIZES. Some embeddings are narrower than the hidden size, as in real ones.
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (transformers.BertConfig, {}),
    "roberta": (transformers.RobertaConfig, {}),
    "distilbert": (transformers.DistilBertConfig, {}),
    "electra": (transformers.ElectraConfig, {"embedding_size": 24}),
    "albert": (transformers.AlbertConfig, {"embedding_size": 24}),
    "mpnet": (transformers.MPNetConfig, {}),
    "deberta": (transformers.DebertaConfig, {**DEBERTA, "max_relative_positions": 20}),
    "deberta-v2": (transformers.DebertaV2Config, {**DEBERTA, "position_buckets": 8, "max_relative_positions": 20}),
    "xlm-roberta": (transformers.XLMRobertaConfig, {}),
    "camembert": (transformers.CamembertConfig, {}),
    "mobilebert": (
        transformers.MobileBertConfig,
        {"embedding_size": 24, "intra_bottleneck_size": 24, "true_hidden_size": 24, "intermediate_size": 48},
    ),
    "modernbert": (transformers.ModernBertConfig, {**SPECIAL, "global_attn_every_n_layers": 2}),
    "ernie": (transformers.ErnieConfig, {}),
    "megatron-bert": (transformers.MegatronBertConfig, {}),
    "roformer": (transformers.RoFormerConfig, {"embedding_size": 24}),
    "layoutlm": (transformers.LayoutLMConfig, {"max_2d_position_embeddings": 32}),
    "convbert": (transformers.ConvBertConfig, {"embedding_size": 24}),
    "squeezebert": (transformers.SqueezeBertConfig, {"embedding_size": 48, "vocab_size": 1499}),
}
HEADS = {
    "classifier": transformers.AutoModelForSequenceClassification,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "tokens": transformers.AutoModelForTokenClassification,
    "answers": transformers.AutoModelForQuestionAnswering,
    "choice": transformers.AutoModelForMultipleChoice,
}


def build(family: str, head: str) -> PreTrainedModel:
    config_class, changes = FAMILIES[family]
    if family == "distilbert":
        sizes = {"vocab_size": 499, "dim": 48, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
        sizes["max_position_embeddings"] = 40
    else:
        sizes = SIZES | changes
    if config_class not in HEADS[head]._model_mapping:
        pytest.skip(f"transformers has no {head} for {family}")
    torch.manual_seed(0)
    model: PreTrainedModel = HEADS[head].from_config(config_class(**sizes)).eval()
    return model


def check(dense: PreTrainedModel, method: str, folder: Path, ids: torch.Tensor) -> PreTrainedModel:
    """Everything that must hold of a compressed model; returns it."""
    student = compresskit.compress(dense, method=method, ratio=2)
    assert count(dense) / count(student) >= 2
    student.save_pretrained(folder)
    again = compresskit.load(folder)
    ours, theirs = student.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    with torch.no_grad():
        expected, got = student(input_ids=ids)[0], again(input_ids=ids)[0]
        # Weights read from a file lie elsewhere in memory, which may change the last bit of a product.
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        dense_again = compresskit.to_dense(again)(input_ids=ids)[0]
        torch.testing.assert_close(dense_again, expected, rtol=2e-3, atol=2e-4)
    return again


def factors_without_gradient(model: PreTrainedModel, ids: torch.Tensor) -> set[str]:
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model(input_ids=ids)[0].square().sum().backward()
    factors = {n: p for n, p in model.named_parameters() if n.rpartition(".")[2] in ("a", "b", "core")}
    assert factors
    return {name for name, factor in factors.items() if factor.grad is None or not factor.grad.any()}


@pytest.mark.parametrize(("family", "head", "method"), every_pair(FAMILIES, ["classifier", "masked-lm"], METHODS.all()))
def test_family(family: str, head: str, method: str, tmp_path: Path) -> None:
    dense = build(family, head)
    heads = tied_heads(dense)
    model = check(dense, method, tmp_path, token_ids())
    if head == "masked-lm":
        assert heads, "every masked-LM here ties its decoder to the embedding"
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, FactorisedEmbedding)
        for name in heads:
            tied = model.get_submodule(name)
            assert isinstance(tied, TiedHead)
            assert tied.embedding is embedding
    lost = factors_without_gradient(model, token_ids())
    if head == "masked-lm":  # some hold a pooler that it does not use
        lost = {name for name in lost if "pooler" not in name}
    assert lost == set()


@pytest.mark.parametrize("head", ["tokens", "answers", "choice"])
@pytest.mark.parametrize("family", FAMILIES)
def test_other_heads(family: str, head: str, tmp_path: Path) -> None:
    ids = token_ids(6)
    ids = ids.reshape(3, 2, -1) if head == "choice" else ids
    check(build(family, head), "low-rank", tmp_path, ids)


def test_shared_layers_are_factorised_once() -> None:
    dense = build("albert", "masked-lm")
    student = compresskit.compress(dense, method="low-rank", ratio=2)
    inner = [m for m in student.modules() if isinstance(m, FactorisedLinear)]
    assert len(inner) == len([t for t in find_targets(dense) if t.kind == "linear" and t.role])
    assert student.config.num_hidden_layers == 2


def test_fused_matrices_of_modernbert_have_their_roles() -> None:
    roles = {target.name: target.role for target in find_targets(build("modernbert", "classifier"))}
    assert roles["model.layers.0.attn.Wqkv"] == "attention"
    assert roles["model.layers.0.mlp.Wi"] == "ffn"


def test_convolutions_stay_dense_and_inspect_says_so(run: Run, tmp_path: Path) -> None:
    for family in ("squeezebert", "convbert"):
        dense = build(family, "classifier")
        dense.save_pretrained(tmp_path / family)
        shown = run("inspect", "--model", tmp_path / family)
        assert shown.code == 0, shown.err
        assert "a convolution stays dense" in " ".join(shown.out.split())
        student = compresskit.compress(dense, method="low-rank", ratio=2)
        kinds = (torch.nn.Conv1d, torch.nn.Conv2d)
        before, after = (sum(isinstance(m, kinds) for m in model.modules()) for model in (dense, student))
        assert before == after > 0
