"""The record of a cell: one validated, versioned JSON file; every table is a view of these."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compresskit.benchmark.baselines.base import DENSE
from compresskit.benchmark.provenance import MadeBy, digest
from compresskit.errors import InputError
from compresskit.scores import mean_over_splits, says_nothing, share_kept
from compresskit.storage.writing import write_text
from compresskit.validation import validate

FORMAT_VERSION: Literal[1] = 1
RECORD = "record.json"
#: Among the scores of a retrieval: those where the dense model embeds the documents.
WITH_DENSE = "documents by the dense model"


#: A name for tables, pages and folders: nothing in it means anything to Markdown, HTML, LaTeX or a spreadsheet.
Name = Annotated[str, Field(pattern=r"^(\w[\w .+-]*)?$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Timing(_Strict):
    """Milliseconds of one forward pass, and of the dense model's between the same two rounds.

    Attributes:
        milliseconds: median over the rounds.
        spread: interquartile range over the rounds.
        speedup: median of dense / this, round by round.
    """

    milliseconds: float
    spread: float
    speedup: float


class Latency(_Strict):
    """What the closing phase measured, for all cells of a folder together.

    Attributes:
        phase: name of the phase; only figures of one phase can be compared.
        tokens: per sequence, no padding.
        threads: CPU threads.
        device: where it ran.
        rounds: how often each model was timed.
        batches: batch size -> timing.
    """

    phase: str
    tokens: int
    threads: int
    device: str
    rounds: int
    batches: dict[str, Timing]


class ExportRecord(_Strict):
    """A cell's model in another format, run on the CPU by the format's runtime.

    Attributes:
        message: why it could not be made; then there is nothing else.
        megabytes: 10^6 bytes of the files that hold its weights.
        score, scores, latency, peak_memory: as in :class:`Record`.
        versions: of what wrote and runs it.
    """

    message: str = ""
    megabytes: float | None = None
    score: float | None = None
    scores: dict[str, Any] = Field(default_factory=dict)
    latency: Latency | None = None
    peak_memory: float | None = None
    versions: dict[str, str] = Field(default_factory=dict)


class LayerError(_Strict):
    """||W - W'||_F / ||W||_F of one group before any training."""

    name: str
    role: str | None
    error: float


class Record(_Strict):
    """One cell.

    Attributes:
        key: hash of the cell's whole configuration.
        status: ``unreachable``: the method cannot give this ratio; ``failed``: see ``message``.
        message: why there is no result.
        method, ratio_asked, task, seed: what was asked; a baseline has no ratio_asked.
        kind: ``baseline``, or ``student``: compressed by a method or recipe.
        ratio: achieved, dense parameters / parameters, of the model that was scored.
        parameters: total; by role in ``parameters_by_role`` (what has none counts as ``rest``).
        megabytes: 10^6 bytes of weight files.
        flops: 2 x multiply-adds of one sequence of 128 tokens; ``flops_linear`` without the products of attention.
        error: ||W - W'||_F / ||W||_F over all factorised matrices together, before any training.
        peak_memory: MB that the model and a forward pass of the largest timed batch add to the process.
        seconds_compress, seconds_distill: for making it; a teacher's fine-tuning is not its students'.
        metric: what the scores are.
        scores: further figures: every metric of every split, or the closeness to the teacher.
        score_before: of the student before any training.
        chance: the score of guessing, where it is known.
        exports: format -> the model in it, where the grid asks for exports.
        made_by: all that is needed to do it again.
    """

    format_version: Literal[1] = FORMAT_VERSION
    key: str
    status: Literal["finished", "unreachable", "failed"]
    message: str = ""
    model: Name
    method: Name
    kind: Literal["baseline", "student"]
    ratio_asked: float | None
    task: Name | None
    seed: int
    ratio: float | None = None
    parameters: int | None = None
    parameters_by_role: dict[str, int] = Field(default_factory=dict)
    megabytes: float | None = None
    flops: int | None = None
    flops_linear: int | None = None
    error: float | None = None
    errors: tuple[LayerError, ...] = ()
    latency: Latency | None = None
    peak_memory: float | None = None
    seconds_compress: float | None = None
    seconds_distill: float | None = None
    metric: str | None = None
    scores: dict[str, Any] = Field(default_factory=dict)
    score: float | None = None
    score_before: float | None = None
    score_teacher: float | None = None
    chance: float | None = None
    exports: dict[Name, ExportRecord] = Field(default_factory=dict)
    made_by: MadeBy

    @property
    def kept(self) -> float | None:
        """Score / the teacher's, of the means over splits; see :func:`without_share`."""
        if self.score is None or self.score_teacher is None:
            return None
        return share_kept(self.score, self.score_teacher)

    @model_validator(mode="after")
    def _complete(self) -> Record:
        if self.status == "finished" and None in (self.score, self.score_teacher, self.ratio, self.parameters):
            raise ValueError("a finished record needs score, score_teacher, ratio and parameters")
        return self


def write(record: Record, path: Path) -> None:
    """Write the record with its own hash, complete or not at all."""
    data = record.model_dump(mode="json")
    text = json.dumps({**data, "digest": digest(data)}, indent=1, ensure_ascii=False)
    write_text(path, text + "\n")


def read(path: Path) -> Record:
    """Read a record.

    Raises:
        InputError: unreadable, truncated, edited, or written by a newer compresskit.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"record {path}: cannot be read: {error}") from None
    except ValueError as error:
        raise InputError(f"record {path}: truncated or not JSON: {error}; remove it to compute it again") from None
    if not isinstance(data, dict):
        raise InputError(f"record {path}: is no record of compresskit; remove it to compute it again")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "upgrade compresskit" if newer else "it is no record of compresskit; remove it to compute it again"
        raise InputError(
            f"record {path}: format version {version!r}, this compresskit reads {FORMAT_VERSION}: {advice}"
        )
    seal = data.pop("digest", None)
    record: Record = validate(Record, data, f"record {path}")
    if seal != digest(data):
        raise InputError(f"record {path}: was edited (its digest differs); remove it to compute it again")
    return record


def without_share(records: Iterable[Record]) -> set[tuple[str, str | None]]:
    """(model, task) of the records of dense models that score 0 or below on a split: no share of that is kept, as
    :func:`compresskit.scores.kept_over_splits` counts.
    """
    return {
        (record.model, record.task)
        for record in records
        if record.method == DENSE and record.task and record.metric and says_nothing(record.scores, record.metric)
    }


#: Of a cell and of its exports alike.
_OF_THE_CELL = (
    "model", "task", "seed", "ratio_asked", "ratio", "parameters", "metric", "score_teacher", "chance", "key",
)  # fmt: skip


def frame(records: Sequence[Record]) -> pd.DataFrame:
    """One row per cell, followed by one per export of it (kind ``export``); the columns of ``results.csv``."""
    rows = []
    silent = without_share(records)
    for record in records:
        has_share = (record.model, record.task) not in silent
        row: dict[str, Any] = {
            "model": record.model,
            "task": record.task or "",
            "method": record.method,
            "kind": record.kind,
            "seed": record.seed,
            "status": record.status,
            "ratio_asked": record.ratio_asked,
            "ratio": record.ratio,
            "parameters": record.parameters,
            "megabytes": record.megabytes,
            "flops": record.flops,
            "flops_linear": record.flops_linear,
            "latency_ms": None,
            "speedup": None,
        }
        row |= _timings(record.latency)
        row |= {
            "peak_memory_mb": record.peak_memory,
            "seconds_compress": record.seconds_compress,
            "seconds_distill": record.seconds_distill,
            "metric": record.metric,
            "score": record.score,
            "score_before": record.score_before,
            "score_teacher": record.score_teacher,
            "score_kept": record.kept if has_share else None,
            "chance": record.chance,
            "retrieval": record.scores.get("retrieval"),
            "hidden_error": record.scores.get("hidden error"),
            "error": record.error,
            "message": record.message,
            "key": record.key,
        }
        row |= _asymmetric_column(record.scores, record.metric)
        rows.append(row)
        for form, exported in record.exports.items():
            score = exported.score
            kept = None if score is None else share_kept(score, record.score_teacher or 0.0)
            # What was measured on the torch model alone stays with it.
            rows.append(
                {name: row[name] for name in _OF_THE_CELL}
                | _timings(exported.latency)
                | {
                    "method": f"{record.method} {form}",
                    "kind": "export",
                    "status": "failed" if exported.message else "finished",
                    "megabytes": exported.megabytes,
                    "peak_memory_mb": exported.peak_memory,
                    "score": score,
                    "score_kept": kept if has_share else None,
                    "retrieval": exported.scores.get("retrieval"),
                    "message": exported.message,
                }
                | _asymmetric_column(exported.scores, record.metric)
            )
    return pd.DataFrame(rows)


def _asymmetric_column(scores: Mapping[str, Any], metric: str | None) -> dict[str, float]:
    """The score of a retrieval where the dense model embeds the documents; no column where it did not."""
    found = scores.get(WITH_DENSE)
    return {} if found is None or metric is None else {"score_asymmetric": mean_over_splits(found, metric)}


def _timings(latency: Latency | None) -> dict[str, float]:
    """Columns of every timed batch size."""
    row: dict[str, float] = {}
    for size, timing in (latency.batches if latency is not None else {}).items():
        suffix = "" if size == "1" else f"_batch{size}"
        row |= {f"latency_ms{suffix}": timing.milliseconds, f"latency_spread{suffix}": timing.spread}
        row[f"speedup{suffix}"] = timing.speedup
    return row
