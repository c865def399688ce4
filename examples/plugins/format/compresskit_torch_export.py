"""A program of ``torch.export``: an export format of another package.

What is written is a graph with its weights in one file. It runs where torch is, without transformers and compresskit.
Factors stay factors; batch and length are free.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.errors import WorkError, one_line
from compresskit.exporting.agreement import example_inputs
from compresskit.exporting.format import ExportFormat, NoOptions, Runtime, Written
from compresskit.model.checkpoint import Checkpoint

PROGRAM = "model.pt2"


class TorchExport(ExportFormat[NoOptions]):
    """One file, float32."""

    name = "torch-export"
    summary = "a program of torch.export, which runs with torch alone"
    packages = ("torch",)
    files = (PROGRAM,)
    tolerance = 1e-4
    runtime = Runtime("torch.export", "torch")

    def write(self, read: Checkpoint, folder: Path, options: NoOptions) -> Written:
        model = _Plain(copy.deepcopy(read.model).cpu().float().eval())
        inputs = example_inputs(read.model, 2, 9)
        free = {name: dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO) for name, tensor in inputs.items()}
        try:
            with torch.no_grad():
                program = torch.export.export(model, (), {"inputs": inputs}, dynamic_shapes={"inputs": free})
            torch.export.save(program, folder / PROGRAM)
        except Exception as error:  # the tracer raises a dozen kinds
            kind = type(read.model).__name__
            raise WorkError(f"{kind} cannot be written as torch-export: {one_line(error)}") from error
        return Written({"inputs": list(inputs)})

    def load(self, folder: Path) -> Program:
        return Program(folder)


class _Plain(nn.Module):
    """The model with a dictionary of tensors as its outputs: a graph has no classes of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = self.model(**inputs, return_dict=True)
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}


class Program:
    """A written program, called like the transformers model it was made from."""

    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        from transformers import AutoConfig

        self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        program = torch.export.load(folder / PROGRAM)
        self._names = list(program.example_inputs[1]["inputs"])
        self._run = program.module()

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        zeros = torch.zeros_like(inputs["input_ids"])
        found: dict[str, Tensor] = self._run(inputs={name: inputs.get(name, zeros) for name in self._names})
        return found
