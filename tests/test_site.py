"""The pages of docs/ as a site: built without a warning, complete, and without anything from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import compresskit
from compresskit.benchmark.changes import TaskChanges, Variant
from compresskit.benchmark.grid import Grid
from compresskit.cli import cli
from compresskit.decomposers.registry import METHODS
from compresskit.planning.recipe import Recipe, Rule
from compresskit.planning.stage import Stage
from compresskit.tasks.declaration import Hub, Task

pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")

ROOT = Path(__file__).resolve().parents[1]


pytestmark = pytest.mark.sweep  # the site takes ten seconds to build


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return folder


def read(page: Path) -> str:
    return unescape(page.read_text(encoding="utf-8"))


def test_every_page_is_there(site: Path) -> None:
    start = read(site / "index.html")
    assert "compresskit makes a BERT-style checkpoint" in start
    pages = [page.relative_to(ROOT / "docs") for page in ROOT.glob("docs/**/*.md")]
    assert Path("howto/classifier.md") in pages
    for page in (*pages, Path("CONTRIBUTING.md"), Path("CHANGELOG.md"), Path("SECURITY.md")):
        name = page.with_suffix(".html").as_posix()
        assert (site / name).is_file(), name
        assert f'href="{name}"' in start, name  # in the navigation


def test_commands_are_those_of_the_program(site: Path) -> None:
    page = read(site / "cli.html")
    for name, command in cli.commands.items():
        start = page.index(f'<h2 id="{name}">')
        text = page[start : page.find("<h2 ", start + 1)]
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.opts[0] in text, (name, parameter.opts)


def test_recipe_keys_are_those_of_the_schemas(site: Path) -> None:
    page = read(site / "recipes.html")
    options = [method.options_type for method in METHODS.all().values()]
    described = (Recipe, Rule, Stage, Task, Hub, Grid, TaskChanges, Variant, *options)
    for model in described:
        for key in model.model_fields:
            assert re.search(rf"^ +{key}: \S", model.__doc__ or "", flags=re.MULTILINE), (model.__name__, key)
            assert f"<code>{key}</code>" in page, (model.__name__, key)
    assert "integer at least 1" in page  # limits are there


def test_public_names_are_documented(site: Path) -> None:
    page = read(site / "python.html")
    for name in compresskit.__all__:
        assert name == "__version__" or f'id="compresskit.{name}"' in page, name


def test_every_benchmark_has_its_page_and_all_share_one_script(site: Path) -> None:
    folders = [file.parent.name for file in ROOT.glob("reports/*/bench.json")]
    assert len(folders) >= 5
    for name in folders:
        page = site / "reports" / name / "index.html"
        assert '<script src="../plotly.min.js">' in read(page)
        assert page.stat().st_size < 500_000
        assert '<a href="index.html">' in read(page.with_name("overview.html"))
    assert "Plotly" in (site / "reports" / "plotly.min.js").read_text(encoding="utf-8")


def test_links_and_generated_parts_are_whole(site: Path) -> None:
    checked = 0
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue  # a page that servers show anywhere
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"<!-- (keys|methods|commands)|:(func|class|data):", text), page
        for link in re.findall(r'(?:href|src)="([^"#]+)[^"]*"', text):
            if not re.match(r"[a-z]+:", link):
                assert (page.parent / unescape(link)).exists(), f"{page.relative_to(site)}: {link}"
                checked += 1
        for fetched in re.findall(r'<(?:script|img|link)[^>]+(?:href|src)="(https?:[^"]+)"', text):
            pytest.fail(f"{page.relative_to(site)} fetches {fetched}")
    assert checked > 500
