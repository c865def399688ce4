"""What the bar of a training says of the time."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from compresskit.cli import training_bar
from compresskit.cli.training_bar import WARM, ProgressBar


@pytest.mark.parametrize(
    ("steps", "said"), [(1_000, ["distilling: about 50 min for 1,000 steps, by steps 6 to 9"]), (17, [])]
)
def test_the_time_of_all_steps_is_said_once(monkeypatch: pytest.MonkeyPatch, steps: int, said: list[str]) -> None:
    clock = [0.0]
    monkeypatch.setattr(training_bar.time, "monotonic", lambda: clock[0])
    stream = io.StringIO()
    bar = ProgressBar(Console(file=stream, width=160), "distilling")
    state = SimpleNamespace(is_world_process_zero=True, max_steps=steps, global_step=0)
    bar.on_train_begin(None, state, None)
    for step in range(1, min(steps, 40)):
        clock[0] += 60.0 if step <= WARM else 3.0  # the first steps do not count
        state.global_step = step
        bar.on_step_end(None, state, None)
    bar.close()
    assert stream.getvalue().splitlines() == said
