"""benchmarks/transfers.py: a benchmark's students on data of another source."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import compresskit

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def report(bench_folder: Path, tmp_path: Path) -> tuple[Path, dict[str, float]]:
    """A teacher, a student and a cell that failed; accuracies of the first two."""
    teacher, scores = bench_folder / "teacher", {}
    for method, asked in ("dense", None), ("low-rank", 3.0), ("tucker", 3.0):
        folder = tmp_path / "report" / "cells" / method
        shutil.copytree(teacher, folder / "model")
        record: dict[str, Any] = {"task": "sst2", "method": method, "key": method, "seed": 0, "ratio_asked": asked}
        if method == "tucker":
            record["status"] = "failed"
        else:
            if method == "low-rank":
                compresskit.compress(teacher, method=method, ratio=3).save_pretrained(folder / "model")
            done = compresskit.evaluate(folder / "model", task="sst2", data=bench_folder / "data", max_length=32)
            record |= {"status": "finished", "scores": done.record["scores"]}
            scores[method] = record["scores"]["dev"]["accuracy"]
        (folder / "record.json").write_text(json.dumps(record))
    return tmp_path / "report", scores


def test_scores_and_table(
    report: tuple[Path, dict[str, float]], bench_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import transfers

    folder, scores = report
    monkeypatch.setattr(transfers, "TRANSFERS", {"sst2": "sst2"})  # outside is inside: the same figures
    line = ["transfers.py", "--report", str(folder), "--data", str(bench_folder / "data"), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", line)
    transfers.main()
    assert len(capsys.readouterr().out.splitlines()) == 2
    kept = 100 * scores["low-rank"] / scores["dense"]
    text = (folder / "transfers.md").read_text(encoding="utf-8")
    after = f"{100 * scores['low-rank']:.2f}"
    assert f"| sst2 to sst2 | low-rank | 3x | 1 | {after} | {after} | {kept:.1f} % | {kept:.1f} % | +0.0 |" in text
    assert "tucker" not in text
    transfers.main()
    assert capsys.readouterr().out == ""  # nothing is scored again
    monkeypatch.setattr(sys, "argv", [*line, "--rows", "7"])  # other rows: all of them are
    transfers.main()
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert "7 rows (7 rows drawn with seed 0)" in (folder / "transfers.md").read_text(encoding="utf-8")
