"""The model card of a compressed folder."""

from __future__ import annotations

import shlex

from huggingface_hub import ModelCard, ModelCardData

from compresskit.data import EMBEDDED
from compresskit.markup import calibration_text, fenced, markdown, plain
from compresskit.model.checkpoint import Checkpoint
from compresskit.planning.planner import Plan
from compresskit.planning.recipe import Recipe
from compresskit.planning.summary import plan_columns, plan_rows, total_rows

_TEXT = """---
{data}
---

# {title}

{origin}, made {ratio:.2f}x smaller by compresskit ({recipe}).

## Load

```python
import compresskit  # lets transformers read the factorised layers
from transformers import {loader}

model = {loader}.from_pretrained("FOLDER_OR_REPOSITORY")
```

Without the import, transformers would put random dense weights in their place. `compresskit.load(...)` checks that
nothing is missing; `compresskit.to_dense(model)` gives an ordinary model with the same outputs.

## Quality

These weights are a one-shot approximation: **not yet useful by themselves** at high ratios. Distil them before use
(`compresskit distill --student FOLDER --teacher MODEL`), or fine-tune them on your task; every factor is an ordinary
trainable parameter.

## Figures

{totals}

{rows}

Error: ||W - W'||_F / ||W||_F, mean over the matrices, before any training. FLOPs: 2 x multiply-adds, one
sequence of 128 tokens. MB: 10^6 bytes of weight files.
{notes}
## Recipe

`compresskit compress --model {origin}{flags} --recipe recipe.yaml` with this file repeats it:

{recipe_yaml}
"""


def _flags(checkpoint: Checkpoint, plan: Plan) -> str:
    """What the command of the card needs beside model and recipe."""
    flags = f" --as {checkpoint.as_class}" if checkpoint.as_class else ""
    text = plan.calibration["text"] if plan.calibration is not None else {"source": EMBEDDED}
    if "task" in text:
        flags += f" --calibration-task {shlex.quote(text['task'])}" + (" --data DIR" if text["sha256"] else "")
    elif text["source"] != EMBEDDED:
        flags += f" --calibration {shlex.quote(text['source'])}"
    return flags


def model_card(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, title: str, megabytes: tuple[float, float]
) -> ModelCard:
    """A card with the import line, the figures, the recipe and what to do next."""
    notes = [*checkpoint.notes, *plan.notes]
    if plan.calibration is not None:
        notes.append(f"the factors were fitted to what the layers see on {calibration_text(plan.calibration)}")
    data = ModelCardData(
        base_model=checkpoint.origin if "/" in checkpoint.origin else None,
        base_model_relation="quantized" if "/" in checkpoint.origin else None,  # the hub's word for a smaller form
        library_name="transformers",
        tags=["compresskit", "model-compression", *sorted({a.method for a in plan.assignments})],
    )
    loader = type(checkpoint.model).__name__
    return ModelCard(
        _TEXT.format(
            data=data.to_yaml(),
            title=title,
            origin=checkpoint.origin,
            flags=_flags(checkpoint, plan),
            ratio=plan.ratio,
            recipe=plan.recipe.name,
            loader=loader,
            totals=markdown(("total", "before", "after", "ratio"), total_rows(plan, megabytes)),
            rows=markdown(plan_columns(plan), plan_rows(plan)),
            notes="".join(f"\nNote: {plain(note)}.\n" for note in notes),
            recipe_yaml=fenced(recipe.to_yaml(), "yaml"),
        )
    )
