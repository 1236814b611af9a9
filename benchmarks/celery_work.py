"""The cost of the guard for a prefork worker of Celery: jobs a second, CPU and sessions of PostgreSQL."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from typing import Any

import celery
import psutil
import psycopg
import redis

import jobguard
from benchmarks.side_by_side import servers

JOBS = 1000
ROUNDS = 3
CHILDREN = 4

app: Any = celery.Celery("benchmark", broker=os.environ.get("BENCHMARK_REDIS", "redis://"))
app.conf.update(task_ignore_result=True, worker_hijack_root_logger=False)


@app.task
def nothing(*_: object) -> None:
    """Do nothing, as a job."""


if os.environ.get("BENCHMARK_GUARD"):
    jobguard.guard(app)


def _work(postgres: str, broker: str, queue: str, *, guard: bool) -> tuple[float, float, int]:
    """Return jobs a second, and the seconds of CPU and the number of sessions of PostgreSQL."""
    client: Any = redis.Redis.from_url(broker)
    environ = {
        **os.environ,
        "BENCHMARK_REDIS": broker,
        "JOBGUARD_POSTGRES_URL": postgres,
        "BENCHMARK_GUARD": "1" if guard else "",
    }
    words = (
        "--quiet",
        "-A",
        "benchmarks.celery_work",
        "worker",
        "-c",
        str(CHILDREN),
        "-Q",
        queue,
        "-l",
        "ERROR",
    )
    with psycopg.connect(postgres, autocommit=True) as connection:
        before = _cpu(connection)
        worker = subprocess.Popen([sys.executable, "-m", "celery", *words], env=environ)
        try:
            while client.llen(queue) > JOBS * 0.9:
                time.sleep(0.005)
            left, began, sessions = client.llen(queue), time.perf_counter(), 0
            while client.llen(queue) or client.hlen("unacked"):
                sessions = max(sessions, _sessions(connection))
                time.sleep(0.02)
            rate = left / (time.perf_counter() - began)
            while guard and connection.execute("select 1 from jobguard.jobs limit 1").fetchone():
                time.sleep(0.02)
            return rate, _cpu(connection) - before, sessions
        finally:
            worker.terminate()
            worker.wait(60)


def _sessions(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute(
        "select count(*) from pg_stat_activity where backend_type = 'client backend'"
    ).fetchone()
    return int(row[0]) - 1 if row else 0


def _cpu(connection: psycopg.Connection[Any]) -> float:
    postmaster = psutil.Process(connection.info.backend_pid).parent()
    assert postmaster is not None
    times = [postmaster.cpu_times()]
    for process in postmaster.children():
        times.append(process.cpu_times())
    return sum(one.user + one.system + one.children_user + one.children_system for one in times)


def main() -> None:
    """Print the rates and their ratio, in pairs."""
    with servers() as (postgres, broker):
        bare = celery.Celery("bare", broker=broker, set_as_current=False)
        safe = celery.Celery("safe", broker=broker, set_as_current=False)
        jobguard.guard(safe, postgres=postgres)
        found: dict[str, list[tuple[float, float, int]]] = {"plain": [], "guarded": []}
        for _ in range(ROUNDS):
            for kind, sender in (("plain", bare), ("guarded", safe)):
                for n in range(JOBS):
                    sender.send_task("benchmarks.celery_work.nothing", (n,), queue=kind)
                found[kind].append(_work(postgres, broker, kind, guard=kind == "guarded"))
        for kind, all_of in found.items():
            rate = statistics.median(rate for rate, _, _ in all_of)
            cpu = statistics.median(cpu for _, cpu, _ in all_of) / JOBS * 1e6
            sessions = max(most for _, _, most in all_of)
            print(f"prefork, {kind:8} {rate:7.0f} jobs/s {cpu:7.0f} us CPU/job {sessions} sessions")
        pairs = zip(found["guarded"], found["plain"], strict=True)
        print(f"guarded / plain   x{statistics.median(g[0] / p[0] for g, p in pairs):.2f}")


if __name__ == "__main__":
    main()
