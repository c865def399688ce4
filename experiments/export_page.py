"""The page and the picture of the report on exports, from its records alone; what was not measured yet stays empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt

_FLOAT = ("onnx", "openvino")
_DENSE_8_BITS = ("onnx-int8", "dynamic int8", "static int8")
#: The share of the dense model's score that a row must keep to be named beside the fastest one.
_KEPT = 0.95
_INTRO = """# Exported models

`make bench-export` made this page and `records.json`. MB: files of weights (10^6 bytes); smaller, speed-up: than the
dense model's `onnx` for any runtime in ONNX Runtime. Error: of the first output in torch, ||y - y'|| / ||y||, on
random tokens. Milliseconds: sequences x tokens, all rows in turn, median and half the interquartile range. Up to
{loaded} tokens at a time all rows stay loaded; with more of them a row is loaded, run once and then timed, in every
round. Cold start and memory: a process that imports the runtime and numpy, loads the graph and runs it on 128 tokens,
until the answer, and the largest resident memory; one thread, median of five. `dynamic int8` and `static int8` are
ONNX Runtime's own `quantize_dynamic` and `quantize_static` of the dense graph. OpenVINO computes in float32.
"""


def page(found: dict[str, Any]) -> str:
    """Markdown."""
    rows = found["rows"]
    if not rows:
        return "# Exported models\n\nNothing is measured yet.\n"
    parts = [_INTRO.format(loaded="1,024")]
    if found["times"]:
        parts += [
            "## Which row wins where\n",
            _winners(found),
            "## Students against the dense model\n",
            _students(found),
        ]
    parts += ["## Sizes, scores, cold start\n", "![score against milliseconds](export.png)\n", _sizes(found)]
    for threads in dict.fromkeys(key.partition(", ")[2] for key in found["times"]):
        parts += [f"## Milliseconds, {threads}\n", _times(found, threads)]
    loads = [block["load average"] for block in found["times"].values()]
    if loads:
        last = list(found["times"].values())[-1]["made on"].strip()
        parts += [f"{last} Load average before each shape: {min(loads):.1f} to {max(loads):.1f}.\n"]
    return "\n".join(parts)


def draw(found: dict[str, Any], path: Path) -> None:
    """Score against milliseconds of the first shape: a colour for each model, a marker for each format."""
    if not found["times"] or not found["scores"]:
        return
    key, block = next(iter(found["times"].items()))
    figure, axis = plt.subplots(figsize=(8, 5.5), layout="constrained")
    shown = {
        name: row for name, row in found["rows"].items() if name in found["scores"] and name in block["milliseconds"]
    }
    models = list(dict.fromkeys(row["model"] for row in shown.values()))
    forms = list(dict.fromkeys((row["format"], row["runtime"], row["by"]) for row in shown.values()))
    for name, row in shown.items():
        place = block["milliseconds"][name], 100 * found["scores"][name]
        marker = "osD^vPX*<>hp"[forms.index((row["format"], row["runtime"], row["by"])) % 12]
        axis.plot(*place, marker, color=plt.get_cmap("tab10")(models.index(row["model"]) % 10), markersize=6)
    for at, model in enumerate(models):
        axis.plot([], [], "o", color=plt.get_cmap("tab10")(at % 10), label=model)
    for at, (form, runtime, by) in enumerate(forms):
        axis.plot([], [], "osD^vPX*<>hp"[at % 12], color="grey", label=f"{form}, {runtime}, {by}")
    axis.set(xscale="log", xlabel=f"milliseconds ({key})", ylabel=f"{_metric(found)}")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _metric(found: dict[str, Any]) -> str:
    task = found.get("task")
    return f"{task['name']}, {task['metric'].replace('_', ' ')}" if task else "score"


def _base(found: dict[str, Any]) -> str:
    return next(iter(found["rows"]))


def _winners(found: dict[str, Any]) -> str:
    """The fastest row of every shape, and the fastest that keeps most of the score."""
    base, scores = _base(found), found["scores"]
    least = _KEPT * scores[base] if base in scores else None
    lines, firsts = [], Counter[str]()
    for key, block in found["times"].items():
        times = block["milliseconds"]
        firsts[min(times, key=lambda name: times[name])] += 1
        good = [name for name in times if least is not None and scores.get(name, 0) >= least]
        cells = [min(names, key=lambda name: times[name]) if names else None for names in (list(times), good)]
        lines.append([key, *("" if name is None else f"{name}: {times[base] / times[name]:.1f}x" for name in cells)])
    told = "; ".join(f"`{name}` at {count} of {len(lines)} shapes" for name, count in firsts.most_common())
    table = _table(["shape", "fastest", f"fastest with {100 * _KEPT:.0f} % of the dense score"], lines)
    return f"The fastest row is {told}.\n\n{table}"


def _students(found: dict[str, Any]) -> str:
    """Speed-ups of the best rows of each student for the first shape, side by side in one run."""
    key, block = next(iter(found["times"].items()))
    times, base = block["milliseconds"], _base(found)
    dense = [name for name in times if found["rows"][name]["model"] == found["rows"][base]["model"]]
    rival = min((n for n in dense if found["rows"][n]["format"] in _DENSE_8_BITS), key=lambda n: times[n], default=base)
    lines = []
    for model in dict.fromkeys(row["model"] for row in found["rows"].values()):
        cells = [model]
        for forms in (_FLOAT, ("onnx-int8",), ("onnx-int4",)):
            mine = [n for n in times if found["rows"][n]["model"] == model and found["rows"][n]["format"] in forms]
            cells.append(f"{times[base] / min(times[n] for n in mine):.2f}x" if mine else "")
            if forms == ("onnx-int8",):
                against = f"{times[rival] / min(times[n] for n in mine):.2f}x" if mine else ""
        lines.append([*cells, against])
    heads = [f"best row at {key}", "float", "8 bits", "4 bits", f"8 bits against `{rival}`"]
    return _table(heads, lines)


def _sizes(found: dict[str, Any]) -> str:
    base = found["rows"][_base(found)]
    lines = []
    for name, row in found["rows"].items():
        score, cold = found["scores"].get(name), found["cold"].get(name)
        lines.append(
            [
                *(row[key] for key in ("model", "format", "runtime", "by")),
                f"{row['megabytes']:.2f}",
                f"{base['megabytes'] / row['megabytes']:.1f}x",
                "" if row["error"] is None else f"{row['error']:.1e}",
                "" if score is None else f"{100 * score:.2f}",
                *(["", ""] if cold is None else [f"{cold['seconds']:.2f}", f"{cold['megabytes']:.0f}"]),
            ]
        )
    heads = ["model", "format", "graph for", "run by", "MB", "smaller", "error", _metric(found)]
    return _table([*heads, "cold start, s", "memory, MB"], lines)


def _times(found: dict[str, Any], threads: str) -> str:
    blocks = {key.partition(", ")[0]: block for key, block in found["times"].items() if key.endswith(f", {threads}")}
    base = _base(found)
    lines = []
    for name in found["rows"]:
        cells = [name]
        for block in blocks.values():
            times = block["milliseconds"]
            faster = f" ({times[base] / times[name]:.2f}x)" if name in times else ""
            cells.append(f"{times[name]:.2f} ± {block['spread'][name]:.2f}{faster}" if name in times else "")
        lines.append(cells)
    return _table(["row", *(f"{shape}, {block['rounds']} rounds" for shape, block in blocks.items())], lines)


def _table(heads: list[str], lines: Iterable[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows) + "\n"
