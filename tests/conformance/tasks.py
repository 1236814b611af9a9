"""The tasks of the suite: plain functions, for every library to take in its own way."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jobguard

PROBES: list[Callable[[], object]] = []
"""What ``look`` calls, where the worker is this process."""


def say(ledger: str, word: object = "ran") -> None:
    """Leave a word that only a run can leave."""
    with Path(ledger).open("a") as file:
        file.write(f"{word}\n")


def fail(ledger: str, word: object = "ran") -> None:
    """Fail."""
    say(ledger, word)
    raise ValueError("as it must")


def look(ledger: str, word: object = "ran") -> None:
    """Look around while it runs."""
    say(ledger, word)
    for probe in PROBES:
        probe()


def nap(ledger: str, word: object = "ran") -> None:
    """Take a moment, so that several run beside each other."""
    say(ledger, f"{word}:begun")
    time.sleep(0.3)
    say(ledger, word)


def die(ledger: str, word: object = "ran") -> None:
    """Take the worker along, unless a person has cured it."""
    say(ledger, word)
    if not Path(f"{ledger}.cured").exists():
        os.kill(os.getpid(), signal.SIGKILL)


def hold(ledger: str, word: object = "ran") -> None:
    """Hold a lock while it dies, and tell what a run knows of the one before it."""
    job = jobguard.current()
    with jobguard.lock("import", wait=5) as mine:
        known = job.predecessor is not None
        say(ledger, f"{mine},{job.recovered},{job.crashes},{known}")
        die(ledger, word)
