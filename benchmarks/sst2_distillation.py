"""From a pre-trained checkpoint to 19x and 8x students of a task: the whole road, by the commands a user types.

Run: python benchmarks/sst2_distillation.py --glue DIR --text wikipedia.txt.gz
Writes README.md and one record per run into reports/sst2-distillation/; models go to runs/sst2 (ignored by git).
Finished runs are kept and stopped ones continue, so the program may be stopped and started again. `--only NAME` does
one teacher or student.

Teachers: the embedded checkpoint, fine-tuned on SST-2 with three learning rates; the best on dev teaches. Students:
stage 1 on Wikipedia text (the pre-trained checkpoint teaches), stage 2 one epoch of SST-2, the same budget for all.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from compresskit.markup import markdown

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = ROOT / "reports" / "sst2-distillation"
MIX = """version: 1
name: low-rank-embedding-kronecker-layers
description: a low-rank embedding, Kronecker products everywhere else
ratio: 19
rules:
  - {role: embedding, method: low-rank}
  - {role: [attention, ffn, head], method: kronecker}
"""
LEARNING_RATES = ("5e-5", "1e-4", "2e-4")
STUDENTS = {
    "low-rank-19x": ("--method", "low-rank", "--ratio", "19"),
    "kronecker-19x": ("--method", "kronecker", "--ratio", "19"),
    "mix-19x": ("--recipe", "mix.yaml"),
    "low-rank-8x": ("--method", "low-rank", "--ratio", "8"),
    "kronecker-8x": ("--method", "kronecker", "--ratio", "8"),
}
#: Also distilled without stage 1.
WITHOUT_GENERAL = "low-rank-19x"
GENERAL = ("--max-tokens", "2000000", "--batch-size", "8", "--learning-rate", "2e-3", "--precision", "bf16")
TASK = ("--epochs", "1", "--loss", "attention=1", "--precision", "bf16")
TEACHER = ("--epochs", "3", "--precision", "bf16")


class Road:
    """Runs the commands, keeps the records."""

    def __init__(self, glue: Path, text: Path, work: Path, threads: int) -> None:
        self.glue, self.text, self.work, self.threads = glue, text, work, threads
        work.mkdir(parents=True, exist_ok=True)
        (work / "mix.yaml").write_text(MIX, encoding="utf-8")

    def run(self, name: str, *arguments: str) -> dict[str, Any]:
        """One training command, unless its model is there; returns the newest stage's record."""
        if not (self.work / name).is_dir():
            self._call(*arguments, "--output", name, "--resume")
        record = OUTPUT / f"{name}.json"
        shutil.copyfile(self.work / name / "training.json", record)
        return self._read(record)

    @staticmethod
    def _read(record: Path) -> dict[str, Any]:
        stage: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))["stages"][-1]
        return stage

    def _call(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "compresskit", *arguments, "--threads", str(self.threads)]
        print("$ compresskit", shlex.join(arguments), flush=True)
        subprocess.run(command, check=True, cwd=self.work)

    def teacher(self, rate: str, *, needed: bool = False) -> dict[str, Any]:
        """The embedded checkpoint, fine-tuned; a record of another day will do unless the model itself is needed."""
        record = OUTPUT / f"teacher-{rate}.json"
        if record.is_file() and not needed:
            return self._read(record)
        data = ("--task", "sst2", "--data", str(self.glue))
        return self.run(f"teacher-{rate}", "finetune", *data, "--learning-rate", rate, *TEACHER)

    def student(self, name: str, rate: str, *, general: bool = True) -> dict[str, Any]:
        """Compress, stage 1, stage 2 with the teacher of that learning rate."""
        final = f"{name}-final" if general else f"{name}-final-without-general"
        if (OUTPUT / f"{final}.json").is_file() and not (self.work / final).is_dir():
            return self._read(OUTPUT / f"{final}.json")  # done on another day
        self.teacher(rate, needed=True)
        if not (self.work / name).is_dir():
            self._call("compress", *STUDENTS[name], "--output", name)
        start = name
        if general:
            start = f"{name}-general"
            self.run(start, "distill", "--student", name, "--text", str(self.text), *GENERAL)
        data = ("--task", "sst2", "--data", str(self.glue))
        return self.run(final, "distill", "--student", start, "--teacher", f"teacher-{rate}", *data, *TASK)


def accuracy(record: dict[str, Any], who: str = "student_after") -> float:
    """Percent on dev."""
    return 100 * float(record["scores"][who]["dev"]["accuracy"])


def main() -> None:
    """Everything, or one part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--glue", type=Path, required=True, help="folder with SST-2/train.tsv")
    parser.add_argument("--text", type=Path, required=True, help="general text, e.g. of Wikipedia")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "sst2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="one teacher-RATE or student; the report is not written")
    options = parser.parse_args()
    road = Road(options.glue.resolve(), options.text.resolve(), options.work.resolve(), options.threads)
    OUTPUT.mkdir(parents=True, exist_ok=True)
    if options.only and options.only.startswith("teacher-"):
        road.teacher(options.only.removeprefix("teacher-"))
        return
    teachers = {rate: road.teacher(rate) for rate in LEARNING_RATES}
    best = max(teachers, key=lambda rate: accuracy(teachers[rate]))
    wanted = [options.only] if options.only else list(STUDENTS)
    finals = {name: road.student(name, best) for name in wanted}
    if WITHOUT_GENERAL in wanted:
        finals[f"{WITHOUT_GENERAL}, without stage 1"] = road.student(WITHOUT_GENERAL, best, general=False)
    if not options.only:
        write_report(teachers, best, finals)


def write_report(teachers: dict[str, Any], best: str, finals: dict[str, Any]) -> None:
    """README.md from the records."""
    sweep = [
        (rate, f"{r['steps']:,}", f"{accuracy(r):.2f}" + " (teaches)" * (rate == best)) for rate, r in teachers.items()
    ]
    rows = []
    for name, record in sorted(finals.items(), key=lambda item: -accuracy(item[1])):
        path = OUTPUT / (name.split(",")[0] + "-general.json")
        general = None if "without" in name else json.loads(path.read_text(encoding="utf-8"))["stages"][-1]
        minutes = [f"{r['seconds'] / 60:.0f}" if r else "-" for r in (general, record)]
        parameters = record["student"]["parameters"]
        ratio = record["teacher"]["parameters"] / parameters
        scores = (f"{accuracy(record, 'student_before'):.2f}", f"{accuracy(record):.2f}")
        rows.append((name, f"{parameters:,}", f"{ratio:.2f}x", *minutes, *scores, f"{100 * record['kept']:.1f} %"))
    any_final = next(iter(finals.values()))
    versions = ", ".join(f"{name} {number}" for name, number in any_final["versions"].items())
    text = f"""# SST-2: from a checkpoint to 19x and 8x students

The embedded checkpoint (all-MiniLM-L6-v2), fine-tuned, compressed and distilled by the commands below. One seed each;
dev has 872 sentences, so one standard error is about 1.1 points. {any_final["hardware"]["threads"]} CPU threads a run.

## Teachers

{markdown(("learning rate", "steps", "dev accuracy"), sweep)}

`compresskit finetune --task sst2 --data DIR --learning-rate RATE {" ".join(TEACHER)}`

## Students

mix-19x has a low-rank embedding and Kronecker products elsewhere.
Kept: student / teacher ({accuracy(any_final, "teacher"):.2f}).
Minutes depend on the machine and what else it did.

{markdown(("student", "parameters", "ratio", "min. stage 1", "min. stage 2", "before 2", "accuracy", "kept"), rows)}

```
compresskit compress --method METHOD --ratio RATIO --output student
compresskit distill --student student --text wikipedia.txt.gz {" ".join(GENERAL)} --output general
compresskit distill --student general --teacher teacher --task sst2 --data DIR {" ".join(TASK)} --output final
```

Data: official SST-2 ({any_final["data"]["splits"]["train"]["rows"]:,} training rows; 2 dev sentences are in train too);
general text: English Wikipedia of 2021, cleaned. Settings, hashes and logs of each run: the JSON files beside this.
Made by `python benchmarks/sst2_distillation.py --glue DIR --text FILE` with {versions}.
"""
    (OUTPUT / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
