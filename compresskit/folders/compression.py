"""The record of a compression (``compression.json``) and the recipe that repeats it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from importlib.metadata import version
from typing import Any

from compresskit import __version__
from compresskit.model.checkpoint import Checkpoint
from compresskit.planning.planner import Assignment, Plan
from compresskit.planning.recipe import Recipe, Rule

FORMAT_VERSION = 1


def compression_record(checkpoint: Checkpoint, plan: Plan, *, bytes_before: int, bytes_after: int) -> dict[str, Any]:
    """Everything the table says, as plain data. Units: FLOPs at batch 1 and length 128, MB = 10^6 bytes."""
    return {
        "format_version": FORMAT_VERSION,
        "model": checkpoint.origin,
        "as": checkpoint.as_class,
        "model_class": type(checkpoint.model).__name__,
        "dtype": str(checkpoint.model.dtype).removeprefix("torch."),
        "recipe": plan.recipe.name,
        "allocation": plan.recipe.allocation,
        "objective": plan.recipe.objective,
        "ratio_asked": plan.ratio_asked,
        "ratio": plan.ratio,
        "parameters": {"before": plan.parameters_before, "after": plan.parameters_after},
        "megabytes": {"before": bytes_before / 1e6, "after": bytes_after / 1e6},
        "flops": {"before": plan.flops_before.total, "after": plan.flops_after.total},
        "flops_linear": {"before": plan.flops_before.linear, "after": plan.flops_after.linear},
        **({"calibration": plan.calibration} if plan.calibration is not None else {}),
        "notes": [*checkpoint.notes, *plan.notes],
        "kept_tensors": sorted(checkpoint.kept),
        "groups": plan.rows(),
        "versions": {"compresskit": __version__} | {name: version(name) for name in ("torch", "transformers")},
    }


def resolved_recipe(plan: Plan) -> Recipe:
    """The plan as a recipe with explicit shapes: compressing the same model with it gives the same plan."""
    by_pattern: dict[str, list[tuple[str, Assignment]]] = defaultdict(list)
    for assignment in plan.assignments:
        for target in assignment.group.targets:
            by_pattern[_layer_pattern(target.name)].append((target.name, assignment))
    rules: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for pattern, members in by_pattern.items():
        # One pattern for all layers where they agree and none of them stays dense, else one per matrix.
        first = members[0][1]
        agree = all((m.method, m.spec, _shares(m)) == (first.method, first.spec, _shares(first)) for _, m in members)
        agree = agree and not any(re.fullmatch(pattern, name) for name in plan.dense)
        for name, member in members[:1] if agree else members:
            options = member.spec.model_dump_json(exclude={"method"})
            rules[member.method, options, _shares(member)].append(pattern if agree else re.escape(name))
    made = [
        Rule.model_validate({"match": _alternatives(names), "method": method, **json.loads(options)})
        for (method, options, _), names in rules.items()
    ]
    return Recipe(
        version=1,
        name=plan.recipe.name,
        description=plan.recipe.description
        or f"{plan.ratio:.2f}x, as planned for {plan.parameters_before:,} parameters",
        calibration_tokens=plan.recipe.calibration_tokens,
        calibration_sha256=plan.calibration["text"]["sha256"] if plan.calibration is not None else None,
        rules=tuple(made),
        distill=plan.recipe.distill,
    )


def _shares(assignment: Assignment) -> str:
    """What tells groups apart whose matrices share factors."""
    return assignment.group.name if len(assignment.group.targets) > 1 else ""


def _layer_pattern(name: str) -> str:
    """The name as a regular expression with its numbers open: ``encoder.layer.0.x`` and ``.1.x`` share one."""
    return r"\.".join("[0-9]+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _alternatives(names: list[str]) -> str:
    return f"^{names[0]}$" if len(names) == 1 else f"^({'|'.join(names)})$"
