"""The progress bar of a training run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """Steps with the time left, the loss terms and real tokens per second."""

    def __init__(self, console: Console, what: str) -> None:
        columns = (
            TextColumn("{task.description:>12}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}"),
        )
        self.bar = Progress(*columns, console=console, transient=True)
        self.what = what
        #: Called before the bar is drawn: two live displays cannot share a terminal.
        self.before_start: Callable[[], None] = lambda: None
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar, from where the run continues."""
        if state.is_world_process_zero:
            self.before_start()
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=state.max_steps, completed=state.global_step, terms="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the newest terms."""
        if self.task is None or not logs or "loss" not in logs:
            return
        terms = [f"{name.removeprefix('loss_')} {value:.3g}" for name, value in logs.items() if name.startswith("loss")]
        speed = f"{logs['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in logs else ""
        self.bar.update(self.task, terms="  ".join([*terms, speed]))

    def close(self) -> None:
        """Remove the bar, also after an error."""
        self.bar.stop()
