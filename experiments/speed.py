"""How fast factorised layers, whole models and training steps are, against dense ones, their FLOPs and other packages.

Run: python experiments/speed.py    (`make bench-speed` runs the programs beside it too)
Writes README.md, layers.json, trains.json, models.json, training.json and speed.png into reports/speed/. Other packages
are compared where they are installed (pip install '.[experiments]'). Run it on an idle machine only: every figure is a
ratio taken side by side, but a busy core distorts those too.
"""

from __future__ import annotations

import argparse
import json

from speed_layers import layers, tensor_trains
from speed_models import models, training
from speed_report import goals, report
from timing import REPORT

from compresskit.markup import markdown

#: Every part with the function that measures it.
PARTS = {"layers": layers, "trains": tensor_trains, "models": models, "training": training}


def main() -> None:
    """All parts, or some of them, then the report from what is there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="measured anew; the others as they are"
    )
    arguments = parser.parse_args()
    REPORT.mkdir(parents=True, exist_ok=True)
    for part in arguments.parts:
        found = PARTS[part](arguments.rounds)
        (REPORT / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")
    parts = {part: json.loads((REPORT / f"{part}.json").read_text()) for part in PARTS}
    report(parts)
    print(markdown(("what", "goal", "measured", ""), goals(parts)))


if __name__ == "__main__":
    main()
