"""From a plan to a student: factorise every group and put its layers in place."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.calibration.statistics import Calibration
from compresskit.decomposers import (
    BLOCK_ROWS,
    FactorisedEmbedding,
    FactorisedLayer,
    exact_products,
    output_error,
    registry,
)
from compresskit.model.quantizer import CompresskitConfig, CompresskitHfQuantizer, attach
from compresskit.model.sharing import tie, undeclared_ties
from compresskit.model.sources import ModelWeights, check_weights
from compresskit.model.swap import assign, check_replaceable, mount
from compresskit.planning.planner import Plan
from compresskit.progress import Progress, silent


@torch.no_grad()
@exact_products
def apply_plan(
    model: PreTrainedModel, plan: Plan, progress: Progress = silent, *, statistics: Calibration | None = None
) -> Plan:
    """Compress ``model`` in place as the plan says.

    Args:
        model: the dense model that the plan was made for.
        plan: every group with its spec.
        progress: called with (what, done, total) after each group.
        statistics: of the inputs, from calibration; factors then keep outputs instead of weights.

    Returns:
        The plan with the measured error of every group, ||W - W'||_F / ||W||_F, and with statistics the error of its
        outputs on the text of the calibration.

    Raises:
        InputError: a weight is on the meta device; a layer does more than its class says (hooks).
    """
    check_weights(model)
    targets = [target for assignment in plan.assignments for target in assignment.group.targets]
    check_replaceable(model, [name for target in targets for name in (target.name, *target.shared)])
    source = ModelWeights(model)
    shared = undeclared_ties(model)
    tie(model, shared)
    errors, output_errors = {}, {}
    for index, assignment in enumerate(plan.assignments):
        group, decomposer = assignment.group, registry.get(assignment.method)
        weights = {target.name: source.view(target) for target in group.targets}
        factors = decomposer.factorise(group, assignment.spec, source, statistics)
        mount(model, decomposer, group, assignment.spec)
        assign(model, factors)
        errors[group.name] = _measured_error(model, weights)
        if statistics is not None:
            made = {name: _layer(model, name).dense_weight() for name in weights}
            matrices = [(target, weights[target.name], made[target.name]) for target in group.targets]
            output_errors[group.name] = output_error(matrices, statistics)
        progress("factorising", index + 1, len(plan.assignments))
    tie(model, undeclared_ties(model))  # their factors
    config = CompresskitConfig.from_groups(model, [(a.group, a.spec) for a in plan.assignments], shared)
    attach(model, CompresskitHfQuantizer(config))
    return plan.with_errors(errors, output_errors)


def _layer(model: PreTrainedModel, name: str) -> FactorisedLayer:
    layer = model.get_submodule(name)
    assert isinstance(layer, FactorisedLayer)
    return layer


def _energy(matrix: Tensor) -> float:
    """Sum of squares. Rows are summed in float32, which is fast, and their sums in float64, which many need."""
    return float(torch.linalg.vector_norm(matrix, dim=1).double().square().sum())


def _measured_error(model: PreTrainedModel, weights: dict[str, Tensor]) -> float:
    residual = norm = 0.0
    for name, weight in weights.items():
        layer = _layer(model, name)
        rows = weight.split(BLOCK_ROWS)  # a whole table in float32 may be the largest thing in memory
        if isinstance(layer, FactorisedEmbedding):
            numbers = torch.arange(len(weight), device=weight.device).split(BLOCK_ROWS)
            made = (layer.forward(block) for block in numbers)
        else:
            made = iter(layer.dense_weight().split(BLOCK_ROWS))
        for theirs, ours in zip(rows, made, strict=True):
            residual += _energy(ours.float() - theirs.float())
            norm += _energy(theirs.float())
    return (residual / norm) ** 0.5 if norm > 0 else 0.0
