"""The Python interface: plan, compress, load, to_dense. Re-exported by ``compresskit``."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.model import checkpoint
from compresskit.model.kept import copied
from compresskit.model.quantizer import quantizer_of
from compresskit.model.swap import densify
from compresskit.pipeline import ModelLike, Request, Text
from compresskit.planning.planner import Plan
from compresskit.planning.recipe import Allocation, Objective, Recipe


def plan(model: ModelLike = None, **options: Any) -> Plan:
    """What :func:`compress` would do with the same arguments, with predicted errors; nothing is changed.

    Args:
        model: as for :func:`compress`.
        options: ``method``, ``ratio``, ``size``, ``recipe``, ``allocation``, ``objective``, ``allow_slow``,
            ``calibration``, ``calibration_task``, ``data`` and ``tokenizer`` of :func:`compress`.

    Raises:
        InputError: as for :func:`compress`.
    """
    return Request(model=model, **options).read().calibrated().plan(predict_errors=True)


def compress(
    model: ModelLike = None,
    *,
    method: str | None = None,
    ratio: float | None = None,
    size: str | None = None,
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
        method: a registered method, used for every role; needs ``ratio`` or ``size``.
        ratio: dense parameters / compressed parameters of the whole model, tied tensors once; above 1. The result
            has at least this ratio, normally within 1 %.
        size: instead of ``ratio``: the largest size of the weight file, such as ``5MB`` (10^6 bytes).
        recipe: instead of ``method``: a :class:`Recipe`, the short name of a shipped one, or a YAML file.
        allocation: ``uniform`` (default: all roles at about the same ratio) or ``error`` (least total error).
        objective: ``size`` (default) or ``latency``: of equally small models the one estimated fastest; with allocation
            ``error`` at most about 5 % above the least total squared error.
        allow_slow: also offer shapes that take more than 1.1 x the dense FLOPs.
        calibration: fit the factors to what the layers see on this text, so that outputs are kept, not weights: a file,
            folder or hub data set as for :func:`distill`, True for the embedded text. One pass over the first
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
    request = Request(
        model=model,
        method=method,
        ratio=ratio,
        size=size,
        recipe=recipe,
        allocation=allocation,
        objective=objective,
        allow_slow=allow_slow,
        calibration=calibration,
        calibration_task=calibration_task,
        data=data,
        tokenizer=tokenizer,
    )
    work = request.read().calibrated()
    chosen = work.plan()
    for note in (*work.checkpoint.notes, *chosen.notes):
        warnings.warn(note, stacklevel=2)
    if isinstance(model, PreTrainedModel) and not inplace:
        work = work.copied(chosen)
    work.apply(chosen)
    return work.checkpoint.model


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
        InputError: the model is not compressed, or it is wrapped (``torch.compile``, data parallel).
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"model: give the PreTrainedModel itself, not a {type(model).__name__} around it")
    quantizer_of(model)
    dense = copied(model)
    densify(dense)
    quantizer_of(dense).remove_quantization_config(dense)
    return dense
