"""What is known of a task's rows, and of a given teacher's answers to some of them, before anything is trained."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from compresskit.model.checkpoint import Checkpoint
from compresskit.model.kept import as_it_was
from compresskit.model.tokenizer import find_tokenizer
from compresskit.tasks.kind import Scoring
from compresskit.tasks.registry import KINDS
from compresskit.tasks.rows import DEV, Split, TaskData

#: At most so many classes are named with their counts, the most frequent ones.
CLASSES = 6
#: On so many rows of dev a given teacher is tried: enough to tell it from chance.
TRIED = 200


def found_rows(data: TaskData) -> str:
    """One line: the rows of every split, with their classes, how many texts are empty, and where they come from.

    Example:
        ``train 180 rows (Billing 95, Account 85; 2 texts are empty), dev 20 rows (Account 11, Billing 9)``
    """
    found = []
    for name, split in data.splits.items():
        parts = "; ".join(_parts(split))
        found.append(f"{name} {len(split):,} rows" + (f" ({parts})" if parts else ""))
    return ", ".join(found)


def _parts(split: Split) -> Iterator[str]:
    if classes := _classes(split.targets):
        yield classes
    if split.empty:
        yield f"{split.empty:,} texts are empty" if split.empty > 1 else "1 text is empty"
    if split.remark:
        yield split.remark


def _classes(targets: list[Any]) -> str:
    """The classes (of tags and several labels: each by itself) with their counts, or the range of numbers."""
    if targets and all(isinstance(target, int | float) for target in targets):
        return f"from {min(targets):g} to {max(targets):g}"
    counts = Counter(name for target in targets for name in _names(target))
    named = [f"{name} {count:,}" for name, count in counts.most_common(CLASSES)]
    more = [f"and {len(counts) - CLASSES:,} more"] if len(counts) > CLASSES else []
    return ", ".join(named + more)


def _names(target: Any) -> Iterable[str]:
    names = [target] if isinstance(target, str) else target
    return names if isinstance(names, list | tuple | set | frozenset) and all(isinstance(n, str) for n in names) else ()


def doubted(teacher: Checkpoint, data: TaskData, max_length: int) -> str | None:
    """A warning where a classifier answers some rows of dev no better than the most frequent class for every row would:
    its classes may be paired with the wrong labels. None where it is better, and for other kinds of tasks.

    Args:
        teacher: with a head for the task. It comes back as it was.
        data: the task with its rows.
        max_length: tokens of a sequence.
    """
    kind, rows = KINDS.get(data.task.kind), data.splits[DEV]
    if not all(isinstance(target, str) for target in rows.targets):
        return None
    # By chance: a file may be sorted by its labels, or have them in turns.
    some = rows.take(sorted(random.Random(0).sample(range(len(rows)), min(TRIED, len(rows)))), "")
    asked = replace(data, splits={DEV: some})
    with as_it_was(teacher.model):
        teacher.model.float().eval()
        scoring = Scoring(teacher.model, find_tokenizer(None, teacher), max_length)
        answers = kind.answers(scoring, asked, some)
        counts = Counter(some.targets)
        frequent = counts.most_common(1)[0][0]
        both = (kind.measure(scoring, asked, some, each) for each in (answers, [frequent] * len(some)))
        score, chance = (found[data.task.primary] for found in both)
    # Of a single class nothing is better; classes paired with other labels hardly ever name it.
    if score > chance or (len(counts) == 1 and 2 * score >= chance):
        return None
    return (
        f"the teacher's {data.task.primary} is {100 * score:.1f} % on {len(some)} rows of dev, where {frequent!r} for "
        f"every row has {100 * chance:.1f} %: are its classes paired with the right labels (labels in the task's file)?"
    )
