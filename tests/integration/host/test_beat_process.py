"""A worker whose interpreter is held, with its stand-in and a real Postgres."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support import eventually

ROOT = Path(__file__).parents[3]
WORKER = """
import ctypes, os, sys, time
from uuid import UUID
import jobguard.adapter as seam
from jobguard.adapter import Source
from jobguard.model import Delivery, new_token
from jobguard.settings import Settings
from jobguard.store.host import PostgresStore
from jobguard.host.tracker import HostTracker

url, held, apart = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "apart"
settings = Settings(beat_interval=0.2, call_timeout=10, connect_timeout=10, record_timeout=20)
source = Source("default", "none", "nowhere", one_body=False)
tracker = HostTracker(source, settings, lambda: PostgresStore(lambda: url, settings))
session = tracker.open_session(name="w", queues=["mail"], apart=apart)
token = new_token()
session.start(token, lambda: Delivery(token, "j", "mail", "t", b"", fresh=True))
print(session.id, token, flush=True)
ctypes.PyDLL(None).usleep(held * 1000)  # PyDLL keeps the GIL, as a careless C extension does
print("back", flush=True)
time.sleep(60)
"""


@contextmanager
def worker(database: str, held_ms: int, apart: str) -> Iterator[tuple[Any, str, str]]:
    """Have a worker that holds its interpreter."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, database, str(held_ms), apart],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stdout is not None
        me, token = process.stdout.readline().split()
        yield process, me, token
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def row(database: str, me: str) -> tuple[int, list[Any]]:
    """Return the beat counter of a worker, and what it lists."""
    with psycopg.connect(database) as connection:
        query = "select beat, claims from jobguard.workers where id = %s"
        found = connection.execute(query, [me]).fetchone()
        assert found is not None
        return found[0], [str(claim) for claim in found[1]]


def connections(database: str) -> int:
    """Return how many connections to this database there are beside ours."""
    with psycopg.connect(database) as connection:
        query = "select count(*) from pg_stat_activity where datname = current_database()"
        found = connection.execute(query).fetchone()
        assert found is not None
        return int(found[0]) - 1


def beats(database: str, me: str, seconds: float) -> list[int]:
    """Return the counters that were seen in that time, each once."""
    seen: list[int] = []
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        counter, _ = row(database, me)
        if counter not in seen:
            seen.append(counter)
        time.sleep(0.02)
    return seen


def test_a_worker_whose_interpreter_is_held_beats_by_its_stand_in(database: str) -> None:
    """With the claim that it began a moment before; and it goes on by itself afterwards."""
    with worker(database, 3000, "apart") as (process, me, token):
        assert len(beats(database, me, 2.5)) >= 5
        assert row(database, me)[1] == [token]
        assert process.stdout.readline() == "back\n"
        eventually(lambda: row(database, me)[0] % (1 << 20) == 0)  # its own count again
        eventually(lambda: connections(database) == 2)  # its own, and that of its beats


def test_without_one_it_is_silent(database: str) -> None:
    """That is what the stand-in is for."""
    with worker(database, 3000, "alone") as (_, me, _):
        assert len(beats(database, me, 2.5)) <= 2


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_nobody_speaks_for_a_worker_that_is_killed_or_stopped(database: str, how: int) -> None:
    """While it held its interpreter, too."""
    with worker(database, 60_000, "apart") as (process, me, _):
        eventually(lambda: row(database, me)[0] % (1 << 20) > 0)
        os.kill(process.pid, how)
        time.sleep(0.5)
        assert len(beats(database, me, 1.5)) == 1
