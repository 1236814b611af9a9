"""The libraries that pass the suite. A new adapter adds its line to LIBRARIES."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

import jobguard
from jobguard.adapter import Guarded, Source
from jobguard.guard import JobGuard
from tests.conformance import tasks
from tests.conformance.library import Library
from tests.conformance.words import BRISK, Leader, Records

LIBRARIES = {
    "celery": "tests.conformance.on_celery:OnCelery",
    "dramatiq": "tests.conformance.on_dramatiq:OnDramatiq",
    "rq": "tests.conformance.on_rq:OnRQ",
}
"""By name, not imported, because the suite can run where some of them are not installed."""


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest, redis_url: str, tmp_path: Path) -> Iterator[Library]:
    """Yield one of the libraries, on an empty Redis."""
    kind: type[Library] = pkgutil.resolve_name(LIBRARIES[request.param])
    made = kind(redis_url, tmp_path / "ledger")
    tasks.PROBES.clear()
    yield made
    made.close()


@pytest.fixture
def guard(library: Library, database: str) -> Iterator[JobGuard]:
    """Guard every queue of the library, with the ledger in PostgreSQL."""
    with jobguard.guard(library.target(), postgres=database, **BRISK) as made:
        yield made


@pytest.fixture
def records(database: str) -> Iterator[Records]:
    """Return the ledger."""
    made = Records(database)
    yield made
    made.close()


@pytest.fixture
def source(library: Library) -> Source:
    """Return the identity of the guarded source."""
    guarded = library.adapter.sources(library.target(), namespace="default", name=None)
    assert isinstance(guarded, Guarded)
    return guarded.source


@pytest.fixture
def leader(library: Library, source: Source) -> Iterator[Leader]:
    """Yield a leader's view of the library, with its own client."""
    with redis.Redis.from_url(library.redis_url) as client:
        yield Leader(library.adapter.broker(source, client))
