"""Does a compressed folder hold what its record says? One line for everything that is not so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedModel

from compresskit.errors import InputError
from compresskit.folders.compression import CompressionRecord, check_version, read_record
from compresskit.folders.training import read_stages
from compresskit.model import checkpoint as checkpoints
from compresskit.model.measure import count_flops
from compresskit.model.output import MARKER, TRAINING
from compresskit.model.quantizer import quantizer_of
from compresskit.model.targets import count_parameters
from compresskit.model.weights import changed_files, fingerprints, recorded_weights
from compresskit.planning.recipe import load_recipe

_RECIPE = "recipe.yaml"
#: Endings of files that run code when they are unpickled; nothing of ours ends so.
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def verify(folder: str | Path) -> list[str]:
    """Check a folder that ``compress`` or ``distill`` wrote; one line per finding, none where all is well.

    Checked are the hashes of the weights; that the model loads strictly (no weight missing, unknown, of another shape
    or not finite); specs, parameters, ratio, MB and FLOPs of ``compression.json`` against that model; ``recipe.yaml``
    and ``training.json``. Errors (``‖W - W'‖ / ‖W‖``) cannot be checked without the dense model, scores not without
    the data.

    Raises:
        InputError: no such folder, or nothing to check against: no ``compression.json``, or one of another version.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    check_version(folder)
    found = [*_files(folder)]
    try:
        model = checkpoints.load_compressed(folder, check_hashes=False)
        record = read_record(folder)
    except InputError as error:
        return [*found, str(error)]
    return [*found, *_figures(folder, record, model)]


def _files(folder: Path) -> Iterator[str]:
    recorded = recorded_weights(folder)
    if recorded is None:
        yield f"{MARKER}: has no hashes of the weights (written by an earlier compresskit)"
    yield from (f"{path.name}: may hold code, nothing reads it" for path in _pickles(folder))
    try:
        yield from changed_files(folder, recorded)
        load_recipe(folder / _RECIPE)
        read_stages(folder)
    except InputError as error:
        yield str(error)


def _pickles(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in _PICKLES)


def _figures(folder: Path, record: CompressionRecord, model: PreTrainedModel) -> Iterator[str]:
    """What the record says and the model does not bear out."""
    before, after = record.parameters.before, record.parameters.after
    saved = sum(group.parameters_before - group.parameters_after for group in record.groups)
    trimmed = record.trimmed.parameters.before - record.trimmed.parameters.after if record.trimmed is not None else 0
    claims = [
        ("ratio", record.ratio, before / after),
        ("parameters that the groups save", before - after - trimmed, saved),
    ]
    # A student takes over its teacher's class: then the totals of the compression are of another head.
    if record.model_class == type(model).__name__:
        flops = count_flops(model)
        claims += [
            ("parameters after", after, count_parameters(model)),
            ("FLOPs after", record.flops.after, flops.total),
            ("FLOPs of linear layers after", record.flops_linear.after, flops.linear),
        ]
        if not (folder / TRAINING).exists():  # the header of a trained model's file may differ by some bytes
            size = sum(entry["bytes"] for entry in fingerprints(folder).values())
            claims.append(("MB after", record.megabytes.after, size / 1e6))
    for what, said, measured in claims:
        if said != measured:
            yield f"{MARKER}: {what} {said:,}, the folder has {measured:,}"
    config = quantizer_of(model).quantization_config
    specs = {
        name: {key: value for key, value in entry.items() if key != "targets"}
        for name, entry in {**config.base, **config.head}.items()
    }
    if len(specs) != len(record.groups):
        yield f"config.json: factorises {len(specs)} groups, {MARKER} has {len(record.groups)}"
    for group in record.groups:
        # Names in config.json are relative to the base model.
        name = next((name for name in specs if group.name == name or group.name.endswith(f".{name}")), None)
        if name is None or specs[name] != group.spec:
            yield f"config.json: spec of {group.name} is not the one in {MARKER}"
