"""What a person sees of a running benchmark: the table as it fills, and what is done now."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback

from compresskit.benchmark.records import Record, without_share
from compresskit.benchmark.rows import Cell
from compresskit.benchmark.todo import Watcher


class Screen(Watcher):
    """Live on a terminal; elsewhere one line per finished cell."""

    def __init__(self, console: Console) -> None:
        super().__init__((_Steps(self),))
        self.console = console
        self.cells: Sequence[Cell] = ()
        self.records: dict[Cell, Record] = {}
        self.running: dict[Cell, float] = {}  # with the time at which they were started
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
        self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn())
        self.all = self.bar.add_task("cells", total=None)
        self.part = self.bar.add_task("reading models and data", total=None)
        self.live = Live(get_renderable=self._draw, console=console, transient=True, refresh_per_second=4)

    def __enter__(self) -> Screen:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.live.stop()
        if kind is KeyboardInterrupt and self.cells:
            self.console.print("Finished cells are kept: the same command continues.", highlight=False)

    def opened(self, cells: Sequence[Cell], records: Sequence[Record | None]) -> None:
        self.cells = cells
        done = [record for record in records if record is not None and record.status != "failed"]
        self.bar.update(self.all, total=len(cells), completed=0)
        if not self.console.is_terminal:
            self._line(f"{len(cells)} cells, {len(done)} of them finished before")

    def started(self, cell: Cell) -> None:
        self.running[cell] = time.monotonic()
        self.bar.reset(self.part, description=str(cell), total=None)

    def says(self, what: str) -> None:
        cell = f"{next(iter(self.running))}: " if len(self.running) == 1 else ""
        self.bar.reset(self.part, description=cell + what, total=None)

    def steps(self, done: int, total: int) -> None:
        """Of the training that runs."""
        self.bar.update(self.part, completed=done, total=total)

    def finished(self, cell: Cell, record: Record) -> None:
        began = self.running.pop(cell, None)
        self.records[cell] = record
        self.bar.update(self.all, completed=len(self.records))
        if began is not None and not self.console.is_terminal:
            seconds = time.monotonic() - began
            state = self._state(record)
            self._line(f"[{len(self.records)}/{len(self.cells)}] {cell}: {state} ({seconds:.0f} s)")

    def progress(self, what: str, done: int, total: int) -> None:
        if self.live.is_started:
            self.live.stop()  # nothing is drawn while models are timed
        if done == total:
            self._line(f"{what}: done")

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _state(self, record: Record) -> str:
        if record.kept is None or (record.model, record.task) in without_share(self.records.values()):
            return record.status
        return f"{100 * record.kept:.1f} %"

    def _draw(self) -> Any:
        tasks = list(dict.fromkeys(cell.task_name for cell in self.cells))
        ratios = sorted({cell.ratio for cell in self.cells if cell.ratio is not None})
        task_column = ["task"] if len(tasks) > 1 else []
        table = Table("method", *task_column, *(f"{ratio:g}x" for ratio in ratios), "own ratio")
        rows: dict[tuple[str, str], dict[float | None, list[str]]] = {}
        for cell in self.cells:
            text = self._state(self.records[cell]) if cell in self.records else "..." if cell in self.running else "-"
            rows.setdefault((cell.method, cell.task_name), {}).setdefault(cell.ratio, []).append(text)
        for (method, task), states in rows.items():
            shown = [", ".join(states.get(ratio, [])) for ratio in (*ratios, None)]
            table.add_row(method, *([task] if task_column else []), *shown)
        return Group(table, self.bar)


class _Steps(TrainerCallback):
    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.screen.steps(state.global_step, state.max_steps)
