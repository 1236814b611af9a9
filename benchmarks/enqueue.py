"""The cost of the guard for a producer: one thread, 16 threads, in bulk, large jobs, a slow network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import rq

from benchmarks.floors import insert_rate, insert_us
from benchmarks.measure import Case, Table, median_us, rate
from benchmarks.site import LARGE, SENDERS, SMALL, TASK, Send, Site, delayed, rq_queue
from jobguard.model import Delivery, new_token
from jobguard.registry import trackers

CALLS = 60
THREADS = 16


def one_thread(at: Site, *, payload: str = SMALL, calls: int = CALLS) -> list[Case]:
    """Return the median of one call, bare and guarded, and of guarded without a wait for the disk."""
    cases = []
    for library, make in SENDERS.items():
        for how, send in (
            ("bare", make(at, guard=False)),
            ("guarded", make(at, guard=True)),
            ("relaxed", make(at, guard=True, durability="relaxed")),
        ):
            _warm(send)
            cases.append(
                _case(
                    at,
                    f"{library}, {how}",
                    partial(median_us, partial(send, payload), calls),
                    calls,
                )
            )
    return cases


def _case(at: Site, name: str, run: Callable[[], float], jobs: int) -> Case:
    """Return a case of a library, which fails unless all of its jobs are guarded, or none of them."""
    what, _, how = name.rpartition(", ")

    def checked() -> float:
        with at.recording(0 if how == "bare" else jobs):
            return run()

    return Case(name, checked, base=None if how == "bare" else f"{what}, bare")


def _warm(send: Send) -> None:
    for _ in range(10):
        send(SMALL)


def _together(work: Callable[[], object], calls: int) -> float:
    def run() -> None:
        threads = [
            threading.Thread(target=lambda: [work() for _ in range(calls // THREADS)])
            for _ in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return rate(calls, run)


def _threads(at: Site) -> list[Case]:
    floor, record = "pgbench, 16 clients", recorder(at)

    def recorded() -> float:
        with at.recording(1600):
            return _together(record, 1600)

    cases = [
        Case(floor, lambda: insert_rate(at, THREADS)),
        Case("record() alone", recorded, base=floor),
    ]
    for library, make in SENDERS.items():
        for how in ("bare", "guarded"):
            send = make(at, guard=how == "guarded")
            _warm(send)
            cases.append(
                _case(
                    at,
                    f"{library}, {how}",
                    partial(_together, partial(send, SMALL), 480),
                    480,
                )
            )
    return cases


def recorder(at: Site) -> Callable[[], object]:
    """Return a function that records a delivery and pushes nothing."""
    queue = rq_queue(at, "record", guard=True)
    queue.enqueue(TASK)
    tracker = next(t for t in trackers() if t.source.namespace == queue.name)
    payload = SMALL.encode()

    def record() -> None:
        token = new_token()
        tracker.record([Delivery(token, str(token), queue.name, TASK, payload, fresh=True)])

    return record


def _bulk(at: Site, size: int = 1000) -> list[Case]:
    def many(queue: rq.Queue) -> Callable[[], object]:
        return lambda: queue.enqueue_many(
            [rq.Queue.prepare_data(TASK, (n, SMALL)) for n in range(size)]
        )

    bare, guarded = rq_queue(at, "bulk", guard=False), rq_queue(at, "bulk", guard=True)
    return [
        _case(at, "RQ enqueue_many, bare", lambda: rate(size, many(bare)), size),
        _case(at, "RQ enqueue_many, guarded", lambda: rate(size, many(guarded)), size),
    ]


def tables(at: Site) -> list[Table]:
    """Return the tables of producers."""
    single = one_thread(at)
    single.append(Case("pgbench, 1 client", lambda: insert_us(at)))
    return [
        Table("Enqueue, one thread", "us", single, rounds=15),
        Table("Enqueue, 16 threads", "jobs/s", _threads(at), rounds=7, is_rate=True),
        Table("Bulk of 1,000", "jobs/s", _bulk(at), rounds=9, is_rate=True),
    ]


def payload_tables(at: Site) -> list[Table]:
    """Return the tables of large jobs."""
    return [Table("Enqueue, 100 kB", "us", one_thread(at, payload=LARGE, calls=20), rounds=9)]


@contextmanager
def latency_tables(at: Site) -> Iterator[list[Table]]:
    """Give the tables of a network that needs 1 ms and 5 ms for a round trip to either server."""
    with ExitStack() as stack:
        found = []
        for milliseconds in (1, 5):
            far = at.behind(
                stack.enter_context(delayed(at.postgres, milliseconds)),
                stack.enter_context(delayed(at.broker, milliseconds)),
            )
            title = f"Enqueue, {milliseconds} ms network"
            found.append(Table(title, "us", one_thread(far, calls=20), rounds=7))
        yield found
