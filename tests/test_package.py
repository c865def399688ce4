"""Wheel and sdist: what a user installs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import compresskit

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


def test_citation_has_the_version() -> None:
    assert f"version: {compresskit.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_source_distribution_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    subprocess.run([*build, "-t", "sdist"], cwd=ROOT, check=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    for name in ("README.md", "CHANGELOG.md", "LICENSE", "Makefile", "mkdocs.yml", "tests/conftest.py"):
        assert (source / name).is_file(), name
    subprocess.run([*build, "-t", "wheel"], cwd=source, check=True)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel.name
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_a_clean_environment_runs_the_command(wheel: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """An environment with nothing of ours but the wheel; pip checks that every declared dependency is there."""
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    # This environment's packages without what its own .pth files add, such as an editable compresskit.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--python", str(home / "bin" / "python"), "--quiet", "install", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--ignore-installed", str(wheel)], check=True, env=environment)
    subprocess.run([*pip, str(wheel)], check=True, env=environment)  # refused if a dependency is missing
    arguments = ["compress", "--model", str(tiny_folder), "--recipe", "kroneckerbert-8", "--output", "small"]
    command = [str(home / "bin" / "compresskit"), *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small" / "model.safetensors").is_file()
    code = "import compresskit, importlib.metadata as m; print(compresskit.__file__, m.version('compresskit'))"
    said = subprocess.run(
        [home / "bin" / "python", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert Path(said[0]).is_relative_to(home)
    assert said[1] == compresskit.__version__
