"""How a run is carried out, and which settings it has: the user's, else the recipe's, else the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compresskit.errors import InputError
from compresskit.planning.recipe import load_recipe
from compresskit.planning.stage import DEFAULTS, Stage, StageName
from compresskit.validation import unknown_key, validate


class Options(BaseModel):
    """How a run is carried out, whatever it trains.

    Attributes:
        max_steps: optimizer steps, instead of epochs.
        max_tokens: real (non-padding) tokens seen, instead of epochs.
        seed: of new heads, order, masks and dropout.
        device: ``auto`` (a GPU where there is one) or ``cpu``.
        precision: ``fp32`` or ``bf16`` (automatic mixed precision; weights stay fp32).
        accumulation: micro-batches per step and device: less memory, the same result up to rounding, but for the loss
            ``similarity``, which compares the sentences of a micro-batch.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them: less memory, the
            same result.
        new_head: replace the last layer of the head that the checkpoint has, by a new one or, of a student, by the
            teacher's: to start from a checkpoint that was trained on another task.
        save_every: steps between checkpoints. Default: a tenth of the run, from 100 to 500.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_steps: int | None = Field(default=None, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    device: Literal["auto", "cpu"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    new_head: bool = False
    save_every: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_budget(self) -> Options:
        if self.max_steps is not None and self.max_tokens is not None:
            raise ValueError("give max_steps or max_tokens, not both")
        return self

    @property
    def use_cpu(self) -> bool:
        """Whether the run stays on the CPU."""
        return self.device == "cpu" or not torch.cuda.is_available()

    @property
    def torch_device(self) -> torch.device:
        """Where this process computes."""
        return torch.device("cpu") if self.use_cpu else start_processes(self).device


def start_processes(options: Options) -> PartialState:
    """The group of processes that torchrun or accelerate started; a group of one otherwise."""
    return PartialState(cpu=options.use_cpu)


def split_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """The stage's settings that were given explicitly, and the options of the run. None counts as not given.

    Raises:
        InputError: an unknown setting (with the nearest one), a bad value, two budgets.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    for key in given:
        if key not in Stage.model_fields and key not in Options.model_fields:
            raise unknown_key(key, [*Stage.model_fields, *Options.model_fields])
    run = {key: value for key, value in given.items() if key in Options.model_fields}
    options: Options = validate(Options, run, "settings")
    explicit = {key: value for key, value in given.items() if key in Stage.model_fields}
    if "epochs" in explicit and (options.max_steps or options.max_tokens):
        raise InputError("settings: give one of epochs, max_steps and max_tokens")
    return explicit, options


def with_settings(stage: Stage, explicit: dict[str, Any]) -> Stage:
    """The stage with the explicit settings; a loss weight that is given replaces that one only. Raises InputError."""
    losses = explicit.get("losses", {})
    merged = {**stage.model_dump(), **explicit, "losses": {**stage.losses, **losses}}
    changed: Stage = validate(Stage, merged, "settings")
    return changed


def recipe_stage(student: Any, name: StageName) -> Stage:
    """The settings in the recipe of the student's folder; the defaults where it has none. Raises InputError."""
    path = Path(student) / "recipe.yaml" if isinstance(student, str | Path) else None
    if path is not None and path.is_file():
        distill = load_recipe(path).distill
        found: Stage | None = getattr(distill, name) if distill is not None else None
        if found is not None:
            return found
    return DEFAULTS[name]
