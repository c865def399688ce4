"""Figures in README and docs are those of the committed reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd

from compresskit.benchmark.report.render import tables

ROOT = Path(__file__).resolve().parents[1]


def test_one_shot_table_is_that_of_the_report() -> None:
    report = (ROOT / "reports" / "minilm-one-shot" / "README.md").read_text(encoding="utf-8")
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    text = text[text.index("| method | allocation") :].partition("\n\n")[0]
    rows = [row for row in text.splitlines() if not row.startswith("| ---")]
    assert len(rows) > 10
    for row in rows:
        assert f"{row}\n" in report, row


def test_shape_table_is_that_of_the_report() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "reports" / "minilm-kronecker-shapes").glob("*.json"))
    assert len(files) == 7
    for file in files:
        r = json.loads(file.read_text(encoding="utf-8"))
        row = f"| {r['flops'] / 1e9:.3f} G | {r['error']:.3f} | {r['before']:.3f} | {r['after']:.3f} |"
        assert row in text, r["name"]


def test_distillation_tables_are_those_of_the_records() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    folder = ROOT / "reports" / "sst2-distillation"
    report = (folder / "README.md").read_text(encoding="utf-8")
    rows = [line for line in report.splitlines() if line.startswith("| ")]
    assert len(rows) > 8
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in rows:
        assert row in text
    for student in ("low-rank-8x", "low-rank-19x", "kronecker-8x", "kronecker-19x"):
        (row,) = (row for row in rows if row.startswith(f"| {student} |"))
        assert row.strip("| ").rpartition("| ")[2].strip() in readme
    stages = {
        file.stem: json.loads(file.read_text(encoding="utf-8"))["stages"][-1] for file in sorted(folder.glob("*.json"))
    }
    checked = 0
    for name, stage in stages.items():
        scores = stage["scores"]["student_after"]
        if "dev" in scores:
            accuracy = f"| {100 * scores['dev']['accuracy']:.2f} "
            kept = f"| {100 * stage['kept']:.1f} % |" if stage.get("kept") else ""
            assert accuracy + kept in text, name
            checked += 1
    assert checked >= 15


def test_pasted_tables_are_those_of_the_reports() -> None:
    pasted = 0
    for document in (ROOT / "README.md", ROOT / "docs" / "results.md"):
        text = document.read_text(encoding="utf-8")
        for folder, block in re.findall(r"<!-- bench: (\S+) -->\n(.*?)\n<!-- /bench -->", text, flags=re.DOTALL):
            assert block == tables(ROOT / folder), (
                f"{document.name}: compresskit report {folder} --paste {document.name}"
            )
            pasted += 1
    assert pasted >= 1


def test_methods_table_is_that_of_the_report() -> None:
    rows = pd.read_csv(ROOT / "reports" / "minilm-sst2" / "results.csv")
    figures = rows[rows.kind == "student"].groupby(["method", "ratio_asked"])[["score_kept", "speedup"]].mean()
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for method, found in figures.groupby("method"):
        cells = [f"{100 * row.score_kept:.1f} %, {row.speedup:.1f}x" for row in found.itertuples()]
        row = f"| {method} | {' | '.join(cells)} |"
        assert row in text, f"docs/methods.md: {row}"


def test_speeds_are_those_of_the_report() -> None:
    rows = json.loads((ROOT / "reports" / "speed" / "models.json").read_text(encoding="utf-8"))
    found = {(row["model"], row["batch"]): row for row in rows if row["threads"] == 1}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for model in ("kroneckerbert-21-fast", "low-rank 19x"):
        for batch in (1, 16):
            assert f"{found[model, batch]['speedup']:.2f}x" in readme
    for batch in (1, 16):
        assert f"{found['kroneckerbert-21-fast', batch]['bound']:.1f}x" in readme
    sizes = json.loads((ROOT / "reports" / "speed" / "memory.json").read_text(encoding="utf-8"))
    largest = max(row["peak"] for row in sizes if row["model"] == "3.5B")
    assert f"{largest / 1e9:.1f} GB of memory" in readme


def test_links_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    documents += (ROOT / "reports" / "speed").glob("*.md")
    for document in documents:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_compatibility_rows_name_a_test_and_the_pinned_version() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    for package, _, tested, test in rows:
        assert pins[package] == tested
        file, _, name = test.strip("`").partition("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), test


def test_figures_of_exported_models_are_those_of_the_report() -> None:
    rows = json.loads((ROOT / "reports" / "export" / "results.json").read_text(encoding="utf-8"))
    found = {(row["model"], row["format"]): row for row in rows}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    small, exact = found["tensor-train 19.1x", "onnx-int8"], found["tensor-train 19.1x", "torch"]
    assert f"{small['megabytes']:.2f} MB" in readme
    assert f"{found['dense', 'torch']['megabytes'] / small['megabytes']:.1f} times smaller" in readme
    assert f"{100 * small['accuracy']:.2f} %" in readme
    assert f"{100 * exact['accuracy']:.2f} %" in readme
    dense = found["dense", "onnx"]
    assert f"{1e3 * small['seconds']:.1f} ms" in readme
    assert f"dense {1e3 * dense['seconds']:.1f}" in readme
    assert f"{small['cold'][1]:.0f} MB (dense {dense['cold'][1]:.0f})" in readme
