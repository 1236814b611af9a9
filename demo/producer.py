"""The producer: `python -m jobguard.demo.producer URL QUEUE JOBS SECONDS [--guarded]`.

It enqueues at full speed jobs that each take so many seconds, and now and then a longer one.
It goes on until so many calls of enqueue have returned. A call that raised is no promise: it is
written down as refused, and the producer tries again a moment later, as any program would.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time

import redis
import rq

from jobguard.demo.ledger import note

# Now and then a job that is long enough to be caught in the middle of, when a worker is to be
# killed. A sleeping job costs no processor, so the other workers are the faster for it.
LONGER_SECONDS = 0.5
LONG_JOBS = 40

REFUSED_PAUSE_SECONDS = 0.05


def main(url: str, queue_name: str, jobs: str, seconds: str, *flags: str) -> None:
    """Enqueue."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    queue = rq.Queue(queue_name, connection=redis.Redis.from_url(url))
    if "--guarded" in flags:
        import jobguard  # not in the run without jobguard

        jobguard.guard(queue, postgres=os.environ["JOBGUARD_POSTGRES_URL"])
    produce(queue, int(jobs), float(seconds))


def is_long(number: int, jobs: int) -> bool:
    """Whether this one of so many jobs takes its time."""
    every = max(10, jobs // LONG_JOBS)
    return number % every == every // 2


def produce(queue: rq.Queue, jobs: int, seconds: float) -> None:
    """Enqueue until `jobs` calls have returned."""
    returned = 0
    for number in itertools.count(1):
        takes = seconds + LONGER_SECONDS * is_long(number, jobs)
        try:
            job = queue.enqueue("jobguard.demo.tasks.work", number, takes)
        except Exception:  # whatever the library raises: the caller was told
            note("refused", number)
            time.sleep(REFUSED_PAUSE_SECONDS)
            continue
        note("enqueued", number, job.id)
        returned += 1
        if returned == jobs:
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
