"""A guarded application of Dramatiq on a real Redis, with the ledger in Postgres."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.encoder import JSONEncoder

import jobguard
from jobguard.adapter import Source
from jobguard.adapters.dramatiq import DramatiqAdapter, lost_messages
from jobguard.adapters.dramatiq.broker import DramatiqBroker
from jobguard.guard import JobGuard
from tests.conformance.words import BRISK, Leader, Records, environ
from tests.integration.dramatiq.stage import LEDGER, Stage, a_broker, program
from tests.support import eventually


@pytest.fixture(autouse=True)
def encoder() -> None:
    """Whatever encoder other tests have set."""
    dramatiq.set_encoder(JSONEncoder())


@pytest.fixture(autouse=True)
def healed_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks in no time."""
    monkeypatch.setattr(lost_messages, "INTERVAL", 0.1)


@pytest.fixture
def stage(redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    """Give the application, unguarded so far."""
    made = Stage(a_broker(redis_url), tmp_path / "ledger")
    dramatiq.set_broker(made.broker)
    yield made
    made.client.close()


@pytest.fixture
def guard(stage: Stage, database: str) -> Iterator[JobGuard]:
    """Guard its broker."""
    with jobguard.guard(stage.broker, postgres=database, **BRISK) as made:
        yield made


@pytest.fixture
def records(database: str) -> Records:
    """Give the ledger."""
    return Records(database)


@pytest.fixture
def source(stage: Stage) -> Source:
    """Give the identity of what is guarded."""
    guarded = DramatiqAdapter().sources(stage.broker, namespace="default", name=None)
    assert guarded is not None
    return guarded.source


@pytest.fixture
def leader(source: Source, redis_url: str) -> Iterator[Leader]:
    """Give a leader's view, on a client of its own."""
    with redis.Redis.from_url(redis_url) as client:
        yield Leader(DramatiqBroker(source, client))


@pytest.fixture
def surroundings(stage: Stage, database: str, redis_url: str) -> Mapping[str, str]:
    """Give the environment of processes of their own."""
    return {**environ(database, redis_url), LEDGER: str(stage.ledger)}


@pytest.fixture
def reconciler(surroundings: Mapping[str, str], records: Records) -> Iterator[Any]:
    """Have a leader that leads; gives what waits until it trusts a worker's queue."""
    command = ("-c", "from jobguard.cli import main; main()", "reconcile")
    with program(*command, environ=surroundings):

        def trusts() -> None:
            eventually(records.trusted, 30)

        yield trusts
