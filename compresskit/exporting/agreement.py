"""How far the outputs of an exported model are from those of the compressed one, on random tokens."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

#: Sequences and tokens that are compared; a graph is traced with other ones.
_BATCH, _LENGTH = 3, 32

Inputs = Mapping[str, Tensor]
Outputs = Mapping[str, NDArray[Any]]


def example_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Random token ids, (batch, length), with padding at the end of the first row, and what else the model reads.

    ``token_type_ids`` are among them where the model tells types apart. Multiple choice: (batch, 2, length).
    """
    choice = type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values()
    shape = (batch, 2, length) if choice else (batch, length)
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, shape, generator=chance)
    mask = torch.ones_like(ids)
    mask[0, ..., (length + 1) // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    types = getattr(model.config, "type_vocab_size", 0)
    if types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters:
        inputs["token_type_ids"] = torch.randint(2, shape, generator=chance)
    return inputs


def agreement(model: PreTrainedModel, run: Callable[[Inputs], Outputs]) -> dict[str, dict[str, float]]:
    """How far the outputs of ``run`` are from those of the model in float32.

    For each: the largest absolute difference, the largest value, and the relative error ||y - y'||_F / ||y||_F.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or _LENGTH + 2
    inputs = example_inputs(model, _BATCH, min(_LENGTH, positions - 2))  # two are offset in roberta's table
    expected, got = in_torch(model)(inputs), run(inputs)
    found = {}
    for name, values in got.items():
        difference = values - expected[name]
        found[name] = {
            "largest difference": float(np.abs(difference).max()),
            "largest value": float(np.abs(expected[name]).max()),
            "relative error": float(np.linalg.norm(difference)) / max(float(np.linalg.norm(expected[name])), 1e-30),
        }
    return found


def in_torch(model: PreTrainedModel) -> Callable[[Inputs], Outputs]:
    """Runs a copy of the model in float32."""
    exact = copy.deepcopy(model).cpu().float().eval()

    def run(inputs: Inputs) -> Outputs:
        with torch.no_grad():
            return {name: value.numpy() for name, value in exact(**inputs).items() if isinstance(value, Tensor)}

    return run


def in_onnxruntime(path: Path) -> Callable[[Inputs], Outputs]:
    """Runs an ONNX file on as many CPU threads as torch has.

    Inputs that the graph does not read are left out; token types that it reads and that are not given are zeros.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Idle threads must not take cores from what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    read = [value.name for value in session.get_inputs()]
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Inputs) -> Outputs:
        zeros = torch.zeros_like(inputs["input_ids"])
        feeds = {name: inputs.get(name, zeros).numpy() for name in read}
        return dict(zip(names, session.run(None, feeds), strict=True))

    return run
