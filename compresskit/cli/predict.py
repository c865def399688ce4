"""``predict``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape

from compresskit.cli.common import AS_CHOICES, err, out, prepare, print_notes, printable, progress_bar, shared
from compresskit.errors import InputError

if TYPE_CHECKING:
    from compresskit.answering.answers import Predicted

#: Characters of a text that its row of the table shows.
_SHOWN = 200


@click.command()
@click.option(
    "--model",
    metavar="FOLDER|HUB_ID",
    required=True,
    help="Model with a head, dense, compressed or exported; or one of sentence vectors.",
)
@click.option("--text", "single", multiple=True, help="A text; several are possible.")
@click.option("--pair", "pairs", nargs=2, multiple=True, help="Two texts that belong together: question and paragraph.")
@click.option(
    "--file",
    metavar="FILE|-",
    help="Texts: .txt, one a line; .jsonl, .csv, .tsv or .parquet with the columns of the task; - for standard input.",
)
@click.option(
    "--field", "fields", multiple=True, metavar="NAME", help="Column of the file that holds texts; one or two."
)
@click.option(
    "--among",
    type=click.Path(path_type=Path),
    metavar="FILE|FOLDER",
    help="Find the nearest of these texts to each text: those of a file, read as --file is, or of all .txt and .jsonl "
    "files below a folder (one a line; in the field text).",
)
@click.option("--task", metavar="NAME|FILE", help="What the answers mean, where the model does not say.")
@click.option("--as", "as_class", type=click.Choice(AS_CHOICES), help="Model class to read. Default: the checkpoint's.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Classes or neighbours of each text.")
@click.option("--max-length", type=int, help="Tokens per text. Default: what the model takes.")
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="JSON lines instead of a table.")
@click.option("--output", type=click.Path(path_type=Path), help="Write JSON lines to this file.")
@click.option("--overwrite", is_flag=True, help="Replace the output.")
@shared
def predict(
    model: str,
    as_json: bool,
    output: Path | None,
    overwrite: bool,
    debug: bool,
    threads: int | None,
    seed: int,
    **flags: Any,
) -> None:
    """Show what a model says of texts: labels, tags, answers, numbers, similarities, neighbours.

    \b
    compresskit predict --model small/ --text "Ada Lovelace lived in London"
    compresskit predict --model small/ --file reviews.csv --field review --output answers.jsonl
    """
    _check_output(output, overwrite)
    texts = _texts(flags.pop("single"), flags.pop("pairs"), flags.pop("file"))
    prepare(seed, threads)
    from compresskit.answering import answers
    from compresskit.answering.texts import from_standard_input

    with progress_bar() as progress:
        given = from_standard_input() if texts == "-" else texts
        found = answers.predict(model, given, progress=progress, **flags)
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in found.answers)
    if output is not None:
        _write(output, lines)
    if as_json:
        if not out.quiet:  # the first of several processes speaks
            click.echo(lines, nl=False)
        print_notes(found.notes, err)
        return
    if output is None:
        _print_table(found)
    print_notes(found.notes)
    if output is not None:
        out.print(f"Written to {output} ({len(found.answers):,} answers)", markup=False, soft_wrap=True)


def _texts(single: tuple[str, ...], pairs: tuple[tuple[str, str], ...], file: str | None) -> Any:
    """What was given, of which the file is not read yet; ``-`` for standard input. Raises InputError: none or two."""
    ways = [way for way, given in (("--text", single), ("--pair", pairs), ("--file", file)) if given]
    if not ways:
        raise InputError("no text: give --text TEXT, --pair FIRST SECOND or --file FILE (- for standard input)")
    if len(ways) > 1:
        raise InputError(f"give one of {' and '.join(ways)}")
    if file is not None:
        return file if file == "-" else Path(file)
    return [*single, *pairs]


def _check_output(output: Path | None, overwrite: bool) -> None:
    if output is None:
        return
    if output.is_dir() or not output.resolve().parent.is_dir():
        what = "is a folder; name a file" if output.is_dir() else "its folder does not exist"
        raise InputError(f"output {output}: {what}")
    if output.exists() and not overwrite:
        raise InputError(f"output {output}: exists; choose another with --output, or give --overwrite")


def _write(output: Path, lines: str) -> None:
    from compresskit.storage.writing import write_text

    try:
        write_text(output, lines)
    except OSError as error:
        raise InputError(f"output {output}: cannot be written: {error.strerror or error}") from None


def _print_table(found: Predicted) -> None:
    from compresskit.cli.tables import table

    rows = []
    for answer, line in zip(found.answers, found.lines, strict=True):
        texts = answer.get("texts") or [answer["text"]]
        whole = [" ".join(text) if isinstance(text, list) else text for text in texts]
        shown = [text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..." for text in whole]
        cells = ["\n".join(shown), line, *([f"{answer['cut']:,}"] if "cut" in answer else [""])]
        rows.append([escape(printable(cell)) for cell in cells])
    cut = any("cut" in answer for answer in found.answers)
    columns = ("text", "answer", *(("cut off",) if cut else ()))
    out.print(table(columns, [row[: len(columns)] for row in rows], left=(0, 1)))
