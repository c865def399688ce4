"""Makes docs/session.svg: two commands of README.md, run in an empty folder, with what they print. A few minutes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

COMMANDS = ("compresskit compress --method low-rank --ratio 19", "compresskit bench --quick")

console = Console(record=True, width=104, force_terminal=True)
with tempfile.TemporaryDirectory() as folder:
    for command in COMMANDS:
        console.print(f"$ {command}", style="bold green", highlight=False)
        words = [sys.executable, "-m", *shlex.split(command)]
        environment = os.environ | {"FORCE_COLOR": "1"}
        done = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        console.print(Text.from_ansi(done.stdout))
# A page shows it in its reader's font: nothing is fetched from elsewhere.
drawn = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="compresskit"), flags=re.DOTALL)
(Path(__file__).resolve().parents[1] / "docs" / "session.svg").write_text(drawn, encoding="utf-8")
