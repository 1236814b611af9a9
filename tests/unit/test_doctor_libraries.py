"""The settings of an application that the doctor warns of, and the check before observe is removed."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import celery
import dramatiq
import pytest
import redis
import rq
from dramatiq.brokers.redis import RedisBroker

from jobguard.cli.doctor.finding import CheckResult, Finding
from jobguard.cli.doctor.libraries import judge_app, judge_target
from jobguard.cli.doctor.postgres import _judge_durability
from jobguard.cli.doctor.rollout import judge_rollout

URL = "redis://localhost:1/0"
TIMEOUTS = {"socket_timeout": 5, "socket_connect_timeout": 5}


def app(**conf: Any) -> celery.Celery:
    """Return a Celery with these settings."""
    made = celery.Celery("app", broker=URL, set_as_current=False)
    made.conf.update({"broker_transport_options": TIMEOUTS, "task_acks_late": True, **conf})
    return made


def queue(**options: Any) -> rq.Queue:
    """Return a queue whose client has these options."""
    return rq.Queue("q", connection=redis.Redis.from_url(URL, **options))


def broker(*middleware: Any, **options: Any) -> RedisBroker:
    """Return a broker with this middleware."""
    given = options if "client" in options else {"url": URL, **options}
    return RedisBroker(middleware=list(middleware), **given)  # type: ignore[no-untyped-call]


CASES: list[tuple[Callable[[], object], str | None]] = [
    (app, None),
    (lambda: app(task_acks_late=False), "acknowledged before they run"),
    (lambda: app(task_acks_late=False, result_backend=URL), None),
    (
        lambda: app(task_acks_late=False, result_backend=URL, task_ignore_result=True),
        "acknowledged before they run",
    ),
    (lambda: app(broker_transport_options={}), "no socket_timeout"),
    (lambda: app(task_acks_on_failure_or_timeout=False), "without a limit"),
    (lambda: app(task_acks_on_timeout=False), "without a limit"),
    (
        lambda: app(broker_transport_options={**TIMEOUTS, "visibility_timeout": 60}),
        "visibility_timeout is 60 s",
    ),
    (lambda: app(result_backend="redis://localhost:1/7"), None),
    (lambda: app(result_backend="redis://localhost:2/0"), "never send their body"),
    (lambda: app(result_backend="cache+memory://"), None),
    (lambda: queue(socket_timeout=5), None),
    (lambda: queue(socket_timeout=None), "no socket_timeout"),
    (lambda: broker(dramatiq.middleware.Retries(), socket_timeout=5), None),
    (
        lambda: broker(dramatiq.middleware.Retries(), client=redis.Redis(socket_timeout=None)),
        "no socket_timeout",
    ),
    (lambda: broker(socket_timeout=5), "Retries is missing"),
]


@pytest.mark.parametrize(("make", "word"), CASES, ids=range(len(CASES)))
def test_a_setting_has_its_consequence_and_the_line_to_change(
    make: Callable[[], object], word: str | None
) -> None:
    """A good application has one finding that says so; each bad setting has one with a line to change."""
    (found,) = judge_target(make(), "app")
    if word is None:
        assert found.verdict is CheckResult.OK
        return
    assert word in f"{found.detail} {found.consequence}"
    assert found.consequence and found.fix


def test_an_application_that_cannot_be_imported_is_a_problem() -> None:
    """A wrong name, a missing module and a thing that is no application each give their reason."""
    for given, word in (
        ("shop", "MODULE:NAME"),
        ("no_such_module:app", "ModuleNotFoundError"),
        ("json:nothing", "AttributeError"),
        ("json:dumps", "cannot guard"),
    ):
        (found,) = judge_app(given)
        assert found.verdict is CheckResult.PROBLEM
        assert word in found.detail


def rollout(**changed: Any) -> list[Finding]:
    """Judge a namespace that is ready, with changes."""
    overview: dict[str, Any] = {
        "leader": {"live": True},
        "sources": [{"settings": "namespace=default fence=true mode=observe", "suspects": 0}],
        "queues": [{"queue": "mail", "trusted_since": "now"}],
        "installation": {"moved": False},
    }
    workers = [{"name": "w", "queues": ["mail"], "unflushed_seconds": None}]
    return list(judge_rollout(overview | changed, changed.get("workers", workers)))


def test_a_namespace_that_is_ready() -> None:
    """With a leader, trusted queues and flushed workers, observe may be removed."""
    (found,) = rollout()
    assert (found.verdict, found.detail[:5]) == (CheckResult.OK, "safe:")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"leader": None}, "no reconciler leads"),
        ({"leader": {"live": False}}, "no reconciler leads"),
        ({"sources": []}, "nothing is guarded"),
        ({"queues": [{"queue": "mail", "trusted_since": None}]}, "queue mail is not trusted"),
        ({"installation": {"moved": True}}, "copy"),
        (
            {"workers": [{"name": "w", "queues": ["mail"], "unflushed_seconds": 9.0}]},
            "reports that Postgres does not have: w",
        ),
    ],
)
def test_a_reason_against_it(changed: dict[str, Any], word: str) -> None:
    """Each reason against it is a problem, and then nothing says that it is safe."""
    (found,) = [one for one in rollout(**changed) if one.verdict is CheckResult.PROBLEM]
    assert word in found.detail
    assert not [one for one in rollout(**changed) if one.detail.startswith("safe")]


def test_what_would_go_back_is_counted() -> None:
    """Absent jobs are named before they go back."""
    source = {"settings": "mode=observe", "suspects": 7}
    assert any("7 owed jobs are absent" in one.detail for one in rollout(sources=[source]))


def test_what_does_not_forbid_it_is_named() -> None:
    """A namespace that is not in mode observe, and a queue without a worker, are notes."""
    recovering = [{"settings": "mode=guard", "suspects": 0}]
    idle = [{"queue": "idle", "trusted_since": "now"}]
    for changed, word in (
        ({"sources": recovering}, "jobs are recovered already"),
        ({"queues": idle}, "queue idle has no guarded worker"),
    ):
        assert any(
            one.verdict is CheckResult.NOTE and word in one.detail for one in rollout(**changed)
        )


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (("on", "on", "on", "", 0), []),
        (("off", "on", "on", "", 0), [("problem", "fsync is off")]),
        (("on", "off", "on", "", 0), [("problem", "synchronous_commit is off for this role")]),
        (("on", "on", "off", "", 0), [("note", "autovacuum is off")]),
        (("on", "on", "on", "", 2), [("note", "2 replicas follow asynchronously")]),
        (("on", "on", "on", "ANY 1 (*)", 2), [("ok", "2 replicas, synchronous: ANY 1 (*)")]),
    ],
)
def test_a_server_that_may_forget(row: tuple[Any, ...], found: list[tuple[str, str]]) -> None:
    """Settings of PostgreSQL that forget commits are named, with the consequence and the line to change."""
    connection: Any = SimpleNamespace(execute=lambda _: SimpleNamespace(fetchone=lambda: row))
    judged = list(_judge_durability(connection))
    assert [(one.verdict.value, one.detail) for one in judged] == found
    assert all(one.consequence and one.fix for one in judged if one.verdict is not CheckResult.OK)
