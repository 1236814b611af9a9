"""Targets whose application is configured after the call of guard()."""

from __future__ import annotations

import logging
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

import jobguard
from jobguard.adapter import DeferredTarget, Guarded, Source
from jobguard.errors import ConfigurationError, UnsupportedTarget

POSTGRES = "postgresql://nobody@127.0.0.1:1/nothing"


class App:
    """An application of a library."""

    def __init__(self) -> None:
        self.configured = False
        self.supported = True
        self.waiting: list[Callable[[], None]] = []
        self.installed: list[Source] = []


class Adapter:
    """The adapter of that library."""

    library = "some"

    def sources(
        self, target: Any, *, namespace: str, name: str | None
    ) -> Guarded | DeferredTarget | None:
        """Return the source if the application is configured, else a deferred target."""
        if not target.configured:
            return DeferredTarget(
                target.waiting.append, lambda: setattr(target, "configured", True)
            )
        if not target.supported:
            raise UnsupportedTarget("use a Redis")
        source = Source(namespace, "some", "localhost:1/0", one_body=False)
        return Guarded(source, None, lambda: pytest.fail("nothing is connected to"))

    def install(self, tracker: Any, target: Any) -> None:
        """Note the source."""
        target.installed.append(tracker.source)

    def uninstall(self, tracker: Any, deferred: Any = None) -> bool:
        """Do nothing."""
        return True

    def broker(self, source: Source, client: Any) -> Any:
        """Return nothing; no test calls this."""


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> App:
    """Return an application whose adapter is found."""
    found = Adapter()

    def find_adapter(target: Any, chosen: Any) -> Any:
        return found, found.sources(target, namespace=chosen.namespace, name=chosen.source)

    monkeypatch.setattr(import_module("jobguard.guard"), "find_adapter", find_adapter)
    return App()


def test_the_application_is_not_read_before_its_first_use(app: App) -> None:
    """At the first use the source is guarded, once."""
    guard = jobguard.guard(app, postgres=POSTGRES)
    assert (app.configured, app.installed) == (False, [])
    assert "configured" in repr(guard)
    app.configured = True
    (complete,) = app.waiting
    complete()
    complete()
    assert len(app.installed) == 1
    assert guard.inert is None and guard.batch() is not None
    guard.close()
    assert guard.inert == "closed"


def test_a_use_of_the_guard_configures_the_application(app: App) -> None:
    """A batch that is the first use of the guard works as a batch."""
    guard = jobguard.guard(app, postgres=POSTGRES)
    with guard.batch():
        assert app.configured
        assert len(app.installed) == 1
    app.waiting[0]()
    assert len(app.installed) == 1
    guard.close()


def test_two_guards_of_one_application_are_one(app: App) -> None:
    """The second guard uses the tracker of the first."""
    guards = [jobguard.guard(app, postgres=POSTGRES) for _ in range(2)]
    app.configured = True
    for complete in app.waiting:
        complete()
    assert guards[0]._tracker is guards[1]._tracker
    for guard in guards:
        guard.close()


def test_a_target_that_cannot_be_guarded_later_is_logged(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """The error is logged and not raised, because the host is about to send a job."""
    guard = jobguard.guard(app, postgres=POSTGRES)
    app.configured, app.supported = True, False
    with caplog.at_level(logging.ERROR, logger="jobguard"):
        app.waiting[0]()
    assert "use a Redis" in caplog.text
    assert guard.inert == "use a Redis"
    assert guard.stats().total == 0


def test_a_bad_url_is_an_error_at_once(app: App) -> None:
    """A wrong Postgres URL raises in the call of guard(), also for a deferred target."""
    with pytest.raises(ConfigurationError):
        jobguard.guard(app, postgres="mysql://x")


def test_a_guard_closed_before_its_first_use_guards_nothing(app: App) -> None:
    """After close(), a later configuration of the application changes nothing."""
    guard = jobguard.guard(app, postgres=POSTGRES)
    guard.close()
    app.configured = True
    app.waiting[0]()
    assert (app.installed, guard.inert) == ([], "closed")
