"""The cost of the guard for a worker: jobs a second of each kind of worker, bare and guarded.

Each round fills a queue, starts a worker, and measures how long it needs for the last nine tenths.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import redis
import rq

from benchmarks import jobs
from benchmarks.measure import Case, Table
from benchmarks.site import Site

_PATIENCE = 180.0


@dataclass(frozen=True, slots=True)
class Worker:
    """A kind of worker, with the number of jobs of one round."""

    kind: str
    title: str
    jobs: int
    slow_jobs: int
    """The same for jobs of 10 ms."""


WORKERS = (
    Worker("rq", "RQ Worker", 500, 200),
    Worker("rq-simple", "RQ SimpleWorker", 2000, 500),
    Worker("celery-prefork", "Celery prefork, 4", 4000, 1500),
    Worker("celery-threads", "Celery threads, 8", 4000, 2500),
    Worker("dramatiq", "Dramatiq, 8 threads", 8000, 3000),
)


def _fill(at: Site, worker: Worker, queue: str, task: str, count: int, *, guard: bool) -> None:
    """Enqueue the jobs of a round in the way of the library."""
    os.environ["JOBGUARD_POSTGRES_URL"] = at.postgres
    if worker.kind.startswith("rq"):
        target = rq.Queue(queue, connection=redis.Redis.from_url(at.broker))
        if guard:
            import jobguard

            jobguard.guard(target, namespace=queue)
        target.enqueue_many(
            [rq.Queue.prepare_data(f"benchmarks.jobs.{task}", (n,)) for n in range(count)]
        )
    elif worker.kind.startswith("celery"):
        app = jobs.celery_app(guard=guard, broker=at.broker, queue=queue)
        for n in range(count):
            app.send_task(task, (n,))
        app.close()
    else:
        broker, actors = jobs.dramatiq_actors(guard=guard, broker=at.broker, queue=queue)
        for n in range(count):
            actors[task].send(n)
        broker.close()


def _left(client: Any, worker: Worker, queue: str) -> Callable[[], int]:
    """Return a function that counts the jobs that are not done."""
    if worker.kind.startswith("rq"):
        # In the order in which a job passes them: else a job that moves meanwhile is not counted.
        lists = (f"rq:queue:{queue}", f"rq:queue:{queue}:intermediate")
        return lambda: sum(map(client.llen, lists)) + client.zcard(f"rq:wip:{queue}")
    if worker.kind.startswith("celery"):
        return lambda: client.llen(queue) + client.hlen("unacked")
    return lambda: client.hlen(f"{queue}:q.msgs")


Meanwhile = Callable[[str], AbstractContextManager[None]]
"""What happens while a worker is measured; it is given the queue, which is the namespace."""


def run(
    at: Site,
    worker: Worker,
    task: str,
    *,
    guard: bool,
    meanwhile: Meanwhile = lambda _: nullcontext(),
) -> float:
    """Return the jobs a second of one worker."""
    count = worker.jobs if task == "nothing" else worker.slow_jobs
    queue = at.name("work")
    guarded = count if guard else 0
    with at.recording(guarded):
        _fill(at, worker, queue, task, count, guard=guard)
    environ = {
        **os.environ,
        "BENCHMARK_REDIS": at.broker,
        "BENCHMARK_QUEUE": queue,
        "BENCHMARK_GUARD": "1" if guard else "",
        "JOBGUARD_POSTGRES_URL": at.postgres,
    }
    with at.recording(guarded, "history"):
        return _work(at, worker, queue, count, environ, meanwhile(queue))


def _work(
    at: Site,
    worker: Worker,
    queue: str,
    count: int,
    environ: dict[str, str],
    meanwhile: AbstractContextManager[None],
) -> float:
    client: Any = redis.Redis.from_url(at.broker)
    left = _left(client, worker, queue)
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.jobs", worker.kind],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + _PATIENCE
        while left() > count * 0.9:
            _check(process, deadline)
        with meanwhile:
            first, began = left(), time.perf_counter()
            while True:
                while left():
                    _check(process, deadline)
                took = time.perf_counter() - began
                time.sleep(0.05)  # a message that Celery has just taken is nowhere in Redis
                if not left():
                    return first / took
    finally:
        # An RQ worker asks for a second signal, and a guarded one writes its last ends.
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _check(process: subprocess.Popen[bytes], deadline: float) -> None:
    if process.poll() is not None or time.monotonic() > deadline:
        raise SystemExit("the worker of a benchmark ended, or did not end its jobs")
    time.sleep(0.002)


def tables(at: Site) -> list[Table]:
    """Return the tables of workers."""
    found = []
    for task, title in (("nothing", "no-op jobs"), ("ten_milliseconds", "jobs of 10 ms")):
        cases = [
            Case(
                f"{worker.title}, {how}",
                lambda worker=worker, how=how, task=task: run(
                    at, worker, task, guard=how == "guarded"
                ),
                base=None if how == "bare" else f"{worker.title}, bare",
            )
            for worker in WORKERS
            for how in ("bare", "guarded")
        ]
        found.append(Table(f"Work, {title}", "jobs/s", cases, rounds=5, is_rate=True))
    return found
