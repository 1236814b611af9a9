"""The faults. Each is a generator that is stepped at every tick, so that the supervisor can work between.

A generator returns a short description of its effect. It returns None if there was no target for
the fault; then the fault is tried again later.
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
"""Jobs that should be owed when Redis loses its data: otherwise nothing can be lost."""
_PATIENCE = 20.0
_LONG = 60.0
"""Seconds within which all jobs end that are enqueued now, also delayed and retried ones."""
_ACKS = 1.0
"""Seconds within which a worker acknowledges an ended job in Redis."""
_FRESH = 0.3
"""Seconds since the start after which a long job certainly still runs for a moment."""


def redis_kill(site: Site, chance: random.Random) -> Steps:
    """Kill Redis with -9, and start it empty."""
    yield from _stake(site)
    owed = site.backlog()
    site.redis.kill()
    yield from _pass(DOWN_SECONDS * chance.uniform(0.5, 3))
    site.redis.start()
    site.lost_at = time.time()
    return f"{owed} jobs were owed"


def flushall(site: Site, chance: random.Random) -> Steps:
    """Run FLUSHALL in Redis."""
    yield from _stake(site)
    owed = site.backlog()
    site.client.flushall()
    site.lost_at = time.time()
    return f"{owed} jobs were owed"


def old_snapshot(site: Site, chance: random.Random) -> Steps:
    """Kill Redis, and start it with the data of some seconds before."""
    yield from _stake(site)
    snapshot = site.redis.snapshot()
    ended = site.reader.ledger.executed
    yield from _pass(chance.uniform(2, 5))
    site.redis.restore(snapshot)
    site.lost_at = time.time()
    return f"{site.reader.ledger.executed - ended} jobs had ended since"


def redis_restart(site: Site, chance: random.Random) -> Steps:
    """Stop and start Redis with all its data; commands and answers in transfer are lost."""
    yield from _stake(site)
    owed = site.backlog()
    site.redis.restart(keep_data=True)
    return f"{owed} jobs were owed"


def list_deleted(site: Site, chance: random.Random) -> Steps:
    """Delete the list of a queue."""

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
    """Delete one waiting job."""

    def waiting() -> list[tuple[str, bytes]]:
        return [(key, member) for key, members in site.lists().items() for member in members]

    yield from _until(lambda: bool(waiting()))
    jobs = waiting()
    return site.library.layout.delete(site.client, *chance.choice(jobs)) if jobs else None


def book_deleted(site: Site, chance: random.Random) -> Steps:
    """Delete a key in which the library notes the jobs of workers, or a counter."""
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
    """Kill a worker and its children with -9."""
    name = chance.choice(site.mortal_workers())
    yield from _until(lambda: site.is_busy(site.workers[name]))
    site.kill(site.workers[name], "worker_kill")
    return name


def horse_kill(site: Site, chance: random.Random) -> Steps:
    """Kill the child that runs a job with -9. Its worker lives."""
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
    except psutil.NoSuchProcess:  # it ended before the kill
        return None
    wait_until_gone(horse)
    site.kills.note("horse_kill", horse.pid)
    return f"pid {horse.pid}"


def worker_term(site: Site, chance: random.Random) -> Steps:
    """Send a worker of two queues the signal that a deployment sends."""
    mortal = site.mortal_workers()
    roles = [role for role in site.library.workers if len(role.queues) > 1 and role.name in mortal]
    role = chance.choice(roles)
    stop = chance.choice(role.stops)
    yield from _until(lambda: not site.workers[role.name].ended)
    child = site.workers[role.name]
    child.process.send_signal(signal.Signals[stop])
    starts = child.starts
    yield from _until(lambda: child.ended or child.starts > starts)
    return f"{stop} to {role.name}"


def producer_kill(site: Site, chance: random.Random) -> Steps:
    """Kill a producer with -9; the failpoints kill producers between record and push."""
    yield from _until(lambda: bool(site.mortal_producers()))
    running = site.mortal_producers()
    if not running:
        return None
    producer = chance.choice(running)
    site.kill(producer, "producer_kill")
    return f"pid {producer.pid}"


def leader_kill(site: Site, chance: random.Random) -> Steps:
    """Kill the leading reconciler with -9."""
    leader = yield from _leader(site)
    if leader is None or not site.is_mortal(leader):
        return None
    pid, at = leader.pid, time.monotonic()
    site.kill(leader, "leader_kill")
    yield from _until(lambda: site.leader() not in (None, pid))
    return f"another led after {time.monotonic() - at:.1f} s"


def leader_stop(site: Site, chance: random.Random) -> Steps:
    """Stop the leading reconciler until another one leads, and resume it then."""
    leader = yield from _leader(site)
    if leader is None:
        return None
    pid, at = leader.pid, time.monotonic()
    site.pause(leader)
    yield from _pass(chance.uniform(0, 2))
    site.client.flushall()  # otherwise the stopped leader has nothing to recover
    site.lost_at = time.time()
    yield from _until(lambda: site.leader() not in (None, pid))
    took = time.monotonic() - at
    yield from _pass(chance.uniform(0, 2))
    site.resume(leader)
    return f"FLUSHALL meanwhile; another led after {took:.1f} s"


def postgres_away(site: Site, chance: random.Random) -> Steps:
    """Stop, kill or freeze PostgreSQL for some seconds, and kill a worker and a producer meanwhile.

    Redis loses nothing until all reports are written: with both stores away at once, nothing is
    promised. There is also no fence during the outage. So a job that has a second copy, because
    Redis lost the job, must have ended before, and a worker must have met its copies.
    """
    if not (yield from _until(lambda: _has_ended_lost_jobs(site))):
        return None
    yield from _pass(1.0)
    at = time.monotonic()
    how = chance.choice(("stopped", "killed", "frozen"))
    with site.outage():
        {
            "stopped": site.postgres.stop,
            "killed": site.postgres.kill,
            "frozen": site.postgres.pause,
        }[how]()
        yield from _pass(chance.uniform(0.1, 2))
        name = chance.choice(site.mortal_workers())
        if (yield from _until(lambda: site.is_busy(site.workers[name]), patience=5.0)):
            site.kill(site.workers[name], "worker_kill")
        running = site.mortal_producers()
        if running:
            site.kill(chance.choice(running), "producer_kill")
        yield from _pass(chance.uniform(0, 2))
        (site.postgres.resume if how == "frozen" else site.postgres.start)()
    took = time.monotonic() - at
    ((back_at,),) = site.ask("select clock_timestamp()")
    yield from _until(lambda: _is_written(site, back_at))
    yield from _pass(1.0)
    written = time.monotonic() - at - took
    return f"{how} for {took:.1f} s, {name} killed; all was written {written:.1f} s after it"


def unguarded_worker(site: Site, chance: random.Random) -> Steps:
    """Let a worker without jobguard take some jobs, and go.

    Its queues must be untrusted meanwhile, and nothing that it ran may come back later, whatever
    Redis loses. What Redis loses in this time, or has lost before, is left to a person, so that the
    jobs from before and from this time must have ended at the beginning and at the end.
    """
    site.kills.disarm()  # what a killed process left behind in this time is left to a person as well
    before = time.time()
    if not (yield from _until(lambda: _have_ended(site, before), patience=_LONG)):
        return None
    stranger, at = site.stranger(), time.monotonic()
    pids: set[int] = set()

    def ran() -> set[int]:
        pids.update(member.pid for member in site.family(stranger))
        ends = site.reader.ledger.ends.items()
        return {number for number, marks in ends if any(mark.pid in pids for mark in marks)}

    seen = yield from _until(lambda: len(ran()) >= 3 and site.untrusted() > 0)
    yield from _pass(chance.uniform(0, 3))
    stranger.process.terminate()
    yield from _until(lambda: stranger.ended)
    site.foreign |= ran()
    if not seen:
        return None
    took = time.monotonic() - at
    yield from _until(lambda: site.untrusted() == 0, patience=_LONG)
    again = time.monotonic() - at - took
    gone = time.time()
    if not (yield from _until(lambda: _have_ended(site, gone), patience=_LONG)):
        return None
    return f"it ran {len(ran())} jobs in {took:.1f} s; trusted again {again:.1f} s after it"


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
        *(worker_kill, horse_kill, worker_term, producer_kill, unguarded_worker),
        *(leader_kill, leader_stop, postgres_away),
    )
}

_OF_JOBGUARD = {"leader_kill", "leader_stop", "postgres_away", "unguarded_worker"}


def faults_for(library: Library, *, guarded: bool) -> tuple[str, ...]:
    """Return the names of the faults that are possible."""
    out = set() if guarded else _OF_JOBGUARD
    if not library.layout.books:
        out = out | {"book_deleted"}
    return tuple(name for name in FAULTS if name not in out)


def _pass(seconds: float) -> Generator[None, None, None]:
    """Wait for some seconds as a part of the fault."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield


def _until(
    is_so: Callable[[], bool], *, patience: float = _PATIENCE
) -> Generator[None, None, bool]:
    """Wait for a condition, with a deadline."""
    until = time.monotonic() + patience
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
    """Return the children of forking workers that began a job a moment ago."""
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


def _has_ended_lost_jobs(site: Site) -> bool:
    """Return True if all jobs enqueued before the last loss of Redis have ended.

    In addition, Redis must have no job that ended longer ago than a worker needs for its
    acknowledgement.
    """
    counted = site.reader.ledger
    if any(counted.enqueued[number].at < site.lost_at for number in counted.owed()):
        return False
    ended = {number for number, marks in counted.ends.items() if marks[0].at < time.time() - _ACKS}
    unfinished = site.library.layout.unfinished(site.client, QUEUES)
    return not any(counted.number_of.get(job_id) in ended for job_id in unfinished)


def _have_ended(site: Site, before: float) -> bool:
    """Return True if all jobs that were enqueued before this time have ended."""
    counted = site.reader.ledger
    return all(counted.enqueued[number].at >= before for number in counted.owed())


def _is_written(site: Site, back_at: datetime) -> bool:
    """Return True if PostgreSQL has all enqueued jobs, and no worker has unwritten reports.

    A beat from before the outage does not show if the worker has reports that it could not write.
    """
    counted = site.reader.ledger
    # The others are pushed only when those before them end.
    pushed = counted.owed() - counted.follows.keys()
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
