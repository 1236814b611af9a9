"""Retention does not block other processes: its locks are short, and its deletes are slices."""

from __future__ import annotations

import threading
import uuid
from typing import TYPE_CHECKING

import psycopg
import pytest

from jobguard.errors import StoreUnavailable
from jobguard.model import Delivery, End, Outcome, new_token
from jobguard.settings import Settings
from jobguard.store.host import PostgresStore
from jobguard.store.leader import PostgresLeaderStore
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

SOURCE = 7
PARTITIONS = """
select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
where i.inhparent = 'jobguard.history'::regclass and c.relname <> 'history_default' order by 1
"""


@pytest.fixture
def leader(database: str) -> Iterator[PostgresLeaderStore]:
    """Give the store of a leader."""
    store = PostgresLeaderStore(lambda: database, "default", uuid.uuid4(), Settings(lease=60))
    yield store
    store.close()


def partitions(database: str) -> list[str]:
    """Return the names of the partitions."""
    with psycopg.connect(database) as connection:
        return [str(name) for (name,) in connection.execute(PARTITIONS).fetchall()]


def test_retention_does_not_wait_for_a_backup(leader: PostgresLeaderStore, database: str) -> None:
    """Retention gives up behind a long reader, so hosts are answered within their deadline."""
    days = partitions(database)
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(f"drop table jobguard.{days[-1]}")
        connection.execute(
            "create table jobguard.history_20200101 partition of jobguard.history"
            " for values from ('2020-01-01') to ('2020-01-02')"
        )
    host = PostgresStore(lambda: database, Settings())
    host.end(SOURCE, [End(new_token(), 0, Outcome.COMPLETED, uuid.uuid4())])
    answered, failed, stop = [0], [0], threading.Event()

    def ends() -> None:
        while not stop.is_set():
            try:
                host.end(SOURCE, [End(new_token(), 0, Outcome.COMPLETED, uuid.uuid4())])
                host.tombstones(SOURCE, [new_token()])
                answered[0] += 1
            except StoreUnavailable:
                failed[0] += 1

    busy = threading.Thread(target=ends)
    with psycopg.connect(database) as backup:
        backup.execute("lock table jobguard.history in access share mode")
        busy.start()
        for _ in range(5):
            assert leader.rotate(retention=7 * 86400) == 0
        stop.set()
        busy.join()
    assert answered[0] > 0
    assert failed[0] == 0
    assert "history_20200101" in partitions(database)
    assert leader.rotate(retention=7 * 86400) == 1
    assert partitions(database) == days
    host.close()


def test_many_strays_go_in_slices(leader: PostgresLeaderStore, database: str) -> None:
    """Rows of the default partition are kept, then deleted in slices; new partitions are created."""
    with psycopg.connect(database, autocommit=True) as connection:
        for day in partitions(database):
            connection.execute(f"drop table jobguard.{day}")
        connection.execute(
            "insert into jobguard.history (source, token, job_id, queue, task, outcome, ended_at)"
            " select 7, gen_random_uuid(), n::text, 'q', 't', 'completed',"
            " now() - (n % 2) * interval '9 days' from generate_series(1, 20000) n"
        )
    leader.rotate(retention=7 * 86400)
    with psycopg.connect(database) as connection:
        (left,) = connection.execute("select count(*) from jobguard.history").fetchone() or (None,)
        (here,) = connection.execute(
            "select count(*) from jobguard.history_default"
        ).fetchone() or (None,)
        step = connection.execute("select jobguard.rotate_step('7 days')").fetchone()
    assert left == here == 10_000
    assert step == (None,)
    # Yesterday and the next seven days: today has rows in the default partition.
    assert len(partitions(database)) == 8


def test_ends_and_records_do_not_lock_each_other_out(database: str) -> None:
    """Replays and ends of the same deliveries, in opposite orders, at the same time, do not deadlock."""
    stores = [PostgresStore(lambda: database, Settings(call_timeout=20)) for _ in range(4)]
    with psycopg.connect(database, autocommit=True) as connection:
        before = connection.execute(
            "select deadlocks from pg_stat_database where datname = current_database()"
        ).fetchone()
        for _ in range(30):
            tokens = [new_token() for _ in range(20)]
            threads = [
                threading.Thread(target=work, args=(store, order))
                for store, work, order in zip(
                    stores,
                    (_record, _end, _record, _end),
                    (tokens, tokens[::-1], tokens[::-1], tokens),
                    strict=True,
                )
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            rows = connection.execute(
                "select count(*) from jobguard.jobs j join jobguard.history h using (source, token)"
            ).fetchone()
            assert rows == (0,)
    for store in stores:
        store.close()

    def deadlocks() -> object:
        with psycopg.connect(database) as connection:
            return connection.execute(
                "select deadlocks from pg_stat_database where datname = current_database()"
            ).fetchone()

    eventually(lambda: deadlocks() == before)


def _record(store: PostgresStore, tokens: list[uuid.UUID]) -> None:
    deliveries = [
        Delivery(
            token=token, job_id=f"{token.int % 7}-{token.hex}", queue="q", task="t", envelope=b"e"
        )
        for token in tokens
    ]
    store.record(SOURCE, deliveries, namespace="default", replay=True)


def _end(store: PostgresStore, tokens: list[uuid.UUID]) -> None:
    worker = uuid.uuid4()
    store.end(
        SOURCE,
        [
            End(
                token,
                0,
                Outcome.COMPLETED,
                worker,
                job_id=f"{token.int % 7}-{token.hex}",
                queue="q",
                task="t",
            )
            for token in tokens
        ],
    )
