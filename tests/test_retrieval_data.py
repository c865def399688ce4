"""Reading queries, corpus and relevant pairs, from files and from the hub."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pandas
import pytest
from beir import CORPUS, PAIRS, QUERIES, TASK, declared, write, write_json

from compresskit import InputError
from compresskit.tasks.declaration import Task
from compresskit.tasks.loading import load_data, load_task


def test_relevance_under_another_name_is_not_passed_over(tmp_path: Path) -> None:
    """Without the column of the label all pairs are relevant, so one that is called otherwise must not be missed."""
    write(tmp_path)
    file = tmp_path / "qrels" / "test.tsv"
    file.write_text(file.read_text().replace("score", "relevance", 1))
    with pytest.raises(InputError, match="has no column 'score'; column 'relevance' seems to say which pairs"):
        load_data(declared(), tmp_path, train=False)
    assert load_data(declared(label="relevance"), tmp_path, train=False).splits["dev"].targets
    rows = [{"query": "a film", "passage": f"{number}", "score": 0} for number in range(3)]
    write_json(tmp_path / "pairs.json", [*rows, {"query": "a film", "passage": "it"}])
    with pytest.raises(InputError, match=r"pairs.json, row 4: has no column 'score', as other rows have"):
        load_data(Task.model_validate(PAIRS), tmp_path, train=False)


def test_pairs_of_texts(tmp_path: Path) -> None:
    """The documents are all different texts, those of irrelevant pairs too."""
    rows = [
        ("one", "first", 1),
        ("two", "second", 1),
        ("one", "second", 1),
        ("three", "third", 0),
        ("two", "first", 0),
    ]
    pandas.DataFrame(rows, columns=["query", "passage", "score"]).to_csv(tmp_path / "pairs.csv", index=False)
    task = Task.model_validate(PAIRS)
    split = load_data(task, tmp_path, train=False).splits["dev"]
    assert split.texts == [("one",), ("two",)]
    assert split.documents == ("first", "second", "third")
    assert split.targets == [{0, 1}, {1}]
    # Without a label every pair counts.
    (tmp_path / "pairs.csv").unlink()
    write_json(tmp_path / "pairs.json", [{"query": query, "passage": passage} for query, passage, _ in rows])
    assert len(load_data(task, tmp_path, train=False).splits["dev"]) == 3


def test_nano_beir_as_files_and_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("nano-nfcorpus")
    tables = {
        "qrels": [{"query-id": "q1", "corpus-id": "d1"}, {"query-id": "q2", "corpus-id": ["d1", "d0"]}],
        "queries": [{"_id": f"q{i}", "text": f"query {i}"} for i in range(3)],
        "corpus": [{"_id": f"d{i}", "text": f"document {i}"} for i in range(2)],
    }
    for name, rows in tables.items():
        path = tmp_path / "hub" / "NanoNFCorpus" / name / "train-00000-of-00001.parquet"
        path.parent.mkdir(parents=True)
        pandas.DataFrame(rows if name != "qrels" else rows[:1]).to_parquet(path)
    write(
        tmp_path / "beir",
        [("q1", "d1", "1")],
        queries=tables["queries"],
        corpus=tables["corpus"],
    )
    asked = []

    def load(path: str, name: str, *, split: str, **_: Any) -> datasets.Dataset:
        asked.append((path, name, split))
        return Rows(tables[name])

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    for folder in (tmp_path / "hub", tmp_path / "hub" / "NanoNFCorpus", tmp_path / "beir"):
        split = load_data(task, folder, train=False).splits["dev"]
        assert (split.texts, split.targets) == ([("query 1",)], [{1}])
    split = load_data(task, None, train=False).splits["dev"]
    assert (split.texts, split.targets) == ([("query 1",), ("query 2",)], [{1}, {0, 1}])
    repo = "sentence-transformers/NanoBEIR-en"
    assert asked == [(repo, name, "NanoNFCorpus") for name in ("qrels", "queries", "corpus")]
    assert split.source == ", ".join(f"{repo}/{name}/NanoNFCorpus" for name in ("qrels", "queries", "corpus"))


class Rows(list[dict[str, Any]]):
    """Rows as ``datasets`` hands them out."""

    features = None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"relevant": [("q0", "d1", "1"), ("q99", "d1", "1")]}, "test.tsv, row 2: names the query 'q99', which is not"),
        ({"relevant": [("q0", "d99", "1")]}, "test.tsv, row 1: names the document 'd99', which is not in the corpus"),
        ({"relevant": [("q0", "d1", "0")]}, "test.tsv: no query has a relevant document"),
        ({"relevant": [("q0", "d1", "much")]}, "row 1: column 'score' must hold numbers, such as -2.5, not 'much'"),
        ({"relevant": [("", "d1", "1")]}, "row 1: column 'query-id' holds no id: ''"),
        ({"queries": [*QUERIES, QUERIES[0]]}, "queries.jsonl, row 13: has the id 'q0', as row 1 has"),
        ({"corpus": [*CORPUS, CORPUS[1]]}, "corpus.jsonl, row 41: has the id 'd1', as row 2 has"),
        ({"corpus": []}, "corpus.jsonl: holds no rows"),
        ({"corpus": [{"_id": "d1"}]}, r"corpus.jsonl, row 1: column 'text' holds no text \(corpus\)"),
        ({"corpus": [{"_id": "d1", "text": "a", "title": 3}]}, "column 'title' holds no text"),
        ({"queries": [{"id": "q1", "text": "a"}]}, "queries.jsonl, row 1: column '_id' holds no id: None"),
    ],
)
def test_bad_data_sets(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        load_data(declared(), write(tmp_path, **change), train=False)


def test_missing_tables_and_empty_ones_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (write(tmp_path) / "corpus.jsonl").unlink()
    with pytest.raises(InputError, match=r"has no corpus\.jsonl \(task found\)"):
        load_data(declared(), tmp_path, train=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    rows = {"qrels": [{"query-id": "q1", "corpus-id": "d1"}], "queries": [{"_id": "q1", "text": "a"}], "corpus": []}
    for empty in ("corpus", "qrels"):
        found = rows | {empty: []}
        monkeypatch.setattr(datasets, "load_dataset", lambda _, name, found=found, **__: Rows(found[name]))
        with pytest.raises(InputError, match=f"{empty}/NanoNQ: holds no rows"):
            load_data(load_task("nano-nq"), None, train=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tables": {"corpus": "corpus.jsonl"}}, "tables: corpus; kind retrieval takes queries and corpus, or none"),
        ({"kind": "similarity", "metrics": ["spearman"]}, "kind similarity takes none"),
        ({"inputs": ["query-id"]}, "kind retrieval takes 2 inputs: query and document"),
        ({"metrics": ["ndcg@11"]}, "unknown metric 'ndcg@11': did you mean 'ndcg@10'"),
        ({"hub": {"path": "a/b"}}, "hub.tables must name the same tables as tables"),
        ({"hub": {"path": "a/b", "tables": {"queries": "queries", "corpus": "c/d"}}}, "hub.tables.queries"),
        ({"tables": {"queries": "../q.jsonl", "corpus": "c"}}, "leads out of the data folder"),
    ],
)
def test_bad_declarations(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "found.yaml").write_text(json.dumps(TASK | change))
    with pytest.raises(InputError, match=says):
        load_task(tmp_path / "found.yaml")


def test_similarities_of_mteb_as_they_lie_on_the_hub(tmp_path: Path) -> None:
    rows = [
        {"sentence1": "a film", "sentence2": "the film", "score": 4.5},
        {"sentence1": "a", "sentence2": "b", "score": 0},
    ]
    for name in ("sts12-sts/test", "sickr-sts/test", "stsbenchmark-sts/validation", "stsbenchmark-sts/test"):
        path = tmp_path / f"{name}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    for task, splits in (("sts12", {"dev"}), ("sick-r", {"dev"}), ("stsbenchmark", {"dev", "test"})):
        data = load_data(load_task(task), tmp_path, train=False)
        assert set(data.splits) == splits
        assert all(split.targets == [4.5, 0] and not split.remark for split in data.splits.values())


def test_rows_that_contradict_each_other(tmp_path: Path) -> None:
    twice = [("q0", "d1", "1"), ("q1", "d2", "1"), ("q0", "d1", "2")]
    assert len(load_data(declared(), write(tmp_path / "alike", twice), train=False).splits["dev"].targets) == 2
    with pytest.raises(InputError, match="row 4: says that document 'd1' is not relevant to 'q0'; an earlier row"):
        load_data(declared(), write(tmp_path / "data", [*twice, ("q0", "d1", "0")]), train=False)
