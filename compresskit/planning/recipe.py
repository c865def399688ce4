"""Recipes: which method, and which shapes or ratio, for which matrices. YAML, strictly validated, versioned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from compresskit.decomposers import AUTO, DENSE, ROLES, Role, RuleOptions, Target, registry
from compresskit.errors import InputError
from compresskit.planning.stage import Stage
from compresskit.validation import parse_mapping, read_named, unknown_key, validate

Allocation = Literal["uniform", "error"]
Objective = Literal["size", "latency"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(BaseModel):
    """What to do with some targets. Remaining keys are the method's own options; without any, the planner chooses
    under ``ratio``.

    Attributes:
        method: a registered method; ``dense`` leaves the targets as they are, ``auto`` takes the method with the least
            error for each group.
        role: one role or several; ``role``, ``match`` or both are needed.
        match: a regular expression searched in module names, e.g. ``layer.0.*dense``.
        optional: whether the rule may take nothing; otherwise that is an error.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    method: str
    role: tuple[Role, ...] | None = None
    match: str | None = None
    optional: bool = False

    @field_validator("role", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _says_which(self) -> Rule:
        if self.role is None and self.match is None:
            raise ValueError("give role, match or both")
        return self

    @property
    def options(self) -> RuleOptions | None:
        """The method's options; None where the rule gives none (or keeps its targets dense).

        Raises:
            InputError: unknown method, unknown key (with the nearest valid one) or bad value.
        """
        given = self.model_extra or {}
        if self.method in (AUTO, DENSE):
            options_type: type[RuleOptions] = RuleOptions
        else:
            options_type = registry.get(self.method).options_type
        allowed = [*type(self).model_fields, *options_type.model_fields]
        for key in given:
            if key not in allowed:
                raise unknown_key(key, allowed)
        return validate(options_type, given, f"options of {self.method}") if given else None

    def applies(self, target: Target) -> bool:
        """Whether the rule takes this target. One without a role is taken only where ``match`` names it."""
        by_role = target.role in self.role if self.role is not None else True
        by_name = re.search(self.match, target.name) is not None if self.match is not None else target.role is not None
        return by_role and by_name

    def __str__(self) -> str:
        parts = [f"role {', '.join(self.role)}"] if self.role else []
        return " and ".join(parts + ([f"match {self.match!r}"] if self.match else []))


class Distill(_Strict):
    """Defaults for distilling a student made by this recipe.

    Attributes:
        general: of stage 1, any text.
        task: of stage 2, a task's rows.
        sentences: of sentence vectors, any text in units.
    """

    general: Stage | None = None
    task: Stage | None = None
    sentences: Stage | None = None


class Recipe(_Strict):
    """A whole recipe. Either ``ratio`` with rules that only name methods, or explicit shapes in every rule.

    Attributes:
        version: of this format: 1.
        name: goes into the names of outputs and tables.
        description: for readers; `compresskit methods` shows it.
        ratio: dense parameters / compressed parameters of the whole model; left out where rules give shapes.
        allocation: ``uniform``: every matrix about equally much smaller. ``error``: parameters where they save most
            error.
        objective: ``size``: parameters alone count. ``latency``: of equally small plans the one estimated fastest;
            with allocation ``error`` at most about 5 % above the least total squared error.
        allow_slow: take shapes that cost more than 1.1 times the dense FLOPs too.
        calibration_tokens: of a text that factors are fitted to, so that outputs are kept; 0: to the weights alone.
        calibration_sha256: of that text where a plan was written down; with another text a plan says so.
        rules: the first one that applies to a matrix wins; matrices of no rule stay dense.
        distill: what ``distill`` takes for this student where the command line says nothing.
    """

    version: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    ratio: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    allocation: Allocation = "uniform"
    objective: Objective = "size"
    allow_slow: bool = False
    calibration_tokens: int = Field(default=0, ge=0)
    calibration_sha256: str | None = None
    rules: tuple[Rule, ...] = Field(min_length=1)
    distill: Distill | None = None

    @property
    def explicit(self) -> bool:
        """Whether the rules give shapes, so that the ratio follows from them."""
        return any(rule.options is not None for rule in self.rules)

    @property
    def by_error(self) -> bool:
        """Whether a plan chooses by errors, neither uniform nor given."""
        return self.allocation == "error" and not self.explicit

    def checked(self) -> Recipe:
        """The recipe itself, once its rules' options are known to be valid and to fit together.

        Raises:
            InputError: names the rule.
        """
        for index, rule in enumerate(self.rules):
            try:
                options = rule.options
            except InputError as error:
                raise InputError(f"recipe {self.name}: rules[{index}]: {error}") from None
            if options is None and rule.method != DENSE and self.explicit:
                raise InputError(
                    f"recipe {self.name}: rules[{index}] gives no shapes but other rules do; "
                    "give shapes in all rules, or a ratio and shapes in none"
                )
        if self.allocation != "error" and any(rule.method == AUTO for rule in self.rules):
            raise InputError(f"recipe {self.name}: method auto chooses by error: the allocation must be error")
        if self.objective == "latency" and self.explicit:
            raise InputError(f"recipe {self.name}: explicit shapes leave objective latency nothing to choose: drop one")
        if self.explicit and self.ratio is not None:
            raise InputError(f"recipe {self.name}: gives both ratio and shapes; give one")
        return self

    def to_yaml(self) -> str:
        """The recipe as YAML; loads back as an equal recipe."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        data = {"version": self.version, **data}
        return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


#: At 19x the dense positions would be a sixth of a MiniLM; the published methods leave them alone.
_POSITIONS = Rule(match=r"(^|\.)position_embeddings$", method=AUTO, optional=True)


def for_method(
    method: str,
    ratio: float | None,
    allocation: Allocation | None = None,
    allow_slow: bool = False,
    objective: Objective = "size",
    calibration_tokens: int = 0,
) -> Recipe:
    """The recipe that ``--method`` and ``--ratio`` mean: one method for every role, or ``auto``, which also takes the
    table of positions where a model has one. Without a ratio a plan is made for a size.
    """
    if method != AUTO:
        registry.get(method)
    return Recipe(
        version=1,
        name=method,
        ratio=None if ratio is None else check_ratio(ratio),
        allocation=allocation or ("error" if method == AUTO else "uniform"),
        objective=objective,
        allow_slow=allow_slow,
        calibration_tokens=calibration_tokens,
        rules=(Rule(role=ROLES, method=method), *((_POSITIONS,) if method == AUTO else ())),
    ).checked()


def check_ratio(ratio: float) -> float:
    """The ratio as a float above 1. Raises InputError otherwise (NaN and infinity too)."""
    if not 1 < ratio < float("inf"):
        raise InputError(f"ratio {ratio:g}: must be a finite number above 1 (dense parameters / compressed parameters)")
    return float(ratio)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe by short name (shipped with compresskit) or from a YAML file.

    Raises:
        InputError: unknown name, unreadable file, invalid YAML, or anything in it that is not valid.
    """
    return parse_recipe(read_named("recipe", name_or_path, shipped_recipes()), str(name_or_path))


def parse_recipe(text: str, where: str) -> Recipe:
    """A recipe from YAML text; ``where`` names its origin in errors. Raises InputError."""
    data = parse_mapping(text, f"recipe {where}", "version, name and rules")
    recipe: Recipe = validate(Recipe, data, f"recipe {where}")
    return recipe.checked()


def shipped_recipes() -> dict[str, Any]:
    """Short name -> file of every recipe that comes with compresskit."""
    packaged = resources.files("compresskit") / "recipes"
    # In a checkout (editable install) recipes/ stands beside the package; the wheel carries it inside.
    folder = packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "recipes"
    if not folder.is_dir():
        return {}
    return {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}


def apply_rules(recipe: Recipe, targets: Sequence[Target]) -> list[tuple[Rule, list[Target]]]:
    """Each rule with the targets it takes; the first rule that applies wins. Targets of no rule stay dense.

    Raises:
        InputError: a rule that is not optional takes nothing.
    """
    taken: list[tuple[Rule, list[Target]]] = [(rule, []) for rule in recipe.rules]
    matched = {index: any(rule.applies(target) for target in targets) for index, rule in enumerate(recipe.rules)}
    for target in targets:
        for rule, chosen in taken:
            if rule.applies(target):
                chosen.append(target)
                break
    for index, (rule, chosen) in enumerate(taken):
        if not chosen and not rule.optional:
            why = "earlier rules take all it matches" if matched[index] else "no matrix of this model matches it"
            raise InputError(f"recipe {recipe.name}: rules[{index}] ({rule}): {why}; remove it or set optional: true")
    return taken
