"""Students that learn sentence vectors: losses, units of text, the teacher's vectors on disk, whole runs."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, same, sentence_folder, tiny_model, weights
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

import compresskit
from compresskit.data.corpus import find_corpus
from compresskit.data.units import read_units
from compresskit.errors import InputError, WorkError
from compresskit.training.sentences import agreement
from compresskit.training.vectors import keep_vectors

PROMPT = {"prompts": {"q": "the of and "}, "default_prompt_name": "q"}
VECTORS_ALONE = {"hidden": 0, "embedding": 0}
SETTINGS: dict[str, Any] = {"unit": "line", "fields": ["sentence"], "device": "cpu", "learning_rate": 5e-3}


def texts(folder: Path) -> Path:
    return folder / "data" / "SST-2" / "train.tsv"


@pytest.fixture(scope="module")
def pair(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sentence-transformers folder and a student of it."""
    root = tmp_path_factory.mktemp("sentences")
    teacher = sentence_folder(bench_folder / "model", root / "teacher", behind=("Normalize",))
    student = shutil.copytree(teacher, root / "student")
    compresskit.compress(teacher, method="low-rank", ratio=3).save_pretrained(student)
    return student, teacher


# -- losses -----------------------------------------------------------------------------------------------------------


def test_what_has_no_correlation_is_scored_as_none() -> None:
    """One pair of texts, or pairs that are all alike, as for other tasks; a score that is no number is no JSON."""
    pair = torch.eye(2)
    assert agreement(pair, pair) == {"similarity": 0, "cosine": 1}
    assert agreement(torch.ones(5, 2), torch.rand(5, 3)) == {"similarity": 0}


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 4, "accumulation": 4}])
def test_micro_batches_of_one_sentence(settings: dict[str, int], pair: tuple[Path, Path], bench_folder: Path) -> None:
    """The loss would be 0 at every step, and nobody would see that nothing is learned by it."""
    asked = {**SETTINGS, **settings, "text": texts(bench_folder), "max_steps": 1}
    with pytest.raises(InputError, match=r"loss similarity: compares the sentences of .* each holds one"):
        compresskit.distill(*pair, **asked)
    compresskit.distill(*pair, **asked, losses={"similarity": 0})


# -- units ------------------------------------------------------------------------------------------------------------


def test_units_of_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("Dr. Smith came. He left at 5 p.m. It rained.\nIt rained.\n\nOne more!  Two\nlines?\n")
    found = {unit: sorted(read_units([find_corpus(file)], [unit]).texts) for unit in ("sentence", "line")}
    assert "Dr. Smith came." in found["sentence"]
    assert "It rained." in found["line"]
    assert len(found["line"]) == 4
    passages = read_units([find_corpus(file)], ["passage"]).texts
    assert passages
    assert all(text.count(" ") > 2 for text in passages)


def test_texts_are_unique_and_their_order_follows_the_seed(tmp_path: Path) -> None:
    file, table = tmp_path / "a.txt", tmp_path / "b.csv"
    file.write_text("\n".join(f"line {i % 30}" for i in range(60)))
    table.write_text('first,second\n"line 1, quoted",line 2\nx,y\n')
    corpora = [find_corpus(file), find_corpus(table, ["first", "second", "third"])]
    units = read_units(corpora, ["line"], seed=1)
    assert sorted(units.texts) == sorted({*(f"line {i}" for i in range(30)), "line 1, quoted", "x", "y"})
    assert units.duplicates == 31
    assert read_units(corpora, ["line"], seed=1).texts == units.texts != read_units(corpora, ["line"], seed=2).texts
    assert read_units(corpora, ["line"], seed=1, limit=7).texts == units.texts[:7]


# -- the teacher's vectors --------------------------------------------------------------------------------------------


def encoder(calls: list[int]) -> Any:
    def encode(given: Sequence[str]) -> Tensor:
        calls.append(len(given))
        return torch.tensor([[float(text), 1.0] for text in given])

    return encode


def test_vectors_are_computed_once_and_a_stopped_pass_goes_on(tmp_path: Path) -> None:
    numbers, calls = [str(i) for i in range(5000)], []

    def dies(what: str, done: int, total: int) -> None:
        if done > 4000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_vectors(encoder(calls), numbers, tmp_path, ["a"], dies)
    assert sum(calls) == 4097
    found = keep_vectors(encoder(calls), numbers, tmp_path, ["a"])
    assert sum(calls) == 5001
    assert torch.equal(found[:, 0], torch.arange(5000.0))
    keep_vectors(encoder(calls), numbers, tmp_path, ["a"])
    assert sum(calls) == 5001
    keep_vectors(encoder(calls), numbers, tmp_path, ["another teacher"])
    keep_vectors(encoder(calls), numbers[::-1], tmp_path, ["a"])
    assert sum(calls) == 3 * 5001


@pytest.mark.parametrize("size", [None, 0, 8])
def test_vectors_that_are_gone_are_computed_again(tmp_path: Path, size: int | None) -> None:
    """Mapping a file that lacks rows makes them of zeros, which would be trained on."""
    keep_vectors(encoder([]), ["1", "2"], tmp_path, [])
    (file,) = tmp_path.rglob("vectors.float32")
    if size is None:
        file.unlink()
    else:
        os.truncate(file, size)
    assert keep_vectors(encoder([]), ["1", "2"], tmp_path, []).tolist() == [[1.0, 1.0], [2.0, 1.0]]


def test_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(WorkError, match="no room for 1 MB for the teacher's vectors: No space left on device"):
            keep_vectors(encoder([]), ["1", "2"], tmp_path, [])
    assert keep_vectors(encoder([]), ["1", "2"], tmp_path, []).shape == (2, 2)


# -- runs -------------------------------------------------------------------------------------------------------------


def test_student_comes_near_its_teacher(bench_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = pair
    result = compresskit.distill(
        student, teacher, text=texts(bench_folder), epochs=6, output=tmp_path / "small", **SETTINGS
    )
    scores = {who: values["held_out"] for who, values in result.record["scores"].items()}
    assert scores["teacher"]["similarity"] == pytest.approx(1)
    assert scores["student_after"]["similarity"] > max(0.8, scores["student_before"]["similarity"] + 0.05)
    assert scores["student_after"]["cosine"] > scores["student_before"]["cosine"]
    assert result.record["kept"] == pytest.approx(scores["student_after"]["similarity"], rel=1e-5)
    assert set(result.record["losses"]) == {"embedding", "hidden", "pooled", "similarity"}
    assert (tmp_path / "small" / "modules.json").read_text() == (teacher / "modules.json").read_text()
    assert not list(tmp_path.glob("*.checkpoints"))
    again = AutoModel.from_pretrained(tmp_path / "small")
    assert weights(tmp_path / "small").keys() == weights(student).keys()
    assert type(again).__name__ == "BertModel"


def test_training_that_makes_vectors_worse_says_so(bench_folder: Path, pair: tuple[Path, Path], run: Run) -> None:
    arguments = ["distill", "--student", pair[0], "--teacher", pair[1], "--text", bench_folder / "text.txt"]
    arguments += ["--unit", "line", "--device", "cpu", "--max-steps", 4, "--learning-rate", 0.5, "--output", "out"]
    result = run(*arguments)
    assert result.code == 0, result.err
    record = json.loads(Path("out/training.json").read_text())["stages"][-1]
    before, after = (record["scores"][who]["held_out"]["similarity"] for who in ("student_before", "student_after"))
    assert after < before
    note = f"training made the model worse, similarity fell from {100 * before:.2f} to {100 * after:.2f} %"
    assert record["notes"][-1].startswith(f"{note}: try a lower learning rate")
    assert f"Note: {note}" in " ".join(result.out.split())


def test_prompt_and_length_of_the_folder_are_followed(bench_folder: Path, tmp_path: Path) -> None:
    """Both decide which tokens are trained on."""
    short = sentence_folder(bench_folder / "model", tmp_path / "short", encoder={"max_seq_length": 8}, general=PROMPT)
    student = compresskit.compress(tiny_model(), method="low-rank", ratio=3)
    tokenizer = AutoTokenizer.from_pretrained(short)
    lesson = {"text": texts(bench_folder), "max_steps": 1, "max_length": 16, **SETTINGS}
    result = compresskit.distill(student, short, tokenizer=tokenizer, **lesson)
    assert result.record["max_length"] == 8
    assert any("reach 8 tokens" in note for note in result.notes)
    assert "max length 16: the teacher reads 8, as its folder says" in result.notes


def test_students_share_the_vectors_of_a_teacher(bench_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    student, teacher = pair
    options = {"text": texts(bench_folder), "max_steps": 3, "teacher_outputs": tmp_path / "kept", **SETTINGS}
    options["losses"] = VECTORS_ALONE
    compresskit.distill(student, teacher, output=tmp_path / "a", **options)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.float32")}
    assert len(kept) == 1
    compresskit.distill(student, teacher, output=tmp_path / "b", **options)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "kept").rglob("*.float32")} == kept
    assert same(tmp_path / "a", tmp_path / "b")


def test_accumulated_batches_are_one_for_the_pooled_loss(bench_folder: Path, pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    runs = [
        compresskit.distill(
            student,
            teacher,
            text=texts(bench_folder),
            max_steps=3,
            losses={"similarity": 0},
            accumulation=parts,
            **SETTINGS,
        )
        for parts in (1, 4)
    ]
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.allclose(first[name], second[name], atol=2e-5) for name in first)
    assert not any("parts of a batch" in note for run in runs for note in run.notes)


def test_what_the_similarity_loss_compares_in_parts_is_told(bench_folder: Path, pair: tuple[Path, Path]) -> None:
    student, teacher = pair
    settings = SETTINGS | {"text": texts(bench_folder), "max_steps": 1, "batch_size": 8}
    says = "loss similarity compares the 4 sentences of each of 2 parts of a batch with each other, not all 8"
    for parts in (1, 2):
        notes = compresskit.distill(student, teacher, accumulation=parts, **settings).notes
        assert (says in notes) is (parts == 2)


def test_losses_inside_go_with_vectors(bench_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The teacher then computes at every step, and its vectors are those that it would have kept; or all is kept."""
    student, teacher = pair
    inside: dict[str, float] = {"hidden": 1e-6, "embedding": 1e-6}
    kept = tmp_path / "kept"
    runs = [
        compresskit.distill(
            student,
            teacher,
            text=texts(bench_folder),
            max_steps=2,
            losses=losses,
            teacher_outputs=folder,
            **SETTINGS,
        )
        for losses, folder in ((VECTORS_ALONE, kept), (inside, None), (inside, kept))
    ]
    assert set(runs[1].record["losses"]) == {"embedding", "hidden", "pooled", "similarity"}
    alone, each_step, files = ([entry["loss_pooled"] for entry in run.record["log"]] for run in runs)
    assert alone == pytest.approx(each_step, rel=1e-3)
    assert files == pytest.approx(each_step, rel=1e-3)
    hidden = [[entry["loss_hidden"] for entry in run.record["log"]] for run in runs[1:]]
    assert hidden[0] == pytest.approx(hidden[1], rel=1e-3)
    assert {path.name for path in kept.rglob("*") if path.suffix == ".float32"} == {"vectors.float32"}
    assert len(list(kept.rglob("hidden_states"))) == 1


def test_teacher_of_another_family_and_vocabulary(bench_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Each cuts the text with its own tokenizer; nothing but the vectors is compared, and a note says why."""
    other = tmp_path / "other"
    shutil.copytree(bench_folder / "model", other)
    tiny_model("distilbert", seed=3).save_pretrained(other)
    result = compresskit.distill(pair[0], other, text=texts(bench_folder), max_steps=2, **SETTINGS)
    assert any("does not say how vectors of texts are made" in note for note in result.notes)
    assert any(note.startswith("loss embedding and loss hidden are left out: teacher and stu") for note in result.notes)
    assert set(result.record["losses"]) == {"pooled", "similarity"}
    with pytest.raises(InputError, match="loss hidden: compares layers, but teacher and student have different fam"):
        compresskit.distill(pair[0], other, text=texts(bench_folder), max_steps=2, losses={"hidden": 1}, **SETTINGS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "word"}, "unit 'word': is unknown; known: sentence, passage, line"),
        ({"fields": ["phrase"]}, "has none of the fields phrase; it has sentence, label"),
        ({"unit": None}, "fields, max_texts and language belong to unit"),
        ({"unit": None, "fields": (), "max_texts": 9}, "fields, max_texts and language belong to unit"),
        ({"unit": None, "task": "sst2", "text": None}, "fields, max_texts and language belong to unit"),
        ({"text": None}, "fields are columns of tables; text python-help"),
        ({"language": "de"}, "language de: is that of sentences; unit line has none"),
        ({"unit": "sentence", "language": "English"}, "language 'English': give a code of ISO 639"),
        ({"max_texts": -5}, "max texts -5: give an integer of at least 2"),
        ({"max_texts": 1.5}, "max texts 1.5: give an integer of at least 2"),
        ({"data": "GLUE"}, "data belongs to a task"),
        ({"dims": [24], "losses": {"similarity": 0}}, "dims: are prefixes that loss similarity compares"),
        ({"similarity_loss": "kl", "losses": {"similarity": 0}}, "similarity_loss: is of the loss similarity, whose"),
        ({"pooled_loss": "mse", "losses": {"pooled": 0}}, "pooled_loss: is of the loss pooled, whose weight is 0"),
        ({"temperature": 2.0}, "temperature: no loss reads this with unit"),
        ({"similarity_temperature": 0.1}, "similarity_temperature: is that of similarity loss kl, here it is mse"),
        ({"unit": None, "fields": (), "dims": [24]}, "dims: no loss reads this without unit"),
        ({"unit": None, "fields": (), "text": None, "losses": {"pooled": 1}, "max_length": 32}, "texts cut into units"),
        ({"task": "sst2", "text": None}, "unit belongs to text"),
        ({"dims": [48]}, "dims 48: the student's vectors have 48 numbers"),
        ({"max_length": 400}, "has 40 positions"),
        ({"max_texts": 3}, "3 texts are too few"),
    ],
    ids=lambda value: value[:16] if isinstance(value, str) else "",
)
def test_bad_input(bench_folder: Path, pair: tuple[Path, Path], changes: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"text": texts(bench_folder), "max_steps": 1, **SETTINGS, **changes}
    with pytest.raises(InputError, match=message):
        compresskit.distill(*pair, **options)


def test_teacher_whose_vectors_are_not_finite(bench_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    broken = shutil.copytree(pair[1], tmp_path / "broken")
    model = AutoModel.from_pretrained(broken)
    model.encoder.layer[1].output.LayerNorm.weight.data[:] = 3e38  # finite, its sums are not
    model.save_pretrained(broken)
    with pytest.raises(WorkError, match="not finite"):
        compresskit.distill(pair[0], broken, text=texts(bench_folder), max_steps=1, **SETTINGS)


def test_text_of_one_sentence(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("One sentence alone.")
    with pytest.raises(InputError, match="holds 1 texts of unit sentence; two are the least"):
        compresskit.distill(*pair, text=tmp_path / "one.txt", unit="sentence", device="cpu")


def test_vectors_of_another_length(bench_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A projection is learned, and lies in the output as a module; or similarity alone teaches."""
    shutil.copytree(pair[1], tmp_path / "wide")
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "wide")
    options = {"text": texts(bench_folder), **SETTINGS, "learning_rate": 1e-3}
    result = compresskit.distill(pair[0], tmp_path / "wide", epochs=3, output=tmp_path / "out", **options)
    before, after = (result.record["scores"][who]["held_out"] for who in ("student_before", "student_after"))
    assert after["similarity"] > before["similarity"]
    assert after["cosine"] > 0.9
    kinds = [module["type"].rpartition(".")[2] for module in json.loads((tmp_path / "out/modules.json").read_text())]
    assert kinds == ["Transformer", "Pooling", "Normalize", "Dense", "Normalize"]
    assert not any("projection" in name for name in weights(tmp_path / "out"))
    ours, theirs = (SentenceTransformer(str(f), device="cpu") for f in (tmp_path / "out", tmp_path / "wide"))
    words = ["the film was very good", "a bad plot", "it is one"]
    cosines = [float(a @ b) for a, b in zip(ours.encode(words), theirs.encode(words), strict=True)]
    assert min(cosines) > 0.8
    again = compresskit.distill(tmp_path / "out", tmp_path / "wide", max_steps=1, **options)  # nothing to project now
    assert again.record["scores"]["student_before"]["held_out"]["cosine"] == pytest.approx(after["cosine"], abs=1e-4)
    alone = compresskit.distill(pair[0], tmp_path / "wide", losses={"pooled": 0}, max_steps=1, **options)
    assert set(alone.record["scores"]["student_after"]["held_out"]) == {"similarity"}


def test_projection_of_a_prefix(bench_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A student whose folder cuts its vectors: sentence-transformers cuts behind all modules, the projection comes
    after the cut.
    """
    shutil.copytree(pair[1], tmp_path / "wide")
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "wide")
    shutil.copytree(pair[0], tmp_path / "cut")
    (tmp_path / "cut" / "config_sentence_transformers.json").write_text(json.dumps({"truncate_dim": 24}))
    options = {"text": texts(bench_folder), **SETTINGS, "max_steps": 2}
    result = compresskit.distill(tmp_path / "cut", tmp_path / "wide", output=tmp_path / "out", **options)
    after = result.record["scores"]["student_after"]["held_out"]
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(["a film"]).shape == (1, 64)
    again = compresskit.distill(tmp_path / "out", tmp_path / "wide", **options)
    assert again.record["scores"]["student_before"]["held_out"] == pytest.approx(after, abs=1e-4)


def test_layers_of_a_wider_teacher_are_refused(bench_folder: Path, tmp_path: Path) -> None:
    """A student without modules takes its teacher's; a Dense layer may be made for longer vectors."""
    tiny_model(hidden_size=64).save_pretrained(tmp_path / "model")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / name, tmp_path / "model" / name)
    wide = sentence_folder(tmp_path / "model", tmp_path / "wide", behind=("Dense",))
    (wide / "2_Dense" / "config.json").write_text(json.dumps({"in_features": 64, "out_features": 32}))
    layer = torch.nn.Linear(64, 32)
    save_file({f"linear.{n}": p.detach() for n, p in layer.named_parameters()}, wide / "2_Dense" / "model.safetensors")
    with pytest.raises(
        InputError, match="the Dense layer behind the pooling takes 64 numbers, the vectors there have 48"
    ):
        compresskit.distill(bench_folder / "student", wide, text=texts(bench_folder), max_steps=1, **SETTINGS)


def test_output_says_how_it_was_trained(bench_folder: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = compresskit.distill(
        bench_folder / "student", pair[1], text=texts(bench_folder), max_steps=1, output=tmp_path / "out", **SETTINGS
    )
    assert result.folder is not None
    assert (tmp_path / "out" / "modules.json").read_text() == (pair[1] / "modules.json").read_text()


def test_command(bench_folder: Path, pair: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    arguments = ["distill", "--student", pair[0], "--teacher", pair[1], "--text", texts(bench_folder)]
    arguments += ["--text", bench_folder / "text.txt", "--field", "sentence", "--unit", "line", "--unit", "passage"]
    arguments += ["--max-steps", "2", "--dims", "24,12", "--output", tmp_path / "out", "--device", "cpu"]
    result = run(*arguments)
    assert result.code == 0, result.err
    record = json.loads((tmp_path / "out" / "training.json").read_text())["stages"][-1]
    assert record["stage"] == "sentences"
    assert record["dims"] == [24, 12]
    assert record["data"]["source"] == "train.tsv, text.txt"
    assert "similarity" in result.out
    following = f"Next: compresskit predict --model {tmp_path / 'out'} --text TEXT --among FILE_OR_FOLDER"
    assert following in result.out
