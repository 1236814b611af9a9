"""The demo's own record of events, written by the tasks and the producer themselves.

No other process writes it: jobguard does not know its path. Each event is one line, appended by one
small write, so that the lines of many processes do not mix, and a written line stays when its
writer is killed a microsecond later:

    call <number> <pid> <nanoseconds> [numbers]       enqueue is about to be called (chaos only);
                                                      the library must run it after these numbers
    enqueued <number> <pid> <nanoseconds> <job id>    the call of enqueue returned
    refused <number> <pid> <nanoseconds>              the call of enqueue raised
    start <number> <pid> <nanoseconds> [parent pid]   first statement of the task
    fail <number> <pid> <nanoseconds>                 the task raises: this attempt is no end
    end <number> <pid> <nanoseconds> [parent pid]     last statement of the task

The times are of the wall clock: tasks, kills and the incident rows of PostgreSQL share only that
clock.

A number stands for one call of enqueue. After a refusal the producer goes on with the next number,
so that a job that ran although its enqueue raised is never mistaken for a second run of another job.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

# Not JOBGUARD_…: it is no setting of ours, and the reconciler is started without it.
VARIABLE = "DEMO_LEDGER"


def note(what: str, number: int, *more: str) -> None:
    """Append one line to the ledger that the environment names."""
    line = " ".join((what, str(number), str(os.getpid()), str(time.time_ns()), *more))
    os.write(_file(os.environ[VARIABLE], os.getpid()), f"{line}\n".encode())


@functools.cache
def _file(path: str, _pid: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


@dataclass(frozen=True, slots=True)
class Mark:
    """One line: its writer and its time, in seconds of the wall clock."""

    pid: int
    at: float
    parent: int = 0  # the process that started the writer: for a work-horse, its worker

    def is_of(self, worker: int) -> bool:
        """Return True if this process or a child of it wrote the line."""
        return worker in (self.pid, self.parent)


@dataclass(slots=True)
class Ledger:
    """The events that were read so far."""

    called: dict[int, Mark] = field(default_factory=dict)
    follows: dict[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # of a chain, or the body of a chord
    enqueued: dict[int, Mark] = field(default_factory=dict)
    refused: dict[int, Mark] = field(default_factory=dict)
    starts: dict[int, list[Mark]] = field(default_factory=dict)
    ends: dict[int, list[Mark]] = field(default_factory=dict)
    running: dict[int, Mark] = field(default_factory=dict)  # last start; not ended
    number_of: dict[str, int] = field(default_factory=dict)  # by the library's id of the job
    executed: int = 0
    lines: int = 0

    def add(self, line: str) -> None:
        """Add one line."""
        what, number_text, pid, nanoseconds, *more = line.split()
        parent = int(more[0]) if more and what in ("start", "end") else 0
        number, mark = int(number_text), Mark(int(pid), int(nanoseconds) / 1e9, parent)
        if what == "call":
            self.called[number] = mark
            if more:
                self.follows[number] = tuple(map(int, more[0].split(",")))
        elif what == "enqueued":
            self.enqueued[number] = mark
            self.number_of[more[0]] = number
            # A job may have ended before its producer wrote this line.
            self.executed += number in self.ends
        elif what == "refused":
            self.refused[number] = mark
        elif what == "fail":
            self.running.pop(number, None)
        elif what == "start":
            self.starts.setdefault(number, []).append(mark)
            if number not in self.ends:
                self.running[number] = mark
        elif what == "end":
            marks = self.ends.setdefault(number, [])
            self.executed += not marks and number in self.enqueued
            marks.append(mark)
            self.running.pop(number, None)
        else:
            raise ValueError(f"no line of a ledger: {line!r}")
        self.lines += 1

    def owed(self) -> set[int]:
        """Return the jobs whose enqueue returned and which never ended."""
        return self.enqueued.keys() - self.ends.keys()


class Reader:
    """Reads a ledger while it is written."""

    def __init__(self, path: Path) -> None:
        path.touch(0o600)
        self._file = path.open("rb")
        self._rest = b""
        self.ledger = Ledger()

    def read(self) -> bool:
        """Read the new lines; return True if there were any."""
        data = self._rest + self._file.read()
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            self.ledger.add(line.decode())
        return bool(lines)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
