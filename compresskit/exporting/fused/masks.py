"""What a mask hides, found by trying it: families build theirs in different ways, which mean the same."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime

from compresskit.exporting.fused.reading import Editor, constant

#: What is added to the scores of hidden tokens: their share of the attention is then exactly zero.
HIDDEN = -1e30
#: Sequences and tokens of the trials. The last one is longer than half a window of local attention (ModernBERT: 64).
_TRIALS = ((2, 5), (3, 8), (1, 300))


class Masks:
    """The masks of a graph. Those that hide padding alone become one column, made once."""

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._known: dict[ir.Value, bool] = {}
        self._column: ir.Value | None = None
        self._rows: ir.Value | None = None

    def hides_padding(self, mask: ir.Value | None) -> bool:
        """Whether a mask hides the tokens that ``attention_mask`` calls padding, from every token, and no others."""
        if mask is None or not any(value.name == "attention_mask" for value in self._editor.graph.inputs):
            return False
        if mask not in self._known:
            self._known[mask] = _hides_padding(self._editor.graph, mask)
        return self._known[mask]

    def column(self) -> ir.Value:
        """What is added to scores, (batch, length, 1)."""
        if self._column is None:
            self._column = self._make()
        return self._column

    def rows(self) -> ir.Value:
        """The same for every token as a row, (batch, 1, length, length), as the operator ``Attention`` reads it."""
        if self._rows is None:
            column = self.column()
            after = column.producer()
            assert after is not None
            turned = ir.node("Transpose", [column], {"perm": [0, 2, 1]})
            one = ir.node("Unsqueeze", [turned.outputs[0], self._editor.sizes(1)])
            length = ir.node("Shape", [column], {"start": 1})  # (length, 1): of a row for every token
            rows = ir.node("Expand", [one.outputs[0], length.outputs[0]])
            self._editor.graph.insert_after(after, [turned, one, length, rows])
            self._rows = rows.outputs[0]
        return self._rows

    def _make(self) -> ir.Value:
        editor = self._editor
        mask = next(value for value in editor.graph.inputs if value.name == "attention_mask")
        first = editor.graph[0]
        kept = editor.before(first, "Cast", [mask], to=int(ir.DataType.FLOAT))
        one, hidden = (editor.constant(x, np.array(x, np.float32), "number") for x in (1.0, -HIDDEN))
        added = editor.before(first, "Mul", [editor.before(first, "Sub", [kept, one]), hidden])
        flat = editor.before(first, "Reshape", [added, editor.sizes(-1, 1)])
        length = editor.before(first, "Shape", [mask], start=-1)
        shape = editor.before(first, "Concat", [editor.sizes(-1), length, editor.sizes(1)], axis=0)
        return editor.before(first, "Reshape", [flat, shape])


def _hides_padding(graph: ir.Graph, mask: ir.Value) -> bool:
    """One trial for each size, with the first token of every sequence kept."""
    if constant(mask) is not None:
        return False
    part = ir.convenience.extract(graph, list(graph.inputs), [mask])
    floats = ir.node("Cast", [part.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    floats.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    part.append(floats)
    part.outputs[0] = floats.outputs[0]
    model = ir.to_proto(ir.Model(part, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    chance = np.random.default_rng(0)
    for batch, length in _TRIALS:
        kept = chance.integers(0, 2, (batch, length))
        kept[:, 0] = 1
        feeds = {}
        for value in graph.inputs:
            assert value.shape is not None
            shape = (batch, *[1] * (len(value.shape) - 2), length)
            feeds[str(value.name)] = (
                kept.reshape(shape) if value.name == "attention_mask" else np.zeros(shape, np.int64)
            )
        found = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})[0]
        if found.ndim != 4:
            return False
        boolean = found.max() == 1  # true is kept; a mask of floats adds 0 to what is kept
        visible, hidden = (found == 1, found == 0) if boolean else (found == 0, found <= -1e4)
        shape = (batch, 1, length, length)
        if any(size not in (1, whole) for size, whole in zip(found.shape, shape, strict=True)):
            return False
        expected = np.broadcast_to(kept[:, None, None, :] == 1, shape)
        if not (np.broadcast_to(visible, shape) == expected).all() or (visible == hidden).any():
            return False
    return True
