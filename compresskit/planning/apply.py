"""From a plan to a student: factorise every group and put its layers in place."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.decomposers import registry
from compresskit.decomposers.base import FactorisedEmbedding, FactorisedLinear
from compresskit.model.quantizer import CompresskitConfig, CompresskitHfQuantizer, attach
from compresskit.model.sources import ModelSource
from compresskit.model.swap import assign, mount
from compresskit.planning.planner import Plan, Progress, silent


@torch.no_grad()
def apply_plan(model: PreTrainedModel, plan: Plan, progress: Progress = silent) -> Plan:
    """Compress ``model`` in place as the plan says.

    Args:
        model: the dense model that the plan was made for.
        plan: every group with its spec.
        progress: called with (what, done, total) after each group.

    Returns:
        The plan with the measured error of every group, ||W - W'||_F / ||W||_F.
    """
    source = ModelSource(model)
    errors = {}
    for index, assignment in enumerate(plan.assignments):
        group, decomposer = assignment.group, registry.get(assignment.method)
        weights = {target.name: source.read(target) for target in group.targets}
        factors = decomposer.factorise(group, assignment.spec, source)
        mount(model, decomposer, group, assignment.spec)
        assign(model, factors)
        errors[group.name] = _measured_error(model, weights)
        progress("factorising", index + 1, len(plan.assignments))
    config = CompresskitConfig.from_groups(model, [(a.group, a.spec) for a in plan.assignments])
    attach(model, CompresskitHfQuantizer(config))
    return plan.with_errors(errors)


def _measured_error(model: PreTrainedModel, weights: dict[str, Tensor]) -> float:
    residual = norm = 0.0
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, FactorisedLinear | FactorisedEmbedding)
        # Norms of float32 sums are summed in double; the difference itself needs no more than float32.
        difference = weight.float() - layer.dense_weight().float()
        residual += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        norm += float(torch.linalg.vector_norm(weight, dtype=torch.float64)) ** 2
    return (residual / norm) ** 0.5 if norm > 0 else 0.0
