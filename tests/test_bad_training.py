"""Bad input to finetune, distill and evaluate: one clear line, exit code 2, nothing written."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import Run, refused, tiny_model, write_tsv
from transformers import BertTokenizer

import compresskit
from compresskit.errors import InputError, WorkError

OWN = (
    "version: 1\nname: own\ninputs: [text]\nlabel: kind\nfiles: {train: train.tsv, dev: dev.tsv}\nmetrics: [accuracy]\n"
)


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


SQUAD = (
    '{"data": [{"paragraphs": [{"context": "a film", "qas": [{"question": "what", '
    '"answers": [{"text": "film", "answer_start": 2}]}]}]}]}'
)
GOOD = "sentence\tlabel\ngood\t1\nbad\t0\n"


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (None, ["has no SST-2/train.tsv"]),
        ("", ["holds no rows"]),
        ("sentence\tlabel\n", ["holds no rows"]),
        ("sentence\tlabel\ngood\t1\nbad\n", ["train.tsv, line 3", "has 1 fields, expected 2 (sentence, label)"]),
        ("sentence\tlabel\ngood\t1\textra\n", ["line 2", "has 3 fields"]),
        ("sentence\tlabel\ngood\t1\nbad\t7\n", ["row 2", "unknown label '7'", "known: 0, 1"]),
        ("text\tlabel\ngood\t1\n", ["no column 'sentence'", "its columns: text, label"]),
        ("sentence\tlabel\ncaf\xe9\t1\n".encode("latin-1"), ["train.tsv", "not UTF-8"]),
    ],
)
def test_bad_rows(run: Run, bench_folder: Path, tmp_path: Path, train: str | bytes | None, words: list[str]) -> None:
    write(tmp_path / "data" / "SST-2" / "dev.tsv", GOOD)
    if train is not None:
        write(tmp_path / "data" / "SST-2" / "train.tsv", train)
    model = bench_folder / "model"
    refused(run("finetune", "--model", model, "--task", "sst2", "--data", tmp_path / "data", "--output", "out"), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (OWN.replace("name: own", "nmae: own"), ["unknown key 'nmae'", "'name'"]),
        (OWN.replace("[accuracy]", "[acuracy]"), ["unknown metric 'acuracy'", "did you mean 'accuracy'"]),
        (OWN.replace("[accuracy]", "[span_f1]"), ["unknown metric 'span_f1'", "known: accuracy"]),
        (OWN.replace("[text]", "[a, b, c]"), ["inputs"]),
        (
            OWN.replace("[accuracy]", "[pearson]") + "kind: regression\nlabels: {a: b}\n",
            ["labels are for kinds with classes"],
        ),
        ("just text", ["must be a mapping"]),
        (": {", ["not valid YAML"]),
        (OWN, ["column 'kind' has 1 different labels"]),
        (OWN.replace("label: kind", "label: sort"), ["no column 'sort'", "its columns: text, kind"]),
    ],
)
def test_bad_declarations(run: Run, bench_folder: Path, tmp_path: Path, text: str, words: list[str]) -> None:
    write(tmp_path / "own.yaml", text)
    for split in ("train", "dev"):
        write(tmp_path / f"{split}.tsv", "text\tkind\ngood\tx\nbad\tx\n")
    model = bench_folder / "model"
    task = tmp_path / "own.yaml"
    refused(run("finetune", "--model", model, "--task", task, "--data", tmp_path, "--output", "out"), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "sst3"], ["unknown task 'sst3'", "did you mean 'sst2'"]),
        (["--task", "nowhere.yaml"], ["nowhere.yaml", "cannot be read"]),
        (["--task", __file__], ["test_bad_training.py: is no YAML file (.yaml), which describes a task of your own"]),
        (["--task", "hans"], ["evaluation only", "rte or mnli"]),
        (["--task", "sst2", "--data", "nowhere"], ["data nowhere: no such folder"]),
        ([], ["--task is needed"]),
        (["--task", "sst2", "--epochs", "1", "--max-steps", "3"], ["one of epochs, max_steps and max_tokens"]),
        (["--task", "sst2", "--max-tokens", "5", "--max-steps", "3"], ["max_steps or max_tokens, not both"]),
        (["--task", "sst2", "--learning-rate", "-1"], ["learning_rate"]),
        (["--task", "sst2", "--learning-rate", "nan"], ["learning_rate"]),
        (["--task", "sst2", "--epochs", "0"], ["epochs"]),
        (["--task", "sst2", "--batch-size", "0"], ["batch_size"]),
        (["--task", "sst2", "--dropout", "2"], ["dropout"]),
        (["--task", "sst2", "--batch-size", "6", "--accumulation", "4"], ["batch size 6", "multiple of 4"]),
        (["--task", "sst2", "--max-length", "41"], ["max length 41", "40 positions"]),
    ],
)
def test_bad_settings(run: Run, bench_folder: Path, arguments: list[str], words: list[str]) -> None:
    more = [] if "--data" in arguments else ["--data", bench_folder / "data"]
    length = [] if "--max-length" in arguments else ["--max-length", "32"]
    refused(run("finetune", "--model", bench_folder / "model", *arguments, *more, *length, "--output", "out"), *words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--student", "{}/teacher"], ["is not compressed", "compresskit compress"]),
        (["--student", "nowhere"], ["nowhere"]),
        (["--teacher", "nowhere"], ["nowhere"]),
        (["--text", "nowhere.txt"], ["text nowhere.txt: no such file"]),
        (["--text", "{}/data"], ["is a folder that holds no .txt or .jsonl file"]),
        (["--text", "{}/data/SST-2/dev.tsv"], ["dev.tsv: is a table; give plain text"]),
        (["--text", "{}/empty.txt"], ["holds no text"]),
        (["--text", "{}/bad.jsonl"], ["bad.jsonl, line 2", "not valid JSON"]),
        (["--text", "{}/other.jsonl"], ["other.jsonl, line 1", "no field 'text'"]),
        (["--data", "{}/data"], ["--data belongs to --task"]),
        (["--text", "{}/text.txt", "--task", "sst2"], ["one of task, text and dataset"]),
        (["--loss", "hiden=1"], ["unknown loss 'hiden'", "did you mean 'hidden'"]),
        (["--loss", "hidden"], ["--loss hidden", "NAME=WEIGHT"]),
        (["--loss", "hidden=-1"], ["losses: hidden", "at least 0"]),
        (["--loss", "hidden=0", "--loss", "embedding=0"], ["no loss term is left", "no head"]),
        (["--loss", "logits=1"], ["loss logits", "has no head", "weight was given"]),
        (["--loss", "hidden=1", "--loss", "hidden=2"], ["--loss hidden: is given twice"]),
        (["--temperature", "0"], ["temperature"]),
        (["--temperature", "2", "--logits-loss", "mse"], ["temperature: is that of logits loss kl, here it is mse"]),
        (["--temperature", "2", "--loss", "logits=0"], ["temperature: is of the loss logits, whose weight is 0"]),
    ],
)
def test_bad_distillation(run: Run, bench_folder: Path, arguments: list[str], words: list[str]) -> None:
    write(bench_folder / "empty.txt", "\n\n")
    write(bench_folder / "bad.jsonl", '{"text": "a"}\n{"text": ')
    write(bench_folder / "other.jsonl", '{"content": "a"}\n')
    given = {"--student": bench_folder / "student", "--teacher": bench_folder / "model", "--max-length": 32}
    rest = [part for flag, value in given.items() if flag not in arguments for part in (flag, value)]
    filled = [str(argument).format(bench_folder) for argument in arguments]
    refused(run("distill", *filled, *rest, "--output", "out"), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 300}, ["teacher and student have different vocabularies", "300 and 499"]),
        ({"num_attention_heads": 2}, ["teacher and student have different numbers of attention heads", "2 and 4"]),
        ({"num_hidden_layers": 1}, ["the student has more layers than its teacher", "2 and 1"]),
    ],
)
def test_teacher_that_does_not_fit(
    run: Run, bench_folder: Path, tmp_path: Path, changes: dict[str, int], words: list[str]
) -> None:
    tiny_model(**changes).save_pretrained(tmp_path / "teacher")
    shutil.copy(bench_folder / "model" / "vocab.txt", tmp_path / "teacher")
    result = run("distill", "--teacher", tmp_path / "teacher", "--student", bench_folder / "student", "--output", "out")
    refused(result, *words)


def test_another_family_is_refused() -> None:
    teacher = tiny_model("electra")
    student = compresskit.compress(tiny_model("electra"), method="low-rank", ratio=2)
    with pytest.raises(InputError, match="give equal classes"):
        compresskit.distill(student, tiny_model("bert"))
    with pytest.raises(InputError, match="is not compressed"):
        compresskit.distill(tiny_model("electra"), teacher)


@pytest.mark.parametrize(
    "change",
    [
        {"do_lower_case": False},
        {"strip_accents": False},
        {"tokenize_chinese_chars": False},
        {"truncation_side": "left"},
    ],
    ids=str,
)
def test_tokenizers_of_one_vocabulary_that_read_differently(
    change: dict[str, Any], bench_folder: Path, tmp_path: Path
) -> None:
    """One of them would read for both models, and the student's folder would keep the other."""
    student = shutil.copytree(bench_folder / "student", tmp_path / "student")
    BertTokenizer(vocab=str(student / "vocab.txt"), **change).save_pretrained(student)
    options: dict[str, Any] = {"max_length": 32, "max_steps": 1, "device": "cpu"}
    says = "have one vocabulary, but their tokenizers read texts differently"
    task = {"task": "sst2", "data": bench_folder / "data"}
    with pytest.raises(InputError, match=says):
        compresskit.distill(student, bench_folder / "teacher", **task, **options)
    with pytest.raises(InputError, match=says):
        compresskit.distill(student, bench_folder / "model", text=bench_folder / "text.txt", **options)
    given = BertTokenizer.from_pretrained(bench_folder / "model")
    assert compresskit.distill(student, bench_folder / "teacher", tokenizer=given, **task, **options).record["steps"]
    vectors = {"text": bench_folder / "text.txt", "unit": "line", **options}
    done = compresskit.distill(student, bench_folder / "model", **vectors)
    assert set(done.record["losses"]) == {"pooled", "similarity"}
    assert any("left out: the tokenizers of" in note and "read texts differently" in note for note in done.notes)


def test_a_student_of_another_family(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    student = compresskit.compress(tiny_model("electra"), method="low-rank", ratio=2)
    student.save_pretrained(tmp_path / "student")
    shutil.copy(bench_folder / "model" / "tokenizer.json", tmp_path / "student")
    models = ("--student", tmp_path / "student", "--teacher", bench_folder / "model")
    refused(run("distill", *models, "--max-length", "32", "--output", "out"), "different families", "bert and electra")


def test_labels_of_teacher_and_task_differ(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "own.yaml", OWN)
    for split in ("train", "dev"):
        write_tsv(tmp_path / f"{split}.tsv", "text\tkind", [("good", "happy"), ("bad", "sad")])
    models = ("--teacher", bench_folder / "teacher", "--student", bench_folder / "student")
    words = ("the model has negative, positive", "task own has happy, sad")
    refused(run("distill", *models, "--task", tmp_path / "own.yaml", "--data", tmp_path, "--max-length", "32",
                "--output", "out"), *words)  # fmt: skip
    refused(run("evaluate", "--model", bench_folder / "teacher", "--task", tmp_path / "own.yaml", "--data", tmp_path,
                "--max-length", "32"), *words)  # fmt: skip


def test_models_that_cannot_be_scored(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    task = ("--task", "sst2", "--data", bench_folder / "data", "--max-length", "32")
    refused(run("evaluate", "--model", bench_folder / "student", *task), "no head")
    for length in ("-5", "0", "7"):
        refused(run("evaluate", "--model", bench_folder / "teacher", *task[:-1], length), "max_length", "8")
    squad = tmp_path / "squad"
    transformers.AutoModelForQuestionAnswering.from_pretrained(bench_folder / "model").save_pretrained(squad)
    shutil.copy(bench_folder / "model" / "tokenizer.json", squad)
    refused(run("evaluate", "--model", squad, *task), "needs a model for sequence classification", "QuestionAnswering")
    write(tmp_path / "data" / "dev-v1.1.json", SQUAD)
    teacher = bench_folder / "teacher"
    arguments = ("--task", "squad", "--data", tmp_path / "data", "--max-length", "32")
    refused(run("evaluate", "--model", teacher, *arguments), "needs a model for question answering")
    write(
        tmp_path / "own.yaml",
        OWN.replace("label: kind", "label: kind\nkind: regression").replace("accuracy", "pearson"),
    )
    for split in ("train", "dev"):
        write_tsv(tmp_path / f"{split}.tsv", "text\tkind", [("good", "1.0"), ("bad", "2.0")])
    arguments = ("--task", tmp_path / "own.yaml", "--data", tmp_path, "--max-length", "32")
    refused(run("evaluate", "--model", teacher, *arguments), "one number", "has 2")
    models = ("--student", bench_folder / "student", "--teacher", teacher)
    refused(run("distill", *models, *arguments, "--output", "out"), "one number", "has 2")
    models = ("--student", bench_folder / "student", "--teacher", bench_folder / "model")
    refused(run("distill", *models, *task, "--output", "out"), "BertModel has no head", "fine-tuned")
    bare = tmp_path / "bare"
    tiny_model(head="classifier").save_pretrained(bare)
    refused(run("evaluate", "--model", bare, *task), "has no tokenizer")


def test_head_with_other_labels(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    three = tmp_path / "three"
    tiny_model(head="classifier", num_labels=3).save_pretrained(three)
    shutil.copy(bench_folder / "model" / "tokenizer.json", three)
    task = ("--task", "sst2", "--data", bench_folder / "data", "--max-length", "32", "--output", "out")
    refused(run("finetune", "--model", three, *task), "labels differ", "LABEL_2", "negative, positive")
    student = tmp_path / "student"
    compresskit.compress(three, method="low-rank", ratio=2).save_pretrained(student)
    models = ("--student", student, "--teacher", bench_folder / "teacher")
    refused(run("distill", *models, *task), "labels differ", "LABEL_2", "negative, positive")


def test_damaged_files(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    packed = gzip.compress(("good text " * 2000).encode())
    (tmp_path / "cut.txt.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "bent.txt.gz").write_bytes(packed[:20] + b"\xff\x00\xff" * 5 + packed[35:])
    models = ("--student", bench_folder / "student", "--teacher", bench_folder / "model", "--max-length", "32")
    for name in ("cut", "bent"):
        refused(run("distill", *models, "--text", tmp_path / f"{name}.txt.gz", "--output", "out"), f"{name}.txt.gz")
    write(tmp_path / "squad" / "train-v1.1.json", '{"data": [{"paragraphs": "none"}]}')
    arguments = ("--task", "squad", "--data", tmp_path / "squad", "--max-length", "32", "--output", "out")
    refused(run("finetune", "--model", bench_folder / "model", *arguments), "not in SQuAD's format")


def test_task_without_train_files(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "own.yaml", OWN.replace("train: train.tsv, ", ""))
    write_tsv(tmp_path / "dev.tsv", "text\tkind", [("good", "x"), ("bad", "y")])
    arguments = ("--task", tmp_path / "own.yaml", "--data", tmp_path, "--output", "out")
    refused(run("finetune", "--model", bench_folder / "model", *arguments), "names no train file")
    write(tmp_path / "own.yaml", OWN.replace("files: {train: train.tsv, dev: dev.tsv}", ""))
    refused(run("finetune", "--model", bench_folder / "model", *arguments), "names no train file")


def test_outputs_are_not_overwritten(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    task = ("--task", "sst2", "--data", bench_folder / "data", "--max-length", "32", "--max-steps", "2")
    made = tmp_path / "made"
    arguments = ("finetune", "--model", bench_folder / "model", *task, "--output", made)
    assert run(*arguments).code == 0
    stamp = (made / "model.safetensors").stat().st_mtime_ns
    refused(run(*arguments), "exists", "--overwrite")
    assert (made / "model.safetensors").stat().st_mtime_ns == stamp
    assert run(*arguments, "--overwrite").code == 0
    (made / "notes.txt").write_text("mine")
    refused(run(*arguments, "--overwrite"), "holds notes.txt")
    foreign = tmp_path / "other.checkpoints"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("mine")
    refused(run(*arguments[:-1], tmp_path / "other"), "is no working folder of compresskit")
    refused(run(*arguments[:-1], tmp_path / "other", "--overwrite"), "is no working folder of compresskit")
    assert (foreign / "mine.txt").read_text() == "mine"


def test_outputs_are_not_inputs(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    student, teacher = (shutil.copytree(bench_folder / name, tmp_path / name) for name in ("student", "teacher"))
    arguments = ("distill", "--student", student, "--teacher", teacher, "--max-length", "32", "--overwrite")
    for folder in (student, teacher):
        refused(run(*arguments, "--output", folder), "is also a model that is read")
    refused(run("distill", "--student", student, "--teacher", student, "--output", "out"), "the same model")
    refused(run(*arguments, "--resume", "--output", "out"), "not both")
    refused(run(*arguments[:-1], "--resume", "--output", bench_folder / "data"), "nothing to resume")


def test_label_that_train_lacks(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "own.yaml", OWN)
    write_tsv(tmp_path / "train.tsv", "text\tkind", [("good", "x"), ("bad", "y")])
    write_tsv(tmp_path / "dev.tsv", "text\tkind", [("good", "x"), ("bad", "purple")])
    arguments = ("--task", tmp_path / "own.yaml", "--data", tmp_path, "--output", "out")
    refused(run("finetune", "--model", bench_folder / "model", *arguments), "unknown label 'purple'", "known: x, y")


def test_hub_that_cannot_be_reached(run: Run, bench_folder: Path) -> None:
    model = ("--model", bench_folder / "model", "--max-length", "32")
    refused(run("finetune", *model, "--task", "sst2", "--output", "out"), "nyu-mll/glue", "--data")
    models = ("--student", bench_folder / "student", "--teacher", bench_folder / "model", "--max-length", "32")
    refused(run("distill", *models, "--text", "owner/name", "--output", "out"), "owner/name", "hub")


def test_python_settings_are_checked(bench_folder: Path) -> None:
    models = (bench_folder / "student", bench_folder / "teacher")
    with pytest.raises(InputError, match="unknown key 'learning_rat': the nearest valid one is 'learning_rate'"):
        compresskit.distill(*models, task="sst2", learning_rat=1e-3)
    with pytest.raises(InputError, match="device"):
        compresskit.distill(*models, task="sst2", device="tpu")


@pytest.mark.parametrize("task", ["sst2", "stsb-similarity"])
def test_a_model_that_computes_nan_has_no_score(task: str, bench_folder: Path, tmp_path: Path) -> None:
    """Its weights are finite, what they compute is not: argmax would call that the first class."""
    model = tiny_model("bert", "classifier", id2label={0: "negative", 1: "positive"})
    model.bert.encoder.layer[0].output.LayerNorm.weight.data.fill_(1e38)
    model.bert.encoder.layer[0].output.LayerNorm.bias.data.fill_(3e38)
    write_tsv(tmp_path / "dev.tsv", "sentence1\tsentence2\tscore", [("a b", "a", "1"), ("b", "c d e", "2")])
    data = bench_folder / "data" if task == "sst2" else tmp_path
    tokenizer = transformers.AutoTokenizer.from_pretrained(bench_folder / "model")
    with pytest.raises(WorkError, match=r"computes NaN|not finite"):
        compresskit.evaluate(model, task=task, data=data, tokenizer=tokenizer, max_length=32, device="cpu")
