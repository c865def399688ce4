"""The programs in experiments/ agree with the package; `make bench-speed` runs them."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import compresskit

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_what_a_program_imports_is_there(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(program.parent)
    runpy.run_path(str(program), run_name="imported")  # its main() does not run


def test_make_runs_every_program() -> None:
    mains = {path.name for path in PROGRAMS if "__main__" in path.read_text(encoding="utf-8")}
    assert mains == set(re.findall(r"experiments/(\w+\.py)", (ROOT / "Makefile").read_text(encoding="utf-8")))


def exports(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """The program that compares exports, called with its arguments."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    main = runpy.run_path(str(ROOT / "experiments" / "export.py"), run_name="imported")["main"]
    return lambda *arguments: main([str(argument) for argument in arguments])


def test_a_page_of_exports_is_made_of_what_is_measured_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def row(model: str, form: str, megabytes: float) -> dict[str, object]:
        told = {"model": model, "format": form, "runtime": "any", "by": "ONNX Runtime"}
        return told | {"megabytes": megabytes, "error": 1e-7}

    rows = {"a": row("dense", "onnx", 90.0), "b": row("dense", "onnx-int8", 23.0), "c": row("small", "onnx", 4.5)}
    rows["d"] = row("small", "onnx-int8", 1.5)
    records = {"models": {}, "rows": rows, "scores": {}, "cold": {}, "times": {}}
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records))
    exports(monkeypatch)("--output", tmp_path, "--steps")
    page = (tmp_path / "README.md").read_text()
    assert "| small | onnx-int8 | any | ONNX Runtime | 1.50 | 60.0x | 1.0e-07 |  |  |  |" in page
    assert not (tmp_path / "export.png").exists()
    times = dict(zip("abcd", (32.0, 12.0, 5.0, 4.0), strict=True))
    block = {"milliseconds": times, "spread": dict.fromkeys("abcd", 0.1), "rounds": 5, "load average": 0.1}
    records["times"] = {"1x128, 1 thread": block | {"made on": "a machine\n"}}
    records["scores"] = {"a": 0.9, "b": 0.9, "c": 0.88, "d": 0.8}
    file.write_text(json.dumps(records))
    exports(monkeypatch)("--output", tmp_path, "--steps")
    page = (tmp_path / "README.md").read_text()
    assert "The fastest row is `d` at 1 of 1 shapes." in page
    assert "| 1x128, 1 thread | d: 8.0x | c: 6.4x |" in page  # d loses more than a twentieth of the score
    assert "| small | 6.40x | 8.00x |  | 3.00x |" in page  # 8 bits also against the dense model's 8 bits
    assert "| c | 5.00 ± 0.10 (6.40x) |" in page
    assert (tmp_path / "export.png").is_file()


@pytest.mark.sweep
def test_exports_are_measured_once(bench_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: pip install compresskit[openvino]")
    student = tmp_path / "small"
    shutil.copytree(bench_folder / "teacher", student, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    compresskit.compress(bench_folder / "teacher", method="low-rank", ratio=3).save_pretrained(student)
    asked = ["--dense", bench_folder / "teacher", "--students", student, "--task", "sst2", "--output", tmp_path / "out"]
    asked += [
        "--data",
        bench_folder / "data",
        "--graphs",
        tmp_path / "graphs",
        "--shapes",
        "1x8",
        "33x32",
        "--rounds",
        1,
    ]
    run = exports(monkeypatch)
    run(*asked, "--steps", "write", "score")
    run(*asked)
    file = tmp_path / "out" / "records.json"
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 8 + 7 == len(found["scores"]) == len(found["cold"])
    assert {len(block["milliseconds"]) for block in found["times"].values()} == {15}
    assert all(row["error"] < 1e-4 for row in found["rows"].values() if row["format"] in ("onnx", "openvino"))
    assert max(cold["megabytes"] for cold in found["cold"].values()) < 400  # of its own, not of this process
    before = file.read_bytes()
    run(*asked)
    assert file.read_bytes() == before
