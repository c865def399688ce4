"""``export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from compresskit.cli.common import err, out, prepare, print_notes


class _Format(click.Option):
    """``--format``: the formats, those of other packages too, are looked up when the help is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from compresskit.exporting.format import FORMATS

        self.help = "; ".join(f"{name}: {form.summary}" for name, form in FORMATS.all().items()) + "."
        return super().get_help_record(ctx)


@click.command()
@click.argument("folder", metavar="FOLDER|HUB_ID")
@click.option(
    "--format",
    "format_",
    cls=_Format,
    metavar="NAME",
    default="onnx",
    show_default=True,
)
@click.option("--output", type=click.Path(path_type=Path), help="Folder to write. Default: <folder>-<format>.")
@click.option("--overwrite", is_flag=True, help="Replace an output that compresskit wrote.")
@click.option("--opset", type=int, help="ONNX operator set, 18 to 25. Default: 20; 23 for onnxruntime.")
@click.option(
    "--runtime",
    metavar="any|onnxruntime",
    help="What an ONNX graph is for. onnxruntime: faster there, unreadable elsewhere. Default: any.",
)
@click.option(
    "--layout",
    metavar="plain|hub",
    help="Where an ONNX graph lies. hub: in onnx/, where transformers.js looks for it. Default: plain.",
)
@click.option("--threads", type=click.IntRange(1, 256), help="CPU threads. Default: all.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def export(folder: str, format_: str, output: Path | None, threads: int | None, debug: bool, **options: Any) -> None:
    """Write a compressed model for another runtime: ONNX, where factors stay factors, or an ordinary checkpoint."""
    prepare(0, threads)
    from compresskit.cli.tables import table
    from compresskit.exporting.exported import export as write

    target = output or Path(f"{Path(folder).resolve().name}-{format_}")
    with err.status(f"writing {format_}"):
        done = write(folder, output=target, format=format_, **options)
    rows = [
        (name, f"{found['largest difference']:.2g}", f"{found['relative error']:.2g}")
        for name, found in done.record["agreement"].items()
    ]
    if rows:
        out.print(table(("output", "largest difference", "relative error"), rows, left=(0,), title="against torch"))
    print_notes(done.notes)
    megabytes = done.record["megabytes"]
    line = f"{megabytes['exported']:.2f} MB; compressed checkpoint {megabytes['compressed']:.2f} MB"
    if megabytes["original"]:
        ratio = megabytes["original"] / megabytes["exported"]
        line += f"; before compression {megabytes['original']:.2f} MB, {ratio:.1f}x as much"
    out.print(line, highlight=False, soft_wrap=True)
    out.print(f"Written to {done.folder}/ (model, config.json, tokenizer, export.json)", markup=False, soft_wrap=True)
