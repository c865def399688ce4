"""What a training leaves in its output folder beside the weights: records, a picture of the losses, model card."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compresskit.folders.card import CARD, trained_card
from compresskit.folders.compression import carry_record
from compresskit.folders.losses import loss_picture
from compresskit.folders.training import view, write_stages
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.output import MARKER
from compresskit.model.sentence_vectors import has_sentence_model


def write_trained(checkpoint: Checkpoint, stages: Sequence[Mapping[str, Any]], folder: Path, title: str) -> None:
    """Fill ``folder`` (where the model was saved) with the records of ``stages``, the newest one last; recipe, record
    and card of the compression come along from the folder that the model was read from.
    """
    original = ""
    if checkpoint.folder is not None:
        if (checkpoint.folder / "recipe.yaml").is_file():
            shutil.copyfile(checkpoint.folder / "recipe.yaml", folder / "recipe.yaml")
        carry_record(checkpoint.folder, folder)
        card = checkpoint.folder / CARD
        if (checkpoint.folder / MARKER).is_file() and card.is_file():
            original = card.read_text(encoding="utf-8")
    views = [view(stage) for stage in stages]
    write_stages(stages, folder)
    loss_picture(views[-1], folder / "losses.png")
    sentences = has_sentence_model(folder) or views[-1].stage == "sentences"
    (folder / CARD).write_text(trained_card(original, views, title, checkpoint, sentences=sentences), encoding="utf-8")
