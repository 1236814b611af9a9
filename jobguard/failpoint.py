"""Named places where a test makes its own process die, at moments that random kills do not hit.

`make chaos` kills processes from outside at random moments. Such a kill never falls between two statements
that follow each other at once. Failpoints are active only if the environment sets these variables when this
module is first imported:

    JOBGUARD_TESTING=1                                  this is a test
    JOBGUARD_FAILPOINT=after_record:0.02,after_push     the places, with the share of passes that die
    JOBGUARD_FAILPOINT_LOGS=/some/folder                a file for each place, made by the test

A process writes a line into the file of the place (place, pid, nanoseconds of the wall clock) and then
sends SIGKILL to itself. If the file does not exist, the process does not die: every death must be on
record, and a test arms or disarms a place by making or removing its file.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Mapping
from pathlib import Path

__all__ = ["hit"]


def armed(environ: Mapping[str, str]) -> dict[str, float]:
    """Return the active places, each with the share of passes that kill the process."""
    if environ.get("JOBGUARD_TESTING") != "1" or "JOBGUARD_FAILPOINT_LOGS" not in environ:
        return {}
    places = {}
    for entry in environ.get("JOBGUARD_FAILPOINT", "").split(","):
        name, _, share = entry.strip().partition(":")
        if name:
            places[name] = float(share or 1.0)
    return places


_armed = armed(os.environ)


def hit(name: str, *, when: bool = True) -> None:
    """Kill this process if a test has armed this place. ``when``: only if the condition holds."""
    if _armed and when and name in _armed:
        _maybe_die(name, _armed[name])


def _maybe_die(name: str, share: float) -> None:
    # Not the seeded generator: every work-horse inherits its state and would draw the same number.
    if random.SystemRandom().random() >= share:
        return
    try:
        log = os.open(Path(os.environ["JOBGUARD_FAILPOINT_LOGS"]) / name, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return
    os.write(log, f"{name} {os.getpid()} {time.time_ns()}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
