"""The jobs of a measurement, and the workers that run them: ``python -m benchmarks.jobs KIND QUEUE``.

The environment names the broker, and whether the worker is guarded. This is also the module of the
Celery application.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from typing import Any

BROKER = os.environ.get("BENCHMARK_REDIS", "redis://")
GUARDED = bool(os.environ.get("BENCHMARK_GUARD"))
QUEUE = os.environ.get("BENCHMARK_QUEUE", "benchmark")


def nothing(*_: object) -> None:
    """Do nothing, as a job."""


def ten_milliseconds(*_: object) -> None:
    """Wait for 10 ms, as a job that waits for a server."""
    time.sleep(0.01)


JOBS = {"nothing": nothing, "ten_milliseconds": ten_milliseconds}


def celery_app(*, guard: bool = GUARDED, broker: str = BROKER, queue: str = QUEUE) -> Any:
    """Return the application of Celery."""
    import celery

    app: Any = celery.Celery("benchmark", broker=broker, set_as_current=False)
    app.conf.update(
        task_ignore_result=True, worker_hijack_root_logger=False, task_default_queue=queue
    )
    for name, job in JOBS.items():
        app.task(job, name=name)
    if guard:
        import jobguard

        jobguard.guard(app, namespace=queue)
    return app


def dramatiq_actors(*, guard: bool = GUARDED, broker: str = BROKER, queue: str = QUEUE) -> Any:
    """Return the broker of Dramatiq and its actors by name."""
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker

    made = RedisBroker(url=broker, namespace=queue)
    if guard:
        import jobguard

        jobguard.guard(made, namespace=queue)
    actors = {
        name: dramatiq.actor(job, actor_name=name, queue_name="q", broker=made)
        for name, job in JOBS.items()
    }
    return made, actors


def _rq(kind: str) -> None:
    import redis
    import rq

    connection = redis.Redis.from_url(BROKER)
    queue = rq.Queue(QUEUE, connection=connection)
    if GUARDED:
        import jobguard
        from jobguard.adapters import rq as ours

        jobguard.guard(queue, namespace=QUEUE)
        found: Any = {"rq": ours.Worker, "rq-simple": ours.SimpleWorker}[kind]
    else:
        found = {"rq": rq.Worker, "rq-simple": rq.SimpleWorker}[kind]
    found([queue], connection=connection).work(logging_level="ERROR")


def _dramatiq(_kind: str) -> None:
    import dramatiq

    broker, _ = dramatiq_actors()
    worker = dramatiq.Worker(broker, worker_threads=8)
    worker.start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    stop.wait()
    worker.stop()
    broker.close()


def _celery(kind: str) -> None:
    pool = kind.partition("-")[2]
    size = "4" if pool == "prefork" else "8"
    words = ["--quiet", "worker", "-P", pool, "-c", size, "-Q", QUEUE, "-l", "ERROR"]
    celery_app().start(words)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    _kind = sys.argv[1]
    _run = {"rq": _rq, "celery": _celery, "dramatiq": _dramatiq}[_kind.partition("-")[0]]
    _run(_kind)
