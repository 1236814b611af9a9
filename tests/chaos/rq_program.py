"""The processes of RQ: `python -m tests.chaos.rq_program worker|scheduler|producer …`."""

from __future__ import annotations

import logging
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import redis
import rq
from rq.scheduler import RQScheduler

import jobguard
from tests.chaos.produce import produce

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

TASKS = "tests.chaos.tasks"
RETRIES = 8
"""A work-horse that is killed costs one of them, where RQ itself sees to it."""


class Enqueue:
    """RQ's ways in; see tests.chaos.produce.Enqueue."""

    def __init__(self, connection: redis.Redis) -> None:
        self._connection = connection

    def plain(self, queue: str, number: int, seconds: float) -> str:
        """Enqueue."""
        return self._queue(queue).enqueue(f"{TASKS}.work", number, seconds).id

    def later(self, queue: str, number: int, seconds: float, wait: float) -> str:
        """Enqueue into RQ's delay queue."""
        return (
            self._queue(queue)
            .enqueue_in(timedelta(seconds=wait), f"{TASKS}.work", number, seconds)
            .id
        )

    def failing(self, queue: str, number: int, seconds: float) -> str:
        """Enqueue with retries: every other one waits a second for its next attempt."""
        retry = rq.Retry(max=RETRIES, interval=[0, 1][number % 2])
        return self._queue(queue).enqueue(f"{TASKS}.fail_first", number, seconds, retry=retry).id

    def many(self, queue: str, numbers: Sequence[int], seconds: float) -> Sequence[str]:
        """Enqueue several in one transaction."""
        datas = [rq.Queue.prepare_data(f"{TASKS}.work", (number, seconds)) for number in numbers]
        return [job.id for job in self._queue(queue).enqueue_many(datas)]

    def _queue(self, name: str) -> rq.Queue:
        return rq.Queue(name, connection=self._connection)


def worker(url: str, kind: str, *queues: str) -> None:
    """Work until told to stop, or until RQ gives up because Redis is gone."""
    from jobguard.adapters.rq import SimpleWorker, Worker

    worker_class = {"simple": SimpleWorker, "fork": Worker}[kind]
    worker_class(queues, connection=redis.Redis.from_url(url)).work(logging_level="WARNING")


def scheduler(url: str, *queues: str) -> None:
    """Move what is due from the delay queues, as the only one who does.

    In a process of its own: a worker looks for a dead scheduler's lock every ten minutes only. The
    supervisor starts no second one, so that whatever lock is left is that of the one before.
    """
    connection = redis.Redis.from_url(url)
    jobguard.guard(connection)
    only: Any = RQScheduler(
        list(queues), connection=connection, interval=1, logging_level="WARNING"
    )
    connection.delete(*(only.get_locking_key(queue) for queue in queues))
    only.acquire_locks()
    only.work()


def producer(url: str, rate: str, seed: str, *queues: str) -> None:
    """Enqueue until told to stop."""
    connection = redis.Redis.from_url(url)
    jobguard.guard(connection)
    produce(Enqueue(connection), queues, rate=float(rate), seed=int(seed))


PROGRAMS: dict[str, Callable[..., None]] = {
    "worker": worker,
    "scheduler": scheduler,
    "producer": producer,
}

if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(process)d %(name)s: %(message)s")
    logging.getLogger("jobguard").setLevel(logging.INFO)
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
