"""Where the time goes in the layers that are slower than the fastest peer by layers.json: torch's profiler on both.

Run: python experiments/profile_layers.py    (after speed.py; half a minute on an idle machine)
Writes profile.md into reports/speed/.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from speed_layers import Module, peers
from timing import REPORT, made_on
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from compresskit.decomposers.kronecker import KroneckerLinear
from compresskit.markup import markdown

CALLS = 300
#: torch's names of operations, as a reader knows them.
KINDS = {
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::bmm": "batched products",
    "aten::copy_": "copies",
    "aten::add_": "sums of gradients",
    "aten::sum": "sums of gradients",
}
COLUMNS = tuple(dict.fromkeys(KINDS.values()))


def main() -> None:
    """Profile and write."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = json.loads((REPORT / "layers.json").read_text(encoding="utf-8"))
    rows = [row for measurement in measured for row in compared(measurement)]
    text = f"""# Layers that a peer computes faster

`python experiments/profile_layers.py`: every case of [the report](README.md) in which the fastest peer is ahead,
{CALLS} calls of each under torch's profiler, one thread. Microseconds per call by kind of operation; the rest is views
and the dispatcher, which the profiler itself makes longer.

{markdown(("A (x) B", "tokens", "pass", "", "report, ms", *COLUMNS, "rest"), rows)}

{made_on()}"""
    (REPORT / "profile.md").write_text(text, encoding="utf-8")
    print(text)


def compared(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of one case, ours and the fastest peer's; none where there is no faster one."""
    others = {name: ms for name, ms in row["milliseconds"].items() if name not in ("ours", "dense")}
    fastest = min(others, key=others.__getitem__, default=None)
    if fastest is None or row["threads"] != 1 or others[fastest] >= row["milliseconds"]["ours"]:
        return []
    (m1, n1), (m2, n2) = (map(int, shape.split("x")) for shape in row["shape"].split(" (x) "))
    layer = KroneckerLinear((m1, n1), (m2, n2), terms=1, bias=False)
    nn.init.normal_(layer.a)
    nn.init.normal_(layer.b)
    training = row["pass"] == "training"
    a, b = (nn.Parameter(factor.detach()[0].clone(), requires_grad=training) for factor in (layer.a, layer.b))
    x = torch.randn(row["tokens"], n1 * n2, requires_grad=training)
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": partial(layer, x),
        fastest: partial(Module(peers(a, b)[fastest]), x),
    }
    gradient = torch.randn(row["tokens"], m1 * m2)
    passes = "forward + backward" if training else "forward"
    head = (row["shape"], str(row["tokens"]), passes)
    return [
        (*head, name, f"{row['milliseconds'][name]:.3f}", *shares(run, gradient if training else None))
        for name, run in runs.items()
    ]


def shares(run: Callable[[], Tensor], gradient: Tensor | None) -> list[str]:
    """Microseconds per call of every kind of operation."""

    def once() -> None:
        if gradient is None:
            with torch.inference_mode():
                run()
        else:
            run().backward(gradient)

    for _ in range(20):
        once()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(CALLS):
            once()
    kinds = dict.fromkeys((*COLUMNS, "rest"), 0.0)
    for entry in found.key_averages():
        kinds[KINDS.get(entry.key, "rest")] += entry.self_cpu_time_total / CALLS
    return [f"{time:.0f}" for time in kinds.values()]


if __name__ == "__main__":
    main()
