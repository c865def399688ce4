"""A written OpenVINO model on the CPU."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from compresskit.model.inputs import complete


class OpenVinoModel:
    """A model in a folder with ``config.json``, called like the transformers model it was made from.

    It runs in float32 (OpenVINO would take bf16 where the CPU has it) on as many CPU threads as torch has. Inputs that
    the model does not read are left out; where mask or token types are not given, every token is real and of type 0.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, model: Path) -> None:
        import openvino

        self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        self._compiled = openvino.Core().compile_model(model, "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self._inputs = [value.any_name for value in self._compiled.inputs]
        self._outputs = [value.any_name for value in self._compiled.outputs]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        feeds = {name: given.contiguous().numpy() for name, given in complete(inputs, self._inputs).items()}
        found = self._request.infer(feeds)
        return {name: torch.from_numpy(found[name].copy()) for name in self._outputs}
