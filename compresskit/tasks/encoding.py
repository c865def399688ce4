"""Texts and targets of a task as token sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from compresskit.tasks import squad
from compresskit.tasks.task import Split, Task

#: Tokens that two windows of one paragraph share.
STRIDE = 128


def encode(
    task: Task, split: Split, tokenizer: Any, max_length: int, label_ids: Mapping[str, int] | None = None
) -> Dataset:
    """The split as a data set of token sequences.

    Columns: the tokenizer's (without ``attention_mask``: the collator makes it), ``length``, and the targets:
    ``labels`` or, for spans, ``start_positions``, ``end_positions``, ``example`` (row number) and ``offsets``. Longer
    texts are cut at ``max_length``, or split into overlapping windows (spans).

    Args:
        label_ids: class number of each label name; classification only.
    """
    if task.kind == "spans":
        columns = squad.windows(tokenizer, split.texts, split.targets, max_length, min(STRIDE, max_length // 3))
    else:
        texts = [list(column) for column in zip(*split.texts, strict=True)]
        encoded = tokenizer(*texts, truncation=True, max_length=max_length)
        columns = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
        if task.kind == "regression":
            columns["labels"] = [float(target) for target in split.targets]
        elif label_ids is not None:
            columns["labels"] = [label_ids[target] for target in split.targets]
    columns.pop("attention_mask", None)
    columns["length"] = [len(ids) for ids in columns["input_ids"]]
    return Dataset.from_dict(columns)
