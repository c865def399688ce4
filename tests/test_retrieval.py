"""Retrieval: reading queries, corpus and relevant pairs, nearest documents, and the scores of sentence-transformers."""

from __future__ import annotations

import gzip
import json
import math
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pandas
import pytest
import torch
from conftest import Run, refused, reviews, sentence_folder, tiny_model, write_tsv
from transformers import AutoTokenizer

import compresskit
from compresskit import InputError, WorkError
from compresskit.model.sentence_vectors import SIMILARITIES, SentenceModel
from compresskit.tasks.declaration import Task
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.retrieval import METRICS, nearest, scores

#: BEIR's layout.
TASK = {
    "version": 1,
    "name": "found",
    "kind": "retrieval",
    "inputs": ["query-id", "corpus-id"],
    "label": "score",
    "files": {"dev": "qrels/test.tsv"},
    "tables": {"queries": "queries.jsonl", "corpus": "corpus.jsonl"},
    "metrics": list(METRICS),
}
PAIRS = {key: value for key, value in TASK.items() if key != "tables"} | {
    "inputs": ["query", "passage"],
    "files": {"dev": ["pairs.csv", "pairs.json"]},
}
QUERIES = [{"_id": f"q{i}", "text": text} for i, (text, _) in enumerate(reviews(12, seed=5))]
CORPUS = [
    {"_id": f"d{i}", "title": "a film" if i % 3 else "", "text": text}
    for i, (text, _) in enumerate(reviews(40, seed=6))
]


def pairs(queries: int = 12) -> list[tuple[str, str, str]]:
    chance = random.Random(0)
    return [(f"q{i}", f"d{j}", str(chance.randint(0, 2))) for i in range(queries) for j in chance.sample(range(40), 6)]


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")


def write(
    folder: Path,
    relevant: list[tuple[str, ...]] | None = None,
    queries: list[dict[str, Any]] = QUERIES,
    corpus: list[dict[str, Any]] = CORPUS,
) -> Path:
    """A data set in BEIR's layout."""
    write_json(folder / "queries.jsonl", queries)
    write_json(folder / "corpus.jsonl", corpus)
    write_tsv(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", pairs() if relevant is None else relevant)
    return folder


def declared(**changes: Any) -> Task:
    return Task.model_validate(TASK | changes)


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


# -- scores -----------------------------------------------------------------------------------------------------------


def test_metrics_by_hand() -> None:
    # Relevant: 3 and 4 of the first query, found second and not at all; 7 of the second, found first.
    found = scores(METRICS, [[9, 3, 8], [7, 1, 2]], [{3, 4}, {7}])
    first = (1 / math.log2(3)) / (1 + 1 / math.log2(3))
    assert found == pytest.approx(
        {
            "ndcg@10": (first + 1) / 2,
            "mrr@10": (1 / 2 + 1) / 2,
            "recall@1": (0 + 1) / 2,
            "recall@5": (1 / 2 + 1) / 2,
            "recall@10": (1 / 2 + 1) / 2,
            "recall@100": (1 / 2 + 1) / 2,
            "map@100": ((1 / 2) / 2 + 1) / 2,
        }
    )
    # What comes behind the k-th place does not count, and the ideal has no more than k.
    late = scores(["mrr@10", "recall@10", "ndcg@10"], [[*range(1, 11), 0]], [{0}])
    assert late == {"mrr@10": 0, "recall@10": 0, "ndcg@10": 0}
    assert scores(["ndcg@10", "recall@10"], [list(range(100))], [set(range(20))]) == {"ndcg@10": 1, "recall@10": 0.5}


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_blocks_do_not_matter(similarity: str) -> None:
    how = SentenceModel(similarity=similarity)
    chance = torch.Generator().manual_seed(0)
    queries, documents = torch.randn(5, 8, generator=chance), torch.randn(64, 8, generator=chance)
    whole = how.likenesses(queries, documents)
    for row in range(5):
        torch.testing.assert_close(whole[row], how.likeness(queries[row].expand(64, -1), documents))
    for size in (1, 7, 64):
        assert nearest(queries, documents.split(size), how, 10).tolist() == whole.topk(10).indices.tolist()
    assert nearest(queries, iter([documents[:3]]), how, 10).shape == (5, 3)


def test_equally_near_documents_keep_their_order() -> None:
    how = SentenceModel(similarity="dot")
    documents = torch.tensor([[2.0], [1.0], [2.0], [3.0], [2.0], [1.0]])
    for size in (1, 2, 4, 6):
        assert nearest(torch.ones(1, 1), documents.split(size), how, 4).tolist() == [[3, 0, 2, 4]]


def test_blocks_of_documents_are_let_go() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def blocks() -> Iterator[torch.Tensor]:
        for _ in range(5):
            assert sum(block() is not None for block in seen) <= 1  # the last one, until the next one is there
            block = torch.ones(4, 1)
            seen.append(weakref.ref(block))
            yield block
            del block

    assert nearest(torch.ones(3, 1), blocks(), SentenceModel(), 2).tolist() == [[0, 1]] * 3


PROMPTS = {"prompts": {"query": "the of and ", "document": "film ", "other": "it "}, "default_prompt_name": "other"}
WITHOUT = {"pooling_mode": "mean", "include_prompt": False, "embedding_dimension": 48}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"general": PROMPTS},
        {"general": PROMPTS, "pooling": WITHOUT},
        {"general": {"prompts": {"passage": "film "}}},
        {"encoder": {"max_seq_length": 6}, "general": {"truncate_dim": 7}},
        *({"general": {"similarity_fn_name": name}} for name in ("dot", "euclidean", "manhattan")),
    ],
)
def test_scores_are_those_of_the_package(change: dict[str, Any], bench_folder: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers' own evaluator")
    folder = sentence_folder(bench_folder / "model", tmp_path / "model", **change)
    own = package.SentenceTransformer(str(folder), device="cpu")
    expected = evaluator()(own)
    found = compresskit.evaluate(folder, task=declared(), data=write(tmp_path / "data"), device="cpu")
    for metric, value in found.record["scores"]["dev"].items():
        assert value == pytest.approx(expected[f"{own.similarity_fn_name}_{metric}"], abs=1e-4), metric


def evaluator() -> Any:
    """sentence-transformers' own, for what :func:`write` writes."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    relevant: dict[str, set[str]] = {}
    for query, document, value in pairs():
        if value != "0":
            relevant.setdefault(query, set()).add(document)
    return InformationRetrievalEvaluator(
        {row["_id"]: row["text"] for row in QUERIES},
        {row["_id"]: f"{row['title']} {row['text']}".strip() for row in CORPUS},
        relevant,
        precision_recall_at_k=[1, 5, 10, 100],
        write_csv=False,
    )


# -- two models -------------------------------------------------------------------------------------------------------


def test_another_model_embeds_the_documents(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers", reason="compares with sentence-transformers' own evaluator")
    # Each follows its own folder; what compares is the first one's.
    asking = sentence_folder(bench_folder / "model", tmp_path / "asking", general=PROMPTS)
    offering = sentence_folder(bench_folder / "student", tmp_path / "offering", encoder={"max_seq_length": 9})
    data = write(tmp_path / "data")
    found = compresskit.evaluate(asking, task=declared(), data=data, documents_model=offering, device="cpu")
    one, other = (package.SentenceTransformer(str(folder), device="cpu") for folder in (asking, offering))
    own = evaluator()
    own.score_functions = {"cosine": one.similarity}
    expected = own.compute_all_metrics(one, corpus_model=other)["cosine"]
    for metric, value in found.record["scores"]["dev"].items():
        name, _, k = metric.partition("@")
        assert value == pytest.approx(expected[f"{name}@k"][int(k)], abs=1e-4), metric
    assert (found.record["model"], found.record["documents_model"]) == ("asking", "offering")

    (tmp_path / "found.yaml").write_text(json.dumps(TASK))
    arguments = ("evaluate", "--model", asking, "--task", tmp_path / "found.yaml", "--data", data)
    shown = run(*arguments, "--documents-model", offering)
    assert shown.code == 0, shown.err
    assert f"{100 * found.record['scores']['dev']['ndcg@10']:.2f}" in shown.out


def test_two_models_of_two_spaces_are_refused(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    tiny_model(hidden_size=64).save_pretrained(wide)
    AutoTokenizer.from_pretrained(bench_folder / "model").save_pretrained(wide)
    (tmp_path / "found.yaml").write_text(json.dumps(TASK))
    arguments = ("evaluate", "--model", bench_folder / "model", "--documents-model", wide, "--data")
    refused(
        run(*arguments, write(tmp_path / "data"), "--task", tmp_path / "found.yaml"),
        "its vectors have 64 numbers, those of the model for the queries 48",
    )
    refused(run(*arguments, tmp_path, "--task", "stsb-similarity"), "task stsb-similarity (kind similarity) has no")


# -- files ------------------------------------------------------------------------------------------------------------


def test_queries_without_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    relevant = [("q0", "d3", "1"), ("q0", "d4", "0"), ("q1", "d5", "2"), ("q2", "d6", "0"), ("q0", "d3", "1")]
    data = load_data(declared(), write(tmp_path, relevant), train=False)
    split = data.splits["dev"]
    assert split.texts == [(QUERIES[0]["text"],), (QUERIES[1]["text"],)]
    texts = [f"{row['title']} {row['text']}".strip() for row in sorted(CORPUS, key=lambda row: row["_id"])]
    assert split.documents == tuple(texts)
    assert [[split.documents[place] for place in places] for places in split.targets] == [
        [f"{CORPUS[place]['title']} {CORPUS[place]['text']}".strip()] for place in (3, 5)
    ]
    assert data.notes == (
        "task found: 2 queries, 40 documents (test.tsv)",
        "data test.tsv: 10 of 12 queries have no relevant document and are left out",
    )
    record = data.record()["dev"]
    assert (record["rows"], record["documents"]) == (2, 40)
    assert record["source"] == "test.tsv, queries.jsonl, corpus.jsonl"
    # The hash is one of all files.
    write(tmp_path, relevant, corpus=[*CORPUS, {"_id": "more", "text": "a film"}])
    assert load_data(declared(), tmp_path, train=False).record()["dev"]["sha256"] != record["sha256"]


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


def test_squad_is_a_retrieval(bench_folder: Path, tmp_path: Path) -> None:
    def paragraph(context: str, *questions: str) -> dict[str, Any]:
        answers = [{"text": context[:3], "answer_start": 0}]
        return {"context": context, "qas": [{"id": q, "question": q, "answers": answers} for q in questions]}

    articles = [[paragraph("the film", "what", "who"), paragraph("a plot", "who")], [paragraph("the film", "how")]]
    data = {"version": "1.1", "data": [{"title": "a", "paragraphs": article} for article in articles]}
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(data, indent=1))
    split = load_data(load_task("squad-retrieval"), tmp_path, train=False).splits["dev"]
    assert split.texts == [("what",), ("who",), ("how",)]
    assert split.documents == ("the film", "a plot")
    assert split.targets == [{0}, {0, 1}, {0}]
    found = compresskit.evaluate(bench_folder / "model", task="squad-retrieval", data=tmp_path, device="cpu")
    assert found.record["scores"]["dev"]["recall@10"] == 1
    assert any("does not say how vectors of texts are made" in note for note in found.notes)


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


# -- bad input --------------------------------------------------------------------------------------------------------


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


def test_empty_texts_are_scored_and_said(bench_folder: Path, tmp_path: Path) -> None:
    queries = [*QUERIES[:1], {"_id": "none", "text": ""}]
    corpus = [*CORPUS[:3], {"_id": "nothing", "text": " "}]
    data = write(tmp_path / "data", [("q0", "d1", "1"), ("none", "nothing", "1")], queries, corpus)
    found = compresskit.evaluate(bench_folder / "model", task=declared(), data=data, device="cpu")
    assert "data test.tsv: 1 of 2 queries are empty; they are taken as they are" in found.notes
    assert "data test.tsv: 1 of 4 documents are empty; they are taken as they are" in found.notes
    assert found.record["scores"]["dev"]["recall@5"] == 1
    write_tsv(tmp_path / "sts" / "dev.tsv", "sentence1\tsentence2\tscore", [("a film", "", "1"), ("a", "a", "5")])
    found = compresskit.evaluate(bench_folder / "model", task="stsb-similarity", data=tmp_path / "sts", device="cpu")
    assert "data dev.tsv: 1 of 4 texts are empty; they are taken as they are" in found.notes


@pytest.mark.parametrize("task", ["stsb-similarity", "found"])
def test_vectors_that_are_not_finite_have_no_score(task: str, bench_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), AutoTokenizer.from_pretrained(bench_folder / "model")
    number = tokenizer("great", add_special_tokens=False)["input_ids"][0]
    model.get_input_embeddings().weight.data[number] = torch.nan
    write_tsv(tmp_path / "dev.tsv", "sentence1\tsentence2\tscore", [("a great film", "film", "1"), ("a", "a", "5")])
    write(tmp_path, [("q0", "d0", "1")], [{"_id": "q0", "text": "a film"}], [{"_id": "d0", "text": "a great film"}])
    with pytest.raises(WorkError, match=r"the vectors of 1 of \d texts are not finite .* that of 'a great film'"):
        compresskit.evaluate(
            model, task=declared() if task == "found" else task, data=tmp_path, tokenizer=tokenizer, device="cpu"
        )


def test_nothing_is_trained_on_it(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "found.yaml").write_text(json.dumps(TASK))
    arguments = ("--task", tmp_path / "found.yaml", "--data", write(tmp_path / "data"), "--output", "out")
    refused(
        run("finetune", "--model", bench_folder / "model", *arguments), "is for evaluation only (of kind retrieval)"
    )
    refused(run("bench", *arguments), "compares vectors, and nothing can be trained on it")


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
