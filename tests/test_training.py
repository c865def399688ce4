"""Stages on tiny models: what they learn, what they write, resuming after a kill, several processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import count, same, tiny_model, weights
from datasets import Dataset

import compresskit
from compresskit.errors import InputError, WorkError
from compresskit.planning.stage import Stage

TASK = {"task": "sst2", "max_length": 32, "device": "cpu"}


def test_two_stages_bring_a_student_back(bench_folder: Path, tmp_path: Path) -> None:
    general = compresskit.distill(
        bench_folder / "student", bench_folder / "model", text=bench_folder / "text.txt", output=tmp_path / "general",
        max_length=32, epochs=3, learning_rate=5e-3, device="cpu",
    )  # fmt: skip
    before, after = (general.record["scores"][who]["held_out"] for who in ("student_before", "student_after"))
    assert after["hidden"] < 0.7 * before["hidden"]
    assert any("logits" in note for note in general.notes)  # dropped: a base model predicts nothing
    final = compresskit.distill(
        tmp_path / "general", bench_folder / "teacher", data=bench_folder / "data", output=tmp_path / "final",
        epochs=6, learning_rate=5e-3, **TASK,
    )  # fmt: skip
    scores = {who: values["dev"]["accuracy"] for who, values in final.record["scores"].items()}
    assert scores["student_before"] < 0.7
    assert scores["student_after"] > 0.9
    assert final.record["kept"] == pytest.approx(scores["student_after"] / scores["teacher"])
    assert count(final.model) * 2 < count(compresskit.to_dense(final.model))

    folder = tmp_path / "final"
    assert {"model.safetensors", "config.json", "tokenizer.json", "training.json", "losses.png", "README.md"} <= {
        path.name for path in folder.iterdir()
    }
    assert not list(tmp_path.glob("*.checkpoints"))
    stages = json.loads((folder / "training.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["general", "task"]
    assert stages[1]["log"][-1]["step"] == stages[1]["steps"]
    assert {"loss_embedding", "loss_hidden", "loss_logits", "loss_supervised", "tokens_per_second"} <= set(
        stages[1]["log"][0]
    )
    card = (folder / "README.md").read_text()
    assert "**general**" in card
    assert "**task**" in card
    assert f"{100 * scores['student_after']:.2f}" in card
    assert "import BertForSequenceClassification" in card
    assert f"{count(final.model):,} parameters" in card
    again = compresskit.load(folder)
    assert again.config.id2label == {0: "negative", 1: "positive"}
    evaluated = compresskit.evaluate(folder, task="sst2", data=bench_folder / "data", max_length=32)
    assert evaluated.record["scores"]["dev"]["accuracy"] == scores["student_after"]


def test_record_counts_tokens_and_steps(bench_folder: Path) -> None:
    result = compresskit.distill(
        bench_folder / "student", bench_folder / "teacher", data=bench_folder / "data", max_steps=30, batch_size=16,
        **TASK,
    )  # fmt: skip
    record = result.record
    assert record["steps"] == 30
    assert record["epochs"] == pytest.approx(30 / 25)
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    lines = (bench_folder / "data" / "SST-2" / "train.tsv").read_text().splitlines()[1:]
    total = sum(len(tokenizer(line.split("\t")[0])["input_ids"]) for line in lines)
    assert total <= record["tokens"] < 1.4 * total
    assert record["tokens"] == pytest.approx(1.2 * total, rel=0.05)


def test_head_that_the_student_lacks_comes_from_the_teacher(bench_folder: Path) -> None:
    result = compresskit.distill(
        bench_folder / "student", bench_folder / "teacher", data=bench_folder / "data", max_steps=1,
        learning_rate=1e-9, **TASK,
    )  # fmt: skip
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(bench_folder / "teacher")
    assert torch.allclose(result.model.classifier.weight.cpu(), teacher.classifier.weight, atol=1e-6)
    assert any("copied from the teacher" in note and "classifier" in note for note in result.notes)


def test_masked_lm_stage_keeps_the_tie(masked_lm: Path, bench_folder: Path, tmp_path: Path) -> None:
    student, teacher = masked_lm / "student", masked_lm / "teacher"
    options = {"text": bench_folder / "text.txt", "max_length": 32, "device": "cpu"}
    result = compresskit.distill(student, teacher, output=tmp_path / "out", epochs=2, **options)
    assert set(result.record["losses"]) == {"embedding", "hidden", "logits", "supervised"}
    scores = result.record["scores"]
    assert scores["teacher"]["held_out"]["supervised"] > 0
    assert scores["student_after"]["held_out"]["supervised"] < scores["student_before"]["held_out"]["supervised"]
    again = compresskit.load(tmp_path / "out")
    assert count(again) == count(compresskit.load(student))
    ids = torch.randint(5, 499, (2, 9))
    assert torch.equal(again(ids).logits, result.model(ids).logits)
    # The same words are hidden before and after: a student that does not move keeps its loss.
    still = compresskit.distill(student, teacher, epochs=2, learning_rate=1e-12, **options).record["scores"]
    assert still["student_after"]["held_out"] == pytest.approx(still["student_before"]["held_out"], rel=1e-5)


def test_a_compressed_model_trains_without_a_teacher(bench_folder: Path) -> None:
    result = compresskit.finetune(
        bench_folder / "student", data=bench_folder / "data", epochs=10, learning_rate=3e-3, **TASK
    )
    scores = result.record["scores"]
    assert scores["student_after"]["dev"]["accuracy"] > scores["student_before"]["dev"]["accuracy"] + 0.2
    assert "teacher" not in scores


def test_own_data_set_and_models(bench_folder: Path, tmp_path: Path) -> None:
    teacher = tiny_model(seed=5)
    student = compresskit.compress(teacher, method="low-rank", ratio=3)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(5, 499, (n % 30 + 2,), generator=generator).tolist() for n in range(200)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    # A column of texts is what `map` leaves.
    given = Dataset.from_dict({"input_ids": rows, "text": ["left over"] * len(rows)})
    options = {"dataset": given, "tokenizer": tokenizer, "device": "cpu"}
    result = compresskit.distill(student, teacher, epochs=5, learning_rate=5e-3, output=tmp_path / "out", **options)
    assert result.model is student
    assert compresskit.load(tmp_path / "out").dtype == torch.float32
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert result.record["student"]["sha256"] is None
    scores = result.record["scores"]
    assert scores["student_after"]["held_out"]["hidden"] < scores["student_before"]["held_out"]["hidden"]
    beyond = Dataset.from_dict({"input_ids": [[2, 500, 3]] * 9})
    for bad, words in ((beyond, "token 500 is beyond"), ([[1, 2]], "give a datasets.Dataset, not a list")):
        with pytest.raises(InputError, match=words):
            compresskit.distill(student, teacher, **options | {"dataset": bad})
    long = Dataset.from_dict({"input_ids": [[2, 3], [5] * 50, [2, 3]]})
    with pytest.raises(InputError, match="row 1 has 50 tokens, the models take 40"):
        compresskit.distill(student, teacher, **options | {"dataset": long.with_format("torch")})
    with pytest.raises(InputError, match=r"input_ids.*its columns: text"):
        compresskit.distill(student, teacher, **options | {"dataset": Dataset.from_dict({"text": ["a"]})})


def test_own_labels(bench_folder: Path) -> None:
    """The column may be called label, as the hub has it; labels of tokens are padded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    rows = [[2, *range(10, 10 + n), 3] for n in range(2, 30)]
    options = {"tokenizer": tokenizer, "device": "cpu", "max_steps": 2}
    teacher = tiny_model(head="classifier")
    given = Dataset.from_dict({"input_ids": rows, "label": [n % 2 for n in range(28)]})
    student = compresskit.compress(teacher, method="low-rank", ratio=2)
    assert "supervised" in compresskit.distill(student, teacher, dataset=given, **options).record["losses"]
    teacher = transformers.AutoModelForTokenClassification.from_config(teacher.config).eval()
    given = Dataset.from_dict({"input_ids": rows, "labels": [[-100, *[1] * (len(row) - 2), -100] for row in rows]})
    student = compresskit.compress(teacher, method="low-rank", ratio=2)
    assert {"supervised", "logits"} <= set(
        compresskit.distill(student, teacher, dataset=given, **options).record["losses"]
    )
    with pytest.raises(InputError, match="31 tokens in a row, max length is 20"):
        compresskit.distill(student, teacher, dataset=given, max_length=20, **options)


def test_half_precision_is_trained_in_fp32_and_stored_as_it_was(bench_folder: Path, tmp_path: Path) -> None:
    student = compresskit.load(bench_folder / "student").to(torch.bfloat16)
    student.save_pretrained(tmp_path / "half")
    compresskit.distill(
        tmp_path / "half", bench_folder / "teacher", data=bench_folder / "data", output=tmp_path / "out", max_steps=3,
        tokenizer=transformers.AutoTokenizer.from_pretrained(bench_folder / "model"), **TASK,
    )  # fmt: skip
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}


def test_bf16_computes_teacher_and_student_in_bf16(bench_folder: Path) -> None:
    dtypes: dict[str, set[torch.dtype]] = {"teacher": set(), "student": set()}

    class Watch(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            def see(module, _, output):  # a twin of the teacher computes
                if type(module) is torch.nn.Linear and module.weight.data_ptr() == wanted.data_ptr():
                    dtypes["teacher"].add(output.dtype)

            wanted = next(tensor for name, tensor in teacher.named_parameters() if name.endswith("query.weight"))
            self.handle = torch.nn.modules.module.register_module_forward_hook(see)
            query = next(module for name, module in models["student"].named_modules() if name.endswith("query"))
            query.register_forward_hook(lambda _, __, output: dtypes["student"].add(output.dtype))

        def on_train_end(self, args, state, control, **_):
            self.handle.remove()

    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(bench_folder / "teacher")
    models = {"teacher": teacher, "student": compresskit.compress(teacher, method="low-rank", ratio=3)}
    compresskit.distill(
        models["student"], teacher, data=bench_folder / "data", max_steps=2, precision="bf16", callbacks=[Watch()],
        tokenizer=transformers.AutoTokenizer.from_pretrained(bench_folder / "model"), **TASK,
    )  # fmt: skip
    assert dtypes["teacher"] == {torch.bfloat16}
    assert dtypes["student"] == {torch.bfloat16, torch.float32}  # scored in fp32 after the last step
    dtypes["student"].clear()
    models["student"](**models["student"].dummy_inputs)
    assert dtypes["student"] == {torch.float32}
    outputs = models["student"](**models["student"].dummy_inputs, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3


def test_recipe_of_the_student_gives_the_settings(bench_folder: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    shutil.copytree(bench_folder / "student", student)
    (student / "recipe.yaml").write_text(
        "version: 1\nname: own\nratio: 3\nrules: [{role: [embedding, attention, ffn, head], method: low-rank}]\n"
        "distill: {task: {learning_rate: 0.002, batch_size: 20, max_length: 24, epochs: 2, temperature: 3,"
        " losses: {attention: 2, logits: 1}}}\n"
    )
    models = (student, bench_folder / "teacher")
    options = {"task": "sst2", "data": bench_folder / "data", "device": "cpu"}
    record = compresskit.distill(*models, max_steps=2, losses={"hidden": 0.5}, **options).record
    found = {name: record[name] for name in ("learning_rate", "batch_size", "max_length", "temperature", "losses")}
    assert found == {
        "learning_rate": 0.002,
        "batch_size": 20,
        "max_length": 24,
        "temperature": 3,
        "losses": {"attention": 2, "logits": 1, "hidden": 0.5},  # one weight given, the others the recipe's
    }
    assert record["attention_maps"] == "scores"


def test_seed_decides_everything(bench_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compresskit.distill(
            bench_folder / "student", bench_folder / "teacher", data=bench_folder / "data", output=tmp_path / name,
            max_steps=20, seed=seed, dropout=0.1, **TASK,
        )  # fmt: skip
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")


def test_models_given_as_objects_are_left_as_they_were(bench_folder: Path) -> None:
    class Look(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            seen.update(m.p for m in model.modules() if isinstance(m, torch.nn.Dropout))
            assert model.config._attn_implementation == "compresskit_scores"

    seen: set[float] = set()
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(bench_folder / "teacher").half()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student = compresskit.compress(teacher, method="low-rank", ratio=3)
    attention = student.config._attn_implementation
    compresskit.distill(
        student, teacher, data=bench_folder / "data", max_steps=2, dropout=0.3, losses={"attention": 1},
        callbacks=[Look()], tokenizer=transformers.AutoTokenizer.from_pretrained(bench_folder / "model"), **TASK,
    )  # fmt: skip
    assert seen == {0.3}
    assert {m.p for m in student.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert student.config.hidden_dropout_prob == 0.1
    assert student.config._attn_implementation == teacher.config._attn_implementation == attention
    assert student.dtype == teacher.dtype == torch.float16
    assert all(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_loss_that_is_not_finite_stops(bench_folder: Path, tmp_path: Path) -> None:
    class Break(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 12:
                next(model.get_input_embeddings().parameters()).data.fill_(float("nan"))

    with pytest.raises(WorkError, match=r"not finite at step 13 \(batch 13 of its epoch, .*last checkpoint is kept"):
        compresskit.distill(
            bench_folder / "student", bench_folder / "teacher", data=bench_folder / "data", output=tmp_path / "out",
            save_every=10, callbacks=[Break()], **TASK,
        )  # fmt: skip
    assert (tmp_path / "out.checkpoints" / "checkpoint-10" / "model.safetensors").is_file()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [10, 13])
def test_weights_that_are_not_finite_are_never_kept(bench_folder: Path, tmp_path: Path, step: int) -> None:
    """Broken at a checkpoint, or at the last step: the loss has not shown it yet."""

    class Break(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == step:
                next(model.parameters()).data.fill_(float("nan"))

    with pytest.raises(WorkError, match=f"is not finite after step {step}"):
        compresskit.distill(
            bench_folder / "student", bench_folder / "teacher", data=bench_folder / "data", output=tmp_path / "out",
            save_every=5, max_steps=13, callbacks=[Break()], **TASK,
        )  # fmt: skip
    kept = list((tmp_path / "out.checkpoints").glob("checkpoint-*"))
    assert [path.name for path in kept] == [f"checkpoint-{(step - 1) // 5 * 5}"]
    assert all(torch.isfinite(tensor).all() for tensor in weights(kept[0]).values())
    assert not (tmp_path / "out").exists()


def test_plain_loop_gives_the_same_gradients(bench_folder: Path, tmp_path: Path) -> None:
    """The Trainer with its batches by length, against a loop of three lines on the same batch."""
    teacher = tiny_model(head="classifier", seed=1)
    rows = [{"input_ids": [2, *range(10, 10 + n), 3], "labels": n % 2} for n in range(4, 12)]
    still = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    students = [tiny_model(head="classifier", seed=2, **still) for _ in range(2)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    collator = transformers.DataCollatorWithPadding(tokenizer)
    stage = Stage(losses={"hidden": 1, "supervised": 1})
    found = {}

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **_):
            found.update({name: parameter.grad.clone() for name, parameter in model.named_parameters()})

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        max_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        learning_rate=1e-2,
        weight_decay=0,
    )
    compresskit.DistillationTrainer(
        students[0],
        teacher,
        stage=stage,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
        callbacks=[Keep()],
    ).train()
    batch = collator([dict(row) for row in rows])
    labels = batch.pop("labels")
    with torch.no_grad():
        taught = teacher(**batch, output_hidden_states=True).hidden_states[1:]
    outputs = students[1].eval()(**batch, output_hidden_states=True)
    real = batch["attention_mask"].bool()
    loss = sum(
        torch.nn.functional.mse_loss(s[real], t[real]) for s, t in zip(outputs.hidden_states[1:], taught, strict=True)
    )
    (loss + torch.nn.functional.cross_entropy(outputs.logits, labels)).backward()
    torch.nn.utils.clip_grad_norm_(students[1].parameters(), 1.0)
    for name, parameter in students[1].named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name
