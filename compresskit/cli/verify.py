"""``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from compresskit.cli.common import err, out, prepare, printable
from compresskit.errors import WorkError


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def verify(folder: Path, **_: Any) -> None:
    """Check a compressed folder against its own record: hashes, weights, figures.

    One line per finding and exit code 1; exit code 0 where all is as recorded.
    """
    prepare(0, None)
    from compresskit.folders import verification

    with err.status(escape(f"verifying {folder}")):
        findings = verification.verify(folder)
    for finding in findings:
        out.print(printable(finding), markup=False, highlight=False, soft_wrap=True)
    if findings:
        raise WorkError(f"{folder}: {len(findings)} finding{'s' * (len(findings) > 1)}")
    out.print(f"{folder}: weights, specs and figures are as recorded", markup=False, highlight=False, soft_wrap=True)
