"""A worker whose interpreter is blocked, with its beat process and a real Postgres."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from jobguard.demo.servers import PostgresServer
from tests.databases import rows
from tests.support import eventually

WORKER = """
import ctypes, os, sys, time
from uuid import UUID
import jobguard.adapter as seam
from jobguard.adapter import Source
from jobguard.model import Delivery, new_token
from jobguard.settings import Settings
from jobguard.store.host import PostgresStore
from jobguard.host.tracker import HostTracker

url, apart = sys.argv[1], sys.argv[2] == "apart"
settings = Settings(beat_interval=0.2, call_timeout=10, connect_timeout=10, record_timeout=20)
source = Source("default", "none", "nowhere", one_body=False)
tracker = HostTracker(source, settings, lambda: PostgresStore(lambda: url, settings))
session = tracker.open_session(name="w", queues=["mail"], apart=apart)
token = new_token()
session.start(token, lambda: Delivery(token, "j", "mail", "t", b"", fresh=True))
print(session.id, token, flush=True)
# PyDLL keeps the GIL, as a careless C extension does: here until a byte arrives.
ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)
print("back", flush=True)
time.sleep(600)
"""


@contextmanager
def worker(database: str, apart: str) -> Iterator[tuple[Any, str, str]]:
    """Start a worker whose interpreter is blocked until it reads a byte from its standard input."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, database, apart],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # Not the folder of the source tree: an installed package must be found as well.
        cwd=tempfile.gettempdir(),
    )
    try:
        assert process.stdout is not None
        me, token = process.stdout.readline().split()
        yield process, me, token
    finally:
        process.kill()
        process.wait()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        process.stdout.close()


def row(database: str, me: str) -> tuple[int, list[Any]]:
    """Return the beat counter of a worker, and the claims that it lists."""
    query = "select beat, claims from jobguard.workers where id = %s"
    ((beat, claims),) = rows(database, query, me)
    return beat, [str(claim) for claim in claims]


def is_dead(database: str, me: str) -> bool:
    """Return True if the ledger says that this worker is dead."""
    ((dead,),) = rows(
        database, "select dead_at is not null from jobguard.workers where id = %s", me
    )
    return bool(dead)


def connections(database: str) -> int:
    """Return the number of other connections to this database."""
    query = "select count(*) from pg_stat_activity where datname = current_database()"
    ((count,),) = rows(database, query)
    return int(count) - 1


def is_silent(database: str, me: str, other: str) -> bool:
    """Return True if a worker did not beat while another one with the same interval beat five times."""
    before = row(database, me)[0]
    seen: set[int] = set()

    def other_has_beaten() -> bool:
        seen.add(row(database, other)[0])
        return len(seen) > 5

    eventually(other_has_beaten)
    return row(database, me)[0] == before


def test_a_worker_whose_interpreter_is_blocked_beats_by_its_beat_process(database: str) -> None:
    """The beat process beats with the latest claim, and afterwards the worker beats by itself."""
    with worker(database, "apart") as (process, me, token):
        seen: set[int] = set()

        def has_beaten() -> bool:
            counter, claims = row(database, me)
            if counter % (1 << 20):  # a beat of the beat process
                assert claims == [token]
                seen.add(counter)
            return len(seen) >= 5

        eventually(has_beaten, 60)
        process.stdin.write("x")
        process.stdin.flush()
        assert process.stdout.readline() == "back\n"
        eventually(lambda: row(database, me)[0] % (1 << 20) == 0)  # the worker's own count again
        # The worker's connection, and that of its beats.
        eventually(lambda: connections(database) == 2)


def test_without_one_it_is_silent(database: str) -> None:
    """Without a beat process, a blocked worker does not beat."""
    with worker(database, "alone") as (_, me, _), worker(database, "apart") as (_, other, _):
        eventually(lambda: is_silent(database, me, other))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_is_killed_or_stopped_gets_no_beats(database: str, how: int) -> None:
    """A worker that is killed or stopped gets no beats, even if its interpreter was blocked."""
    with worker(database, "apart") as (process, me, _), worker(database, "apart") as (_, other, _):
        eventually(lambda: row(database, me)[0] % (1 << 20) > 0)
        os.kill(process.pid, how)
        eventually(lambda: is_silent(database, me, other))


def test_the_death_of_a_worker_is_reported_by_its_beat_process(database: str) -> None:
    """No leader must wait for the worker's silence: here none runs."""
    with worker(database, "apart") as (process, me, token):
        assert not is_dead(database, me)
        process.kill()
        eventually(lambda: is_dead(database, me))
        assert row(database, me)[1] == [token]


def test_a_death_is_reported_when_postgres_is_back(
    own_database: str, own_postgres: PostgresServer
) -> None:
    """A worker that dies while Postgres is away is reported when Postgres answers again."""
    with worker(own_database, "apart") as (process, me, _):
        own_postgres.kill()
        process.kill()
        process.wait()
        own_postgres.start()
        eventually(lambda: is_dead(own_database, me))
