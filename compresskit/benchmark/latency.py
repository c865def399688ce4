"""How fast the finished models are on the CPU, timed side by side: every round times each model once."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.benchmark import Timer

from compresskit.benchmark.records import Latency, Timing
from compresskit.model.inputs import fitted
from compresskit.model.positions import shortened
from compresskit.progress import Progress
from compresskit.tasks.predicting import Runnable

#: Sequences at a time; the first one is the table's ``latency``.
BATCHES = (1, 32)
TOKENS = 128
#: Seconds that one timing of one model takes at least.
LEAST = 0.05


def time_models(
    models: Mapping[str, Runnable], dense: Mapping[str, str], phase: str, rounds: int, progress: Progress
) -> dict[str, Latency]:
    """Time every model on full sequences of random words.

    Args:
        models: by name, in eval mode; ONNX Runtime's among them.
        dense: name of a model -> name of the dense one it is compared with.
        phase: name of this phase, for the record.
        rounds: how often each is timed; the speed-up is the median of the rounds' own ratios.
    """
    seconds: dict[tuple[str, int], list[float]] = {}
    timers = {(name, size): _timer(model, size) for size in BATCHES for name, model in models.items()}
    repeats = {}
    for done, (which, timer) in enumerate(timers.items()):
        timer.timeit(1)  # the first pass allocates
        repeats[which] = max(1, round(LEAST / timer.timeit(1).mean))
        progress("warming up", done + 1, len(timers))
    for done in range(rounds):
        for which, timer in timers.items():
            seconds.setdefault(which, []).append(timer.timeit(repeats[which]).mean)
        progress("timing", done + 1, rounds)
    return {
        name: Latency(
            phase=phase,
            tokens=shortened(models[name], TOKENS),
            threads=torch.get_num_threads(),
            device=str(models[name].device),
            rounds=rounds,
            batches={str(size): timing(seconds[name, size], seconds[dense[name], size]) for size in BATCHES},
        )
        for name in models
    }


def _timer(model: Runnable, size: int) -> Timer:
    # Timer runs with one thread unless told.
    threads = torch.get_num_threads()
    return Timer("forward(model, batch)", globals=_names(model, size), num_threads=threads)


def _names(model: Runnable, size: int) -> dict[str, Any]:
    return {"forward": forward, "model": model, "batch": _batch(model, size)}


def _batch(model: Runnable, size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(5, model.config.vocab_size, (size, shortened(model, TOKENS)), generator=generator)
    words = words.to(model.device)
    return fitted(model, {"input_ids": words, "attention_mask": torch.ones_like(words)})


def forward(model: Runnable, batch: Mapping[str, torch.Tensor]) -> None:
    """One pass."""
    with torch.inference_mode():
        model(**batch)


def timing(ours: list[float], dense: list[float]) -> Timing:
    """The figures of one model from its seconds and the dense model's, round by round."""
    milliseconds = 1e3 * np.array(ours)
    low, middle, high = np.percentile(milliseconds, [25, 50, 75])
    ratios = np.array(dense) / np.array(ours)
    return Timing(milliseconds=float(middle), spread=float(high - low), speedup=float(np.median(ratios)))


def load_and_measure(load: Callable[[], Runnable]) -> tuple[Runnable, float | None]:
    """A model, and the MB that it and a forward pass of the largest batch add to this process; None if not known.

    On Linux the high-water mark of resident memory is reset once the model is loaded, and read after the pass. What a
    library sets up at its first pass is not counted: a first, small pass runs before.
    """
    _give_back()
    before = _status("VmRSS")
    model = load()
    forward(model, _batch(model, 1))
    _give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return model, None
    forward(model, _batch(model, BATCHES[-1]))
    peak = _status("VmHWM")
    return model, None if peak is None or before is None else (peak - before) * 1024 / 1e6


def _give_back() -> None:
    """Free memory goes back to the system, so that it is not counted as the next model's."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int | None:
    """A field of /proc/self/status in kB."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
    return None
