"""What the guard costs beside time: bytes of WAL, connections, imports, memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import psycopg

from benchmarks.measure import Case, Table
from benchmarks.site import SMALL, Site, rq_sender
from benchmarks.work import WORKERS, run

_IMPORT = """
import time
began = time.perf_counter()
import jobguard
print((time.perf_counter() - began) * 1e3, 0)
"""
_FIRST = """
import redis, rq
queue = rq.Queue("first", connection=redis.Redis.from_url({broker!r}))
queue.enqueue("benchmarks.jobs.nothing")
import os, time
def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
before = resident()
began = time.perf_counter()
import jobguard
jobguard.guard(queue, postgres={postgres!r}, namespace="first")
queue.enqueue("benchmarks.jobs.nothing")
print((time.perf_counter() - began) * 1e3, resident() - before)
"""


def _program(text: str) -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True)
    milliseconds, megabytes = done.stdout.split()[-2:]
    return float(milliseconds), float(megabytes)


def _wal(at: Site, work: Callable[[], int]) -> float:
    """Return the bytes of WAL for one job."""
    position = "select pg_current_wal_insert_lsn() - '0/0'"
    with psycopg.connect(at.postgres, autocommit=True) as connection:
        connection.execute("checkpoint")  # so that full pages count alike in each round
        before = connection.execute(position).fetchone()
        count = work()
        after = connection.execute(position).fetchone()
    assert before is not None and after is not None
    return float(after[0] - before[0]) / count


def _record(at: Site) -> Callable[[], float]:
    send = rq_sender(at, guard=True)

    def work() -> int:
        for _ in range(300):
            send(SMALL)
        return 300

    return lambda: _wal(at, work)


def _life(at: Site) -> float:
    worker = next(worker for worker in WORKERS if worker.kind == "dramatiq")

    def work() -> int:
        run(at, worker, "nothing", guard=True)
        return worker.jobs

    return _wal(at, work)


def tables(at: Site) -> list[Table]:
    """Return the tables of costs."""
    first = _FIRST.format(broker=at.broker, postgres=at.postgres)
    return [
        Table(
            "WAL for one job",
            "bytes",
            [
                Case("record (RQ, 0.5 kB)", _record(at)),
                Case("record, claim and end (Dramatiq)", lambda: _life(at)),
            ],
            rounds=3,
        ),
        Table(
            "Host process, time",
            "ms",
            [
                Case("import jobguard", lambda: _program(_IMPORT)[0]),
                Case("import, guard() and first record", lambda: _program(first)[0]),
            ],
            rounds=7,
        ),
        Table(
            "Host process, memory",
            "MB",
            [Case("added until the first record", lambda: _program(first)[1])],
            rounds=3,
        ),
    ]
