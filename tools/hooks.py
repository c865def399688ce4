"""What mkdocs does here beside rendering docs/: see mkdocs.yml.

README.md is the start page. A file of the repository that a page links to comes along, so that one link serves readers
of the repository and of the site. The page of every benchmark in reports/ is made from its records; all of these share
one script. ``<!-- keys: package.module.Model -->`` becomes a table of a pydantic model's keys, ``<!-- methods -->`` the
registered methods with the keys of each, ``<!-- commands -->`` the command line.
"""

from __future__ import annotations

import html
import inspect
import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

from compresskit.benchmark.report.page import plotly_script
from compresskit.benchmark.report.render import web_page

ROOT = Path(__file__).resolve().parents[1]
#: Where the pages of all reports find the script that draws their plots.
PLOTLY = "reports/plotly.min.js"
#: The page of a report, in its folder.
PAGE = "index.html"
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
#: A cross-reference of Sphinx in a docstring, as Markdown and as HTML has it.
_ROLE = re.compile(r":(?:class|func|data|meth|mod):(<code>|`+)~?(?:[\w.]+\.)?(\w+)(</code>|`+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the start page, and every file outside docs/ that a page leads to."""
    todo = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    seen = set()
    while todo:
        path = todo.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        if files.get_file_from_path(_place(path)) is None:
            files.append(File.generated(config, _place(path), abs_src_path=str(path)))
        if path.suffix == ".md":
            todo += [_target(path, link) for link in _LINK.findall(path.read_text(encoding="utf-8"))]
    files.append(File.generated(config, PLOTLY, content=plotly_script()))
    for folder in _benchmarks():
        script = os.path.relpath(PLOTLY, folder.relative_to(ROOT))
        place = (folder / PAGE).relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, content=web_page(folder, script)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as the site needs them; tables of keys in their places."""
    path = Path(str(page.file.abs_src_path))

    def link(found: re.Match[str]) -> str:
        target = _target(path, found[1])
        return os.path.relpath(_place(target), Path(_place(path)).parent) if target.is_file() else found[1]

    markdown = _LINK.sub(link, markdown)
    if path.name == "README.md" and path.parent in _benchmarks():
        markdown = markdown.replace(f"`{PAGE}`", f"[{PAGE}]({PAGE})")
    markdown = re.sub(r"<!-- keys: (\S+)\.(\w+) -->", lambda found: _keys(_model(*found.groups())), markdown)
    for marker, made in (("<!-- methods -->", _methods), ("<!-- commands -->", _commands)):
        if marker in markdown:
            markdown = markdown.replace(marker, made())
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Cross-references that docstrings write for Sphinx."""
    return _ROLE.sub(r"\1\2\3", content)


def _benchmarks() -> list[Path]:
    """The folders of the committed benchmarks."""
    return [file.parent for file in sorted(ROOT.glob("reports/*/bench.json"))]


def _target(path: Path, link: str) -> Path:
    return Path(os.path.normpath(path.parent / link))


def _place(path: Path) -> str:
    """Where a file of the repository lies on the site. A folder's README stands beside the folder's own index.html."""
    place = path.relative_to(ROOT).as_posix().removeprefix("docs/")
    return "index.md" if place == "README.md" else place.replace("/README.md", "/overview.md")


def _model(module: str, name: str) -> type[BaseModel]:
    model: type[BaseModel] = getattr(import_module(module), name)
    return model


def _methods() -> str:
    from compresskit.decomposers.registry import METHODS

    parts = []
    for name, method in METHODS.all().items():
        about = inspect.cleandoc(method.options_type.__doc__ or "").partition("\n\nAttributes:")[0]
        parts.append(f"### {name}\n\n{method.summary}\n\n{_plain(about)}\n\n{_keys(method.options_type)}")
    return "\n\n".join(parts)


def _commands() -> str:
    """Every command with its flags, as click's own help has them."""
    from compresskit.cli import cli

    root = click.Context(cli, info_name="compresskit")
    parts = []
    for name, command in sorted(cli.commands.items()):
        context = click.Context(command, info_name=name, parent=root)
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        rows = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
        table = "\n".join(_row(_code(flag), _escaped(text)) for flag, text in rows)
        about = _escaped(inspect.cleandoc(command.help or ""))
        parts.append(f"## {name}\n\n{about}\n\n```text\n{usage}\n```\n\n| flag | |\n| --- | --- |\n{table}")
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    """``<name>`` as text, not as HTML, outside backticks."""
    return re.sub(r"(`[^`]*`)|<", lambda found: found[1] or "&lt;", text)


def _code(text: str) -> str:
    """Text as code within a table, where backticks would keep what escapes a bar."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _keys(model: type[BaseModel]) -> str:
    """A table of a model's keys: values, default, and what its docstring says under ``Attributes:``."""
    schema = model.model_json_schema()
    attributes = inspect.cleandoc(model.__doc__ or "").partition("Attributes:\n")[2]
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE))
    rows = [_row("key", "values", "default", ""), _row(*["---"] * 4)]
    for key, entry in schema["properties"].items():
        field = model.model_fields[key]
        default = "needed" if field.is_required() else _default(field.get_default(call_default_factory=True))
        values = _values(entry)
        rows.append(_row(_code(key), values, default, _plain(meanings.get(key, ""))))
    return "\n".join(rows)


def _default(value: Any) -> str:
    return "" if value is None else _code(json.dumps(value))


def _values(entry: dict[str, Any]) -> str:
    """What a property of a JSON schema may hold, in words."""
    if "$ref" in entry:
        return _code(entry["$ref"].rpartition("/")[2])
    if "anyOf" in entry:
        return " or ".join(_values(part) for part in entry["anyOf"] if part.get("type") != "null")
    if "enum" in entry or "const" in entry:
        return ", ".join(_code(str(value)) for value in entry.get("enum", [entry.get("const")]))
    kind = entry.get("type")
    if kind == "array":
        parts = entry.get("prefixItems")
        inner = f"{len(parts)} x {_values(parts[0])}" if parts else _values(entry["items"])
        return f"[{inner}]" if parts else f"[{inner}, ...]"
    if kind == "object":
        inside = entry.get("additionalProperties")
        keys = entry.get("propertyNames", {"type": "string"})
        inner = _values(inside) if isinstance(inside, dict) else "any"
        return f"{{{_values(keys)}: {inner}}}"
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{word} {entry[bound]:g}" for bound, word in words.items() if bound in entry]
    name = {"string": "text", "boolean": "true, false", "integer": "integer", "number": "number"}.get(str(kind), "any")
    return " ".join([name, " and ".join(limits)]).strip()


def _plain(text: str) -> str:
    """A docstring's text as Markdown on one line."""
    return _ROLE.sub(r"`\2`", re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split())))
