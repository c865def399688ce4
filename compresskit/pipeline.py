"""The one way from a checkpoint to a compressed one, in steps that can be taken one by one.

request = Request(model="all-MiniLM-L6-v2", method="low-rank", ratio=10)  # what needs no model is refused here
work = request.read()                           # the checkpoint, and the recipe for it
work = work.calibrated()                        # with statistics, where the recipe wants them
plan = work.plan()                              # a spec for every group
plan = work.apply(plan)                         # the model is compressed in place, errors are measured
work.write(plan, folder, title)                 # weights, tokenizer, recipe, record, model card
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel

from compresskit.calibration.statistics import TOKENS, Calibration, calibrate
from compresskit.data.corpus import Corpus, find_corpus
from compresskit.errors import InputError, WorkError, unknown
from compresskit.folders.compressed import write_compressed
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.kept import copied
from compresskit.model.measure import count_flops
from compresskit.model.output import output_folder
from compresskit.model.quantizer import quantizer_of
from compresskit.model.sentence_vectors import numbers_behind, reader_of_text
from compresskit.model.sources import ModelWeights, check_finite
from compresskit.model.targets import check_supported
from compresskit.model.tokenizer import find_tokenizer
from compresskit.planning.apply import apply_plan
from compresskit.planning.planner import Plan, Untrimmed, check_reachable, make_plan
from compresskit.planning.recipe import Allocation, Objective, Recipe, check_ratio, for_method, load_recipe
from compresskit.planning.size import SizeLimit, parse_size
from compresskit.progress import Progress, silent
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.rows import TaskData
from compresskit.vocabulary.choice import Asked
from compresskit.vocabulary.trimming import trimmed

ModelLike = PreTrainedModel | str | Path | None
Text = str | Path | Corpus


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that may be asked of a compression. A new option is a field here, and a flag of the command.

    Attributes:
        model: a model, a folder or a hub id. Default: the embedded demo checkpoint.
        as_class: the class to read a folder in, a key of :data:`~compresskit.model.checkpoint.MODEL_CLASSES`. Default:
            the checkpoint's own.
        device: where to compute, e.g. ``cpu`` or ``cuda``.
        size: of the weight file, such as ``5MB``, instead of ``ratio``.
        trim_text: trim the vocabulary first, to the tokens that this text uses most; ratio and size then count against
            the model before that. ``compresskit.compress`` has no such option, since it gives no tokenizer.
        trim_keep: how many tokens to keep.
        trim_coverage: instead: which share of the text's tokens. Default: 0.999.
        method, ratio, recipe, allocation, objective, allow_slow, calibration, calibration_task, data, tokenizer:
            see :func:`compresskit.compress`.

    Raises:
        InputError: neither or both of method and recipe, or of ratio and size; no ratio for a method, a ratio for
            explicit shapes, an unknown method, allocation or objective, a recipe whose rules do not fit together, a
            text and a task for the calibration, data without a task, how much to trim without a text for it.
    """

    model: ModelLike = None
    as_class: str | None = None
    device: str = "cpu"
    method: str | None = None
    ratio: float | None = None
    size: str | None = None
    recipe: Recipe | str | Path | None = None
    allocation: Allocation | None = None
    objective: Objective | None = None
    allow_slow: bool = False
    calibration: Text | bool | None = None
    calibration_task: str | Path | None = None
    data: str | Path | None = None
    tokenizer: Any = None
    trim_text: Text | None = None
    trim_keep: int | None = None
    trim_coverage: float | None = None

    def __post_init__(self) -> None:
        if self.size is not None:
            if self.ratio is not None:
                raise InputError("give a ratio or a size, not both")
            parse_size(self.size)
        self._recipe(self.ratio)
        if self.calibration_task is not None and self._has_text:
            raise InputError("calibrate on a text or on a task, not on both")
        if self.calibration_task is None and self.data is not None:
            raise InputError("data belongs to a task: give a calibration task too")
        if self.trim_text is None and (self.trim_keep is not None or self.trim_coverage is not None):
            raise InputError("trimming needs a text to choose the tokens by: give --trim-text")
        if self.trim_text is not None and (self.tokenizer is not None or isinstance(self.model, PreTrainedModel)):
            raise InputError("a vocabulary is trimmed with its tokenizer: give the checkpoint's folder, not objects")
        Asked(self.trim_keep, self.trim_coverage)

    def read(self) -> Compression:
        """The checkpoint in memory with the recipe for it, after the calibration's text was found.

        Raises:
            InputError: a text or task that cannot be read, a task without training rows, a model that cannot be
                compressed, a vocabulary that cannot be trimmed.
        """
        text = self._text()
        if self.trim_text is not None:
            find_corpus(self.trim_text)  # refused before the model is read
        return replace(self.of(self._checkpoint()), text=text)

    def of(self, dense: Checkpoint) -> Compression:
        """For a checkpoint that was read already; a calibration reads the embedded text. Raises InputError: its
        vocabulary cannot be trimmed.
        """
        untrimmed = None
        if self.trim_text is not None:
            asked = Asked(self.trim_keep, self.trim_coverage)
            dense, untrimmed = _trimmed(dense, find_corpus(self.trim_text), asked)
        size = None if self.size is None else SizeLimit(parse_size(self.size), dense.kept)
        return Compression(dense, self._recipe(self.ratio), tokenizer=self.tokenizer, size=size, untrimmed=untrimmed)

    @property
    def _has_text(self) -> bool:
        return self.calibration is not None and self.calibration is not False

    def _recipe(self, ratio: float | None) -> Recipe:
        """The recipe that is meant, with this ratio."""
        if self.allocation is not None and self.allocation not in get_args(Allocation):
            raise unknown("allocation", str(self.allocation), get_args(Allocation))
        if self.objective is not None and self.objective not in get_args(Objective):
            raise unknown("objective", str(self.objective), get_args(Objective))
        if (self.method is None) == (self.recipe is None):
            both = "" if self.method is None else ", not both"
            raise InputError(f"give either a method (with a ratio) or a recipe{both}")
        tokens = TOKENS if self._has_text or self.calibration_task is not None else 0
        if self.method is not None:
            if ratio is None and self.size is None:
                raise InputError(f"method {self.method} needs a ratio or a size")
            return for_method(
                self.method,
                ratio,
                self.allocation,
                self.allow_slow,
                self.objective or "size",
                calibration_tokens=tokens,
            )
        recipe = self.recipe.checked() if isinstance(self.recipe, Recipe) else load_recipe(self.recipe or "")
        choices: tuple[tuple[str, Any, str], ...] = (
            ("ratio", ratio or self.size, "a ratio or size"),
            ("allocation", self.allocation, "an allocation"),
            ("objective", self.objective, "an objective"),
            ("allow_slow", self.allow_slow or None, "allow_slow"),
        )
        for _, given, what in choices if recipe.explicit else ():
            if given is not None:
                raise InputError(f"recipe {recipe.name} gives explicit shapes, so {what} cannot be chosen")
        changes = {name: given for name, given, _ in choices if given is not None}
        if ratio is not None or self.size is not None:
            changes["ratio"] = None if ratio is None else check_ratio(ratio)
        if not recipe.calibration_tokens:
            changes["calibration_tokens"] = tokens
        return recipe.model_copy(update=changes).checked()

    def _text(self) -> Corpus | TaskData:
        """What a calibration reads: the rows of a task, or else a text (without any: the embedded one)."""
        if self.calibration_task is not None:
            return load_data(load_task(self.calibration_task), None if self.data is None else Path(self.data))
        return find_corpus(None if isinstance(self.calibration, bool) else self.calibration)

    def _checkpoint(self) -> Checkpoint:
        """The dense model with what its folder holds beside it."""
        if self.model is None or isinstance(self.model, str | Path):
            dense = checkpoints.read(self.model, self.as_class, self.device)
            behind = numbers_behind(dense.folder) if dense.model.base_model is dense.model else 0
            note = (
                f"layers behind the encoder stay as they are: {behind:,} parameters, which ratio, size and MB leave out"
            )
            return replace(dense, notes=(*dense.notes, *([note] if behind else [])))
        found = checkpoints.in_memory(self.model)
        check_supported(found.model)
        check_finite(found.model)
        return found


def _trimmed(dense: Checkpoint, text: Corpus, asked: Asked) -> tuple[Checkpoint, Untrimmed]:
    """The checkpoint with a trimmed vocabulary, which a note tells of, and what it was before."""
    made = trimmed(dense, text, asked)
    untrimmed = Untrimmed(
        text=text.name,
        rows=made.record.rows.before,
        parameters=made.record.parameters.before,
        flops=count_flops(dense.model),
        rows_left=made.record.rows.after,
        parameters_left=made.record.parameters.after,
    )
    return replace(made.checkpoint, notes=(*dense.notes, *text.notes, made.record.summary())), untrimmed


@dataclass(frozen=True)
class Compression:
    """One checkpoint on its way; every step can be taken by itself.

    Attributes:
        checkpoint: dense, until :meth:`apply` compresses its model in place.
        recipe: with a ratio or with explicit shapes.
        text: what a calibration reads; only needed where the recipe wants one and there are no statistics yet.
        tokenizer: to read it with. Default: the checkpoint's own.
        statistics: from calibration; errors are then those of outputs, and factors keep outputs instead of weights.
        size: of the weight file, instead of the recipe's ratio.
        untrimmed: the model before its vocabulary was trimmed, if it was; the ratio counts against it.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    text: Corpus | TaskData | None = None
    tokenizer: Any = None
    statistics: Calibration | None = None
    size: SizeLimit | None = None
    untrimmed: Untrimmed | None = None

    def calibrated(self, progress: Progress = silent) -> Compression:
        """The same with the statistics that the recipe wants; unchanged where it wants none.

        Raises:
            InputError: a text that cannot be read, no tokenizer to read it with.
        """
        if not self.recipe.calibration_tokens:
            return self
        dense, tokens = self.checkpoint, self.recipe.calibration_tokens
        reader = find_tokenizer(self.tokenizer, dense)
        text = find_corpus(None) if self.text is None else self.text
        if isinstance(text, Corpus):  # rows of a task are read as training reads them
            reader = reader_of_text(dense, reader)
            dense = replace(dense, notes=tuple(dict.fromkeys((*dense.notes, *text.notes))))
        weigh = self.recipe.by_error
        found = calibrate(dense.model, reader, text, tokens, progress, weigh=weigh, untrained=dense.untrained)
        return replace(self, checkpoint=dense, statistics=found)

    def plan(self, *, predict_errors: bool = False, progress: Progress = silent) -> Plan:
        """A spec for every group; nothing is changed. See :func:`~compresskit.planning.planner.make_plan`.

        Raises:
            InputError: a rule that matches nothing, a ratio or size out of reach, a shape that does not fit or saves
                nothing, a model without weights where they are needed.
        """
        model = self.checkpoint.model
        return make_plan(
            model,
            self.recipe,
            ModelWeights(model),
            size=self.size,
            statistics=self.statistics,
            untrimmed=self.untrimmed,
            predict_errors=predict_errors,
            progress=progress,
        )

    def check_reachable(self) -> None:
        """Refuse a ratio or size that no plan can have, before anything is computed. Raises InputError."""
        model = self.checkpoint.model
        check_reachable(model, self.recipe, ModelWeights(model), size=self.size, untrimmed=self.untrimmed)

    def copied(self, plan: Plan) -> Compression:
        """The same with a copy of the model, which shares only the weights that ``plan`` replaces: they are read once
        and then gone from the copy.
        """
        model = self.checkpoint.model
        names = [target.name for assignment in plan.assignments for target in assignment.group.targets]
        weights = [model.get_submodule(name).weight for name in names]
        memo: dict[int, Any] = {id(weight): weight for weight in weights}
        return replace(self, checkpoint=replace(self.checkpoint, model=copied(model, memo)))

    def apply(self, plan: Plan, progress: Progress = silent) -> Plan:
        """Compress the checkpoint's model in place; the plan with the measured error of every group."""
        model = self.checkpoint.model
        applied = apply_plan(model, plan, progress, statistics=self.statistics)
        quantizer_of(model).extra_tensors = self.checkpoint.kept
        return applied

    def write(self, plan: Plan, folder: Path, title: str) -> tuple[float, float]:
        """Fill ``folder`` with the compressed checkpoint, its record and its card; returns MB before and after.

        Raises:
            WorkError: the weight file is larger than the size that was asked for.
        """
        megabytes = write_compressed(self.checkpoint, plan, folder, title)
        written = sum(file.stat().st_size for file in checkpoints.weight_files(folder))
        if self.size is not None and written > self.size.most:
            raise WorkError(f"size {self.size}: the weight file has {written:,} bytes; ask for a little less")
        return megabytes

    def write_to(
        self, folder: Path, plan: Plan, *, overwrite: bool = False, progress: Progress = silent
    ) -> tuple[Plan, tuple[float, float]]:
        """:meth:`apply` and :meth:`write` to a folder, which appears once it is complete.

        Returns:
            The plan with measured errors; MB before and after.

        Raises:
            InputError: the folder exists and may not be overwritten, or cannot be written.
            WorkError: see :meth:`write`.
        """
        with output_folder(folder, overwrite) as temporary:
            plan = self.apply(plan, progress)
            return plan, self.write(plan, temporary, folder.name)
