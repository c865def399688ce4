"""From records to a report: README.md, results.csv, results.json, table.tex, pictures and index.html."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from compresskit import __version__
from compresskit.benchmark.grid import NONE, Grid
from compresskit.benchmark.provenance import Hardware, MadeBy, Training
from compresskit.benchmark.quality import METRIC, OF_VECTORS
from compresskit.benchmark.records import FORMAT_VERSION, Record, frame
from compresskit.benchmark.report import comparison, plots
from compresskit.benchmark.report.page import page
from compresskit.benchmark.report.rivals import of_baselines
from compresskit.benchmark.store import Store
from compresskit.errors import InputError
from compresskit.exporting.format import FORMATS
from compresskit.markup import calibration_text, cell, fenced, markdown, plain
from compresskit.storage.writing import write_text

_SCORES = {
    METRIC: f"the {METRIC}, the mean cosine between the sentence vectors of student and teacher (mean over the tokens "
    "of the last layer, minus the mean over all passages): 100 is the teacher itself, 0 no relation",
    OF_VECTORS: "the similarity, Spearman's correlation between the cosines that the student finds for all pairs of "
    "passages and those that the teacher finds: 100 where both put all pairs in one order, 0 no relation",
}
_WITHOUT_LABELS = (
    "Quality without labels on held-out text: **score** is {score}. Retrieval: share of passages whose nearest other "
    "passage comes from the same document ({reference}). Hidden error: ‖H − H'‖ / ‖H‖ over all layers."
)
_LEADS = {METRIC: f"{METRIC} to the teacher", OF_VECTORS: "similarities of passages, compared with the teacher's,"}
#: Fields of the grid with a flag that takes them as they are.
_FLAGS = {
    "models": "model",
    "methods": "methods",
    "ratios": "ratios",
    "tasks": "task",
    "data": "data",
    "text": "text",
    "fields": "field",
    "unit": "unit",
    "language": "language",
    "max_texts": "max-texts",
    "seeds": "seeds",
    "students_from": "students-from",
    "allocation": "allocation",
    "calibration_tokens": "calibration-tokens",
    "baselines": "baselines",
    "precision": "precision",
    "exports": "export",
}
#: How the place for the tables of a folder begins in another document.
_BEGIN = "<!-- bench: "
#: Those whose flag is given once for each value.
_REPEATED = ("models", "text", "fields")
_PICTURES = ("kept-*.png", "speed-*.png", "fronts-*.png", "errors.png")
_LEGEND = (
    "Arrows: which way is better. **Bold**: keeps most of the students at one asked ratio. ●: Pareto-optimal, nothing "
    "has as few parameters and keeps as much; MB, ms: nothing, exports among it, has as few MB, or is as fast, and "
    "keeps as much. Ratio: dense parameters / parameters. MB: 10^6 bytes of weight files. GFLOPs: 2 x "
    "multiply-adds of one sequence of 128 tokens. ms: median of one such sequence ± half the interquartile range. "
    "Speedup: over the dense model of the same phase, full sequences. Peak MB: resident memory that the model and one "
    "pass of batch 32 add. Error: ‖W − W'‖ / ‖W‖ over all factorised matrices, before training. Before: score before "
    "training. Kept: score / the teacher's."
)
_ASYMMETRIC = (
    "Asymmetric: score of a retrieval where the dense model embeds the documents and the row's model the queries."
)
_ALL_TASKS = (
    "All tasks: scores, ratios and seconds of distillation are means over tasks; sizes, times of the model, error and "
    "seconds of compression are of the first task's students."
)


def render(store: Store) -> tuple[Record, ...]:
    """Write the report of a benchmark's folder; returns its records. Raises InputError: there are none."""
    grid = store.grid()
    records = _records(store)
    folder = store.folder
    cells = frame(records)
    found = comparison.sections(cells)
    for old in (path for form in _PICTURES for path in folder.glob(form)):
        old.unlink()
    pictures = plots.draw(found, _errors(records), folder)
    facts = _facts(records, grid, store.missing())
    title = _title(records)
    write_text(folder / "results.csv", cells.map(cell).to_csv(index=False))
    rows = [record.model_dump(mode="json") for record in records]
    data = {"format_version": FORMAT_VERSION, "grid": grid.model_dump(mode="json"), "records": rows}
    write_text(folder / "results.json", json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "table.tex", "\n".join(f"% {name}\n{comparison.latex(table)}" for name, table in found))
    plain_grid = {"version": 1} | grid.model_dump(mode="json", exclude_defaults=True)
    write_text(folder / "grid.yaml", yaml.safe_dump(plain_grid, sort_keys=False))
    write_text(folder / "index.html", page(title, found, facts, __version__))
    write_text(folder / "README.md", _readme(title, found, facts, pictures, records))
    return records


def web_page(folder: Path, script: str) -> str:
    """The page of a benchmark's folder as text; ``script`` as in :func:`compresskit.benchmark.report.page.page`."""
    store = Store(folder)
    records = _records(store)
    facts = _facts(records, store.grid(), store.missing())
    return page(_title(records), comparison.sections(frame(records)), facts, __version__, script)


def tables(folder: Path) -> str:
    """The tables of kept as Markdown, for another document; a line below them counts what is not run yet."""
    store = Store(folder)
    text = comparison.summary_markdown(comparison.sections(frame(_records(store))))
    missing = len(store.missing())
    return text + (f"\n\nNot run yet: {missing} cells." if missing else "")


def paste(folder: Path, document: Path) -> None:
    """Replace what stands between ``<!-- bench: FOLDER -->`` and ``<!-- /bench -->`` in a Markdown document, wherever
    that is there.

    Raises:
        InputError: the document cannot be read, has no such place, or one whose end is missing.
    """
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"document {document}: cannot be read: {error}") from None
    begin, end = f"{_BEGIN}{folder.as_posix().rstrip('/')} -->", "<!-- /bench -->"
    before, *places = text.split(begin)
    rest = []
    for place in places:
        old, closed, after = place.partition(end)
        if not closed or _BEGIN in old:  # what stands before the end of another folder's tables is no old table
            raise InputError(f"document {document}: the tables of {begin} have no end: add {end}")
        rest.append(after)
    if not rest:
        raise InputError(f"document {document}: has no place for the tables: add {begin} and {end}")
    write_text(document, before + "".join(f"{begin}\n{tables(folder)}\n{end}{after}" for after in rest))


def command(grid: Grid) -> str:
    """The command that makes this grid. What has no flag stands in grid.yaml beside the report, a bench recipe."""
    default = Grid(unit=grid.unit) if grid.tasks or not grid.unit else Grid.of_vectors()
    given = {name for name in Grid.model_fields if getattr(grid, name) != getattr(default, name)}
    # Of models that are named it is not known here whether they are made for vectors; of the embedded one it is.
    given |= {"unit"} if (grid.unit and (grid.tasks or grid.models)) or not (grid.unit or grid.tasks) else set()
    given -= {"version", "name", "description", "latency_rounds"}  # the last one says how exact, not what
    flags = [f"--{flag} {words}" for name, flag in _FLAGS.items() if name in given for words in _values(grid, name)]
    for name, key, flag in (("general", "max_tokens", "--general-tokens"), ("task", "epochs", "--task-epochs")):
        settings = getattr(grid, name)
        usual = {other: value for other, value in getattr(default, name).items() if other != key}
        if name in given and (settings is False or settings == usual | {key: settings.get(key)}):
            flags.append(f"{flag} {settings[key] if settings else 0}")
            given.discard(name)
    if given - set(_FLAGS):
        texts = ["--text FILE"] * (len(_values(grid, "text")) if grid.text else 0)
        flags = ["--recipe grid.yaml", *(["--data DIR"] if grid.data else []), *texts]
    return " ".join(["compresskit bench", *flags])


def _values(grid: Grid, name: str) -> list[str]:
    """What stands behind each flag of a field."""
    value = grid.all_methods() if name == "methods" else getattr(grid, name)
    several = value if isinstance(value, tuple) else (value,)
    words = [str(entry).removesuffix(".0") if isinstance(entry, float) else str(entry) for entry in several] or [NONE]
    return [shlex.quote(word) for word in (words if name in _REPEATED else [",".join(words)])]


def _records(store: Store) -> tuple[Record, ...]:
    """The records of a folder in the order of its grid. Raises InputError: there are none, or others too."""
    records = tuple(_ordered(store.of_grid(), store.grid()))
    if not records:
        raise InputError(f"report {store.folder}: holds no records; `compresskit bench` makes some")
    return records


def _ordered(records: list[Record], grid: Grid) -> list[Record]:
    """In the order of the grid: models, tasks, baselines, methods, ratios, seeds."""
    methods = grid.names()
    tasks = list(dict.fromkeys(record.task or "" for record in records))

    def place(record: Record) -> tuple[Any, ...]:
        method = methods.index(record.method) if record.method in methods else len(methods)
        return (
            record.model,
            tasks.index(record.task or ""),
            method,
            record.method,
            record.ratio_asked or 0,
            record.seed,
        )

    return sorted(records, key=place)


def _errors(records: tuple[Record, ...]) -> pd.DataFrame:
    """The error of every matrix of the first model, once per method and ratio."""
    rows = {}
    for record in (record for record in records if record.model == records[0].model):
        for entry in record.errors:
            row = {"method": record.method, "ratio_asked": record.ratio_asked, **entry.model_dump()}
            rows[record.method, record.ratio_asked, entry.name] = row
    return pd.DataFrame(rows.values())


def _title(records: tuple[Record, ...]) -> str:
    models = ", ".join(dict.fromkeys(record.model for record in records))
    tasks = ", ".join(dict.fromkeys(record.task for record in records if record.task))
    return f"{models} made smaller: " + (f"what is kept on {tasks}" if tasks else "what is kept, without labels")


def _by_task(name: str, records: Sequence[Record], text: Callable[[Record], str]) -> list[tuple[str, str]]:
    """One line where a text is the same for all tasks, else one for each text with its tasks."""
    tasks: dict[str, dict[str, None]] = {}
    for record in records:
        tasks.setdefault(text(record), {})[record.task or ""] = None
    return [(name if len(tasks) == 1 else f"{name}, {', '.join(of)}", line) for line, of in tasks.items()]


def _facts(records: tuple[Record, ...], grid: Grid, missing: list[str]) -> dict[str, Any]:
    """What a reader must know: ``lead`` above the tables, ``quality`` below, and ``lines`` (name, text)."""
    variants = tuple(f" + {name}" for name in grid.variants)
    trained = [record for record in records if record.kind == "student" and record.status == "finished"]
    shown = [record for record in trained if not record.method.endswith(variants)] or trained or list(records)
    lines = [("Command", command(grid)), *_training(shown, grid)]
    lines += [("Variant", f"{name}: {variant.text()}") for name, variant in grid.variants.items()]
    lines += _data(records)
    lines += _seeds(shown, [record for record in records if record.kind == "student"] or list(records))
    lines += _machines(records)
    if missing:
        lines.append(("Not run yet", f"{len(missing)} cells: {', '.join(missing)}"))
    lines += of_baselines(records, grid)
    lead = "Equal parameters, equal training: every student of a column has about the same size and the same budget."
    without = {record.model: record.scores for record in records if "retrieval teacher" in record.scores}
    quality = ""
    if without:
        references = [
            (f"{model}: " if len(without) > 1 else "")
            + f"teacher {100 * scores['retrieval teacher']:.1f}, chance {100 * scores['retrieval chance']:.1f}"
            for model, scores in without.items()
        ]
        metric = OF_VECTORS if grid.unit else METRIC
        quality = _WITHOUT_LABELS.format(score=_SCORES[metric], reference="; ".join(references))
        lead += f" Score: {_LEADS[metric]} on held-out text."
    elif shown[0].task is not None:
        metrics = dict.fromkeys(f"{r.task}: {r.metric}" for r in records if r.metric is not None)
        quality = f"Score: {'; '.join(metrics)}; the mean over the splits that are not for training."
        lead += f" {quality}"
    return {"lead": lead, "lines": lines, "quality": quality}


def _export_lines(records: Sequence[Record]) -> list[tuple[str, str]]:
    """One line for each runtime with the formats that it ran; a format may no longer be installed."""
    known = FORMATS.all()
    forms: dict[str, set[str]] = {}
    for record in records:
        for form, exported in record.exports.items():
            runtime = known[form].runtime if form in known else None
            if exported.versions:
                where = f" in {runtime.name} {exported.versions.get(runtime.package, '?')}" if runtime else ""
                forms.setdefault(where, set()).add(form)
    return [
        ("Exports", f"{', '.join(sorted(names))}: the same models, scored and timed{where}, CPU")
        for where, names in sorted(forms.items())
    ]


def _training(shown: Sequence[Record], grid: Grid) -> list[tuple[str, str]]:
    """How teacher and students were trained."""
    made = shown[0].made_by
    lines = []
    tuned = [record for record in shown if record.made_by.teacher is not None]
    if tuned:
        lines += _by_task("Teacher", tuned, lambda record: f"fine-tuned: {_budget(record.made_by.teacher)}")
    if grid.students_from == "teacher":
        lines.append(("Students made from", "the task's teacher"))
    fitted = [record for record in shown if record.made_by.calibration is not None]
    lines += _by_task("Calibration", fitted, lambda record: calibration_text(_plain_fit(record.made_by)))
    general: dict[str, dict[str, None]] = {}  # which losses are possible depends on the model
    for record in shown:
        general.setdefault(_stage_1(record.made_by), {})[record.model] = None
    lines += [
        ("Stage 1, every student" if len(general) == 1 else f"Stage 1, every student of {', '.join(of)}", text)
        for text, of in general.items()
    ]
    if made.general is not None and grid.share_general:
        lines.append(("Stage 1, run", "once for every method and ratio, with the first seed"))
    if learnt := [record for record in shown if record.made_by.task_stage is not None]:
        lines += _by_task("Stage 2, every student", learnt, lambda record: _budget(record.made_by.task_stage))
    return lines


def _stage_1(made: MadeBy) -> str:
    """What students learn from in stage 1, and how."""
    if made.general is None:
        return "none"
    pieces = f", vectors of {'s and '.join(made.unit)}s" if made.unit is not None else ""
    texts = made.text if isinstance(made.text, tuple) else (made.text,)
    most = f", at most {made.max_texts:,} of them" if made.max_texts is not None else ""
    return f"{', '.join(text.source for text in texts)}{pieces}{most}: {_budget(made.general)}"


def _plain_fit(made: MadeBy) -> dict[str, Any]:
    return {} if made.calibration is None else made.calibration.model_dump(mode="json")


def _data(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Which rows, and what was remarked on the way."""
    remarks = {
        f"{record.task}: {name}, {part.rows:,} rows" + (f" ({part.remark})" if part.remark else "")
        for record in records
        for name, part in (record.made_by.data or {}).items()
    }
    notes = dict.fromkeys(note for record in records for note in record.made_by.notes or ())
    return [*(("Data", remark) for remark in sorted(remarks)), *(("Note", note) for note in notes)]


def _seeds(shown: Sequence[Record], records: Sequence[Record]) -> list[tuple[str, str]]:
    """Which seeds the rows of each task have."""

    def text(record: Record) -> str:
        seeds: dict[str, set[int]] = {}
        for other in records:
            if other.task == record.task:
                seeds.setdefault(other.method, set()).add(other.seed)
        methods: dict[str, list[str]] = {}
        for method, own in seeds.items():
            methods.setdefault(", ".join(map(str, sorted(own))), []).append(method)
        names = {own: f" ({', '.join(of)})" if len(methods) > 1 else "" for own, of in methods.items()}
        return "; ".join(f"{own}{of}" for own, of in names.items())

    return _by_task("Seeds", shown, text)


def _machines(records: Sequence[Record]) -> list[tuple[str, str]]:
    """On what the cells were made and timed, and with which software."""
    lines = []
    every = [
        latency for record in records for latency in (record.latency, *(e.latency for e in record.exports.values()))
    ]
    times = [latency for latency in every if latency is not None]
    if times:
        timed, phases = times[0], len({latency.phase for latency in times})
        lengths = sorted({latency.tokens for latency in times})
        batches = f"{' and '.join(map(str, lengths))} tokens, batch {' and '.join(timed.batches)}"
        what = f"{batches}, {_threads(timed.threads)}, {timed.device}"
        short = "; GFLOPs at as many: all that a model takes, where that is fewer than 128" * (lengths[0] < 128)
        apart = f"; of {phases} phases, whose times do not compare: `compresskit bench` times all again" * (phases > 1)
        lines.append(("Latency", f"{what}; {timed.rounds} rounds, every model once per round{short}{apart}"))
    lines += [("Machine", text) for text in sorted({_machine(r.made_by.hardware) for r in records})]
    lines += _export_lines(records)
    several = {", ".join(f"{name} {number}" for name, number in r.made_by.versions.items()) for r in records}
    lines += [("Versions", text) for text in sorted(several)]
    lines += [("Commit", commit) for commit in sorted({r.made_by.git for r in records if r.made_by.git})]
    return lines


def _machine(hardware: Hardware) -> str:
    return (
        f"{hardware.processor} ({hardware.machine}), {hardware.cores} cores, {hardware.memory_gib} GiB, "
        f"trained on {hardware.device} with {_threads(hardware.threads)}"
    )


def _threads(count: int) -> str:
    return f"{count} thread" + "s" * (count != 1)


def _budget(stage: Training | None) -> str:
    """A stage's settings in words."""
    if stage is None:
        return "none"
    amount = f"{stage.epochs:g} epoch" + "s" * (stage.epochs != 1)
    for name, limit in (("steps", stage.max_steps), ("tokens", stage.max_tokens)):
        if limit is not None:
            amount = f"{limit:,} {name}"
    losses = ", ".join(name for name, weight in stage.losses.items() if weight)
    words = [
        f"{amount}, batch {stage.batch_size}, learning rate {stage.learning_rate:g}, losses {losses}",
        stage.precision,
        f"{stage.schedule} schedule" if stage.schedule != "linear" else "",
        f"class weights {_weights(stage.class_weights)}" if stage.class_weights else "",
        f"early stopping after {stage.early_stopping} scores without progress" if stage.early_stopping else "",
        "from a head of another task" if stage.new_head else "",
    ]
    return ", ".join(word for word in words if word)


def _weights(given: str | Mapping[str, float]) -> str:
    return given if isinstance(given, str) else ", ".join(f"{name} {weight:g}" for name, weight in given.items())


def _readme(
    title: str,
    found: list[tuple[str, pd.DataFrame]],
    facts: dict[str, Any],
    pictures: list[tuple[str, str]],
    records: tuple[Record, ...],
) -> str:
    parts = [f"# {title}", "", facts["lead"], "", fenced(" ".join(dict(facts["lines"])["Command"].split())), ""]
    parts += [comparison.summary_markdown(found), "", facts["quality"], ""]
    for name, what in pictures:
        parts += [f"![{what}]({name})", ""]
    for section, table in found:
        parts += [f"## Everything, {section}", "", markdown(*comparison.full(table)), ""]
    parts += [_LEGEND, ""]
    if any(table["score_asymmetric"].notna().any() for _, table in found):
        parts += [_ASYMMETRIC, ""]
    if any("all tasks" in section for section, _ in found):
        parts += [_ALL_TASKS, ""]
    troubles = [line for _, table in found for line in comparison.problems(table)]
    if troubles:
        parts += ["## Without a result", "", *(f"- {plain(line)}" for line in dict.fromkeys(troubles)), ""]
    facts_ = [f"- {name}: {plain(text)}" for name, text in facts["lines"] if name != "Command"]
    parts += ["## How it was made", "", *facts_, ""]
    parts += [f"{len(records)} cells: one record each in `cells/`, all of them in `results.csv` and `results.json`;"]
    parts += ["`index.html` sorts and filters them and needs no network.", ""]
    return "\n".join(parts)
