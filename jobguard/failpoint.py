"""Named places where a test has this very process die, to hit what chance does not.

`make chaos` kills processes from outside at random moments; between two statements that follow each
other at once no such kill ever falls. Nothing here is active unless the environment says so twice, when
this module is first imported:

    JOBGUARD_TESTING=1                                  this is a test
    JOBGUARD_FAILPOINT=after_record:0.02,after_push     the places, with the share of passes that die
    JOBGUARD_FAILPOINT_LOGS=/some/folder                a file for each place, which whoever tests made

A process says in the file of the place that it dies (place, pid, nanoseconds of the wall clock) and
then sends itself SIGKILL. Where the file is not there, nobody dies: a death that nobody could account
for must not happen, and whoever tests arms and disarms a place by its file.
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
    """Read which places are active, and how likely a pass through each is to be the last."""
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
    """Die here, if a test wants it so and things are as the name says."""
    if _armed and when and name in _armed:
        _maybe_die(name, _armed[name])


def _maybe_die(name: str, share: float) -> None:
    # Not the seeded generator: every work-horse inherits its state, and would draw the same number.
    if random.SystemRandom().random() >= share:
        return
    try:
        log = os.open(Path(os.environ["JOBGUARD_FAILPOINT_LOGS"]) / name, os.O_WRONLY | os.O_APPEND)
    except FileNotFoundError:
        return
    os.write(log, f"{name} {os.getpid()} {time.time_ns()}\n".encode())
    os.kill(os.getpid(), signal.SIGKILL)
