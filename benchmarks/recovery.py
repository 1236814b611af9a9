"""The time to detect and repair a loss: FLUSHALL of 10,000 waiting jobs, again and again."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

import psycopg
import redis
import rq

import jobguard
from benchmarks.side_by_side import servers

JOBS = 10_000
ROUNDS = int(os.environ.get("ROUNDS", "20"))


def main() -> None:
    """Print detection, first job back and all back: median and worst."""
    with servers() as (postgres, broker):
        reconciler = subprocess.Popen(
            [sys.executable, "-c", "from jobguard.cli import main; main()", "reconcile"],
            env=os.environ | {"JOBGUARD_POSTGRES_URL": postgres, "JOBGUARD_REDIS_URL": broker},
            stderr=subprocess.DEVNULL,
        )
        try:
            _rounds(postgres, broker)
        finally:
            reconciler.terminate()
            reconciler.wait()


def _rounds(postgres: str, broker: str) -> None:
    client = redis.Redis.from_url(broker)
    queue = rq.Queue("lost", connection=client)
    jobguard.guard(queue, postgres=postgres)
    with psycopg.connect(postgres, autocommit=True) as connection:
        _trust(connection, postgres, broker)
    for start in range(0, JOBS, 1000):
        queue.enqueue_many(
            [
                rq.Queue.prepare_data("benchmarks.work.nothing", (n, "x" * 400))
                for n in range(start, start + 1000)
            ]
        )
    with psycopg.connect(postgres, autocommit=True) as connection:
        seen, first, whole = [], [], []
        for _ in range(ROUNDS):
            _wait_for_the_end_of_incidents(connection)
            time.sleep(0.37)  # the rounds shall begin at different points of the pulse interval
            began = time.time()
            client.flushall()
            first_back = None
            while (length := client.llen(queue.key)) < JOBS:
                if length and first_back is None:
                    first_back = time.time() - began
                if time.time() - began > 60:
                    raise SystemExit(f"only {length} of {JOBS} came back in a minute")
                time.sleep(0.01)
            whole.append(time.time() - began)
            first.append(first_back or whole[-1])
            (opened,) = connection.execute(
                "select extract(epoch from max(opened_at))::float8 from jobguard.incidents"
            ).fetchone()  # type: ignore[misc]
            seen.append(opened - began)
    for what, times in (("seen", seen), ("first job back", first), ("10,000 back", whole)):
        print(f"{what:15} median {statistics.median(times):6.2f} s   worst {max(times):6.2f} s")


def _trust(connection: psycopg.Connection, postgres: str, broker: str) -> None:
    """Run a guarded worker until the queue is trusted; then stop it, so that the jobs stay in Redis."""
    command = "rq.cli worker lost --worker-class jobguard.adapters.rq.SimpleWorker --url"
    worker = subprocess.Popen(
        [sys.executable, "-m", *command.split(), broker],
        env=os.environ | {"JOBGUARD_POSTGRES_URL": postgres},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    query = "select count(*) from jobguard.queues where trusted_since is not null"
    while not connection.execute(query).fetchone()[0]:  # type: ignore[index]
        time.sleep(0.1)
    worker.terminate()
    worker.wait()


def _wait_for_the_end_of_incidents(connection: psycopg.Connection) -> None:
    query = "select count(*) from jobguard.incidents where closed_at is null"
    while connection.execute(query).fetchone()[0]:  # type: ignore[index]
        time.sleep(0.05)
