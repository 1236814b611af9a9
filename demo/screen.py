"""The display: the run while it goes on, and the table at its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import RenderableType

    from jobguard.demo.figures import Figures
    from jobguard.demo.harness import Progress

REDRAW_SECONDS = 0.25  # drawing takes time from the workers


class Screen:
    """A ProgressDisplay that draws on a terminal; on other outputs it prints only the events."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._drawn_at = 0.0
        self._seconds = 0.0

    def __enter__(self) -> Self:
        """Start to draw."""
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Remove the drawing; the events stay."""
        self._live.stop()

    def announce(self, text: str) -> None:
        """Print an event with its time."""
        self._console.print(f"[dim]{self._seconds:6.1f} s[/]  {text}", highlight=False)

    def show(self, progress: Progress) -> None:
        """Draw the progress."""
        self._seconds = progress.seconds
        if not self._live.is_started or time.monotonic() - self._drawn_at < REDRAW_SECONDS:
            return
        self._drawn_at = time.monotonic()
        self._live.update(_picture(progress), refresh=True)


def _picture(progress: Progress) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_row("enqueued", _bar(progress.enqueued, progress.jobs), f"{progress.enqueued:,}")
    grid.add_row("done", _bar(progress.executed, progress.jobs), f"{progress.executed:,}")
    absent = Text(f"{progress.absent:,} absent", style="bold red" if progress.absent else "dim")
    grid.add_row("lost and back", absent, f"{progress.back:,} back")
    state = Text("up", style="green") if progress.redis_is_up else Text("DOWN", style="bold red")
    grid.add_row("redis", state, f"killed {progress.redis_kills} times")
    grid.add_row(
        "workers",
        f"{progress.workers}",
        f"{progress.worker_kills} killed, {progress.restarts} started again",
    )
    return Group(Text(), grid, Text(f"{progress.seconds:.0f} s", style="dim"))


def _bar(done: int, total: int) -> ProgressBar:
    return ProgressBar(total=total, completed=done, width=40)


def show_results(console: Console, columns: Sequence[tuple[str, Figures]]) -> None:
    """Print the table, one column for each run, and the result of the last one."""
    table = Table(title="from the ledger that the tasks wrote", title_justify="left")
    table.add_column()
    for name, _ in columns:
        table.add_column(name, justify="right")
    for name, cell in _ROWS:
        cells = [cell(run) for _, run in columns]
        if any(cells):
            table.add_row(name, *cells)
    console.print(table)
    lost = columns[-1][1].lost
    if lost:
        console.print(f"[bold red]{lost:,} jobs were lost[/] {columns[-1][0]}.")
    else:
        console.print(f"[bold green]Nothing was lost[/] {columns[-1][0]}.")


def _number(number: int, *, bad: bool = False) -> str:
    return f"[bold red]{number:,}[/]" if number and bad else f"{number:,}"


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.2f} s"


def _restarted(run: Figures) -> str:
    after = (
        "" if run.restart_seconds is None else f", running again after {run.restart_seconds:.1f} s"
    )
    return f"{run.restarted}{after}"


def _a_second(run: Figures) -> str:
    return f"{run.executed / run.seconds:,.0f}" if run.seconds else ""


# A row is left out if its cell is empty in every column.
_ROWS: tuple[tuple[str, Callable[[Figures], str]], ...] = (
    ("redis killed -9, restarted empty", lambda run: f"{run.redis_kills} times"),
    ("enqueued", lambda run: _number(run.enqueued)),
    ("enqueue raised (not counted)", lambda run: _number(run.refused) if run.refused else ""),
    ("executed", lambda run: _number(run.executed)),
    ("lost", lambda run: _number(run.lost, bad=True)),
    ("completed twice", lambda run: _number(run.duplicated, bad=True)),
    (
        "completed twice, excused: worker killed before it could report",
        lambda run: _number(run.excused) if run.excused else "",
    ),
    ("back after a loss of redis", lambda run: _number(run.recovered)),
    ("restarted after a worker kill", _restarted),
    ("time to detect a loss, worst", lambda run: _seconds(run.detect_seconds)),
    ("time to recover from it, worst", lambda run: _seconds(run.recover_seconds)),
    ("first enqueue to last end", lambda run: f"{run.seconds:.1f} s"),
    ("executed a second", _a_second),
    ("executed at once, at most", lambda run: _number(run.concurrency)),
)
