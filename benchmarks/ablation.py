"""What each idea of the best students is worth: one at a time is left out, everything else stays.

Run: python benchmarks/ablation.py --task mrpc --teacher FOLDER --data DIR [--seeds 0,1,2] [--only NAME] [--threads 1]
Teacher: the task's fine-tuned model, e.g. cells/*-dense-mrpc-*/model of a bench-glue report. Work goes into
runs/ablation/; a stopped run continues. Finished records lie in reports/ablation/ and are not made again; README.md
there shows all of them. Without --task it is only written anew. --grid takes the students that a bench-glue report has
(same cut, same training) for the rows that they are, before anything runs.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ideas
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer

import compresskit
from compresskit.calibration.statistics import Calibration, _task_batches
from compresskit.markup import markdown
from compresskit.model import checkpoint
from compresskit.model.weights import file_hash
from compresskit.planning import blocks
from compresskit.planning.recipe import Allocation
from compresskit.planning.stage import DEFAULTS
from compresskit.storage.writing import write_text
from compresskit.tasks.task import load_data, load_task
from compresskit.training.settings import with_settings
from compresskit.training.working_folder import working_folder

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "reports" / "ablation"
RATIO = 19
#: That ideas about factors read: as many as a calibration.
IDEA_TOKENS = 65_536
#: Of every student, as in the bench recipe bench-glue; SST-2 has 8 to 27 times the rows of the others.
EPOCHS = {"sst2": 1.0}
EPOCHS_OTHERWISE = 4.0


@dataclass(frozen=True)
class Variant:
    """A student.

    Attributes:
        method: of all matrices.
        allocation: of parameters to matrices; ``auto`` always takes ``error``.
        start: what is cut: ``teacher``, the fine-tuned model, or ``checkpoint``, the pre-trained one.
        calibrated: whether factors and plan keep the outputs on the task's training rows, or the weights.
        weighed: whether plans weigh matrices by how much predictions depend on them, or count them alike.
        embedding: how often plans count the error of the word embedding; None: as they do.
        idea: of ideas.py; None: the package as it is.
        training: settings that differ; a loss that is not named keeps its weight.
    """

    method: str = "auto"
    allocation: Allocation | None = None
    start: str = "teacher"
    calibrated: bool = True
    weighed: bool = True
    embedding: int | None = None
    idea: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


#: What decides the cut, beside the method and some ideas.
_CUT = ("allocation", "start", "calibrated", "weighed", "embedding")
#: What records keep of a cell's.
_MADE_BY = {
    "versions": ("compresskit", "torch", "transformers", "accelerate", "datasets"),
    "hardware": ("machine", "device", "threads"),
}

_ALL_OF_IT, _ALIKE = "all of it", "matrices counted alike"

#: Rows that a bench-glue report has too, by its methods.
_IN_GRID = {"auto": _ALL_OF_IT, "low-rank": "low-rank", "group-reduce": "group-reduce", "kronecker": "kronecker"}

#: Plans of today, and those that no weight can reach: by the weights, uniform, of a model without a head.
_TODAY = {
    _ALL_OF_IT: Variant(),
    "of the pre-trained checkpoint": Variant(start="checkpoint", weighed=False),
    "plan and factors by the weights": Variant(calibrated=False, weighed=False),
    "embedding counted once": Variant(embedding=1),
    "batches of 32": Variant(training={"batch_size": 32}),
    "learning rate 1e-3": Variant(training={"learning_rate": 1e-3}),
    "learning rate 2.5e-4": Variant(training={"learning_rate": 2.5e-4}),
    "no attention loss": Variant(training={"losses": {"attention": 0}}),
    "logits and labels alone": Variant(training={"losses": {"embedding": 0, "attention": 0, "hidden": 0}}),
    "labels alone": Variant(training={"losses": {"embedding": 0, "attention": 0, "hidden": 0, "logits": 0}}),
    "logits weight 5": Variant(training={"losses": {"logits": 5}}),
    "temperature 2": Variant(training={"temperature": 2}),
    "relations for attention scores": Variant(idea="relations"),
    "relations alone of what is inside": Variant(idea="relations", training={"losses": {"embedding": 0, "hidden": 0}}),
    "factors twice as fast": Variant(idea="factors twice as fast"),
    "factors half as fast": Variant(idea="factors half as fast"),
    "one-sided factors": Variant(idea="one-sided"),
    "low-rank": Variant("low-rank", "error"),
    "low-rank, layer by layer": Variant("low-rank", "error", idea="layer by layer"),
    "low-rank, uniform": Variant("low-rank", "uniform", weighed=False),
    "low-rank, uniform, weights kept": Variant("low-rank", "uniform", calibrated=False, weighed=False),
    "group-reduce": Variant("group-reduce", "error"),
    "tensor-train": Variant("tensor-train", "error"),
    "tucker": Variant("tucker", "error"),
    "kronecker": Variant("kronecker", "error"),
    "kronecker, uniform": Variant("kronecker", "uniform", weighed=False),
    "kronecker, uniform, weights kept": Variant("kronecker", "uniform", calibrated=False, weighed=False),
}


def counted_alike(name: str) -> str:
    """The name of a row whose plan does not weigh matrices."""
    return _ALIKE if name == _ALL_OF_IT else f"{name}, {_ALIKE}"


VARIANTS = _TODAY | {
    counted_alike(name): replace(variant, weighed=False)
    for name, variant in _TODAY.items()
    if variant.weighed and variant.idea is None
}


def slug(name: str) -> str:
    """Part of a file's name."""
    return name.replace(",", "").replace(" ", "-")


def cut(variant: Variant, teacher: Path, task: str, data: Path, folder: Path) -> None:
    """The student before training, unless it is there."""
    if folder.is_dir():
        return
    model = teacher if variant.start == "teacher" else None
    rows = {"calibration_task": task, "data": data} if variant.calibrated else {}
    sensitivity, counted = Calibration.sensitivity, (blocks._WORDS, blocks._WORDS_WEIGHED)
    try:
        if variant.embedding:
            blocks._WORDS = blocks._WORDS_WEIGHED = variant.embedding
        if not variant.weighed:
            Calibration.sensitivity = lambda self, target: None  # type: ignore[method-assign]
        student = compresskit.compress(
            model,
            method=variant.method,
            ratio=RATIO,
            allocation=variant.allocation,
            **rows,  # type: ignore[arg-type]
        )
    finally:
        (blocks._WORDS, blocks._WORDS_WEIGHED), Calibration.sensitivity = counted, sensitivity  # type: ignore[method-assign]
    if variant.idea in ideas.CUTS:
        dense, tokenizer = checkpoint.read(teacher).model, AutoTokenizer.from_pretrained(teacher)
        text = load_data(load_task(task), data)
        ideas.CUTS[variant.idea](student, dense, _task_batches(text, tokenizer, IDEA_TOKENS, text.task.max_length))
    part = folder.with_suffix(".part")
    student.save_pretrained(part)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(part)
    part.rename(folder)


def record_of(task: str, name: str, seed: int) -> Path:
    """Where a student's figures are kept."""
    return OUTPUT / f"{task}-{slug(name)}-seed{seed}.json"


def asked(name: str, task: str, seed: int) -> dict[str, Any]:
    """What a record says of how its student is made."""
    variant = VARIANTS[name]
    training = {"epochs": EPOCHS.get(task, EPOCHS_OTHERWISE), "batch_size": 8, **variant.training}
    found: dict[str, Any] = {"task": task, "variant": name, "seed": seed, "training": training}
    found |= {key: getattr(variant, key) for key in ("method", *_CUT)}
    return found | ({"idea": variant.idea} if variant.idea else {})


def take(report: Path, task: str) -> None:
    """Records of the students that a report of bench-glue has; a cell that was made otherwise is left out."""
    for path in sorted(report.glob(f"cells/*-{RATIO}x-{task}-seed*/record.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        if cell["method"] not in _IN_GRID or cell["status"] != "finished":
            continue
        name, made = _IN_GRID[cell["method"]], cell["made_by"]
        if made.get("calibration", {}).get("weighed_by") != "predictions":
            name = counted_alike(name)
        found = asked(name, task, cell["seed"])
        settings = with_settings(DEFAULTS["task"], found["training"]).model_dump() | {"precision": "fp32"}  # a CPU's
        recorded = made["task_stage"].items()  # settings that are newer than the cell are not in it
        same = all(settings.get(key) == value for key, value in recorded)
        if not same or made["general"] or made["recipe"]["allocation"] != "error":
            print(f"{path.parent.name}: not made as rows are here; left out", flush=True)
        elif not record_of(task, name, cell["seed"]).exists():
            before, teacher = ({"dev": {cell["metric"]: cell[f"score_{who}"]}} for who in ("before", "teacher"))
            found["scores"] = {"student_before": before, "teacher": teacher, "student_after": cell["scores"]}
            found |= {"cell": path.parent.name, "seconds": cell["seconds_distill"]}
            found["student"] = {"parameters": cell["parameters"]}
            found |= {key: {k: made[key][k] for k in keys} for key, keys in _MADE_BY.items()}
            found["data"] = {"splits": made["data"]}
            write_text(record_of(task, name, cell["seed"]), json.dumps(found, indent=1) + "\n")


def run(name: str, task: str, seed: int, teacher: Path, data: Path, work: Path) -> None:
    """One record. A cut that is there already is taken where teacher, ratio and plan are the same."""
    record = record_of(task, name, seed)
    variant, found = VARIANTS[name], asked(name, task, seed)
    if record.is_file():
        known = json.loads(record.read_text(encoding="utf-8"))
        if different := [key for key in found if known.get(key) != found[key]]:
            raise SystemExit(f"{record}: another {', '.join(different)} than this script's; move it away")
        return
    place = "-".join(
        [
            task,
            f"{RATIO}x",
            variant.method,
            *(str(getattr(variant, key)) for key in _CUT),
            file_hash(teacher / "model.safetensors")[:8],
        ]
    )
    place += f"-{slug(variant.idea)}" if variant.idea in ideas.CUTS else ""
    cut(variant, teacher, task, data, work / place)
    output = work / f"{task}-{slug(name)}-seed{seed}"
    with ideas.TRAINING.get(variant.idea or "", nullcontext)():
        result = compresskit.distill(
            work / place,
            teacher,
            task=task,
            data=data,
            output=output,
            resume=working_folder(output).exists() and not output.exists(),
            overwrite=output.exists(),  # stopped between model and record: made again
            teacher_outputs=work / f"outputs-{task}{'-relations' if variant.idea == 'relations' else ''}",
            seed=seed,
            **found["training"],
        )
    kept = ("teacher", "scores", "seconds", "steps", "tokens", "student", "versions", "hardware", "data")
    write_text(record, json.dumps(found | {key: result.record[key] for key in kept}, indent=1) + "\n")
    print(record.name, result.record["scores"]["student_after"], flush=True)


def table(records: list[dict[str, Any]], task: str) -> str:
    """Best first; kept is the mean over seeds, with their standard deviation where there are several."""
    metric, *others = load_task(task).metrics
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    further: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        for who, splits in record["scores"].items():
            scores[record["variant"]][who].append(float(np.mean([values[metric] for values in splits.values()])))
        for other in others:
            values = [split[other] for split in record["scores"]["student_after"].values()]
            further[record["variant"]][other].append(float(np.mean(values)))
    lines = []
    for name, found in sorted(scores.items(), key=lambda item: -float(np.mean(item[1]["student_after"]))):
        after, teacher = np.array(found["student_after"]), np.array(found["teacher"])
        spread = f" ± {100 * after.std(ddof=1):.2f}" if len(after) > 1 else ""
        before = f"{100 * np.mean(found['student_before']):.2f}"
        kept = f"{100 * after.mean() / teacher.mean():.1f} %"
        line = (name, str(len(after)), before, f"{100 * after.mean():.2f}{spread}", kept)
        lines.append(line + tuple(f"{100 * np.mean(further[name][other]):.2f}" for other in others))
    return markdown(("student", "seeds", f"{metric} before", "after", "kept", *others), lines)


def write_report() -> None:
    """README.md from every record."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(OUTPUT.glob("*.json"))]
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_task[record["task"]].append(record)
    lines = [
        f"# What each idea is worth, at {RATIO}x",
        "",
        f"Students of all-MiniLM-L6-v2 fine-tuned on the task, {RATIO}x smaller. *All of it*: `auto` of the fine-tuned "
        "teacher, fitted to the task's own rows, its plan weighed by how much predictions depend on each matrix; "
        "distilled with every loss in batches of 8 at learning rate 5e-4. Every other row changes what its name says; "
        "where that concerns the cut, its plan is made anew. *Counted alike*: every matrix as much as another, the "
        "word embedding ten times. Plans of the pre-trained checkpoint, by the weights, and uniform ones are never "
        "weighed: compare them with *matrices counted alike*. "
        + (
            "What relations, speeds of factors, one-sided and layer by layer mean says "
            "[ideas.py](../../benchmarks/ideas.py); the package does not have them. "
            if any("idea" in record for record in records)
            else ""
        )
        + "Single methods leave the table of positions dense, `auto` does not. Before: without training; kept: the "
        "student's score over its teacher's; ± over seeds. Rows of one seed and of several stand together.",
    ]
    for task, found in by_task.items():
        one = found[0]
        rows = ", ".join(f"{name} {split['rows']:,} rows" for name, split in one["data"]["splits"].items())
        budget = "".join(f", {tokens:,} tokens altogether" for tokens in {r["tokens"] for r in found if "tokens" in r})
        lines += [
            "",
            f"## {task}",
            "",
            table(found, task),
            "",
            f"Epochs: {one['training']['epochs']:g}{budget}; {rows}.",
        ]
    versions = sorted({", ".join(f"{k} {v}" for k, v in record["versions"].items()) for record in records})
    machines = sorted({"{machine}, {device}, threads: {threads}".format(**record["hardware"]) for record in records})
    run = "`python benchmarks/ablation.py --task TASK --teacher FOLDER --data DIR"
    lines += [
        "",
        f"{run}`; a row alone, such as one counted alike: `--only NAME` too; students that a report of bench-glue "
        "has already: `--grid REPORT`.",
        "",
    ]
    lines += [*versions, *machines]
    write_text(OUTPUT / "README.md", "\n".join(lines).rstrip() + "\n")


def main() -> None:
    """Run what is asked for, then write the report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--task", choices=["sst2", "mrpc", "cola", "rte", "stsb"])
    parser.add_argument("--teacher", type=Path, help="folder of the task's fine-tuned model")
    parser.add_argument("--data", type=Path, help="folder with the task's files")
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--only", action="append", choices=list(VARIANTS), help="may be repeated; default: today's plans"
    )
    parser.add_argument("--grid", type=Path, help="folder of a bench-glue report whose students are rows here")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--threads", type=int, help="default: all")
    options = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if options.task:
        if options.teacher is None or options.data is None:
            parser.error("--task needs --teacher and --data")
        if options.threads:
            torch.set_num_threads(options.threads)
        transformers.utils.logging.disable_progress_bar()
        options.work.mkdir(parents=True, exist_ok=True)
        if options.grid:
            take(options.grid, options.task)
        for seed in map(int, options.seeds.split(",")):
            for name in options.only or _TODAY:
                run(name, options.task, seed, options.teacher, options.data, options.work)
    elif options.grid:
        parser.error("--grid needs --task")
    write_report()


if __name__ == "__main__":
    main()
