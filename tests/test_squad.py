"""SQuAD: the official scores, windows of long paragraphs, answers in texts and in files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from conftest import tiny_model
from tokenizers.processors import TemplateProcessing

import compresskit
from compresskit.errors import InputError
from compresskit.model.tokenizer import padding_for
from compresskit.tasks import squad
from compresskit.tasks.kind import Scoring
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.registry import KINDS


def test_squad_scores_by_the_official_rules() -> None:
    answers = [
        squad.Answers(("the Denver Broncos", "Broncos"), (0, 4)),
        squad.Answers((), ()),
        squad.Answers(("a b",), (0,)),
    ]
    found = squad.scores(["Denver Broncos!", "", "a b c d"], answers)
    assert found["exact_match"] == pytest.approx((1 + 1 + 0) / 3)
    # "a" is an article and goes: 1 of 3 words given, 1 of 1 wanted.
    assert found["span_f1"] == pytest.approx((1 + 1 + 2 * (1 / 3) / (1 + 1 / 3)) / 3)
    assert squad.scores(["something"], [squad.Answers((), ())]) == {"span_f1": 0.0, "exact_match": 0.0}


def test_squad_texts_of_which_nothing_is_left() -> None:
    """As evaluate-v1.1.py and evaluate-v2.0.py score them: articles and punctuation are taken out first."""
    cases = [("the", "The"), ("!", "?"), ("film", "a"), ("", "the"), ("the", "film")]
    expected = {False: ([1, 1, 0, 1, 0], [0, 0, 0, 0, 0]), True: ([1, 1, 0, 1, 0], [1, 1, 0, 1, 0])}
    for optional, (exact, f1) in expected.items():
        found = [squad.scores([given], [squad.Answers((gold,), (0,), optional)]) for given, gold in cases]
        assert [one["exact_match"] for one in found] == exact
        assert [one["span_f1"] for one in found] == f1
    # In 2.0 such an answer is none beside a real one.
    golds = ("the", "film")
    assert squad.scores([""], [squad.Answers(golds, (0, 0), optional=True)]) == {"span_f1": 0.0, "exact_match": 0.0}
    assert squad.scores([""], [squad.Answers(golds, (0, 0))]) == {"span_f1": 0.0, "exact_match": 1.0}


@pytest.mark.parametrize("length", [8, 9, 12, 16, 17, 20])
def test_squad_windows_of_few_tokens(tokenizer, length: int) -> None:
    context = " ".join(["the film was good"] * 4)
    answers = [squad.Answers(("good",), (13,))]
    columns = squad.windows(tokenizer, [("who " * 20, context)], answers, length, length // 3)
    assert all(len(ids) <= length for ids in columns["input_ids"])
    covered = {span for row in columns["offsets"] for span in row if span is not None}
    assert len(covered) == 16  # every word of the context
    with pytest.raises(InputError, match="no room for the context beside a question of 3 tokens; 7 are the least"):
        squad.windows(tokenizer, [("who is it", context)], answers, 6, 2)


@pytest.mark.parametrize(
    "answers",
    [None, {}, {"text": ["a"], "answer_start": ["x"]}, {"text": [None], "answer_start": [0]},
     {"text": ["a"], "answer_start": []}, {"text": "a", "answer_start": [0]}, {"text": ["a"], "answer_start": [-1]}],
)  # fmt: skip
def test_squad_answers_of_another_form(answers: object) -> None:
    with pytest.raises(InputError, match="row 3: answers must be texts"):
        squad.Answers.of({"answers": answers}, "row 3")


def test_squad_answers_beyond_the_context() -> None:
    row = {"context": "good", "answers": {"text": ["ood", "good"], "answer_start": [1, 1]}}
    with pytest.raises(
        InputError, match="row 3: the answer 'good' at character 1 reaches beyond the context, which has 4"
    ):
        squad.Answers.of(row, "row 3")


def test_an_answer_that_stands_elsewhere_is_not_learnt(bench_folder: Path, tmp_path: Path) -> None:
    """Places counted in bytes, or from 1 on, taught other words; scores read the texts alone."""
    for split, start in (("train", 3), ("dev", 5)):
        answers = [{"text": "good", "answer_start": start}]
        rows = [
            {"context": "h\xe9 a good film", "qas": [{"id": str(i), "question": "how", "answers": answers}]}
            for i in range(8)
        ]
        (tmp_path / f"{split}.json").write_text(json.dumps({"data": [{"paragraphs": rows}]}))
    task = {"version": 1, "name": "own", "kind": "spans", "inputs": ["question", "context"], "label": "answers"}
    task |= {"files": {split: f"{split}.json" for split in ("train", "dev")}, "metrics": ["span_f1"]}
    (tmp_path / "own.yaml").write_text(json.dumps(task))
    settings = {"task": tmp_path / "own.yaml", "data": tmp_path, "max_length": 32, "device": "cpu"}
    with pytest.raises(InputError, match=r"train\.json: the answer 'good' to 'how' does not stand at character 3"):
        compresskit.finetune(bench_folder / "model", max_steps=1, **settings)
    dev = (tmp_path / "dev.json").read_text()
    (tmp_path / "train.json").write_text(dev.replace("good film", "Good film"))  # case says nothing of the place
    (tmp_path / "dev.json").write_text(dev.replace(": 5", ": 6"))
    compresskit.finetune(bench_folder / "model", max_steps=1, **settings)


def test_squad_scores_do_not_depend_on_padding(bench_folder: Path, tmp_path: Path) -> None:
    model = tiny_model(head="questions", initializer_range=0.5)
    words = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    asked = {"question": "how", "answers": [{"text": "good", "answer_start": 13}]}
    paragraphs = [{"context": "the film was good " * times, "qas": [asked]} for times in (1, 3, 9)]
    for split in ("train", "dev"):
        (tmp_path / f"{split}-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    kind, data = KINDS.get("spans"), load_data(load_task("squad"), tmp_path)
    found = []
    for side in ("right", "left"):
        words.padding_side = side
        for batch_size in (1, 3):
            scoring = Scoring(model, words, 32, batch_size=batch_size)
            found.append(kind.answers(scoring, data, data.splits["dev"]))
        rows = kind.encode(data, data.splits["train"], words, 32, model)
        columns = ("input_ids", "start_positions", "end_positions")
        batch = kind.collator(padding_for(model, words))([{name: row[name] for name in columns} for row in rows])
        for ids, start in zip(batch["input_ids"], batch["start_positions"], strict=True):
            assert start == 0 or words.decode(ids[start]) == "good"
    assert found[0] == found[1] == found[2] == found[3]
    assert words.padding_side == "left"  # the caller's own is left as it was


def test_squad_windows_find_the_answer_again(tokenizer, tmp_path: Path) -> None:
    context = " ".join(["the film was not good"] * 12) + " but the actor is fine"
    start = context.index("actor is")
    texts, answers = [("who is fine", context)], [squad.Answers(("actor is",), (start,))]
    columns = squad.windows(tokenizer, texts, answers, 40, 10)
    assert len(columns["input_ids"]) > 1
    assert all(len(ids) <= 40 for ids in columns["input_ids"])
    spans = list(zip(columns["start_positions"], columns["end_positions"], strict=True))
    assert spans[0] == (0, 0)  # this window lacks the answer
    first, last = spans[-1]
    assert tokenizer.decode(columns["input_ids"][-1][first : last + 1]) == "actor is"
    # Logits that point there give the text back; equal ones elsewhere give nothing where none is allowed.
    starts = [np.full(40, -5.0) for _ in spans]
    ends = [np.full(40, -5.0) for _ in spans]
    starts[-1][first], ends[-1][last] = 5, 5
    assert squad.best_answers(starts, ends, columns, texts, allow_none=False) == ["actor is"]
    starts[0][0] = ends[0][0] = 9
    for window in range(len(spans)):
        starts[window][0] = ends[window][0] = 9
    assert squad.best_answers(starts, ends, columns, texts, allow_none=True) == [""]


def test_no_answer_stands_where_the_tokenizer_puts_its_token(tokenizer) -> None:
    """XLNet's [CLS] is the last token of a sequence."""
    numbers = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    pair = "$A [SEP] $B:1 [SEP]:1 [CLS]:2"
    template = TemplateProcessing(single="$A [SEP] [CLS]", pair=pair, special_tokens=numbers)
    tokenizer.backend_tokenizer.post_processor = template
    texts = [("who is it", "the film is good"), ("who", "the film is bad")]
    columns = squad.windows(tokenizer, texts, [squad.Answers((), ()), squad.Answers(("bad",), (12,))], 40, 10)
    last = [len(ids) - 1 for ids in columns["input_ids"]]
    assert columns["start_positions"][0] == columns["end_positions"][0] == last[0]
    assert columns["start_positions"][1] == last[1] - 2
    logits = [np.where(np.arange(40) == place, 5.0, 0.0) for place in last]
    assert squad.best_answers(logits, logits, columns, texts, allow_none=True) == ["", ""]
    assert squad.best_spans(logits, logits, columns, texts)[0].no_answer > 0.5


def test_long_question_leaves_room_for_the_context(tokenizer) -> None:
    columns = squad.windows(
        tokenizer, [("who " * 60, "the film is good " * 10)], [squad.Answers(("good",), (12,))], 32, 8
    )
    assert len(columns["input_ids"]) > 1
    assert all(len(ids) <= 32 for ids in columns["input_ids"])


def test_squad_2_file(tmp_path: Path) -> None:
    questions = [
        {
            "question": "a",
            "is_impossible": True,
            "answers": [],
            "plausible_answers": [{"text": "x", "answer_start": 0}],
        },
        {"question": "b", "is_impossible": False, "answers": [{"text": "film", "answer_start": 4}]},
    ]
    data = {"version": "v2.0", "data": [{"paragraphs": [{"context": "the film", "qas": questions}]}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(data))
    split = load_data(load_task("squad_v2"), tmp_path, train=False).splits["dev"]
    assert split.targets == [squad.Answers((), (), optional=True), squad.Answers(("film",), (4,), optional=True)]


def test_squad_from_file_to_scores(bench_folder: Path, tmp_path: Path) -> None:
    def paragraphs(rows: int) -> list:
        return [
            {
                "context": "the film was good" if i % 2 else "the plot is bad",
                "qas": [
                    {
                        "question": "how",
                        "answers": [{"text": "good" if i % 2 else "bad", "answer_start": 13 - (i + 1) % 2}],
                    }
                ],
            }
            for i in range(rows)
        ]

    for name, rows in (("train-v1.1.json", 120), ("dev-v1.1.json", 10)):
        (tmp_path / name).write_text(json.dumps({"data": [{"paragraphs": paragraphs(rows)}]}))
    teacher = compresskit.finetune(
        bench_folder / "model", task="squad", data=tmp_path, max_length=32, learning_rate=3e-3, epochs=8, device="cpu",
        output=tmp_path / "teacher",
    )  # fmt: skip
    assert teacher.record["scores"]["student_after"]["dev"]["exact_match"] > 0.9
    student = compresskit.distill(
        bench_folder / "student", tmp_path / "teacher", task="squad", data=tmp_path, max_length=32, learning_rate=5e-3,
        epochs=10, device="cpu",
    )  # fmt: skip
    assert student.record["scores"]["student_after"]["dev"]["span_f1"] > 0.7
    assert set(student.record["losses"]) == {"embedding", "attention", "hidden", "logits", "supervised"}
