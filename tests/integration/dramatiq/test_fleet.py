"""Workers and producers that are only partly guarded, and a PostgreSQL outage during the work."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any
from uuid import uuid4

import pytest

import jobguard
from jobguard.demo.servers import NamedPostgres, PostgresServer
from jobguard.guard import JobGuard
from jobguard.reconciler import workers
from tests.conformance.words import BRISK, Leader, Records, leading
from tests.databases import rows
from tests.integration.dramatiq.stage import KEYS, Stage, program
from tests.support import eventually

STAGE = "tests.integration.dramatiq.stage"


def test_what_an_unguarded_worker_ran_is_not_run_again(
    stage: Stage,
    guard: JobGuard,
    records: Records,
    surroundings: Mapping[str, str],
    reconciler: Any,
) -> None:
    """While some workers are unguarded, their jobs are not run again and the queue is not trusted."""
    with ExitStack() as stack:
        stack.enter_context(program("-m", STAGE, "1", environ={**surroundings, "STAGE_GUARD": "0"}))
        for word in "abc":
            stage.actor("say").send(word)
        eventually(lambda: sorted(stage.said()) == ["a", "b", "c"], 30)
        stack.enter_context(program("-m", STAGE, "1", environ=surroundings))
        for _ in range(3):
            guard.reconcile()
    assert sorted(stage.said()) == ["a", "b", "c"]
    assert not records.trusted()


def test_a_worker_that_reports_to_another_ledger_is_unguarded_here(
    stage: Stage,
    guard: JobGuard,
    records: Records,
    surroundings: Mapping[str, str],
    redis_url: str,
    database: str,
    postgres_server: NamedPostgres,
    template_database: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What a worker with another database ran is not run again, and the log names the worker."""
    monkeypatch.setattr(workers, "_SHOWN_AFTER_DEATH", 0.1)
    other = postgres_server.create_database(f"other_{uuid4().hex}", template_database)
    theirs = {**surroundings, "JOBGUARD_POSTGRES_URL": other}
    with leading(guard, database, redis_url), program("-m", STAGE, "1", environ=theirs):
        stage.actor("say").send("a")
        eventually(lambda: stage.said() == ["a"], 30)
        eventually(lambda: "does not report to this ledger" in caplog.text, 30)
        unguarded = "select unguarded[1] from jobguard.queues where unguarded_at is not null"
        eventually(lambda: "not in this ledger" in str(rows(database, unguarded)), 30)
        assert not records.trusted()
    assert rows(database, "select from jobguard.jobs where recoveries = 0") and records.owed()


def test_what_an_unguarded_producer_sent_is_adopted(
    stage: Stage, database: str, records: Records
) -> None:
    """The worker that claims an unguarded message records it, with its retries, delays and pipelines."""
    sent = [stage.actor("say").send("a"), stage.message("echo", "b")]
    sent.append(stage.actor("flaky").send_with_options(args=("c",), max_retries=1))
    sent.append(stage.actor("say").send_with_options(args=("d",), delay=50))
    stage.pipeline([sent[1], stage.message("echo")]).run()
    with jobguard.guard(stage.broker, postgres=database, **BRISK):
        stage.work()
    assert sorted(stage.said()) == ["a", "b", "b", "c", "c", "d"]
    ends = [[outcome for outcome, _ in records.ended(each.message_id)] for each in sent]
    assert [end.count("completed") for end in ends] == [1] * 4
    assert {outcome for end in ends for outcome in end} == {"completed", "superseded"}
    assert records.owed() == []


def test_an_unguarded_producers_message_is_restored_once_it_is_known(
    stage: Stage, database: str, records: Records, leader: Leader
) -> None:
    """The record of an unguarded message has its true bytes, which were read from Redis."""
    stage.actor("wait").send("a")
    body = stage.client.hvals(f"{KEYS}.msgs")
    with jobguard.guard(stage.broker, postgres=database, **BRISK), stage.worker():
        eventually(lambda: stage.said() == ["a:begun"])
        (owed,) = records.owed()
        stage.client.flushdb()
        leader.restore(owed)
        assert stage.client.hvals(f"{KEYS}.msgs") == body
        stage.gate("a").touch()
        eventually(stage.is_idle)
    assert stage.said() == ["a:begun", "a"]


@pytest.mark.parametrize("kind", ["retry", "delayed", "pipeline", "group"])
def test_postgres_away_while_jobs_run(
    stage: Stage, own_postgres: PostgresServer, own_database: str, kind: str
) -> None:
    """During a PostgreSQL outage the jobs run on, and all reports are written afterwards."""
    settings = {**BRISK, "call_timeout": 0.5, "connect_timeout": 0.5, "record_timeout": 1.0}
    records = Records(own_database)
    with jobguard.guard(stage.broker, postgres=own_database, **settings):
        if kind == "retry":
            stage.actor("flaky").send_with_options(args=("a",), max_retries=1)
        elif kind == "delayed":
            stage.actor("say").send_with_options(args=("a",), delay=1)
            stage.actor("say").send("b")
        elif kind == "pipeline":
            stage.pipeline([stage.message("echo", "a"), stage.message("echo")]).run()
        else:
            several = stage.group([stage.message("say", "a")])
            several.add_completion_callback(stage.message("say", "all"))
            several.run()
        own_postgres.pause()
        with stage.worker():
            eventually(lambda: len(stage.said()) == 2, 30)
            eventually(stage.is_idle, 30)
            own_postgres.resume()
            eventually(lambda: records.owed() == [], 30)
    records.close()
    assert len(stage.said()) == 2
