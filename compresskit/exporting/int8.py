"""Weights of an ONNX graph in 8 bits: factors, look-up tables, and what stayed dense.

Weights alone are rounded; sums stay in float32. ONNX Runtime's own dynamic quantisation also rounds what runs between
factors, and does not reach every one of them: files of Tucker models and tensor trains stay 1.4 to 1.7 times as large
(reports/export).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

#: Weights for each scale, at least: scales then add at most a sixteenth to the codes.
_PER_SCALE = 64
_LARGEST_CODE = 127


def to_int8(graph: ir.Model, *, scaled_once: bool = False, axes: Mapping[str, int | None] | None = None) -> None:
    """Store every float32 tensor with two or more axes as int8 codes with a scale for each slice, in place.

    The slices are those along the axis with the least error, among axes short enough for their scales to cost little. A
    look-up reads codes and scales only the rows it has read; everything else scales the whole tensor. What has too few
    numbers stays float32.

    Args:
        graph: what is changed.
        scaled_once: write the scaling of whole tensors with operators that ONNX Runtime computes once, when it loads
            the graph, and not at every call. It does not do so with ``DequantizeLinear``, which others read best.
        axes: for some weights, by their names, the axis along which each slice has a scale; None: they stay float32.
    """
    axes = axes or {}
    for value in list(graph.graph.initializers.values()):
        assert value.const_value is not None  # an initialiser has one
        weight = value.const_value.numpy()
        if weight.dtype != np.float32 or sum(size > 1 for size in weight.shape) < 2:
            continue
        chosen = axes.get(str(value.name), -1)
        if chosen is None:
            continue
        look_ups = [node for node, place in value.uses() if node.op_type == "Gather" and place == 0]
        look_ups = [node for node in look_ups if node.attributes.get_int("axis", 0) == 0]
        # After a look-up only the last axis is where it was.
        tried = [weight.ndim - 1] if look_ups else list(range(weight.ndim))
        tried = [axis for axis in tried if weight.shape[axis] * _PER_SCALE <= weight.size]
        if chosen >= 0 and not look_ups:
            tried = [chosen]
        if not tried:
            continue
        ways = {axis: _round(weight, axis) for axis in tried}
        axis = min(tried, key=lambda axis: _error(weight, axis, *ways[axis]))
        _replace(graph.graph, value, look_ups, *ways[axis], axis - weight.ndim, scaled_once)


def _round(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes in the shape of the weight, and their scales, one for each slice along ``axis``."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    largest = np.abs(weight).max(axis=others)
    scales = (np.where(largest > 0, largest, 1.0) / _LARGEST_CODE).astype(np.float32)
    return np.rint(weight / np.expand_dims(scales, others)).astype(np.int8), scales


def rounded(weight: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """A weight as its codes have it, with a scale for each slice along ``axis``."""
    codes, scales = _round(weight, axis)
    others = tuple(other for other in range(weight.ndim) if other != axis)
    return np.asarray(codes * np.expand_dims(scales, others), np.float32)


def _error(weight: NDArray[np.float32], axis: int, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> float:
    others = tuple(other for other in range(weight.ndim) if other != axis)
    return float(np.square(weight - codes * np.expand_dims(scales, others)).sum())


def _replace(
    graph: ir.Graph,
    value: ir.Value,
    look_ups: list[ir.Node],
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    axis: int,
    scaled_once: bool,
) -> None:
    """Put codes and scales in the place of a constant; ``axis`` counts from the end."""
    stored = [
        ir.Value(name=f"{value.name}_{kind}", const_value=ir.tensor(array))
        for kind, array in (("codes", codes), ("scales", scales))
    ]
    for constant in stored:
        graph.register_initializer(constant)
    for look_up in look_ups:
        look_up.replace_input_with(0, stored[0])
        rows = look_up.outputs[0]
        scaled = ir.node("DequantizeLinear", [rows, stored[1]], {"axis": axis})
        rows.replace_all_uses_with(scaled.outputs[0])
        scaled.replace_input_with(0, rows)
        graph.insert_after(look_up, scaled)
    if value.uses():
        if scaled_once:
            # In half the bytes, where that is exact enough (to 1/2048) and no look-up scales its rows by them too.
            halves = np.finfo(np.float16)
            short = scales.astype(
                np.float16 if not look_ups and halves.tiny <= scales.min() <= scales.max() <= halves.max else np.float32
            )
            stored[1].const_value = ir.tensor(short.reshape(-1, *[1] * (-axis - 1)))
            floats = [ir.node("Cast", [part], {"to": int(ir.DataType.FLOAT)}) for part in stored]
            scaled = ir.node("Mul", [floats[0].outputs[0], floats[1].outputs[0]])
            graph.insert_before(graph[0], [*floats, scaled])
        else:
            scaled = ir.node("DequantizeLinear", stored, {"axis": axis})
            graph.insert_before(graph[0], scaled)
        value.replace_all_uses_with(scaled.outputs[0])
    del graph.initializers[str(value.name)]
