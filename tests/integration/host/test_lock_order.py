"""Statements lock several rows in one order: rows of jobs by token, before all others."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

import psycopg
import pytest

from jobguard.model import Cause, Delivery, new_token
from jobguard.settings import settings_from
from jobguard.store.host import PostgresStore
from jobguard.store.leader import PostgresLeaderStore
from jobguard.store.protocols import SourceRow
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from uuid import UUID

LONG = {"call_timeout": 30.0, "connect_timeout": 30.0, "lease": 60.0}

Locks = tuple[PostgresStore, PostgresLeaderStore, int, "UUID", "UUID"]


@pytest.fixture
def ledger(database: str) -> Iterator[Locks]:
    """Return stores, a term, and two deliveries; the first was written after the second."""
    host = PostgresStore(lambda: database, settings_from(LONG))
    leader = PostgresLeaderStore(lambda: database, "d", uuid.uuid4(), settings_from(LONG))
    host.register(
        SourceRow(id=1, namespace="d", library="rq", address="a", prefix="", name=None, settings="")
    )
    first, second = sorted([new_token(), new_token()])
    for token in (second, first):
        one = Delivery(token=token, job_id=token.hex, queue="q", task="t", envelope=b"x")
        host.record(1, [one], namespace="d", outbox=True)
    term = leader.elect(lease=600.0)
    assert term is not None
    leader.suspect(term, 1, [(t, Cause.PUSH, "m") for t in (second, first)])
    with psycopg.connect(database, autocommit=True) as connection:
        # So that the few rows are read in the order of the table.
        connection.execute("analyze jobguard.jobs")
    yield host, leader, term, first, second
    host.close()
    leader.close()


WRITES: dict[str, Callable[[Locks, list[UUID]], None]] = {
    "withdraw": lambda locks, tokens: locks[0].withdraw(1, tokens),
    "restored": lambda locks, tokens: locks[1].restored(locks[2], 1, tokens),
    "clear": lambda locks, tokens: locks[1].clear(locks[2], 1, tokens),
}


@pytest.mark.parametrize("name", WRITES)
def test_the_first_row_is_locked_before_any_other(name: str, ledger: Locks, database: str) -> None:
    """While it waits for the job with the smallest token, a statement locks none of the other rows."""
    first, second = ledger[3:]
    with psycopg.connect(database) as holder:
        holder.execute("select from jobguard.jobs where token = %s for update", [first])
        writer = threading.Thread(target=WRITES[name], args=(ledger, [second, first]))
        writer.start()
        try:
            with psycopg.connect(database, autocommit=True) as other:
                eventually(
                    lambda: (
                        other.execute(
                            "select from pg_stat_activity where wait_event_type = 'Lock'"
                            " and datname = current_database()"
                        ).rowcount
                    )
                )
                for table in (b"jobs", b"suspects", b"outbox"):
                    free = other.execute(
                        b"select token from jobguard.%s where token = %%s for update skip locked"
                        % table,
                        [second],
                    ).fetchall()
                    assert free == [(second,)], table
        finally:
            holder.rollback()
            writer.join(30)
    assert not writer.is_alive()
    with psycopg.connect(database) as connection:
        left = connection.execute("select count(*) from jobguard.suspects").fetchone()
    assert left == (0,)
