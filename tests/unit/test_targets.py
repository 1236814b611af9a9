"""A target that cannot be guarded is refused with the reason and an alternative."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import celery
import pytest
import redis
from dramatiq.brokers.redis import RedisBroker
from rq import Queue

import jobguard
from jobguard.errors import ConflictingGuard, UnsupportedTarget
from jobguard.guard import JobGuard, known_guards

POSTGRES = "postgresql://h/d"


def a_target(library: str, db: int = 1, **options: Any) -> Any:
    """Return a target of a library on a Redis that no test connects to."""
    url = f"redis://localhost:1/{db}"
    if library == "rq":
        return Queue("mail", connection=redis.Redis.from_url(url), **options)
    if library == "dramatiq":
        return cast(Any, RedisBroker)(url=url)
    app = celery.Celery("app", broker=url, set_as_current=False)
    assert app.conf.broker_url  # configures it, so that guard() reads its broker at once
    return app


@pytest.fixture
def guard() -> Iterator[Callable[..., JobGuard]]:
    """Return a function that guards a target; all guards are closed after the test."""

    def make(target: Any, **settings: Any) -> JobGuard:
        return jobguard.guard(target, postgres=POSTGRES, **settings)

    yield make
    for made in known_guards():
        made.close()


@pytest.mark.parametrize("library", ["celery", "dramatiq", "rq"])
def test_one_source_name_for_two_redises_is_a_conflict(
    library: str, guard: Callable[..., JobGuard]
) -> None:
    """The jobs of the second Redis would be recorded as jobs of the first one, or not at all."""
    guard(a_target(library, 1), source="main")
    with pytest.raises(ConflictingGuard, match="'main' is already localhost:1/1"):
        guard(a_target(library, 2), source="main")
    assert guard(a_target(library, 2), source="other").inert is None


@pytest.mark.parametrize("library", ["celery", "dramatiq", "rq"])
def test_a_second_namespace_for_one_target_is_a_conflict(
    library: str, guard: Callable[..., JobGuard]
) -> None:
    """A second guard of a target with another namespace would guard nothing, so it is an error."""
    target = a_target(library)
    first = guard(target, namespace="one")
    with pytest.raises(ConflictingGuard, match=r"'one'.*'other'"):
        guard(target, namespace="other")
    assert guard(target, namespace="one") is first and known_guards() == [first]


def test_a_whole_redis_leaves_the_queues_of_an_older_guard_to_it(
    guard: Callable[..., JobGuard],
) -> None:
    """RQ: a queue may have its own namespace if its guard comes first; else it is a conflict."""
    one, all_of_it = a_target("rq"), redis.Redis.from_url("redis://localhost:1/1")
    first = guard(one, namespace="one")
    second = guard(all_of_it, namespace="other")
    with pytest.raises(ConflictingGuard, match="every queue"):
        guard(all_of_it, namespace="third")
    first.close()
    with pytest.raises(ConflictingGuard, match="the queue 'mail'"):
        guard(one, namespace="one")
    assert second.inert is None


def test_a_queue_that_runs_jobs_at_once_does_not_disarm_the_others(
    guard: Callable[..., JobGuard],
) -> None:
    """RQ: a list with an is_async=False queue guards its other queues."""
    sync = Queue("sync", connection=redis.Redis.from_url("redis://localhost:1/1"), is_async=False)
    made = guard([sync, a_target("rq")])
    assert made.inert is None and made._tracker is not None
    assert made._tracker.guards("mail") and not made._tracker.guards("sync")


@pytest.mark.parametrize("configured", [True, False])
def test_celerys_current_app_is_the_app_behind_it(
    configured: bool, guard: Callable[..., JobGuard]
) -> None:
    """Celery: ``current_app`` is a proxy, and guarding it guards the app."""
    app = celery.Celery("app", broker="redis://localhost:1/1", set_as_current=False)
    if configured:
        assert app.conf.broker_url
    before = celery.current_app._get_current_object()
    app.set_current()
    try:
        made = guard(celery.current_app)
        assert made.inert is None
        assert guard(app) is made or guard(app)._tracker is made._tracker
    finally:
        before.set_current()


@pytest.mark.parametrize("shape", ["client", "connection", "list"])
def test_a_cluster_is_refused(shape: str) -> None:
    """A client of a cluster, a queue on it and a broker with it are refused; nothing is connected."""
    cluster: Any = redis.RedisCluster.__new__(redis.RedisCluster)
    target = {
        "client": cluster,
        "connection": SimpleNamespace(connection=cluster),
        "list": [SimpleNamespace(connection=cluster)],
    }[shape]
    with pytest.raises(UnsupportedTarget, match="without cluster mode"):
        jobguard.guard(target, postgres="postgresql://h/d")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:S3cr/t0k@h:6379/0",
        "redis://:12/t0k@h/0",
        "redis://:S3cr?t0k@h/0",
        "sentinel://:S3cr/t0k@h:1/0",
        "redis+socket://:S3cr/t0k@/x",
    ],
)
def test_a_url_that_the_library_cannot_read_is_not_repeated(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The library's own error quotes a part of the password, and ours does not."""
    app = celery.Celery("app", broker=url, set_as_current=False)
    guard = jobguard.guard(app, postgres="postgresql://h/d")
    shown = f"{guard.inert} {guard!r} {caplog.text}"
    assert "S3cr" not in shown and "t0k" not in shown
    assert "%2F" in (guard.inert or "")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
