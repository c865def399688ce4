"""The report on speed: README.md with its tables and goals, and the picture. speed.py measures."""

from __future__ import annotations

from typing import Any

import matplotlib
import torch
from speed_layers import PEERS
from speed_models import RATIO
from timing import REPORT, made_on

from compresskit.markup import markdown

matplotlib.use("agg")
from matplotlib import pyplot as plt

#: What was measured, by part: one list of rows each.
Parts = dict[str, list[dict[str, Any]]]
#: Share of the bound that the forward pass is to reach: printed shapes, and all mirrored ones.
GOALS = {"_8 attention": 0.5, "_8 FFN": 0.5, "_21 attention": 0.4, "_21 FFN": 0.6}
MIRRORED = 0.65


def goals(parts: Parts) -> list[list[str]]:
    """Every goal with what was measured."""
    rows = []
    forward = [row for row in parts["layers"] if row["pass"] == "forward" and row["threads"] == 1]
    for row in (row for row in forward if row["tokens"] in PEERS):
        goal = MIRRORED if row["mirrored"] else GOALS[row["name"]]
        fastest = min(value for name, value in row["milliseconds"].items() if name not in ("ours", "dense"))
        ours = row["milliseconds"]["ours"]
        what = f"{row['name']}, {row['shape']}, {row['tokens']} tokens"
        rows.append([what, f">= {goal:.0%} of the bound", f"{row['share']:.0%}", _met(row["share"] >= goal)])
        rows.append([what, "no slower than the fastest peer", f"{fastest / ours:.2f}x as fast", _met(ours <= fastest)])
    for row in (row for row in parts["layers"] if row["pass"] == "training"):
        ours = row["milliseconds"]["ours"]
        fastest = min(value for name, value in row["milliseconds"].items() if name not in ("ours", "dense"))
        what = f"{row['name']}, {row['shape']}, {row['tokens']} tokens, forward + backward"
        dense = row["milliseconds"]["dense"] / ours
        if not row["name"].startswith("_8 attention"):  # the goal is for 3x fewer FLOPs, this has 2x
            rows.append([what, "faster than dense", f"{dense:.2f}x", _met(dense > 1)])
        rows.append([what, "no slower than the fastest peer", f"{fastest / ours:.2f}x as fast", _met(ours <= fastest)])
    for row in parts["models"]:
        goal = {1: 6.0, 16: 5.0}[row["batch"]]
        if row["model"] == "kroneckerbert-21-fast" and row["threads"] == 1:
            what = f"BERT_BASE, {row['model']}, {row['batch']}x128, one thread"
            rows.append([what, f">= {goal:g}x dense", f"{row['speedup']:.2f}x", _met(row["speedup"] >= goal)])
    for row in parts["training"]:
        if row["model"] != "dense":
            threads = {1: "one thread", 2: "two threads"}[row["threads"]]
            what = f"training step, {row['model']} {RATIO}x, {row['batch']}x{row['tokens']}, {threads}"
            rows.append([what, "<= 0.6 of the dense step", f"{row['share']:.2f}", _met(row["share"] <= 0.6)])
    return rows


def _met(condition: bool) -> str:
    return "met" if condition else "**not met**"


def _tables(parts: Parts) -> dict[str, str]:
    """The table of every part as Markdown."""
    names = list(dict.fromkeys(name for row in parts["layers"] for name in row["milliseconds"]))
    layer_rows = [
        [
            row["name"], row["shape"], row["pass"], str(row["tokens"]), str(row["threads"]),
            *(f"{row['milliseconds'][n]:.2f}" if n in row["milliseconds"] else "" for n in names),
            f"{1e3 * row['bound']:.2f}" if "bound" in row else "", f"{row['share']:.0%}" if "share" in row else "",
        ]
        for row in parts["layers"]
    ]  # fmt: skip
    model_rows = [
        [
            row["model"], f"{row['batch']}x128", str(row["threads"]),
            f"{row['milliseconds']:.1f} ± {row['spread']:.1f}",
            f"{row['flops_ratio']:.1f}x", f"{row['speedup']:.2f}x", f"{row['bound']:.1f}x" if row["bound"] else "",
        ]
        for row in parts["models"]
    ]  # fmt: skip
    training_rows = [
        [
            row["model"], f"{row['batch']}x{row['tokens']}", str(row["threads"]),
            f"{row['milliseconds']:.1f} ± {row['spread']:.1f}", f"{row['share']:.2f}",
        ]
        for row in parts["training"]
    ]  # fmt: skip
    train_rows = [
        [row["layer"], f"{row['parameters']:,}", str(row["tokens"]), f"{row['milliseconds']:.2f}"]
        for row in parts["trains"]
    ]
    return {
        "layers": markdown(
            ("layer", "shape", "pass", "tokens", "threads", *names, "bound", "share of bound"), layer_rows
        ),
        "models": markdown(("model", "batch", "threads", "ms", "fewer FLOPs", "speedup", "bound"), model_rows),
        "training": markdown(("model", "batch", "threads", "ms", "share"), training_rows),
        "trains": markdown(("layer", "parameters", "tokens", "ms"), train_rows),
    }


def report(parts: Parts) -> None:
    """README.md and the picture."""
    tables = _tables(parts)
    gpu = (
        "A GPU was there but is not used"
        if torch.cuda.is_available()
        else "No GPU was there: nothing is known about one"
    )
    text = [
        "# Speed", "",
        "`make bench-speed`. Medians over rounds in which every candidate had its turn. Bound: FLOPs of the cheaper",
        f"order / the rate of a 2048x768x768 matrix product in the same rounds. {gpu}.",
        "See also [compression](compression.md), [memory](memory.md), [the cost model](contraction.md) and",
        "[where layers lose that a peer computes faster](profile.md).", "",
        "## Goals", "", markdown(("what", "goal", "measured", ""), goals(parts)), "",
        "![Whole models: speed-up against FLOPs](speed.png)", "",
        "## Whole models, BERT_BASE", "",
        "Bound: t(dense) / (t(without linear layers) + t(linear layers) / ratio of their FLOPs).", "",
        tables["models"], "",
        "## Training steps, embedded checkpoint", "",
        "Forward with all hidden states, backward, AdamW; share: of the dense model's step.", "",
        tables["training"], "",
        "## Tensor trains", "", "768x768, one thread, forward.", "",
        tables["trains"], "",
        "## Layers", "", "Milliseconds; training: forward + backward.", "",
        tables["layers"], "",
        made_on(),
    ]  # fmt: skip
    (REPORT / "README.md").write_text("\n".join(text), encoding="utf-8")
    _picture(parts)


def _picture(parts: Parts) -> None:
    """Speed-up of whole models on one thread against how many times fewer FLOPs they take."""
    figure, axis = plt.subplots(figsize=(7.5, 5), layout="constrained")
    shown = [row for row in parts["models"] if row["threads"] == 1 and row["bound"]]
    for batch, marker in ((1, "o"), (16, "s")):
        mine = sorted((row for row in shown if row["batch"] == batch), key=lambda row: row["flops_ratio"])
        ratios = [row["flops_ratio"] for row in mine]
        points = axis.plot(ratios, [row["speedup"] for row in mine], marker, label=f"measured, {batch}x128")
        axis.plot(
            ratios, [row["bound"] for row in mine], "_", color=points[0].get_color(), label=f"bound, {batch}x128",
            markersize=14,
        )  # fmt: skip
        if batch == 1:
            for row in mine:
                axis.annotate(
                    row["model"], (row["flops_ratio"], row["speedup"]), fontsize=7, xytext=(4, -9),
                    textcoords="offset points",
                )  # fmt: skip
    axis.margins(x=0.2)  # room for names
    axis.set(xlabel="fewer FLOPs than dense", ylabel="times faster than dense", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(REPORT / "speed.png", dpi=130)
