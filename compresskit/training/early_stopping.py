"""Stop a training once a task's dev rows show no progress, and go back to where they were answered best."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import TrainerState

#: Entry of the Trainer's log that holds the primary metric on dev.
SCORE = "dev_score"


class EarlyStopping(TrainerCallback):
    """Scores the model every so many steps and after the last one, and keeps a checkpoint of the best score.

    All that it decides by lies in the state that checkpoints hold, so that a resumed run stops where the other would
    have.

    Args:
        score: the primary metric of a model, higher is better.
        every: steps between two scores.
        patience: so many scores in a row that are not above the best one end the training.
    """

    def __init__(self, score: Callable[[PreTrainedModel], float], every: int, patience: int) -> None:
        self.score = score
        self.every = every
        self.patience = patience

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: Any = None, **_: Any) -> None:
        """Score, where it is time to."""
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        value = self.score(model)
        state.log_history.append({"step": state.global_step, SCORE: value})
        if state.best_metric is None or value > state.best_metric:
            state.best_metric, state.best_global_step = value, state.global_step
        control.should_save = True
        if self.is_over(state):
            control.should_training_stop = control.should_log = True

    def is_over(self, state: TrainerState) -> bool:
        """Whether patience is at its end."""
        steps = [entry["step"] for entry in scores(state.log_history)]
        return sum(step > (state.best_global_step or 0) for step in steps) >= self.patience


def scores(log: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Of a log the entries with a score: ``step`` and ``dev_score``."""
    return [{"step": entry["step"], SCORE: entry[SCORE]} for entry in log if SCORE in entry]
