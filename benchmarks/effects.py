"""The cost of a job in the application's transaction, and counts of keys and effects under kills.

Run ``python -m benchmarks.effects`` with transactions, keys or effects. BENCH_EFFECTS and BENCH_SENDS
change the size. The counts are taken from tables that jobguard does not write. A wrong count is an error.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import psycopg
import redis
import rq

import jobguard
from jobguard.adapters.rq import SimpleWorker
from jobguard.demo import children
from jobguard.demo.harness import JOBGUARD
from jobguard.demo.servers import PostgresServer, RedisServer
from jobguard.schema import migrate

PAYLOAD = "x" * 400
EFFECTS = int(os.environ.get("BENCH_EFFECTS", "10000"))
SENDS = int(os.environ.get("BENCH_SENDS", "1000"))
PRODUCERS, KEYS, WORKERS, SELLERS = 16, 100, 4, 4
TRANSACTIONS = 500
"""Of each seller."""
_PATIENCE = 3600.0
_connections: dict[int, psycopg.Connection[Any]] = {}
"""The connection of each process, by its pid."""


@contextmanager
def servers() -> Iterator[tuple[str, str]]:
    """Give the URLs of a migrated PostgreSQL and of a Redis."""
    with PostgresServer() as postgres, RedisServer() as broker:
        url = postgres.create_database("benchmark")
        migrate(url)
        yield url, broker.url


def _connection(url: str) -> psycopg.Connection[Any]:
    known = _connections.get(os.getpid())
    if known is None or known.closed:
        known = _connections[os.getpid()] = psycopg.connect(url, autocommit=True)
    return known


def book(number: int, url: str) -> None:
    """Do two effects exactly once, and one at most once; every tenth job fails once after that."""
    connection = _connection(url)
    for effect in ("order", "stock"):
        with jobguard.once(effect, conn=connection) as first:
            if first:
                connection.execute("insert into public.booked values (%s, %s)", [number, effect])

    def mail() -> None:
        connection.execute("insert into public.mailed values (%s, 'mail')", [number])

    jobguard.once("mail", mail, left_behind="run_again")
    if jobguard.current().attempt == 1 and number % 10 == 0:
        raise ValueError("every tenth job fails once")


def run_key(key: str, url: str) -> None:
    """Write that a job of this key ran."""
    _connection(url).execute("insert into public.ran values (%s)", [key])


def _variants(postgres: str, broker: str) -> dict[str, Callable[[], object]]:
    target = rq.Queue("safe", connection=redis.Redis.from_url(broker))
    guard = jobguard.guard(target, postgres=postgres)
    connection = psycopg.connect(postgres, autocommit=True)

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

    made: dict[str, Callable[[], object]]
    made = {"insert": bare, "insert, then enqueue": after, "insert and enqueue": inside}
    for work in made.values():
        for _ in range(50):
            work()
    return made


def _transact(postgres: str, broker: str, name: str, begin: Barrier) -> None:
    work = _variants(postgres, broker)[name]
    begin.wait()
    for _ in range(TRANSACTIONS):
        work()
    begin.wait()


def transactions() -> None:
    """Print the cost of a transaction with one insert, alone, with a job, and with a job after it."""
    with servers() as (postgres, broker):
        with psycopg.connect(postgres) as connection:
            connection.execute("create table public.orders (id serial primary key, body text)")
        variants = _variants(postgres, broker)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(20):
            for name, work in variants.items():
                for _ in range(25):
                    begun = time.perf_counter()
                    work()
                    times[name].append(time.perf_counter() - begun)
        context = multiprocessing.get_context("spawn")
        for name, took in times.items():
            begin = context.Barrier(SELLERS + 1)
            processes = [
                context.Process(target=_transact, args=(postgres, broker, name, begin))
                for _ in range(SELLERS)
            ]
            for process in processes:
                process.start()
            begin.wait()
            begun = time.monotonic()
            begin.wait()
            rate = SELLERS * TRANSACTIONS / (time.monotonic() - begun)
            for process in processes:
                process.join()
            p50 = statistics.median(took) * 1000
            print(f"{name:22} p50 {p50:6.2f} ms   {SELLERS} processes {rate:6.0f}/s")


def _produce(number: int, postgres: str, broker: str, sends: int) -> None:
    target = rq.Queue("safe", connection=redis.Redis.from_url(broker))
    guard = jobguard.guard(target, postgres=postgres, record_timeout=10, call_timeout=10)
    for n in range(sends):
        key = f"k{n % KEYS}"
        mode = "replace" if (n + number) % 3 == 0 else "ignore"
        guard.send("benchmarks.effects.run_key", key, postgres, key=key, on_conflict=mode)  # type: ignore[arg-type]


def keys() -> None:
    """Send from many processes with few keys; look how often a key is owed, then run what was sent."""
    with servers() as (postgres, broker), psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("create table public.ran (key text)")
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_produce, args=(number, postgres, broker, SENDS))
            for number in range(PRODUCERS)
        ]
        begun = time.monotonic()
        for process in processes:
            process.start()
        most = looks = 0
        while any(process.is_alive() for process in processes):
            (owed,) = _one(
                connection,
                "select coalesce(max(n), 0) from (select count(*) as n from jobguard.jobs"
                " where key is not null group by key) k",
            )
            most, looks = max(most, owed), looks + 1
            time.sleep(0.05)
        took = time.monotonic() - begun
        assert all(process.exitcode == 0 for process in processes)
        sends = PRODUCERS * SENDS
        print(
            f"{sends} sends in {took:.0f} s ({sends / took:.0f}/s), {looks} looks: at most {most} owed"
        )
        target = rq.Queue("safe", connection=redis.Redis.from_url(broker))
        waited = target.count
        with jobguard.guard(target, postgres=postgres):
            SimpleWorker([target], connection=target.connection).work(
                burst=True, logging_level="ERROR"
            )
        ran, of = _one(connection, "select count(*), count(distinct key) from public.ran")
        print(f"{waited} messages in Redis; {ran} ran, of {of} keys")
        if most > 1 or not ran == of == min(KEYS, SENDS):
            raise SystemExit("a key was owed twice, or its job was lost")


def effects() -> None:
    """Run jobs with effects while workers are killed and PostgreSQL restarts, and count the effects."""
    with (
        tempfile.TemporaryDirectory() as folder,
        PostgresServer() as postgres,
        RedisServer() as broker,
        ExitStack() as stack,
    ):
        _effects(Path(folder), postgres, broker, stack)


def _effects(folder: Path, postgres: PostgresServer, broker: RedisServer, stack: ExitStack) -> None:
    migrate(postgres.url)
    settings = {
        "JOBGUARD_POSTGRES_URL": postgres.url,
        "JOBGUARD_REDIS_URL": broker.url,
        "JOBGUARD_WORKER_TIMEOUT": "3",
        "JOBGUARD_BEAT_INTERVAL": "0.5",
        "JOBGUARD_CRASH_BUDGET": "1000",
        "JOBGUARD_CRASH_BACKOFF": "0",
    }
    os.environ.update(settings)
    environ = children.clean_environment() | settings
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        for table in ("booked", "mailed"):
            connection.execute(f"create table public.{table} (id int, effect text)")
    target = rq.Queue("bench", connection=redis.Redis.from_url(broker.url))
    jobs = EFFECTS // 2
    with jobguard.guard(target) as guard, guard.batch():
        for n in range(jobs):
            target.enqueue("benchmarks.effects.book", n, postgres.url, retry=rq.Retry(max=1000))
    rq_worker = [
        *("-c", "from rq.cli import main; main()", "worker", "bench", "--url", broker.url),
        *("--worker-class", "jobguard.adapters.rq.SimpleWorker"),
    ]
    commands = {"reconciler": [*JOBGUARD, "reconcile"]}
    commands |= {f"worker-{n}": rq_worker for n in range(WORKERS)}
    processes = {
        name: children.Child(command, environ=environ, log=folder / name)
        for name, command in commands.items()
    }
    stack.callback(lambda: children.end(processes.values()))
    kills = restarts = 0
    begun, next_restart = time.monotonic(), time.monotonic() + 20
    chance = random.Random(7)
    while _left(postgres.url):
        if time.monotonic() - begun > _PATIENCE:
            raise SystemExit(f"not done after {_PATIENCE:.0f} s")
        time.sleep(0.5)
        for process in processes.values():
            process.tend()
        if chance.random() < 0.2:
            processes[f"worker-{chance.randrange(WORKERS)}"].kill()
            kills += 1
        if time.monotonic() > next_restart:
            next_restart = time.monotonic() + 20
            postgres.kill()
            postgres.start()
            restarts += 1
    took = time.monotonic() - begun
    print(f"{jobs} jobs in {took:.0f} s, {kills} workers and {restarts} times PostgreSQL killed")
    with psycopg.connect(postgres.url) as connection:
        lost, twice = _counted(connection, "booked", 2 * jobs)
        mails_lost, _ = _counted(connection, "mailed", jobs)
    if lost or twice or mails_lost:
        raise SystemExit("an effect was lost, or happened twice in its own transaction")


def _counted(connection: psycopg.Connection[Any], table: str, expected: int) -> tuple[int, int]:
    """Print and return how many effects of a table were lost, and how many happened twice."""
    rows, different = _one(
        connection, f"select count(*), count(distinct (id, effect)) from public.{table}"
    )
    lost, twice = expected - different, rows - different
    print(f"{table}: {expected} effects, {lost} lost, {twice} twice")
    return lost, twice


def _one(connection: psycopg.Connection[Any], query: str) -> tuple[Any, ...]:
    (row,) = connection.execute(query.encode()).fetchall()
    return tuple(row)


def _left(url: str) -> int:
    try:
        with psycopg.connect(url, connect_timeout=2) as connection:
            return int(_one(connection, "select count(*) from jobguard.jobs")[0])
    except psycopg.Error:
        return 1


if __name__ == "__main__":
    {"transactions": transactions, "keys": keys, "effects": effects}[sys.argv[1]]()
