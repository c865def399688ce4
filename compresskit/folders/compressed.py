"""What a compression leaves in its output folder: weights, tokenizer, recipe, record, model card."""

from __future__ import annotations

from pathlib import Path

from compresskit.errors import InputError
from compresskit.folders.card import compressed_card
from compresskit.folders.compression import compression_record, write_record
from compresskit.model import checkpoint as checkpoints
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.sentence_vectors import has_sentence_model
from compresskit.planning.planner import Plan
from compresskit.planning.resolved import resolved_recipe


def write_compressed(student: Checkpoint, plan: Plan, folder: Path, title: str) -> tuple[float, float]:
    """Fill ``folder`` with a checkpoint whose model was compressed by ``plan``; returns MB before and after.

    Raises:
        InputError: the model was given as an object: there are no files to compare with.
    """
    if student.folder is None:
        raise InputError("the model was given as an object: save it with save_pretrained, or compress its folder")
    checkpoints.save(student, folder)
    recipe = resolved_recipe(plan)
    before, after = (
        sum(file.stat().st_size for file in checkpoints.weight_files(place)) for place in (student.folder, folder)
    )
    record = compression_record(student, plan, bytes_before=before, bytes_after=after)
    write_record(record, folder)
    megabytes = (record.megabytes.before, record.megabytes.after)
    (folder / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    card = compressed_card(student, plan, recipe, title, megabytes, sentences=has_sentence_model(folder))
    (folder / "README.md").write_text(card, encoding="utf-8")
    return megabytes
