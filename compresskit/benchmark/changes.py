"""What is different for one task of a grid, or in one variant of its students."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from compresskit.planning.recipe import Allocation

Beginning = Literal["checkpoint", "teacher"]
VariantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


def check_seeds(value: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The seeds, once each of them is one. Raises ValueError."""
    if bad := [seed for seed in value or () if not 0 <= seed < 2**32]:
        raise ValueError(f"seed {bad[0]} is not between 0 and 2^32 - 1")
    return no_twins(value)


def no_twins(value: Any) -> Any:
    """The sequence, once nothing in it comes twice. Raises ValueError."""
    if twins := [entry for entry in value or () if value.count(entry) > 1]:
        raise ValueError(f"{twins[0]} is there twice")
    return value


class TaskChanges(BaseModel):
    """What is different for one task.

    Attributes:
        seeds: the task's own.
        teacher: settings that replace those of the grid's ``teacher``.
        task: settings that replace those of the grid's ``task``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: Annotated[tuple[int, ...] | None, Field(min_length=1), AfterValidator(check_seeds)] = None
    teacher: dict[str, Any] = Field(default_factory=dict)
    task: dict[str, Any] = Field(default_factory=dict)


class Variant(BaseModel):
    """What is different in one variant of the students. What is not given is as in the grid.

    Attributes:
        methods: of the grid, that have this variant; empty: all.
        allocation: of methods (a recipe file keeps its own; ``auto`` always takes ``error``).
        calibration_tokens: that methods fit their factors to (a recipe file keeps its own).
        students_from: ``checkpoint`` or ``teacher``.
        general: settings that replace those of the grid's ``general``; False leaves stage 1 out. Of the losses only
            those are replaced whose weights are given.
        task: settings that replace those of the grid's ``task``, and of its ``per_task``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: Annotated[tuple[str, ...], AfterValidator(no_twins)] = ()
    allocation: Allocation | None = None
    calibration_tokens: int | None = Field(default=None, ge=0)
    students_from: Beginning | None = None
    general: dict[str, Any] | Literal[False] | None = None
    task: dict[str, Any] = Field(default_factory=dict)

    def text(self) -> str:
        """The changes in words."""
        given = self.model_dump(mode="json", exclude_defaults=True)
        return "; ".join(f"{name}: {_flat(value)}" for name, value in given.items()) or "as the others"


def _flat(value: Any) -> str:
    """Settings on one line, e.g. ``epochs 3, losses (supervised 1)``."""
    if isinstance(value, dict):
        pairs = ((name, f"({_flat(one)})" if isinstance(one, dict) else _flat(one)) for name, one in value.items())
        return ", ".join(" ".join(pair) for pair in pairs)
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value).lower()
