"""Static quantisation of an ONNX graph by ONNX Runtime's own tools: fixed ranges for what runs into products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from compresskit.model.inputs import complete

#: Products and look-ups hold the weights; sums, norms and softmax stay in float32, as ranges of theirs cost most.
_OPERATORS = ["MatMul", "Gemm", "Gather"]


class _Batches(quantization.CalibrationDataReader):
    """Hands out batches one by one, as the library asks for them."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]], inputs: Sequence[str]) -> None:
        self._left: Iterator[dict[str, np.ndarray]] = (
            {name: given.numpy() for name, given in complete(batch, inputs).items()} for batch in batches
        )

    def get_next(self) -> Any:
        """The next batch; None at the end."""
        return next(self._left, None)


def quantise(graph: Path, target: Path, batches: Sequence[Mapping[str, Tensor]], inputs: Sequence[str]) -> None:
    """Write a graph with weights in int8, one scale for each channel, and inputs of products in uint8, whose ranges are
    the least and largest values on ``batches``.

    Args:
        graph: in float32.
        target: where to write.
        batches: of integers (B, T); what a batch lacks is as of :func:`compresskit.model.inputs.complete`.
        inputs: names of the graph's inputs.
    """
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(graph, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        target,
        _Batches(batches, inputs),
        op_types_to_quantize=_OPERATORS,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        # What comes out of a product goes into sums and norms, which are in float32.
        extra_options={"OpTypesToExcludeOutputQuantization": _OPERATORS},
    )
    prepared.unlink()
