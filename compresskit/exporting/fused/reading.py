"""What the passes over a graph share: reading constants and products, and writing nodes and constants."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

Array = NDArray[np.generic]


def constant(value: ir.Value | None) -> Array | None:
    """The numbers of a constant; None for a value that is computed."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def produced(value: ir.Value | None, *operators: str) -> ir.Node | None:
    """The node that makes a value, where it is one of ``operators``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in operators else None


def only_use(value: ir.Value, *operators: str) -> ir.Node | None:
    """The one node that reads a value, where there is one only, of ``operators``, and the value is no output."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    node = uses[0].node
    return node if node.op_type in operators else None


def computed(node: ir.Node, at: int = 0) -> ir.Value:
    """An input that the operator cannot lack."""
    value = node.inputs[at]
    assert value is not None
    return value


@dataclass(frozen=True)
class Product:
    """``source`` times a constant, plus a constant: what a linear layer, or its last factor, became.

    Attributes:
        source: what is multiplied, (..., n).
        weight: the constant, (n, m).
        bias: the constant, (m,); None where nothing is added.
    """

    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None

    @property
    def rank(self) -> int:
        """n: how many columns are multiplied."""
        return int(numbers(self.weight).shape[0])


def numbers(value: ir.Value) -> NDArray[np.float32]:
    """The numbers of what is known to be a constant of floats."""
    found = constant(value)
    assert found is not None
    return found.astype(np.float32, copy=False)


def is_matrix(value: ir.Value | None) -> bool:
    """Whether a value is a constant matrix of floats."""
    found = constant(value)
    return found is not None and found.ndim == 2 and found.dtype == np.float32


def is_vector(value: ir.Value | None) -> bool:
    """Whether a value is a constant vector of floats."""
    found = constant(value)
    return found is not None and found.ndim == 1 and found.dtype == np.float32


def product(value: ir.Value | None) -> Product | None:
    """The product that makes a value, with its bias if it has one."""
    bias = None
    added = produced(value, "Add")
    if added is not None:
        value, bias = added.inputs
        if is_vector(value):
            value, bias = bias, value
        if not is_vector(bias):
            return None
    made = produced(value, "MatMul")
    if made is None or not is_matrix(made.inputs[1]):
        return None
    return Product(computed(made), computed(made, 1), bias)


@dataclass
class Editor:
    """Writes into a graph. A constant that is asked for again under the same key is the same one.

    Attributes:
        graph: what is changed.
    """

    graph: ir.Graph
    _constants: dict[Hashable, ir.Value] = field(default_factory=dict)
    _computed: dict[Hashable, ir.Value] = field(default_factory=dict)

    def constant(self, key: Hashable, array: Array, name: str) -> ir.Value:
        """A constant; ``key`` says what it was computed from."""
        known = self._constants.get((name, key))
        if known is None:
            unique = name
            while unique in self.graph.initializers:
                unique = f"{name}_{len(self._constants)}"
                name += "_"
            known = ir.Value(name=unique, const_value=ir.tensor(np.array(array, order="C"), name=unique))
            self.graph.register_initializer(known)
            self._constants[(name, key)] = known
        return known

    def sizes(self, *sizes: int) -> ir.Value:
        """A constant of sizes, as ``Reshape`` reads it."""
        return self.constant(sizes, np.array(sizes, np.int64), "sizes")

    def once(self, operator: str, constants: Sequence[ir.Value], **attributes: int) -> ir.Value:
        """What ONNX Runtime computes of constants when it loads the graph; the same for the same constants."""
        key = (operator, *constants)
        if key not in self._computed:
            self._computed[key] = self.before(self.graph[0], operator, constants, **attributes)
        return self._computed[key]

    def before(
        self, place: ir.Node, operator: str, inputs: Sequence[ir.Value | None], **attributes: int | float | str
    ) -> ir.Value:
        """The output of a new node in front of ``place``; operators of ONNX alone are in no domain of their own."""
        domain = "com.microsoft" if operator in ("FusedMatMul", "DynamicQuantizeMatMul") else ""
        node = ir.node(operator, inputs, attributes, domain=domain)
        self.graph.insert_before(place, node)
        return node.outputs[0]
