"""Envelopes and errors are sealed in PostgreSQL: with the key jobs are restored, without it they wait."""

from __future__ import annotations

import uuid
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner

from jobguard.cli import main
from jobguard.guard import JobGuard
from jobguard.model import Delivery, End, Outcome, Parent, new_token
from jobguard.sealing import Sealer
from jobguard.settings import Settings
from jobguard.store.host import PostgresStore
from jobguard.store.ledger import PostgresLedger
from jobguard.store.protocols import ClaimRequest
from tests.conformance.words import leading
from tests.databases import rows
from tests.integration.hosts import QUEUE, Host, trusted
from tests.support import eventually

LIBRARIES = ["celery", "dramatiq", "rq"]
SECRET = "a-word-of-the-arguments"
SOURCE = 7


@pytest.fixture
def keys(tmp_path: Path) -> str:
    """Give a file with one key."""
    path = str(tmp_path / "keys")
    command("encrypt", "new-key", path)
    return path


def command(*words: str, **environ: str) -> str:
    """Run a command and return its output."""
    done = CliRunner().invoke(main, words, env=environ, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def everything(database: str) -> bytes:
    """Return the contents of all tables that hold messages or errors."""
    with psycopg.connect(database) as connection:
        parts = [
            f"select coalesce(string_agg({column}, ''), '') from jobguard.{table}"
            for table, column in (
                ("jobs", "envelope"),
                ("history", "coalesce(envelope, '') || convert_to(errors::text, 'utf8')"),
                ("joins", "state"),
                ("join_parts", "state || envelope"),
                ("effects", "convert_to(coalesce(result, ''), 'utf8')"),
            )
        ]
        return b"".join(connection.execute(part.encode()).fetchall()[0][0] for part in parts)


def with_keys(guard: JobGuard, keys: str | None) -> JobGuard:
    """Return the settings of a reconciler with other keys."""
    settings: Any = SimpleNamespace(settings=replace(guard.settings, encrypt=keys))
    return settings  # type: ignore[no-any-return]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_loss_is_restored_with_the_key_and_reported_without(
    library: str, redis_url: str, database: str, stack: ExitStack, keys: str
) -> None:
    """Without the key a reconciler opens an incident and restores nothing; with the key it restores all."""
    host = Host(library, redis_url)
    guard = host.guard(stack, database, encrypt=keys)
    with leading(with_keys(guard, None), database, redis_url):
        eventually(lambda: trusted(database), 20)
        for _ in range(2):
            host.send()
        with psycopg.connect(database) as connection, guard.transaction(connection):
            host.send()
        assert b"print" not in everything(database) and b"app.task" not in everything(database)
        host.client.flushdb()
        open_one = (
            "select from jobguard.incidents where closed_at is null"
            " and detail like 'envelopes cannot be unsealed: %%JOBGUARD_ENCRYPT%%'"
        )
        eventually(lambda: rows(database, open_one), 30)
        assert host.waiting() == 0
    with leading(with_keys(guard, keys), database, redis_url):
        eventually(lambda: host.waiting() == 3, 30)
        rows(database, f"select jobguard.enqueue('{library}', '{QUEUE}', 'app.{SECRET}')")
        eventually(lambda: host.waiting() == 4, 30)
        assert SECRET.encode() not in everything(database)


def test_everything_that_may_hold_arguments_is_sealed_and_rotated(database: str, keys: str) -> None:
    """Envelopes, errors and the state of joins are sealed; after a rotation the new key is enough."""
    settings = Settings(call_timeout=5, connect_timeout=5)
    fill(database, settings)
    assert everything(database).count(SECRET.encode()) >= 5
    environ = {"JOBGUARD_POSTGRES_URL": database, "JOBGUARD_ENCRYPT": keys}
    command("encrypt", "rotate", **environ)
    assert SECRET.encode() not in everything(database)
    fill(database, replace(settings, encrypt=keys))
    assert SECRET.encode() not in everything(database)

    command("encrypt", "new-key", keys)
    newest = Path(keys).read_bytes().split()[0].decode()
    assert " 0 without a key" in command("encrypt", "rotate", **environ)
    with psycopg.connect(database) as connection:
        stored = connection.execute("select envelope from jobguard.jobs").fetchall()
        failed = connection.execute("select token from jobguard.history where outcome = 'failed'")
        tokens = [token for (token,) in failed.fetchall()]
        results = connection.execute("select result from jobguard.effects").fetchall()
    sealer = Sealer(lambda: newest)
    assert {sealer.unseal(envelope) for (envelope,) in stored} == {SECRET.encode()}
    assert [sealer.unseal_text(result) for (result,) in results] == [SECRET, SECRET]
    with closing(PostgresLedger(lambda: database, encrypt=lambda: newest)) as ledger:
        shown = ledger.dead("default", outcomes=[Outcome.FAILED], queue=None, limit=9)
        assert {error for row in shown for error in row["errors"]} == {SECRET}
        ledger.requeue("default", tokens[0])
    with closing(PostgresLedger(lambda: database)) as ledger:
        (row, *_) = ledger.dead("default", outcomes=[Outcome.FAILED], queue=None, limit=9)
        assert row["errors"] == ["(sealed: set JOBGUARD_ENCRYPT to read it)"]
    assert SECRET.encode() not in everything(database)
    assert newest.encode() not in everything(database)


def fill(database: str, settings: Settings) -> None:
    """Write something secret into each column that may hold it."""
    with psycopg.connect(database) as connection:
        connection.execute(
            "insert into jobguard.sources (id, namespace, library, address) values"
            " (7, 'default', 'none', 'x') on conflict do nothing"
        )
    worker, secret = uuid.uuid4(), SECRET.encode()
    owed, failed, tried = (
        Delivery(token=token, job_id=token.hex, queue="q", task="t", envelope=secret)
        for token in (new_token(), new_token(), new_token())
    )
    with closing(PostgresStore(lambda: database, settings)) as host:
        host.record(SOURCE, [owed, failed, tried], namespace="default")
        for one in (failed, tried):
            request = ClaimRequest(one.token, uuid.uuid4(), worker, 1, "default", 15.0, 3)
            host.claim(SOURCE, request)
        key = uuid.uuid4().hex
        claim: Any = {"token": tried.token, "number": 1}
        host.begin_effect(SOURCE, key, job_id=None, again=False, **claim)
        host.finish_effect(SOURCE, key, result=Sealer(settings.encrypt).seal_text(SECRET), **claim)
        host.end(SOURCE, [End(failed.token, 1, Outcome.FAILED, worker, error=SECRET)])
        parent = Parent(tried.token, 1, worker=worker, error=SECRET)
        again = replace(tried, token=new_token(), parent=parent)
        host.record(SOURCE, [again], namespace="default")
        host.open_join(SOURCE, uuid.uuid4().hex, size=2, state=secret, namespace="default")
