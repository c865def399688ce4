"""The progress of a training run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column
from transformers import TrainerCallback

#: Seconds between two lines where there is no terminal, and until the first one.
INTERVAL, FIRST = 60.0, 15.0
#: The first steps are slower: from those behind them, once they took so many seconds, the time of all is estimated.
WARM, MEASURED = 5, 10.0


class ProgressBar(TrainerCallback):
    """Steps with the time left, the loss terms and real tokens per second; and a line that stays, with the time that
    all steps will take, once that was measured.
    """

    def __init__(self, console: Console, what: str) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        )
        self.bar = Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal)
        self.console = console
        self.what = what
        self.task: Any = None
        self.warm_since: float | None = None
        self.time_said = False
        self.first_step = 0
        self.started = self.printed = time.monotonic()
        #: Called before the bar is drawn: two live displays cannot share a terminal.
        self.before_start: Callable[[], None] = lambda: None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Draw the bar, from where the run continues."""
        self.before_start()
        if state.is_world_process_zero:
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=state.max_steps, completed=state.global_step, terms="")
            self.first_step = state.global_step
            self.started = time.monotonic()
            self.printed = self.started - INTERVAL + FIRST

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """One step further."""
        if self.task is not None:
            self.bar.update(self.task, completed=state.global_step)
            self._say_time(state.global_step - self.first_step, state.max_steps - self.first_step)

    def _say_time(self, done: int, steps: int) -> None:
        """Once, as soon as enough steps were measured: about how long all of them will take, unless most are done."""
        now = time.monotonic()
        if done == WARM:
            self.warm_since = now
        if self.time_said or self.warm_since is None or done <= WARM or now - self.warm_since < MEASURED:
            return
        self.time_said = True
        if 2 * done > steps:
            return
        whole = (now - self.warm_since) / (done - WARM) * steps
        says = f"{whole / 60:.0f} min" if whole >= 90 else f"{whole:.0f} s"
        line = f"{self.what}: about {says} for {steps:,} steps, by steps {WARM + 1} to {done}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show the newest terms."""
        if self.task is None or not logs or "loss" not in logs:
            return
        terms = [f"{name.removeprefix('loss_')} {value:.3g}" for name, value in logs.items() if name.startswith("loss")]
        text = "  ".join([*terms, f"{logs.get('tokens_per_second', 0):,.0f} tokens/s"])
        self.bar.update(self.task, terms=text)
        now = time.monotonic()
        if not self.console.is_terminal and now - self.printed >= INTERVAL:
            self.printed = now
            left = (now - self.started) / (state.global_step - self.first_step) * (state.max_steps - state.global_step)
            time_left = f"{left / 60:.0f} min" if left >= 60 else f"{left:.0f} s"
            line = f"{self.what}: step {state.global_step:,} of {state.max_steps:,}  {text}  {time_left} left"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar, also after an error."""
        if self.task is not None and self.console.is_terminal:
            self.bar.stop()
