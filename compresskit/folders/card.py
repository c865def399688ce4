"""The model cards of compressed and of trained folders."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from compresskit.data import EMBEDDED
from compresskit.folders.training import StageRecord, score_rows
from compresskit.markup import calibration_text, fenced, markdown, plain
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.quantizer import is_compressed
from compresskit.model.targets import count_parameters
from compresskit.planning.planner import Plan
from compresskit.planning.recipe import Recipe
from compresskit.planning.summary import plan_columns, plan_rows, total_rows

CARD = "README.md"
#: What a card loads from; publishing puts the repository in its place.
PLACE = "FOLDER_OR_REPOSITORY"
#: The line without which transformers does not know the layers.
IMPORT = "import compresskit  # lets transformers read the factorised layers"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

_HEAD = """---
{data}
---

# {title}

{origin}, {made}.

## Load

{code}

"""

#: The first block of code below the heading.
_LOADING = re.compile(r"(?<=^## Load\n\n)```python\n.*?\n```$", re.DOTALL | re.MULTILINE)

_COMPRESSED = """\
Without the import, transformers would put random dense weights in their place. `compresskit.load(...)` checks that
nothing is missing; `compresskit.to_dense(model)` gives an ordinary model with the same outputs.

## Quality

These weights are a one-shot approximation: **not yet useful by themselves** at high ratios. Distil them before use
(`compresskit distill --student FOLDER --teacher MODEL{unit}`), or fine-tune them on your task;
every factor is an ordinary trainable parameter.

## Figures

{totals}

{rows}

Error: ||W - W'||_F / ||W||_F, mean over the matrices, before any training. FLOPs: 2 x multiply-adds, one
sequence of 128 tokens, or all that the model takes. MB: 10^6 bytes of weight files.
{notes}
## Recipe

`compresskit compress --model {model}{flags} --recipe recipe.yaml` with this file repeats it:

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
    if (whole := plan.untrimmed) is not None:
        flags += f" --trim-text {shlex.quote(whole.text)} --trim-keep {whole.rows_left}"
    return flags


def _head(
    model: PreTrainedModel,
    title: str,
    *,
    origin: str,
    made: str,
    sentences: bool,
    base: str = "",
    tags: Sequence[str] = (),
) -> str:
    """What all cards begin with: data for the hub, title, where the model comes from, how to load it.

    Args:
        origin: of the model, for readers.
        made: what compresskit did.
        sentences: whether it is an encoder of sentences.
        base: hub id of the model that this one is a smaller form of.
        tags: for the hub, beside the project's own.
    """
    data = ModelCardData(
        base_model=base or None,
        base_model_relation="quantized" if base and is_compressed(model) else None,  # the hub's word for a smaller form
        library_name="sentence-transformers" if sentences else "transformers",
        pipeline_tag="sentence-similarity" if sentences else None,
        tags=["compresskit", *tags],
    )
    code = loading_code(model, sentences=sentences)
    return _HEAD.format(data=data.to_yaml(), title=title, origin=origin, made=made, code=code)


def loading_code(model: PreTrainedModel, *, sentences: bool) -> str:
    """The lines that load a model from :data:`PLACE`, as a block of a card."""
    lines = [IMPORT] if is_compressed(model) else []
    if sentences:
        lines += [
            "from sentence_transformers import SentenceTransformer",
            "",
            f'model = SentenceTransformer("{PLACE}")',
            'vectors = model.encode(["a text", "another one"])',
        ]
    else:
        name = type(model).__name__
        lines += [f"from transformers import {name}", "", f'model = {name}.from_pretrained("{PLACE}")']
    return "\n".join(["```python", *lines, "```"])


def compressed_card(
    checkpoint: Checkpoint, plan: Plan, recipe: Recipe, title: str, megabytes: tuple[float, float], *, sentences: bool
) -> str:
    """A card with the import line, the figures, the recipe and what to do next; ``sentences``: see
    :func:`loading_code`.
    """
    notes = [*checkpoint.notes, *plan.notes]
    if plan.calibration is not None:
        notes.append(f"the factors were fitted to what the layers see on {calibration_text(plan.calibration)}")
    head = _head(
        checkpoint.model,
        title,
        origin=checkpoint.origin,
        made=f"made {plan.ratio:.2f}x smaller by compresskit ({plan.recipe.name})",
        sentences=sentences,
        base=_on_the_hub(checkpoint),
        tags=["model-compression", *sorted({a.method for a in plan.assignments})],
    )
    return head + _COMPRESSED.format(
        unit=" --text FILE --unit sentence" if sentences else "",
        model=shlex.quote(checkpoint.origin),
        flags=_flags(checkpoint, plan),
        totals=markdown(("total", "before", "after", "ratio"), total_rows(plan, megabytes)),
        rows=markdown(plan_columns(plan), plan_rows(plan)),
        notes="".join(f"\nNote: {plain(note)}.\n" for note in notes),
        recipe_yaml=fenced(recipe.to_yaml(), "yaml"),
    )


def trained_card(
    original: str, stages: Sequence[StageRecord], title: str, checkpoint: Checkpoint, *, sentences: bool
) -> str:
    """The card of the compression with a section on the training in the place of its warning; without one (an empty
    ``original``) a card of that section. ``sentences``: see :func:`loading_code`.
    """
    loader = type(checkpoint.model).__name__
    count = count_parameters(checkpoint.model)
    section = f"## Training\n\nThis {loader} has {count:,} parameters.\n\n"
    section += "\n\n".join(_stage_text(stage) for stage in stages) + "\n"
    if heading := re.search(r"^## (Quality|Training)$", original, flags=re.MULTILINE):
        text = re.sub(rf"{heading[0]}\n.*?(?=\n## |\Z)", lambda _: section, original, flags=re.DOTALL)
        # The student took over its teacher's class, or became an encoder of sentences.
        text = _LOADING.sub(lambda _: loading_code(checkpoint.model, sentences=sentences), text, count=1)
        return re.sub(r"^# .*$", lambda _: f"# {title}", text, count=1, flags=re.MULTILINE)
    # A path of this machine says nothing to the reader of a card.
    origin = checkpoint.origin if _HUB_ID.fullmatch(checkpoint.origin) else checkpoint.name
    return _head(checkpoint.model, title, origin=origin, made="trained by compresskit", sentences=sentences) + section


def trimmed_card(checkpoint: Checkpoint, outcome: str, title: str, *, sentences: bool) -> str:
    """The card of a dense model whose vocabulary was trimmed; ``outcome`` says how, as one sentence. ``sentences``: see
    :func:`loading_code`.
    """
    head = _head(
        checkpoint.model,
        title,
        origin=checkpoint.origin,
        made="with a vocabulary that compresskit trimmed",
        sentences=sentences,
        base=_on_the_hub(checkpoint),
        tags=["model-compression"],
    )
    count = count_parameters(checkpoint.model)
    same = "Text that is read in kept tokens alone gives the outputs of the original."
    how = plain(outcome[:1].upper() + outcome[1:])
    return f"{head}## Vocabulary\n\n{how}. {same} The model has {count:,} parameters.\n"


def _on_the_hub(checkpoint: Checkpoint) -> str:
    return checkpoint.origin if "/" in checkpoint.origin else ""


def _stage_text(stage: StageRecord) -> str:
    task = stage.data.task
    what = plain(stage.data.source) if task is None else task.name
    passes = "" if task is None else f", {stage.epochs:.2f} epochs"  # of a text only as much is read as is needed
    lines = [
        f"**{stage.stage}** on {what}: {stage.steps:,} steps of {stage.batch_size} sequences "
        f"({stage.tokens:,} tokens{passes}), learning rate {stage.learning_rate:g}, "
        f"losses {', '.join(f'{name} {weight:g}' for name, weight in stage.losses.items())}, seed {stage.seed}."
    ]
    if stage.teacher is not None:
        lines.append(f"Teacher: {plain(stage.teacher.name)} ({stage.teacher.parameters:,} parameters).")
    columns, rows = score_rows(stage)
    return "\n".join([*lines, "", markdown(columns, rows)])
