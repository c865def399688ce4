"""A model as an ONNX graph in which factors stay factors, with any batch and length."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from onnxscript import optimizer
from transformers import PreTrainedModel
from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

from compresskit.errors import WorkError, one_line
from compresskit.exporting.agreement import example_inputs

#: Bytes of a constant up to which the optimiser may compute with it: shapes and scalars, but no factor. Above that it
#: would multiply small factors out and keep a transposed copy of a tied table.
_FOLD = 64


def to_graph(model: PreTrainedModel, opset: int) -> ir.Model:
    """The model's graph in float32, whatever the stored dtype; the model is not changed.

    Inputs are those of :func:`.example_inputs`, (batch, length), both free; outputs have transformers' names.

    Raises:
        WorkError: the model cannot be traced with a free batch and length.
    """
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    inputs = example_inputs(model, 2, 9)
    free = dict.fromkeys(range(inputs["input_ids"].dim()), torch.export.Dim.AUTO)
    config = OnnxConfig(dynamic_shapes=dict.fromkeys(inputs, free), opset_version=opset, optimize=False)
    try:
        with _quiet():
            graph: ir.Model = OnnxExporter().export(model, {**inputs}, config).program
            optimizer.optimize_ir(graph, input_size_limit=_FOLD, output_size_limit=_FOLD)
            # A factor that is only ever read in another shape is stored in that shape: look-ups then find a table.
            optimizer.optimize_ir(graph, input_size_limit=_FOLD, output_size_limit=_FOLD, should_fold=_is_view)
    except Exception as error:  # torch, onnxscript and transformers raise a dozen kinds
        raise WorkError(f"{type(model).__name__} cannot be written as ONNX: {one_line(error)}") from error
    _name_sizes(graph, tuple(inputs["input_ids"].shape))
    _strip(graph)
    return graph


def _is_view(node: ir.Node) -> bool | None:
    """Whether to compute a node once and for all; None leaves it to the size limit."""
    value = node.inputs[0] if node.inputs else None
    if value is None or not value.is_initializer() or value.const_value is None or value.const_value.nbytes <= _FOLD:
        return None
    return node.op_type == "Reshape" and len(value.uses()) == 1


def _name_sizes(graph: ir.Model, example: tuple[int, ...]) -> None:
    """Call the free sizes of inputs and outputs ``batch`` and ``length`` (between them ``choices``)."""
    known = ("batch", "length") if len(example) == 2 else ("batch", "choices", "length")
    names: dict[str, str] = {}
    for value in graph.graph.inputs:
        assert value.shape is not None
        for size, name in zip(value.shape, known, strict=True):
            if isinstance(size, int):
                raise WorkError(f"the traced model takes only {size} as {name}: it cannot be written as ONNX")
            names[str(size.value)] = name
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [size if isinstance(size, int) else names.get(str(size.value), size.value) for size in value.shape]
            )


def _strip(graph: ir.Model) -> None:
    """Leave out stack traces and the shapes in between: a tenth of a small file, and no runtime needs them."""
    ClearMetadataAndDocStringPass()(graph)
    outputs = set(graph.graph.outputs)
    for node in graph.graph:
        for value in node.outputs:
            if value not in outputs:
                value.shape = value.type = None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters print their progress, and warn of what concerns their own developers; where torch cannot trace a
    model, it prints the whole trace.
    """
    level, unread = logging.root.manager.disable, io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(unread), contextlib.redirect_stderr(unread):
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(level)
