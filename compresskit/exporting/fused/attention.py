"""Attention as few products.

Where keys and values have few factors, no head's keys and values are ever multiplied out. With q = A u + b, k = B v + c
and value = C w + e (u, v, w: what the first factors give, r numbers for each token) the score of a head h is

    q_h . k_h = (B_h^T A_h u + B_h^T b_h) . v + q_h . c_h

The last term is the same for every key, so that softmax drops it. Keys are v, the same for all heads, and queries
have r numbers for each head: all heads are one matrix product. Likewise the heads' sums of values are sums of w, and
C_h goes, with e, into the product behind. This is exact; it is how multi-head latent attention is run (DeepSeek-V2,
arXiv:2405.04434, section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from compresskit.exporting.fused.masks import Masks
from compresskit.exporting.fused.reading import (
    Editor,
    Product,
    computed,
    constant,
    is_matrix,
    numbers,
    only_use,
    produced,
    product,
)


@dataclass(frozen=True)
class Layer:
    """The attention of one layer, as torch's exporter writes it.

    Attributes:
        node: the operator ``Attention``, with inputs (batch, heads, length, size).
        query, key, value: what is split into heads, (batch, length, heads x size).
        size: numbers of a head.
        joined: the ``Reshape`` that puts the heads beside each other again.
        scale: what scores are multiplied by.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    size: int
    joined: ir.Node
    scale: float


@dataclass(frozen=True)
class Attentions:
    """How many layers' attention a graph has, and how many of them were rewritten."""

    all: int
    fused: int

    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if not self.all:
            return ("its attention is written in a way that is not fused; it runs operator by operator",)
        left = self.all - self.fused
        return (f"attention of {left} of {self.all} layers is not fused: it is of another kind",) if left else ()


def fuse_attention(editor: Editor) -> Attentions:
    """Rewrite the attention of every layer that is understood."""
    masks = Masks(editor)
    nodes = [node for node in editor.graph if node.op_type == "Attention"]
    fused = 0
    for node in nodes:
        layer = _read(node)
        if layer is not None and masks.hides_padding(node.inputs[3] if len(node.inputs) > 3 else None):
            fused += _multiply_less(layer, editor, masks) or _as_one(layer, editor, masks)
    return Attentions(len(nodes), fused)


def _read(node: ir.Node) -> Layer | None:
    """The layer around an operator; None where it looks otherwise."""
    if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
        return None
    if node.attributes.get_int("is_causal", 0) or node.attributes.get_float("softcap"):
        return None
    sides = [_split(value) for value in node.inputs[:3]]
    joined = _joined(node.outputs[0])
    if joined is None or None in sides:
        return None
    (query, size), (key, other), (value, third) = (side for side in sides if side is not None)
    if not size == other == third:
        return None
    scale = node.attributes.get_float("scale") or size**-0.5
    return Layer(node, query, key, value, size, joined, scale)


def _split(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """What was split into heads, and the size of a head."""
    turned = produced(value, "Transpose")
    if turned is None or turned.attributes.get_ints("perm") != (0, 2, 1, 3):
        return None
    parted = produced(turned.inputs[0], "Reshape")
    size = None if parted is None else _last_size(parted.inputs[1])
    if parted is None or size is None:
        return None
    return computed(parted), size


def _joined(value: ir.Value) -> ir.Node | None:
    """The ``Reshape`` behind. Torch puts zeros where a sequence has no token at all; that is left out."""
    chosen = only_use(value, "Where")
    if chosen is not None:
        value = chosen.outputs[0]
    turned = only_use(value, "Transpose")
    if turned is None or turned.attributes.get_ints("perm") != (0, 2, 1, 3):
        return None
    joined = only_use(turned.outputs[0], "Reshape")
    return joined if joined is not None and _last_size(joined.inputs[1]) is not None else None


def _last_size(shape: ir.Value | None) -> int | None:
    """The last of the sizes that a ``Reshape`` reads, where it is a constant; -1 where it follows from the others."""
    made = produced(shape, "Concat")
    sizes = constant(made.inputs[-1] if made is not None else shape)
    return None if sizes is None or sizes.ndim != 1 or not sizes.size else int(sizes[-1])


def _multiply_less(layer: Layer, editor: Editor, masks: Masks) -> bool:
    """Write the layer as the module says, where keys and values have at most as many factors as a head has numbers."""
    parts = [product(value) for value in (layer.query, layer.key, layer.value)]
    behind = only_use(layer.joined.outputs[0], "MatMul")
    if None in parts or behind is None or not is_matrix(behind.inputs[1]) or _last_size(layer.joined.inputs[1]) != -1:
        return False
    query, key, value = (part for part in parts if part is not None)
    if max(key.rank, value.rank) > layer.size:
        return False
    key_, name = (query.weight, query.bias, key.weight, layer.scale), f"{query.weight.name} x {key.weight.name}"
    weight, bias = _queries(query, key, layer)
    place = layer.node
    queries = editor.before(place, "MatMul", [query.source, editor.constant(key_, weight, name)])
    queries = editor.before(place, "Add", [queries, editor.constant(key_, bias, f"{name} bias")])
    queries = editor.before(place, "Reshape", [queries, editor.sizes(0, -1, key.rank + 1)])
    # The last number of a query is 1 and that of a key what the mask adds, so that the product adds the mask.
    keys = editor.before(place, "Concat", [key.source, masks.column()], axis=-1)
    scores = editor.before(place, "FusedMatMul", [queries, keys], transB=1)
    shares = editor.before(place, "Softmax", [scores], axis=-1)
    context = editor.before(place, "MatMul", [shares, value.source])
    flat = editor.before(place, "Reshape", [context, editor.sizes(-1, weight.shape[1] // (key.rank + 1) * value.rank)])
    layer.joined.replace_input_with(0, flat)
    _put_values_behind(value, behind, layer, editor)
    return True


def _queries(query: Product, key: Product, layer: Layer) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The matrix and the bias that make the heads' queries of ``query.source``; the last number of each head is 1."""
    ours, theirs = (numbers(part.weight).astype(np.float64) for part in (query, key))
    heads = ours.shape[1] // layer.size
    ours, theirs = (part.reshape(len(part), heads, layer.size) for part in (ours, theirs))
    weight = np.zeros((query.rank, heads, key.rank + 1))
    weight[..., :-1] = np.einsum("qhd,khd->qhk", ours, theirs) * layer.scale
    bias = np.ones((heads, key.rank + 1))
    offset = np.zeros(heads * layer.size) if query.bias is None else numbers(query.bias).astype(np.float64)
    bias[:, :-1] = np.einsum("hd,khd->hk", offset.reshape(heads, layer.size), theirs) * layer.scale
    return weight.reshape(query.rank, -1).astype(np.float32), bias.reshape(-1).astype(np.float32)


def _put_values_behind(value: Product, behind: ir.Node, layer: Layer, editor: Editor) -> None:
    """Multiply the last factor of the values, and their bias, into the product that reads the heads' sums."""
    weight = computed(behind, 1)
    after, before = (numbers(part).astype(np.float64) for part in (weight, value.weight))
    heads = len(after) // layer.size
    per_head = before.reshape(value.rank, heads, layer.size), after.reshape(heads, layer.size, -1)
    joint = np.einsum("vhd,hdo->hvo", *per_head).reshape(heads * value.rank, -1).astype(np.float32)
    key = (value.weight, value.bias, weight)
    name = f"{value.weight.name} x {weight.name}"
    behind.replace_input_with(1, editor.constant(key, joint, name))
    if value.bias is not None:
        bias = (numbers(value.bias).astype(np.float64) @ after).astype(np.float32)
        added = ir.node("Add", [behind.outputs[0], editor.constant(key, bias, f"{name} bias")])
        behind.outputs[0].replace_all_uses_with(added.outputs[0])
        added.replace_input_with(0, behind.outputs[0])
        editor.graph.insert_after(behind, added)


def _as_one(layer: Layer, editor: Editor, masks: Masks) -> bool:
    """Leave splitting into heads and joining them to the operator, and give it the one mask of all layers."""
    width = _width(layer.query)
    if width is None or width != _width(layer.key) or _last_size(layer.joined.inputs[1]) != -1:
        return False
    heads = width // layer.size
    node = ir.node(
        "Attention",
        [layer.query, layer.key, layer.value, masks.rows()],
        {"q_num_heads": heads, "kv_num_heads": heads, "scale": layer.scale},
    )
    editor.graph.insert_before(layer.node, node)
    flat = editor.before(layer.node, "Reshape", [node.outputs[0], editor.sizes(-1, width)])
    layer.joined.replace_input_with(0, flat)
    return True


def _width(value: ir.Value) -> int | None:
    """How many numbers each token has, where a product, its bias or a ``Reshape`` tells."""
    made = product(value)
    if made is not None:
        return int(numbers(made.weight).shape[1])
    parted = produced(value, "Reshape")
    if parted is not None:
        size = _last_size(parted.inputs[1])
        return size if size is not None and size > 0 else _width(computed(parted))
    added = produced(value, "Add")
    sides = [] if added is None else [side for side in added.inputs if side is not None]
    known = [array for array in map(constant, sides) if array is not None]
    if len(sides) == 2 and len(known) == 1:
        return len(known[0]) if known[0].ndim == 1 else _width(next(side for side in sides if constant(side) is None))
    return None
