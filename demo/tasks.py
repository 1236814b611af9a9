"""The task: it records its start, waits, and records its end."""

from __future__ import annotations

import os
import time

from jobguard.demo.ledger import note


def work(number: int, seconds: float) -> None:
    """Wait for some seconds."""
    note("start", number, str(os.getppid()))
    time.sleep(seconds)
    note("end", number, str(os.getppid()))
