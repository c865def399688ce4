"""``python -m compresskit``."""

from compresskit.cli import main

main()
