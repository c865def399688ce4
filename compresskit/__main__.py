"""The command: ``compresskit``, ``python -m compresskit``."""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Entry point. Until a command begins (``cli.common.begin``) an interrupt ends the process at once."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    from compresskit.cli import main as run

    run()


def _leave(*_: object) -> None:
    os.write(2, b"compresskit: interrupted, nothing half-written\n")
    os._exit(130)  # not by an exception: a module that is half imported may swallow it or make another of it


if __name__ == "__main__":
    main()
