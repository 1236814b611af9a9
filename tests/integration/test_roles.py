"""Each role of jobguard does its own work with its own rights, and nothing else.

These mutations were tested once, and each made a test fail: no right on history for the app, a right on
all columns for the reader, execute on rotate() for the app, no new grants after a migration.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest
from click.testing import CliRunner

from jobguard import schema
from jobguard.cli import main
from jobguard.errors import NoRights
from jobguard.model import Delivery, End, Ended, Outcome, new_token
from jobguard.schema import migrator
from jobguard.schema.migrator import Migration
from jobguard.schema.roles import APP, READER, RECONCILER, ROLES
from jobguard.settings import Settings
from jobguard.store.host import PostgresStore
from jobguard.store.leader import PostgresLeaderStore
from jobguard.store.protocols import ClaimRequest
from tests.integration.hosts import Host, leading, rows, trusted
from tests.support import eventually

if TYPE_CHECKING:
    from jobguard.demo.servers import NamedPostgres

LIBRARIES = ["celery", "dramatiq", "rq"]
SOURCE = 7
ENVELOPES = ["jobs.envelope", "history.envelope", "join_parts.envelope", "joins.state"]


@pytest.fixture
def logins(postgres_server: NamedPostgres, database: str) -> Iterator[Mapping[str, str]]:
    """Give a URL for a login of each role, by role."""
    schema.migrate(database, roles=True)
    made = {role: f"{role}_{uuid.uuid4().hex[:8]}" for role in ROLES}
    for role, login in made.items():
        run(database, f"create role {login} login in role {role}")
    yield {role: re.sub(r"//[^@]*@", f"//{login}@", database) for role, login in made.items()}
    for login in made.values():
        run(postgres_server.url, f"drop role {login}")


def run(url: str, statement: str) -> None:
    """Run a statement."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(statement.encode())


@pytest.mark.parametrize("library", LIBRARIES)
def test_three_roles_do_the_whole_work(
    library: str, redis_url: str, database: str, logins: Mapping[str, str], stack: ExitStack
) -> None:
    """A loss is restored and counted while each process has the rights of its own role alone."""
    host = Host(library, redis_url)
    guard = host.guard(stack, logins[APP], connect="require")
    with leading(guard, logins[RECONCILER], redis_url):
        eventually(lambda: trusted(database), 20)
        for _ in range(3):
            host.send()
        assert len(rows(database, "select from jobguard.jobs")) == 3
        host.client.flushdb()
        eventually(lambda: host.waiting() == 3, 30)
    assert guard.heartbeat("nobody") is False
    assert len(guard.jobs().rows) == 3
    guard.cancel("nobody")
    job_id = rows(database, "select job_id from jobguard.jobs limit 1")[0][0]
    for words in (
        *(["stats"], ["dead", "list"], ["jobs"], ["incidents"], ["workers"]),
        ["jobs", "show", job_id, "--redis", redis_url],
    ):
        done = CliRunner().invoke(main, [*words, "--json", "--postgres", logins[READER]])
        assert done.exit_code == 0, done.output
    assert "not readable here" in done.output


def test_the_app_may_use_all_that_a_host_calls(logins: Mapping[str, str], database: str) -> None:
    """Record, claim, lock, end, cancel, beat and leave need no right beyond those of the app."""
    settings = Settings(call_timeout=5, connect_timeout=5)
    worker = uuid.uuid4()
    with closing(PostgresStore(lambda: logins[APP], settings)) as host:
        tokens = [new_token() for _ in range(3)]
        deliveries = [
            Delivery(token=token, job_id=token.hex, queue="q", task="t", envelope=b"e", fresh=True)
            for token in tokens
        ]
        host.record(SOURCE, deliveries[:1], namespace="default")
        host.record(SOURCE, deliveries[1:2], namespace="default", outbox=True)
        host.record(SOURCE, deliveries[2:], namespace="default", replay=True)
        claim = ClaimRequest(tokens[0], uuid.uuid4(), worker, 1, "default", 15.0, 3)
        host.claim(SOURCE, claim)
        host.claims(SOURCE, [claim])
        host.lock(SOURCE, "l", token=tokens[0], number=1)
        host.unlock(SOURCE, "l", token=tokens[0])
        host.predecessor(SOURCE, tokens[0])
        host.amend(SOURCE, tokens[0], lambda envelope: envelope + b"!")
        host.heartbeat(SOURCE, job_id=tokens[0].hex, progress=0.5)
        assert host.end(SOURCE, [End(tokens[0], 1, Outcome.COMPLETED, worker)]) == [Ended.ENDED]
        host.outbox(SOURCE, [tokens[1]])
        host.decline(SOURCE, tokens[1], most=5, wait=1.0, error="no task")
        host.release(SOURCE, tokens[1], worker, number=1)
        host.recoverable(SOURCE, tokens)
        host.tombstones(SOURCE, tokens)
        host.withdraw(SOURCE, [tokens[1]])
        host.open_join(SOURCE, "j", size=1, state=b"", namespace="default")
        host.close_join(SOURCE, "j")
        assert host.cancel(SOURCE, tokens=[tokens[2]]) == 1
        host.leave(worker)
    assert rows(database, "select outcome::text from jobguard.history order by 1") == [
        ("cancelled",),
        ("completed",),
    ]


def test_the_reader_reads_no_envelope_and_changes_nothing(logins: Mapping[str, str]) -> None:
    """Columns that hold arguments, and every change, are refused to the reader."""
    for column in ENVELOPES:
        table, _, name = column.partition(".")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            run(logins[READER], f"select {name} from jobguard.{table}")
    for statement in (
        "select * from jobguard.jobs",
        "delete from jobguard.jobs",
        "update jobguard.leader set paused_at = now()",
        "select jobguard.rotate()",
        "select jobguard.rotate_step('7 days')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            run(logins[READER], statement)
    done = CliRunner().invoke(main, ["pause", "--postgres", logins[READER]])
    assert done.exit_code == 1
    assert "grant it jobguard_app" in done.output


def test_the_app_cannot_lead_nor_drop_history(logins: Mapping[str, str]) -> None:
    """The lease, the brake and retention belong to the reconciler."""
    store = PostgresLeaderStore(lambda: logins[APP], "default", uuid.uuid4(), Settings())
    with closing(store), pytest.raises(NoRights):
        store.elect(lease=9)
    for statement in ("delete from jobguard.history", "select jobguard.rotate()"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            run(logins[APP], statement)


def test_ten_days_on_with_these_roles(logins: Mapping[str, str], database: str) -> None:
    """After ten days without partitions of the present, ends land, and retention makes and drops days."""
    today = datetime.now(UTC).date()
    for offset in range(-1, 8):  # the days that were made ten days ago
        run(database, f"drop table jobguard.history_{today + timedelta(offset):%Y%m%d}")
    for offset in range(-11, -2):
        day = today + timedelta(offset)
        run(
            database,
            f"create table jobguard.history_{day:%Y%m%d} partition of jobguard.history"
            f" for values from ('{day}') to ('{day + timedelta(1)}')",
        )
    run(
        database,
        "insert into jobguard.history (source, token, job_id, queue, task, outcome, ended_at)"
        " values (7, gen_random_uuid(), 'old', 'q', 't', 'completed', now() - '10 days'::interval)",
    )

    def end() -> None:
        ended = End(
            new_token(), 0, Outcome.COMPLETED, uuid.uuid4(), job_id="new", queue="q", task="t"
        )
        assert host.end(SOURCE, [ended]) == [Ended.UNKNOWN]  # it gets a tombstone all the same

    settings = Settings(call_timeout=5, connect_timeout=5)
    leader = PostgresLeaderStore(lambda: logins[RECONCILER], "default", uuid.uuid4(), settings)
    with closing(PostgresStore(lambda: logins[APP], settings)) as host, closing(leader):
        end()
        assert leader.rotate(retention=7 * 86400) > 0
        end()
    assert rows(database, "select job_id from jobguard.history") == [("new",), ("new",)]
    days = "select min(relname), max(relname) from pg_class where relname ~ '^history_[0-9]{8}$'"
    made = [f"history_{today + timedelta(offset):%Y%m%d}" for offset in (-7, 7)]
    assert rows(database, days) == [tuple(made)]


def test_a_migration_grants_its_new_tables_to_roles_that_have_rights(
    logins: Mapping[str, str], database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`jobguard migrate` without --roles gives roles that have rights those of new tables, too."""
    known = migrator.migrations()
    text = "create table jobguard.newer (a int, envelope bytea);"
    monkeypatch.setattr(
        migrator, "migrations", lambda: (*known, Migration(len(known) + 1, "newer", text))
    )
    assert schema.migrate(database) == ["newer"]
    run(logins[RECONCILER], "insert into jobguard.newer values (1)")
    run(logins[READER], "select a from jobguard.newer")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        run(logins[READER], "select envelope from jobguard.newer")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        run(logins[APP], "insert into jobguard.newer values (1)")
