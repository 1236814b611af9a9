"""The work. It writes the ledger and knows no queue library: the same tasks serve all of them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from jobguard.demo.ledger import VARIABLE, note


def work(number: int, seconds: float) -> None:
    """Be busy for some seconds."""
    note("start", number, str(os.getppid()))
    time.sleep(seconds)
    note("end", number, str(os.getppid()))


def fail_first(number: int, seconds: float) -> None:
    """Fail in the first attempt, and work in every other.

    Which one this is a file says, so that it does not depend on the library's own count: an attempt
    that was killed is repeated by jobguard, and is no retry.
    """
    if _is_first(number):
        note("start", number, str(os.getppid()))
        time.sleep(seconds)
        note("fail", number)
        raise ValueError("the first attempt fails")
    work(number, seconds)


def _is_first(number: int) -> bool:
    return claim(Path(os.environ[VARIABLE]).with_name("failed") / str(number))


def claim(path: Path) -> bool:
    """Make a file that nobody has made before; False if somebody has."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True
