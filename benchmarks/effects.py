"""The cost of a job in the application's transaction, and counts of keys and effects under load and kills.

Run ``python -m benchmarks.effects`` with transactions, keys or effects. The counts are taken from tables
that jobguard does not write. A count that must not be is an error.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import redis
import rq

import jobguard
from jobguard.demo.servers import PostgresServer, RedisServer
from jobguard.schema import migrate

PAYLOAD = "x" * 400
EFFECTS = int(os.environ.get("BENCH_EFFECTS", "2000"))
SENDS = int(os.environ.get("BENCH_SENDS", "1000"))


@contextmanager
def servers() -> Iterator[tuple[str, str]]:
    """Give the URLs of a migrated PostgreSQL and of a Redis."""
    with PostgresServer() as postgres, RedisServer() as broker:
        url = postgres.create_database("benchmark")
        migrate(url)
        yield url, broker.url


def book(number: int, url: str) -> None:
    """Do two effects once: a row in this database, and a row on a connection of its own."""
    with psycopg.connect(url) as connection, jobguard.once("book", conn=connection) as first:
        if first:
            connection.execute("insert into public.booked (id) values (%s)", [number])

    def mail() -> None:
        with psycopg.connect(url) as elsewhere:
            elsewhere.execute("insert into public.mailed (id) values (%s)", [number])

    jobguard.once("mail", mail, left_behind="run_again")
    if jobguard.current().attempt == 1 and number % 10 == 0:
        raise ValueError("every tenth job fails once")


def transactions() -> None:
    """Print the cost of a transaction with one insert, alone, with a job, and with a job after it."""
    with servers() as (postgres, broker):
        target = rq.Queue("safe", connection=redis.Redis.from_url(broker))
        guard = jobguard.guard(target, postgres=postgres)
        connection = psycopg.connect(postgres, autocommit=True)
        connection.execute("create table public.orders (id serial primary key, body text)")

        def bare() -> None:
            with connection.transaction():
                connection.execute("insert into public.orders (body) values (%s)", [PAYLOAD])

        def after() -> None:
            bare()
            target.enqueue("benchmarks.work.nothing", 1, PAYLOAD)

        def inside() -> None:
            with guard.transaction(connection):
                connection.execute("insert into public.orders (body) values (%s)", [PAYLOAD])
                target.enqueue("benchmarks.work.nothing", 1, PAYLOAD)

        variants = {"insert": bare, "insert, then enqueue": after, "insert and enqueue": inside}
        for work in variants.values():
            for _ in range(50):
                work()
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(20):
            for name, work in variants.items():
                for _ in range(25):
                    begun = time.perf_counter()
                    work()
                    times[name].append(time.perf_counter() - begun)
        for name, took in times.items():
            p50 = statistics.median(took)
            print(f"{name:24} p50 {p50 * 1000:6.2f} ms   {len(took) / sum(took):7.0f}/s")


def _produce(number: int, postgres: str, broker: str, sends: int) -> None:
    target = rq.Queue("safe", connection=redis.Redis.from_url(broker))
    guard = jobguard.guard(target, postgres=postgres, record_timeout=10, call_timeout=10)
    for n in range(sends):
        mode = "replace" if (n + number) % 3 == 0 else "ignore"
        guard.send("benchmarks.work.nothing", number, n, key=f"k{n % 100}", on_conflict=mode)  # type: ignore[arg-type]


def keys() -> None:
    """Send from 16 processes with 100 keys, and look all the time how often a key is owed."""
    with servers() as (postgres, broker):
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_produce, args=(number, postgres, broker, SENDS))
            for number in range(16)
        ]
        begun = time.monotonic()
        for process in processes:
            process.start()
        most = looks = 0
        with psycopg.connect(postgres, autocommit=True) as connection:
            while any(process.is_alive() for process in processes):
                row = connection.execute(
                    "select coalesce(max(n), 0) from (select count(*) as n from jobguard.jobs"
                    " where key is not null group by key) k"
                ).fetchone()
                assert row is not None
                most, looks = max(most, row[0]), looks + 1
                time.sleep(0.05)
        took = time.monotonic() - begun
        assert all(process.exitcode == 0 for process in processes)
        print(f"{16 * SENDS} sends in {took:.0f} s, {looks} looks: at most {most} owed of a key")
        if most > 1:
            raise SystemExit("a key was owed twice")


def effects() -> None:
    """Run jobs with effects while workers are killed and PostgreSQL restarts, and count the effects."""
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer() as postgres,
        RedisServer() as broker,
    ):
        _effects(Path(folder), postgres, broker)


def _effects(folder: Path, postgres: PostgresServer, broker: RedisServer) -> None:
    migrate(postgres.url)
    environ = {
        **os.environ,
        "JOBGUARD_POSTGRES_URL": postgres.url,
        "JOBGUARD_REDIS_URL": broker.url,
        "JOBGUARD_WORKER_TIMEOUT": "3",
        "JOBGUARD_BEAT_INTERVAL": "0.5",
        "JOBGUARD_CRASH_BUDGET": "1000",
        "JOBGUARD_CRASH_BACKOFF": "0",
    }
    os.environ.update(environ)
    bin_ = Path(sys.executable).parent

    def start(*command: str) -> subprocess.Popen[bytes]:
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(command, env=environ, stdout=log, stderr=log)

    def worker() -> subprocess.Popen[bytes]:
        name = "jobguard.adapters.rq.SimpleWorker"
        rq_ = (str(bin_ / "rq"), "worker", "bench", "--url", broker.url, "--worker-class", name)
        return start(*rq_)

    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute("create table public.booked (id int)")
        connection.execute("create table public.mailed (id int)")
    target = rq.Queue("bench", connection=redis.Redis.from_url(broker.url))
    jobguard.guard(target)
    for n in range(EFFECTS):
        target.enqueue("benchmarks.effects.book", n, postgres.url, retry=rq.Retry(max=1000))
    leader = start(str(bin_ / "jobguard"), "reconcile")
    workers = [worker() for _ in range(4)]
    kills = restarts = 0
    begun, next_restart = time.monotonic(), time.monotonic() + 20
    chance = random.Random(7)
    while _left(postgres.url) and time.monotonic() - begun < 900:
        time.sleep(0.5)
        if chance.random() < 0.4:
            victim = chance.randrange(4)
            workers[victim].send_signal(signal.SIGKILL)
            workers[victim].wait()
            workers[victim] = worker()
            kills += 1
        if time.monotonic() > next_restart:
            next_restart = time.monotonic() + 20
            postgres.kill()
            postgres.start()
            restarts += 1
    for process in (*workers, leader):
        process.kill()
        process.wait()
    took = time.monotonic() - begun
    print(
        f"{EFFECTS} jobs in {took:.0f} s, {kills} workers killed, {restarts} restarts of PostgreSQL"
    )
    wrong = 0
    with psycopg.connect(postgres.url) as connection:
        for table in ("booked", "mailed"):
            counted = dict(
                connection.execute(
                    f"select id, count(*) from public.{table} group by id"
                ).fetchall()  # type: ignore[arg-type]
            )
            lost = EFFECTS - len(counted)
            twice = sum(1 for count in counted.values() if count > 1)
            print(f"{table}: {lost} lost, {twice} twice")
            wrong += lost + (twice if table == "booked" else 0)
        left = connection.execute(
            "select outcome::text, count(*) from jobguard.history where outcome <> 'superseded' group by 1"
        ).fetchall()
        print("outcomes:", dict(left))
    if wrong:
        raise SystemExit("an effect was lost, or happened twice in its own transaction")


def _left(url: str) -> int:
    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            row = connection.execute("select count(*) from jobguard.jobs").fetchone()
            return int(row[0]) if row else 1
    except psycopg.Error:
        return 1


if __name__ == "__main__":
    {"transactions": transactions, "keys": keys, "effects": effects}[sys.argv[1]]()
