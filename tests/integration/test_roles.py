"""Each role of jobguard does its own work with its own rights, and nothing else."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner

from jobguard import schema
from jobguard.cli import main
from jobguard.errors import NoRights
from jobguard.job_keys import KeyRule
from jobguard.model import Delivery, End, Ended, Outcome, new_token
from jobguard.schema import migrator
from jobguard.schema.migrator import Migration
from jobguard.schema.roles import APP, ENQUEUE, READER, RECONCILER, ROLES
from jobguard.settings import Settings
from jobguard.store.host import PostgresStore
from jobguard.store.leader import PostgresLeaderStore
from jobguard.store.protocols import ClaimRequest, SourceRow
from tests.conformance.words import leading
from tests.databases import rows
from tests.integration.hosts import QUEUE, Host, trusted
from tests.support import eventually

if TYPE_CHECKING:
    from jobguard.demo.servers import NamedPostgres

LIBRARIES = ["celery", "dramatiq", "rq"]
SOURCE = 7
APP_MAY = {
    "actions": "s",
    "activity": "s",
    "effects": "siud",
    "history": "siu",
    "incidents": "s",
    "installation": "s",
    "job_keys": "siud",
    "jobs": "siud",
    "join_parts": "siud",
    "joins": "siud",
    "leader": "s",
    "locks": "siud",
    "migrations": "s",
    "outbox": "siud",
    "owed_counts": "s",
    "queues": "s",
    "recoveries": "s",
    "requests": "si",
    "running": "siud",
    "schedules": "siud",
    "slots": "s",
    "sources": "si",
    "suspects": "siud",
    "tasks": "si",
    "workers": "siud",
}
"""Each table of the schema, and what a host may do: select, insert, update, delete."""
HIDDEN = [
    "history.envelope",
    "jobs.envelope",
    "join_parts.envelope",
    "join_parts.state",
    "joins.state",
    "requests.args",
    "requests.kwargs",
    "schedules.args",
    "schedules.kwargs",
]
"""Columns that the reader cannot read."""
EACH = {APP, RECONCILER, READER}
READABLE = {"leader.held", "owed_counts.counts", "running.attrs", "schedules.rule"}
"""Columns of JSON or bytes that hold no message."""
AS_OWNER = {
    "cancel_job": {APP, RECONCILER, ENQUEUE},
    "enqueue": {APP, RECONCILER, ENQUEUE},
    "is_kept": EACH,
    "job": {*EACH, ENQUEUE},
    "rotate": {RECONCILER},
    "rotate_step": {RECONCILER},
}
"""Functions that run with the rights of the owner, and the roles that may call them. The others have the
rights of their caller: EACH may call them."""


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


def test_every_table_and_function_has_its_decision(
    logins: Mapping[str, str], database: str
) -> None:
    """A new table, column of arguments or function of the owner fails here until its rights are decided."""
    tables = (
        "from pg_class c where c.relnamespace = 'jobguard'::regnamespace and c.relkind in ('r', 'p')"
        " and not c.relispartition"
    )

    def may(role: str) -> dict[str, str]:
        letters = " || ".join(
            f"case when has_table_privilege('{role}', c.oid, '{right}') then '{right[0]}' else '' end"
            for right in ("select", "insert", "update", "delete")
        )
        return dict(rows(database, f"select c.relname, {letters} {tables}"))

    assert may(APP) == APP_MAY
    assert may(RECONCILER) == dict.fromkeys(APP_MAY, "siud") | {"migrations": "s"}
    assert set(may(ENQUEUE).values()) == {""}
    hidden = rows(
        database,
        "select c.relname || '.' || a.attname from pg_attribute a join"
        f" (select c.oid, c.relname {tables}) c on c.oid = a.attrelid"
        " where a.attnum > 0 and not a.attisdropped"
        f" and not has_column_privilege('{READER}', c.oid, a.attnum, 'select')",
    )
    assert sorted(name for (name,) in hidden) == HIDDEN
    changes = rows(
        database,
        f"select c.relname {tables} and (has_any_column_privilege('{READER}', c.oid, 'insert, update')"
        f" or has_table_privilege('{READER}', c.oid, 'delete'))",
    )
    assert changes == []
    messages = rows(
        database,
        "select c.relname || '.' || a.attname from pg_attribute a join"
        f" (select c.oid, c.relname {tables}) c on c.oid = a.attrelid"
        " where a.atttypid in ('bytea'::regtype, 'jsonb'::regtype, 'json'::regtype)"
        " and a.attnum > 0 and not a.attisdropped",
    )
    assert {name for (name,) in messages} - set(HIDDEN) == READABLE
    granted = rows(
        database,
        "select p.proname, p.prosecdef, array(select r from unnest(array["
        + ", ".join(f"'{role}'" for role in ROLES)
        + "]) r where has_function_privilege(r, p.oid, 'execute')),"
        " has_function_privilege('public', p.oid, 'execute')"
        " from pg_proc p where p.pronamespace = 'jobguard'::regnamespace",
    )
    assert {name: set(roles) for name, owner, roles, _ in granted if owner} == AS_OWNER
    others = {name: set(roles) for name, owner, roles, _ in granted if not owner}
    assert others == dict.fromkeys(others, EACH)
    assert not any(public for *_, public in granted)


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
        with psycopg.connect(logins[APP]) as connection, guard.transaction(connection):
            host.send()
        guard.schedules.add("nightly", "app.task", every=1, queue=QUEUE)
        guard.schedules.run_now("nightly")
        run(logins[ENQUEUE], f"select jobguard.enqueue('{library}', '{QUEUE}', 'app.task')")
        eventually(lambda: host.waiting() >= 7, 30)
        guard.schedules.pause("nightly")
        guard.schedules.resume("nightly")
    assert guard.heartbeat("nobody") is False
    assert len(guard.jobs().rows) >= 7
    guard.cancel("nobody")
    job_id = rows(database, "select job_id from jobguard.jobs limit 1")[0][0]
    for words in (
        *(["stats"], ["dead", "list"], ["jobs"], ["incidents"], ["workers"]),
        ["jobs", "show", job_id, "--redis", redis_url],
    ):
        done = CliRunner().invoke(main, [*words, "--json", "--postgres", logins[READER]])
        assert done.exit_code == 0, done.output
    assert "not readable here" in done.output
    listed = CliRunner().invoke(main, ["schedules", "list", "--json", "--postgres", logins[READER]])
    assert [(one["name"], one["args"]) for one in json.loads(listed.output)] == [("nightly", None)]
    guard.schedules.remove("nightly")


def test_the_app_may_use_all_that_a_host_calls(logins: Mapping[str, str], database: str) -> None:
    """Record, claim, lock, end, cancel, beat and leave need no right beyond those of the app."""
    settings = Settings(call_timeout=5, connect_timeout=5)
    worker = uuid.uuid4()
    with closing(PostgresStore(lambda: logins[APP], settings)) as host:
        host.installation_id()
        row = SourceRow(SOURCE, "default", "rq", "localhost:6379/0", "", None, "")
        host.register(row)
        host.register(replace(row, serializer="json"))
        assert rows(database, "select serializer from jobguard.sources") == [("json",)]
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
        effect: Any = {"token": tokens[0], "number": 1}
        for name in ("sent", "failed"):
            begun = host.begin_effect(SOURCE, name, job_id="j", again=False, **effect)
            assert begun == ("first", None)
        host.finish_effect(SOURCE, "sent", result="1", **effect)
        host.forget_effect(SOURCE, "failed", **effect)
        delivery = replace(deliveries[0], token=new_token(), job_id="beside")
        host.record_beside(SOURCE, delivery, namespace="default")()
        host.cancel(SOURCE, tokens=[delivery.token])
        host.amend(SOURCE, tokens[0], lambda envelope: envelope + b"!")
        host.heartbeat(SOURCE, job_id=tokens[0].hex, progress=0.5)
        ended = End(tokens[0], 1, Outcome.COMPLETED, worker, queue="q", task="t")
        assert host.end(SOURCE, [ended]) == [Ended.ENDED]
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
        kept = replace(delivery, token=new_token(), job_id="kept", rule=KeyRule("k"))
        assert host.record_keyed(SOURCE, kept, namespace="default", deadline=5)[0] == "free"
        other = replace(kept, token=new_token(), rule=KeyRule("k", on_conflict="replace"))
        assert host.record_keyed(SOURCE, other, namespace="default", deadline=5)[0] == "replaced"
    assert rows(database, "select outcome::text from jobguard.history order by 1") == [
        ("cancelled",),
        ("cancelled",),
        ("completed",),
        ("superseded",),
    ]
    assert rows(database, "select key, result from jobguard.effects") == [("sent", "1")]
    assert rows(database, "select task, queue from jobguard.tasks") == [("t", "q")]


def test_the_reader_reads_no_envelope_and_changes_nothing(logins: Mapping[str, str]) -> None:
    """Columns that hold arguments, and every change, are refused to the reader."""
    for column in HIDDEN:
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
