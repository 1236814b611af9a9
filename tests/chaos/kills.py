"""The harness's log of deaths: the kills by the harness, and the deaths at failpoints.

A kill by the harness is noted when the process has ended, so that the process cannot write anything
later. A failpoint notes its own death just before it happens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class Kill:
    """One process that was killed with -9: the fault or failpoint, and the time of its end."""

    what: str
    pid: int
    at: float


class KillLog:
    """One file with lines `what pid nanoseconds` for our kills, and one for each armed failpoint."""

    def __init__(self, folder: Path, failpoints: Iterable[str]) -> None:
        self._ours = folder / "kills"
        self._ours.touch()
        self._resting = folder / "failpoints-at-rest"
        self.armed = folder / "failpoints"
        self._resting.mkdir()
        self._over: set[str] = set()
        for name in failpoints:
            (self._resting / name).touch()

    def note(self, what: str, pid: int) -> None:
        """Note that this process has ended."""
        with self._ours.open("a") as file:
            file.write(f"{what} {pid} {time.time_ns()}\n")

    def arm(self) -> None:
        """Enable the failpoints."""
        if self._resting.exists():
            self._resting.rename(self.armed)

    def disarm(self) -> None:
        """Disable all failpoints; a process that was killed has noted it."""
        if self.armed.exists():
            self.armed.rename(self._resting)

    def retire(self, name: str) -> None:
        """Disable this failpoint for ever, armed or not."""
        if name not in self._over:
            self._file(name).rename(self._ours.with_name(f"kills-{name}"))
            self._over.add(name)

    def hits(self, name: str) -> int:
        """Count the processes that died at this failpoint."""
        return len(_read(self._file(name)))

    def all(self) -> list[Kill]:
        """Return every kill so far."""
        files = [self._ours, *self._ours.parent.glob("kills-*")]
        for folder in (self.armed, self._resting):
            files += folder.glob("*")
        return [kill for file in files for kill in _read(file)]

    def _file(self, name: str) -> Path:
        if name in self._over:
            return self._ours.with_name(f"kills-{name}")
        return (self.armed if self.armed.exists() else self._resting) / name


def _read(file: Path) -> list[Kill]:
    lines = [line.split() for line in file.read_text().splitlines()]
    return [Kill(what, int(pid), int(nanoseconds) / 1e9) for what, pid, nanoseconds in lines]
