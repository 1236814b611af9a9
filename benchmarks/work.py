"""The cost of the guard for a worker: jobs a second of one SimpleWorker, guarded and not."""

from __future__ import annotations

import logging
import os
import statistics
import subprocess
import sys
import time

import redis
import rq

from benchmarks.side_by_side import guarded, queue, servers

JOBS = 1500
ROUNDS = 5


def nothing(*_: object) -> None:
    """Do nothing, as a job."""


def _burst(kind: str, name: str, broker: str, postgres: str) -> float:
    environment = os.environ | {"JOBGUARD_POSTGRES_URL": postgres}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.work", kind, name, broker],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.split()[-1])


def _worker(kind: str, name: str, broker: str) -> None:
    logging.disable(logging.CRITICAL)
    if kind == "guarded":
        from jobguard.adapters.rq import SimpleWorker as Worker
    else:
        from rq.worker import SimpleWorker as Worker  # type: ignore[assignment]
    connection = redis.Redis.from_url(broker)
    worker = Worker([rq.Queue(name, connection=connection)], connection=connection)
    began = time.perf_counter()
    worker.work(burst=True)
    print(JOBS / (time.perf_counter() - began))


def main() -> None:
    """Print the rates and their ratio, in pairs."""
    with servers() as (postgres, broker):
        plain, safe = queue("plain", broker), guarded("safe", broker, postgres)
        ratios, rates = [], {"plain": [], "guarded": []}  # type: ignore[var-annotated]
        for _ in range(ROUNDS):
            for target in (plain, safe):
                target.enqueue_many(
                    [rq.Queue.prepare_data("benchmarks.work.nothing", (n,)) for n in range(JOBS)]
                )
            bare = _burst("plain", "plain", broker, postgres)
            kept = _burst("guarded", "safe", broker, postgres)
            rates["plain"].append(bare)
            rates["guarded"].append(kept)
            ratios.append(kept / bare)
        for kind, measured in rates.items():
            print(f"SimpleWorker, {kind:8}  {statistics.median(measured):7.0f} jobs/s")
        print(f"guarded / plain        x{statistics.median(ratios):.2f}  (median of pairs)")


if __name__ == "__main__":
    _worker(*sys.argv[1:])
