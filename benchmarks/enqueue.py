"""The cost of the guard for a producer: alone, in bulk, with threads, and while PostgreSQL is away."""

from __future__ import annotations

import threading

import psycopg
import rq

from benchmarks.side_by_side import Variant, guarded, measure, queue, servers
from jobguard.demo.servers import PostgresServer

PAYLOAD = "x" * 400


def _one_by_one(target: rq.Queue) -> Variant:
    def run(calls: int) -> None:
        for n in range(calls):
            target.enqueue("benchmarks.work.nothing", n, PAYLOAD)

    return run


def _many(target: rq.Queue, size: int) -> Variant:
    def run(calls: int) -> None:
        for _ in range(calls):
            target.enqueue_many(
                [
                    rq.Queue.prepare_data("benchmarks.work.nothing", (n, PAYLOAD))
                    for n in range(size)
                ]
            )

    return run


def _threads(target: rq.Queue, count: int) -> Variant:
    one = _one_by_one(target)

    def run(calls: int) -> None:
        threads = [threading.Thread(target=one, args=(calls // count,)) for _ in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run


def _insert(url: str) -> Variant:
    connection = psycopg.connect(url, autocommit=True)
    connection.execute("create table if not exists floor (id serial primary key, body bytea)")

    def run(calls: int) -> None:
        for _ in range(calls):
            connection.execute(
                "insert into floor (body) values (%s)", (PAYLOAD.encode(),), prepare=True
            )

    return run


def main() -> None:
    """Print the cost of an enqueue, guarded and not."""
    with servers() as (postgres, broker):
        plain, safe = queue("plain", broker), guarded("safe", broker, postgres)
        print("enqueue, one thread")
        measure(
            {
                "rq": _one_by_one(plain),
                "rq, guarded": _one_by_one(safe),
                "(one insert and its commit)": _insert(postgres),
            },
            rounds=9,
            calls=300,
        )
        print("\nenqueue, 16 threads")
        measure({"rq": _threads(plain, 16), "rq, guarded": _threads(safe, 16)}, rounds=5, calls=960)
        print("\nenqueue_many of 1,000")
        measure(
            {"rq": _many(plain, 1000), "rq, guarded": _many(safe, 1000)},
            rounds=7,
            calls=1,
            unit="job",
            per=1000,
        )
    _while_postgres_is_away()


def _while_postgres_is_away() -> None:
    from jobguard.demo.servers import RedisServer
    from jobguard.schema import migrate

    print("\nenqueue while Postgres is stopped (SIGSTOP), after the first call's one wait")
    with PostgresServer() as postgres, RedisServer() as broker:
        url = postgres.create_database("away")
        migrate(url)
        plain = queue("plain", broker.url)
        safe = guarded("safe", broker.url, url, namespace="away", spool_size=1_000_000)
        safe.enqueue("benchmarks.work.nothing", 0)
        postgres.pause()
        try:
            safe.enqueue("benchmarks.work.nothing", 0)
            measure(
                {"rq": _one_by_one(plain), "rq, guarded": _one_by_one(safe)}, rounds=9, calls=300
            )
        finally:
            postgres.resume()
