"""``shrink``: its choices, the single commands that it stands for, stopping and continuing, what it refuses."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, refused, reviews, same, sentence_folder, tiny_model, write_tsv
from filelock import FileLock
from safetensors.torch import save_file
from transformers import AutoModel, TrainerCallback

import compresskit
from compresskit.errors import InputError
from compresskit.model import checkpoint
from compresskit.shrinking import job
from compresskit.shrinking.job import Job
from compresskit.shrinking.rows import doubted, found_rows
from compresskit.shrinking.run import carry_out
from compresskit.shrinking.steps import Step, Tools
from compresskit.tasks.loading import load_task
from compresskit.tasks.rows import Split, TaskData

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few rows of sst2."""
    root = tmp_path_factory.mktemp("data")
    for seed, (split, rows) in enumerate({"train": 80, "dev": 40}.items()):
        write_tsv(root / "SST-2" / f"{split}.tsv", "sentence\tlabel", reviews(rows, seed))
    return root


@pytest.fixture(autouse=True)
def no_more_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows take no more epochs here."""
    monkeypatch.setattr(job, "FEWEST", 10)
    monkeypatch.setattr(job, "ENOUGH", 1)


@pytest.fixture
def sst2(bench_folder: Path, data: Path) -> list[Any]:
    """Flags of a task whose teacher is there already."""
    return ["--model", bench_folder / "teacher", "--task", "sst2", "--data", data, "--ratio", 3]


def copy_tokenizer(folder: Path, model: Path) -> Path:
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "model" / file, model / file)
    return model


def commands(output: str) -> list[list[str]]:
    """The commands of a dry run, which a shell would run as they stand: all else is a comment."""
    return [words for line in output.splitlines() if (words := shlex.split(line, comments=True))]


def by_hand(run: Run, output: str) -> list[str]:
    """Type every command of a dry run; their names."""
    for program, *arguments in commands(output):
        assert program == "compresskit"
        result = run(*arguments)
        assert result.code == 0, result.err
    return [words[1] for words in commands(output)]


@pytest.mark.slow
def test_it_does_what_its_single_commands_do(run: Run, bench_folder: Path, data: Path) -> None:
    pytest.importorskip("onnxruntime")
    flags = ["--model", bench_folder / "model", "--task", "sst2", "--data", data, "--ratio", 3]
    flags += ["--seed", 1, "--threads", 1, "--precision", "bf16", "--export", "onnx-int8", "--runtime", "onnxruntime"]
    small = "it's small"  # commands are printed as a shell reads them
    planned = run("shrink", *flags, "--output", "hand", "--dry-run")
    assert planned.code == 0, planned.err
    assert list(Path.cwd().iterdir()) == []
    assert by_hand(run, planned.out) == ["finetune", "compress", "distill", "export"]
    done = run("shrink", *flags, "--output", small)
    assert done.code == 0, done.err
    assert same(Path("hand.shrink/teacher"), Path(f"{small}.shrink/teacher"))
    assert same(Path("hand.shrink/cut"), Path(f"{small}.shrink/cut"))
    assert same(Path("hand"), Path(small))
    assert Path("hand-onnx-int8/model.onnx").read_bytes() == Path(f"{small}-onnx-int8/model.onnx").read_bytes()
    assert compresskit.verify(small) == []

    record = json.loads(Path(f"{small}.shrink/shrink.json").read_text())
    assert [shlex.split(command) for command in record["commands"]] == [
        [word.replace("hand", small) for word in words if word not in ("--threads",)][: len(words) - 2]
        for words in commands(planned.out)
    ]
    teacher, student, exported = record["rows"]
    scores = json.loads((Path(small) / "training.json").read_text())["stages"][-1]["scores"]
    assert student["score"] == scores["student_after"]["dev"]["accuracy"]
    assert student["kept"] == student["score"] / teacher["score"]
    assert teacher["parameters"] / student["parameters"] >= 3
    assert teacher["megabytes"] > student["megabytes"] > exported["megabytes"]
    assert exported["score"] == pytest.approx(student["score"], abs=0.05)
    assert teacher["speedup"] == 1
    assert student["milliseconds"] > 0 < exported["milliseconds"]
    assert record["scored"] == {"dev": 40}
    assert "accuracy: on 40 rows of dev" in " ".join(done.out.split())
    for words in ("teacher", "student", "onnx-int8", "kept", f"{student['parameters']:,}", "Next: compresskit predict"):
        assert words in done.out
    again = next(line for line in done.out.splitlines() if line.startswith("Other sizes of the same teacher: "))
    assert shlex.split(again.partition(": ")[2])[:4] == ["compresskit", "shrink", "--model", f"{small}.shrink/teacher"]
    for choice in record["choices"]:
        assert choice in done.out
        assert choice in planned.out
    refused_here(run("shrink", *flags, "--output", small), f"output {small}: exists")
    refused_here(run("shrink", *flags, "--output", small, "--resume"), "finished: nothing to resume")


def refused_here(result: Any, *words: str) -> None:
    """As ``refused``, in a folder that holds something."""
    assert result.code == 2, result
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err


def test_a_model_with_the_head_is_the_teacher_as_it_is(run: Run, sst2: list[Any]) -> None:
    result = run("shrink", *sst2, "--output", "small", "--dry-run", "--method", "low-rank")
    assert result.code == 0, result.err
    cut, lesson = commands(result.out)
    teacher = str(sst2[1])
    assert cut[:4] == ["compresskit", "compress", "--model", teacher]
    assert lesson[:4] == ["compresskit", "distill", "--teacher", teacher]
    assert "as it is" in result.out
    assert "low-rank: as asked" in result.out
    # The task's own length is more than the model takes.
    assert lesson[lesson.index("--max-length") + 1] == "40"


def test_how_classes_without_names_are_taken_is_said_at_once(
    run: Run, bench_folder: Path, sst2: list[Any], tmp_path: Path
) -> None:
    tiny_model(head="classifier").save_pretrained(tmp_path / "unnamed")
    model = copy_tokenizer(bench_folder, tmp_path / "unnamed")
    result = run("shrink", "--model", model, *sst2[2:], "--output", "small", "--dry-run")
    says = "the model does not name its labels; taken as negative, positive, in this order"
    assert f"# note: {says}" in result.out
    done = compresskit.shrink(model, task="sst2", data=sst2[5], ratio=3, method="low-rank", epochs=0.1, output="small")
    assert sum(says in note for note in done.notes) == 1  # and once more when all is done


def test_what_was_found_in_the_data_is_said_first(run: Run, bench_folder: Path, sst2: list[Any]) -> None:
    result = run("shrink", *sst2, "--output", "small", "--dry-run")
    assert result.out.startswith("# data: train 80 rows (")
    assert re.match(
        r"# data: train 80 rows \((negative|positive) \d+, (negative|positive) \d+\), dev 40 rows \(", result.out
    )
    Path("own.yaml").write_text(
        "version: 1\nname: own\ninputs: [text]\nlabel: kind\nfiles: {train: train.csv}\nmetrics: [accuracy]\n"
    )
    Path("train.csv").write_text("text,kind\n,k0\n" + "".join(f"film {i},k{i % 9}\n" for i in range(40)))
    model = ["--model", bench_folder / "model", "--task", "own.yaml", "--data", ".", "--ratio", 3]
    said = run("shrink", *model, "--output", "small", "--dry-run").out
    assert re.search(
        r"# data: train 37 rows \(k\d \d, .*, and 3 more; 1 text is empty; without 4 held-out rows\)", said
    )
    assert "4 rows of train held out, seed 0)" in said


def test_numbers_and_tags_are_found_too() -> None:
    def found(targets: list[Any]) -> str:
        split = Split([("a",)] * len(targets), targets, "a.csv")
        return found_rows(TaskData(load_task("sst2"), {"dev": split}, ()))

    assert found([0.5, 5.0]) == "dev 2 rows (from 0.5 to 5)"
    assert found([["O", "B-x"], ["O"]]) == "dev 2 rows (O 2, B-x 1)"
    assert found([["joy"], []]) == "dev 2 rows (joy 1)"
    assert found([None] * 1000) == "dev 1,000 rows"


def test_a_teacher_at_chance_is_doubted_before_it_teaches(
    run: Run, bench_folder: Path, sst2: list[Any], data: Path
) -> None:
    """Its classes may be paired with the wrong labels."""
    text = "version: 1\nname: own\ninputs: [sentence]\nlabel: label\nmetrics: [accuracy]\n"
    files = "files: {train: SST-2/train.tsv, dev: SST-2/dev.tsv}\n"
    Path("right.yaml").write_text(text + files + "labels: {negative: '0', positive: '1'}\n")
    Path("wrong.yaml").write_text(text + files + "labels: {negative: '1', positive: '0'}\n")
    flags = ["--model", sst2[1], "--data", data, "--ratio", 3, "--output", "small", "--dry-run"]
    right, wrong = (run("shrink", *flags, "--task", f"{name}.yaml") for name in ("right", "wrong"))
    assert right.code == wrong.code == 0
    assert "paired with the right labels" not in right.out
    assert re.search(
        r"# note: the teacher's accuracy is \d+\.\d % on 40 rows of dev, where '(negative|positive)' for every row has "
        r"\d+\.\d %: are its classes paired with the right labels",
        wrong.out,
    )


@pytest.mark.parametrize("order", ["sorted", "in turns", "one class"])
def test_a_good_teacher_is_not_doubted_for_the_order_of_the_rows(bench_folder: Path, order: str) -> None:
    """Of 398 rows the first 200 were tried, of 400 every second one; one error among them was no better than chance."""
    found = {label: [text for text, own in reviews(900, seed=5) if own == label][:200] for label in "01"}
    rows = {label: [(text,) for text in texts] for label, texts in found.items()}
    rows["0"][7], rows["1"][7] = rows["1"][7], rows["0"][7]  # labelled wrongly
    both = {"0": "negative", "1": "positive"}
    texts = rows["0"][:199] + rows["1"][:199]
    labels = ["negative"] * 199 + ["positive"] * 199
    if order == "in turns":
        texts, labels = [row for pair in zip(*rows.values(), strict=True) for row in pair], [*both.values()] * 200
    elif order == "one class":
        texts, labels = rows["0"], ["negative"] * 200
    dev = Split(texts, labels, "dev.tsv")
    data = TaskData(load_task("sst2"), {"dev": dev}, ("negative", "positive"))
    assert doubted(checkpoint.read(bench_folder / "teacher"), data, 32) is None
    wrong = Split(texts, [next(name for name in both.values() if name != label) for label in labels], "dev.tsv")
    note = doubted(checkpoint.read(bench_folder / "teacher"), replace(data, splits={"dev": wrong}), 32)
    assert "paired with the right labels" in (note or "")


def test_a_task_without_its_ending_is_found(run: Run, sst2: list[Any]) -> None:
    Path("mine.yaml").write_text("version: 1\n")
    words = "unknown task 'mine': did you mean the file mine.yaml?"
    refused_here(run("shrink", *sst2[:3], "mine", *sst2[4:], "--output", "small"), words)


def test_the_number_of_rows_decides_the_epochs(bench_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Job(output=Path("small"), model=bench_folder / "model", task="sst2", data=data, ratio=3)

    def epochs() -> list[Any]:
        return [step.settings.get("epochs") for step in asked.schedule().steps]

    assert epochs() == [5, None, 4]
    monkeypatch.setattr(job, "FEWEST", 200)  # 2.5 times as many
    assert epochs() == [13, None, 10]
    monkeypatch.setattr(job, "FEWEST", 2_490)
    assert epochs() == [30, None, 24]
    monkeypatch.setattr(job, "FEWEST", 10)
    monkeypatch.setattr(job, "MANY", 80)
    assert epochs() == [3, None, 1]


def test_epochs_of_the_student_may_be_given(run: Run, bench_folder: Path, sst2: list[Any]) -> None:
    """A teacher that is made keeps its own."""
    flags = ["--model", bench_folder / "model", *sst2[2:], "--epochs", 2, "--output", "small"]
    planned = run("shrink", *flags, "--dry-run")
    assert planned.code == 0, planned.err
    found = [words[words.index("--epochs") + 1] for words in commands(planned.out) if "--epochs" in words]
    assert found == ["5", "2"]
    assert "# epochs of the student: 2: as asked" in planned.out
    refused(run("shrink", *flags, "--epochs", 0), "settings: epochs", "greater than 0")
    text = ["--model", bench_folder / "model", "--text", bench_folder / "text.txt", "--ratio", 3, "--output", "small"]
    said = run("shrink", *text, "--epochs", 3, "--dry-run")
    assert said.code == 0, said.err
    assert "# epochs: 3, as asked" in said.out
    assert "--epochs 3" in said.out


def test_choices_point_to_sections_that_are_there(bench_folder: Path, sst2: list[Any], run: Run) -> None:
    text = ["--model", bench_folder / "model", "--text", bench_folder / "text.txt", "--ratio", 3]
    trimmed = ["--trim-text", bench_folder / "text.txt", "--trim-keep", 60]
    lines = [run("shrink", *flags, "--output", "small", "--dry-run").out for flags in (sst2 + trimmed, text + trimmed)]
    links = re.findall(r"(docs/\w+\.md)#([\w-]+)", "".join(lines))
    assert len(links) > 8
    for page, anchor in links:
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_a_teacher_that_scores_nothing_is_doubted(bench_folder: Path, tmp_path: Path) -> None:
    """What is kept of 0 is not known, so that it was not compared with its student."""
    for seed, split in enumerate(("train", "dev")):
        write_tsv(tmp_path / f"{split}.tsv", "text\tlabel", reviews(20, seed))
    files = "files: {train: train.tsv, dev: dev.tsv}"
    (tmp_path / "own.yaml").write_text(
        f"version: 1\nname: own\ninputs: [text]\nlabel: label\n{files}\nmetrics: [matthews]\n"
    )
    done = compresskit.shrink(
        bench_folder / "model", task=tmp_path / "own.yaml", data=tmp_path, output=tmp_path / "small", ratio=3
    )
    assert done.record["rows"][0]["score"] == 0  # one class for all rows
    assert any(note.startswith("the teacher scores 0 or below: it has learnt too little") for note in done.notes)


def test_short_texts_are_read_more_often(bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A sentence of thirty letters.\n\n" * 10)  # the blank lines do not count
    asked = Job(output=Path("small"), model=bench_folder / "model", text=text, ratio=3)
    for enough, expected in ((290, (None, None)), (291, (2, 16)), (870, (3, 16)), (9999, (10, 16))):
        monkeypatch.setattr(job, "ENOUGH", enough)
        schedule = asked.schedule()
        settings = schedule.steps[1].settings
        assert (settings.get("epochs"), settings.get("batch_size")) == expected
        assert any(choice.startswith(f"epochs: {expected[0] or 1}") for choice in schedule.choices)


#: What is said of a training after which the score is lower.
WORSE = "training made the model worse,"


@pytest.mark.slow
def test_sentence_vectors(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    teacher = sentence_folder(bench_folder / "model", tmp_path / "teacher", behind=("Dense",))
    layer = torch.nn.Linear(48, 8)
    save_file({f"linear.{n}": p.detach() for n, p in layer.named_parameters()}, teacher / "2_Dense/model.safetensors")
    (teacher / "2_Dense/config.json").write_text(json.dumps({"in_features": 48, "out_features": 8}))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{review.capitalize()}." for review, _ in reviews(300, seed=4)), encoding="utf-8")
    flags = ["--model", teacher, "--text", text, "--size", "80kB"]
    planned = run("shrink", *flags, "--output", "hand", "--dry-run")
    assert "method: low-rank: keeps more than auto" in planned.out
    assert by_hand(run, planned.out) == ["compress", "distill"]
    done = run("shrink", *flags, "--output", "small")
    assert done.code == 0, done.err
    assert same(Path("hand"), Path("small"))
    assert Path("small/modules.json").is_file()
    assert Path("small/model.safetensors").stat().st_size <= 80_000
    teacher_row, student = json.loads(Path("small.shrink/shrink.json").read_text())["rows"]
    assert teacher_row["score"] == pytest.approx(1)
    assert 0 < student["score"] < 1
    for row, folder in ((teacher_row, teacher), (student, Path("small"))):  # layers behind the encoder count too
        files = [folder / "model.safetensors", folder / "2_Dense/model.safetensors"]
        assert row["megabytes"] == sum(file.stat().st_size for file in files) / 1e6
        assert row["parameters"] == AutoModel.from_pretrained(folder).num_parameters() + 48 * 8 + 8
    assert "similarity, %" in done.out
    assert "Next: compresskit predict --model small --text TEXT --among FILE_OR_FOLDER" in done.out
    # A run that was stopped behind its training says what came of that.
    stages = json.loads(Path("small/training.json").read_text())
    before = stages["stages"][-1]["scores"]["student_before"]["held_out"]
    assert (WORSE in done.out) == (student["score"] < before["similarity"])
    before["similarity"] = 0.9999
    Path("small/training.json").write_text(json.dumps(stages))
    Path("small.shrink/shrink.json").unlink()
    shutil.copytree("small.shrink", "small.checkpoints")  # it was stopped before it removed these
    said = run("shrink", *flags, "--output", "small", "--resume").out
    assert not Path("small.checkpoints").exists()
    assert f"Note: {WORSE} similarity fell from 99.99 to {100 * student['score']:.2f} %" in said
    trimmed = run("shrink", *flags, "--trim-text", text, "--trim-keep", 60, "--output", "trimmed")
    assert trimmed.code == 0, trimmed.err
    assert "word by word, as vocabularies differ" in trimmed.out
    assert {"hidden", "pooled"} <= set(json.loads(Path("trimmed/training.json").read_text())["stages"][-1]["losses"])


@pytest.mark.slow
def test_a_trimmed_vocabulary(run: Run, bench_folder: Path, sst2: list[Any]) -> None:
    flags = [*sst2, "--method", "low-rank", "--threads", 1, "--trim-text", bench_folder / "text.txt"]
    planned = run("shrink", *flags, "--trim-keep", 60, "--output", "hand", "--dry-run")
    assert planned.code == 0, planned.err
    assert "# vocabulary: 499 to 60 rows, chosen by text.txt: 1." in planned.out
    assert "x of 3x is left to factors" in planned.out
    assert "word by word, without attention" in planned.out
    assert by_hand(run, planned.out) == ["compress", "distill"]
    done = run("shrink", *flags, "--trim-keep", 60, "--output", "small")
    assert done.code == 0, done.err
    assert same(Path("hand"), Path("small"))
    record = json.loads(Path("small/compression.json").read_text())
    teacher, student = json.loads(Path("small.shrink/shrink.json").read_text())["rows"]
    assert record["parameters"]["before"] == teacher["parameters"] == record["trimmed"]["parameters"]["before"]
    assert teacher["parameters"] / student["parameters"] == record["ratio"] >= 3
    left = record["trimmed"]["parameters"]["after"]
    for factor in (teacher["parameters"] / left, left / student["parameters"]):
        assert f"{factor:.2f}x" in done.out
    scores = json.loads(Path("small/training.json").read_text())["stages"][-1]["scores"]
    assert student["score"] == scores["student_after"]["dev"]["accuracy"]
    refused_here(run("shrink", *flags, "--output", "small", "--resume"), "finished")


def test_a_trimmed_vocabulary_is_part_of_what_is_resumed(run: Run, bench_folder: Path, sst2: list[Any]) -> None:
    text = bench_folder / "text.txt"
    asked = {"model": sst2[1], "task": "sst2", "data": sst2[5], "ratio": 3.0, "method": "low-rank", "trim_text": text}
    with pytest.raises(KeyboardInterrupt):
        carry_out(Job(output=Path("small"), trim_keep=60, **asked).schedule(), watch=_interrupted)
    with pytest.raises(InputError, match=r"another trim_keep \(60; now 70\)"):
        carry_out(Job(output=Path("small"), trim_keep=70, **asked).schedule(), resume=True)


def test_an_export_of_the_model_before_goes_with_it(bench_folder: Path, sst2: list[Any], run: Run) -> None:
    """Also where the new run asks for none: beside the new model it would pass for that one's."""
    asked = {"model": sst2[1], "task": "sst2", "data": sst2[5], "ratio": 3.0, "method": "low-rank"}
    assert run("compress", "--model", sst2[1], "--method", "low-rank", "--ratio", 2, "--output", "small").code == 0
    compresskit.export("small", output="small-dense", format="dense")
    copy_tokenizer(bench_folder, Path("small-dense"))
    Path("small-dense/theirs.txt").touch()
    refused_here(run("shrink", *sst2, "--output", "small", "--overwrite"), "holds theirs.txt")
    Path("small-dense/theirs.txt").unlink()
    with pytest.raises(InputError, match="small-dense holds the model that is read"):
        Job(output=Path("small"), **{**asked, "model": "small-dense"})
    shutil.copytree(bench_folder / "model", "small-onnx")  # of something else
    with pytest.raises(KeyboardInterrupt):
        carry_out(Job(output=Path("small"), **asked).schedule(), watch=_interrupted, overwrite=True)
    assert not Path("small-dense").exists()
    assert Path("small-onnx").is_dir()


@contextmanager
def _interrupted(step: Step | None) -> Iterator[Tools]:
    raise KeyboardInterrupt
    yield Tools()


class _Stop(TrainerCallback):
    """An interrupt in the middle of a training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 20:
            raise KeyboardInterrupt


@pytest.mark.sweep
def test_a_stopped_run_continues_to_the_same_weights(run: Run, sst2: list[Any], data: Path) -> None:
    asked = {"model": sst2[1], "task": "sst2", "data": data, "ratio": 3.0, "method": "low-rank"}
    flags = [*sst2, "--method", "low-rank", "--output", "small"]
    schedule = Job(output=Path("small"), **asked).schedule()

    @contextmanager
    def watch(step: Step | None) -> Iterator[Tools]:
        yield Tools(callbacks=[_Stop()])

    with pytest.raises(KeyboardInterrupt):
        carry_out(schedule, watch=watch)
    assert Path("small.shrink/cut").is_dir()
    assert Path("small.checkpoints").is_dir()
    refused_here(run("shrink", *flags), "small.checkpoints: holds an unfinished run")
    refused_here(run("shrink", *flags, "--seed", 7, "--resume"), "another seed (0; now 7)")
    refused_here(run("shrink", *flags, "--overwrite", "--resume"), "not both")
    cut = Path("small.shrink/cut/model.safetensors").stat().st_mtime_ns
    assert run("shrink", *flags, "--resume").code == 0
    assert Path("small.shrink/cut/model.safetensors").stat().st_mtime_ns == cut
    whole = compresskit.shrink(output="whole", **asked)
    assert same(Path("small"), whole.folder)
    assert [row["name"] for row in whole.record["rows"]] == ["teacher", "student"]

    assert run("shrink", *flags[:-4], "--method", "kronecker", "--output", "small", "--overwrite").code == 0
    assert not same(Path("small"), whole.folder)
    shutil.rmtree("small")  # what is missing of a finished run is made again
    refused_here(run("shrink", *flags), "small.shrink: is there from an earlier run")
    assert run("shrink", *flags[:-4], "--method", "kronecker", "--output", "small", "--resume").code == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--task": None, "--data": None}, ["give a task", "or a text"]),
        ({"--text": "text.txt", "--data": None}, ["not both"]),
        ({"--text": "text.txt", "--task": None}, ["data belongs to a task"]),
        ({"--task": "stsb-similarity"}, ["evaluation only"]),
        ({"--task": "sst3"}, ["unknown task 'sst3'", "sst2"]),
        ({"--ratio": None}, ["needs a ratio or a size"]),
        ({"--ratio": 1}, ["above 1"]),
        ({"--size": "1MB"}, ["not both"]),
        ({"--ratio": 4000}, ["ratio 4000 is out of reach", "at most"]),
        ({"--ratio": None, "--size": "6kB"}, ["size 0.006 MB: too small", "at least"]),
        ({"--ratio": None, "--size": "1GB"}, ["not below the dense model's"]),
        ({"--method": "low-rnak"}, ["did you mean 'low-rank'"]),
        ({"--export": "onnx-int9"}, ["unknown format 'onnx-int9'", "onnx-int8"]),
        ({"--export": "onnx", "--runtime": "tflite"}, ["unknown runtime 'tflite'", "onnxruntime"]),
        ({"--export": "dense", "--runtime": "onnxruntime"}, ["a runtime is that of an ONNX export"]),
        ({"--output": None}, ["--output"]),
        ({"--trim-keep": 60}, ["give --trim-text"]),
        ({"--trim-text": "missing.txt"}, ["text missing.txt: no such file"]),
        ({"--trim-text": "TEXT", "--trim-keep": 60, "--trim-coverage": 0.9}, ["not both"]),
        ({"--trim-text": "TEXT", "--trim-keep": 600}, ["keep 600", "there are only 499"]),
        ({"--trim-text": "TEXT", "--trim-keep": 60, "--ratio": 1.2}, ["trimming alone makes the model"]),
        ({"--trim-text": "TEXT", "--trim-keep": 60, "--ratio": 4000}, ["ratio 4000 is out of reach"]),
        ({"--resume": ""}, ["small.shrink: is not there, so there is nothing to resume"]),
    ],
)
def test_bad_input(run: Run, bench_folder: Path, data: Path, change: dict[str, Any], words: list[str]) -> None:
    """Refused before a teacher is trained: nothing is written."""
    flags = {"--model": bench_folder / "model", "--task": "sst2", "--data": data, "--ratio": 3}
    flags |= {"--output": "small", **change}
    flags = {flag: bench_folder / "text.txt" if value == "TEXT" else value for flag, value in flags.items()}
    given = [word for flag, value in flags.items() if value is not None for word in (flag, value) if word != ""]
    refused(run("shrink", *given), *words)


def test_heads_that_do_not_fit(run: Run, bench_folder: Path, sst2: list[Any], tmp_path: Path) -> None:
    for head, words in (("tokens", "has another head"), ("questions", "has another head")):
        tiny_model(head=head).save_pretrained(tmp_path / head)
        model = copy_tokenizer(bench_folder, tmp_path / head)
        refused(run("shrink", "--model", model, *sst2[2:], "--output", "small"), "task sst2 needs", words)
    three = tmp_path / "three"
    tiny_model(head="classifier", id2label={0: "bad", 1: "fair", 2: "good"}).save_pretrained(three)
    copy_tokenizer(bench_folder, three)
    refused(run("shrink", "--model", three, *sst2[2:], "--output", "small"), "bad, fair, good", "--new-head")
    student = bench_folder / "student"
    refused(run("shrink", "--model", student, *sst2[2:], "--output", "small"), "is compressed already")
    unseen = shutil.copytree(bench_folder / "teacher", tmp_path / "unseen")
    config = json.loads((unseen / "config.json").read_text())
    (unseen / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    refused(run("shrink", "--model", unseen, *sst2[2:], "--output", "small"), "announces no such head", "architectures")


def test_what_a_step_refuses_leaves_nothing(run: Run, bench_folder: Path, sst2: list[Any], tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "mute")
    refused(run("shrink", "--model", tmp_path / "mute", *sst2[2:], "--output", "small"), "tokenizer")


def test_what_stands_in_the_way(run: Run, sst2: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("small-onnx").mkdir()
    refused_here(run("shrink", *sst2, "--output", "small", "--export", "onnx"), "output small-onnx: exists")
    Path("small.shrink").mkdir()
    for flag in ("--overwrite", "--resume"):
        refused_here(run("shrink", *sst2, "--output", "small", flag), "small.shrink: exists and is no working folder")
    refused_here(run("shrink", *sst2, "--output", sst2[1]), "is also the model that is read")
    Path("busy.checkpoints").mkdir()
    Path("busy.checkpoints/settings.json").write_text("{}")
    with FileLock("busy.checkpoints/.lock"):
        refused_here(run("shrink", *sst2, "--output", "busy", "--overwrite"), "another process works on this run")
    assert Path("busy.checkpoints/settings.json").is_file()
    teacher = shutil.copytree(sst2[1], "other.shrink/teacher")
    again = run("shrink", "--model", teacher, *sst2[2:], "--output", "other", "--overwrite")
    refused_here(again, "other.shrink holds the model that is read")
    assert Path(teacher).is_dir()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        compresskit.shrink(sst2[1], task="sst2", data=sst2[5], ratio=3, output="other")
