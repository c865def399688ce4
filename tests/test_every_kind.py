"""What every task kind owes, one test each: runs that are stopped, in 16 bits, in parts, on two processes, with a kept
teacher, and exported.

What these mean for a command is tested with classification in test_training_resume.py and test_taught.py, so its case
here is left to `make test-slow`, as are most of the slow ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FILLERS, NEGATIVE, POSITIVE, quick, reviews, same, tiny_model, weights
from faults.command import finish, start_ranks
from transformers import AutoTokenizer, TrainerCallback

import compresskit
from compresskit import InputError
from compresskit.exporting.format import FORMATS
from compresskit.tasks.kind import Scoring
from compresskit.tasks.loading import load_data, load_task
from compresskit.tasks.registry import KINDS

Row = dict[str, Any]


def _labels(words: Iterable[str]) -> list[str]:
    return [name for name, known in (("good", POSITIVE), ("bad", NEGATIVE)) if {*words} & {*known}]


def _regression(number: int) -> Row:
    texts = [text for text, _ in reviews(2, number)]
    return {"text": " ".join(texts), "label": float(sum("good" in _labels(text.split()) for text in texts))}


def _several(number: int) -> Row:
    text = " ".join(text for text, _ in reviews(1 + number % 2, number)) if number % 5 else "the"
    return {"text": text, "label": _labels(text.split())}


def _ranking(number: int) -> Row:
    """Queries of six texts each, of both sorts."""
    query, place = divmod(number, 6)
    text = reviews(1, number)[0][0] if place > 1 else f"{FILLERS[query % 15]} {('bad', 'great')[place]}"
    return {"query": FILLERS[query % 15], "text": text, "label": int("good" in _labels(text.split()))}


def _tags(number: int) -> Row:
    words = reviews(1, number)[0][0].split()
    return {"words": words, "label": ["-".join(["B", *_labels([word])]) if _labels([word]) else "O" for word in words]}


def _spans(number: int) -> Row:
    text = reviews(1, number)[0][0]
    found = next(word for word in text.split() if _labels([word]))
    answers = [{"text": found, "answer_start": f" {text} ".index(f" {found} ")}]
    return {"context": text, "qas": [{"id": str(number), "question": "how", "answers": answers}]}


def _classification(number: int) -> Row:
    text = reviews(1, number)[0][0]
    return {"text": text, "label": _labels(text.split())[0]}


@dataclass(frozen=True)
class Kind:
    """A small task of one kind.

    Attributes:
        row: makes the row of a number.
        inputs: columns of the inputs.
        metrics: that it is scored by.
        settings: of its trainings, beside the usual ones.
    """

    row: Any
    inputs: tuple[str, ...] = ("text",)
    metrics: tuple[str, ...] = ("accuracy",)
    settings: dict[str, Any] = field(default_factory=dict)

    def write(self, name: str, folder: Path) -> Path:
        """Its declaration, beside 96 rows of ``train`` and 24 of ``dev``."""
        ending = "json" if name == "spans" else "jsonl"
        for split, numbers in (("train", range(96)), ("dev", range(96, 120))):
            rows = [self.row(number) for number in numbers]
            lines = [{"data": [{"paragraphs": rows}]}] if name == "spans" else rows
            (folder / f"{split}.{ending}").write_text("\n".join(map(json.dumps, lines)) + "\n")
        files = {split: f"{split}.{ending}" for split in ("train", "dev")}
        label = "answers" if name == "spans" else "label"
        text = {"version": 1, "name": "own", "kind": name, "inputs": self.inputs, "label": label, "files": files}
        (folder / "own.yaml").write_text(json.dumps({**text, "metrics": self.metrics}))  # JSON is YAML
        return folder / "own.yaml"


#: Every kind that is trained.
OF = {
    "classification": Kind(_classification),
    "multi-label": Kind(_several, metrics=("macro_f1", "average_precision")),
    "ranking": Kind(_ranking, ("query", "text"), ("map", "ndcg@10"), {"logits_loss": "margin"}),
    "regression": Kind(_regression, metrics=("pearson",)),
    "spans": Kind(_spans, ("question", "context"), ("span_f1", "exact_match")),
    "tags": Kind(_tags, ("words",), ("entity_f1", "accuracy")),
}


class Stop(TrainerCallback):
    """Stops a training between two of its checkpoints."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class Case:
    """A task of one kind with its teacher.

    Attributes:
        kind: the kind's name.
        root: folder with the task and all models.
        student: folder of a model without a head.
    """

    kind: str
    root: Path
    student: Path

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Of every training."""
        task = OF[self.kind].write(self.kind, self.root)
        return {"task": task, "data": self.root, "max_length": 32, "device": "cpu", "learning_rate": 3e-3}

    @cached_property
    def teacher(self) -> Path:
        """Fine-tuned on the task."""
        compresskit.finetune(self.student.parent / "model", output=self.root / "teacher", max_steps=12, **self.settings)
        return self.root / "teacher"

    @cached_property
    def plain(self) -> Path:
        """The student without dropout."""
        return self.distil("plain")

    def distil(self, name: str, **changes: Any) -> Path:
        """Seven steps, which end in the third pass over the rows."""
        settings = self.settings | OF[self.kind].settings | {"max_steps": 7, "resume": False} | changes
        compresskit.distill(self.student, self.teacher, output=self.root / name, **settings)
        return self.root / name


#: The kinds that a test takes; the others are left to `make test-slow`.
ALL = pytest.mark.parametrize("case", quick(OF, *(OF.keys() - {"classification"})), indirect=True)
SOME = pytest.mark.parametrize("case", quick(OF, "multi-label", "spans"), indirect=True)
TAGS = pytest.mark.parametrize("case", quick(OF, "tags"), indirect=True)
RANKING = pytest.mark.parametrize("case", quick(OF, "ranking"), indirect=True)


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param), bench_folder / "student")


def log_of(folder: Path) -> list[dict[str, float]]:
    log: list[dict[str, float]] = json.loads((folder / "training.json").read_text())["stages"][-1]["log"]
    return log


def near(ours: Path, theirs: Path) -> None:
    """The same losses and weights but for the order of sums; of rounding Adam may make whole steps."""
    for mine, other in zip(log_of(ours), log_of(theirs), strict=True):
        for name in [name for name in other if name.startswith("loss")]:
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
    for name, weight in weights(theirs).items():
        torch.testing.assert_close(weights(ours)[name], weight, rtol=1e-2, atol=1e-3)


def test_every_kind_has_a_case() -> None:
    own = (kind for kind in KINDS.all().values() if type(kind).__module__.startswith("compresskit."))
    assert {kind.name for kind in own if kind.head is not None} == OF.keys()


@ALL
def test_another_head_is_refused(case: Case) -> None:
    model = tiny_model(head="questions" if case.kind == "tags" else "tokens")
    words = AutoTokenizer.from_pretrained(case.student)
    settings = {name: case.settings[name] for name in ("task", "data", "max_length", "device")}
    with pytest.raises(InputError, match=r"own needs a model for .* has another head: give a fine-tuned one"):
        compresskit.evaluate(model, tokenizer=words, **settings)


@ALL
def test_a_stopped_run_ends_in_the_same_weights(case: Case) -> None:
    settings: dict[str, Any] = {"dropout": 0.1, "save_every": 2}
    whole = case.distil("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        case.distil("broken", callbacks=[Stop()], **settings)
    assert same(whole, case.distil("broken", resume=True, **settings))


@ALL
def test_parts_of_a_batch_are_one_batch(case: Case) -> None:
    near(case.distil("parts", accumulation=2), case.plain)


@SOME
def test_a_kept_teacher_teaches_the_same(case: Case) -> None:
    near(case.distil("kept", teacher_outputs=case.root / "outputs"), case.plain)
    assert list((case.root / "outputs").glob("*/index.json"))


@SOME
def test_in_bf16_losses_are_near(case: Case) -> None:
    ours, theirs = log_of(case.distil("half", precision="bf16"))[0], log_of(case.plain)[0]
    for name in [name for name in theirs if name.startswith("loss")]:
        assert ours[name] == pytest.approx(theirs[name], rel=0.05), name
        assert ours[name] != theirs[name], name


@TAGS
@pytest.mark.slow
def test_two_processes_are_one(case: Case, tmp_path: Path) -> None:
    settings = case.settings | OF[case.kind].settings | {"max_steps": 7, "threads": 1, "dropout": 0}
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    models = ("--student", case.student, "--teacher", case.teacher, "--output", tmp_path / "two")
    codes = [finish(process) for process in start_ranks(tmp_path / "log", 2, "distill", *models, *flags)]
    assert not any(codes), [path.read_text() for path in tmp_path.glob("log-*")]
    record = json.loads((tmp_path / "two" / "training.json").read_text())["stages"][-1]
    assert record["hardware"]["processes"] == 2
    near(tmp_path / "two", case.plain)


@RANKING
@pytest.mark.slow
def test_onnx_runtime_scores_the_same(case: Case) -> None:
    pytest.importorskip("onnxruntime")
    compresskit.export(case.plain, output=case.root / "onnx", format="onnx")
    data, kind = load_data(load_task(case.settings["task"]), case.root), KINDS.get(case.kind)
    ours = Scoring(compresskit.load(case.plain), AutoTokenizer.from_pretrained(case.plain), 32)
    theirs = replace(ours, run=FORMATS.get("onnx").load(case.root / "onnx"))
    scores = [kind.score(scoring, data, data.splits["dev"]) for scoring in (ours, theirs)]
    assert scores[1] == pytest.approx(
        scores[0], abs=1e-3
    )  # a correlation of nearly equal numbers shows their last digits
