"""The answers of the reconciler's HTTP server."""

from __future__ import annotations

import http.client
import threading
from contextlib import closing
from http import HTTPStatus
from typing import Any

import pytest

from jobguard.errors import ConfigurationError, StoreUnavailable
from jobguard.reconciler.leader import Leadership
from jobguard.serving import http as serving
from jobguard.serving.http import Endpoints, HttpServer, parse_address
from tests.support import eventually

SECRET = "a-long-secret-of-a-test"


def endpoints(**given: Any) -> Endpoints:
    """Return endpoints of a healthy process."""
    return Endpoints(**{"live": lambda: None, "ready": lambda: None, **given})


def test_a_probe_says_why_it_fails() -> None:
    """A failing probe answers 503 with its reason."""
    some = endpoints(ready=lambda: "Postgres has not answered for 12 s")
    assert some.get("/livez")[0] is HTTPStatus.OK
    status, _, page = some.get("/readyz")
    assert (status, page) == (
        HTTPStatus.SERVICE_UNAVAILABLE,
        b"Postgres has not answered for 12 s\n",
    )
    assert some.get("/other")[0] is HTTPStatus.NOT_FOUND
    assert b"jobguard[metrics]" in some.get("/metrics")[2]


def test_a_pass_needs_the_secret() -> None:
    """Only POST with the whole secret makes a pass; a short secret is refused at the start."""
    passes: list[int] = []

    def tick() -> dict[str, Any]:
        passes.append(1)
        return {"leads": True}

    some = endpoints(tick=tick, secret=SECRET)
    for given in ("", "Bearer", f"Basic {SECRET}", f"Bearer {SECRET[:-1]}", f"Bearer {SECRET}x"):
        assert some.post("/tick", given)[0] is HTTPStatus.UNAUTHORIZED
    assert some.get("/tick")[0] is HTTPStatus.METHOD_NOT_ALLOWED
    assert not passes
    assert some.post("/tick", f"Bearer {SECRET}") == (
        HTTPStatus.OK,
        serving.JSON,
        b'{"leads": true}',
    )
    assert endpoints().post("/tick", f"Bearer {SECRET}")[0] is HTTPStatus.CONFLICT
    for short in (None, "", "short"):
        with pytest.raises(ConfigurationError, match="JOBGUARD_TICK_SECRET"):
            endpoints(tick=tick, secret=short)


def test_one_pass_at_a_time_and_an_unfinished_one_is_an_error() -> None:
    """A second request during a pass is refused; a pass that was not made completely answers 502."""
    began, go_on = threading.Event(), threading.Event()

    def slow() -> dict[str, Any]:
        began.set()
        go_on.wait(20)
        return {"unfinished": ["redis:6379/0"]}

    some = endpoints(tick=slow, secret=SECRET)
    answers: list[Any] = []
    first = threading.Thread(
        target=lambda: answers.append(some.post("/tick", f"Bearer {SECRET}")[0])
    )
    first.start()
    assert began.wait(20)
    assert some.post("/tick", f"Bearer {SECRET}")[0] is HTTPStatus.TOO_MANY_REQUESTS
    go_on.set()
    first.join()
    assert answers == [HTTPStatus.BAD_GATEWAY]


def test_the_server_answers_a_few_at_a_time_and_hides_errors() -> None:
    """More requests than the bound are refused at once, and an error of ours shows no detail."""
    release = threading.Event()
    waiting = threading.Semaphore(0)

    def slow() -> str | None:
        waiting.release()
        release.wait(20)
        return None

    def broken() -> tuple[str, bytes]:
        raise ValueError("postgresql://app:hidden@db/app")

    with closing(HttpServer("127.0.0.1:0", endpoints(ready=slow, metrics=broken))) as server:

        def get(path: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
            with closing(connection):
                connection.request("GET", path)
                answer = connection.getresponse()
                return answer.status, answer.read()

        assert get("/livez?x=1") == (200, b"ok\n")
        assert get("/metrics") == (500, b"failed: see the log\n")
        busy = [threading.Thread(target=get, args=["/readyz"]) for _ in range(serving._AT_ONCE)]
        for thread in busy:
            thread.start()
        for _ in busy:
            assert waiting.acquire(timeout=20)
        assert get("/livez")[0] == 503
        release.set()
        for thread in busy:
            thread.join()
        eventually(lambda: get("/livez")[0] == 200)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("127.0.0.1:9912", ("127.0.0.1", 9912)),
        (":9912", ("0.0.0.0", 9912)),
        ("[::1]:80", ("::1", 80)),
        ("9912", None),
        ("host:http", None),
        ("host:70000", None),
        ("host:²", None),
    ],
)
def test_an_address(given: str, found: tuple[str, int] | None) -> None:
    """An address is HOST:PORT; anything else is an error that shows the form."""
    if found is None:
        with pytest.raises(ConfigurationError, match="HOST:PORT"):
            parse_address(given)
    else:
        assert parse_address(given) == found


def test_a_follower_is_ready_and_a_process_without_postgres_is_not() -> None:
    """A follower and a leader hear Postgres; silence is counted from its last answer."""
    now = [100.0]

    class Store:
        away = False

        def elect(self, *, lease: float, patience: float) -> None:
            if self.away:
                raise StoreUnavailable

    store: Any = Store()
    leadership = Leadership(store, lease=9.0, clock=lambda: now[0])
    assert leadership.silent_for() is None
    leadership.seek()
    assert not leadership.leads
    assert leadership.silent_for() == 0.0
    store.away = True
    now[0] += 30
    leadership.seek()
    assert leadership.silent_for() == 30.0
