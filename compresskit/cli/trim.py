"""``trim``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from compresskit.cli.common import AS_CHOICES, KINDS_OF_TEXT, TEXT, err, out, prepare, print_notes

if TYPE_CHECKING:
    from compresskit.vocabulary.record import TrimRecord


@click.command()
@click.option("--model", metavar="FOLDER|HUB_ID", help="Dense checkpoint. Default: the embedded MiniLM.")
@click.option("--as", "as_class", type=click.Choice(AS_CHOICES), help="Model class. Default: the checkpoint's.")
@click.option("--text", metavar=TEXT, required=True, help=f"Text such as the model will read. {KINDS_OF_TEXT}")
@click.option("--keep", type=int, metavar="N", help="How many tokens to keep, special ones among them.")
@click.option("--coverage", type=float, metavar="S", help="Or which share of the text's tokens. Default: 0.999.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write. Default: <model>-trimmed.")
@click.option("--overwrite", is_flag=True, help="Replace an output that compresskit wrote.")
@click.option("--threads", type=click.IntRange(1, 256), help="CPU threads. Default: all.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def trim(model: str | None, output: Path | None, threads: int | None, debug: bool, **options: Any) -> None:
    """Keep the tokens that a text uses most, in the model and in its tokenizer.

    The result is an ordinary dense checkpoint. Text in kept tokens gives the outputs of the original.
    """
    prepare(0, threads)
    from compresskit.model import demo
    from compresskit.vocabulary.record import TrimRecord
    from compresskit.vocabulary.trimming import trim as write

    folder = output or Path(f"{Path(model).resolve().name if model else demo.NAME}-trimmed")
    with err.status(escape(f"reading {options['text']}")):
        done = write(model, output=folder, **options)
    show(TrimRecord.model_validate(done.record))
    print_notes(done.notes)
    out.print(f"Written to {folder}/ (weights, tokenizer, trim.json, model card)", markup=False, soft_wrap=True)


def show(record: TrimRecord) -> None:
    """What is left of the vocabulary and of the model, and what that does to text."""
    from compresskit.cli.tables import table

    counts = (("tokens", record.tokens), ("embedding rows", record.rows), ("parameters", record.parameters))
    rows = [(what, f"{n.before:,}", f"{n.after:,}", f"{n.factor:.2f}x smaller") for what, n in counts]
    out.print(table(("total", "before", "after", "ratio"), rows, left=(0, 3)))
    if record.held_out is None:
        print_notes(("the text is too short to hold a part out: what trimming does to other text is not known",))
        return
    found = record.held_out
    shares = (
        ("kept", f"{100 * found.kept:.3f} %"),
        ("cut into other tokens", f"{100 * found.re_split:.3f} %"),
        ("unknown, which were not", f"{100 * found.unknown:.3f} %"),
        ("more tokens than before", f"{100 * found.longer:.3f} %"),
    )
    caption = f"of {found.tokens:,} tokens that the tokens to keep were not chosen on"
    out.print(table(("held-out text", "share"), shares, left=(0,), caption=caption))
