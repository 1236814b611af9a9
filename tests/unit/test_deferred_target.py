"""A target whose application is configured after guard() was called."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest

import jobguard
from jobguard.adapter import DeferredTarget, Guarded, Source
from jobguard.errors import ConfigurationError, UnsupportedTarget

POSTGRES = "postgresql://nobody@127.0.0.1:1/nothing"


class App:
    """An application of some library."""

    def __init__(self) -> None:
        self.configured = False
        self.supported = True
        self.waiting: list[Callable[[], None]] = []
        self.installed: list[Source] = []


class Adapter:
    """Its adapter."""

    library = "some"

    def sources(
        self, target: Any, *, namespace: str, name: str | None
    ) -> Guarded | DeferredTarget | None:
        """Known when it is configured."""
        if not target.configured:
            return DeferredTarget(
                target.waiting.append, lambda: setattr(target, "configured", True)
            )
        if not target.supported:
            raise UnsupportedTarget("use a Redis")
        source = Source(namespace, "some", "localhost:1/0", one_body=False)
        return Guarded(source, None, lambda: pytest.fail("nothing is connected to"))

    def install(self, tracker: Any, target: Any) -> None:
        """Note it."""
        target.installed.append(tracker.source)

    def uninstall(self, tracker: Any) -> None:
        """Nothing to do."""

    def broker(self, source: Source, client: Any) -> Any:
        """Not asked for."""


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> App:
    """Give an application whose adapter is found."""
    found = Adapter()

    def find_adapter(target: Any, chosen: Any) -> Any:
        return found, found.sources(target, namespace=chosen.namespace, name=chosen.source)

    monkeypatch.setattr(sys.modules["jobguard.guard"], "find_adapter", find_adapter)
    return App()


def test_nothing_is_asked_before_the_application_needs_us(app: App) -> None:
    """Then the guard is put up, once."""
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


def test_who_asks_the_guard_has_it_find_out(app: App) -> None:
    """A batch as the very first thing is a batch."""
    guard = jobguard.guard(app, postgres=POSTGRES)
    with guard.batch():
        assert app.configured
        assert len(app.installed) == 1
    app.waiting[0]()
    assert len(app.installed) == 1
    guard.close()


def test_two_guards_of_one_application_are_one(app: App) -> None:
    """The second is told of the first."""
    guards = [jobguard.guard(app, postgres=POSTGRES) for _ in range(2)]
    app.configured = True
    for complete in app.waiting:
        complete()
    assert guards[0]._tracker is guards[1]._tracker
    guards[0].close()


def test_what_turns_out_to_be_impossible_is_said_and_nothing_is_guarded(
    app: App, caplog: pytest.LogCaptureFixture
) -> None:
    """It is no time to raise: the host is about to send a job."""
    guard = jobguard.guard(app, postgres=POSTGRES)
    app.configured, app.supported = True, False
    with caplog.at_level(logging.ERROR, logger="jobguard"):
        app.waiting[0]()
    assert "use a Redis" in caplog.text
    assert guard.inert == "use a Redis"
    assert guard.stats().total == 0


def test_a_bad_url_is_an_error_at_once(app: App) -> None:
    """What can be known is said to who wrote it."""
    with pytest.raises(ConfigurationError):
        jobguard.guard(app, postgres="mysql://x")


def test_a_guard_closed_before_it_was_needed_guards_nothing(app: App) -> None:
    """Whatever comes later."""
    guard = jobguard.guard(app, postgres=POSTGRES)
    guard.close()
    app.configured = True
    app.waiting[0]()
    assert (app.installed, guard.inert) == ([], "closed")
