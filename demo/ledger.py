"""The demo's own record of what happened, written by the tasks and the producer themselves.

Nobody else writes it: jobguard is never told where it lies. One line an event, appended by one
small write each, so that the lines of many processes do not mix, and what was written stays when
its writer is killed a microsecond later:

    call <number> <pid> <nanoseconds> [numbers]        enqueue is about to be called (chaos only);
                                                       those behind which the library is to run it
    enqueued <number> <pid> <nanoseconds> <job id>     the call of enqueue returned
    refused <number> <pid> <nanoseconds>               the call of enqueue raised
    start <number> <pid> <nanoseconds> [parent pid]    first statement of the task
    fail <number> <pid> <nanoseconds>                  the task raises: this attempt is no end
    end <number> <pid> <nanoseconds> [parent pid]      last statement of the task

The clock is the wall's: the one clock that tasks, kills and the incident rows of Postgres share.
A number stands for one call of enqueue: after a refusal the producer goes on with the next number,
so that a job which ran although its enqueue raised is never mistaken for a second run of another.
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
    """One line: who wrote it and when, in seconds of the wall clock."""

    pid: int
    at: float
    parent: int = 0  # the process that started the writer: of a work-horse, its worker

    def is_of(self, worker: int) -> bool:
        """Whether this process wrote it, or a child of it."""
        return worker in (self.pid, self.parent)


@dataclass(slots=True)
class Ledger:
    """What was read so far."""

    called: dict[int, Mark] = field(default_factory=dict)
    follows: dict[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # of a chain, or a chord's body
    enqueued: dict[int, Mark] = field(default_factory=dict)
    refused: dict[int, Mark] = field(default_factory=dict)
    starts: dict[int, list[Mark]] = field(default_factory=dict)
    ends: dict[int, list[Mark]] = field(default_factory=dict)
    running: dict[int, Mark] = field(default_factory=dict)  # started last by, and not ended
    number_of: dict[str, int] = field(default_factory=dict)  # by the library's id of the job
    executed: int = 0
    lines: int = 0

    def add(self, line: str) -> None:
        """Take in one line."""
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
            # A job may well have ended before its producer came to write this line.
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
        """Give the jobs whose enqueue returned and which never ended."""
        return self.enqueued.keys() - self.ends.keys()


class Reader:
    """Follows a ledger while it is written."""

    def __init__(self, path: Path) -> None:
        path.touch(0o600)
        self._file = path.open("rb")
        self._rest = b""
        self.ledger = Ledger()

    def read(self) -> bool:
        """Take in what is new; tell whether there was anything."""
        data = self._rest + self._file.read()
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            self.ledger.add(line.decode())
        return bool(lines)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
