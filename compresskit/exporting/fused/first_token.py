"""Heads that read the first token alone, such as those of classifiers, need no other token of the last layer."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compresskit.exporting.fused.reading import Editor, computed, constant, produced
from compresskit.exporting.fused.tokens import Tokens

#: Operators whose output has a row for each row of these inputs.
_ROWS = {
    "MatMul": (0,),
    "FusedMatMul": (0,),
    "Gemm": (0, 2),
    "DynamicQuantizeMatMul": (0,),
    "Softmax": (0,),
    "Reshape": (0,),
    "LayerNormalization": (0,),
    "Attention": (0,),
    "Split": (0,),
    "Gelu": (0,),
    "Tanh": (0,),
    "Relu": (0,),
    "Add": (0, 1),
    "Mul": (0, 1),
}


def keep_first_token(editor: Editor, tokens: Tokens) -> None:
    """Compute what only leads to a first token for that token alone."""
    graph = editor.graph
    chosen = [node for node in graph if _takes_first(node)]
    cone = _cone(graph, chosen, tokens)
    narrowed: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node in cone]:
        for at in _ROWS[node.op_type]:
            value = node.inputs[at] if at < len(node.inputs) else None
            if value is None or constant(value) is not None or value.producer() in cone:
                continue
            if value not in narrowed:
                zero = editor.constant(0, np.array(0, np.int64), "first")
                narrowed[value] = editor.before(node, "Gather", [tokens.sequences(value), zero], axis=1)
            node.replace_input_with(at, narrowed[value])
        if _makes_sequences(node):
            cone.update(_pass_on(editor, node))
    for node in chosen:
        if computed(node).producer() in cone:
            node.outputs[0].replace_all_uses_with(computed(node))
    graph.sort()


def _takes_first(node: ir.Node) -> bool:
    """Whether a node takes the first token of every sequence."""
    at = constant(node.inputs[1]) if node.op_type == "Gather" else None
    return at is not None and at.ndim == 0 and int(at) == 0 and node.attributes.get_int("axis", 0) == 1


def _makes_sequences(node: ir.Node) -> bool:
    """Whether a node makes sequences of one row for each token: it alone reads a shape that is computed."""
    return node.op_type == "Reshape" and constant(node.inputs[1]) is None


def _cone(graph: ir.Graph, chosen: list[ir.Node], tokens: Tokens) -> set[ir.Node]:
    """The nodes all of whose uses lead, row for row, to what is chosen, and whose own rows can be had for one token."""
    barred: set[ir.Node] = set()
    while True:
        cone = _leading(graph, chosen, barred)
        lost = {node for node in cone if not all(_has_tokens(value, cone, tokens) for value in _rows_read(node))}
        if not lost:
            return cone
        barred |= lost


def _rows_read(node: ir.Node) -> list[ir.Value]:
    """What a node reads row for row, constants left out."""
    values = [node.inputs[at] for at in _ROWS[node.op_type] if at < len(node.inputs)]
    return [value for value in values if value is not None and constant(value) is None]


def _has_tokens(value: ir.Value, cone: set[ir.Node], tokens: Tokens) -> bool:
    """Whether a value has a place for each token: a layer of reshaped factors (Kronecker) has others in between."""
    return value.producer() in cone or tokens.has(value)


def _leading(graph: ir.Graph, chosen: list[ir.Node], barred: set[ir.Node]) -> set[ir.Node]:
    """The nodes all of whose uses lead, row for row, to what is chosen, through none that is barred."""
    cone: set[ir.Node] = set()
    for node in reversed(graph):
        if node in barred or node.op_type not in _ROWS or any(value.is_graph_output() for value in node.outputs):
            continue
        uses = [use for value in node.outputs for use in value.uses()]
        if uses and all(
            (use.node in chosen and use.idx == 0) or (use.node in cone and use.idx in _ROWS[use.node.op_type])
            for use in uses
        ):
            cone.add(node)
    return cone


def _pass_on(editor: Editor, node: ir.Node) -> list[ir.Node]:
    """Leave out a node that makes sequences, as there is one row for each already; the nodes that are new."""
    rows = computed(node)
    made = []
    for use in list(node.outputs[0].uses()):
        value = rows
        if use.node.op_type == "Attention":  # it takes sequences: of one token, and its row of the mask
            rows_of_mask = produced(use.node.inputs[3], "Expand")
            if rows_of_mask is not None:
                use.node.replace_input_with(3, computed(rows_of_mask))
            made.append(ir.node("Unsqueeze", [rows, editor.sizes(1)]))
            editor.graph.insert_before(use.node, made[-1])
            value = made[-1].outputs[0]
        use.node.replace_input_with(use.idx, value)
    return made
