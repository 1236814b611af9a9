"""The work: it says that it started, takes its time, and says that it ended."""

from __future__ import annotations

import os
import time

from jobguard.demo.ledger import note


def work(number: int, seconds: float) -> None:
    """Be busy for some seconds."""
    note("start", number, str(os.getppid()))
    time.sleep(seconds)
    note("end", number, str(os.getppid()))
