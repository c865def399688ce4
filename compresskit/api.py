"""The Python interface: plan, compress, load, to_dense. Re-exported by ``compresskit``."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedModel

from compresskit.calibration.statistics import TOKENS, Calibration, calibrate
from compresskit.data.corpus import Corpus, find_corpus
from compresskit.errors import InputError, unknown
from compresskit.model import checkpoint
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.quantizer import quantizer_of
from compresskit.model.sources import ModelWeights, check_finite
from compresskit.model.swap import densify
from compresskit.model.targets import check_supported
from compresskit.model.tokenizer import find_tokenizer
from compresskit.planning.apply import apply_plan
from compresskit.planning.planner import Plan, Progress, make_plan, silent
from compresskit.planning.recipe import Allocation, Objective, Recipe, check_ratio, for_method, load_recipe
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.rows import TaskData

ModelLike = PreTrainedModel | str | Path | None
Text = str | Path | Corpus


def choose_recipe(
    *,
    method: str | None = None,
    ratio: float | None = None,
    recipe: Recipe | str | Path | None = None,
    allocation: Allocation | None = None,
    objective: Objective | None = None,
    allow_slow: bool = False,
    calibrated: bool = False,
) -> Recipe:
    """The recipe that these choices mean; see :func:`compress` for them.

    Raises:
        InputError: neither or both of method and recipe, no ratio for a method, a ratio for explicit shapes, an unknown
            allocation or objective, a recipe whose rules do not fit together.
    """
    if allocation is not None and allocation not in get_args(Allocation):
        raise unknown("allocation", str(allocation), get_args(Allocation))
    if objective is not None and objective not in get_args(Objective):
        raise unknown("objective", str(objective), get_args(Objective))
    if (method is None) == (recipe is None):
        raise InputError("give either a method (with a ratio) or a recipe" + ("" if method is None else ", not both"))
    if method is not None:
        if ratio is None:
            raise InputError(f"method {method} needs a ratio or a size")
        tokens = TOKENS if calibrated else 0
        return for_method(method, ratio, allocation, allow_slow, objective or "size", tokens)
    chosen = recipe.checked() if isinstance(recipe, Recipe) else load_recipe(recipe or "")
    update: dict[str, Any] = {}
    if chosen.explicit:
        for given, what in ((ratio, "a ratio or size"), (allocation, "an allocation"), (objective, "an objective")):
            if given is not None:
                raise InputError(f"recipe {chosen.name} gives explicit shapes, so {what} cannot be chosen")
    if ratio is not None:
        update["ratio"] = check_ratio(ratio)
    if allocation is not None:
        update["allocation"] = allocation
    if objective is not None:
        update["objective"] = objective
    if allow_slow:
        update["allow_slow"] = True
    if calibrated and not chosen.calibration_tokens:
        update["calibration_tokens"] = TOKENS
    return chosen.model_copy(update=update).checked()


def plan(
    model: ModelLike = None,
    *,
    method: str | None = None,
    ratio: float | None = None,
    recipe: Recipe | str | Path | None = None,
    allocation: Allocation | None = None,
    objective: Objective | None = None,
    allow_slow: bool = False,
    calibration: Text | bool = False,
    calibration_task: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: Any = None,
) -> Plan:
    """What :func:`compress` would do with the same arguments, with predicted errors; nothing is changed."""
    asked = choose_recipe(
        method=method,
        ratio=ratio,
        recipe=recipe,
        allocation=allocation,
        objective=objective,
        allow_slow=allow_slow,
        calibrated=calibration is not False or calibration_task is not None,
    )
    text = find_calibration(calibration, calibration_task, data)
    dense = _dense(model)
    statistics = find_statistics(dense, asked, text, tokenizer)
    return make_plan(dense.model, asked, ModelWeights(dense.model), statistics=statistics, predict_errors=True)


def compress(
    model: ModelLike = None,
    *,
    method: str | None = None,
    ratio: float | None = None,
    recipe: Recipe | str | Path | None = None,
    allocation: Allocation | None = None,
    objective: Objective | None = None,
    allow_slow: bool = False,
    calibration: Text | bool = False,
    calibration_task: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: Any = None,
    inplace: bool = False,
) -> PreTrainedModel:
    """A compressed model of the same class.

    Args:
        model: a model, a folder or a hub id. Default: the embedded demo checkpoint.
        method: a registered method, used for every role; needs ``ratio``.
        ratio: dense parameters / compressed parameters of the whole model, tied tensors once; above 1. The result
            has at least this ratio, normally within 1 %.
        recipe: instead of ``method``: a :class:`Recipe`, the short name of a shipped one, or a YAML file.
        allocation: ``uniform`` (default: all roles at about the same ratio) or ``error`` (least total error).
        objective: ``size`` (default) or ``latency``: of equally small models the one estimated fastest; with allocation
            ``error`` at most 5 % above the least total squared error.
        allow_slow: also offer shapes that take more than 1.1 x the dense FLOPs.
        calibration: fit the factors to what the layers see on this text, so that outputs are kept, not weights: a file
            or hub data set as for :func:`distill`, True for the embedded text. One pass over the first
            ``calibration_tokens`` of the recipe (default: 65,536).
        calibration_task: instead of ``calibration``: the training rows of this task, best for a model that was
            fine-tuned on it. With a head for it, specs that are chosen by error (allocation ``error``, method ``auto``)
            weigh every matrix by how much the model's predictions depend on it.
        data: folder with the files of ``calibration_task``. Default: the hub.
        tokenizer: for the calibration of a model given as an object; a folder has its own.
        inplace: change the given model instead of a copy.

    Returns:
        A model whose ``save_pretrained`` folder reloads with ``from_pretrained`` once compresskit is imported.

    Warns:
        UserWarning: what the command line prints as a note, e.g. a ratio that is not near the asked one.

    Raises:
        InputError: unknown method or recipe, a ratio out of reach, a model that cannot be compressed, a text or task
            that cannot be read, both of them, no tokenizer to read it with.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> import compresskit
        >>> config = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
        ...                     vocab_size=1000, max_position_embeddings=64)
        >>> small = compresskit.compress(BertModel(config), method="low-rank", ratio=3)
        >>> small.embeddings.word_embeddings
        LowRankEmbedding(num_embeddings=1000, embedding_dim=64, rank=18)
    """
    asked = choose_recipe(
        method=method,
        ratio=ratio,
        recipe=recipe,
        allocation=allocation,
        objective=objective,
        allow_slow=allow_slow,
        calibrated=calibration is not False or calibration_task is not None,
    )
    text = find_calibration(calibration, calibration_task, data)
    dense = _dense(model)
    statistics = find_statistics(dense, asked, text, tokenizer)
    chosen = make_plan(dense.model, asked, ModelWeights(dense.model), statistics=statistics)
    for note in (*dense.notes, *chosen.notes):
        warnings.warn(note, stacklevel=2)
    student = dense.model if inplace or not isinstance(model, PreTrainedModel) else _copy(dense.model, chosen)
    apply_plan(student, chosen, statistics=statistics)
    quantizer_of(student).extra_tensors = dense.kept
    return student


def find_calibration(
    calibration: Text | bool | None, task: str | Path | None, data: str | Path | None
) -> Corpus | TaskData:
    """What a calibration reads: the rows of a task, or else a text (without any: the embedded one).

    Raises:
        InputError: a text and a task, data without a task, a text or task that cannot be read, a task without training
            rows.
    """
    if task is None:
        if data is not None:
            raise InputError("data belongs to a task: give a calibration task too")
        return find_corpus(None if isinstance(calibration, bool) else calibration)
    if calibration is not None and calibration is not False:
        raise InputError("calibrate on a text or on a task, not on both")
    return load_data(load_task(task), None if data is None else Path(data))


def find_statistics(
    dense: Checkpoint,
    recipe: Recipe,
    text: Corpus | TaskData,
    tokenizer: Any = None,
    progress: Progress = silent,
) -> Calibration | None:
    """The statistics that the recipe wants, on this text or task; None where it wants none.

    Raises:
        InputError: a text that cannot be read, no tokenizer to read it with.
    """
    if not recipe.calibration_tokens:
        return None
    reader, tokens = find_tokenizer(tokenizer, dense), recipe.calibration_tokens
    return calibrate(dense.model, reader, text, tokens, progress, weigh=recipe.by_error, untrained=dense.untrained)


def _dense(model: ModelLike) -> Checkpoint:
    """The dense model with what its folder holds beside it."""
    if model is None or isinstance(model, str | Path):
        return checkpoint.read(model)
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model: give a PreTrainedModel, a folder or a hub id, not a {type(model).__name__}")
    check_supported(model)
    check_finite(model)
    name = model.config.name_or_path or type(model).__name__
    return Checkpoint(Path(name).name, name, None, model, {})


def _copy(model: PreTrainedModel, chosen: Plan) -> PreTrainedModel:
    """A deep copy that shares only the weights the plan replaces: they are read once and then gone from the copy."""
    names = [target.name for assignment in chosen.assignments for target in assignment.group.targets]
    weights = [model.get_submodule(name).weight for name in names]
    memo: dict[int, Any] = {id(weight): weight for weight in weights}
    return copy.deepcopy(model, memo)


def load(folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a compressed folder strictly, as the class it was saved from.

    Unlike ``from_pretrained`` this refuses a folder that is not compressed, weights that are missing, unknown, of
    another shape or not finite, and files whose SHA-256 is not the one in ``compression.json`` (where there is one).

    Args:
        folder: what ``compresskit compress`` or ``save_pretrained`` wrote.
        kwargs: passed on to ``from_pretrained``.

    Raises:
        InputError: says what is wrong with the folder.
    """
    return checkpoint.load_compressed(Path(folder), **kwargs)


def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """An ordinary model of the same class with every factorised weight multiplied out: the same outputs up to rounding.

    The given model is not changed (``model.dequantize()`` works in place).

    Raises:
        InputError: the model is not compressed.
    """
    quantizer_of(model)
    dense = copy.deepcopy(model)
    densify(dense)
    quantizer_of(dense).remove_quantization_config(dense)
    return dense
