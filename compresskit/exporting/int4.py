"""Rows of look-up tables in 4 bits; a look-up makes floats of the rows that it reads, and of no others."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

#: Numbers of a row that share a scale; 16 in narrower rows, the fewest that ONNX Runtime takes.
_BLOCK, _SMALLEST_BLOCK = 32, 16
_LARGEST_CODE = 7
#: The largest number whose scale float16 can hold.
_LARGEST = _LARGEST_CODE * float(np.finfo(np.float16).max)
#: Scales that are tried, as shares of the one that fits the block's largest number.
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8)


def rows_to_int4(graph: ir.Model) -> None:
    """Store every float32 table that is only looked up as 4-bit codes with a float16 scale for each block, in place.

    One with numbers beyond what such scales hold stays as it is.
    """
    for value in list(graph.graph.initializers.values()):
        assert value.const_value is not None  # an initialiser has one
        table = value.const_value.numpy()
        uses = list(value.uses())
        looked_up = all(use.node.op_type == "Gather" and use.idx == 0 for use in uses)
        fits = table.dtype == np.float32 and table.ndim == 2 and bool(np.abs(table).max(initial=0) <= _LARGEST)
        if fits and uses and looked_up and all(_by_rows(use.node) for use in uses):
            _replace(graph.graph, value, table)
            graph.opset_imports["com.microsoft"] = 1


def _by_rows(node: ir.Node) -> bool:
    return node.attributes.get_int("axis", 0) == 0


def _replace(graph: ir.Graph, value: ir.Value, table: NDArray[np.float32]) -> None:
    size = _BLOCK if table.shape[1] >= _BLOCK else _SMALLEST_BLOCK
    codes, scales = _round(table, size)
    stored = [
        ir.Value(name=f"{value.name}_{kind}", const_value=ir.tensor(array))
        for kind, array in (("codes", codes.astype(ml_dtypes.int4)), ("scales", scales))
    ]
    for constant in stored:
        graph.register_initializer(constant)
    for node, _ in list(value.uses()):
        settings = {"gather_axis": 0, "quantize_axis": 1, "block_size": size}
        read = ir.node("GatherBlockQuantized", [stored[0], node.inputs[1], stored[1]], settings, domain="com.microsoft")
        floats = ir.node("Cast", [read.outputs[0]], {"to": int(ir.DataType.FLOAT)})
        graph.insert_before(node, [read, floats])
        node.outputs[0].replace_all_uses_with(floats.outputs[0])
        graph.remove(node, safe=True)
    del graph.initializers[str(value.name)]


def _round(table: NDArray[np.float32], size: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Codes in the shape of the table, and scales (rows, blocks), those of a few that leave the least error."""
    rows, width = table.shape
    blocks = np.pad(table, ((0, 0), (0, -width % size))).reshape(rows, -1, size)
    largest = np.abs(blocks).max(2, keepdims=True)
    best: NDArray[np.float32] = np.full_like(largest, np.inf)
    codes = np.zeros(blocks.shape, np.int8)
    scales = np.ones(largest.shape, np.float16)
    for share in _SHARES:
        tried = np.where(largest > 0, largest * np.float32(share / _LARGEST_CODE), 1).astype(np.float16)
        tried = np.maximum(tried, np.finfo(np.float16).tiny)  # a scale that rounds to zero would divide by it
        rounded = np.clip(np.rint(blocks / tried.astype(np.float32)), -_LARGEST_CODE, _LARGEST_CODE)
        error = np.square(blocks - rounded * tried.astype(np.float32)).sum(2, keepdims=True)
        better = error < best
        codes, scales = np.where(better, rounded.astype(np.int8), codes), np.where(better, tried, scales)
        best = np.where(better, error, best)
    return codes.reshape(rows, -1)[:, :width], scales[..., 0]
