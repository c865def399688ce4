"""How much predictions depend on each matrix: against changes that are really made; what plans do with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_model, token_ids, write_tsv
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoTokenizer,
    DebertaConfig,
    DebertaForSequenceClassification,
    PreTrainedModel,
)

from compresskit.api import plan
from compresskit.calibration.sensitivity import informative, sensitivities
from compresskit.calibration.statistics import Calibration, calibrate
from compresskit.decomposers import Target
from compresskit.errors import InputError
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.sources import ModelWeights
from compresskit.model.targets import find_targets
from compresskit.pipeline import Compression
from compresskit.planning.planner import Plan, make_plan
from compresskit.planning.recipe import for_method
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.rows import TaskData

#: Relative size of a change, and how often it is made.
SIZE, DRAWS = 0.01, 25
#: Numbers of labels by head.
LABELS = {"classifier": 3, "regression": 1, "questions": 2}


def batch(rows: int = 24) -> dict[str, Tensor]:
    """Half of the sequences are padded."""
    ids, mask = token_ids(rows), torch.ones(rows, 11, dtype=torch.long)
    mask[::2, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def predictor(head: str, family: str = "bert", **config: Any) -> PreTrainedModel:
    """A model whose matrices matter unequally, with biases of the size of outputs."""
    kind = head.replace("regression", "classifier")
    torch.manual_seed(0)
    model = tiny_model(family, head=kind, num_labels=LABELS[head], initializer_range=0.2, **config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and "LayerNorm" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def predictions(model: PreTrainedModel, inputs: dict[str, Tensor], head: str) -> list[Tensor]:
    """Logarithms of probabilities; of a regression the number itself."""
    made = model(**inputs)
    if head == "questions":
        closed = inputs["attention_mask"] == 0
        return [side.masked_fill(closed, -1e9).log_softmax(-1) for side in (made.start_logits, made.end_logits)]
    return [made.logits if head == "regression" else made.logits.log_softmax(-1)]


@torch.no_grad()
def divergence(model: PreTrainedModel, target: Target, inputs: dict[str, Tensor], head: str) -> float:
    """Mean over draws: what a change of the output, of SIZE times its own size, makes of the predictions."""
    chance, mask = torch.Generator().manual_seed(1), inputs["attention_mask"].bool()
    layer = model.get_submodule(target.name)
    before = predictions(model, inputs, head)

    def change(_: torch.nn.Module, __: object, output: Tensor) -> Tensor:
        own = output - getattr(layer, "bias", torch.zeros(())) if target.kind == "linear" else output
        real = own[mask] if own.shape[:-1] == mask.shape else own.flatten(0, -2)
        scale = SIZE * real.square().mean().sqrt()
        return output + scale * torch.randn(output.shape, generator=chance)

    total = 0.0
    handle = layer.register_forward_hook(change)
    for _ in range(DRAWS):
        for old, new in zip(before, predictions(model, inputs, head), strict=True):
            gap = (old - new).square() / 2 if head == "regression" else old.exp() * (old - new)
            total += float(gap.sum())
    handle.remove()
    return total / DRAWS


@pytest.mark.parametrize("head", LABELS)
def test_against_changes_that_are_made(head: str) -> None:
    model = predictor(head).double()  # the divergence of a small change is smaller still
    inputs = batch()
    found = sensitivities(model, [inputs] * 20)  # draws of noise: more of them, less chance
    targets = [target for target in find_targets(model) if target.role is not None]
    made = {target.name: divergence(model, target, inputs, head) for target in targets}
    assert sum(found.values()) / len(found) == pytest.approx(1)
    scale = sum(made.values()) / sum(found[name] for name in made)
    for name, cost in made.items():
        assert found[name] * scale == pytest.approx(cost, rel=0.25), name
    assert max(made.values()) > 4 * min(made.values())  # else the test could not tell


def test_biases_and_padding_do_not_count() -> None:
    model = predictor("classifier")
    layer = model.get_submodule("bert.encoder.layer.0.output.dense")
    before = sensitivities(model, [batch()])
    with torch.no_grad():  # of a layer norm's input: no output of the model changes
        layer.bias += 100.0
    after = sensitivities(model, [batch()])
    name = "bert.encoder.layer.0.output.dense"
    assert after[name] / sum(after.values()) == pytest.approx(before[name] / sum(before.values()), rel=0.02)
    inputs = batch(12)
    longer = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in inputs.items()}
    short, long = (sensitivities(model, [one]) for one in (inputs, longer))
    positions = "bert.embeddings.position_embeddings"  # one look-up for all rows, so of padding too
    short, long = ({name: cost / found["classifier"] for name, cost in found.items()} for found in (short, long))
    assert short.pop(positions) > long.pop(positions)
    assert long == pytest.approx(short, rel=1e-3)


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_noise_has_the_fisher_information_as_its_covariance(classes: int) -> None:
    chance, logits = (
        torch.Generator().manual_seed(0),
        torch.tensor([0.5, -3.0, 1.0, 4.0], dtype=torch.float64)[:classes],
    )
    drawn = logits.repeat(200_000, 1).requires_grad_()
    informative(drawn, chance).backward()
    p = logits.softmax(0)
    wanted = torch.ones(1, 1) if classes == 1 else p.diag() - p[:, None] * p
    assert torch.allclose(drawn.grad.T @ drawn.grad / len(drawn), wanted.double(), rtol=0.02, atol=5e-4)


def test_model_stays_as_it_was() -> None:
    model = predictor("classifier")
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # of a caller
        first = sensitivities(model, [batch()])
    assert first == sensitivities(model, [batch()])  # repeatable
    assert model.training
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bert"])
def test_families(family: str) -> None:
    model = predictor("classifier", family)
    found = sensitivities(model, [batch()])
    assert sum(cost > 0 for cost in found.values()) > len(found) / 2
    assert sum(found.values()) / len(found) == pytest.approx(1)


def test_layers_that_are_called_several_times() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=499, embedding_size=24, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=96, num_labels=3, max_position_embeddings=40, initializer_range=0.1,
    )  # fmt: skip
    model = AlbertForSequenceClassification(config).eval().double()
    found = sensitivities(model, [batch()] * 20)
    (inner,) = (target for target in find_targets(model) if target.name.endswith("ffn"))
    (outer,) = (target for target in find_targets(model) if target.name.endswith("ffn_output"))
    made = [divergence(model, target, batch(), "classifier") for target in (inner, outer)]
    assert found[inner.name] / found[outer.name] == pytest.approx(made[0] / made[1], rel=0.3)


def test_layers_whose_output_is_changed_in_place() -> None:
    torch.manual_seed(0)
    config = DebertaConfig(
        vocab_size=499, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, max_position_embeddings=40,
    )  # fmt: skip
    model = DebertaForSequenceClassification(config)
    expected = model.eval()(**batch()).logits
    found = sensitivities(model, [batch()])
    assert sum(cost > 0 for cost in found.values()) > len(found) / 2
    assert torch.equal(model(**batch()).logits, expected)


def test_half_precision_and_what_is_not_finite() -> None:
    model = predictor("classifier")
    whole = sensitivities(model, [batch()])
    half = sensitivities(model.to(torch.bfloat16), [batch()])
    assert half["classifier"] == pytest.approx(whole["classifier"], rel=0.1)
    model = predictor("classifier")
    with torch.no_grad():
        model.classifier.weight[0, 0] = torch.inf
    with pytest.raises(InputError, match="NaN or infinity"):
        sensitivities(model, [batch()])


class Told(Calibration):
    """Statistics of a text, with sensitivities that are made up."""

    def __init__(self, found: Calibration, told: dict[str, float]) -> None:
        self.__dict__ |= found.__dict__
        self._sensitivities = told


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    (root / "rows.yaml").write_text(
        "version: 1\nname: rows\ninputs: [text]\nlabel: label\nmetrics: [accuracy]\n"
        "files: {train: rows.tsv, dev: dev.tsv}\n"
    )
    lines = [("the film was " + ("good" if i % 2 else "bad"), str(i % 2)) for i in range(60)]
    for name in ("rows", "dev"):
        write_tsv(root / f"{name}.tsv", "text\tlabel", lines)
    return root


@pytest.fixture(scope="module")
def rows(rows_folder: Path) -> TaskData:
    return load_data(load_task(rows_folder / "rows.yaml"), rows_folder)


@pytest.fixture(scope="module")
def tokenizer(bench_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(bench_folder / "model")


def test_where_matrices_count_alike_the_deeper_model_keeps_more_of_the_embedding(
    rows: TaskData, tokenizer: Any
) -> None:
    def rank(layers: int) -> int:
        model = tiny_model(num_hidden_layers=layers)
        plan = make_plan(
            model,
            for_method("low-rank", 4, "error"),
            ModelWeights(model),
            statistics=calibrate(model, tokenizer, rows, 500),
        )
        return next(a.spec.rank for a in plan.assignments if a.group.role == "embedding")

    assert rank(8) >= 1.5 * rank(2)


def test_plans_keep_what_predictions_depend_on(rows: TaskData, tokenizer: Any) -> None:
    model = tiny_model(head="classifier", num_labels=2)
    found = calibrate(model, tokenizer, rows, 2000, weigh=True)
    known = {target.name: found.sensitivity(target) for target in find_targets(model)}
    assert sum(known.values()) / len(known) == pytest.approx(1)
    assert found.record()["weighed_by"] == "predictions"

    def ranks(told: dict[str, float] | None) -> dict[str, int]:
        asked = for_method("low-rank", 4, "error")
        statistics = Told(found, {} if told is None else alike | told)
        made: Plan = make_plan(model, asked, ModelWeights(model), statistics=statistics)
        return {a.group.targets[0].name: a.spec.rank for a in made.assignments}

    alike = dict.fromkeys(known, 1.0)
    first, second = (f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2))
    even = ranks({})
    for less, more in ((first, second), (second, first)):  # also where the first of a role and shape says nothing
        ours = ranks({more: 30.0, less: 0.0})
        assert ours[more] > even[more]
        assert 1 <= ours[less] < even[less]
    words = "bert.embeddings.word_embeddings"
    ours = ranks({words: 10.0 / 4})  # its sensitivity four times
    assert ours == ranks(None)  # where nothing is known ten times, the others once


def test_only_where_it_was_asked_for_and_there_are_predictions(rows: TaskData, tokenizer: Any) -> None:
    def checkpoint(model: PreTrainedModel, untrained: tuple[str, ...] = ()) -> Checkpoint:
        return Checkpoint("tiny", "tiny", None, model, untrained=untrained)

    def known(dense: Checkpoint, allocation: str = "error") -> Calibration:
        recipe = for_method("low-rank", 4, allocation).model_copy(update={"calibration_tokens": 500})
        found = Compression(dense, recipe, text=rows, tokenizer=tokenizer).calibrated().statistics
        assert found is not None
        return found

    def weighed(found: Calibration, model: PreTrainedModel) -> bool:
        return all(found.sensitivity(target) is not None for target in find_targets(model))

    model = tiny_model(head="classifier", num_labels=2)
    assert weighed(known(checkpoint(model)), model)
    assert not known(checkpoint(model)).notes
    found = known(checkpoint(model), "uniform")
    assert not weighed(found, model)
    assert not found.notes  # nobody asked
    assert "weighed_by" not in found.record()
    silent = tiny_model(head="classifier", num_labels=2)
    torch.nn.init.zeros_(silent.classifier.weight)
    for dense, why in (
        (checkpoint(model, ("classifier.weight",)), "new in this model: classifier.weight"),
        (checkpoint(tiny_model()), "no head"),
        (checkpoint(tiny_model(head="masked-lm")), "another head"),
        (checkpoint(tiny_model(head="classifier", id2label={0: "a", 1: "b", 2: "c"})), "labels differ"),
        (checkpoint(silent), "depend on none"),
    ):
        found = known(dense)
        assert not weighed(found, dense.model)
        (note,) = found.notes
        assert note.startswith("matrices are not weighed by predictions: ")
        assert why in note


def test_a_plan_says_why_matrices_are_not_weighed(tokenizer: Any, rows_folder: Path) -> None:
    found = plan(
        tiny_model(),
        method="low-rank",
        ratio=3,
        allocation="error",
        calibration_task=rows_folder / "rows.yaml",
        data=rows_folder,
        tokenizer=tokenizer,
    )
    assert any("not weighed by predictions" in note for note in found.notes)
