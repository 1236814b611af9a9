"""The tasks. They write the ledger and know no queue library: the same tasks serve all of them."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from jobguard.demo.ledger import VARIABLE, note

if TYPE_CHECKING:
    from collections.abc import Callable


def work(number: int, seconds: float) -> None:
    """Sleep for some seconds."""
    note("start", number, str(os.getppid()))
    time.sleep(seconds)
    note("end", number, str(os.getppid()))


def fail_first(number: int, seconds: float) -> None:
    """Fail in the first attempt, and work in every other attempt.

    A file marks the first attempt, so that the task does not depend on the library's own count:
    jobguard repeats a killed attempt, which is not a retry.
    """
    if _is_first(number):
        note("start", number, str(os.getppid()))
        time.sleep(seconds)
        note("fail", number)
        raise ValueError("the first attempt fails")
    work(number, seconds)


def send(number: int, seconds: float, other: int, enqueue: Callable[[], str]) -> None:
    """Enqueue another job, and work; the ledger notes if it was accepted, as for any producer."""
    note("start", number, str(os.getppid()))
    note("call", other)
    try:
        job_id = enqueue()
    except Exception:  # any error of the library: the caller was informed
        note("refused", other)
    else:
        note("enqueued", other, job_id)
    time.sleep(seconds)
    note("end", number, str(os.getppid()))


def _is_first(number: int) -> bool:
    return claim(Path(os.environ[VARIABLE]).with_name("failed") / str(number))


def claim(path: Path) -> bool:
    """Make a file, and return True; return False if the file exists."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True
