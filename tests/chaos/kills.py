"""The harness's own log of deaths: the kills it dealt itself, and those of the failpoints.

A kill of ours is noted when the process is gone, so that it cannot have written anything later; a
failpoint notes its own death just before it.
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
    """One process that was killed with -9: by which fault or failpoint, and when it was gone."""

    what: str
    pid: int
    at: float


class KillLog:
    """One file of lines `what pid nanoseconds` for our kills, and one for each armed failpoint."""

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
        """Write down that this process is gone."""
        with self._ours.open("a") as file:
            file.write(f"{what} {pid} {time.time_ns()}\n")

    def arm(self) -> None:
        """Let the failpoints kill."""
        if self._resting.exists():
            self._resting.rename(self.armed)

    def disarm(self) -> None:
        """Let none of them kill from now on; whoever is killed has said so."""
        if self.armed.exists():
            self.armed.rename(self._resting)

    def retire(self, name: str) -> None:
        """Let this one kill nobody any more, armed or not."""
        if name not in self._over:
            self._file(name).rename(self._ours.with_name(f"kills-{name}"))
            self._over.add(name)

    def hits(self, name: str) -> int:
        """Count how many processes died at this failpoint."""
        return len(_read(self._file(name)))

    def all(self) -> list[Kill]:
        """Give every kill so far."""
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
