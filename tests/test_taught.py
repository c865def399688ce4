"""A teacher's outputs kept in files: the same training as with the teacher itself, and no second computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Run, refused, tiny_bench, tiny_model, weights
from datasets import Dataset

import compresskit
from compresskit.tasks.predictions import PLAIN
from compresskit.training import taught


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many batches each call of ``teach`` gave to the teacher."""
    found: list[int] = []
    real = taught.teach

    def teach(run: Any, *arguments: Any, **options: Any) -> Any:
        found.append(0)

        def counted(batch: Any) -> Any:
            found[-1] += 1
            return run(batch)

        return real(counted, *arguments, **options)

    monkeypatch.setattr("compresskit.training.trainer.teach", teach)
    return found


def test_students_and_seeds_share_what_is_kept(bench_folder: Path, tmp_path: Path, passes: list[int]) -> None:
    options = {"task": "sst2", "data": bench_folder / "data", "max_length": 32, "device": "cpu", "max_steps": 8}
    models = bench_folder / "student", bench_folder / "teacher"
    compresskit.distill(*models, output=tmp_path / "plain", **options)
    kept = options | {"teacher_outputs": tmp_path / "outputs"}
    compresskit.distill(*models, output=tmp_path / "kept", **kept)
    compresskit.distill(*models, output=tmp_path / "again", **kept)
    compresskit.distill(*models, output=tmp_path / "seed", seed=1, **kept)
    assert passes == [13, 0, 0]  # 400 rows in batches of 32
    plain, first, again = (weights(tmp_path / name) for name in ("plain", "kept", "again"))
    for name, tensor in plain.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-5)
        assert torch.equal(first[name], again[name])
    logs = [json.loads((tmp_path / name / "training.json").read_text())["stages"][-1] for name in ("plain", "kept")]
    assert logs[1]["losses"] == logs[0]["losses"]
    assert logs[1]["log"][-1]["loss_attention"] == pytest.approx(logs[0]["log"][-1]["loss_attention"], rel=1e-3)
    compresskit.distill(*models, output=tmp_path / "other", losses={"attention": 0}, **kept)
    assert passes[-1] == 13  # other outputs are wanted
    compresskit.distill(*models, output=tmp_path / "half", precision="bf16", **kept)
    assert passes[-1] == 13  # bf16 is kept apart from fp32


def test_spans(bench_folder: Path, tmp_path: Path, passes: list[int]) -> None:
    teacher = transformers.BertForQuestionAnswering(tiny_model().config).eval()
    rows = [[2, *range(5, 5 + length), 3] for length in (4, 9, 17, 6, 12, 8)]
    data = Dataset.from_dict(
        {"input_ids": rows, "start_positions": [1, 2, 3, 1, 2, 3], "end_positions": [2, 3, 4, 2, 3, 4]}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    trained = []
    for kept in (None, tmp_path / "outputs"):
        torch.manual_seed(0)
        student = compresskit.compress(teacher, method="low-rank", ratio=2)
        options = {"batch_size": 3, "epochs": 2, "losses": {"attention": 1, "logits": 1}, "device": "cpu"}
        compresskit.distill(student, teacher, dataset=data, tokenizer=tokenizer, teacher_outputs=kept, **options)
        trained.append(student.state_dict())
    assert passes == [1]
    for name, tensor in trained[0].items():
        # The bias of a softmax has no gradient but rounding, of which Adam makes whole steps.
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-3, atol=1e-3)


def test_kept_outputs_are_those_of_the_model(tmp_path: Path) -> None:
    model = tiny_model(head="classifier", num_labels=3)
    model.set_attn_implementation("eager")
    rows = [[2, *range(5, 5 + length), 3] for length in (4, 9, 17)]
    data = Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows]})

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    @torch.inference_mode()
    def run(batch: Any) -> Any:
        return model(
            **{k: v for k, v in batch.items() if k != "length"}, output_hidden_states=True, output_attentions=True
        )

    kept = taught.teach(run, data, collate, tmp_path, [], predictions=PLAIN, half=False)
    assert isinstance(kept, taught.TaughtRows)
    chosen = [2, 0]
    found, wanted = kept.batch(chosen, 19), run(collate([data[row] for row in chosen]))
    assert set(found) == {"hidden_states", "attentions", "logits"}
    torch.testing.assert_close(found["logits"], wanted.logits)
    for place, row in enumerate(chosen):
        size = len(rows[row])
        for ours, theirs in zip(found.hidden_states, wanted.hidden_states, strict=True):
            torch.testing.assert_close(ours[place, :size], theirs[place, :size])
            assert not ours[place, size:].any()
        for ours, theirs in zip(found.attentions, wanted.attentions, strict=True):
            torch.testing.assert_close(ours[place, :, :size, :size], theirs[place, :, :size, :size])


def test_nothing_is_kept_where_the_disk_is_small(
    bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taught.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    done = compresskit.distill(
        bench_folder / "student", bench_folder / "teacher", task="sst2", data=bench_folder / "data", max_length=32,
        device="cpu", max_steps=2, teacher_outputs=tmp_path / "outputs",
    )  # fmt: skip
    assert done.record["losses"]
    assert done.notes[-1] == "teacher outputs are not kept: 0.0 GB are more than half of the free disk"
    assert done.record["notes"][-1] == done.notes[-1]
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == [".lock"]


def test_a_benchmark_leaves_no_outputs(bench_folder: Path, tmp_path: Path, passes: list[int]) -> None:
    tiny_bench(
        bench_folder, tmp_path / "report", tasks=("sst2",), data=str(bench_folder / "data"), seeds=(0, 1),
        teacher={"max_length": 32, "max_steps": 5}, task={"max_length": 32, "max_steps": 5},
    )  # fmt: skip
    assert passes == [13, 0]
    assert not list((tmp_path / "report").glob("cells/*/outputs/*/*"))


def test_another_teacher_and_a_damaged_file_are_computed_again(
    bench_folder: Path, tmp_path: Path, passes: list[int]
) -> None:
    options = {"task": "sst2", "data": bench_folder / "data", "max_length": 32, "device": "cpu", "max_steps": 2}
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(bench_folder / "teacher")
    kept = options | {"teacher_outputs": tmp_path / "outputs", "tokenizer": tokenizer}

    def distill() -> None:
        compresskit.distill(compresskit.compress(teacher, method="low-rank", ratio=3), teacher, **kept)

    distill()
    next((tmp_path / "outputs").glob("*/hidden_states")).unlink()
    distill()
    assert passes == [13, 13]
    with torch.no_grad():
        teacher.classifier.weight += 0.1
    distill()
    distill()
    assert passes == [13, 13, 13, 0]


def test_predictions_per_token(bench_folder: Path, tmp_path: Path, passes: list[int]) -> None:
    teacher = transformers.BertForTokenClassification(tiny_model().config).eval()
    rows = [[2, *range(5, 5 + 3 + number % 20), 3] for number in range(40)]
    data = Dataset.from_dict({"input_ids": rows, "labels": [[0] * len(row) for row in rows]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    trained = []
    for kept in (None, tmp_path / "outputs"):
        student = compresskit.compress(teacher, method="low-rank", ratio=2)
        options = {"batch_size": 8, "epochs": 1, "device": "cpu"}
        compresskit.distill(student, teacher, dataset=data, tokenizer=tokenizer, teacher_outputs=kept, **options)
        trained.append(student.state_dict())
    assert passes == [2]
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-3, atol=1e-3)


def test_from_the_command_line(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    data, outputs = bench_folder / "data", tmp_path / "outputs"
    options = (
        "--task",
        "sst2",
        "--data",
        data,
        "--max-steps",
        2,
        "--max-length",
        32,
        "--device",
        "cpu",
        "--threads",
        1,
    )
    code, out, _ = run("finetune", "--model", bench_folder / "model", *options, "--output", tmp_path / "teacher")
    assert code == 0
    assert f"--teacher {tmp_path / 'teacher'} --student STUDENT --task sst2 --data {data}" in out
    models = ("--student", bench_folder / "student", "--teacher", tmp_path / "teacher")
    code, out, _ = run("distill", *models, *options, "--teacher-outputs", outputs, "--output", tmp_path / "final")
    assert code == 0
    assert list(outputs.glob("*/index.json"))


def test_bad_folders_are_refused_before_anything_is_done(bench_folder: Path, tmp_path: Path, run: Run) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    models = ("--student", bench_folder / "student", "--teacher", bench_folder / "teacher")
    options = (*models, "--task", "sst2", "--data", bench_folder / "data", "--output", tmp_path / "out")
    refused(run("distill", *options, "--teacher-outputs", file), "--teacher-outputs", "is a file")
    refused(run("distill", *options, "--teacher-outputs", file / "sub"), "teacher outputs", "cannot be written")
    refused(run("distill", *options, "--teacher-outputs", tmp_path / "out" / "in"), "lie in the output folder")
    assert file.read_text() == "mine"
    assert not list(tmp_path.glob("out*"))


def test_what_cannot_be_kept_is_said(masked_lm: Path, bench_folder: Path, tmp_path: Path) -> None:
    done = compresskit.distill(
        masked_lm / "student", masked_lm / "teacher", text=bench_folder / "text.txt", max_length=32, max_steps=1,
        device="cpu", teacher_outputs=tmp_path / "outputs",
    )  # fmt: skip
    assert done.notes[-1] == "teacher outputs are not kept: other words are masked in every epoch"


def test_rows_that_are_padded_in_front_are_not_kept(tmp_path: Path) -> None:
    model = tiny_model(head="classifier")
    data = Dataset.from_dict({"input_ids": [[2, 5, 3], [2, 5, 6, 3]], "length": [3, 4]})

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([[0] * (4 - len(row["input_ids"])) + row["input_ids"] for row in batch])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    def run(batch: Any) -> Any:
        return model(**batch, output_hidden_states=True)

    found = taught.teach(run, data, collate, tmp_path, [], predictions=PLAIN, half=False)
    assert found == "rows are not padded at their end"
