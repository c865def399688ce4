"""``compresskit.export``: a compressed folder in another format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compresskit import __version__
from compresskit.errors import CompresskitError, InputError, WorkError, one_line, unknown
from compresskit.exporting.agreement import agreement
from compresskit.exporting.format import FORMATS, ExportFormat, Runtime
from compresskit.exporting.pooling import sentence_vector
from compresskit.folders.compression import read_record
from compresskit.model import checkpoint as checkpoints
from compresskit.model import output as outputs
from compresskit.model import sentence
from compresskit.model.checkpoint import Checkpoint
from compresskit.model.targets import count_parameters

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Exported:
    """What :func:`export` wrote.

    Attributes:
        folder: where it lies.
        record: what its ``export.json`` holds: format, class, inputs and outputs, MB (10^6 bytes) of the weights before
            compression and now, how far the outputs are from the compressed model's, versions, names of the files.
        notes: what the user should know.
    """

    folder: Path
    record: dict[str, Any]
    notes: tuple[str, ...] = ()


def export(
    model: str | Path,
    *,
    output: str | Path,
    format: str = "onnx",
    opset: int | None = None,
    runtime: str | None = None,
    layout: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> Exported:
    """Write a compressed model for another runtime.

    Args:
        model: a folder that compresskit wrote, or the hub id of one.
        output: the folder to write: the model, ``config.json``, the tokenizer files and ``export.json``.
        format: ``onnx`` (default): ``model.onnx`` in float32, factors stay factors, any batch and length.
            ``onnx-int8``: the same with weights in 8 bits. ``onnx-int4``: also with embeddings in 4 bits, for ONNX
            Runtime alone. ``openvino``: OpenVINO's own format, in float32. ``dense``: an ordinary checkpoint, in the
            stored dtype, with every factor multiplied out. Other packages may add formats.
        opset: ONNX operator set, 18 to 25; 23 to 25 for ONNX Runtime alone. Default: 20, 23 for ONNX Runtime alone.
        runtime: what the graph is for: ``any`` that reads ONNX (default), or ``onnxruntime``, with operators that only
            its CPU provider has and that make it faster. Default of ``onnx-int4``: ``onnxruntime``.
        layout: of an ONNX folder: ``plain`` (default), or ``hub``: the graph lies in ``onnx/``, where transformers.js
            and the ONNX backend of sentence-transformers look for it.
        overwrite: replace an output that compresskit wrote.
        options: further options of a format from another package.

    Raises:
        InputError: a folder that is not ours, an unknown format or opset, an extra that is not installed, an output
            that exists.
        WorkError: the model cannot be written in this format, or its runtime computes something else than torch.
    """
    if not isinstance(model, str | Path):
        raise InputError(
            f"model: give a folder that compresskit wrote, or a hub id, not a {type(model).__name__}; save it first "
            "(save_pretrained)"
        )
    settings = options_of(FORMATS.get(format), {"opset": opset, "runtime": runtime, "layout": layout, **options})
    FORMATS.installed(format)
    folder = Path(output)
    outputs.check_output(folder, overwrite)
    if folder.resolve() == Path(model).resolve():
        raise InputError(f"output {output}: is the model itself; choose another")
    return write(checkpoints.read(model, compressed=True), folder, format, settings, overwrite=overwrite)


def write(
    read: Checkpoint, folder: Path, format: str, options: object | None = None, *, overwrite: bool = False
) -> Exported:
    """:func:`export` of a checkpoint that was read already; in most formats it need not be compressed.

    Args:
        read: the checkpoint, from a folder.
        folder: where to write.
        format: a registered format.
        options: of the format. Default: its defaults.
        overwrite: replace a folder that compresskit wrote.

    Raises:
        InputError, WorkError: see :func:`export`.
    """
    chosen = FORMATS.get(format)
    size = 4 * count_parameters(read.model)
    if chosen.largest is not None and size >= chosen.largest:
        limit = f"format {format} holds up to {chosen.largest / 1e9:.1f} GB"
        raise InputError(f"model {read.origin}: {size / 1e9:.1f} GB in float32; {limit}")
    with outputs.output_folder(folder, overwrite) as temporary:
        written = chosen.write(read, temporary, options or chosen.options_type())
        _write_companions(read, temporary)
        record = {
            "format_version": FORMAT_VERSION,
            "format": format,
            "model": read.name,
            "model_class": type(read.model).__name__,
            **written.record,
            "agreement": _agreement(chosen, read, temporary),
            "megabytes": {**_megabytes_before(read), "exported": _megabytes(chosen.weight_files(temporary))},
            "versions": _versions("torch", "transformers", *chosen.packages),
            "files": sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()),
        }
        (temporary / outputs.EXPORT).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        left_out = _left_out(read, temporary)
    return Exported(folder, record, (*read.notes, *written.notes, *left_out))


def is_whole(format: str, folder: Path) -> bool:
    """Whether a folder holds all weights of an export."""
    try:
        FORMATS.get(format).weight_files(folder)
    except InputError:
        return False
    return True


def takes(chosen: ExportFormat[Any], option: str) -> bool:
    """Whether the format has an option of this name."""
    return option in _names(chosen)


def options_of(chosen: ExportFormat[Any], given: Mapping[str, Any]) -> object:
    """The format's options; what is None is left at its default. Raises InputError: not an option of the format."""
    asked = {name: value for name, value in given.items() if value is not None}
    for name in asked:
        if name not in _names(chosen):
            takers = [known for known, other in FORMATS.all().items() if name in _names(other)]
            if not takers:
                raise unknown(f"option of format {chosen.name}", name, _names(chosen))
            article = "an" if name[0] in "aeiou" else "a"
            raise InputError(f"{article} {name} is for the format{'s' * (len(takers) > 1)} {' and '.join(takers)}")
    options: object = chosen.options_type(**asked)
    return options


def _names(chosen: ExportFormat[Any]) -> list[str]:
    return [option.name for option in fields(chosen.options_type)]


def _write_companions(read: Checkpoint, folder: Path) -> None:
    """The configuration, unless the format wrote one, and the tokenizer files."""
    path = folder / "config.json"
    if not path.exists():
        config = read.model.config.to_dict()
        config.pop("quantization_config", None)  # factors are in the file; what reads this is no longer transformers
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    checkpoints.write_tokenizer(read, folder)


def _left_out(read: Checkpoint, folder: Path) -> tuple[str, ...]:
    """A note on what sentence-transformers does with the model and the written folder does not."""
    if read.folder is None or not (read.folder / sentence.MODULES).is_file() or (folder / sentence.MODULES).is_file():
        return ()
    behind = ", ".join(sentence.modules_behind(read.folder)) or "its modules"
    return (
        f"left out: what sentence-transformers does before and behind the encoder (prompts, lower case, {behind}); the "
        "outputs are those of the encoder, one vector for each token",
    )


def _agreement(chosen: ExportFormat[Any], read: Checkpoint, folder: Path) -> dict[str, dict[str, float]]:
    """How far what was written is from the model in torch; nothing where the format cannot be run here.

    Raises:
        WorkError: further than the format allows, or the runtime fails.
    """
    runtime = chosen.runtime or Runtime(f"format {chosen.name}", "")
    try:
        run = chosen.load(folder)
        compared = {} if run is None else agreement(read.model, run, sentence_vector(read))
    except CompresskitError:
        raise
    except Exception as error:  # runtimes raise what they like
        failed = f"{type(read.model).__name__} was written as {chosen.name}, which {runtime.name} cannot run"
        raise WorkError(f"{failed}: {one_line(error)}: nothing was written") from error
    for name, found in compared.items():
        most = chosen.tolerance
        if not math.isfinite(found["largest difference"]):
            raise WorkError(f"{runtime.name} or torch computes NaN or infinity in {name}: nothing was written")
        # Not a number is too far, too.
        if most is not None and not found["largest difference"] <= most * max(1.0, found["largest value"]):
            raise WorkError(
                f"{runtime.name} differs from torch by {found['largest difference']:.2g} in {name}, more than "
                f"{most:g} of the largest value: nothing was written"
            )
    return compared


def _megabytes_before(read: Checkpoint) -> dict[str, float | None]:
    """MB of weight files: of the checkpoint before compression (where the folder says it), and as it was read."""
    if read.folder is None:
        return {"original": None, "compressed": None}
    try:
        original = read_record(read.folder).megabytes.before
    except InputError:
        original = None
    return {"original": original, "compressed": _megabytes(checkpoints.weight_files(read.folder))}


def _megabytes(files: list[Path]) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def _versions(*packages: str) -> dict[str, str]:
    return {"compresskit": __version__} | {name: version(name) for name in packages}
