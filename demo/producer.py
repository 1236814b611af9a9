"""The producer: `python -m jobguard.demo.producer LIBRARY JOBS SECONDS`.

It enqueues at full speed jobs that each take so many seconds, and now and then a longer one.
It goes on until so many calls of enqueue have returned. A call that raised is no promise: it is
written down as refused, and the producer tries again a moment later, as any program would.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
import time
from typing import TYPE_CHECKING

from jobguard.demo.ledger import note

if TYPE_CHECKING:
    from collections.abc import Callable

# Now and then a job that is long enough to be caught in the middle of, when a worker is to be
# killed. A sleeping job costs no processor, so the other workers are the faster for it.
LONGER_SECONDS = 0.5
LONG_JOBS = 40

REFUSED_PAUSE_SECONDS = 0.05


def main(library: str, jobs: str, seconds: str) -> None:
    """Enqueue."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    app = importlib.import_module(f"jobguard.demo.apps.{library}")
    produce(app.enqueue, int(jobs), float(seconds))


def is_long(number: int, jobs: int) -> bool:
    """Whether this one of so many jobs takes its time."""
    every = max(10, jobs // LONG_JOBS)
    return number % every == every // 2


def produce(enqueue: Callable[[int, float], str], jobs: int, seconds: float) -> None:
    """Enqueue until `jobs` calls have returned."""
    returned = 0
    for number in itertools.count(1):
        takes = seconds + LONGER_SECONDS * is_long(number, jobs)
        try:
            job_id = enqueue(number, takes)
        except Exception:  # whatever the library raises: the caller was told
            note("refused", number)
            time.sleep(REFUSED_PAUSE_SECONDS)
            continue
        note("enqueued", number, job_id)
        returned += 1
        if returned == jobs:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
