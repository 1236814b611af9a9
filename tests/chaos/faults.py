"""The faults. Each is a generator that is stepped at every tick, so that the supervisor goes on meanwhile.

It returns, by way of the step that ends it, a few words on what it did; None means that there was nothing
to be done it to, and it is tried again later.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Generator
from datetime import timedelta
from typing import TYPE_CHECKING

import psutil
import psycopg
import redis

from tests.chaos.libraries import QUEUES
from tests.chaos.plan import SETTINGS
from tests.chaos.site import wait_until_gone

if TYPE_CHECKING:
    from datetime import datetime

    from jobguard.demo.children import Child
    from tests.chaos.libraries import Library
    from tests.chaos.site import Site

Steps = Generator[None, None, str | None]
Fault = Callable[["Site", random.Random], Steps]

DOWN_SECONDS = 0.5
STAKE = 25
"""Jobs that should be owed when Redis loses its data: or else nothing is at stake."""
_PATIENCE = 20.0
_ACKS = 1.0
"""Seconds within which Redis is told that a job has ended."""
_FRESH = 0.3
"""A long job that started so recently surely runs on for a moment."""


def redis_kill(site: Site, chance: random.Random) -> Steps:
    """Redis: kill -9, and back empty."""
    yield from _stake(site)
    owed = site.backlog()
    site.redis.kill()
    yield from _pass(DOWN_SECONDS * chance.uniform(0.5, 3))
    site.redis.start()
    site.lost_at = time.time()
    return f"{owed} jobs were owed"


def flushall(site: Site, chance: random.Random) -> Steps:
    """Redis: FLUSHALL."""
    yield from _stake(site)
    owed = site.backlog()
    site.client.flushall()
    site.lost_at = time.time()
    return f"{owed} jobs were owed"


def old_snapshot(site: Site, chance: random.Random) -> Steps:
    """Redis: killed, and back with the data of some seconds before."""
    yield from _stake(site)
    snapshot = site.redis.snapshot()
    ended = site.reader.ledger.executed
    yield from _pass(chance.uniform(2, 5))
    site.redis.restore(snapshot)
    site.lost_at = time.time()
    return f"{site.reader.ledger.executed - ended} jobs had ended since"


def redis_restart(site: Site, chance: random.Random) -> Steps:
    """Redis: stopped and back with all its data; what was on the way to it, or from it, is not."""
    yield from _stake(site)
    owed = site.backlog()
    site.redis.restart(keep_data=True)
    return f"{owed} jobs were owed"


def list_deleted(site: Site, chance: random.Random) -> Steps:
    """A queue's list is deleted."""

    def longest() -> str | None:
        key, members = max(site.lists().items(), key=lambda pair: len(pair[1]))
        return key if len(members) >= 3 else None

    yield from _until(lambda: longest() is not None)
    key = longest()
    if key is None:
        return None
    length = site.client.llen(key)
    site.client.delete(key)
    return f"{key}, {length} long"


def job_deleted(site: Site, chance: random.Random) -> Steps:
    """One waiting job is deleted."""

    def waiting() -> list[tuple[str, bytes]]:
        return [(key, member) for key, members in site.lists().items() for member in members]

    yield from _until(lambda: bool(waiting()))
    jobs = waiting()
    return site.library.layout.delete(site.client, *chance.choice(jobs)) if jobs else None


def book_deleted(site: Site, chance: random.Random) -> Steps:
    """A key is deleted in which the library notes what workers hold, or counts."""
    pattern = chance.choice(site.library.layout.books)

    def there() -> list[bytes]:
        return sorted(site.client.scan_iter(pattern, count=1000))

    yield from _until(lambda: bool(there()))
    keys = there()
    if not keys:
        return None
    key = chance.choice(keys)
    return key.decode() if site.client.delete(key) else None


def worker_kill(site: Site, chance: random.Random) -> Steps:
    """A worker is killed with -9, together with whatever it forked."""
    name = chance.choice(sorted(site.workers))
    yield from _until(lambda: site.is_busy(site.workers[name]))
    site.kill(site.workers[name], "worker_kill")
    return name


def horse_kill(site: Site, chance: random.Random) -> Steps:
    """The child that runs a job is killed with -9, and its worker lives."""
    found: list[psutil.Process] = []

    def caught() -> bool:
        found[:] = _horses(site)
        return bool(found)

    yield from _until(caught)
    if not found:
        return None
    horse = found[0]
    try:
        horse.kill()
    except psutil.NoSuchProcess:  # it was quicker
        return None
    wait_until_gone(horse)
    site.kills.note("horse_kill", horse.pid)
    return f"pid {horse.pid}"


def worker_term(site: Site, chance: random.Random) -> Steps:
    """A worker of two queues is asked to stop, as a deploy does it."""
    role = chance.choice([role for role in site.library.workers if len(role.queues) > 1])
    stop = chance.choice(role.stops)
    yield from _until(lambda: not site.workers[role.name].ended)
    child = site.workers[role.name]
    child.process.send_signal(signal.Signals[stop])
    starts = child.starts
    yield from _until(lambda: child.ended or child.starts > starts)
    return f"{stop} to {role.name}"


def producer_kill(site: Site, chance: random.Random) -> Steps:
    """A producer is killed with -9; between record and push the failpoints do it."""
    yield from _until(lambda: any(not child.ended for child in site.producers))
    running = [child for child in site.producers if not child.ended]
    if not running:
        return None
    producer = chance.choice(running)
    site.kill(producer, "producer_kill")
    return f"pid {producer.pid}"


def leader_kill(site: Site, chance: random.Random) -> Steps:
    """The leading reconciler is killed with -9."""
    leader = yield from _leader(site)
    if leader is None:
        return None
    pid, at = leader.pid, time.monotonic()
    site.kill(leader, "leader_kill")
    yield from _until(lambda: site.leader() not in (None, pid))
    return f"another led after {time.monotonic() - at:.1f} s"


def leader_stop(site: Site, chance: random.Random) -> Steps:
    """The leading reconciler is stopped until another leads, and wakes up then."""
    leader = yield from _leader(site)
    if leader is None:
        return None
    pid, at = leader.pid, time.monotonic()
    site.pause(leader)
    yield from _pass(chance.uniform(0, 2))
    site.client.flushall()  # or else whoever sleeps through it misses nothing
    site.lost_at = time.time()
    yield from _until(lambda: site.leader() not in (None, pid))
    took = time.monotonic() - at
    yield from _pass(chance.uniform(0, 2))
    site.resume(leader)
    return f"FLUSHALL meanwhile; another led after {took:.1f} s"


def postgres_restart(site: Site, chance: random.Random) -> Steps:
    """Postgres is restarted, and nothing else happens until what waited for it is written.

    While it is away, a process that dies takes along what it could not write: no other fault now.
    Nor is there a fence: what has a second copy since Redis lost it is to have ended before, and its
    copies are to have met a worker.
    """
    site.kills.disarm()
    if not (yield from _until(lambda: _is_settled(site))):
        return None
    yield from _pass(1.0)
    at = time.monotonic()
    site.postgres.stop()
    yield from _pass(chance.uniform(0, 3))
    site.postgres.start()
    took = time.monotonic() - at
    ((back_at,),) = site.ask("select clock_timestamp()")
    yield from _until(lambda: _is_written(site, back_at))
    yield from _pass(1.0)
    return f"away for {took:.1f} s; all was written {time.monotonic() - at - took:.1f} s after it"


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        *(
            redis_kill,
            redis_restart,
            flushall,
            old_snapshot,
            list_deleted,
            job_deleted,
            book_deleted,
        ),
        *(worker_kill, horse_kill, worker_term, producer_kill),
        *(leader_kill, leader_stop, postgres_restart),
    )
}

_OF_JOBGUARD = {"leader_kill", "leader_stop", "postgres_restart"}


def faults_for(library: Library, *, guarded: bool) -> tuple[str, ...]:
    """Name the faults that there can be."""
    out = set() if guarded else _OF_JOBGUARD
    if not library.layout.books:
        out = out | {"book_deleted"}
    return tuple(name for name in FAULTS if name not in out)


def _pass(seconds: float) -> Generator[None, None, None]:
    """Let some time pass, which is part of the fault."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield


def _until(is_so: Callable[[], bool]) -> Generator[None, None, bool]:
    """Wait for something, but not for ever."""
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        try:
            if is_so():
                return True
        except (psycopg.Error, redis.RedisError):
            pass
        yield
    return False


def _stake(site: Site) -> Generator[None, None, bool]:
    return (yield from _until(lambda: site.backlog() >= STAKE))


def _leader(site: Site) -> Generator[None, None, Child | None]:
    yield from _until(lambda: site.leading() is not None)
    return site.leading()


def _horses(site: Site) -> list[psutil.Process]:
    """Find the children of forking workers that began a job a moment ago."""
    forking = {
        site.workers[role.name].pid
        for role in site.library.workers
        if role.forks and not site.workers[role.name].ended
    }
    found = []
    for mark in site.reader.ledger.running.values():
        if mark.parent not in forking or time.time() - mark.at > _FRESH:
            continue
        try:
            horse = psutil.Process(mark.pid)
            if horse.ppid() == mark.parent:
                found.append(horse)
        except psutil.NoSuchProcess:
            pass
    return found


def _is_settled(site: Site) -> bool:
    """Whether all that was enqueued when Redis lost its data for the last time has ended.

    And Redis has nothing that ended longer ago than a worker needs to acknowledge it.
    """
    counted = site.reader.ledger
    if any(counted.enqueued[number].at < site.lost_at for number in counted.owed()):
        return False
    ended = {number for number, marks in counted.ends.items() if marks[0].at < time.time() - _ACKS}
    held = site.library.layout.held(site.client, QUEUES)
    return not any(counted.number_of.get(job_id) in ended for job_id in held)


def _is_written(site: Site, back_at: datetime) -> bool:
    """Whether Postgres has all that was enqueued, and no worker has anything left to tell.

    What a worker said before the outage says nothing about what it could not write in it.
    """
    counted = site.reader.ledger
    pushed = counted.owed() - counted.follows.keys()  # the others only when those before them end
    ids = [job_id for job_id, number in counted.number_of.items() if number in pushed]
    known = site.ask(
        "select count(*) from unnest(%s::text[]) as owed (id)"
        " where exists (select from jobguard.jobs where job_id = owed.id)"
        " or exists (select from jobguard.history where job_id = owed.id)",
        ids,
    )
    silent = site.ask(
        "select count(*) from jobguard.workers where left_at is null and dead_at is null"
        " and (unflushed_since is not null or beat_at <= %s) and beat_at > %s::timestamptz - %s",
        *(back_at, back_at, timedelta(seconds=float(SETTINGS["JOBGUARD_WORKER_TIMEOUT"]))),
    )
    return known == [(len(ids),)] and silent == [(0,)]
