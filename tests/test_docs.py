"""Tables that README and docs take from the committed reports are those of the reports, and links lead somewhere.

``<!-- bench: FOLDER -->`` is followed by tables that ``compresskit report FOLDER --paste FILE`` writes, and
``<!-- rows: FILE -->`` by rows of a report's Markdown. Sentences are free.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from compresskit.benchmark.report.render import tables

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]


def test_pasted_tables_are_those_of_the_reports() -> None:
    pasted = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for folder, block in re.findall(r"<!-- bench: (\S+) -->\n(.*?)\n<!-- /bench -->", text, flags=re.DOTALL):
            assert block == tables(ROOT / folder), (
                f"{document.name}: compresskit report {folder} --paste {document.name}"
            )
            pasted += 1
    assert pasted >= 1


def test_rows_taken_from_a_report_stand_in_it() -> None:
    taken = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for file, block in re.findall(r"<!-- rows: (\S+) -->\n(.*?)\n<!-- /rows -->", text, flags=re.DOTALL):
            rows = {"", *(ROOT / file).read_text(encoding="utf-8").splitlines()}
            for row in block.splitlines():
                assert row in rows, f"{document.name}: {file} has no row {row}"
                taken += 1
    assert taken > 10


def test_methods_table_is_that_of_the_report() -> None:
    rows = pd.read_csv(ROOT / "reports" / "minilm-sst2" / "results.csv")
    figures = rows[rows.kind == "student"].groupby(["method", "ratio_asked"])[["score_kept", "speedup"]].mean()
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for method, found in figures.groupby("method"):
        cells = [f"{100 * row.score_kept:.1f} %, {row.speedup:.1f}x" for row in found.itertuples()]
        row = f"| {method} | {' | '.join(cells)} |"
        assert row in text, f"docs/methods.md: {row}"


def test_links_lead_somewhere() -> None:
    for document in (*DOCUMENTS, *ROOT.glob("reports/*/*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_design_names_the_rooms_and_is_short() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 2500
    rooms = text[text.index("\n## Rooms") : text.index("\n## Four doors")]
    found = {path.parent.name for path in ROOT.glob("compresskit/*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/`", rooms, flags=re.MULTILINE)) == found


def test_files_that_documents_name_are_there() -> None:
    for document in DOCUMENTS:
        for name in re.findall(r"`((?:\w+/)+\w+\.(?:py|yaml|json))`", document.read_text(encoding="utf-8")):
            known = "my_" in name or (ROOT / name).is_file() or (ROOT / "compresskit" / name).is_file()
            assert known, f"{document.name}: {name}"  # the reader makes what is called my_...


def test_compatibility_rows_name_a_test_and_the_pinned_version() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
    )
    first = text.partition("## Which checkpoints")[0]
    rows = [line.strip("| ").split(" | ") for line in first.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    for package, _, tested, test in rows:
        assert pins[package] == tested
        file, _, name = test.strip("`").partition("::")
        assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), test
