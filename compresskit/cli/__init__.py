"""The command line: parses, calls, prints. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper

import click

from compresskit import __version__
from compresskit.cli.bench import bench, report
from compresskit.cli.common import err, printable
from compresskit.cli.compress import compress, inspect, methods
from compresskit.cli.export import export
from compresskit.cli.predict import predict
from compresskit.cli.push import push
from compresskit.cli.shrink import shrink
from compresskit.cli.train import distill, evaluate, finetune, tasks
from compresskit.cli.trim import trim
from compresskit.cli.verify import verify
from compresskit.errors import CompresskitError, InputError, is_panic

INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="compresskit")
def cli() -> None:
    """Make a BERT-style checkpoint 5, 10, 20 times smaller, as a folder that transformers loads.

    \b
    compresskit shrink --task sst2 --data GLUE --ratio 19 --output small/
    compresskit compress --method kronecker --ratio 19       # the embedded checkpoint, no network
    compresskit compress --model google-bert/bert-base-uncased --recipe kroneckerbert-21 --output small/
    compresskit distill --teacher google-bert/bert-base-uncased --student small/ --output general/
    """


for command in (
    shrink,
    compress,
    trim,
    distill,
    finetune,
    evaluate,
    predict,
    export,
    push,
    bench,
    report,
    verify,
    inspect,
    methods,
    tasks,
):
    cli.add_command(command)


def main() -> None:
    """Entry point: turns errors into one line and an exit code (0, 1, 2, 130)."""
    debug = "--debug" in sys.argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a console cannot show is replaced, not an error after the work
            stream.reconfigure(errors="replace")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        if debug:
            raise
        err.print(
            "compresskit: interrupted, nothing half-written",
            style="bold red",
        )
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away (`| head`): no message about it either
        sys.exit(1)
    except BaseException as error:
        if debug or not (isinstance(error, Exception) or is_panic(error)):
            raise
        expected = isinstance(error, CompresskitError)
        rank = os.environ.get("RANK", "0")
        if rank != "0" and not isinstance(error, InputError):  # what is refused is refused by all, and said once
            err.quiet = False
            err.print(f"process {rank}:", end=" ")
        text = printable(str(error) if expected else f"{type(error).__name__}: {error} (--debug shows where)")
        err.print(f"compresskit: error: {text}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code if isinstance(error, CompresskitError) else 1)
