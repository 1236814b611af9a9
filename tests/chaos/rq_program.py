"""The processes of RQ: `python -m tests.chaos.rq_program worker|scheduler|producer …`."""

from __future__ import annotations

import logging
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import redis
import rq
from rq.scheduler import RQScheduler

import jobguard
from tests.chaos.libraries import REDIS_VARIABLE
from tests.chaos.produce import Order, Way, produce

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

TASKS = "tests.chaos.tasks"
RETRIES = 8
"""Retries of a job. A killed work-horse uses one of them if RQ itself handles the death."""


def ways(connection: redis.Redis) -> Mapping[str, Way]:
    """Return RQ's ways in; see tests.chaos.produce."""

    def queue_of(order: Order) -> rq.Queue:
        return rq.Queue(order.queue, connection=connection)

    def plain(order: Order) -> Sequence[str]:
        job = queue_of(order).enqueue(f"{TASKS}.work", order.number, order.seconds)
        return [job.id]

    def later(order: Order) -> Sequence[str]:
        """Enqueue with a delay."""
        wait = timedelta(seconds=order.wait)
        job = queue_of(order).enqueue_in(wait, f"{TASKS}.work", order.number, order.seconds)
        return [job.id]

    def failing(order: Order) -> Sequence[str]:
        """Enqueue with retries: every second job waits some time for its next attempt."""
        retry = rq.Retry(max=RETRIES, interval=[0, 6][order.number % 2])
        call = f"{TASKS}.fail_first", order.number, order.seconds
        return [queue_of(order).enqueue(*call, retry=retry).id]

    def many(order: Order) -> Sequence[str]:
        """Enqueue several jobs in one transaction."""
        calls = [(number, order.seconds) for number in order.numbers]
        datas = [rq.Queue.prepare_data(f"{TASKS}.work", call) for call in calls]
        return [job.id for job in queue_of(order).enqueue_many(datas)]

    return {"plain": plain, "later": later, "failing": failing, "many": many}


def connect() -> redis.Redis:
    """Connect to the Redis of the site."""
    return redis.Redis.from_url(os.environ[REDIS_VARIABLE])


def worker(kind: str, *queues: str) -> None:
    """Work until a signal stops the worker, or until RQ gives up because Redis is away."""
    from jobguard.adapters.rq import SimpleWorker, Worker

    worker_class = {"simple": SimpleWorker, "fork": Worker}[kind]
    worker_class(queues, connection=connect()).work(logging_level="WARNING")


def scheduler(*queues: str) -> None:
    """Move due jobs from the delay queues, as the only scheduler.

    The scheduler is a process of its own, because a worker checks only every ten minutes for the
    lock of a dead scheduler. The supervisor starts no second scheduler, so an old lock belongs to
    the one before.
    """
    connection = connect()
    jobguard.guard(connection)
    only: Any = RQScheduler(
        list(queues), connection=connection, interval=1, logging_level="WARNING"
    )
    connection.delete(*(only.get_locking_key(queue) for queue in queues))
    only.acquire_locks()
    only.work()


def producer(rate: str, seed: str, *queues: str) -> None:
    """Enqueue until a signal stops the producer."""
    connection = connect()
    jobguard.guard(connection)
    produce(ways(connection), queues, rate=float(rate), seed=int(seed))


PROGRAMS: dict[str, Callable[..., None]] = {
    "worker": worker,
    "scheduler": scheduler,
    "producer": producer,
}

if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(process)d %(name)s: %(message)s")
    logging.getLogger("jobguard").setLevel(logging.INFO)
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
