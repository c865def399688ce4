"""Which of several equally large Kronecker shapes trains best? Orders the candidates that the decomposer offers.

Encoder matrices of the embedded checkpoint at about 24x, embedding dense; a plain loop matches the teacher's hidden
states on English text that every Python carries. One seed: this orders shapes, it is no result on a task.

Run: python benchmarks/kronecker_shapes.py [threads]
Writes README.md and one JSON per row into reports/minilm-kronecker-shapes/; finished rows are not run again.
"""

from __future__ import annotations

import json
import random
import sys
import time
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor

import compresskit
from compresskit.markup import markdown
from compresskit.model import demo
from compresskit.planning.recipe import Recipe, Rule

OUTPUT = Path(__file__).resolve().parents[1] / "reports" / "minilm-kronecker-shapes"
STEPS, BATCH, LENGTH, RATE, SEED = 500, 16, 32, 1e-3, 0

#: name -> (B of the attention matrices, B of the FFN's first; its second is transposed), or the position of B.
SHAPES: dict[str, dict[str, Any]] = {
    "B 24x1, last": {"b": (24, 1)},
    "B 24x1, first": {"a": (24, 1)},
    "B 12x2, last": {"b": (12, 2)},
    "B 4x6, last": {"b": (4, 6)},
    "B 2x12, last": {"b": (2, 12)},
    "B 1x24, last": {"b": (1, 24)},
    "low-rank": {},
}


def recipe(name: str) -> Recipe:
    """About the same parameters for every name."""
    if name == "low-rank":
        ranks = (("attention", 8), ("ffn", 13))
        rules = tuple(Rule.model_validate({"role": role, "method": "low-rank", "rank": rank}) for role, rank in ranks)
    else:
        options = SHAPES[name] | {"method": "kronecker", "swap_for_output": True, "role": ("attention", "ffn")}
        rules = (Rule.model_validate(options),)
    return Recipe(version=1, name="shapes", rules=rules)


def batches() -> tuple[list[Tensor], list[Tensor]]:
    """Training and held-out batches of token ids, (BATCH, LENGTH) each, no padding."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo.folder())
    ids = tokenizer("\n".join(topics.values()), add_special_tokens=False)["input_ids"]
    rows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]
    random.Random(SEED).shuffle(rows)
    stacked = [torch.tensor(rows[i : i + BATCH]) for i in range(0, len(rows) - BATCH, BATCH)]
    return stacked[8:], stacked[:8]


def distance(student: Any, teacher: Any, ids: Tensor) -> Tensor:
    """Mean over layers of the squared error of the hidden states, relative to the teacher's squared norm."""
    with torch.no_grad():
        wanted = teacher(input_ids=ids, output_hidden_states=True).hidden_states
    got = student(input_ids=ids, output_hidden_states=True).hidden_states
    pairs = list(zip(got, wanted, strict=True))
    return torch.stack([(g - w).square().mean() / w.square().mean() for g, w in pairs]).mean()


def held_out(student: Any, teacher: Any, data: list[Tensor]) -> float:
    """The distance on held-out text, in eval mode."""
    student.eval()
    with torch.no_grad():
        return float(torch.stack([distance(student, teacher, ids) for ids in data]).mean())


def measure(name: str) -> dict[str, Any]:
    """Train one student, from its one-shot start to the end of the budget."""
    torch.manual_seed(SEED)
    teacher = transformers.AutoModel.from_pretrained(demo.folder()).eval()
    student = compresskit.compress(teacher, recipe=recipe(name))  # shares nothing with the teacher
    train, test = batches()
    before = held_out(student, teacher, test)
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 50) * (1 - i / STEPS))
    start = time.perf_counter()
    for step in range(STEPS):
        optimizer.zero_grad()
        distance(student, teacher, train[step % len(train)]).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - start
    plan = compresskit.plan(teacher, recipe=recipe(name))
    return {
        "format_version": 1,
        "name": name,
        "shapes": sorted({a.spec.describe() for a in plan.assignments}),
        "parameters": sum(a.parameters for a in plan.assignments),
        "flops": plan.flops_after.linear,
        "error": sum(a.error or 0.0 for a in plan.assignments) / len(plan.assignments),
        "before": before,
        "after": held_out(student, teacher, test),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "steps": STEPS,
        "batch": BATCH,
        "length": LENGTH,
        "learning_rate": RATE,
        "seed": SEED,
        "versions": {"compresskit": compresskit.__version__}
        | {package: version(package) for package in ("torch", "transformers")},
    }


def main() -> None:
    """Run what is not there yet, then write the report."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    OUTPUT.mkdir(parents=True, exist_ok=True)
    records = []
    for name in SHAPES:
        path = OUTPUT / f"{name.replace(', ', '-').replace(' ', '-')}.json"
        if not path.exists():
            path.write_text(json.dumps(measure(name), indent=2) + "\n", encoding="utf-8")
        records.append(json.loads(path.read_text(encoding="utf-8")))
    columns = ("B", "shapes", "parameters", "FLOPs", "weight error", "before", "after")
    rows = [
        (
            r["name"],
            "; ".join(r["shapes"]),
            f"{r['parameters']:,}",
            f"{r['flops'] / 1e9:.3f} G",
            f"{r['error']:.3f}",
            f"{r['before']:.3f}",
            f"**{r['after']:.3f}**" if r["after"] == min(x["after"] for x in records) else f"{r['after']:.3f}",
        )
        for r in sorted(records, key=lambda r: r["after"])
    ]
    first = records[0]
    text = f"""# Equally large Kronecker shapes, after the same short training

{demo.NAME}, encoder matrices at about 24x, embedding dense. {STEPS} steps of AdamW ({RATE:g}, batch {BATCH}, length
{LENGTH}) match the teacher's hidden states on Python's own documentation; before and after: mean over layers of the
squared error of the hidden states over the teacher's squared norm, on held-out text of the same kind (lower is better).
Seed {SEED}, one run each: this orders shapes, it is no result on a task.

{markdown(columns, rows)}

FLOPs: linear layers, one sequence of 128 tokens. Weight error: mean ||W - W'||_F / ||W||_F before training.
Made by `python benchmarks/kronecker_shapes.py` with {", ".join(f"{k} {v}" for k, v in first["versions"].items())}.
"""
    (OUTPUT / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
