"""How fast distillation runs: a plain Trainer loop against compresskit's, same model, losses, data and batch size.

Run: python benchmarks/distill.py --data DIR       (DIR holds SST-2/train.tsv)
Writes README.md and results.json into reports/distill-speed/.

Plain: texts padded to 128 tokens, eager attention, every loss written down as in a tutorial. Ours: DistillationTrainer.
Both compare attention maps of every layer; eager attention gives probabilities, ours the scores before the softmax.
Both start from the embedded checkpoint and its 19x low-rank student. Rounds alternate, each in a process of its own;
speed is real (non-padding) tokens per second after five warm-up steps, memory the peak resident size of the process.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "reports" / "distill-speed"
WARM_UP, STEPS = 5, 30
BATCH, LENGTH = 32, 128
#: Every loss, and all but attention maps.
LOSSES = {
    "all losses": {"embedding": 1, "attention": 1, "hidden": 1, "logits": 1, "supervised": 1},
    "no attention": {"embedding": 1, "attention": 0, "hidden": 1, "logits": 1, "supervised": 1},
}


def measure(which: str, data: Path, losses: dict[str, float], threads: int) -> dict[str, float]:
    """Tokens per second and peak memory of one loop, in this process."""
    import torch
    import transformers

    import compresskit
    from compresskit.model import demo
    from compresskit.tasks.encoding import encode
    from compresskit.tasks.task import load_data, load_task

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.folder())
    teacher = transformers.AutoModelForSequenceClassification.from_pretrained(demo.folder(), num_labels=2)
    student = compresskit.compress(teacher, method="low-rank", ratio=19)
    task = load_task("sst2")
    rows = load_data(task, data)
    dataset = encode(task, rows.splits["train"], tokenizer, LENGTH, {"negative": 0, "positive": 1})

    class Clock(transformers.TrainerCallback):
        """Real tokens and seconds after the warm-up."""

        tokens, started = 0, 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM_UP:
                Clock.tokens, Clock.started = 0, time.perf_counter()

    run = plain if which == "plain" else ours
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=WARM_UP + STEPS,
            learning_rate=5e-4,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = run(student, teacher, tokenizer, dataset, losses, arguments, Clock())
        forward = student.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            Clock.tokens += int(kwargs["attention_mask"].sum())
            return forward(*args, **kwargs)

        counted.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        student.forward = counted
        trainer.train()
        seconds = time.perf_counter() - Clock.started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"tokens_per_second": Clock.tokens / seconds, "peak_megabytes": peak}


def ours(student: Any, teacher: Any, tokenizer: Any, dataset: Any, losses: Any, arguments: Any, clock: Any) -> Any:
    """Compresskit's loop."""
    import transformers

    from compresskit import DistillationTrainer
    from compresskit.planning.stage import Stage

    return DistillationTrainer(
        student,
        teacher,
        stage=Stage(losses=losses),
        args=arguments,
        train_dataset=dataset,
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        callbacks=[clock],
    )


def plain(student: Any, teacher: Any, tokenizer: Any, dataset: Any, losses: Any, arguments: Any, clock: Any) -> Any:
    """A loop as tutorials have it."""
    import torch
    import transformers
    from torch.nn import functional

    student.set_attn_implementation("eager")
    teacher.set_attn_implementation("eager")
    teacher.eval()

    class Plain(transformers.Trainer):
        def compute_loss(self, model: Any, inputs: Any, **_: Any) -> Any:
            wanted = {"output_hidden_states": True, "output_attentions": True}
            labels = inputs.pop("labels")
            with torch.no_grad():
                taught = teacher(**inputs, **wanted)
            found = model(**inputs, **wanted)
            mask = inputs["attention_mask"].bool()
            pairs = (mask[:, None, :, None] & mask[:, None, None, :]).expand_as(found.attentions[0])
            terms = {
                "embedding": functional.mse_loss(found.hidden_states[0][mask], taught.hidden_states[0][mask]),
                "hidden": sum(
                    functional.mse_loss(s[mask], t[mask])
                    for s, t in zip(found.hidden_states[1:], taught.hidden_states[1:], strict=True)
                ),
                "attention": sum(
                    functional.mse_loss(s[pairs], t[pairs])
                    for s, t in zip(found.attentions, taught.attentions, strict=True)
                ),
                "logits": functional.kl_div(
                    found.logits.log_softmax(-1), taught.logits.log_softmax(-1), log_target=True, reduction="batchmean"
                ),
                "supervised": functional.cross_entropy(found.logits, labels),
            }
            return sum(losses[name] * term for name, term in terms.items())

    collator = transformers.DataCollatorWithPadding(tokenizer, padding="max_length", max_length=LENGTH)
    return Plain(
        student,
        arguments,
        train_dataset=dataset.remove_columns("length"),
        data_collator=collator,
        callbacks=[clock],
    )


def main() -> None:
    """Alternate the loops, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with SST-2/train.tsv")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--losses", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.worker, options.data, LOSSES[options.losses], options.threads)))
        return
    # The plain loop always computes everything; ours may leave out what has no weight.
    cases = {
        "plain": ("plain", "all losses"),
        "ours": ("ours", "all losses"),
        "ours, no attention": ("ours", "no attention"),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in cases}
    for number in range(options.rounds):
        for name, (which, losses) in cases.items():
            command = [sys.executable, __file__, "--worker", which, "--losses", losses, "--data", str(options.data)]
            command += ["--threads", str(options.threads)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}, {name}: {runs[name][-1]}", file=sys.stderr)
    write_report(runs, options)


def write_report(runs: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    """README.md and results.json."""
    from compresskit import __version__
    from compresskit.markup import markdown

    speeds = {name: [run["tokens_per_second"] for run in found] for name, found in runs.items()}
    peaks = {name: max(run["peak_megabytes"] for run in found) for name, found in runs.items()}
    base = statistics.median(speeds["plain"])
    titles = {
        "plain": "plain Trainer loop: padded to 128, eager attention, all losses",
        "ours": "compresskit, the same loss terms (attention scores in place of probabilities)",
        "ours, no attention": "compresskit, without attention maps",
    }
    rows = []
    for name, found in speeds.items():
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        median = statistics.median(found)
        rows.append((titles[name], f"{median:,.0f}", spread, f"{median / base:.2f}x", f"{peaks[name]:,.0f}"))
    versions = {name: version(name) for name in ("torch", "transformers")} | {"compresskit": __version__}
    text = f"""# Speed of distillation

Real (non-padding) tokens per second on SST-2, batch {BATCH}, the embedded checkpoint as teacher and its 19x low-rank
student, {options.threads} threads, {STEPS} steps after {WARM_UP} of warm-up, median of {options.rounds} alternating
rounds, each in a process of its own.

{markdown(("loop", "tokens/s", "spread", "against plain", "peak MB"), rows)}

Made by `python benchmarks/distill.py --data DIR` with {", ".join(f"{k} {v}" for k, v in versions.items())},
{platform.machine()}. Timings differ from machine to machine; the ratio is what to compare.
"""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    (OUTPUT / "README.md").write_text(text, encoding="utf-8")
    record = {"runs": runs, "versions": versions, "threads": options.threads, "batch_size": BATCH, "max_length": LENGTH}
    (OUTPUT / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
