"""Every command and code block of README.md and docs/ is run, on a tiny model, or says why it is not.

A block that is not run stands below ``<!-- not run: reason -->``. A block without a language holds commands, one of
``text`` neither commands nor code. The files that commands name (``google-bert/bert-base-uncased``, ``GLUE``,
``wiki.txt.gz``) lie in the folder in which they run; the embedded checkpoint is a tiny model there.
"""

from __future__ import annotations

import gzip
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import Run, reviews, tiny_model, write_tsv
from datasets import Dataset
from markdown_it import MarkdownIt
from markdown_it.token import Token
from test_push import Hub, push, serving
from transformers import AutoModel, AutoTokenizer

import compresskit
from compresskit import pipeline
from compresskit.benchmark import latency
from compresskit.benchmark.grid import load_grid
from compresskit.cli import cli
from compresskit.model import demo
from compresskit.shrinking import job
from compresskit.tasks.loading import load_data, load_task
from compresskit.training import data as training_data

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/plugins/*/README.md")]

#: What a user's model and time allow, and a test's do not.
SMALLER = {
    "5MB": "1MB",
    "--max-tokens 2000000": "--max-tokens 300",
    "max_steps=1000": "max_steps=2",
    "keep 16000": "keep 60",
    "keep=16000": "keep=60",
}
SIZES = {"hidden_size": 96, "intermediate_size": 384, "vocab_size": 3000, "max_position_embeddings": 128}
#: The last flag of a name counts.
SHORT_BENCH = shlex.split("--ratios 8 --seeds 0 --baselines dense --general-tokens")


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


class Block(NamedTuple):
    line: int
    language: str
    text: str
    reason: str  # why it is not run; empty otherwise


def tokens(document: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(document.read_text(encoding="utf-8"))


def blocks(document: Path) -> Iterator[Block]:
    before = ""
    for token in tokens(document):
        assert token.type != "code_block", f"{document.name}: indented code; put it between fences"
        if token.type == "fence":
            found = re.fullmatch(r"<!-- not run: (.+) -->\s*", before)
            yield Block((token.map or [0])[0] + 1, token.info, token.content, found[1] if found else "")
        before = token.content if token.type == "html_block" else ""


def inline_code(document: Path) -> Iterator[str]:
    for token in tokens(document):
        for child in token.children or ():
            if child.type == "code_inline":
                yield child.content


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory, bench_folder: Path) -> Path:
    """A folder with what the commands name: made once, copied for every document."""
    root = tmp_path_factory.mktemp("material")
    model = root / "google-bert" / "bert-base-uncased"
    tiny_model(**SIZES, num_hidden_layers=1).save_pretrained(model)
    for file in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bench_folder / "model" / file, model / file)
    shutil.copytree(model, model.with_name("bert-base-multilingual-cased"))
    for name in ("GLUE", "DIR"):
        write_tsv(root / name / "SST-2" / "train.tsv", "sentence\tlabel", reviews(100, seed=0))
        write_tsv(root / name / "SST-2" / "dev.tsv", "sentence\tlabel", reviews(40, seed=1))
        for split, rows in ("train", 40), ("dev", 20):
            texts = [(text, text.split()) for text, _ in reviews(rows, seed=2)]
            pairs = [(text, " ".join(words[: n % 6 + 1]), f"{n % 6}") for n, (text, words) in enumerate(texts)]
            write_tsv(root / name / "STS-B" / f"{split}.tsv", "sentence1\tsentence2\tscore", pairs)
    for name in ("wiki.txt.gz", "wikipedia.txt.gz"):
        (root / name).write_bytes(gzip.compress((bench_folder / "text.txt").read_bytes()))
    (root / "notes").mkdir()
    (root / "notes" / "cats.txt").write_text("Most cats sleep where it is warm.\nDogs bark.\n", encoding="utf-8")
    shutil.copytree(ROOT / "examples", root / "examples")
    return root


@pytest.fixture
def place(material: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a document, in which the embedded checkpoint is a tiny model."""
    shutil.copytree(material, Path.cwd(), dirs_exist_ok=True)
    monkeypatch.setattr(demo, "folder", lambda: material / "google-bert" / "bert-base-uncased")
    monkeypatch.setattr(pipeline, "TOKENS", 1000)  # of a calibration
    monkeypatch.setattr(latency, "TOKENS", 8)
    monkeypatch.setattr(training_data, "HELD_OUT", 4)
    monkeypatch.setattr(job, "FEWEST", 10)  # rows of a task for which shrink takes no more epochs
    monkeypatch.setattr(job, "ENOUGH", 10)  # characters of a text
    return Path.cwd()


#: What is found in :func:`rows_of`.
LABELS = {
    "classification": ("0", "1"),
    "multi-label": ("anger", "joy"),
    "tags": ("O", "B-place", "I-place"),
    "ranking": (),
}


def rows_of(kind: str, columns: list[str]) -> str:
    """A file of a task of this kind."""
    if kind == "tags":
        return "in O\nLondon B-place\n\n" * 10
    if kind == "multi-label":
        labels = ['["joy", "anger"]', "[]"] * 10
        return "".join(f'{{"{columns[0]}": "so", "{columns[1]}": {some}}}\n' for some in labels)
    if kind == "ranking":
        rows = [[f"query {n // 2}", text, f"{n % 2}"] for n, (text, _) in enumerate(reviews(20, seed=5))]
        return "".join(",".join(row) + "\n" for row in [columns, *rows])
    rows = [[*[text] * (len(columns) - 1), label] for text, label in reviews(20, seed=5)]
    return "".join(",".join(row) + "\n" for row in [columns, *rows])


class Reader:
    """Does what a document says."""

    def __init__(self, run: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.hub, self.monkeypatch = run, hub, monkeypatch
        self.names: dict[str, Any] = {}

    def does(self, block: Block) -> None:
        text = block.text
        for large, small in SMALLER.items():
            text = text.replace(large, small)
        ways: dict[str, Callable[[str], None]] = {"": self.commands, "python": self.python, "yaml": self.yaml}
        ways |= {"toml": self.toml, "text": self.picture}
        assert block.language in ways, f"no way to run a block of {block.language!r}"
        ways[block.language](text)

    def commands(self, text: str) -> None:
        for line in text.replace("\\\n", " ").splitlines():  # a backslash continues a line
            words = shlex.split(line, comments=True)
            match words:
                case []:
                    pass
                case ["compresskit", *arguments]:
                    self.command(arguments)
                case ["python", "-c", code]:
                    exec(code, {})
                case ["python", script, *arguments]:
                    self.monkeypatch.setattr(sys, "argv", [script, *arguments])
                    runpy.run_path(script, run_name="__main__")
                case _:
                    pytest.fail(f"{words[0]} is not run here: say why above the block")

    def command(self, arguments: list[str]) -> None:
        if arguments[0] == "bench":
            arguments += [*SHORT_BENCH, "0" if "--task" in arguments else "100"]
            arguments += ["--task-epochs", "0.1"] if {"--task", "bench-glue"} & {*arguments} else []
            arguments += [] if "--methods" in arguments else ["--methods", "low-rank"]
        words = arguments[1:]
        result = push(self.hub, self.run, *words) if arguments[0] == "push" else self.run(*arguments)
        assert result.code == 0, f"compresskit {shlex.join(arguments)}: {result.err}"

    def python(self, text: str) -> None:
        exec(text, self.names)

    def yaml(self, text: str) -> None:
        keys = yaml.safe_load(text)
        file = Path(f"{keys['name']}.yaml")
        file.write_text(text, encoding="utf-8")
        if "rules" in keys:
            tokenizer = AutoTokenizer.from_pretrained(demo.folder())  # for those that calibrate
            compresskit.plan(tiny_model(**SIZES), recipe=file, tokenizer=tokenizer)  # rules tell layers apart
        elif "tables" in keys:
            write_tsv(Path(keys["files"]["dev"]), "query-id\tcorpus-id\tscore", [("a", "b", "1"), ("a", "a", "0")])
            for name in keys["tables"].values():
                Path(name).write_text('{"_id": "a", "text": "one"}\n{"_id": "b", "text": "two"}\n', encoding="utf-8")
            assert load_data(load_task(file), Path.cwd(), train=False).splits["dev"].targets == [{1}]
        elif "inputs" in keys:
            kind = keys.get("kind", "classification")
            for name in keys["files"].values():
                Path(name).write_text(rows_of(kind, [*keys["inputs"], keys["label"]]), encoding="utf-8")
            assert load_data(load_task(file), Path.cwd()).labels == LABELS[kind]
        else:
            assert list(load_grid(file).checked().rows())

    def toml(self, text: str) -> None:
        projects = ROOT.glob("examples/plugins/*/pyproject.toml")
        assert any(text in project.read_text(encoding="utf-8") for project in projects)

    def picture(self, text: str) -> None:
        assert not re.search(r"^\s*(compresskit|make|pip|python|torchrun) ", text, flags=re.MULTILINE)


def prepare_python(reader: Reader) -> None:
    """What the blocks of docs/python.md take as given."""
    teacher = demo.folder()
    reader.run("compress", "--method", "low-rank", "--ratio", "8", "--output", "general")
    reader.run("finetune", "--task", "sst2", "--data", "GLUE", "--max-steps", "2", "--output", "teacher")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenised = Dataset.from_dict(dict(tokenizer([text for text, _ in reviews(20, seed=3)])))
    reader.names |= {"teacher": AutoModel.from_pretrained(teacher), "tokenizer": tokenizer, "tokenised": tokenised}


#: Pages, or folders of pages, whose blocks are run by `make test-slow` alone.
LONG = ("docs/first-hour.md", "docs/howto/", "docs/methods.md", "docs/python.md")


@pytest.mark.slow
@pytest.mark.parametrize(
    "document",
    [
        pytest.param(path, id=name_of(path), marks=pytest.mark.sweep if name_of(path).startswith(LONG) else ())
        for path in DOCUMENTS
        if any(blocks(path))
    ],
)
def test_every_block_runs(document: Path, place: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Hub()) as hub:
        reader = Reader(run, hub, monkeypatch)
        if document.name == "python.md":
            prepare_python(reader)
        for block in blocks(document):
            if not block.reason:
                try:
                    reader.does(block)
                except BaseException as error:
                    error.add_note(f"{name_of(document)}, line {block.line}")
                    raise


def test_blocks_that_are_not_run_are_few() -> None:
    reasons = [block.reason for document in DOCUMENTS for block in blocks(document) if block.reason]
    runs = [block for document in DOCUMENTS for block in blocks(document) if not block.reason]
    unproven = [reason for reason in reasons if "tests/" not in reason]  # else that test runs what the block says
    assert len(unproven) < len(runs) / 3
    for reason in reasons:
        for file in re.findall(r"tests/\w+\.py", reason):
            assert (ROOT / file).is_file(), reason


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_and_flags_in_sentences_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    flags = {name: {o for p in command.params for o in p.opts} | {"--help"} for name, command in cli.commands.items()}
    every = set().union(*flags.values())
    for code in inline_code(document):
        words = code.split()
        match words:
            case ["compresskit", name, *_] if name.islower():
                assert name in flags, code
                assert {word for word in words if word.startswith("--")} <= flags[name], code
            case ["make", *names]:
                assert set(names) <= targets, code
            case ["python", script, *_] if script.endswith(".py"):
                assert (ROOT / script).is_file(), code
            case [flag, *_] if re.fullmatch(r"--[a-z][a-z-]+", flag):
                assert flag in every | {"--nproc-per-node"}, code
