"""Files and folders of text, wherever a text is taken."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Run, refused, sentence_folder

import compresskit
from compresskit import InputError
from compresskit.benchmark.grid import Grid
from compresskit.benchmark.shared import Shared
from compresskit.data.corpus import EMBEDDED, find_corpus, sequences
from compresskit.data.units import find_corpora, read_units


def test_corpora(tokenizer, tmp_path: Path) -> None:
    text = "the film was good\nvery good\n\n" + "one " * 30 + "\n"
    (tmp_path / "a.txt").write_text(text)
    with gzip.open(tmp_path / "a.txt.gz", "wt") as stream:
        stream.write(text)
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "the film was good\nvery good"}) + "\n" + json.dumps({"text": "one " * 30})
    )
    found = [sequences(find_corpus(tmp_path / name), tokenizer, 16) for name in ("a.txt", "a.txt.gz", "a.jsonl")]
    assert found[0]["input_ids"] == found[1]["input_ids"] == found[2]["input_ids"]
    assert found[0]["length"] == [8, 16, 16, 4]  # the second document in pieces, nothing cut off
    assert sum(ids.count(tokenizer.vocab["one"]) for ids in found[0]["input_ids"]) == 30
    (tmp_path / "lines.txt").write_text("one sentence per line\n" * 20_000)
    assert len(list(find_corpus(tmp_path / "lines.txt").documents())) > 3  # not one document of everything
    embedded = find_corpus(None)
    assert embedded.name == EMBEDDED
    assert sum(map(len, embedded.documents())) > 300_000
    few = sequences(embedded, tokenizer, 32, tokens=1000)
    assert 1000 <= sum(few["length"]) < 200_000


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Files of every kind, some of them below, some hidden."""
    folder = tmp_path / "texts"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / "b.txt").write_text("second of all\n\nthird of all")
    (folder / "a.jsonl").write_text(json.dumps({"text": "first\n\nof all", "more": "fields"}) + "\n")
    with gzip.open(folder / "deep" / "c.txt.gz", "wt") as file:
        file.write("fourth\nof all\n")
    with gzip.open(folder / "deep" / "er" / "d.JSONL.gz", "wt") as file:
        file.write(json.dumps({"text": "fifth of all"}))
    for hidden in (".z.txt", ".git/e.txt"):
        (folder / hidden).write_text("hidden")
    return folder


KINDS = ".txt or .jsonl file (also .gz)"
ALL = ["first\n\nof all", "second of all", "third of all", "fourth\nof all", "fifth of all"]


def test_a_folder_is_the_documents_of_its_files(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = find_corpus(texts)
    assert list(corpus.documents()) == ALL
    assert corpus.name == "texts/"
    assert corpus.notes == ()
    monkeypatch.chdir(texts)
    assert find_corpus(".").record() == corpus.record()
    (texts / "deep" / "more.csv").write_text("text\nnot read\n")
    assert list(corpus.documents()) == ALL
    assert corpus.notes == (f"text texts/: what is no {KINDS} is not read: 1 of its files",)


def test_links_are_followed_once(texts: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("one", "two"):
        (linked / name).symlink_to(texts)
    (texts / "deep" / "up").symlink_to(texts)
    assert list(find_corpus(linked).documents()) == ALL
    (linked / "z.txt").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"linked/z\.txt: is a link that leads nowhere"):
        find_corpus(linked)


def test_the_hash_of_a_folder_is_that_of_content_and_order(texts: Path) -> None:
    corpus = find_corpus(texts)
    seen = {corpus.record()["sha256"]}

    def changed() -> bool:
        seen.add(digest := corpus.record()["sha256"])
        return len(seen) > before and len(digest) == 64

    (texts / "notes.md").write_text("not read")
    before = len(seen)
    assert not changed()
    (texts / "b.txt").write_text("another")
    assert changed()
    before = len(seen)
    (texts / "b.txt").rename(texts / "z.txt")  # read last from now on
    assert changed()
    before = len(seen)
    (texts / "empty.txt").write_text("")
    assert changed()


def test_a_benchmark_of_another_folder_is_another_one(texts: Path, bench_folder: Path) -> None:
    grid = Grid(models=(str(bench_folder / "model"),), methods=("low-rank",), ratios=(3.0,), text=str(texts))
    before = {cell.key for cell in Shared(grid).cells()}
    assert before == {cell.key for cell in Shared(grid).cells()}
    (texts / "b.txt").write_text("another")
    assert not before & {cell.key for cell in Shared(grid).cells()}


def test_a_table_in_a_folder_has_fields(texts: Path) -> None:
    (texts / "deep" / "er" / "d.JSONL.gz").unlink()
    (corpus,) = find_corpora(texts, ["more"], ["line"])
    found = read_units([corpus], ["line"], seed=0)
    assert set(found.texts) == {"fields", "second of all", "third of all", "fourth", "of all"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], "is a folder that holds no .txt or .jsonl file"),
        ([".hidden.txt", "table.csv", "a.md", "x.txt.bak"], "is a folder that holds no .txt or .jsonl file"),
    ],
)
def test_folders_without_text(files: list[str], words: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("a text")
    with pytest.raises(InputError, match=words):
        find_corpus(tmp_path)


def test_a_folder_of_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n")
    with pytest.raises(InputError, match=f"text {tmp_path.name}/: holds no text"):
        list(find_corpus(tmp_path).documents())


@pytest.fixture(scope="module")
def parts(bench_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text of ``bench_folder`` in two files, and one of another kind."""
    folder = tmp_path_factory.mktemp("parts")
    documents = (bench_folder / "text.txt").read_text().strip().split("\n\n")
    (folder / "1.txt").write_text("\n\n".join(documents[:15]))
    (folder / "2.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents[15:]))
    shutil.copy(bench_folder / "data" / "SST-2" / "dev.tsv", folder)
    return folder


COMMANDS: dict[str, Sequence[str]] = {
    "distill": ("--student", "{}/student", "--teacher", "{}/model", "--max-steps", "1", "--max-length", "32", "--text"),
    "compress": ("--model", "{}/model", "--method", "low-rank", "--ratio", "2", "--calibration"),
    "trim": ("--model", "{}/model", "--keep", "60", "--text"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_folder(command: str, run: Run, bench_folder: Path, parts: Path) -> None:
    arguments = [part.format(bench_folder) for part in COMMANDS[command]]
    result = run(command, *arguments, parts, "--output", "out")
    assert result.code == 0, result
    assert f"text {parts.name}/: what is no {KINDS} is not read: 1 of its files" in " ".join(result.out.split())


def test_refused_by_every_command(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    more = {"shrink": ("--model", "{}/model", "--ratio", "2", "--text"), "bench": ("--model", "{}/model", "--text")}
    (tmp_path / "nothing").mkdir()
    for command, flags in (COMMANDS | more).items():
        arguments = [part.format(bench_folder) for part in flags]
        result = run(command, *arguments, tmp_path / "nothing", "--output", "out")
        refused(result, f"text {tmp_path / 'nothing'}: is a folder that holds no .txt or .jsonl file")


def test_a_folder_teaches_as_the_file_of_its_documents(bench_folder: Path, parts: Path) -> None:
    one, other = (
        compresskit.distill(
            bench_folder / "student", bench_folder / "model", text=text, max_steps=2, max_length=32, unit="line"
        )
        for text in (bench_folder / "text.txt", parts)
    )
    assert one.record["scores"] == other.record["scores"]
    assert other.record["data"]["texts"][0]["source"] == f"{parts.name}/"


def test_neighbours_in_a_folder(run: Run, bench_folder: Path, texts: Path, tmp_path: Path) -> None:
    model = sentence_folder(bench_folder / "model", tmp_path / "encoder")
    (texts / "notes.md").write_text("not read")
    ask = ("predict", "--model", model, "--text", "second of all", "--json", "--among")
    said = run(*ask, texts, "--top", 9)
    assert said.code == 0, said
    found = json.loads(said.out)["neighbours"]
    lines = ["first\n\nof all", "second of all", "third of all", "fourth", "of all", "fifth of all"]  # one text a line
    assert sorted((one["number"], one["text"]) for one in found) == list(enumerate(lines, start=1))
    assert found[0]["text"] == "second of all"
    assert f"text texts/: what is no {KINDS} is not read: 1 of its files" in " ".join(said.err.split())
    (tmp_path / "nothing").mkdir()
    refused(run(*ask, tmp_path / "nothing"), f"{tmp_path / 'nothing'}: is a folder that holds no .txt or .jsonl file")
    (tmp_path / "nothing" / "a.txt").write_text("\n")
    refused(run(*ask, tmp_path / "nothing"), f"data {tmp_path / 'nothing'}: holds no text")
    refused(run(*ask[:3], "--file", texts), f"data {texts}: is a folder; give a file of texts", "--among")
