"""What calibration and least error are worth after the same short training: every method three ways, and `auto`.

Run: python benchmarks/calibration.py --text FILE [--ratios 8 19] [--threads 1]
Writes a benchmark's report into reports/minilm-calibration/; a stopped run continues.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import transformers

import compresskit
from compresskit.benchmark.runner import Watcher
from compresskit.planning.recipe import for_method

METHODS = ("kronecker", "low-rank", "tensor-train", "tucker")
#: Of the text, to calibrate on.
TOKENS = 65_536
OUTPUT = Path(__file__).resolve().parents[1] / "reports" / "minilm-calibration"


class Lines(Watcher):
    """One line for every cell."""

    def finished(self, cell: object, record: object) -> None:
        print(cell, getattr(record, "status", ""), getattr(record, "score", ""), flush=True)


def main() -> None:
    """Write the recipes that differ from plain methods, run the grid."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--text", required=True, help="general text: to calibrate, to train, and held out to compare")
    parser.add_argument("--ratios", type=float, nargs="+", default=[8.0, 19.0])
    parser.add_argument("--threads", type=int, help="default: all")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        names = []
        for method in METHODS:
            for suffix, allocation, tokens in (("calibrated", "uniform", TOKENS), ("least-error", "error", TOKENS)):
                recipe = for_method(method, options.ratios[0], allocation, calibration_tokens=tokens)
                path = Path(folder) / f"{method}-{suffix}.yaml"
                path.write_text(recipe.model_copy(update={"name": path.stem}).to_yaml(), encoding="utf-8")
                names.append(str(path))
        auto = Path(folder) / "auto-calibrated.yaml"
        recipe = for_method("auto", options.ratios[0], calibration_tokens=TOKENS)
        auto.write_text(recipe.model_copy(update={"name": auto.stem}).to_yaml(), encoding="utf-8")
        compresskit.bench(
            name="minilm-calibration",
            methods=(*METHODS, *names, str(auto)),
            ratios=tuple(options.ratios),
            baselines=("dense",),
            text=options.text,
            output=OUTPUT,
            watcher=Lines(),
        )


if __name__ == "__main__":
    main()
