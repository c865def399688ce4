"""Text that strangers may have written, made harmless for where it goes."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any


def plain(text: str) -> str:
    """Text that Markdown, and HTML inside it, show as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def fenced(text: str, language: str = "") -> str:
    """A code block of Markdown that nothing in the text can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def cell(value: object) -> object:
    """A value for a CSV file: text that a spreadsheet would take for a formula gets an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def calibration_text(calibration: Mapping[str, Any]) -> str:
    """What a plan or record says it was calibrated on, e.g. ``65,536 tokens of wiki.txt``."""
    text = calibration["text"]
    return f"{calibration['tokens']:,} tokens of {text['source']}" + (f" ({text['task']})" if "task" in text else "")


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
