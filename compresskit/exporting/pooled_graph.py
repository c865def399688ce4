"""The vector of a sentence as an output of an ONNX graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from compresskit.exporting.pooling import LEAST_LENGTH, LEAST_TOKENS, OUTPUT, TOKENS, SentenceVector


def add_sentence_vector(graph: ir.Graph, vector: SentenceVector) -> None:
    """Add the output ``sentence_embedding``, (batch, h), to a graph that has the tokens' vectors."""
    hidden = next(value for value in graph.outputs if value.name == TOKENS)
    writer = _Writer(graph)
    if vector.pooling == "cls":
        vectors = writer.node("Gather", [hidden, writer.number(0, np.int64)], axis=1)
    else:
        mask = next(value for value in graph.inputs if value.name == "attention_mask")
        kept = writer.node("Cast", [mask], to=int(ir.DataType.FLOAT))
        one = writer.number([1], np.int64)
        summed = writer.node("MatMul", [writer.node("Unsqueeze", [kept, one]), hidden])
        count = writer.node("ReduceSum", [kept, one], keepdims=1)
        count = writer.node("Max", [count, writer.number(LEAST_TOKENS, np.float32)])
        vectors = writer.node("Div", [writer.node("Squeeze", [summed, one]), count])
    if vector.normalised:
        length = writer.node("ReduceL2", [vectors, writer.number([1], np.int64)], keepdims=1)
        length = writer.node("Max", [length, writer.number(LEAST_LENGTH, np.float32)])
        vectors = writer.node("Div", [vectors, length])
    vectors.name = OUTPUT
    assert hidden.shape is not None
    vectors.shape = ir.Shape([hidden.shape[0], hidden.shape[-1]])
    vectors.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(vectors)


@dataclass
class _Writer:
    graph: ir.Graph
    count: int = 0

    def node(self, operator: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        made = ir.node(operator, inputs, attributes)
        self.graph.append(made)
        return made.outputs[0]

    def number(self, number: float | list[int], dtype: type[np.generic]) -> ir.Value:
        self.count += 1
        name = f"pooling_{self.count}"
        value = ir.Value(name=name, const_value=ir.tensor(np.array(number, dtype), name=name))
        self.graph.register_initializer(value)
        return value
