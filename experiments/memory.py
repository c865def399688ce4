"""Peak anonymous memory and time of compressing checkpoints of growing size.

Run: python experiments/memory.py [--keep FOLDER]
Makes XLM-R-shaped random checkpoints (bfloat16, sharded) of 0.28, 0.56 and 3.5 billion parameters, compresses each one
in a process of its own and writes memory.md, memory.json and memory.png into reports/speed/. Needs 8 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from safetensors.torch import save_file
from timing import REPORT, made_on
from transformers import XLMRobertaConfig, XLMRobertaModel

from compresskit.folders.compression import read_record
from compresskit.markup import markdown

matplotlib.use("agg")
from matplotlib import pyplot as plt

VOCABULARY = 250_002
#: Hidden size, layers, heads, FFN size: XLM-R base, large and XL.
SHAPES = {"0.28B": (768, 12, 12, 3072), "0.56B": (1024, 24, 16, 4096), "3.5B": (2560, 36, 32, 10240)}
METHODS = ("kronecker", "low-rank")
RATIO = 19
SHARD = 500_000_000


def make(shape: tuple[int, int, int, int], folder: Path) -> dict[str, int]:
    """A random checkpoint written shard by shard; its sizes."""
    hidden, layers, heads, intermediate = shape
    config = XLMRobertaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=514,
        architectures=["XLMRobertaModel"],
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = XLMRobertaModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shards: list[list[str]] = [[]]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    size = 0
    for name, dimensions in shapes.items():
        if size and size + 2 * dimensions.numel() > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * dimensions.numel()
    index: dict[str, Any] = {"metadata": {"total_size": 2 * sum(s.numel() for s in shapes.values())}, "weight_map": {}}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: 0.02 * torch.randn(shapes[name], generator=generator, dtype=torch.bfloat16) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index["weight_map"] |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder)
    largest = max(s.numel() for s in shapes.values())
    return {"parameters": sum(s.numel() for s in shapes.values()), "largest_tensor_fp32": 4 * largest}


def measure(checkpoint: Path, method: str, output: Path) -> dict[str, Any]:
    """Seconds and peak RssAnon (bytes) of ``compresskit compress``."""
    line = [sys.executable, "-m", "compresskit", "compress", "--model", str(checkpoint), "--method", method]
    line += ["--ratio", str(RATIO), "--output", str(output), "--overwrite"]
    start, peak = time.perf_counter(), 0
    errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=errors)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for entry in status.read_text().splitlines():
            if entry.startswith("RssAnon:"):
                peak = max(peak, 1024 * int(entry.split()[1]))
        time.sleep(0.02)
    if process.returncode:
        errors.seek(0)
        raise SystemExit(errors.read().decode())
    ratio = read_record(output).ratio
    return {"method": method, "seconds": time.perf_counter() - start, "peak": peak, "ratio": ratio}


def main() -> None:
    """Every size and method, then the report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--keep", type=Path, help="folder for checkpoints, kept; default: a temporary one")
    parser.add_argument("--sizes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    arguments = parser.parse_args()
    root = arguments.keep or Path(tempfile.mkdtemp())
    rows = []
    for name in arguments.sizes:
        sizes = make(SHAPES[name], root / name)
        for method in METHODS:
            row = {"model": name, **sizes, **measure(root / name, method, root / f"{name}-{method}")}
            row["bound"] = 1.5 * sizes["largest_tensor_fp32"] + 1e9
            print(row, flush=True)
            rows.append(row)
        if arguments.keep is None:
            shutil.rmtree(root / name)
    if arguments.sizes == list(SHAPES):
        write(rows)
    if arguments.keep is None:
        shutil.rmtree(root)


def write(rows: list[dict[str, Any]]) -> None:
    """The report."""
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / "memory.json").write_text(json.dumps(rows, indent=1) + "\n")
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method in METHODS:
        mine = [row for row in rows if row["method"] == method]
        billions = [row["parameters"] / 1e9 for row in mine]
        axes[0].plot(billions, [row["peak"] / 1e9 for row in mine], "o-", label=method)
        axes[1].plot(billions, [row["seconds"] for row in mine], "o-", label=method)
    axes[0].plot(
        billions, [row["bound"] / 1e9 for row in mine], "--", color="grey", label="1.5 x largest tensor + 1 GB"
    )
    axes[0].plot(billions, [4 * b for b in billions], ":", color="grey", label="the dense model in fp32")
    axes[0].set(xlabel="billion parameters", ylabel="peak anonymous memory, GB", ylim=(0, None))
    axes[1].set(xlabel="billion parameters", ylabel="seconds", ylim=(0, None))
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(REPORT / "memory.png", dpi=130)
    columns = ("model", "parameters", "method", "ratio", "seconds", "peak GB", "allowed GB", "dense fp32 GB")
    table = [
        [
            row["model"], f"{row['parameters']:,}", row["method"], f"{row['ratio']:.2f}x", f"{row['seconds']:.0f}",
            f"{row['peak'] / 1e9:.2f}", f"{row['bound'] / 1e9:.2f}", f"{4 * row['parameters'] / 1e9:.2f}",
        ]
        for row in rows
    ]  # fmt: skip
    (REPORT / "memory.md").write_text(
        "# Memory by checkpoint size\n\n"
        f"`python experiments/memory.py`: XLM-R-shaped random checkpoints (bfloat16, shards of {SHARD // 10**6} MB), "
        f"`compresskit compress --ratio {RATIO}`, one process each. Peak: the largest RssAnon of /proc, read every "
        "20 ms, the interpreter and all libraries included. Allowed: 1.5 x the largest tensor in fp32 + 1 GB.\n\n"
        + markdown(columns, table)
        + "\n\n![Peak memory and time by size](memory.png)\n\n"
        "The dense checkpoint is mapped, not read: safetensors hands out pages of the file, each matrix is replaced by "
        "its factors before the next one is looked at, large tables are worked on in blocks of rows.\n\n"
        "Peaks of kronecker at 3.5B differ from run to run, measured between 1.7 and 2.4 GB: 0.5 GB and more of them "
        "are holes between the factors, which glibc keeps for later. With `MALLOC_MMAP_THRESHOLD_=4194304` in the "
        "environment it gives them back, and the peak is 1.2 GB.\n\n" + made_on(),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
