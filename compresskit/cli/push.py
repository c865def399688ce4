"""``push``."""

from __future__ import annotations

from pathlib import Path

import click

from compresskit.cli.common import err, out, prepare


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("repository", metavar="REPO")
@click.option(
    "--private/--public", default=None, help="Whether a new repository is private. Default: the owner's setting."
)
@click.option(
    "--auto-map",
    is_flag=True,
    help="Add code that imports compresskit, so that trust_remote_code=True loads the model.",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def push(folder: Path, repository: str, private: bool | None, auto_map: bool, debug: bool) -> None:
    """Put a compressed folder on the hub as REPO (owner/name): weights, tokenizer, model card, results."""
    prepare(0, None)
    from compresskit.folders.publish import push as publish

    with err.status("uploading"):
        address = publish(folder, repository, private=private, auto_map=auto_map)
    out.print(f"Pushed: {address}", markup=False, highlight=False, soft_wrap=True)
