"""ONNX in float32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from compresskit.errors import InputError, unknown
from compresskit.exporting.format import FORMATS, ExportFormat, Runtime, Written, left_out

if TYPE_CHECKING:
    from compresskit.exporting.fused.rounded import Rounded
    from compresskit.model.checkpoint import Checkpoint
    from compresskit.tasks.predicting import Runnable

GRAPH = "model.onnx"
#: Operator sets that can be written and that ONNX Runtime reads. 20 has an operator for GELU, 23 one for attention.
OPSETS = range(18, 26)
_OPSET, _FUSED_OPSET = 20, 23

#: Sequences and tokens of what a fused graph is tried on.
_TRIAL = (4, 64)

#: What a graph is for.
Reader = Literal["any", "onnxruntime"]
#: Where a graph lies in its folder.
Layout = Literal["plain", "hub"]
_HUB = "onnx"


@dataclass(frozen=True)
class OnnxOptions:
    """Options of the ONNX formats.

    Attributes:
        opset: ONNX operator set, 18 to 25, for ONNX Runtime alone 23 to 25. Default: 20, and 23.
        runtime: ``any`` that reads ONNX, or ``onnxruntime``: its CPU provider alone.
        layout: ``plain``: ``model.onnx`` beside the other files. ``hub``: ``onnx/model.onnx`` (in 8 bits
            ``onnx/model_quantized.onnx``, in 4 ``onnx/model_q4.onnx``), where transformers.js and the ONNX backend of
            sentence-transformers look for it, and always a ``tokenizer.json``.
    """

    opset: int | None = None
    runtime: Reader = "any"
    layout: Layout = "plain"

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise unknown("layout", self.layout, get_args(Layout))
        if self.runtime not in get_args(Reader):
            raise unknown("runtime", self.runtime, get_args(Reader))
        if self.opset is None:
            return
        if self.opset not in OPSETS:
            raise InputError(f"opset {self.opset}: can be written from {OPSETS[0]} to {OPSETS[-1]}")
        if self.runtime == "onnxruntime" and self.opset < _FUSED_OPSET:
            lacks = "lacks the operator by which attention is found"
            raise InputError(
                f"opset {self.opset}: {lacks}; for runtime onnxruntime take {_FUSED_OPSET} to {OPSETS[-1]}"
            )

    @property
    def operator_set(self) -> int:
        """The operator set that is written."""
        return self.opset or (_FUSED_OPSET if self.runtime == "onnxruntime" else _OPSET)


@FORMATS.register
class Onnx(ExportFormat[OnnxOptions]):
    """A graph in which factors stay factors, with any batch and length."""

    name = "onnx"
    summary = "an ONNX graph in float32"
    options_type = OnnxOptions
    packages = ("onnx", "onnxscript", "onnxruntime")
    extra = "onnx"
    largest = 2**31  # what protobuf, the format of ONNX files, can hold
    tolerance: float | None = 1e-4
    runtime = Runtime("ONNX Runtime", "onnxruntime")
    #: Name of the graph in the layout of the hub, which says how exact it is.
    hub_name = "model.onnx"
    #: Whether products may be computed with 8-bit codes where the graph is for ONNX Runtime alone.
    eight_bits = False

    def write(self, read: Checkpoint, folder: Path, options: OnnxOptions) -> Written:
        from dataclasses import asdict

        import onnx_ir

        from compresskit.exporting.agreement import example_inputs
        from compresskit.exporting.fused.graph import fuse, shorten
        from compresskit.exporting.graph import to_graph
        from compresskit.exporting.pooled_graph import add_sentence_vector
        from compresskit.exporting.pooling import before_tokens, sentence_vector
        from compresskit.model import sentence
        from compresskit.model.inputs import full_attention
        from compresskit.model.positions import shortened

        if options.layout == "hub":
            _write_tokenizer(read, folder)
        encoder = read.folder if read.model.base_model is read.model else None
        graph = to_graph(read.model, options.operator_set)
        vector, notes = sentence_vector(read), left_out(read)
        if vector is not None:
            add_sentence_vector(graph.graph, vector)
            notes = (*notes, *before_tokens(read))
        elif encoder and (behind := sentence.modules_behind(encoder)):
            kinds = ", ".join(behind)
            notes = (
                *notes,
                f"no output sentence_embedding: the graph ends before what sentence-transformers adds ({kinds})",
            )
        if (limit := full_attention(read.model)) is not None:
            notes = (*notes, f"the graph attends to all tokens of a text; torch does so up to {limit} of them")
        record: dict[str, Any] = {"opset": options.operator_set, "runtime": options.runtime}
        rounded: tuple[Rounded, ...] = ()
        if options.runtime == "onnxruntime":
            trial = example_inputs(read.model, _TRIAL[0], shortened(read.model, _TRIAL[1]))
            inputs = {name: ids.numpy() for name, ids in trial.items()}
            weights = {name: tensor.float().cpu().numpy() for name, tensor in read.model.state_dict().items()}
            fused = fuse(graph, inputs, weights, eight_bits=self.eight_bits)
            graph, rounded, notes = fused.graph, fused.rounded, (*notes, *fused.notes)
        self.change(graph, options, rounded)
        if options.runtime == "onnxruntime":
            shorten(graph)
        path = folder / GRAPH if options.layout == "plain" else folder / _HUB / self.hub_name
        path.parent.mkdir(exist_ok=True)
        onnx_ir.save(graph, path)
        if encoder is not None:
            sentence.copy(encoder, folder)
        for kind, values in (("inputs", graph.graph.inputs), ("outputs", graph.graph.outputs)):
            record[kind] = [value.name for value in values]
        if rounded:
            record["products"] = [asdict(product) | {"shape": list(product.shape)} for product in rounded]
        return Written(record, notes)

    def change(self, graph: Any, options: OnnxOptions, rounded: tuple[Rounded, ...]) -> None:
        """What a format derived from this one does to the graph (an ``onnx_ir.Model``) before it is saved.

        Args:
            graph: what is changed.
            options: of the format.
            rounded: how products take their weights in 8 bits, where that was measured.
        """

    def load(self, folder: Path) -> Runnable:
        from compresskit.exporting.onnx_model import OnnxModel

        return OnnxModel(folder, graph_of(folder))

    def weight_files(self, folder: Path) -> list[Path]:
        return [graph_of(folder)]


def graph_of(folder: Path) -> Path:
    """The one graph of an exported folder, in either layout. Raises InputError: there is none, or there are several."""
    found = [path for path in (folder / GRAPH, *sorted((folder / _HUB).glob("model*.onnx"))) if path.is_file()]
    if not found:
        raise InputError(f"export {folder}: {GRAPH} is missing")
    if len(found) > 1:
        names = ", ".join(path.relative_to(folder).as_posix() for path in found)
        raise InputError(f"export {folder}: holds several graphs ({names}); keep one")
    return found[0]


def _write_tokenizer(read: Checkpoint, folder: Path) -> None:
    """``tokenizer.json``, which transformers.js reads. Raises InputError: there is none, and none can be made."""
    from compresskit.model.tokenizer import is_fast, load_tokenizer

    tokenizer = load_tokenizer(read)
    if tokenizer is None or not is_fast(tokenizer):
        lacks = "has no tokenizer" if tokenizer is None else f"has a {type(tokenizer).__name__}, which is no fast one"
        raise InputError(
            f"model {read.origin}: {lacks}, and layout hub needs a tokenizer.json; put one beside it, or take layout "
            "plain"
        )
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
