"""Variants measured in turn, round by round, so that a change of the machine affects all of them."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import redis
import rq

import jobguard
from jobguard.demo.servers import PostgresServer, RedisServer
from jobguard.schema import migrate

Variant = Callable[[int], None]


@contextmanager
def servers() -> Iterator[tuple[str, str]]:
    """Give the URLs of a migrated PostgreSQL and of a Redis without persistence."""
    with PostgresServer() as postgres, RedisServer() as broker:
        url = postgres.create_database("benchmark")
        migrate(url)
        yield url, broker.url


def queue(name: str, url: str) -> rq.Queue:
    """Return a queue with its own connection."""
    return rq.Queue(name, connection=redis.Redis.from_url(url))


def guarded(name: str, url: str, postgres: str, **settings: object) -> rq.Queue:
    """Return a queue of that name, guarded."""
    made = queue(name, url)
    jobguard.guard(made, postgres=postgres, **settings)
    return made


def measure(
    variants: dict[str, Variant], *, rounds: int, calls: int, unit: str = "call", per: int = 1
) -> dict[str, float]:
    """Time each variant; print medians in microseconds and the ratio to the first; return medians."""
    took: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant(min(calls, 20))
    for _ in range(rounds):
        order = list(variants)
        random.shuffle(order)
        for name in order:
            began = time.perf_counter()
            variants[name](calls)
            took[name].append((time.perf_counter() - began) / calls / per * 1e6)
    medians = {name: statistics.median(times) for name, times in took.items()}
    first = next(iter(medians.values()))
    width = max(map(len, variants))
    for name, median in medians.items():
        low, high = min(took[name]), max(took[name])
        print(
            f"{name:{width}}  {median:9.1f} us/{unit}  [{low:.1f} .. {high:.1f}]  "
            f"x{median / first:.2f}  {median - first:+.1f} us"
        )
    return medians
