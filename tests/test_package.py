"""The wheel: what a user installs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_carries_recipes_types_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"compresskit/recipes/{file.name}" for file in (ROOT / "recipes").glob("*.yaml")} <= names
    assert "compresskit/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "docs/", "reports/")) for name in names)


def test_installed_wheel_knows_short_recipe_names(wheel: Path, tiny_folder: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*command, str(wheel)], check=True)
    code = f"import compresskit; assert compresskit.__file__.startswith({str(site)!r}), compresskit.__file__"
    environment = os.environ | {"PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=tmp_path)
    arguments = ["compress", "--model", str(tiny_folder), "--recipe", "kroneckerbert-8", "--output", "small"]
    done = subprocess.run(
        [sys.executable, "-m", "compresskit", *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small" / "model.safetensors").is_file()
