"""The recipe that repeats a plan: ``recipe.yaml`` of a compressed folder."""

from __future__ import annotations

import json
import re
from collections import defaultdict

from compresskit.planning.planner import Assignment, Plan
from compresskit.planning.recipe import Recipe, Rule


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
