"""Which Celery targets can be guarded, and their addresses; no test connects to a server."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import celery
import pytest

import jobguard
from jobguard.adapter import DeferredTarget, Guarded
from jobguard.adapters.celery import CeleryAdapter, lookup
from jobguard.adapters.celery.connection import client_of
from jobguard.errors import UnsupportedTarget
from jobguard.registry import trackers


@pytest.fixture(autouse=True)
def no_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every connection attempt fail."""

    def connect(*_: Any) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", connect)


def sources(url: str | None, **conf: Any) -> Guarded:
    """Return what the guard of a configured app on this broker covers."""
    app = celery.Celery("app", set_as_current=False)
    app.conf.update(broker_url=url, **conf)
    assert app.conf.broker_url == url
    found = CeleryAdapter().sources(app, namespace="n", name=None)
    assert isinstance(found, Guarded)
    return found


MASTER = {"master_name": "mymaster"}
NOWHERE = "postgresql://localhost/nowhere"


@pytest.mark.parametrize(
    ("url", "conf", "address"),
    [
        ("redis://localhost/0", {}, "localhost:6379/0"),
        ("redis://127.0.0.1:6380/3", {}, "localhost:6380/3"),
        ("redis://:secret@Redis.Example:1/", {}, "redis.example:1/0"),
        ("rediss://u:secret@r:6380/1?ssl_cert_reqs=none", {}, "r:6380/1"),
        ("redis://r:6380/1", {"broker_use_ssl": {"ssl_ca_certs": "/ca"}}, "r:6380/1"),
        ("redis+socket:///tmp/redis.sock", {}, "unix:/tmp/redis.sock/0"),
        ("redis+socket:///tmp/redis.sock?virtual_host=2", {}, "unix:/tmp/redis.sock/2"),
        (
            "sentinel://s1:26379/2;sentinel://s2:26379/2",
            {"broker_transport_options": MASTER},
            "sentinel:mymaster/2",
        ),
        (
            "sentinel://s1:26379",
            {"broker_transport_options": MASTER},
            "sentinel:mymaster/0",
        ),
        ("redis://a:1/1;redis://b:2/2", {}, "a:1/1"),
        ("redis://read/0", {"broker_write_url": "redis://write/5"}, "write:6379/5"),
    ],
)
def test_addresses(url: str, conf: dict[str, Any], address: str) -> None:
    """Every form of a Redis URL gives its address, without a password."""
    found = sources(url, **conf)
    assert found.source.address == address
    assert found.source.prefix == ""
    assert found.queues is None and found.inert is None
    assert not found.source.one_body


def test_client() -> None:
    """A client of our own has the parameters that kombu would use."""
    app = celery.Celery("app", broker="rediss://u:secret@r:6380/1", set_as_current=False)
    app.conf.broker_use_ssl = {"ssl_ca_certs": "/ca"}
    kwargs = client_of(app.connection_for_write()).connection_pool.connection_kwargs
    assert (kwargs["host"], kwargs["username"], kwargs["password"]) == ("r", "u", "secret")
    assert kwargs["ssl_ca_certs"] == "/ca"


def test_prefix_names_the_layout() -> None:
    """An unusual place of the keys makes another source; another place of the results does not."""
    options = {"global_keyprefix": "me:", "priority_steps": [0, 5], "sep": ":"}
    found = sources("redis://r/0", broker_transport_options=options)
    assert found.source.prefix == "global_keyprefix=me%3A&sep=%3A&priority_steps=0.5"
    assert sources("redis://r/0", result_backend="redis://r/1").source.prefix == ""


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("amqp://guest@rabbit//", "RabbitMQ"),
        ("pyamqp://guest@rabbit//", "RabbitMQ"),
        (None, "RabbitMQ"),
        ("filesystem://", "filesystem"),
        ("unix:///tmp/redis.sock", "redis[+]socket://"),
        ("redis+cluster://r/0", "Cluster"),
        ("sentinel://s1:26379", "master_name"),
        ("redis://r/no-number", "Database"),
    ],
)
def test_unsupported_targets(url: str | None, message: str) -> None:
    """The error of an unsupported target names the next step."""
    with pytest.raises(UnsupportedTarget, match=message):
        sources(url)


@pytest.mark.parametrize(
    ("url", "conf"),
    [
        ("memory://", {}),
        ("memory://", {"result_backend": "cache+memory://"}),
    ],
)
def test_doubles(url: str, conf: dict[str, Any]) -> None:
    """A user's test doubles are not guarded, and the reason is reported."""
    found = sources(url, **conf)
    assert found.inert and found.client is None


def test_other_targets() -> None:
    """An object that is no Celery app is not accepted."""
    assert CeleryAdapter().sources(object(), namespace="n", name=None) is None


def ok() -> bool:
    """Return, as the task of that name does."""
    return True


class TestLazy:
    """The guard of an app that is not configured yet."""

    def test_guard_does_not_configure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """guard(app) does not configure the app, so the next lines can still change its settings."""
        app = celery.Celery("app", set_as_current=False)
        guard = jobguard.guard(app, postgres=NOWHERE)
        try:
            assert not app.configured and "amqp" not in vars(app)
            app.conf.broker_url = "memory://"  # a later line may do this
            assert guard.inert and "memory" in guard.inert
        finally:
            guard.close()

    def test_later(self) -> None:
        """The app is guarded at its first push, once."""
        app = celery.Celery("app", broker="memory://", set_as_current=False)
        later = CeleryAdapter().sources(app, namespace="n", name=None)
        assert isinstance(later, DeferredTarget)
        called: list[bool] = []
        later.when(lambda: called.append(app.configured))
        assert not called and not app.configured
        app.send_task("nobody.knows")
        app.send_task("nobody.knows")
        assert called == [True]

    def test_asked_before(self) -> None:
        """A question to the guard itself configures the app."""
        app = celery.Celery("app", broker="redis://localhost/0", set_as_current=False)
        again = [jobguard.guard(app, postgres=NOWHERE) for _ in range(2)]
        assert not app.configured
        assert [guard.inert for guard in again] == [None, None]
        assert app.configured
        for guard in again:
            guard.close()

    def test_several_brokers(self, caplog: pytest.LogCaptureFixture) -> None:
        """Of several brokers for failover only the first is guarded, and a warning says so once."""
        for url, warnings in (("redis://a/0;redis://b/0", 1), ("redis://a/0", 0)):
            caplog.clear()
            app = celery.Celery("app", broker=url, set_as_current=False)
            guards = [jobguard.guard(app, postgres=NOWHERE) for _ in range(2)]
            assert [guard.inert for guard in guards] == [None, None]
            assert caplog.text.count("only the first is guarded") == warnings
            for guard in guards:
                guard.close()

    def test_refused_later(self, caplog: pytest.LogCaptureFixture) -> None:
        """A broker that turns out to be no Redis is logged, and tasks are sent as before."""
        app = celery.Celery("app", broker="memory://", set_as_current=False)
        guard = jobguard.guard(app, postgres=NOWHERE)
        app.send_task("nobody.knows")
        assert guard.inert == "memory:// keeps nothing that could be lost"
        guard.close()

    def test_eager(self, caplog: pytest.LogCaptureFixture) -> None:
        """An app in eager mode is inert, and the reason is logged; it is guarded when the mode ends."""
        app = celery.Celery("app", broker="redis://localhost/0", set_as_current=False)
        app.conf.task_always_eager = True
        assert app.conf.task_always_eager
        with caplog.at_level("INFO", logger="jobguard"):
            guard = jobguard.guard(app, postgres=NOWHERE)
        assert "task_always_eager" in caplog.text and "task_always_eager" in repr(guard)
        assert guard.inert and "task_always_eager" in guard.inert
        assert guard.stats().total == 0 and lookup.tracker_for(app) is None
        app.conf.task_always_eager = False
        assert guard.inert is None and lookup.tracker_for(app) is not None
        guard.close()

    def test_eager_and_sent_nevertheless(self) -> None:
        """send_task sends also in eager mode, so the app is guarded from then on."""
        app = celery.Celery("app", broker="memory://", set_as_current=False)
        app.conf.task_always_eager = True
        task = app.task(name="ok", shared=False)(ok)
        assert app.conf.task_always_eager
        later = CeleryAdapter().sources(app, namespace="n", name=None)
        assert isinstance(later, DeferredTarget)
        called: list[bool] = []
        later.when(lambda: called.append(True))
        assert task.delay().get()
        assert later.resolve() and not called
        app.send_task("nobody.knows")
        assert called and later.resolve() is None
        assert isinstance(CeleryAdapter().sources(app, namespace="n", name=None), Guarded)


class TestShared:
    """Several apps on one broker, which share a tracker."""

    def test_the_guard_of_one_is_closed(self) -> None:
        """Each app that was configured late keeps its guard until that guard is closed, in any order."""
        apps = [
            celery.Celery("app", broker="redis://localhost/0", set_as_current=False)
            for _ in range(3)
        ]
        assert apps[2].conf.broker_url
        guards = [jobguard.guard(app, postgres=NOWHERE) for app in apps]
        assert [guard.inert for guard in guards] == [None] * 3
        for closed in (0, 2, 1):
            assert lookup.tracker_for(apps[closed]) is not None
            guards[closed].close()
            assert lookup.tracker_for(apps[closed]) is None
        assert not list(trackers())

    def test_it_is_guarded_again(self) -> None:
        """A guard that is closed and made again shares the tracker of the others again."""
        apps = [celery.Celery("app", broker="redis://localhost/0") for _ in range(2)]
        assert all(app.conf.broker_url for app in apps[1:])
        late, early = [jobguard.guard(app, postgres=NOWHERE) for app in apps]
        assert late.inert is None
        early.close()
        again = jobguard.guard(apps[1], postgres=NOWHERE)
        assert again.inert is None and lookup.tracker_for(apps[1]) is lookup.tracker_for(apps[0])
        late.close()
        assert lookup.tracker_for(apps[0]) is None and lookup.tracker_for(apps[1]) is not None
        again.close()

    def test_each_sends_by_its_own_app(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """guard.send() of a task's name uses the app of that guard, with its routes."""
        apps = [
            celery.Celery("app", broker="redis://localhost/0", set_as_current=False)
            for _ in range(2)
        ]
        guards = [jobguard.guard(app, postgres=NOWHERE) for app in apps]
        for name, app in zip("ab", apps, strict=True):
            sent = SimpleNamespace(id=name)
            monkeypatch.setattr(app, "send_task", lambda *_, sent=sent, **__: sent)
        assert [guard.send("a.name", key="k").job_id for guard in guards] == ["a", "b"]
        for guard in guards:
            guard.close()


def test_a_schedule_goes_where_the_app_sends_its_task() -> None:
    """The queue is that of the task, of a route, or the default one; a route to an exchange names none."""

    def nothing() -> None:
        pass

    app = celery.Celery("app", set_as_current=False)
    app.conf.task_routes = {
        "routed": {"queue": "mail"},
        "pre.*": {"queue": "pre"},
        "to.exchange": {"exchange": "all", "routing_key": "k"},
    }
    expected = {"routed": "mail", "pre.x": "pre", "plain": "celery", "to.exchange": None}
    for name, queue in expected.items():
        task = app.task(name=name)(nothing)
        assert CeleryAdapter().task_of(task) == (name, queue)
    own = app.task(name="pre.own", queue="own")(nothing)
    assert CeleryAdapter().task_of(own) == ("pre.own", "own")
