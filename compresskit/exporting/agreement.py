"""How far the outputs of an exported model are from those of the compressed one, on random tokens."""

from __future__ import annotations

import copy
import inspect

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from compresskit.exporting import pooling
from compresskit.exporting.pooling import SentenceVector
from compresskit.model.positions import shortened
from compresskit.tasks.predicting import Runnable

#: Sequences and tokens that are compared; a graph is traced with other ones.
_BATCH, _LENGTH = 3, 32


def example_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Random token ids, (batch, length), with padding at the end of the first row, and what else the model reads.

    ``token_type_ids`` are among them where the model tells types apart: most by a table of them, XLNet and XLM without
    one. Multiple choice: (batch, 2, length).
    """
    choice = type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()
    shape = (batch, 2, length) if choice else (batch, length)
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, shape, generator=chance)
    mask = torch.ones_like(ids)
    mask[0, ..., (length + 1) // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    types = getattr(model.config, "type_vocab_size", 0 if hasattr(model.config, "type_vocab_sizes") else 2)
    if types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = torch.randint(2, shape, generator=chance)
    return inputs


def agreement(
    model: PreTrainedModel, run: Runnable, vector: SentenceVector | None = None
) -> dict[str, dict[str, float]]:
    """How far the outputs of ``run`` are from those of the model in float32, and from its sentence vectors.

    For each: the largest absolute difference, the largest value, and the relative error ||y - y'||_F / ||y||_F.
    """
    inputs = example_inputs(model, _BATCH, shortened(model, _LENGTH))
    exact = copy.deepcopy(model).cpu().float().eval()
    with torch.no_grad():
        expected, got = dict(exact(**inputs)), run(**inputs)
        if vector is not None:
            expected[pooling.OUTPUT] = vector.of(expected[pooling.TOKENS], inputs["attention_mask"])
    found = {}
    for name, values in got.items():
        if not isinstance(values, Tensor) or name not in expected:  # parts of lists, such as XLNet's memories
            continue
        ours, theirs = values.numpy(), expected[name].numpy()
        found[name] = {
            "largest difference": float(np.abs(ours - theirs).max()),
            "largest value": float(np.abs(theirs).max()),
            "relative error": float(np.linalg.norm(ours - theirs)) / max(float(np.linalg.norm(theirs)), 1e-30),
        }
    return found
