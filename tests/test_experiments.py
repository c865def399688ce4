"""The programs in experiments/ agree with the package; `make bench-speed` runs them."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_what_a_program_imports_is_there(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(program.parent)
    runpy.run_path(str(program), run_name="imported")  # its main() does not run


def test_make_runs_every_program() -> None:
    mains = {path.name for path in PROGRAMS if "__main__" in path.read_text(encoding="utf-8")}
    assert mains == set(re.findall(r"experiments/(\w+\.py)", (ROOT / "Makefile").read_text(encoding="utf-8")))
