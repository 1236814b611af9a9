"""The processes of Dramatiq: `python -m tests.chaos.dramatiq_program cli|worker|producer …`.

The command of Dramatiq itself imports this module by its name, in each of its processes.
"""

# Most of Dramatiq has no types.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

import dramatiq
from dramatiq import cli, group, pipeline
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import GroupCallbacks
from dramatiq.rate_limits.backends import RedisBackend as Counters
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend as Answers

import jobguard
from tests.chaos import tasks
from tests.chaos.libraries import QUEUES, REDIS_VARIABLE
from tests.chaos.produce import Order, Way, produce

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

URL = os.environ[REDIS_VARIABLE]
SLOW = 2.8
"""Factor for the length of the jobs: the workers run a dozen jobs at a time."""
RETRIES = {"max_retries": 8, "min_backoff": 100, "max_backoff": 1000}

actor: Any = dramatiq.actor
broker: Any = RedisBroker(
    url=URL,
    # Dramatiq redelivers the messages of a silent worker. It does so earlier and checks more often
    # than by default.
    heartbeat_timeout=10_000,
    maintenance_chance=20_000,
)
broker.add_middleware(GroupCallbacks(Counters(url=URL)))
broker.add_middleware(Results(backend=Answers(url=URL)))
for name in QUEUES:
    broker.declare_queue(name)  # no actor declares it
dramatiq.set_broker(broker)
guard = jobguard.guard(broker)


@actor(**RETRIES)
def work(number: int, seconds: float) -> None:
    """Work."""
    tasks.work(number, seconds)


@actor(**RETRIES)
def fail_first(number: int, seconds: float) -> None:
    """Fail, and have Dramatiq retry the job."""
    tasks.fail_first(number, seconds)


@actor(store_results=True, **RETRIES)
def begin(number: int, seconds: float) -> int:
    """Work as the first step of a pipeline."""
    tasks.work(number, seconds)
    return number


@actor(store_results=True, **RETRIES)
def follow(number: int, seconds: float, expected: int, before: int) -> int:
    """Work as a later step, with the result of the step before."""
    if before != expected:
        raise ValueError(f"{number} was given {before!r}, not {expected!r}")
    tasks.work(number, seconds)
    return number


@actor(**RETRIES)
def send(number: int, seconds: float, other: int, queue: str) -> None:
    """Send another message, which has the same id each time that this one starts."""
    again = _message(work, queue, other, seconds).copy(message_id=f"sent-{other}")
    tasks.send(number, seconds, other, lambda: _id(broker.enqueue(again)))


def _message(actor: Any, queue: str, *args: Any) -> Any:
    return actor.message(*args).copy(queue_name=queue)


def _id(message: Any) -> str:
    return str(message.message_id)


def ways() -> Mapping[str, Way]:
    """Return Dramatiq's ways in; see tests.chaos.produce."""

    def plain(order: Order) -> Sequence[str]:
        return [_id(broker.enqueue(_message(work, order.queue, order.number, order.seconds)))]

    def later(order: Order) -> Sequence[str]:
        message = _message(work, order.queue, order.number, order.seconds)
        return [_id(broker.enqueue(message, delay=int(order.wait * 1000)))]

    def failing(order: Order) -> Sequence[str]:
        """Enqueue with retries: every second job waits in a worker for its next attempt."""
        message = _message(fail_first, order.queue, order.number, order.seconds)
        if order.number % 2:
            message = message.copy(options={"min_backoff": 6000, "max_backoff": 6000})
        return [_id(broker.enqueue(message))]

    def many(order: Order) -> Sequence[str]:
        with guard.batch():
            sent = [
                broker.enqueue(_message(work, order.queue, number, order.seconds))
                for number in order.numbers
            ]
        return [_id(message) for message in sent]

    def chain(order: Order) -> Sequence[str]:
        return [_id(message) for message in _pipe(order, order.numbers).run().messages]

    def gather(order: Order) -> Sequence[str]:
        """Enqueue a group with a callback: a message, a message that is retried, and a pipeline."""
        one, failing, *piped, last = order.numbers
        callback = _message(work, order.queue, last, order.seconds)
        members = group(
            [
                _message(work, order.queue, one, order.seconds),
                _message(fail_first, order.queue, failing, order.seconds),
                _pipe(order, piped),
            ],
            broker=broker,
        )
        members.add_completion_callback(callback)
        members.run()
        messages = [*members.children[:2], *members.children[2].messages, callback]
        return [_id(message) for message in messages]

    def sending(order: Order) -> Sequence[str]:
        number, other = order.numbers
        message = _message(send, order.queue, number, order.seconds, other, order.queue)
        return [_id(broker.enqueue(message))]

    return {
        **{"plain": plain, "later": later, "failing": failing, "many": many},
        **{"chain": chain, "gather": gather, "sending": sending},
    }


def _pipe(order: Order, numbers: Sequence[int]) -> Any:
    first, *rest = numbers
    steps = [_message(begin, order.queue, first, order.seconds)]
    steps += [_message(follow, order.queue, one, order.seconds, one - 1) for one in rest]
    return pipeline(steps, broker=broker)


def command(processes: str, threads: str, *queues: str) -> None:
    """Run the command of Dramatiq."""
    arguments = ["--processes", processes, "--threads", threads, "--queues", *queues]
    parsed = cli.make_argument_parser().parse_args(["tests.chaos.dramatiq_program", *arguments])
    sys.exit(cli.main(parsed))


def worker(threads: str, *queues: str) -> None:
    """Work in this process until a signal stops the worker."""
    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: stopped.set())
    one = dramatiq.Worker(broker, queues=set(queues), worker_threads=int(threads))
    one.start()
    stopped.wait()
    one.stop()


def producer(rate: str, seed: str, *queues: str) -> None:
    """Enqueue until a signal stops the producer."""
    produce(ways(), queues, rate=float(rate), seed=int(seed), slow=SLOW)


PROGRAMS: dict[str, Callable[..., None]] = {
    "command": command,
    "worker": worker,
    "producer": producer,
}

if __name__ == "__main__":
    if sys.argv[1] != "command":  # the command configures logging itself
        logging.basicConfig(format="%(asctime)s %(process)d %(name)s: %(message)s")
    logging.getLogger("jobguard").setLevel(logging.INFO)
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
