"""The command: ``compresskit``, ``python -m compresskit``."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Entry point. An interrupt while modules are still loading ends quietly too: nothing was begun."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from compresskit.cli import main as run

    run()


def _leave(*_: object) -> None:
    sys.stderr.write("compresskit: interrupted, nothing half-written\n")
    sys.stderr.flush()
    os._exit(130)  # not by an exception: a module that is half imported may swallow it


if __name__ == "__main__":
    main()
