"""A guarded application of Dramatiq on a real Redis, with the ledger in PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis

import jobguard
from jobguard.adapter import Source
from jobguard.adapters.dramatiq import DramatiqAdapter, lost_messages
from jobguard.adapters.dramatiq.broker import DramatiqBroker
from jobguard.guard import JobGuard
from tests.conformance.words import BRISK, Leader, Records, environ
from tests.integration.dramatiq.stage import LEDGER, Stage, a_broker, program
from tests.support import eventually


@pytest.fixture(autouse=True)
def frequent_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check for lost messages often."""
    monkeypatch.setattr(lost_messages, "INTERVAL", 0.1)


@pytest.fixture
def stage(redis_url: str, tmp_path: Path) -> Iterator[Stage]:
    """Yield the application, not guarded yet."""
    made = Stage(a_broker(redis_url), tmp_path / "ledger")
    dramatiq.set_broker(made.broker)
    yield made
    made.client.close()


@pytest.fixture
def guard(stage: Stage, database: str) -> Iterator[JobGuard]:
    """Guard the broker of the application."""
    with jobguard.guard(stage.broker, postgres=database, **BRISK) as made:
        yield made


@pytest.fixture
def records(database: str) -> Iterator[Records]:
    """Return the ledger."""
    made = Records(database)
    yield made
    made.close()


@pytest.fixture
def source(stage: Stage) -> Source:
    """Return the identity of the guarded source."""
    guarded = DramatiqAdapter().sources(stage.broker, namespace="default", name=None)
    assert guarded is not None
    return guarded.source


@pytest.fixture
def leader(source: Source, redis_url: str) -> Iterator[Leader]:
    """Yield a leader's view, with its own client."""
    with redis.Redis.from_url(redis_url) as client:
        yield Leader(DramatiqBroker(source, client))


@pytest.fixture
def surroundings(stage: Stage, database: str, redis_url: str) -> Mapping[str, str]:
    """Return the environment for worker processes."""
    return {**environ(database, redis_url), LEDGER: str(stage.ledger)}


@pytest.fixture
def reconciler(surroundings: Mapping[str, str], records: Records) -> Iterator[Any]:
    """Run a leader; yield a function that waits until it trusts a worker's queue."""
    command = ("-c", "from jobguard.cli import main; main()", "reconcile")
    with program(*command, environ=surroundings):

        def trusts() -> None:
            eventually(records.trusted, 30)

        yield trusts
