"""What a teacher says of a data set's rows, computed once and kept in files that students, seeds and epochs share.

On a CPU the teacher is a quarter of a step or more where it has six layers, and more still where it has twelve.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from torch import Tensor

from compresskit.storage.writing import reserve
from compresskit.tasks.predictions import Predictions

#: Column of the data set with the number of the row.
ROW = "row"
#: What progress is told is at work.
TEACHER = "outputs of the teacher"
_BATCH = 32
_INDEX, _LOCK = "index.json", ".lock"
_UNEVEN = "its outputs are not one for each token, or layers differ in shape"
#: Outputs of every layer -> axes of one row's share of a layer stack that are over its tokens.
_LAYERS = {"hidden_states": (1,), "attentions": (2, 3)}
#: Axes of one row's share of an output; None over tokens.
Shape = list[int | None]


class Outputs(dict[str, Any]):
    """A model's outputs, as the losses read them."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class TaughtRows:
    """The outputs for the rows of a data set, in memory-mapped files: row after row, without padding.

    Args:
        folder: holds one file per output.
        shapes, dtypes: of each output; a type by its name in torch.
        lengths: tokens of each row.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, Shape], dtypes: Mapping[str, str], lengths: Sequence[int]
    ) -> None:
        self.shapes, self.lengths = shapes, lengths
        self.starts = {name: np.cumsum([0, *(math.prod(_axes(s, n)) for n in lengths)]) for name, s in shapes.items()}
        self.files = {
            name: torch.from_file(str(folder / name), True, int(starts[-1]), dtype=getattr(torch, dtypes[name]))
            for name, starts in self.starts.items()
        }

    def _share(self, name: str, row: int) -> Tensor:
        start, end = self.starts[name][row : row + 2].tolist()
        return self.files[name][start:end].view(_axes(self.shapes[name], self.lengths[row]))

    def write(self, rows: Sequence[int], outputs: Mapping[str, Tensor]) -> None:
        """Keep a padded batch of :func:`_rows_first`."""
        for name, batch in outputs.items():
            for row, padded in zip(rows, batch, strict=True):
                share = self._share(name, row)
                share.copy_(padded[tuple(map(slice, share.shape))])

    def batch(self, rows: Sequence[int], tokens: int) -> Outputs:
        """The outputs of some rows, padded with zeros to ``tokens``."""
        found = Outputs()
        for name, shape in self.shapes.items():
            padded = self.files[name].new_zeros((len(rows), *_axes(shape, tokens)))
            for place, row in zip(padded, rows, strict=True):
                share = self._share(name, row)
                place[tuple(map(slice, share.shape))] = share
            found[name] = padded.unbind(1) if name in _LAYERS else padded
        return found


def teach(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Any]],
    dataset: Dataset,
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]],
    folder: Path,
    kind: Sequence[Any],
    *,
    predictions: Predictions,
    half: bool,
    progress: Callable[[str, int, int], None] | None = None,
) -> TaughtRows | str:
    """Read what is kept of a teacher for these rows, or compute and keep it; processes wait for one that does.

    Args:
        run: the teacher: a batch to its outputs.
        dataset: with ``input_ids`` and ``length``.
        collate: makes a padded batch of rows.
        folder: of this one teacher, for all its data sets.
        kind: what decides the outputs beside the rows: which teacher, which of its outputs.
        predictions: what the teacher predicts.
        half: keep hidden states and attention in bf16.
        progress: ``(what, done, total)``.

    Returns:
        Why, where nothing can be kept: layers of different shapes, rows that are padded in front, or more than half of
        the free disk would be taken.
    """
    identity = json.dumps([_content(dataset), half, *kind], sort_keys=True)
    target = folder / hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / _LOCK):
        found = _read(target, dataset)
        if found is None:
            shutil.rmtree(target, ignore_errors=True)
            part = target.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            try:
                reason = _compute(run, dataset, collate, part, predictions, half, progress)
                if reason is not None:
                    return reason
                part.rename(target)
            finally:
                shutil.rmtree(part, ignore_errors=True)
            found = _read(target, dataset)
        return found or "its files vanished"


def remove(folder: Path) -> None:
    """Delete what is kept, unless another process computes; one that reads goes on reading."""
    with suppress(Timeout), FileLock(folder / _LOCK, timeout=0):
        for path in [path for path in folder.iterdir() if path.is_dir()]:
            # Renamed first: a kill while it is deleted must not leave a part of it under its name.
            shutil.rmtree(path.rename(path.with_suffix(".part")), ignore_errors=True)


def _read(folder: Path, dataset: Dataset) -> TaughtRows | None:
    """What is kept, if it is there whole."""
    if not (folder / _INDEX).is_file():
        return None
    index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    lengths = list(dataset["length"])
    sizes = _bytes(index["shapes"], index["dtypes"], lengths)
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
    return TaughtRows(folder, index["shapes"], index["dtypes"], lengths) if whole else None


def _bytes(shapes: Mapping[str, Shape], dtypes: Mapping[str, str], lengths: Sequence[int]) -> dict[str, int]:
    """Size of every file."""
    return {
        name: sum(math.prod(_axes(shape, length)) for length in lengths) * getattr(torch, dtypes[name]).itemsize
        for name, shape in shapes.items()
    }


def _compute(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Any]],
    dataset: Dataset,
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]],
    folder: Path,
    predictions: Predictions,
    half: bool,
    progress: Callable[[str, int, int], None] | None,
) -> str | None:
    """Fill the folder; why that is not possible, where it is not."""
    lengths = list(dataset["length"])
    order = np.argsort(lengths, kind="stable")[::-1].tolist()
    kept: TaughtRows | None = None
    shapes: dict[str, Shape] = {}
    for start in range(0, len(order), _BATCH):
        rows = order[start : start + _BATCH]
        batch = collate(list(dataset.select(rows)))
        tokens = batch["input_ids"].shape[1]
        behind = torch.arange(tokens) >= torch.tensor([[lengths[row]] for row in rows])
        if batch["attention_mask"][behind].any():
            return "rows are not padded at their end"
        outputs = _rows_first(run(batch), predictions)
        if outputs is None:
            return _UNEVEN
        if kept is None:
            axes = {name: _over_tokens(name, one, predictions) for name, one in outputs.items()}
            if any(not _by_tokens(one, axes[name], tokens) for name, one in outputs.items()):
                return _UNEVEN
            shapes = {
                name: [None if axis in axes[name] else size for axis, size in enumerate(one.shape[1:])]
                for name, one in outputs.items()
            }
            dtypes = {name: "bfloat16" if half and name in _LAYERS else "float32" for name in shapes}
            sizes = _bytes(shapes, dtypes, lengths)
            if sum(sizes.values()) > shutil.disk_usage(folder).free / 2 or not _reserve(folder, sizes):
                return f"{sum(sizes.values()) / 1e9:.1f} GB are more than half of the free disk"
            kept = TaughtRows(folder, shapes, dtypes, lengths)
        kept.write(rows, outputs)
        if progress is not None:
            progress(TEACHER, start + len(rows), len(order))
    (folder / _INDEX).write_text(json.dumps({"shapes": shapes, "dtypes": dtypes}), encoding="utf-8")
    return None


def _reserve(folder: Path, sizes: Mapping[str, int]) -> bool:
    """Take the room of every file; False where there is none."""
    try:
        for name, size in sizes.items():
            reserve(folder / name, size)
    except OSError:
        return False
    return True


def _rows_first(outputs: Mapping[str, Any], predictions: Predictions) -> dict[str, Tensor] | None:
    """Every output as one tensor with the rows first, then the layers; None where layers differ in shape."""
    found: dict[str, Tensor] = {}
    for name in (*_LAYERS, *predictions.outputs):
        value = outputs.get(name)
        if value is not None and name in _LAYERS:
            if len({layer.shape for layer in value}) > 1:
                return None
            value = torch.stack(tuple(value), 1)
        if value is not None:
            found[name] = value
    return found


def _over_tokens(name: str, batch: Tensor, predictions: Predictions) -> tuple[int, ...]:
    """Axes of one row's share that are over its tokens."""
    if name in _LAYERS:
        return _LAYERS[name]
    return (0,) if predictions.over_tokens(batch) else ()


def _by_tokens(batch: Tensor, axes: Sequence[int], tokens: int) -> bool:
    """Whether the axes that should be over tokens are."""
    return batch.dim() - 1 > max(axes, default=0) and all(batch.shape[1 + axis] == tokens for axis in axes)


def _content(dataset: Dataset) -> str:
    """A hash of every row of every column."""
    digest = hashlib.sha256()
    for name in sorted(dataset.column_names):
        digest.update(json.dumps([name, dataset[name][:]]).encode())
    return digest.hexdigest()


def _axes(shape: Shape, tokens: int) -> tuple[int, ...]:
    return tuple(tokens if size is None else size for size in shape)
