"""Which documents answer a query: those whose vectors are nearest to its own. No head, no training.

Two layouts are read. With the tables ``queries`` and ``corpus`` (columns ``_id`` and ``text``, of documents also
``title``: BEIR's layout) rows name an id of each. Without them rows hold the texts themselves, as SQuAD does, and the
documents are all different texts of the second input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.errors import InputError
from compresskit.model.sentence_vectors import Role, SentenceModel, read_sentence_model
from compresskit.storage.files import Rows
from compresskit.tasks import reports, squad
from compresskit.tasks.answer import Answer, with_score
from compresskit.tasks.declaration import Task
from compresskit.tasks.encoding import OfVectors, text_vectors
from compresskit.tasks.kind import Scoring, empty_note
from compresskit.tasks.registry import register
from compresskit.tasks.regression import number
from compresskit.tasks.rows import Split, Table, TaskData

#: Documents that are encoded and compared at a time, and queries that they are compared with at a time: what is held
#: does not grow with the corpus.
DOCUMENTS, QUERIES = 4096, 512
#: Documents that are kept for each query: the largest k of the metrics.
DEPTH = 100
#: Rows of a report: name -> ranks.
_RANKS = {
    "1": (1, 1),
    "2 to 5": (2, 5),
    "6 to 10": (6, 10),
    f"11 to {DEPTH}": (11, DEPTH),
    "not found": (DEPTH + 1, math.inf),
}
#: Id -> text.
Texts = dict[str, str]


def _ndcg(found: Sequence[bool], relevant: int, k: int) -> float:
    gain = sum(1 / math.log2(place + 2) for place, hit in enumerate(found[:k]) if hit)
    return gain / sum(1 / math.log2(place + 2) for place in range(min(relevant, k)))


def _mrr(found: Sequence[bool], relevant: int, k: int) -> float:
    return next((1 / place for place, hit in enumerate(found[:k], start=1) if hit), 0.0)


def _recall(found: Sequence[bool], relevant: int, k: int) -> float:
    return sum(found[:k]) / relevant


def _map(found: Sequence[bool], relevant: int, k: int) -> float:
    hits = [place for place, hit in enumerate(found[:k], start=1) if hit]
    return sum(right / place for right, place in enumerate(hits, start=1)) / min(relevant, k)


#: ``(which of the documents found are relevant, from the nearest on; how many are relevant) -> score of the query``.
METRICS: dict[str, Callable[[Sequence[bool], int], float]] = {
    "ndcg@10": partial(_ndcg, k=10),
    "mrr@10": partial(_mrr, k=10),
    "recall@1": partial(_recall, k=1),
    "recall@5": partial(_recall, k=5),
    "recall@10": partial(_recall, k=10),
    "recall@100": partial(_recall, k=100),
    "map@100": partial(_map, k=100),
}


@register
class Retrieval(OfVectors):
    """A row of a split is a query, its target the set of its relevant documents, an answer the documents found, from
    the nearest on; documents are named by their places in the split's.
    """

    name = "retrieval"
    summary = "which documents answer a query, by how near their vectors are"
    metrics = tuple(METRICS)
    inputs = ("query", "document")
    tables = ("queries", "corpus")
    has_documents = True

    def read(self, task: Task, path: Path) -> tuple[Rows, str | None]:
        if squad.is_squad(path):
            return squad.read_rows(path), None
        return super().read(task, path)

    def columns(self, task: Task) -> tuple[str, ...]:
        return task.inputs

    def target(self, task: Task, row: Mapping[str, Any], where: str, labels: Mapping[str, str]) -> bool:
        """Whether the document of this pair is relevant; it is where no label says otherwise."""
        return task.label not in row or number(row[task.label], f"{where}: column {task.label!r}") > 0

    def split(
        self, task: Task, rows: Rows, about: Split, labels: Mapping[str, str], tables: Mapping[str, Table]
    ) -> tuple[Split, tuple[str, ...]]:
        _check_label(task, rows, about.source)
        if tables:
            queries, corpus = (_texts(tables[name], name) for name in self.tables)
            corpus = dict(sorted(corpus.items()))  # of equally near documents the first id comes first
            pairs = self._pairs_of_ids(task, rows, about, queries, corpus)
        else:
            queries, corpus, pairs = self._texts_of_pairs(task, rows, about)
        place = {identity: row for row, identity in enumerate(corpus)}
        relevant: dict[str, set[int]] = {}
        for query, document in pairs:
            relevant.setdefault(query, set()).add(place[document])
        asked = [identity for identity in queries if identity in relevant]
        if not asked:
            raise InputError(f"data {about.source}: no query has a relevant document")
        found = replace(
            about,
            texts=[(queries[identity],) for identity in asked],
            targets=[frozenset(relevant[identity]) for identity in asked],
            documents=tuple(corpus.values()),
        )
        without = len(queries) - len(asked)
        notes = [f"task {task.name}: {len(asked):,} queries, {len(corpus):,} documents ({about.source})"]
        if without:
            what = f"{without:,} of {len(queries):,} queries have no relevant document and are left out"
            notes.append(f"data {about.source}: {what}")
        notes += empty_note(about.source, [queries[identity] for identity in asked], "queries")
        return found, (*notes, *empty_note(about.source, found.documents, "documents"))

    def _texts_of_pairs(self, task: Task, rows: Rows, about: Split) -> tuple[Texts, Texts, list[tuple[str, str]]]:
        """Queries, documents and relevant pairs where rows hold the texts themselves, which then serve as ids."""
        queries: Texts = {}
        corpus: Texts = {}
        pairs = _Pairs()
        for row_number, row in enumerate(rows, start=1):
            where = f"data {about.source}, row {row_number}"
            query, document = self.example(task, row, where)
            queries[query], corpus[document] = query, document
            pairs.add(query, document, self.target(task, row, where, {}), where)
        return queries, corpus, pairs.relevant

    def _pairs_of_ids(
        self, task: Task, rows: Rows, about: Split, queries: Texts, corpus: Texts
    ) -> list[tuple[str, str]]:
        """Ids of query and document of every relevant pair. A cell may hold the ids of several documents.

        Raises:
            InputError: an id that no query or document has; two rows that contradict each other.
        """
        pairs = _Pairs()
        first, second = task.inputs
        for row_number, row in enumerate(rows, start=1):
            where = f"data {about.source}, row {row_number}"
            query = _identity(row, first, where)
            if query not in queries:
                raise InputError(f"{where}: names the query {query!r}, which is not among the queries")
            cell = row.get(second)
            for one in cell if isinstance(cell, list) else [cell]:
                document = _identity({second: one}, second, where)
                if document not in corpus:
                    raise InputError(f"{where}: names the document {document!r}, which is not in the corpus")
                pairs.add(query, document, self.target(task, row, where, {}), where)
        return pairs.relevant

    def role(self, split: Split) -> Role:
        """Queries have documents to look among."""
        return "query" if split.documents else "document"

    def answers(self, scoring: Scoring, data: TaskData, split: Split) -> list[list[int]]:
        offering = scoring.documents or scoring
        ask, offer = read_sentence_model(scoring.folder, "query"), read_sentence_model(offering.folder, "document")
        if scoring.documents is not None:
            self._check_widths(scoring, ask, offering, offer, split.documents[:1])
        queries = text_vectors(scoring, ask, [query for (query,) in split.texts])
        return nearest(queries, _blocks(offering, offer, split.documents), ask, DEPTH).tolist()

    def described(self, scoring: Scoring, data: TaskData, split: Split, most: int) -> list[Answer]:
        """The ``most`` nearest documents of each query, from the nearest on, numbered from 1."""
        ask, offer = read_sentence_model(scoring.folder, "query"), read_sentence_model(scoring.folder, "document")
        queries = text_vectors(scoring, ask, [query for (query,) in split.texts])
        documents = torch.cat(list(_blocks(scoring, offer, split.documents)))
        places = nearest(queries, documents.split(DOCUMENTS), ask, most)
        answers = []
        for query, row in zip(queries, places, strict=True):
            near = ask.likenesses(query[None], documents[row])[0].tolist()
            found = [
                {"text": split.documents[place], "number": place + 1, "similarity": value}
                for place, value in zip(row.tolist(), near, strict=True)
            ]
            line = "; ".join(with_score(str(one["text"]), value) for one, value in zip(found, near, strict=True))
            answers.append(Answer(line, {"neighbours": found}))
        return answers

    def report(
        self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Sequence[int]]
    ) -> reports.Report:
        """How many queries have their first relevant document at which rank."""
        rows: reports.Rows = {}
        firsts = [
            next((rank for rank, place in enumerate(found, start=1) if place in wanted), math.inf)
            for found, wanted in zip(answers, split.targets, strict=True)
        ]
        for name, (least, most) in _RANKS.items():
            count = sum(least <= rank <= most for rank in firsts)
            rows[name] = {"share": count / len(firsts), "support": count}
        return reports.Report({"by rank of the first relevant document": rows})

    def _check_widths(
        self, asking: Scoring, ask: SentenceModel, offering: Scoring, offer: SentenceModel, texts: Sequence[str]
    ) -> None:
        """Refuse two models whose vectors cannot be compared, before all is encoded. Raises InputError."""
        ours, theirs = text_vectors(asking, ask, texts).shape[1], text_vectors(offering, offer, texts).shape[1]
        if ours != theirs:
            raise InputError(
                f"documents model: its vectors have {theirs} numbers, those of the model for the queries {ours}; give "
                "two models of one space, such as a student and its teacher"
            )

    def measure(
        self, scoring: Scoring, data: TaskData, split: Split, answers: Sequence[Sequence[int]]
    ) -> dict[str, float]:
        return scores(data.task.metrics, answers, split.targets)


def scores(
    metrics: Iterable[str], answers: Sequence[Sequence[int]], relevant: Sequence[AbstractSet[int]]
) -> dict[str, float]:
    """The mean of each metric over the queries.

    Args:
        metrics: of :data:`METRICS`.
        answers: for each query the documents found, from the nearest on.
        relevant: for each query its relevant documents, one or more.
    """
    hits = [[place in wanted for place in found] for found, wanted in zip(answers, relevant, strict=True)]
    return {
        metric: math.fsum(METRICS[metric](found, len(wanted)) for found, wanted in zip(hits, relevant, strict=True))
        / len(hits)
        for metric in metrics
    }


def nearest(queries: Tensor, blocks: Iterable[Tensor], how: SentenceModel, depth: int) -> Tensor:
    """For each query the places of the nearest documents, from the nearest on; equally near ones in their order.

    Args:
        queries: (Q, D).
        blocks: the documents' vectors, a few (N, D) at a time.
        how: compares vectors.
        depth: documents to keep.

    Returns:
        (Q, depth) places, fewer where there are fewer documents.
    """
    parts = queries.split(QUERIES)
    best = [(part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.long)) for part in parts]
    start = 0
    for block in blocks:
        for own, part in enumerate(parts):
            values, places = best[own]
            offered = how.likenesses(part, block)
            chosen = torch.arange(len(block)).expand(len(part), -1)
            if values.shape[1] == depth:  # full, so what is no nearer than its last one has no chance
                count = int((offered > values[:, -1:]).sum(1).max())
                chosen = offered.topk(count, dim=1).indices.sort(dim=1).values
            values = torch.cat([values, offered.gather(1, chosen)], 1)
            places = torch.cat([places, chosen + start], 1)
            # Stable: what came first, in an earlier block or in this one, stays in front of what is as near.
            order = values.argsort(dim=1, descending=True, stable=True)[:, :depth]
            best[own] = values.gather(1, order), places.gather(1, order)
        start += len(block)
    return torch.cat([places for _, places in best])


def _blocks(scoring: Scoring, how: SentenceModel, documents: Sequence[str]) -> Iterable[Tensor]:
    """Vectors of the documents, :data:`DOCUMENTS` at a time; progress is counted over all of them."""
    progress = scoring.progress
    for start in range(0, len(documents), DOCUMENTS):

        def count(what: str, done: int, total: int, start: int = start) -> None:
            if progress is not None:
                progress(f"{what} documents", start + done, len(documents))

        yield text_vectors(replace(scoring, progress=count), how, documents[start : start + DOCUMENTS])


class _Pairs:
    """Judged pairs of query and document, each said once or several times alike."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], bool] = {}

    def add(self, query: str, document: str, relevant: bool, where: str) -> None:
        """One row. Raises InputError: an earlier row says otherwise of this pair."""
        if self._said.setdefault((query, document), relevant) != relevant:
            what = "is relevant" if relevant else "is not relevant"
            raise InputError(
                f"{where}: says that document {document[:60]!r} {what} to {query[:60]!r}; an earlier row says otherwise"
            )

    @property
    def relevant(self) -> list[tuple[str, str]]:
        """The pairs that are relevant, in order."""
        return [pair for pair, relevant in self._said.items() if relevant]


def _check_label(task: Task, rows: Rows, source: str) -> None:
    """Refuse rows of which only some say whether the pair is relevant, and those that seem to say it in another column.

    Raises:
        InputError: names the row, or the column.
    """
    first, second = task.inputs
    without = next((number for number, row in enumerate(rows, start=1) if task.label not in row), None)
    if without is None:
        return
    if any(task.label in row for row in rows):
        raise InputError(f"data {source}, row {without}: has no column {task.label!r}, as other rows have")
    for column in dict.fromkeys(name for row in rows for name in row if name not in (first, second)):
        if {str(row.get(column)).strip() for row in rows} in ({"0"}, {"0", "1"}, {"0", "1", "2"}):
            raise InputError(
                f"data {source}: has no column {task.label!r}; column {column!r} seems to say which pairs are "
                "relevant: name it as label, or leave it out"
            )


def _texts(table: Table, name: str) -> Texts:
    """Texts by id; a document's title stands in front of its text. Raises InputError: no text, an id twice."""
    found: Texts = {}
    rows: dict[str, int] = {}
    for row_number, row in enumerate(table.rows, start=1):
        where = f"data {table.source}, row {row_number}"
        identity, text, title = _identity(row, "_id", where), row.get("text"), row.get("title")
        if not isinstance(text, str) or not isinstance(title, str | None):
            raise InputError(f"{where}: column {'title' if isinstance(text, str) else 'text'!r} holds no text ({name})")
        if identity in found:
            raise InputError(f"{where}: has the id {identity!r}, as row {rows[identity]} has; ids must differ ({name})")
        found[identity] = f"{title} {text}".strip() if name == "corpus" and title else text
        rows[identity] = row_number
    if not found:
        raise InputError(f"data {table.source}: holds no rows ({name})")
    return found


def _identity(row: Mapping[str, Any], column: str, where: str) -> str:
    """An id, a text or an integer, as a text. Raises InputError."""
    value = row.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise InputError(f"{where}: column {column!r} holds no id: {value!r}")
    return str(value)
