"""One row for each token of the batch, instead of one matrix for each sequence.

ONNX has a product with a sum in it (``Gemm``) for matrices alone. What is computed for each token by itself is
therefore computed on matrices of (batch x length) rows; sequences come back where something reads them, by a
``Reshape``, which moves no numbers.
"""

from __future__ import annotations

import onnx_ir as ir

from compresskit.exporting.fused.reading import Editor, computed, constant, is_matrix, is_vector, produced

#: Operators on numbers one by one.
_ONE_BY_ONE = frozenset({"Gelu", "Tanh", "Relu", "Erf", "Sigmoid"})
_TWO = frozenset({"Add", "Mul", "Sub", "Div"})


class Tokens:
    """The values of a graph that are kept as one row for each token.

    Attributes:
        nodes: the nodes that compute with them.
    """

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._flat: dict[ir.Value, ir.Value] = {}
        self._shapes: dict[ir.Value, ir.Value] = {}  # of a value as it was, for the one in its place
        self._whole: dict[ir.Value, ir.Value] = {}
        self.nodes: set[ir.Node] = set()

    def flatten(self) -> None:
        """Rewrite the graph, from the first LayerNorm on."""
        for node in list(self._editor.graph):
            if not self._take(node):
                self._give_back(node)
        for at, value in enumerate(self._editor.graph.outputs):
            if value in self._flat:
                self._output(at)
        self._editor.graph.sort()

    def add(self, value: ir.Value, *, like: ir.Value) -> None:
        """A new value with a row for each token, of the same sequences as ``like``."""
        made = value.producer()
        assert made is not None
        self._remember(made, self._shapes[like])

    def _take(self, node: ir.Node) -> bool:
        """Make a node compute on rows, where it can."""
        first = node.inputs[0] if node.inputs else None
        if node.op_type == "Reshape":
            return self._is_flat_already(node)
        if first is None:
            return False
        if node.op_type == "LayerNormalization":
            return self._normalise(node)
        if node.op_type in _ONE_BY_ONE or (node.op_type == "MatMul" and is_matrix(node.inputs[1])):
            return first in self._flat and self._on_rows(node, [0])
        if node.op_type == "Split" and node.attributes.get_int("axis", 0) == -1:
            return first in self._flat and self._on_rows(node, [0])
        if node.op_type == "Concat" and node.attributes.get_int("axis", 0) == -1:
            return all(value in self._flat for value in node.inputs) and self._on_rows(node, range(len(node.inputs)))
        if node.op_type in _TWO:
            rows = [at for at, value in enumerate(node.inputs) if value in self._flat]
            rest = [value for at, value in enumerate(node.inputs) if at not in rows]
            return bool(rows) and all(_is_narrow(value) for value in rest) and self._on_rows(node, rows)
        return False

    def _on_rows(self, node: ir.Node, inputs: list[int] | range) -> bool:
        shape = self._shapes[computed(node, inputs[0])]
        for at in inputs:
            node.replace_input_with(at, self._flat[computed(node, at)])
        self._remember(node, shape)
        return True

    def _remember(self, node: ir.Node, shape: ir.Value) -> None:
        """A node's outputs are rows from now on: what reads them is rewritten when it is its turn."""
        self.nodes.add(node)
        for value in node.outputs:
            self._flat[value] = value
            self._shapes[value] = shape

    def _normalise(self, node: ir.Node) -> bool:
        value, scale = node.inputs[:2]
        if value is None or not is_vector(scale) or node.attributes.get_int("axis", -1) != -1:
            return False
        if len(node.outputs) > 1:
            return False
        if value not in self._flat:
            width = len(constant(scale))  # type: ignore[arg-type]
            sizes = self._editor.before(node, "Shape", [value], start=0, end=-1)
            self._shapes[value] = self._editor.before(node, "Concat", [sizes, self._editor.sizes(-1)], axis=0)
            self._flat[value] = self._editor.before(node, "Reshape", [value, self._editor.sizes(-1, width)])
        return self._on_rows(node, [0])

    def _is_flat_already(self, node: ir.Node) -> bool:
        """Rows that a pass before made sequences of, for others to read: this undoes it."""
        inner = produced(node.inputs[0], "Reshape")
        if inner is None:
            return False
        sizes = constant(inner.inputs[1])
        if sizes is None or len(sizes) != 2 or sizes[0] != -1:
            return False
        self._flat[node.outputs[0]] = inner.outputs[0]
        self._shapes[node.outputs[0]] = computed(node, 1)
        return True

    def _give_back(self, node: ir.Node) -> None:
        """Give a node that reads sequences what it had."""
        for at, value in enumerate(node.inputs):
            if value is not None and value in self._flat:
                node.replace_input_with(at, self.sequences(value))

    def has(self, value: ir.Value) -> bool:
        """Whether a value has a row, or a place in a sequence, for each token."""
        return value in self._flat

    def sequences(self, value: ir.Value) -> ir.Value:
        """A value as it was, behind the node that makes its rows."""
        rows = self._flat[value]
        if rows is not value:
            return value  # it is there still
        if value not in self._whole:
            node = ir.node("Reshape", [value, self._shapes[value]])
            made = value.producer()
            assert made is not None
            self._editor.graph.insert_after(made, node)
            self._whole[value] = node.outputs[0]
        return self._whole[value]

    def _output(self, at: int) -> None:
        """Give an output of the graph its name and shape again."""
        graph = self._editor.graph
        value = graph.outputs[at]
        whole = self.sequences(value)
        if whole is not value:
            name = value.name
            value.name, whole.name = f"{name}_rows", name
            whole.shape, whole.type = value.shape, value.type
            value.shape = value.type = None
            graph.outputs[at] = whole


def _is_narrow(value: ir.Value | None) -> bool:
    """Whether a value is the same for every token: a constant number or vector."""
    found = constant(value)
    return found is not None and found.ndim <= 1
