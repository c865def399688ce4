"""``fuse``: the passes in their order, and the check that the graph computes the same."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

from compresskit.errors import one_line
from compresskit.exporting.fused import products
from compresskit.exporting.fused.attention import Attentions, fuse_attention
from compresskit.exporting.fused.first_token import keep_first_token
from compresskit.exporting.fused.reading import Editor, is_matrix, numbers
from compresskit.exporting.fused.rounded import Rounded, round_products
from compresskit.exporting.fused.tokens import Tokens

Inputs = Mapping[str, NDArray[np.int64]]
#: The largest difference from the graph as it was, as a share of an output's largest value (below 1: absolute).
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Fused:
    """A graph for ONNX Runtime.

    Attributes:
        graph: it; as it was where fusing fails.
        rounded: the products that are faster with 8-bit codes, where that was asked for.
        notes: what was left as it was, for the user.
    """

    graph: ir.Model
    rounded: tuple[Rounded, ...] = ()
    notes: tuple[str, ...] = ()


def fuse(
    graph: ir.Model, inputs: Inputs, parameters: Mapping[str, NDArray[np.float32]], *, eight_bits: bool = False
) -> Fused:
    """Rewrite a graph for ONNX Runtime, at the same answers up to rounding.

    A sequence that is all padding gets other numbers than in torch, which puts zeros there.

    Args:
        graph: of operator set 23 or later, in which layers have the operator ``Attention``; it is not changed.
        inputs: for every input of the graph, what both graphs are compared on.
        parameters: of the model, by their names, which the record of rounding has.
        eight_bits: compute products with 8-bit codes where that is faster and near enough, and GELU by its tanh form
            (at most 5e-4 off).
    """
    graph = _copy(graph)
    _name_weights(graph, parameters)
    made = _copy(graph)
    try:
        attentions = _pass(made)
        differs = _difference(graph, made, inputs)
    except Exception as error:  # a family may do anything, and ONNX Runtime raises a dozen kinds
        return Fused(graph, notes=(f"left unfused, since that fails: {one_line(error)}",))
    if differs is not None:
        return Fused(graph, notes=(f"left unfused, since fused it differs by {differs:.2g}",))
    if not eight_bits:
        return Fused(made, notes=attentions.notes())
    rounded: list[Rounded] = []
    made = _copy(graph)
    _pass(made, inputs, rounded)
    return Fused(made, tuple(rounded), attentions.notes())


def _name_weights(graph: ir.Model, parameters: Mapping[str, NDArray[np.float32]]) -> None:
    """Give constants that hold a parameter, or its transpose, the parameter's name: records of rounding have them."""
    names = {_bytes(array): name for name, array in parameters.items() if array.ndim == 2}
    names |= {_bytes(array.T): name for name, array in parameters.items() if array.ndim == 2}
    for value in list(graph.graph.initializers.values()):
        name = names.get(_bytes(numbers(value))) if is_matrix(value) else None
        if name is not None and name not in graph.graph.initializers:
            value.name = name


def _bytes(array: NDArray[np.float32]) -> bytes:
    return str(array.shape).encode() + hashlib.sha256(array.tobytes()).digest()


def shorten(graph: ir.Model) -> None:
    """Leave out the names of nodes and shorten those of values, which no runtime needs: a hundredth of a small file."""
    kept = {value.name for value in (*graph.graph.inputs, *graph.graph.outputs)}
    values = [*graph.graph.initializers.values(), *(value for node in graph.graph for value in node.outputs)]
    taken = {value.name for value in values} | kept
    free = (name for name in map("{:x}".format, itertools.count()) if name not in taken)
    for value in values:
        if value.name not in kept:
            value.name = next(free)
    for node in graph.graph:
        node.name = ""
        for value in node.outputs:
            if value.name not in kept:
                value.shape = value.type = None


def _pass(model: ir.Model, inputs: Inputs | None = None, rounded: list[Rounded] | None = None) -> Attentions:
    """All passes, in place; with inputs also those for 8 bits, which add to ``rounded``."""
    editor = Editor(model.graph)
    model.opset_imports["com.microsoft"] = 1
    attentions = fuse_attention(editor)
    products.join(editor)
    tokens = Tokens(editor)
    tokens.flatten()
    if inputs is not None and rounded is not None:
        RemoveUnusedNodesPass()(model)
        rounded += round_products(editor, tokens, model, inputs)
        for node in model.graph:
            if node.op_type == "Gelu":
                node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    products.fold(editor, tokens)
    RemoveUnusedNodesPass()(model)  # else what was replaced still seems to read every token
    keep_first_token(editor, tokens)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)
    return attentions


def _copy(model: ir.Model) -> ir.Model:
    return ir.from_proto(ir.to_proto(model))


def _difference(before: ir.Model, after: ir.Model, inputs: Inputs) -> float | None:
    """How far the outputs of two graphs are from each other, where that is too far."""
    for ours, theirs in zip(_run(after, inputs), _run(before, inputs), strict=True):
        found = float(np.abs(ours - theirs).max())
        if not found <= _TOLERANCE * max(1.0, float(np.abs(theirs).max())):  # not a number is too far, too
            return found
    return None


def _run(model: ir.Model, inputs: Inputs) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[NDArray[np.float32]] = session.run(
        None, {value.name: inputs[value.name] for value in session.get_inputs()}
    )
    return found
