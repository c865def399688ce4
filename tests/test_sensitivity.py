"""How much predictions depend on each matrix: against changes that are really made; what plans do with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_model, token_ids, write_tsv
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from compresskit.calibration.sensitivity import predicts, sensitivities
from compresskit.calibration.statistics import Calibration, calibrate
from compresskit.data.tasks import load_data, load_task
from compresskit.decomposers.base import Statistics, Target
from compresskit.model.sources import ModelSource
from compresskit.model.targets import find_targets
from compresskit.planning.planner import Plan, make_plan
from compresskit.planning.recipe import for_method

#: Relative size of a change, and how often it is made.
SIZE, DRAWS = 0.01, 40


def batch(rows: int = 24) -> dict[str, Tensor]:
    """Half of the sequences are padded."""
    ids, mask = token_ids(rows), torch.ones(rows, 11, dtype=torch.long)
    mask[::2, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


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


@pytest.mark.parametrize("head", ["classifier", "regression", "questions"])
def test_against_changes_that_are_made(head: str) -> None:
    number = {"classifier": 3, "regression": 1, "questions": 2}[head]
    model = tiny_model(head=head.replace("regression", "classifier"), num_labels=number, initializer_range=0.2)
    model.double()  # the divergence of a small change is smaller still
    inputs = batch()
    model.requires_grad_(False)
    next(model.parameters()).requires_grad_()  # flags are given back as they were
    model.train()
    found = sensitivities(model, [inputs] * 20)  # predictions are drawn: more draws, less chance
    assert model.training
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    targets = [target for target in find_targets(model) if target.role is not None]
    made = {target.name: divergence(model, target, inputs, head) for target in targets}
    mean = sum(found.values()) / len(found)
    assert mean == pytest.approx(1)
    scale = sum(made.values()) / sum(found[name] for name in made)
    for name, cost in made.items():
        assert found[name] * scale == pytest.approx(cost, rel=0.25), name
    assert max(made.values()) > 4 * min(made.values())  # else the test could not tell


class Told(Calibration):
    """Statistics of a text, with sensitivities that are made up."""

    def __init__(self, found: Calibration, told: dict[str, float]) -> None:
        self.__dict__ |= found.__dict__
        self._sensitivities = told


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    (root / "rows.yaml").write_text(
        "version: 1\nname: rows\ninputs: [text]\nlabel: label\nmetrics: [accuracy]\n"
        "files: {train: rows.tsv, dev: dev.tsv}\n"
    )
    rows = [("the film was " + ("good" if i % 2 else "bad"), str(i % 2)) for i in range(60)]
    for name in ("rows", "dev"):
        write_tsv(root / f"{name}.tsv", "text\tlabel", rows)
    return root


def test_plans_keep_what_predictions_depend_on(pairs: Path, bench_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    data = load_data(load_task(pairs / "rows.yaml"), pairs)
    model, base = tiny_model(head="classifier", num_labels=2), tiny_model()
    assert predicts(model)
    assert not predicts(base)
    found, plain = (calibrate(one, tokenizer, data, 2000) for one in (model, base))
    targets = {target.name: target for target in find_targets(model)}
    known = {name: found.sensitivity(target) for name, target in targets.items()}
    assert sum(known.values()) / len(known) == pytest.approx(1)
    assert all(plain.sensitivity(target) is None for target in find_targets(base))

    def sizes(statistics: Statistics) -> dict[str, int]:
        plan: Plan = make_plan(model, for_method("low-rank", 4, "error"), ModelSource(model), statistics=statistics)
        return {a.group.targets[0].name.removeprefix("bert.encoder."): a.spec.rank for a in plan.assignments}

    alike = dict.fromkeys(known, 1.0)
    one, other = "layer.0.intermediate.dense", "layer.1.intermediate.dense"
    even = sizes(Told(found, alike))
    ours = sizes(Told(found, alike | {f"bert.encoder.{one}": 30.0, f"bert.encoder.{other}": 0.0}))
    assert ours[one] > even[one]
    assert ours[other] == 1 < even[other]
