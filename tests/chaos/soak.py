"""What a soak must show beside the counts: memory that does not grow, and a log that stays small."""

from __future__ import annotations

import contextlib
import json
import time
from collections import defaultdict
from statistics import linear_regression
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from tests.chaos.site import Site

APART = (10.0, 30.0)
"""Seconds between two faults of a soak."""
RATE = 12.0
"""Jobs of a library for each second of a soak: the libraries share the machine."""
GROWTH = 5.0
"""The largest slope of a process' memory, in MB for each hour."""
LINES = 10.0
"""The most lines that jobguard may log in a process for each minute."""
_EVERY = 10.0
_WARM = 600.0
"""Seconds of its life after which a process must not grow any more."""
_ENOUGH = 600.0
"""Seconds of samples after that, from which a slope is made."""
_OURS = ('{"event": ', "jobguard: ")
"""How a line of jobguard begins, behind the time and the process."""
_HEAD = 80
_NO_WORKERS = ("reconciler", "producer")
"""Processes that are no workers of the library."""


class Watch:
    """Samples the memory of the processes, and counts the lines that jobguard has logged in them."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._began = time.monotonic()
        self._due = self._began
        # For each process: its name, and its samples: seconds of its life, and MB.
        self._names: dict[tuple[int, float], str] = {}
        self._samples: dict[tuple[int, float], list[tuple[float, float]]] = defaultdict(list)

    def tend(self) -> None:
        """Take a sample of each process, if it is time."""
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _EVERY
        for name, child in self._site.processes().items():
            for nth, member in enumerate(self._site.family(child)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    key = (member.pid, member.create_time())
                    self._names[key] = name if nth == 0 else f"{name}, child {member.pid}"
                    megabytes = member.memory_info().rss / 1e6
                    self._samples[key].append((time.time() - member.create_time(), megabytes))

    def growth(self) -> dict[str, float]:
        """Return MB for each hour by process, of those that have lived for long enough."""
        slopes = {self._names[key]: slope(rows) for key, rows in self._samples.items()}
        return {name: round(one, 1) for name, one in slopes.items() if one is not None}

    def dump(self) -> None:
        """Write all samples into the folder, for the search for a cause."""
        rows = [(self._names[key], samples) for key, samples in self._samples.items()]
        (self._site.folder / "memory.json").write_text(json.dumps(rows))

    def lines(self) -> dict[str, float]:
        """Return the lines of jobguard for each minute, by process; restarts count for the same one."""
        minutes = (time.monotonic() - self._began) / 60
        logs = {name: self._site.folder / f"{name}.log" for name in self._site.processes()}
        return {name: round(_lines_of(log) / minutes, 1) for name, log in logs.items()}


def slope(samples: Sequence[tuple[float, float]]) -> float | None:
    """Return MB for each hour of these samples, seconds of life and MB; None if there are too few.

    The largest single step is left out: a beat process imports jobguard when it first beats. A leak has
    many steps.
    """
    late = [(at, size) for at, size in samples if at >= _WARM]
    if not late or late[-1][0] - late[0][0] < _ENOUGH:
        return None
    nth = max(range(1, len(late)), key=lambda nth: late[nth][1] - late[nth - 1][1])
    step = max(0.0, late[nth][1] - late[nth - 1][1])
    level = [(at, size - step * (n >= nth)) for n, (at, size) in enumerate(late)]
    return linear_regression(*zip(*level, strict=True)).slope * 3600


def problems(
    growth: Mapping[str, float], lines: Mapping[str, float], *, bare: float = 0.0
) -> list[str]:
    """Return all reasons for which a soak fails that its counts do not show.

    ``bare``: by how much a worker of the library grows without jobguard.
    """
    bounds = {name: GROWTH if name.startswith(_NO_WORKERS) else GROWTH + bare for name in growth}
    return [
        *(f"{name} grows by {mb} MB an hour" for name, mb in growth.items() if mb > bounds[name]),
        *(f"{name} logs {count} lines a minute" for name, count in lines.items() if count > LINES),
    ]


def _lines_of(log: Path) -> int:
    with log.open(errors="replace") as file:
        return sum(1 for line in file if _is_ours(line))


def _is_ours(line: str) -> bool:
    return any(mark in line[:_HEAD] for mark in _OURS)


def most(figures: Mapping[str, float]) -> str:
    """Return the largest of these figures with its process."""
    name = max(figures, key=lambda one: figures[one], default="")
    return f"{figures[name]} ({name})" if name else "no process lived for long enough"


def seconds_in(text: str) -> float:
    """Read a duration: ``90s``, ``30m`` or ``2h``. Raises ValueError."""
    units = {"s": 1, "m": 60, "h": 3600}
    if text[-1:] not in units:
        raise ValueError(f"{text!r} is no duration: give 90s, 30m or 2h")
    return float(text[:-1]) * units[text[-1]]
