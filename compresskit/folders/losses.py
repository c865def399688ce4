"""A picture of the losses of a training."""

from __future__ import annotations

from pathlib import Path

from compresskit.folders.training import StageRecord


def loss_picture(stage: StageRecord, path: Path) -> None:
    """The loss terms over the steps, logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    names = [name for name in (stage.log[0] if stage.log else {}) if name.startswith("loss_")]
    for name in ["loss", *names] if len(names) > 1 else ["loss"]:
        points = [(entry["step"], entry[name]) for entry in stage.log if entry.get(name, 0) > 0]
        if points:
            label = "total" if name == "loss" else name.removeprefix("loss_")
            axes.plot(*zip(*points, strict=True), label=label, color="black" if name == "loss" else None)
    axes.set(xlabel="step", ylabel="loss; terms without their weights", yscale="log", title=stage.stage)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        figure.legend(loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=120)
