"""Recipes, data, names and messages from strangers: refused with one clear line, or shown as they are."""

from __future__ import annotations

import gzip
import io
import resource
from pathlib import Path

import datasets
import huggingface_hub
import pandas as pd
import pytest
import torch
import yaml
from conftest import Run, refused, tiny_model
from safetensors.torch import load_file, save_file
from test_report_tables import record

from compresskit import InputError
from compresskit import markup as text
from compresskit.benchmark.records import ExportRecord, frame, read, write
from compresskit.data.corpus import Corpus
from compresskit.folders.card import trained_card
from compresskit.folders.training import view
from compresskit.model import checkpoint
from compresskit.storage import files
from compresskit.validation import parse_mapping

COMPRESS = ("--method", "low-rank", "--ratio", 2)

# -- YAML --

RECIPE = "version: 1\nname: x\nratio: 2\nrules: [{role: ffn, method: low-rank}]\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
BAD_YAML = {
    "given twice": (RECIPE + "ratio: 3\n", "key 'ratio' comes twice"),
    "given twice below": (RECIPE.replace("role: ffn,", "role: ffn, role: head,"), "key 'role' comes twice"),
    "aliases": (LAUGHS, "aliases are not read"),
    "nested": ("[" * 100_000, "not valid YAML"),
    "nested mappings": ("{a: " * 50_000, "not valid YAML"),
    "tag": ("!!python/object/apply:os.system ['touch pwned']", "could not determine a constructor"),
    "tag below": (RECIPE + "description: !!python/name:os.system\n", "could not determine a constructor"),
    "date": (RECIPE + "description: 2024-99-99\n", "not valid YAML"),
    "digits": (RECIPE.replace("ratio: 2", f"ratio: {'9' * 5000}"), "not valid YAML"),
    "nul": (RECIPE + "description: a\0b\n", "not valid YAML"),
    "gigantic": (RECIPE + "#" * 2_000_000, "bytes, at most 1,000,000 are read"),
    "long value": (RECIPE.replace("ratio: 2", f"ratio: {'x' * 90_000}"), "..."),
    "odd key": ("? [a, b]\n: c\n" + RECIPE, "unhashable"),
    "regular expression": (RECIPE.replace("role: ffn", "match: '(('"), "not a regular expression"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_yaml(case: str, run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    content, words = BAD_YAML[case]
    (tmp_path / "own.yaml").write_text(content)
    result = run("compress", "--model", tiny_folder, "--recipe", tmp_path / "own.yaml")
    refused(result, words)
    assert len(result.err) < 1000


def test_yaml_in_another_encoding(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_bytes((RECIPE + "description: größer\n").encode("utf-16"))
    refused(run("compress", "--model", tiny_folder, "--recipe", tmp_path / "own.yaml"), "cannot be read", "utf-8")


def test_plain_yaml_is_read_as_ever() -> None:
    text_ = "a: {b: 1, c: [1, 2.5, true, null]}\nd: {b: 2}\n"
    assert parse_mapping(text_, "x", "y") == yaml.safe_load(text_)


# -- data --


def test_a_line_of_a_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "long.txt.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(1 << 6):
            file.write(b"a" * (1 << 24))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=r"long.txt.gz, line 1: is longer than 67,108,864 characters"):
        list(Corpus("long", path).documents())
    with pytest.raises(InputError, match=r"line 1: is longer than"):
        files.read_rows(path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 600  # MB


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"[" * 100_000, "not a valid JSON array"),
        ("a.jsonl", b'{"a": "\xff"}', "not UTF-8"),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "not UTF-8"),
        ("a.csv", b'a,b\n"1,2\n' + b"x" * 100, "a.csv, line"),
        ("a.parquet", b"PAR1" + b"\0" * 100, "not a readable Parquet file"),
    ],
)
def test_bad_tables(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        files.read_rows(tmp_path / name)


def test_a_text_of_the_hub_without_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "a"}, {"text": None}])
    with pytest.raises(InputError, match=r"text owner/name, row 2: the field 'text' holds no text"):
        list(Corpus("owner/name").documents())


def test_text_with_nul_bytes_is_text(run: Run, bench_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "dev"):
        rows = "\n".join(f"good\0text {i}\t{i % 2}" for i in range(8))
        (tmp_path / f"{split}.tsv").write_text(f"sentence\tlabel\n{rows}\n")
    model = bench_folder / "teacher"
    result = run("evaluate", "--model", model, "--task", "sst2", "--data", tmp_path, "--max-length", 32)
    assert result.code == 0, result


# -- what is written --

HOSTILE = "<img src=x onerror=alert(1)>|`[x](javascript:alert(1))` **b** $a$ \\"


def test_text_is_shown_as_it_is() -> None:
    from markdown_it import MarkdownIt

    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(f"| a |\n| --- |\n| {text.plain(HOSTILE)} |")
    assert page.count("<td>") == 1
    assert "<img" not in page
    assert "href" not in page
    assert "<strong>" not in page
    yaml_ = "description: |\n  ```\n  <script>\n  ````\n"
    page = MarkdownIt("commonmark", {"html": True}).render(text.fenced(yaml_, "yaml"))
    assert page.count("<pre>") == 1
    assert "<script>" not in page


def test_a_card_cannot_be_broken_out_of(run: Run, tiny_folder: Path) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    odd = "encoder.layer.9.<img src=x onerror=alert(1)>"
    save_file(tensors | {odd: torch.ones(1)}, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    recipe = tiny_folder.parent / "own.yaml"
    hostile = 'description: "a\\n\\n```\\n\\n<script>alert(1)</script>"\n'
    recipe.write_text(RECIPE.replace("ratio: 2", "ratio: 1.3") + hostile)
    folder = tiny_folder.rename(tiny_folder.parent / "=<b>x|y")
    assert run("compress", "--model", folder, "--recipe", recipe, "--output", "out").code == 0
    from markdown_it import MarkdownIt

    card = Path("out/README.md").read_text().partition("\n---\n")[2]
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(card)
    for tag in ("<img", "<script", "<b>"):
        assert tag not in page


def test_data_and_teachers_in_a_card() -> None:
    stage = view(
        {
            "finished": "2026-01-02",
            "stage": "general",
            "data": {"source": HOSTILE},
            "primary_metric": None,
            "steps": 1,
            "epochs": 1.0,
            "batch_size": 1,
            "tokens": 1,
            "seed": 0,
            "learning_rate": 1.0,
            "losses": {},
            "teacher": {"name": HOSTILE, "parameters": 1},
            "scores": {"teacher": {"held_out": {}}, "student_after": {"held_out": {}}},
        }
    )
    card = trained_card("", [stage], "small", checkpoint.in_memory(tiny_model()), sentences=False)
    assert card.count(text.plain(HOSTILE)) == 2


@pytest.mark.parametrize("name", ["<script>", "a|b", "=1+1", "a\nb", "../x", "$x$", "@x", "-x", "\x1b[2J"])
def test_records_with_such_names_are_refused(name: str, tmp_path: Path) -> None:
    good = record("low-rank", 4.0, "sst2", 0, 0.5)
    for field in ("model", "method", "task"):
        write(good.model_copy(update={field: name}), tmp_path / "record.json")
        with pytest.raises(InputError, match=rf"record.json: {field}"):
            read(tmp_path / "record.json")
    write(good.model_copy(update={"exports": {name: ExportRecord()}}), tmp_path / "record.json")
    with pytest.raises(InputError, match=r"record.json: exports"):
        read(tmp_path / "record.json")


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_of_a_csv_file_is_a_formula(start: str) -> None:
    cells = frame([record("low-rank", 4.0, "sst2", 0, None, message=f"{start}cmd|' /C calc'!A0")])
    written = cells.map(text.cell).to_csv(index=False)
    cell = pd.read_csv(io.StringIO(written))["message"][0]
    assert cell.startswith(f"'{start}".rstrip("\r\t"))
    assert text.cell(-1.5) == -1.5


def test_messages_do_not_steer_the_terminal(run: Run, tiny_folder: Path) -> None:
    tensors = load_file(tiny_folder / "model.safetensors")
    odd = {"encoder.layer.9.\x1b]0;owned\x07\x1b[2J": torch.ones(1)}
    save_file(tensors | odd, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    result = run("compress", "--model", tiny_folder, *COMPRESS, "--dry-run")
    assert result.code == 0
    assert "not used by this model" in result.out
    assert "\x1b]" not in result.out
    assert "\x1b[2J" not in result.out
