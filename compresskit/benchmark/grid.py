"""What a benchmark compares: a grid of models, methods, ratios, tasks and seeds, and the budget every cell gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from compresskit.benchmark.baselines.base import DENSE
from compresskit.benchmark.baselines.registry import BASELINES, find, row_name
from compresskit.benchmark.changes import Beginning, TaskChanges, Variant, check_seeds, no_twins
from compresskit.benchmark.rows import Row, is_tuned
from compresskit.data.units import LANGUAGE, Unit, check_units
from compresskit.decomposers import AUTO, registry
from compresskit.errors import InputError, unknown
from compresskit.planning.recipe import Allocation, Recipe, check_ratio, for_method, load_recipe, shipped_recipes
from compresskit.planning.stage import DEFAULTS, FINE_TUNING, Stage, StageName
from compresskit.tasks.loading import load_task
from compresskit.training.settings import split_settings, with_settings
from compresskit.validation import parse_mapping, read_named, validate

#: What a grid compares with where it says nothing.
USUAL = (DENSE, "int8", "half-layers")
#: The word for no entry where a flag takes several (``--unit none``).
NONE = "none"
#: Stage 1 of every student where the grid says nothing: short, for a first look. At so few tokens small batches win.
GENERAL: dict[str, Any] = {"max_tokens": 40_000, "batch_size": 4}
#: The same where stage 1 teaches vectors, which are compared within a batch, so that few texts a batch teach little
#: (docs/results.md compares batches).
GENERAL_OF_VECTORS: dict[str, Any] = {"max_tokens": 240_000, "batch_size": 16}
#: Fields that came after folders were made. At their defaults they are not written, so that folders of before stay as
#: they are.
_LATER = ("variants", "unit", "fields", "language", "max_texts", "method_seeds")
Seeds = Annotated[tuple[int, ...], Field(min_length=1), AfterValidator(check_seeds)]


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
        unit: of the text: ``sentence``, ``passage``, ``line``. Stage 1 then teaches the vectors of such pieces, as
            ``compresskit distill --unit`` does, and tasks that compare vectors can be scored; empty: hidden states.
        text: general text for stage 1, calibration and quality without labels: a file, a folder of files or a data set
            of the hub; None: the embedded text. With ``unit`` also several, and tables: stage 1 then reads all of them,
            what else reads text the first one alone.
        fields: with ``unit``: columns of tables, each of which gives texts.
        language: with ``unit``: of the sentences, ISO 639-1.
        max_texts: with ``unit``: at most so many texts, chosen at random; with ``epochs`` in ``general`` it is the
            budget in sentences.
        seeds: of order, masks and new heads. The teacher of a task, and baselines that are not trained, take the first.
        method_seeds: method -> seeds of its own, e.g. more of them for the methods that lead.
        baselines: rows without compression by factors: registered names, some with an argument behind a colon.
            ``dense`` (the teacher) is always there.
        teacher: settings of :func:`compresskit.finetune` for a task's teacher.
        students_from: what students are made from: ``checkpoint``, the pre-trained model, or ``teacher``, the task's
            fine-tuned one. Students of a teacher know the task before any training and need no stage 1; methods that
            calibrate then do so on the task's training rows.
        allocation: of methods (a recipe file has its own; ``auto`` always takes ``error``).
        calibration_tokens: of the general text (with ``students_from: teacher`` of the task) that methods fit their
            factors to (a recipe file has its own); 0: they fit the weights alone.
        general: settings of stage 1 (:func:`compresskit.distill` on text) of every student; False leaves it out. The
            default with ``unit`` is another one.
        share_general: train stage 1 once for every method and ratio, with the first seed, and go on from there for
            every task and seed; otherwise every cell has its own.
        task: settings of stage 2 of every student, where there are tasks.
        per_task: name of a task -> what is different for it, e.g. more epochs where there is little data.
        variants: name -> what is different. Every method has a row as the grid says and one more for each variant,
            called ``METHOD + NAME``, so that rows may differ in more than method and ratio, e.g.
            ``without-attention: {task: {losses: {attention: 0}}}``.
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
    unit: tuple[Unit, ...] = ()
    text: str | tuple[str, ...] | None = None
    fields: tuple[str, ...] = ()
    language: str = LANGUAGE
    max_texts: int | None = Field(default=None, ge=4)
    seeds: Seeds = (0,)
    method_seeds: dict[str, Seeds] = Field(default_factory=dict)
    baselines: tuple[str, ...] = USUAL
    teacher: dict[str, Any] = Field(default_factory=dict)
    students_from: Beginning = "checkpoint"
    allocation: Allocation = "uniform"
    calibration_tokens: int = Field(default=0, ge=0)
    general: dict[str, Any] | Literal[False] = Field(default_factory=lambda: dict(GENERAL))
    share_general: bool = False
    task: dict[str, Any] = Field(default_factory=dict)
    per_task: dict[str, TaskChanges] = Field(default_factory=dict)
    variants: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")], Variant] = Field(
        default_factory=dict
    )
    precision: Literal["fp32", "bf16"] = "fp32"
    any_machine: bool = False
    latency_rounds: int = Field(default=5, ge=1)
    exports: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _usual_general(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("unit") and given.get("general", GENERAL) == GENERAL:
            return {**given, "general": dict(GENERAL_OF_VECTORS)}
        return given

    @field_validator("text")
    @classmethod
    def _one_is_no_list(cls, value: Any) -> Any:
        several = no_twins(value) if isinstance(value, tuple) else (value,)
        return several if len(several) > 1 else next(iter(several), None)

    @field_validator("models", "methods", "ratios", "tasks", "fields", "baselines", "exports")
    @classmethod
    def _once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        found: tuple[Any, ...] = no_twins(value)
        return found

    @field_validator("ratios")
    @classmethod
    def _above_one(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(check_ratio(ratio) for ratio in value)

    @model_serializer(mode="wrap")
    def _later_if_set(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        usual = {name: type(self).model_fields[name].get_default(call_default_factory=True) for name in _LATER}
        return {k: value for k, value in whole(self).items() if k not in usual or getattr(self, k) != usual[k]}

    @classmethod
    def of_vectors(cls, models: tuple[str, ...] = ()) -> Grid:
        """What is compared where nothing is said and all models are made for vectors of sentences."""
        methods = (AUTO, *registry.METHODS.all())
        return cls(models=models, methods=methods, ratios=(8, 19), unit=("sentence",), calibration_tokens=16_384)

    def checked(self) -> Grid:
        """The grid itself, once methods, baselines, tasks and settings are known to be valid. Raises InputError."""
        for entry in self.baselines:
            self._check_baseline(entry)
        for method in self.all_methods():
            self._recipe(method, self.ratios[0])
        for task in self.tasks:
            if not is_tuned(task) and load_task(task).transfer_of:
                raise InputError(f"task {task}: is for evaluation only, so nothing can be trained on it")
            if not is_tuned(task) and not self.unit:
                raise InputError(
                    f"task {task}: compares vectors, and nothing can be trained on it; give --unit sentence, so that "
                    "students learn vectors of the text"
                )
        check_units(self.unit, fields=self.fields, language=self.language, limit=self.max_texts)
        if self.data is not None and not self.tasks:
            raise InputError("data belongs to a task: give --task")
        if strangers := [task for task in self.per_task if task not in self.tasks]:
            raise unknown("task of per_task", strangers[0], self.tasks)
        if strangers := [method for method in self.method_seeds if method not in self.all_methods()]:
            raise unknown("method of method_seeds", strangers[0], self.all_methods())
        for variant in self.variants.values():
            if unheard := [method for method in variant.methods if method not in self.all_methods()]:
                raise unknown("method of variants", unheard[0], self.all_methods())
        for name in ("", *self.variants):
            for grid in (self.of(None, name), *(self.of(task, name) for task in self.tasks)):
                for what in ("teacher", "general", "task"):
                    grid.stage(what)
            self.of(None, name)._check_stages()
        return self

    def _check_baseline(self, entry: str) -> None:
        baseline, _ = find(entry)
        BASELINES.installed(baseline.name)
        if row_name(entry) in registry.METHODS.all():
            raise InputError(f"baseline {entry}: is called like a method")
        if baseline.own_tokenizer and not self.tasks:
            raise InputError(f"baseline {entry}: has a tokenizer of its own, so it needs a task: give --task")

    def _check_stages(self) -> None:
        if self.share_general and (self.general is False or not self.tasks):
            raise InputError("share_general: is for stage 1 (general) followed by tasks; there is nothing to share")
        if self.general is False and (vectors := [task for task in self.tasks if not is_tuned(task)]):
            raise InputError(f"task {vectors[0]}: nothing would be trained without stage 1 (general)")
        if self.students_from == "teacher" and (self.general is not False or not self.tasks):
            raise InputError(
                "students_from: teacher is for tasks without stage 1: give tasks, and general: false "
                "(--general-tokens 0)"
            )
        if self.general is False and not self.tasks:
            raise InputError("nothing would be trained: without a task, stage 1 (general) is what distils a student")

    def of(self, task: str | None, variant: str = "", baseline: str = "") -> Grid:
        """The grid as it is for one task, and for one variant of the students or one entry of a baseline."""
        update: dict[str, Any] = {}
        if changes := self.per_task.get(task or ""):
            update = {"seeds": changes.seeds or self.seeds, "teacher": _changed(self.teacher, changes.teacher)}
            update["task"] = _changed(self.task, changes.task)
        if own := self.variants.get(variant):
            same = ("allocation", "calibration_tokens", "students_from")
            update |= {name: value for name in same if (value := getattr(own, name)) is not None}
            update["task"] = _changed(update.get("task", self.task), own.task)
            if own.general is not None:
                update["general"] = own.general and _changed(self.general or {}, own.general)
        found = self.model_copy(update=update) if update else self
        return found._at_pace(find(baseline)[0].pace) if baseline else found

    def _at_pace(self, pace: float) -> Grid:
        """With other learning rates of what students learn in."""
        if pace == 1:
            return self
        rates = {what: pace * self.stage(what)["learning_rate"] for what in ("general", "task") if self.stage(what)}
        changed = {what: _changed(getattr(self, what) or {}, {"learning_rate": rate}) for what, rate in rates.items()}
        return self.model_copy(update=changed)

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
            raise InputError(f"grid {self.name}: {what}: {sorted(own)[0]} cannot be set here; it is the grid's own")
        general: StageName = "sentences" if self.unit else "general"
        default: Stage = FINE_TUNING if what == "teacher" else DEFAULTS[general if what == "general" else "task"]
        try:
            explicit, options = split_settings(given)
            stage = with_settings(default, explicit)
        except InputError as error:
            raise InputError(f"grid {self.name}: {what}: {error}") from None
        if options.new_head and (what != "teacher" or self.students_from != "teacher"):
            raise InputError(f"grid {self.name}: {what}: new_head is for teacher, with students_from: teacher")
        budget = {"max_steps": options.max_steps, "max_tokens": options.max_tokens, "precision": self.precision}
        head = {"new_head": True} if options.new_head else {}  # as stages do, no entry that changes nothing
        return stage.model_dump(mode="json") | budget | head

    def rows(self) -> Iterator[Row]:
        """Every cell, the dense model of a task before its students."""
        for model in self.models or (None,):
            for task in self.tasks or (None,):
                yield from self._baseline_rows(model, task)
                for method in self.all_methods():
                    for variant in ("", *self.variants):
                        if not variant or method in (self.variants[variant].methods or (method,)):
                            yield from self._student_rows(model, task, method, variant)

    def names(self) -> list[str]:
        """What tables call the rows of the grid, in its order."""
        methods = [(method, variant) for method in self.all_methods() for variant in ("", *self.variants)]
        first = () if DENSE in self.baselines else (DENSE,)
        return [*map(row_name, (*first, *self.baselines)), *(_with_variant(*both) for both in methods)]

    def _baseline_rows(self, model: str | None, task: str | None) -> Iterator[Row]:
        seeds = self.of(task).seeds
        for entry in (DENSE, *(entry for entry in self.baselines if entry != DENSE)):
            baseline, _ = find(entry)
            for ratio in self.ratios if baseline.rated else (None,):
                for seed in seeds if baseline.trained else seeds[:1]:
                    yield Row(model, task, seed, row_name(entry), baseline=entry, ratio=ratio)

    def _student_rows(self, model: str | None, task: str | None, method: str, variant: str) -> Iterator[Row]:
        grid = self.of(task, variant)
        first = grid._recipe(method, self.ratios[0])
        for ratio in (None,) if first.explicit else self.ratios:
            recipe = first if ratio is None else grid._recipe(method, ratio)
            for seed in grid.method_seeds.get(method, grid.seeds):
                name = _with_variant(recipe.name, variant)
                yield Row(model, task, seed, name, recipe=recipe, ratio=ratio, variant=variant)

    def _recipe(self, method: str, ratio: float) -> Recipe:
        """A method or recipe at that ratio; every student gets the grid's training, so a recipe's own is dropped."""
        if method == AUTO or method in registry.METHODS.all():
            allocation = None if method == AUTO else self.allocation
            return for_method(method, ratio, allocation, calibration_tokens=self.calibration_tokens)
        if Path(method).suffix not in (".yaml", ".yml") and method not in shipped_recipes():
            raise unknown("method or recipe", method, [*registry.METHODS.all(), AUTO, *shipped_recipes()])
        recipe = load_recipe(method)
        if recipe.name in (*BASELINES.all(), AUTO, *registry.METHODS.all()):
            raise InputError(f"recipe {method}: is called {recipe.name!r} like a baseline or method; rename it")
        return recipe.model_copy(update={"distill": None, "ratio": None if recipe.explicit else ratio})


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


def _changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings of a stage with some replaced; of losses those alone whose weights are given, as everywhere."""
    both = [given["losses"] for given in (settings, changes) if "losses" in given]
    losses = {"losses": {name: weight for one in both for name, weight in one.items()}} if both else {}
    return settings | changes | losses


def _with_variant(name: str, variant: str) -> str:
    return f"{name} + {variant}" if variant else name
