"""What a benchmark compares: a grid of models, methods, ratios, tasks and seeds, and the budget every cell gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from compresskit.decomposers import AUTO, registry
from compresskit.errors import InputError, unknown
from compresskit.planning.recipe import Allocation, Recipe, check_ratio, for_method, load_recipe, shipped_recipes
from compresskit.planning.stage import DEFAULTS, FINE_TUNING, Stage
from compresskit.tasks.loading import evaluation_only, load_task
from compresskit.training.settings import split_settings, with_settings
from compresskit.validation import parse_mapping, read_named, validate

Baseline = Literal["dense", "int8", "half-layers"]
BASELINES: tuple[Baseline, ...] = ("dense", "int8", "half-layers")
Beginning = Literal["checkpoint", "teacher"]
#: Stage 1 of every student where the grid says nothing: short, for a first look. At so few tokens small batches win.
GENERAL: dict[str, Any] = {"max_tokens": 40_000, "batch_size": 4}


def _seeds(value: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if bad := [seed for seed in value or () if not 0 <= seed < 2**32]:
        raise ValueError(f"seed {bad[0]} is not between 0 and 2^32 - 1")
    return _no_twins(value)


def _no_twins(value: Any) -> Any:
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

    seeds: Annotated[tuple[int, ...] | None, Field(min_length=1), AfterValidator(_seeds)] = None
    teacher: dict[str, Any] = Field(default_factory=dict)
    task: dict[str, Any] = Field(default_factory=dict)


class Grid(BaseModel):
    """A benchmark. Every field has a default; a bench recipe (YAML) and the command line change some.

    Attributes:
        version: of this format: 1.
        name: of the bench recipe, and of the default output folder.
        description: for readers.
        models: folders or hub ids; empty: the embedded checkpoint.
        methods: registered methods, shipped recipes or recipe files; empty: every registered method.
        ratios: dense parameters / compressed parameters, above 1. Recipes with explicit shapes have their own.
        tasks: names or YAML files; empty: quality without labels.
        data: folder with the tasks' files; None: the hub.
        text: general text for stage 1 and for quality without labels; None: the embedded text.
        seeds: of order, masks and new heads. The teacher of a task and the int8 baseline take the first one.
        baselines: rows without compression by factors: ``dense`` (the teacher; always there), ``int8`` (its linear
            layers quantised dynamically), ``half-layers`` (every second layer, distilled on the students' budget).
        teacher: settings of :func:`compresskit.finetune` for a task's teacher.
        students_from: what students are made from: ``checkpoint``, the pre-trained model, or ``teacher``, the task's
            fine-tuned one. Students of a teacher know the task before any training and need no stage 1; methods that
            calibrate then do so on the task's training rows.
        allocation: of methods (a recipe file has its own; ``auto`` always takes ``error``).
        calibration_tokens: of the general text (with ``students_from: teacher`` of the task) that methods fit their
            factors to (a recipe file has its own); 0: they fit the weights alone.
        general: settings of stage 1 (:func:`compresskit.distill` on text) of every student; False leaves it out.
        share_general: train stage 1 once for every method and ratio, with the first seed, and go on from there for
            every task and seed; otherwise every cell has its own.
        task: settings of stage 2 of every student, where there are tasks.
        per_task: name of a task -> what is different for it, e.g. more epochs where there is little data.
        precision: of all training: ``fp32`` or ``bf16``.
        any_machine: go on with cells that another kind of machine made; the report names all of them. Otherwise such
            cells are of another configuration. Latencies come from one machine in any case.
        latency_rounds: how often every model is timed in the closing phase; the table shows medians.
        exports: formats of :func:`compresskit.export` in which every finished model gets a row of its own, run by ONNX
            Runtime or what else runs the format; the dense one then also in the format that rounds nothing (``onnx``).
            Made in the closing phase, so they may be asked for later.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    name: str = Field(default="bench", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str = ""
    models: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    ratios: tuple[float, ...] = Field(default=(4.0, 8.0, 19.0), min_length=1)
    tasks: tuple[str, ...] = ()
    data: str | None = None
    text: str | None = None
    seeds: Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(_seeds)] = (0,)
    baselines: tuple[Baseline, ...] = BASELINES
    teacher: dict[str, Any] = Field(default_factory=dict)
    students_from: Beginning = "checkpoint"
    allocation: Allocation = "uniform"
    calibration_tokens: int = Field(default=0, ge=0)
    general: dict[str, Any] | Literal[False] = Field(default_factory=lambda: dict(GENERAL))
    share_general: bool = False
    task: dict[str, Any] = Field(default_factory=dict)
    per_task: dict[str, TaskChanges] = Field(default_factory=dict)
    precision: Literal["fp32", "bf16"] = "fp32"
    any_machine: bool = False
    latency_rounds: int = Field(default=5, ge=1)
    exports: tuple[str, ...] = ()

    @field_validator("models", "methods", "ratios", "tasks", "baselines", "exports")
    @classmethod
    def _once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        found: tuple[Any, ...] = _no_twins(value)
        return found

    @field_validator("ratios")
    @classmethod
    def _above_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(check_ratio(ratio) for ratio in value)

    def checked(self) -> Grid:
        """The grid itself, once methods, tasks and settings are known to be valid. Raises InputError."""
        for method in self.all_methods():
            self._recipe(method, self.ratios[0])
        for task in self.tasks:
            if evaluation_only(load_task(task)):
                raise InputError(f"task {task}: is for evaluation only, so nothing can be trained on it")
        if self.data is not None and not self.tasks:
            raise InputError("data belongs to a task: give --task")
        if strangers := [task for task in self.per_task if task not in self.tasks]:
            raise unknown("task of per_task", strangers[0], self.tasks)
        for grid in (self, *map(self.of, self.tasks)):
            for what in ("teacher", "general", "task"):
                grid.stage(what)
        if self.share_general and (self.general is False or not self.tasks):
            raise InputError("share_general: is for stage 1 (general) followed by tasks; there is nothing to share")
        if self.students_from == "teacher" and (self.general is not False or not self.tasks):
            raise InputError(
                "students_from: teacher is for tasks without stage 1: give tasks, and general: false "
                "(--general-tokens 0)"
            )
        if self.general is False and not self.tasks:
            raise InputError("nothing would be trained: without a task, stage 1 (general) is what distils a student")
        return self

    def of(self, task: str | None) -> Grid:
        """The grid as it is for one task."""
        changes = self.per_task.get(task or "")
        if changes is None:
            return self
        seeds = changes.seeds or self.seeds
        return self.model_copy(
            update={"seeds": seeds, "teacher": self.teacher | changes.teacher, "task": self.task | changes.task}
        )

    def all_methods(self) -> tuple[str, ...]:
        """The methods, the registered ones where none are named."""
        return self.methods or tuple(registry.METHODS.all())

    def stage(self, what: str) -> dict[str, Any]:
        """All settings of one kind of training run, defaults included, as plain data. Raises InputError."""
        given = getattr(self, what)
        if given is False:
            return {}
        own = {"seed", "device", "precision", "save_every", "accumulation"} & set(given)
        if own:
            raise InputError(f"grid {self.name}: {what}: {own.pop()} cannot be set here")
        default: Stage = FINE_TUNING if what == "teacher" else DEFAULTS["general" if what == "general" else "task"]
        try:
            explicit, options = split_settings(given)
            stage = with_settings(default, explicit)
        except InputError as error:
            raise InputError(f"grid {self.name}: {what}: {error}") from None
        budget = {"max_steps": options.max_steps, "max_tokens": options.max_tokens, "precision": self.precision}
        return stage.model_dump(mode="json") | budget

    def rows(self) -> Iterator[tuple[str | None, str | None, str, Recipe | None, float | None, int]]:
        """Every cell as (model, task, method, recipe, ratio, seed), the dense model of a task before its students."""
        for model in self.models or (None,):
            for task in self.tasks or (None,):
                seeds = self.of(task).seeds
                for baseline in ("dense", *(name for name in self.baselines if name != "dense")):
                    for seed in seeds if baseline == "half-layers" else seeds[:1]:
                        yield model, task, baseline, None, None, seed
                for method in self.all_methods():
                    first = self._recipe(method, self.ratios[0])
                    for ratio in (None,) if first.explicit else self.ratios:
                        recipe = first if ratio is None else self._recipe(method, ratio)
                        for seed in seeds:
                            yield model, task, recipe.name, recipe, ratio, seed

    def _recipe(self, method: str, ratio: float) -> Recipe:
        """A method or recipe at that ratio; every student gets the grid's training, so a recipe's own is dropped."""
        if method == AUTO or method in registry.METHODS.all():
            allocation = None if method == AUTO else self.allocation
            return for_method(method, ratio, allocation, calibration_tokens=self.calibration_tokens)
        if Path(method).suffix not in (".yaml", ".yml") and method not in shipped_recipes():
            raise unknown("method or recipe", method, [*registry.METHODS.all(), AUTO, *shipped_recipes()])
        recipe = load_recipe(method)
        if recipe.name in (*BASELINES, AUTO, *registry.METHODS.all()):
            raise InputError(f"recipe {method}: is called {recipe.name!r} like a baseline or method; rename it")
        return recipe.model_copy(update={"distill": None, "ratio": None if recipe.explicit else ratio})


@dataclass(frozen=True, eq=False)
class Cell:
    """One result to be: a model made smaller one way, for one task, with one seed.

    Attributes:
        model: the short name of the dense checkpoint.
        origin: what reads it: None for the embedded one.
        method: name of the method or recipe, or of the baseline.
        recipe: None for a baseline.
        ratio: as asked; None for baselines and explicit shapes.
        task: name or file; None for quality without labels.
        task_name: the declared name; empty without a task.
        seed: of its training.
        key: hash of all that decides the result.
        start: name of the folder with what it shares with other cells (stage 1 and what comes before it, or the
            compressed teacher); empty: it has its own.
    """

    model: str
    origin: str | None
    method: str
    recipe: Recipe | None
    ratio: float | None
    task: str | None
    task_name: str
    seed: int
    key: str
    start: str = ""

    @property
    def folder(self) -> str:
        """Name of its folder, unique through the key."""
        parts = [self.model, self.method, f"{self.ratio:g}x" if self.ratio else "", self.task_name, f"seed{self.seed}"]
        return "-".join(part for part in (*parts, self.key[:8]) if part)

    def __str__(self) -> str:
        ratio = f" {self.ratio:g}x" if self.ratio else ""
        return f"{self.method}{ratio}" + (f", {self.task_name}" if self.task else "") + f", seed {self.seed}"


def load_grid(name_or_path: str | Path) -> Grid:
    """Read a bench recipe by short name (shipped) or from a YAML file. Raises InputError."""
    text = read_named("bench recipe", name_or_path, shipped_grids())
    data = parse_mapping(text, f"bench recipe {name_or_path}", "version, name and what to compare")
    grid: Grid = validate(Grid, data, f"bench recipe {name_or_path}")
    return grid


def shipped_grids() -> Mapping[str, Any]:
    """Short name -> file of every bench recipe that comes with compresskit."""
    folder = resources.files("compresskit.benchmark") / "grids"
    return {file.name.removesuffix(".yaml"): file for file in folder.iterdir() if file.name.endswith(".yaml")}
