"""What models say of texts: every kind, from arguments, files and standard input, of folders, objects and exports."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, refused, sentence_folder, tiny_model
from transformers import AutoModel, AutoModelForQuestionAnswering, AutoTokenizer, pipeline

import compresskit
from compresskit import InputError, WorkError
from compresskit.tasks.answer import Answer
from compresskit.tasks.words import Words, entities

GOOD, BAD = "the film was very good", "so bad and the plot was awful"


def headed(bench_folder: Path, folder: Path, head: str, **config: Any) -> Path:
    """A tiny random model with a head, and a tokenizer."""
    if "names" in config:
        names = dict(enumerate(config.pop("names")))
        config |= {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    tiny_model(head=head, **config).save_pretrained(folder)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, folder / file)
    return folder


class Piped(io.TextIOWrapper):
    """Standard input that holds ``text``."""

    def __init__(self, text: str, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(text.encode()))
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def probabilities(bench_folder: Path) -> list[float]:
    """Of class 1, for the two texts, by transformers."""
    classify = pipeline("text-classification", str(bench_folder / "teacher"), top_k=None, device="cpu")
    return [next(one["score"] for one in row if one["label"] == "positive") for row in classify([GOOD, BAD])]


def test_classes_are_those_of_transformers(bench_folder: Path, probabilities: list[float]) -> None:
    found = compresskit.predict(bench_folder / "teacher", [GOOD, BAD], device="cpu")
    assert found.kind == "classification"
    assert [answer["text"] for answer in found.answers] == [GOOD, BAD]
    assert [answer["label"] for answer in found.answers] == ["positive", "negative"]
    shares = [answer["probabilities"]["positive"] for answer in found.answers]
    np.testing.assert_allclose(shares, probabilities, atol=1e-5)
    assert found.answers[0]["score"] == max(found.answers[0]["probabilities"].values())
    assert found.lines[0].startswith("positive 0.")
    first = compresskit.predict(bench_folder / "teacher", GOOD, top=1, device="cpu").answers[0]
    assert first["probabilities"] == {"positive": first["score"]}


def test_every_way_in_gives_the_same(
    bench_folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = list(compresskit.predict(bench_folder / "teacher", [GOOD, BAD], device="cpu").answers)
    model = ("predict", "--model", bench_folder / "teacher", "--json")

    def answers(*arguments: object) -> list[Any]:
        answer = run(*model, *arguments)
        assert answer.code == 0, answer
        return [json.loads(line) for line in answer.out.splitlines()]

    assert answers("--text", GOOD, "--text", BAD) == wanted
    (tmp_path / "a.txt").write_text(f"{GOOD}\n{BAD}\n\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"sentence": text}) + "\n" for text in (GOOD, BAD)))
    (tmp_path / "a.csv").write_text(f'id,text\n1,"{GOOD}"\n2,{BAD}\n')
    (tmp_path / "a.tsv").write_text(f"review\tid\n{GOOD}\t1\n{BAD}\t2\n")
    assert answers("--file", tmp_path / "a.txt") == wanted
    assert answers("--file", tmp_path / "a.jsonl") == wanted
    assert answers("--file", tmp_path / "a.csv") == wanted
    assert answers("--file", tmp_path / "a.tsv", "--field", "review") == wanted
    monkeypatch.setattr(sys, "stdin", Piped(f"{GOOD}\r\n{BAD}\n"))
    assert answers("--file", "-") == wanted
    monkeypatch.setattr(sys, "stdin", Piped(f"\n \n{(tmp_path / 'a.jsonl').read_text()}\n"))  # empty lines are no texts
    assert answers("--file", "-") == wanted
    shown = run(*model[:-1], "--text", GOOD)
    assert GOOD in shown.out
    written = run(*model[:-1], "--text", GOOD, "--text", BAD, "--output", tmp_path / "b.jsonl")
    assert written.code == 0
    assert [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()] == wanted
    assert "2 answers" in written.out
    refused(run(*model, "--text", GOOD, "--output", tmp_path / "b.jsonl"), "exists", "--overwrite")
    assert run(*model, "--text", GOOD, "--output", tmp_path / "b.jsonl", "--overwrite").code == 0


@pytest.mark.parametrize("format", ["onnx", "onnx-int8", "dense"])
def test_exports_answer_too(bench_folder: Path, tmp_path: Path, format: str, probabilities: list[float]) -> None:
    pytest.importorskip("onnxruntime")
    compresskit.compress(bench_folder / "teacher", method="low-rank", ratio=1.2).save_pretrained(tmp_path / "small")
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, tmp_path / "small" / file)
    compresskit.export(tmp_path / "small", output=tmp_path / "device", format=format)
    ours = compresskit.predict(tmp_path / "small", [GOOD, BAD], device="cpu").answers
    theirs = compresskit.predict(tmp_path / "device", [GOOD, BAD]).answers
    for left, right in zip(ours, theirs, strict=True):
        assert left["label"] == right["label"]
        np.testing.assert_allclose(left["score"], right["score"], atol=0.05 if "int8" in format else 1e-4)


@pytest.mark.parametrize("head", ["tokens", "questions", "vectors"])
def test_exports_of_every_head_answer(bench_folder: Path, tmp_path: Path, run: Run, head: str) -> None:
    pytest.importorskip("onnxruntime")
    if head == "vectors":
        model = sentence_folder(bench_folder / "model", tmp_path / "dense")
    else:
        model = headed(bench_folder, tmp_path / "dense", head)
    small, device = tmp_path / "small", tmp_path / "device"
    made = run("compress", "--model", model, "--method", "low-rank", "--ratio", 2, "--output", small)
    assert made.code == 0, made
    compresskit.export(small, output=device, format="onnx")
    texts = [GOOD, BAD] if head == "tokens" else [(GOOD, BAD)]
    ours, theirs = (compresskit.predict(folder, texts, device="cpu").answers for folder in (small, device))
    for left, right in zip(ours, theirs, strict=True):
        assert left.keys() == right.keys()
        for name, value in left.items():
            close = isinstance(value, float) or name == "scores"
            assert right[name] == (pytest.approx(value, abs=1e-4) if close else value) or name == "entities"
    if head != "vectors":
        with pytest.raises(InputError, match="an export with a head gives no vectors"):
            compresskit.predict(device, GOOD, among=[BAD])


def test_objects_come_back_as_they_were(bench_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    model = tiny_model(head="classifier", num_labels=3).half().train()
    found = compresskit.predict(model, [GOOD], tokenizer=tokenizer, device="cpu")
    assert set(found.answers[0]["probabilities"]) == {"LABEL_0", "LABEL_1", "LABEL_2"}
    assert model.training
    assert model.dtype == torch.float16


def test_pairs(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    model = headed(bench_folder, tmp_path / "pairs", "classifier", num_labels=3, names=("yes", "no", "maybe"))
    classify = pipeline("text-classification", str(model), device="cpu")
    wanted = classify({"text": GOOD, "text_pair": BAD})
    answer = run("predict", "--model", model, "--pair", GOOD, BAD, "--json")
    found = json.loads(answer.out)
    assert found["texts"] == [GOOD, BAD]
    assert found["label"] == wanted["label"]
    assert found["score"] == pytest.approx(wanted["score"], abs=1e-5)
    rows = [{"text": GOOD, "text_pair": BAD}, (GOOD, BAD)]
    for given in rows:
        assert compresskit.predict(model, [given], device="cpu").answers[0]["score"] == pytest.approx(found["score"])


def test_numbers_and_several_labels(bench_folder: Path, tmp_path: Path) -> None:
    one = headed(bench_folder, tmp_path / "one", "classifier", num_labels=1)
    found = compresskit.predict(one, [GOOD], device="cpu")
    score = pipeline("text-classification", str(one), function_to_apply="none", device="cpu")(GOOD)[0]["score"]
    assert found.kind == "regression"
    assert found.answers[0]["value"] == pytest.approx(score, abs=1e-5)
    several = headed(
        bench_folder,
        tmp_path / "several",
        "classifier",
        num_labels=3,
        names=("joy", "fear", "love"),
        problem_type="multi_label_classification",
    )
    found = compresskit.predict(several, [GOOD], top=1, device="cpu")
    (rows,) = pipeline("text-classification", str(several), top_k=None, device="cpu")([GOOD])
    scores = {row["label"]: row["score"] for row in rows}
    assert found.kind == "multi-label"
    given = [name for name, score in scores.items() if score >= 0.5]
    assert sorted(found.answers[0]["labels"]) == sorted(given)
    assert len(found.answers[0]["probabilities"]) == max(1, len(given))
    for name, share in found.answers[0]["probabilities"].items():
        assert share == pytest.approx(scores[name], abs=1e-5)


def test_tags_of_words_and_texts(bench_folder: Path, tmp_path: Path) -> None:
    names = ("O", "B-x", "I-x")
    model = headed(bench_folder, tmp_path / "tags", "tokens", num_labels=3, names=names)
    text = "the plot, very good"
    found = compresskit.predict(model, text, device="cpu")
    (answer,) = found.answers
    assert found.kind == "tags"
    assert answer["text"] == text
    assert answer["words"] == ["the", "plot", ",", "very", "good"]
    assert len(answer["tags"]) == len(answer["scores"]) == 5
    for entity in answer["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]
    words = compresskit.predict(model, [answer["words"]], device="cpu").answers[0]
    assert words["tags"] == answer["tags"]
    assert words["text"] == answer["words"]
    plain = headed(bench_folder, tmp_path / "pos", "tokens", num_labels=2, names=("NOUN", "VERB"))
    found = compresskit.predict(plain, "the plot", device="cpu")
    assert "entities" not in found.answers[0]
    assert found.lines[0].startswith("the/")


def test_words_and_entities() -> None:
    words = Words.of("Ada Lovelace, of  London.")
    tagged = [("B-person", 1.0), ("I-person", 0.5), ("O", 1.0), ("O", 1.0), ("S-place", 0.75), ("O", 1.0)]
    assert entities(words, tagged) == [
        {"type": "person", "text": "Ada Lovelace", "start": 0, "end": 12, "score": 0.75},
        {"type": "place", "text": "London", "start": 18, "end": 24, "score": 0.75},
    ]
    assert entities(list(words), tagged)[1] == {"type": "place", "text": "London", "start": 4, "end": 5, "score": 0.75}
    assert Words.of("北京 @ada #x don't 3.5") == ["北", "京", "@ada", "#x", "don't", "3.5"]


@pytest.mark.parametrize("text", ["हिन्दी भाषा", "cafe\u0301 cre\u0300me", "می\u200cخواهم بروم", "مُحَمَّد في", "ไทย ดี"])
def test_marks_are_of_their_letter(text: str) -> None:
    """Vowels of Hindi and accents that stand by themselves cut every word into pieces."""
    words = Words.of(text)
    assert words == text.split()
    assert [text[start:end] for start, end in words.places] == words


def test_answers_in_paragraphs(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    model = headed(bench_folder, tmp_path / "questions", "questions")
    context = " ".join([GOOD, BAD] * 8)  # several windows
    answer = run("predict", "--model", model, "--pair", "what was good", context, "--json")
    found = json.loads(answer.out)
    assert context[found["start"] : found["end"]] == found["answer"]
    assert 0 < found["score"] < 1
    assert 0 < found["no_answer"] < 1
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoded = tokenizer("what was good", GOOD, return_tensors="pt")
    with torch.no_grad():
        output = AutoModelForQuestionAnswering.from_pretrained(model)(**encoded)
    shares = [getattr(output, f"{side}_logits")[0].softmax(0) for side in ("start", "end")]
    short = compresskit.predict(model, [("what was good", GOOD)], device="cpu").answers[0]
    assert short["no_answer"] == pytest.approx(float(shares[0][0] * shares[1][0]), rel=1e-4)
    first, last = (encoded.char_to_token(0, place, sequence_index=1) for place in (short["start"], short["end"] - 1))
    assert short["score"] == pytest.approx(float(shares[0][first] * shares[1][last]), rel=1e-4)
    (tmp_path / "squad.json").write_text(
        json.dumps({"data": [{"paragraphs": [{"context": GOOD, "qas": [{"question": "what", "answers": []}]}]}]})
    )
    assert run("predict", "--model", model, "--file", tmp_path / "squad.json", "--json").code == 0
    long = " ".join(["the"] * 30)  # half of the 40 tokens is for the question
    cut = run("predict", "--model", model, "--pair", long, GOOD, "--json")
    assert json.loads(cut.out)["cut"] == 10
    assert "10 tokens of their questions were cut off" in " ".join(cut.err.split())


def test_what_the_prompt_of_queries_pushes_out_is_counted(bench_folder: Path, tmp_path: Path) -> None:
    prompts, limit = {"prompts": {"query": "the the the the "}}, {"max_seq_length": 8}
    model = sentence_folder(bench_folder / "model", tmp_path / "model", encoder=limit, general=prompts)
    found = compresskit.predict(model, ["the the the"], among=["the the the", "the " * 7], device="cpu")
    assert found.answers[0]["cut"] == 1
    cut = [note for note in found.notes if "too long for the 8 tokens" in note]
    assert cut == [
        "1 of 1 texts are too long for the 8 tokens that are read; 1 tokens were cut off",
        "1 of 2 texts to look among are too long for the 8 tokens that are read; 1 tokens were cut off",
    ]


def test_vectors_similarities_neighbours(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    model = sentence_folder(bench_folder / "model", tmp_path / "vectors")
    tokenizer, base = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model)

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            return base(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    found = compresskit.predict(model, [GOOD, BAD], device="cpu")
    np.testing.assert_allclose(found.answers[1]["vector"], vector(BAD), atol=1e-5)
    cosine = torch.cosine_similarity(vector(GOOD), vector(BAD), dim=0).item()
    pair = compresskit.predict(model, [(GOOD, BAD)], device="cpu").answers[0]
    assert pair["similarity"] == pytest.approx(cosine, abs=1e-5)
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"_id": t, "text": t}) + "\n" for t in (BAD, GOOD, "film")))
    answer = run("predict", "--model", model, "--text", GOOD, "--among", tmp_path / "all.jsonl", "--top", 2, "--json")
    near = json.loads(answer.out)["neighbours"]
    assert near[0]["text"] == GOOD
    assert near[0]["number"] == 2
    assert near[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert len(near) == 2
    vectors = run("predict", "--model", model, "--text", GOOD)
    assert "48 numbers" in vectors.out


def test_the_task_names_inputs_and_labels(bench_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "version: 1\nname: own\ninputs: [review]\nlabel: stars\nlabels: {poor: '0', fine: '1'}\nmetrics: [accuracy]\n"
    )
    model = headed(bench_folder, tmp_path / "plain", "classifier", num_labels=2)
    (tmp_path / "a.jsonl").write_text(json.dumps({"review": GOOD, "text": "x"}))
    found = compresskit.predict(model, tmp_path / "a.jsonl", task=tmp_path / "own.yaml", device="cpu")
    assert found.answers[0]["text"] == GOOD
    assert set(found.answers[0]["probabilities"]) == {"poor", "fine"}
    assert any("taken as poor, fine" in note for note in found.notes)


def test_a_kind_that_says_no_more_than_its_answers(bench_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "ranks.yaml").write_text(
        "version: 1\nname: ranks\nkind: ranking\ninputs: [query, text]\nlabel: relevance\nmetrics: [map]\n"
    )
    model = headed(bench_folder, tmp_path / "one", "classifier", num_labels=1)
    found = compresskit.predict(model, [(GOOD, BAD)], task=tmp_path / "ranks.yaml", device="cpu")
    assert found.kind == "ranking"
    assert found.answers[0]["answer"] == compresskit.predict(model, [(GOOD, BAD)], device="cpu").answers[0]["value"]
    assert Answer.of(np.float32(0.5)) == Answer("0.5000", {"answer": 0.5})
    assert Answer.of({"b": {2, 1}}) == Answer("b 1, 2", {"answer": {"b": [1, 2]}})
    assert Answer.of(["x", ("y", 1)]).data == {"answer": ["x", ["y", 1]]}


def test_a_model_that_computes_no_numbers(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    model = tiny_model(head="classifier", num_labels=2)
    model.classifier.bias.data[0] = torch.inf
    tokenizer = AutoTokenizer.from_pretrained(bench_folder / "model")
    with pytest.raises(WorkError, match="NaN or infinity"):
        compresskit.predict(model, [GOOD], tokenizer=tokenizer, device="cpu")


def test_empty_texts_are_answered_and_rows_are_numbered(bench_folder: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "gap.txt").write_text(f"{GOOD}\n\n{BAD}\n\n")
    (tmp_path / "gap.csv").write_text(f'id,text\n7,"{GOOD}"\n8,\n9,{BAD}\n')
    for file in ("gap.txt", "gap.csv"):
        found = run("predict", "--model", bench_folder / "teacher", "--file", tmp_path / file, "--json")
        assert found.code == 0, found.err
        rows = [json.loads(line) for line in found.out.splitlines()]
        assert [(row["row"], row["text"]) for row in rows] == [(1, GOOD), (2, ""), (3, BAD)]
        assert all("label" in row for row in rows)
        assert "1 of 3 texts are empty; they are answered as they are" in " ".join(found.err.split())
    assert not any("empty" in note for note in compresskit.predict(bench_folder / "teacher", GOOD).notes)
    assert run("predict", "--model", bench_folder / "teacher", "--text", " ").code == 0


@pytest.mark.parametrize(
    ("head", "texts"), [("tokens", ["", []]), ("questions", [("", GOOD), (GOOD, ""), ("", "")]), ("vectors", [""])]
)
def test_empty_texts_of_every_head(bench_folder: Path, tmp_path: Path, head: str, texts: list[Any]) -> None:
    if head == "vectors":
        model = sentence_folder(bench_folder / "model", tmp_path / "model")
    else:
        names = {"num_labels": 3, "names": ("O", "B-x", "I-x")} if head == "tokens" else {}
        model = headed(bench_folder, tmp_path / "model", head, **names)
    found = []
    for text in texts:  # all rows of a call have one form
        predicted = compresskit.predict(model, [text], device="cpu")
        assert any("texts are empty" in note for note in predicted.notes)
        found.append(predicted.answers[0])
    if head == "tokens":
        assert [(answer["words"], answer["entities"]) for answer in found] == [([], [])] * 2
    if head == "questions":
        assert [answer["answer"] for answer in found[1:]] == ["", ""]


def test_what_is_cut_is_counted(bench_folder: Path, run: Run, tmp_path: Path) -> None:
    long = " ".join(["film"] * 50)  # 52 tokens; the model takes 40
    answer = run("predict", "--model", bench_folder / "teacher", "--text", long, "--text", GOOD, "--json")
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert rows[0]["cut"] == 12
    assert "cut" not in rows[1]
    note = "1 of 2 texts are too long for the 40 tokens that are read; 12 tokens were cut off"
    assert note in " ".join(answer.err.split())
    exact = run("predict", "--model", bench_folder / "teacher", "--text", " ".join(["film"] * 38), "--json")
    assert "cut" not in json.loads(exact.out)
    table = run("predict", "--model", bench_folder / "teacher", "--text", long)
    assert "cut off" in table.out
    model = headed(bench_folder, tmp_path / "tags", "tokens", num_labels=3, names=("O", "B-x", "I-x"))
    found = compresskit.predict(model, long, device="cpu")
    assert found.answers[0]["cut"] == 12
    assert any("12 words were cut off" in note for note in found.notes)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"truncation_side": "left"}))
    front = compresskit.predict(model, long, device="cpu").answers[0]
    assert front["cut"] == 12
    assert [score > 0 for score in front["scores"]] == [False] * 12 + [True] * 38


def test_answers_are_plain_text_in_the_terminal(bench_folder: Path, run: Run) -> None:
    answer = run("predict", "--model", bench_folder / "teacher", "--text", "[bold]film[/nothing] \x1b[31mred")
    assert answer.code == 0
    assert "[bold]film[/nothing]" in answer.out
    assert "\x1b[31m" not in answer.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["no text", "--text", "--file"]),
        (("--text", "a", "--file", "a.txt"), ["give one of --text and --file"]),
        (("--text", "a", "--pair", "a", "b"), ["give one of --text and --pair"]),
        (("--pair", "a", "b"), ["text 1", "task sst2 takes one text (sentence)", "here 2"]),
        (("--text", "a", "--field", "b"), ["fields b", "columns of a file"]),
        (("--text", "a", "--max-length", "200"), ["max length 200", "40 positions"]),
        (("--text", "a", "--task", "stsb"), ["task stsb needs a head with one number"]),
        (("--text", "a", "--task", "squad-retrieval"), ["task squad-retrieval", "--among"]),
        (("--text", "a", "--task", "nothing"), ["unknown task 'nothing'"]),
        (("--text", "a", "--output", "none/a.jsonl"), ["output none/a.jsonl", "does not exist"]),
        (("--file", "nothing.txt"), ["nothing.txt", "no such file"]),
        (("--file", "{}/a.pdf"), ["a.pdf", "unknown format", ".jsonl"]),
        (("--file", "{}/empty.txt"), ["empty.txt", "holds no text"]),
        (("--file", "{}/other.csv"), ["other.csv, row 1", "no column 'sentence'", "its columns: id, body", "--field"]),
        (("--file", "{}/other.csv", "--field", "bodi"), ["no column 'bodi'", "its columns: id, body"]),
        (("--file", "{}/twice.csv"), ["twice.csv: column 'sentence' comes twice"]),
        (("--file", "{}/bad.jsonl"), ["bad.jsonl, line 2", "not valid JSON"]),
        (("--file", "{}/hole.jsonl"), ["hole.jsonl, row 2", "column 'sentence' holds no text", "leave the row out"]),
        (("--file", "{}/number.jsonl"), ["number.jsonl, row 1", "column 'sentence' holds no text: 3"]),
        (("--file", "{}/half.jsonl"), ["half.jsonl, row 1", "surrogate"]),
    ],
)
def test_refused(bench_folder: Path, tmp_path: Path, run: Run, arguments: tuple[str, ...], words: list[str]) -> None:
    (tmp_path / "a.pdf").write_text("a")
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "other.csv").write_text("id,body\n1,a\n")
    (tmp_path / "twice.csv").write_text("sentence,,,sentence\na,,,b\n")
    (tmp_path / "bad.jsonl").write_text('{"sentence": "a"}\nplain\n')
    (tmp_path / "hole.jsonl").write_text('{"sentence": "a"}\n{"text": "b"}\n')
    (tmp_path / "number.jsonl").write_text('{"sentence": 3}\n')
    (tmp_path / "half.jsonl").write_text('{"sentence": "a\\ud800"}\n')
    given = [argument.replace("{}", str(tmp_path)) for argument in arguments]
    refused(run("predict", "--model", bench_folder / "teacher", *given), *words)


def test_standard_input_that_is_refused(bench_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ("predict", "--model", bench_folder / "teacher", "--file", "-")
    monkeypatch.setattr(sys, "stdin", Piped("", terminal=True))
    refused(run(*model), "standard input: is a terminal", "--text")
    monkeypatch.setattr(sys, "stdin", Piped(""))
    refused(run(*model), "standard input: holds no text")
    monkeypatch.setattr(sys, "stdin", Piped('{"sentence": "a"}\n{"sentence": \n'))
    refused(run(*model), "standard input, line 2: not valid JSON")


def test_models_that_are_refused(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    text = ("--text", GOOD)
    refused(run("predict", "--model", bench_folder / "model", *text), "no head", "modules.json", "fine-tuned")
    tiny_model(head="masked-lm").save_pretrained(tmp_path / "mlm")
    refused(run("predict", "--model", tmp_path / "mlm", *text), "BertForMaskedLM", "is of no kind of task")
    numbers = headed(bench_folder, tmp_path / "numbers", "classifier", num_labels=2, problem_type="regression")
    refused(run("predict", "--model", numbers, *text), "2 numbers at once")
    untrained = ("predict", "--model", bench_folder / "model", "--as", "sequence-classification")
    refused(run(*untrained, *text), "at random", "fine-tuned")
    refused(run("predict", "--model", "no/such/folder", *text), "no such folder")
    questions = headed(bench_folder, tmp_path / "questions", "questions")
    refused(run("predict", "--model", questions, *text), "spans takes two texts", "question and context")


def test_exports_that_are_refused(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "device"
    shutil.copytree(bench_folder / "teacher", folder)
    (folder / "training.json").unlink()
    model = ("predict", "--model", folder, "--text", GOOD)

    def record(**content: str) -> None:
        (folder / "export.json").write_text(json.dumps(content))

    record(format="onnx", model_class="BertForSequenceClassification")
    refused(run(*model), "model.onnx is missing")
    (folder / "model.onnx").write_bytes(b"no graph")
    refused(run(*model), f"model {folder}", "its onnx cannot be run")
    refused(run(*model, "--as", "base"), "--as base", "is an export")
    record(format="gguf", model_class="BertForSequenceClassification")
    refused(run(*model), "unknown format 'gguf'")
    record(format="onnx")
    refused(run(*model), "export.json", "no record of an export")
