"""What a report says of its baselines, below the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from compresskit.benchmark.baselines.registry import BASELINES, row_name
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.records import Record

_STAGES = {"general": "stage 1", "task_stage": "stage 2"}


def of_baselines(records: Sequence[Record], grid: Grid) -> list[tuple[str, str]]:
    """What baselines say of their models, and learning rates of their own; nothing of one that is not installed."""
    entries = {row_name(entry): entry.partition(":")[0] for entry in grid.baselines}
    known = BASELINES.all()
    variants = tuple(f" + {name}" for name in grid.variants)
    students = [record for record in records if record.kind == "student" and record.status == "finished"]
    usual = [record for record in students if not record.method.endswith(variants)] or students
    facts = set()
    for record in records:
        name = entries.get(record.method)
        if record.kind == "baseline" and record.status == "finished" and name in known:
            own = _own_rates(record, usual) if known[name].trained else ()
            said = (known[name].fact(record.model, record.made_by), *own)
            facts.add((record.model, record.method, "; ".join(fact for fact in said if fact)))
    return [(method, fact) for _, method, fact in sorted(facts) if fact]


def _own_rates(record: Record, students: Sequence[Record]) -> Iterator[str]:
    """The learning rates of a baseline that no student beside it has; those of variants are not the report's usual."""
    of_students = [one for one in students if (one.task, one.model) == (record.task, record.model)]
    for stage, text in _STAGES.items():
        mine = getattr(record.made_by, stage)
        others = {its.learning_rate for one in of_students if (its := getattr(one.made_by, stage)) is not None}
        if mine is not None and others and mine.learning_rate not in others:
            yield f"learning rate {mine.learning_rate:g} in {text}"
