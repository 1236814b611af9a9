"""The processes of Celery: `python -m tests.chaos.celery_program worker|producer …`."""

# Celery is published without types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from celery import Celery, chain, chord, group

import jobguard
from tests.chaos import tasks
from tests.chaos.libraries import REDIS_VARIABLE
from tests.chaos.produce import Order, Way, produce

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

SLOW = 2.8
"""Factor for the length of the jobs: the workers run a dozen jobs at a time."""
RETRIES = 8
VISIBILITY = 8.0
"""Seconds after which Celery redelivers an unacknowledged message, even if a worker still has it."""

app: Any = Celery("chaos", broker=os.environ[REDIS_VARIABLE], backend=os.environ[REDIS_VARIABLE])
app.conf.update(
    broker_connection_retry_on_startup=True,
    worker_prefetch_multiplier=1,  # jobs that wait shall also wait in Redis
    broker_transport_options={
        "visibility_timeout": VISIBILITY,
        # Celery checks every two seconds, not only every hundred.
        "unacked_restore_interval": 2,
        "unacked_restore_throttle": 1,
    },
)
jobguard.guard(app)


@app.task(name="work")
def work(number: int, seconds: float) -> int:
    """Work, and return the number of the job."""
    tasks.work(number, seconds)
    return number


@app.task(name="fail_first", bind=True, max_retries=RETRIES)
def fail_first(self: Any, number: int, seconds: float) -> int:
    """Fail and retry: every second job waits in a worker for its next attempt."""
    try:
        tasks.fail_first(number, seconds)
    except ValueError as error:
        raise self.retry(exc=error, countdown=(number % 2) * 6) from error
    return number


@app.task(name="follow")
def follow(before: int | list[int], number: int, seconds: float, expected: int | list[int]) -> int:
    """Work behind other jobs, and check that their results are right."""
    if before != expected:
        raise ValueError(f"{number} was given {before!r}, not {expected!r}")
    tasks.work(number, seconds)
    return number


@app.task(name="send")
def send(number: int, seconds: float, other: int, queue: str) -> int:
    """Send another task, which has the same id each time that this task starts."""
    again = work.s(other, seconds).set(queue=queue, task_id=f"sent-{other}")
    tasks.send(number, seconds, other, lambda: again.apply_async().id)
    return number


def ways() -> Mapping[str, Way]:
    """Return Celery's ways in; see tests.chaos.produce."""

    def plain(order: Order) -> Sequence[str]:
        return [work.s(order.number, order.seconds).apply_async(queue=order.queue).id]

    def later(order: Order) -> Sequence[str]:
        signature = work.s(order.number, order.seconds)
        return [signature.apply_async(queue=order.queue, countdown=order.wait).id]

    def far(order: Order) -> Sequence[str]:
        """Wait longer than the visibility timeout."""
        signature = work.s(order.number, order.seconds)
        return [signature.apply_async(queue=order.queue, countdown=VISIBILITY + order.wait).id]

    def failing(order: Order) -> Sequence[str]:
        return [fail_first.s(order.number, order.seconds).apply_async(queue=order.queue).id]

    def many(order: Order) -> Sequence[str]:
        each = [work.s(number, order.seconds).set(queue=order.queue) for number in order.numbers]
        return [result.id for result in group(each).apply_async().results]

    def one_by_one(order: Order) -> Sequence[str]:
        first, *rest = order.numbers
        steps = [work.s(first, order.seconds)]
        steps += [follow.s(number, order.seconds, number - 1) for number in rest]
        result = chain(*(step.set(queue=order.queue) for step in steps)).apply_async()
        ids = [result.id]
        while (result := result.parent) is not None:
            ids.insert(0, result.id)
        return ids

    def gather(order: Order) -> Sequence[str]:
        """Enqueue a chord: its header has a task, a task that is retried, and a chain."""
        plain, failing, first, second, last = order.numbers
        steps = [work.s(first, order.seconds), follow.s(second, order.seconds, first)]
        header = [
            work.s(plain, order.seconds).set(queue=order.queue),
            fail_first.s(failing, order.seconds).set(queue=order.queue),
            chain(*(step.set(queue=order.queue) for step in steps)),
        ]
        body = follow.s(last, order.seconds, [plain, failing, second]).set(queue=order.queue)
        result = chord(header, body).apply_async()
        *members, chained = result.parent.results
        return [*(one.id for one in members), chained.parent.id, chained.id, result.id]

    def sending(order: Order) -> Sequence[str]:
        number, other = order.numbers
        signature = send.s(number, order.seconds, other, order.queue)
        return [signature.apply_async(queue=order.queue).id]

    return {
        **{"plain": plain, "later": later, "far": far, "failing": failing},
        **{"many": many, "chain": one_by_one, "gather": gather, "sending": sending},
    }


def worker(name: str, pool: str, concurrency: str, ack: str, *queues: str) -> None:
    """Work until a signal stops the worker; `late`: Celery redelivers the jobs of a killed worker."""
    late = ack == "late"
    app.conf.update(task_acks_late=late, task_reject_on_worker_lost=late)
    app.worker_main(
        [
            *("worker", "--hostname", f"{name}@chaos", "--queues", ",".join(queues)),
            *("--pool", pool, "--concurrency", concurrency, "--loglevel", "WARNING"),
        ]
    )


def producer(rate: str, seed: str, *queues: str) -> None:
    """Enqueue until a signal stops the producer."""
    produce(ways(), queues, rate=float(rate), seed=int(seed), slow=SLOW)


PROGRAMS: dict[str, Callable[..., None]] = {"worker": worker, "producer": producer}

if __name__ == "__main__":
    if sys.argv[1] == "producer":  # a worker of Celery configures logging itself
        logging.basicConfig(format="%(asctime)s %(process)d %(name)s: %(message)s")
    logging.getLogger("jobguard").setLevel(logging.INFO)
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
