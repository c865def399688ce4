"""How good the cost model of Kronecker layers is: every way is timed, its pick compared with the fastest, and its
constants fitted to the times of this machine.

Run: python experiments/contraction.py    (a minute on an idle machine)
Writes contraction.md and contraction.json into reports/speed/. To take over fitted constants, write them into
compresskit/decomposers/kronecker/contraction.py: nothing is tuned at import.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares
from timing import REPORT, made_on, side_by_side
from torch.nn import functional as F

from compresskit.decomposers.kronecker import contraction as model
from compresskit.decomposers.kronecker.layers import sum_of_products
from compresskit.markup import markdown

#: (m1, n1, m2, n2, terms): the paper's layers and mirrors, what the planner offers for MiniLM, and sums of terms.
SHAPES = [
    (384, 384, 2, 2, 1), (2, 2, 384, 384, 1), (8, 2, 384, 384, 1), (384, 384, 8, 2, 1), (384, 48, 2, 16, 1),
    (2, 16, 384, 48, 1), (16, 2, 192, 384, 1), (192, 384, 16, 2, 1), (4, 4, 96, 96, 1), (96, 96, 4, 4, 2),
    (16, 384, 24, 1, 1), (384, 12, 1, 32, 2), (48, 384, 32, 1, 1), (12, 24, 32, 16, 4), (64, 48, 6, 8, 3),
]  # fmt: skip
TOKENS = (16, 128, 512, 2048)
#: What is fitted; the others say where a cost begins, not how large it is.
CONSTANTS = ("_MOVE", "_TRANSPOSE", "_SHORT_RESULT", "_CALL")


class Case(NamedTuple):
    """One shape at one number of tokens: milliseconds of every way."""

    shape: tuple[int, ...]
    tokens: int
    milliseconds: dict[str, float]


def main() -> None:
    """Measure, fit, write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=5)
    rounds = arguments.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = [case(shape, tokens, rounds) for shape in SHAPES for tokens in TOKENS]
    unit = flop_milliseconds(rounds)
    committed = {name: float(getattr(model, name)) for name in CONSTANTS}
    fitted = fit(cases, unit, committed)
    rows = [(name, f"{committed[name]:g}", f"{fitted[name]:.3g}") for name in CONSTANTS]
    losses = {what: picks(cases, constants) for what, constants in (("committed", committed), ("fitted", fitted))}
    heads = ("constants", "fastest picked", "mean loss", "median loss", "largest loss")
    text = f"""# The cost model of Kronecker layers

`python experiments/contraction.py`: {len(cases)} cases ({len(SHAPES)} shapes, {", ".join(map(str, TOKENS))} tokens),
one thread, forward, float32, {rounds} rounds. Every way of `compresskit/decomposers/kronecker/contraction.py` was timed
side by side with the others; loss: time of the way that the model picks over the time of the fastest one, less 1. The
fit sees the cases that it is judged by.

{markdown(heads, [_row(*x) for x in losses.items()])}

{markdown(("constant, in a large GEMM's FLOPs", "committed", "fitted here"), rows)}

Where the committed constants lose most:

{markdown(("A (x) B", "terms", "tokens", "picked", "ms", "fastest", "ms"), worst(cases, committed))}

{made_on()}"""
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "contraction.md").write_text(text, encoding="utf-8")
    data = {"unit_ms_per_flop": unit, "fitted": fitted, "cases": [c._asdict() for c in cases]}
    (REPORT / "contraction.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(text)


def case(shape: tuple[int, ...], tokens: int, rounds: int) -> Case:
    """Times of every way, named ``order batched``."""
    m1, n1, m2, n2, terms = shape
    a, b, x = torch.randn(terms, m1, n1), torch.randn(terms, m2, n2), torch.randn(tokens, n1 * n2)
    runs: dict[str, Any] = {}
    for way in model.contractions(*shape, tokens):
        product = (
            (lambda: F.linear(x, sum_of_products(a, b)))
            if way.order == "form"
            else partial(model.multiply, x, a, b, way)
        )
        runs[_name(way)] = product
    with torch.inference_mode():
        times = side_by_side(runs, rounds, least=0.005)
    return Case(shape, tokens, {name: 1000 * time.median for name, time in times.items()})


def flop_milliseconds(rounds: int) -> float:
    """Of one FLOP in a large matrix product."""
    x, weight = torch.randn(2048, 768), torch.randn(768, 768)
    time = side_by_side({"product": lambda: F.linear(x, weight)}, 4 * rounds)["product"]
    return 1000 * time.median / (2 * 2048 * 768 * 768)


def costs(case_: Case, constants: dict[str, float]) -> dict[str, float]:
    """What the model says of every way, with other constants."""
    before = {name: getattr(model, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(model, name, value)
        return {_name(way): way.cost for way in model.contractions.__wrapped__(*case_.shape, case_.tokens)}
    finally:
        for name, value in before.items():
            setattr(model, name, value)


def fit(cases: Sequence[Case], unit: float, start: dict[str, float]) -> dict[str, float]:
    """The constants with the least squared logarithm of estimated over measured time; large misses count less."""

    def residuals(logs: np.ndarray) -> list[float]:
        constants = dict(zip(start, np.exp(logs).tolist(), strict=True))
        return [
            float(np.log(cost * unit / case_.milliseconds[name]))
            for case_ in cases
            for name, cost in costs(case_, constants).items()
        ]

    found = least_squares(residuals, np.log(list(start.values())), loss="soft_l1")
    return dict(zip(start, np.exp(found.x).tolist(), strict=True))


def pick(case_: Case, constants: dict[str, float]) -> str:
    """The way that the model takes."""
    found = costs(case_, constants)
    return min(found, key=lambda name: found[name])


def picks(cases: Sequence[Case], constants: dict[str, float]) -> list[float]:
    """The loss of every case."""
    return [c.milliseconds[pick(c, constants)] / min(c.milliseconds.values()) - 1 for c in cases]


def worst(cases: Sequence[Case], constants: dict[str, float], count: int = 8) -> list[tuple[str, ...]]:
    """Rows of the cases with the largest losses."""
    losses = np.array(picks(cases, constants))
    order = [index for index in np.argsort(losses)[::-1][:count] if losses[index] > 0]
    rows = []
    for case_ in (cases[index] for index in order):
        m1, n1, m2, n2, terms = case_.shape
        mine, fastest = pick(case_, constants), min(case_.milliseconds, key=lambda name: case_.milliseconds[name])
        words = (mine, f"{case_.milliseconds[mine]:.3f}", fastest, f"{case_.milliseconds[fastest]:.3f}")
        rows.append((f"{m1}x{n1} (x) {m2}x{n2}", str(terms), str(case_.tokens), *words))
    return rows


def _row(what: str, losses: list[float]) -> tuple[str, ...]:
    share = sum(loss == 0 for loss in losses) / len(losses)
    figures = (np.mean(losses), np.median(losses), np.max(losses))
    return (what, f"{share:.0%}", *(f"{figure:.1%}" for figure in figures))


def _name(way: model.Contraction) -> str:
    return f"{way.order}, {way.batched} by token" if way.batched else way.order


if __name__ == "__main__":
    main()
