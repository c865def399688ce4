"""What a compression leaves in its output folder: weights, tokenizer, recipe, record, model card."""

from __future__ import annotations

import json
from pathlib import Path

from compresskit.folders.card import model_card
from compresskit.folders.compression import compression_record, resolved_recipe
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.output import MARKER
from compresskit.model.weights import fingerprints
from compresskit.planning.planner import Plan


def write_compressed(student: Checkpoint, plan: Plan, folder: Path, title: str) -> tuple[float, float]:
    """Fill ``folder`` with a checkpoint whose model was compressed by ``plan``; returns MB before and after."""
    checkpoints.save(student, folder)
    recipe = resolved_recipe(plan)
    assert student.folder is not None  # it was read from there
    bytes_before = sum(file.stat().st_size for file in checkpoints.weight_files(student.folder))
    weights = fingerprints(folder)
    bytes_after = sum(entry["bytes"] for entry in weights.values())
    record = compression_record(student, plan, bytes_before=bytes_before, bytes_after=bytes_after)
    megabytes = (bytes_before / 1e6, bytes_after / 1e6)
    (folder / MARKER).write_text(json.dumps(record | {"weights": weights}, indent=2) + "\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    model_card(student, plan, recipe, title, megabytes).save(folder / "README.md")
    return megabytes
