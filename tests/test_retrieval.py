"""Retrieval: nearest documents, and the scores of sentence-transformers."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from beir import CORPUS, QUERIES, TASK, declared, pairs, write
from conftest import Run, refused, sentence_folder, tiny_model, write_tsv
from transformers import AutoTokenizer

import compresskit
from compresskit import WorkError
from compresskit.model.sentence_vectors import SIMILARITIES, SentenceModel
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.retrieval import METRICS, nearest, scores


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


def test_exports_find_what_their_model_finds(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("onnxruntime")
    dense, small, data = (
        sentence_folder(bench_folder / "model", tmp_path / "dense"),
        tmp_path / "small",
        write(tmp_path),
    )
    assert run("compress", "--model", dense, "--method", "low-rank", "--ratio", 2, "--output", small).code == 0

    def scored(model: Path, **more: Any) -> dict[str, float]:
        found = compresskit.evaluate(model, task=declared(), data=data, device="cpu", **more)
        return dict(found.record["scores"]["dev"])

    own = scored(small)
    for form, near in (("onnx", 1e-4), ("onnx-int8", 0.1)):
        compresskit.export(small, format=form, output=tmp_path / form)
        assert scored(tmp_path / form) == pytest.approx(own, abs=near)
    assert scored(small, documents_model=tmp_path / "onnx") == pytest.approx(own, abs=1e-4)
    asymmetric = scored(small, documents_model=dense)
    assert scored(tmp_path / "onnx", documents_model=dense) == pytest.approx(asymmetric, abs=1e-4)


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
