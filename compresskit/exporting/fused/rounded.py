"""How each product takes its weights in 8 bits: chosen by what it costs and by its error on tokens of a trial.

Large products are computed with codes on both sides: ONNX Runtime's ``DynamicQuantizeMatMul`` rounds an input, at every
call, with one scale for all its numbers, and has a weight with a scale for each column. Codes of those weights stay
within 64: two products of codes then fit into the 16 bits in which processors without VNNI sum them, so that nothing
overflows anywhere. Other products are computed with floats, which ONNX Runtime makes of codes once, when it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from compresskit.exporting import int8
from compresskit.exporting.fused.reading import Editor, computed, is_matrix, is_vector, numbers, only_use
from compresskit.exporting.fused.tokens import Tokens

#: Rows and columns below which rounding the input costs as much as it saves (measured: docs/algorithms.md).
_LEAST = 32
#: The largest relative error of a product's output, ||y - y'||_F / ||y||_F, that is accepted, and one that is small.
MOST, SMALL = 0.05, 0.01
_LARGEST_CODE = 64

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Rounded:
    """What became of a weight.

    Attributes:
        name: in the graph.
        shape: of the weight.
        kept: ``codes`` that are multiplied as such; ``weights``: codes of which floats are made; ``float32``: neither,
            since the error would be too large.
        axis: along which each slice has a scale.
        error: relative error of the product's output on the trial's tokens; of ``float32``: what it would have been.
    """

    name: str
    shape: tuple[int, int]
    kept: Literal["codes", "weights", "float32"]
    axis: int
    error: float


def round_products(
    editor: Editor, tokens: Tokens, model: ir.Model, inputs: Mapping[str, NDArray[np.int64]]
) -> list[Rounded]:
    """Choose for every product, and compute those with codes that are faster so.

    Args:
        editor: of the graph.
        tokens: the rows of the graph.
        model: what holds the graph.
        inputs: the tokens of the trial, for every input of the graph.
    """
    products: dict[ir.Value, list[ir.Node]] = {}
    for node in editor.graph:
        if node in tokens.nodes and node.op_type == "MatMul" and is_matrix(node.inputs[1]):
            products.setdefault(computed(node, 1), []).append(node)
    names = {weight: [str(computed(node).name) for node in nodes] for weight, nodes in products.items()}
    sources = _values(model, [name for several in names.values() for name in several], inputs)
    done = []
    for weight, nodes in products.items():
        source = np.concatenate([sources[name] for name in names[weight]])
        found = _choose(str(weight.name), source, numbers(weight))
        done.append(found)
        if found.kept == "codes":
            for node in nodes:
                _replace(editor, tokens, node)
    return done


def _choose(name: str, source: Floats, weight: Floats) -> Rounded:
    """The fastest way with a small enough error."""
    rows, columns = weight.shape
    exact = source @ weight

    def error(rounded: Floats) -> float:
        return float(np.linalg.norm(rounded - exact)) / max(float(np.linalg.norm(exact)), 1e-30)

    if min(rows, columns) >= _LEAST:
        codes, scales = _codes(weight)
        found = error(_on_grid(source) @ (codes * scales))
        if found <= MOST:
            return Rounded(name, (rows, columns), "codes", 1, found)
    # The axis that costs fewer scales, unless the other one is needed.
    errors = {
        axis: error(source @ int8.rounded(weight, axis)) for axis in sorted((0, 1), key=lambda a: weight.shape[a])
    }
    axis = next((axis for axis, found in errors.items() if found <= SMALL), min(errors, key=lambda axis: errors[axis]))
    kept: Literal["weights", "float32"] = "weights" if errors[axis] <= MOST else "float32"
    return Rounded(name, (rows, columns), kept, axis, errors[axis])


def _values(model: ir.Model, wanted: list[str], inputs: Mapping[str, NDArray[np.int64]]) -> dict[str, Floats]:
    """What the graph computes for some of its values, by their names."""
    if not wanted:
        return {}
    proto = ir.to_proto(model)
    names = list(dict.fromkeys(wanted))
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
    return dict(zip(names, found, strict=True))


def _codes(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Codes and a scale for each column."""
    largest = np.abs(weight).max(axis=0)
    scales = (np.where(largest > 0, largest, 1.0) / _LARGEST_CODE).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def _on_grid(values: Floats) -> Floats:
    """Numbers rounded as ``DynamicQuantizeLinear`` does it: to 256 steps from the least to the largest, with zero."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.clip(np.rint(-low / step), 0, 255)
    grid: Floats = ((np.clip(np.rint(values / step) + zero, 0, 255) - zero) * step).astype(np.float32)
    return grid


def _replace(editor: Editor, tokens: Tokens, node: ir.Node) -> None:
    """Put the product of codes, with the bias behind it, in the place of a product."""
    weight, end = computed(node, 1), node
    bias = None
    added = only_use(node.outputs[0], "Add")
    if added is not None and added in tokens.nodes:
        bias = next((value for value in added.inputs if is_vector(value)), None)
        end = node if bias is None else added
    codes, scales = _codes(numbers(weight))
    stored = [
        editor.constant(weight, codes, f"{weight.name} codes"),
        editor.constant(weight, scales, f"{weight.name} scales"),
    ]
    made = editor.before(end, "DynamicQuantizeMatMul", [computed(node), *stored, None, bias])
    tokens.add(made, like=node.outputs[0])
    end.outputs[0].replace_all_uses_with(made)
