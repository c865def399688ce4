"""A written ONNX graph in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import Tensor
from transformers import AutoConfig

from compresskit.model.inputs import complete


class OnnxModel:
    """A graph in a folder with ``config.json``, called like the transformers model it was made from.

    It runs on as many CPU threads as torch has. Inputs that the graph does not read are left out; where mask or token
    types are not given, every token is real and of type 0.
    """

    device = torch.device("cpu")

    def __init__(self, folder: Path, graph: Path) -> None:
        self.config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # Idle threads must not take cores from what is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        feeds = {name: given.numpy() for name, given in complete(inputs, self._inputs).items()}
        return dict(zip(self._outputs, map(torch.from_numpy, self._session.run(None, feeds)), strict=True))
