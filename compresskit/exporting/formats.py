"""``compresskit.export``: a compressed folder in another format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PreTrainedModel

from compresskit import __version__
from compresskit.api import to_dense
from compresskit.errors import InputError, WorkError, unknown
from compresskit.exporting.agreement import agreement, example_inputs, in_onnxruntime, in_torch
from compresskit.model import checkpoint as checkpoints
from compresskit.model import output as outputs
from compresskit.model import sentence
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.targets import count_parameters

Format = Literal["onnx", "onnx-int8", "dense"]

FORMAT_VERSION = 1
GRAPH = "model.onnx"
#: Operator sets that can be written and that ONNX Runtime reads. 20 has an operator for GELU.
OPSETS = range(18, 26)
OPSET = 20
#: ONNX Runtime may differ from torch by so much of the largest output, or absolutely where that is below 1.
TOLERANCE = 1e-4
#: What protobuf, the format of ONNX files, can hold.
_LARGEST_FILE = 2**31

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        folder: where it lies.
        record: what its ``export.json`` holds: format, class, inputs and outputs, MB (10^6 bytes) of the weights before
            compression and now, how far the outputs are from the compressed model's, versions.
        notes: what the user should know.
    """

    folder: Path
    record: dict[str, Any]
    notes: tuple[str, ...] = ()


def export(
    model: str | Path,
    *,
    output: str | Path,
    format: Format = "onnx",
    opset: int | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a compressed model for another runtime.

    Args:
        model: a folder that compresskit wrote, or the hub id of one.
        output: the folder to write: the model, ``config.json``, the tokenizer files and ``export.json``.
        format: ``onnx`` (default): ``model.onnx`` in float32, factors stay factors, any batch and length.
            ``onnx-int8``: the same with weights in 8 bits. ``dense``: an ordinary checkpoint, in the stored dtype, with
            every factor multiplied out.
        opset: ONNX operator set, 18 to 25. Default: 20.
        overwrite: replace an output that compresskit wrote.

    Raises:
        InputError: a folder that is not ours, an unknown format or opset, an extra that is not installed, an output
            that exists.
        WorkError: the model cannot be written in this format, or ONNX Runtime computes something else than torch.
    """
    if format not in get_args(Format):
        raise unknown("format", str(format), get_args(Format))
    if opset is not None and format == "dense":
        raise InputError("an opset is for the formats onnx and onnx-int8")
    if opset is not None and opset not in OPSETS:
        raise InputError(f"opset {opset}: can be written from {OPSETS[0]} to {OPSETS[-1]}")
    check_extra(format)
    folder = Path(output)
    outputs.check_output(folder, overwrite)
    if folder.resolve() == Path(model).resolve():
        raise InputError(f"output {output}: is the model itself; choose another")
    read = checkpoints.read(model, compressed=True)
    return write(read, folder, format, opset=opset, overwrite=overwrite)


def check_extra(format: Format) -> None:
    """Refuse a format whose packages are not installed. Raises InputError."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if format != "dense" and missing:
        raise InputError(f"format {format}: {', '.join(missing)} missing; install the extra 'onnx' (compresskit[onnx])")


def write(
    read: Checkpoint, folder: Path, format: Format, *, opset: int | None = None, overwrite: bool = False
) -> Exported:
    """:func:`export` of a checkpoint that was read already; one that is not compressed may become ONNX too."""
    size = 4 * count_parameters(read.model)
    if format != "dense" and size >= _LARGEST_FILE:
        raise InputError(f"model {read.origin}: {size / 1e9:.1f} GB in float32; an ONNX file holds up to 2.1 GB")
    with outputs.output_folder(folder, overwrite) as temporary:
        if format == "dense":
            record, notes = _write_dense(read, temporary), _left_out(read)
        else:
            record, notes = _write_onnx(read, temporary, format == "onnx-int8", opset or OPSET), ()
        record = {
            "format_version": FORMAT_VERSION,
            "format": format,
            "model": read.name,
            "model_class": type(read.model).__name__,
            **record,
        }
        (temporary / outputs.EXPORT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Exported(folder, record, (*read.notes, *notes))


def _write_dense(read: Checkpoint, folder: Path) -> dict[str, Any]:
    assert read.folder is not None  # it was read from there
    dense = to_dense(read.model)
    dense.save_pretrained(folder)
    checkpoints.copy_tokenizer(read.folder, folder)
    if dense.base_model is dense:
        sentence.copy(read.folder, folder)
    return {
        "agreement": agreement(read.model, in_torch(dense)),
        "megabytes": _megabytes(read, checkpoints.weight_files(folder)),
        "versions": _versions("torch", "transformers"),
    }


def _left_out(read: Checkpoint) -> tuple[str, ...]:
    """Factors of parts that this class does not use cannot be multiplied out without their layers."""
    if not read.kept:
        return ()
    return (f"left out, since {type(read.model).__name__} does not use it: {', '.join(read.kept)}",)


def _write_onnx(read: Checkpoint, folder: Path, int8: bool, opset: int) -> dict[str, Any]:
    assert read.folder is not None  # it was read from there
    write_graph(read.model, folder / GRAPH, int8, opset)
    compared = agreement(read.model, in_onnxruntime(folder / GRAPH))
    for name, found in compared.items():
        if not int8 and not found["largest difference"] <= TOLERANCE * max(1.0, found["largest value"]):
            raise WorkError(
                f"ONNX Runtime differs from torch by {found['largest difference']:.2g} in {name}, more than "
                f"{TOLERANCE:g} of the largest value: nothing was written"
            )
    config = read.model.config.to_dict()
    config.pop("quantization_config", None)  # factors are in the graph; what reads this is no longer transformers
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    checkpoints.copy_tokenizer(read.folder, folder)
    return {
        "opset": opset,
        "inputs": list(example_inputs(read.model, 1, 1)),
        "outputs": list(compared),
        "agreement": compared,
        "megabytes": _megabytes(read, [folder / GRAPH]),
        "versions": _versions("torch", "transformers", *_PACKAGES),
    }


def write_graph(model: PreTrainedModel, path: Path, int8: bool, opset: int = OPSET) -> None:
    """The model as an ONNX file, with weights in float32 or in 8 bits. Raises WorkError: it cannot be traced."""
    import onnx_ir

    from compresskit.exporting.graph import to_graph
    from compresskit.exporting.int8 import to_int8

    graph = to_graph(model, opset)
    if int8:
        to_int8(graph)
    onnx_ir.save(graph, path)


def _megabytes(read: Checkpoint, written: list[Path]) -> dict[str, float | None]:
    """MB of weight files: of the checkpoint before compression (where the folder says it), compressed, exported."""
    assert read.folder is not None
    sizes = {
        name: sum(file.stat().st_size for file in files) / 1e6
        for name, files in (("compressed", checkpoints.weight_files(read.folder)), ("exported", written))
    }
    try:
        original = json.loads((read.folder / outputs.MARKER).read_text(encoding="utf-8"))["megabytes"]["before"]
    except (OSError, ValueError, KeyError, TypeError):
        original = None
    return {"original": original, **sizes}


def _versions(*packages: str) -> dict[str, str]:
    return {"compresskit": __version__} | {name: version(name) for name in packages}
