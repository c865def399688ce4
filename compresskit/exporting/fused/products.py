"""Fewer and fuller products: those of one input at once, biases and residuals inside them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from compresskit.exporting.fused.reading import (
    Editor,
    computed,
    constant,
    is_matrix,
    is_vector,
    numbers,
    only_use,
    produced,
)
from compresskit.exporting.fused.tokens import Tokens

#: Columns of products that are worth being computed at once; broader ones fill the processor by themselves.
_NARROW = 128


def join(editor: Editor) -> None:
    """Compute narrow products of one input, such as the first factors of queries, keys and values, as one."""
    siblings: dict[ir.Value, list[ir.Node]] = {}
    for node in editor.graph:
        if node.op_type == "MatMul" and is_matrix(node.inputs[1]) and numbers(computed(node, 1)).shape[1] <= _NARROW:
            siblings.setdefault(computed(node), []).append(node)
    for source, nodes in siblings.items():
        if len(nodes) == 1:
            continue
        weights = [computed(node, 1) for node in nodes]
        widths = [numbers(weight).shape[1] for weight in weights]
        joined = np.concatenate([numbers(weight) for weight in weights], 1)
        joint = editor.constant(tuple(weights), joined, " + ".join(str(weight.name) for weight in weights))
        product = editor.before(nodes[0], "MatMul", [source, joint])
        split = ir.node("Split", [product, editor.sizes(*widths)], {"axis": -1}, num_outputs=len(nodes))
        editor.graph.insert_before(nodes[0], split)
        for node, part in zip(nodes, split.outputs, strict=True):
            node.outputs[0].replace_all_uses_with(part)


def fold(editor: Editor, tokens: Tokens) -> None:
    """Take biases and residuals into the products before them.

    A bias goes, as one more row, into a factor whose input comes from a factor too, which then makes a column of ones.
    Elsewhere it is the sum of a ``Gemm``.

    Args:
        editor: of the graph.
        tokens: the rows of the graph.
    """
    for node in [node for node in editor.graph if node in tokens.nodes and node.op_type == "MatMul"]:
        bias_add, bias = _added(node, tokens, constants=True)
        residual_add, residual = _added(bias_add or node, tokens, constants=False)
        if residual_add is None and bias_add is None:
            continue
        source, weight, end = computed(node), computed(node, 1), residual_add or bias_add
        widened = None if bias is None else _with_ones(editor, node, tokens)
        if bias is not None and widened is not None:
            # ONNX Runtime does this once, when it loads the graph; stored, both keep their own form.
            row = editor.constant(bias, numbers(bias)[None], f"{bias.name}_row")
            source, weight, bias = widened, editor.once("Concat", [weight, row], axis=0), None
        elif bias is not None:
            end = bias_add
        assert end is not None
        summand = bias if bias is not None else residual
        operator = "MatMul" if summand is None else "Gemm"
        made = editor.before(end, operator, [source, weight, *([] if summand is None else [summand])])
        tokens.add(made, like=node.outputs[0])
        end.outputs[0].replace_all_uses_with(made)


def _added(node: ir.Node, tokens: Tokens, *, constants: bool) -> tuple[ir.Node, ir.Value] | tuple[None, None]:
    """The sum that alone reads a node, and what else goes into it: a bias, or other tokens."""
    value = node.outputs[0]
    sum_ = only_use(value, "Add")
    if sum_ is None or sum_ not in tokens.nodes:
        return None, None
    other = next((side for side in sum_.inputs if side is not value), None)
    fits = is_vector(other) if constants else constant(other) is None
    return (sum_, other) if other is not None and fits else (None, None)


def _with_ones(editor: Editor, node: ir.Node, tokens: Tokens) -> ir.Value | None:
    """What a product reads, with a column of ones; None where no factor of few columns makes it."""
    first = produced(node.inputs[0], "MatMul", "Gemm")
    if first is None or first not in tokens.nodes or only_use(first.outputs[0], "MatMul") is None:
        return None
    weight, bias = computed(first, 1), first.inputs[2] if len(first.inputs) > 2 else None
    if not is_matrix(weight) or (bias is not None and not is_vector(bias)):
        return None
    array = numbers(weight)
    if array.shape[1] > _NARROW:
        return None
    offset = np.zeros(array.shape[1], np.float32) if bias is None else numbers(bias)
    wider = editor.once("Pad", [weight, editor.sizes(0, 0, 0, 1)])
    ones = editor.constant(bias or len(offset), np.append(offset, np.float32(1)), "ones")
    made = editor.before(first, "Gemm", [first.inputs[0], wider, ones])
    tokens.add(made, like=first.outputs[0])
    return made
