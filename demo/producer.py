"""The producer: `python -m jobguard.demo.producer LIBRARY JOBS SECONDS AT_ONCE`.

It enqueues jobs at full speed. Each takes so many seconds, and some take longer. On a busy machine
it makes all jobs longer, because workers that run so many jobs at once must not be faster than it.

It continues until so many calls of enqueue have returned. A call that raised is no promise: it is
recorded as refused, and the producer tries again a moment later, as any program would.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jobguard.demo.ledger import note
from jobguard.demo.libraries import named

if TYPE_CHECKING:
    from collections.abc import Callable

# Some jobs are long, so that a worker can be killed in the middle of one. A sleeping job uses no
# processor time, so it makes the other workers faster.
LONGER_SECONDS = 0.5
LONG_JOBS = 40

REFUSED_PAUSE_SECONDS = 0.05
QUIET = 100  # calls: the first one of all connects
AHEAD = 1.25  # so much faster than the workers; otherwise a killed Redis would have nothing to lose


def main(library: str, jobs: str, seconds: str, at_once: str) -> None:
    """Enqueue the jobs."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    app = importlib.import_module(f"jobguard.demo.apps.{library}")
    overhead = named(library).overhead_seconds
    produce(app.enqueue, int(jobs), Pace(float(seconds), int(at_once), overhead))


def is_long(number: int, jobs: int) -> bool:
    """Return True if this one of so many jobs is a long one."""
    every = max(10, jobs // LONG_JOBS)
    return number % every == every // 2


@dataclass(frozen=True, slots=True)
class Pace:
    """Choose the length of the jobs so that the queue grows while they are enqueued."""

    seconds: float  # at least
    at_once: int
    overhead: float  # of the library, for each job

    def takes(self, returned: int, elapsed: float) -> float:
        """Return how long the next job takes, given the number and total time of the calls so far."""
        if returned < QUIET:
            return self.seconds
        return max(self.seconds, AHEAD * self.at_once * elapsed / returned - self.overhead)


def produce(enqueue: Callable[[int, float], str], jobs: int, pace: Pace) -> None:
    """Enqueue until `jobs` calls have returned."""
    returned = 0
    began_at = time.monotonic()
    for number in itertools.count(1):
        takes = pace.takes(returned, time.monotonic() - began_at)
        takes += LONGER_SECONDS * is_long(number, jobs)
        try:
            job_id = enqueue(number, takes)
        except Exception:  # for any error of the library: the caller knows that the call failed
            note("refused", number)
            time.sleep(REFUSED_PAUSE_SECONDS)
            continue
        note("enqueued", number, job_id)
        returned += 1
        if returned == jobs:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
