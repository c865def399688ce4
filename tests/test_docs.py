"""Figures in README and docs are those of the committed reports."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_one_shot_tables_are_those_of_the_report() -> None:
    records = json.loads((ROOT / "reports" / "minilm-one-shot" / "results.json").read_text(encoding="utf-8"))["records"]
    cells = [
        {
            "method": r["method"],
            "allocation": r["allocation"],
            "asked": f"{r['ratio_asked']}x",
            "achieved": f"{r['ratio']:.2f}x",
            "parameters": f"{r['parameters']:,}",
            "MB": f"{r['megabytes']:.2f}",
            "FLOPs": f"{r['flops_dense'] / r['flops']:.1f}x fewer",
            "error": f"{r['error']:.3f}",
        }
        for r in records
    ]
    for file, expected in (
        ("README.md", [row for row in cells if row["allocation"] == "uniform"]),
        ("docs/results.md", cells),
    ):
        text = (ROOT / file).read_text(encoding="utf-8")
        header = next(line for line in text.splitlines() if line.startswith("| method | a"))
        names = [name.strip() for name in header.strip("|").split("|")]
        rows = [line for line in text.splitlines() if re.match(r"\| (kronecker|low-rank) \|", line)]
        got = [dict(zip(names, (cell.strip() for cell in row.strip("|").split("|")), strict=True)) for row in rows]
        assert got == [{name: row[name] for name in names} for row in expected]


def test_shape_table_is_that_of_the_report() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "reports" / "minilm-kronecker-shapes").glob("*.json"))
    assert len(files) == 7
    for file in files:
        r = json.loads(file.read_text(encoding="utf-8"))
        row = f"| {r['flops'] / 1e9:.3f} G | {r['error']:.3f} | {r['before']:.3f} | {r['after']:.3f} |"
        assert row in text, r["name"]


def test_distillation_table_is_that_of_the_records() -> None:
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    finals = sorted((ROOT / "reports" / "sst2-distillation").glob("*-final*.json"))
    assert len(finals) >= 5
    for file in finals:
        stage = json.loads(file.read_text(encoding="utf-8"))["stages"][-1]
        before, after = (100 * stage["scores"][who]["dev"]["accuracy"] for who in ("student_before", "student_after"))
        assert f"| {before:.2f} | {after:.2f} | {100 * stage['kept']:.1f} % |" in text, file.name
    for file in (ROOT / "reports" / "sst2-distillation").glob("teacher-*.json"):
        stage = json.loads(file.read_text(encoding="utf-8"))["stages"][-1]
        assert f" | {100 * stage['scores']['student_after']['dev']['accuracy']:.2f} |" in text, file.name
