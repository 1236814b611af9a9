from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.routing import Mount
from starlette.testclient import TestClient

from jobguard import dashboard
from jobguard.cli import main
from jobguard.dashboard.fields import words_of
from jobguard.errors import ConfigurationError, StoreUnavailable
from jobguard.store.ledger import PostgresLedger
from tests.integration.test_operations import HOSTILE, Rows
from tests.support import SLOWEST

TOKEN = "a-token-of-enough-characters"
PAGES = ("/", "/jobs", "/errors", "/incidents", "/workers", "/workers?gone=1", "/replay")


@pytest.fixture
def rows(database: str) -> Iterator[Rows]:
    """Give a migrated database with two sources, to write into."""
    made = Rows(database)
    yield made
    made.connection.close()


@pytest.fixture
def page(database: str) -> Iterator[Callable[..., TestClient]]:
    """Give a function that serves the page, as a browser on this machine sees it."""
    opened: list[TestClient] = []

    def serve(**options: Any) -> TestClient:
        made = dashboard.app(database, redis=["redis://127.0.0.1:1/9"], **options)
        client = TestClient(made, base_url="http://localhost", follow_redirects=False)
        client.__enter__()
        opened.append(client)
        return client

    yield serve
    for client in opened:
        client.__exit__(None, None, None)


def confirmed(client: TestClient, **given: str) -> Any:
    """Click through the question of an action."""
    asked = client.get(f"/confirm?{words_of(given)}")
    assert asked.status_code == 200, asked.text
    fields = re.findall(r'name="(csrf|given)" value="([^"]*)"', asked.text)
    return client.post("/act", data={name: html.unescape(value) for name, value in fields})


def test_every_page_shows_what_there_is(rows: Rows, page: Callable[..., TestClient]) -> None:
    """The pages show queues, jobs, one job with its road, errors, incidents and workers."""
    worker = rows.worker("worker-7")
    rows.run(rows.owed("runs"), worker)
    rows.suspect(rows.owed("lost"))
    rows.ended("bad", "failed", errors=["first\nBoom: 7"], envelope=b"x")
    rows.ask(
        "insert into jobguard.incidents (source, cause, detail, missing, restored)"
        " values (1, 'incident', 'flushed', 9, 8)"
    )
    client = page()
    for path in PAGES:
        assert client.get(path).status_code == 200, path
    overview = client.get("/").text
    assert "none yet; run `jobguard reconcile`" in overview and "flushed" in overview
    assert 'href="/queue?name=mail"' in overview and "9 missing, 8 put back" in overview
    assert "lost" in client.get("/jobs?state=stuck").text
    assert "bad" not in client.get("/jobs?state=stuck").text
    assert "worker-7" in client.get("/jobs?worker=worker-7").text
    job = client.get("/job?id=bad").text
    assert "Boom: 7" in job and "Its road" in job and "Send again" in job
    assert "absent from Redis (incident)" in client.get("/job?id=lost").text
    assert "no --redis URL is localhost" in client.get("/job?id=lost").text
    assert (
        "Boom: #" in client.get("/errors").text and "Boom: #" in client.get("/queue?name=mail").text
    )
    assert client.get("/incident?id=1").status_code == 200
    assert client.get("/job?id=none").status_code == 404
    for wrong in (
        "/jobs?state=x",
        "/jobs?since=soon",
        "/jobs?after=x",
        "/incident?id=x",
        "/confirm",
    ):
        assert client.get(wrong).status_code == 400, wrong
    for static in ("dashboard.css", "dashboard.js", "uPlot.iife.min.js", "uPlot.LICENSE.txt"):
        assert client.get(f"/static/{static}").status_code == 200


def test_hostile_names_are_text_in_every_page(rows: Rows, page: Callable[..., TestClient]) -> None:
    """Ids, queues, tasks, workers and errors with HTML, SQL and control characters are shown as text."""
    half = HOSTILE + "\ud800\x00"
    token = rows.owed(HOSTILE, queue=HOSTILE, task=HOSTILE)
    rows.run(token, rows.worker(HOSTILE, host=HOSTILE, queues=[HOSTILE]))
    rows.ended("f", "failed", errors=[HOSTILE + "\nmore"], queue=HOSTILE, task=HOSTILE)
    rows.ask(
        "insert into jobguard.incidents (source, cause, detail) values (1, 'incident', %s)", HOSTILE
    )
    client = page()
    of = words_of({"id": HOSTILE, "name": HOSTILE, "queue": HOSTILE})
    asked = words_of({"action": "cancel", "queue": half, "state": "processing"})
    paths = (*PAGES, f"/job?{of}", f"/queue?{of}", f"/jobs?{of}", f"/errors?{of}", f"/confirm?{asked}",
             f"/confirm?{words_of({'action': 'forget', 'id': HOSTILE})}", "/job?id=f",
             f"/job?{words_of({'id': half})}")  # fmt: skip
    for path in paths:
        answer = client.get(path)
        assert answer.status_code in (200, 404), (path, answer.text)
        assert "<script>alert" not in answer.text, path
        assert "\x1b" not in answer.text and "\u202e" not in answer.text, path
    assert "&lt;script&gt;alert(1)" in client.get(f"/job?{of}").text
    assert "script-src 'self'" in client.get("/").headers["content-security-policy"]
    done = confirmed(client, action="cancel", id=HOSTILE)
    assert "1 of 1" in done.text
    assert rows.ask("select outcome::text from jobguard.history where job_id = %s", HOSTILE) == [
        ("cancelled",)
    ]


def test_actions_ask_first_and_are_noted(rows: Rows, page: Callable[..., TestClient]) -> None:
    """Cancel, send again, drop, forget, replay, pause and resume do what the question said."""
    client = page()
    for n in range(3):
        rows.owed(f"m{n}")
    rows.owed("s", queue="sms", due_at=datetime.now(UTC) + timedelta(hours=1))
    asked = client.get("/confirm?action=cancel&queue=mail").text
    assert "3 of queue mail: pending" in asked and "Cancel 3 jobs" in asked
    assert "3 of 3" in confirmed(client, action="cancel", queue="mail").text
    assert "No job fits" in client.get("/confirm?action=cancel&queue=mail").text
    assert client.get("/confirm?action=cancel").status_code == 400  # never everything by accident
    rows.ended("d", "dead", envelope=b"x")
    rows.ended("f", "failed", envelope=b"x", errors=["e"])
    assert "1 of 1" in confirmed(client, action="requeue-dead", id="d").text
    assert "1 of 1" in confirmed(client, action="drop-dead", queue="mail").text
    assert "1 of 1" in confirmed(client, action="requeue", id="s").text
    assert "Done" in confirmed(client, action="forget", id="f").text
    assert rows.ask("select errors from jobguard.history where job_id = 'f'") == [(None,)]
    rows.ended("c", "completed", envelope=b"x")
    window = {"since": "2020-01-01T00:00", "until": "2999-01-01T00:00", "outcome": "completed"}
    assert "1 of 1" in confirmed(client, action="replay", **window).text
    assert "Done" in confirmed(client, action="pause").text
    assert "PAUSED" in page().get("/").text
    confirmed(client, action="resume")
    assert rows.ask("select paused_at from jobguard.leader") == [(None,)]
    assert client.get("/confirm?action=explode").status_code == 400
    incidents = client.get("/incidents").text
    for action in ("cancel", "requeue", "dead purge", "forget", "replay", "pause", "resume"):
        assert f"<strong>{action}</strong>" in incidents


def test_a_change_needs_the_secret_of_its_form(rows: Rows, page: Callable[..., TestClient]) -> None:
    """Without the secret, from another site, or on a read-only page, nothing is changed."""
    rows.owed("j")
    client = page()
    given = words_of({"action": "cancel", "id": "j"})
    assert client.post("/act", data={"given": given}).status_code == 403
    asked = client.get(f"/confirm?{given}")
    csrf = re.findall(r'name="csrf" value="([^"]*)"', asked.text)[0]
    cookie = asked.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    form = {"given": given, "csrf": csrf}
    assert client.post("/act", data={**form, "csrf": "x" * 43}).status_code == 403
    assert (
        client.post("/act", data=form, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    )
    assert client.post("/act", data={**form, "x": "y" * 70_000}).status_code == 403
    assert client.get("/act").status_code == 405
    reader = page(read_only=True)
    assert "read-only" in reader.get(f"/confirm?{given}").text
    reader.cookies = client.cookies
    assert reader.post("/act", data=form).status_code == 403
    assert "Cancel</a>" not in reader.get("/job?id=j").text
    assert rows.ask("select count(*) from jobguard.jobs") == [(1,)]
    assert client.post("/act", data=form).status_code == 200
    assert rows.ask("select count(*) from jobguard.jobs") == [(0,)]


def test_a_token_is_needed_where_one_is_set(rows: Rows, page: Callable[..., TestClient]) -> None:
    """With a token, a program sends it in a header, and a person logs in; a wrong one is refused."""
    client = page(token=TOKEN)
    assert client.get("/").status_code == 401
    assert client.get("/live").status_code == 401
    assert client.post("/act", data={"given": "action=pause"}).status_code == 401
    to_login = client.get("/jobs", headers={"accept": "text/html"})
    assert (to_login.status_code, to_login.headers["location"]) == (303, "/login")
    assert client.post("/login", data={"token": "wrong"}).status_code == 401
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert client.get("/", headers=bearer).status_code == 200
    assert client.post("/act", data={"given": "action=pause"}, headers=bearer).status_code == 200
    assert client.get("/").status_code == 401
    logged_in = client.post("/login", data={"token": TOKEN})
    assert logged_in.status_code == 303 and TOKEN not in logged_in.headers["set-cookie"]
    assert client.get("/").status_code == 200
    until, _, signature = client.cookies["jobguard_session"].partition(".")
    client.cookies.set(
        "jobguard_session", f"{int(until) + 1}.{signature}", domain="localhost.local"
    )
    client.cookies.clear()
    client.cookies.set("jobguard_session", f"{int(until) + 1}.{signature}")
    assert client.get("/").status_code == 401
    with pytest.raises(ConfigurationError, match="too short"):
        dashboard.app("postgresql://x/y", token="short")


def test_without_a_token_only_this_machine_is_answered(
    rows: Rows, database: str, page: Callable[..., TestClient]
) -> None:
    """A page of a stranger that names us by its own host is refused, and a public address too."""
    client = page()
    assert client.get("/", headers={"host": "evil.example"}).status_code == 401
    for host in ("127.0.0.1:8797", "[::1]:8797", "localhost"):
        assert client.get("/", headers={"host": host}).status_code == 200, host
    result = CliRunner().invoke(main, ["dashboard", "--postgres", database, "--host", "0.0.0.0"])
    assert result.exit_code == 1 and "--token" in result.output


def test_it_can_be_mounted_with_the_users_own_auth(
    rows: Rows, database: str, page: Callable[..., TestClient]
) -> None:
    """Below another application's path, all links stay below it, and the person's name is noted."""

    def who(connection: HTTPConnection) -> str | None:
        return connection.headers.get("x-user")

    async def later(connection: HTTPConnection) -> str | None:
        return who(connection)

    rows.owed("j")
    for rule in (who, later):
        outer = Starlette(routes=[Mount("/ops/jobs", dashboard.app(database, authenticate=rule))])
        client = TestClient(outer, base_url="https://example.com", follow_redirects=False)
        assert client.get("/ops/jobs/").status_code == 401
        client.headers["x-user"] = "ada"
        answer = client.get("/ops/jobs/jobs")
        links = re.findall(r'(?:href|action|src)="([^"]*)"', answer.text)
        assert all(link.startswith(("/ops/jobs/", "data:", "#")) for link in links), links
        assert client.get("/ops/jobs/static/dashboard.css").status_code == 200
    asked = client.get("/ops/jobs/confirm?action=cancel&id=j")
    fields = dict(re.findall(r'name="(csrf|given)" value="([^"]*)"', asked.text))
    fields["given"] = html.unescape(fields["given"])
    assert client.post("/ops/jobs/act", data=fields).status_code == 200
    assert rows.ask("select actor from jobguard.actions") == [("ada (page)",)]


def test_an_outage_of_postgres_is_a_page_that_says_so() -> None:
    """Without PostgreSQL every page answers with 503 and the reason, and no password is in it."""
    made = dashboard.app("postgresql://u:secret@127.0.0.1:1/none")
    with TestClient(made, base_url="http://localhost") as client:
        answer = client.get("/")
    assert answer.status_code == 503 and "PostgreSQL does not answer" in answer.text
    assert "secret" not in answer.text


def test_browsers_are_told_when_something_changes(
    rows: Rows, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest differs after a change, and not because time passes; all browsers share one look."""
    from jobguard.dashboard import live
    from jobguard.operations.act import Operations

    rows.worker()
    model = Operations(lambda: database)
    watcher = live.Watcher(model, "default")
    monkeypatch.setattr(live, "INTERVAL", 0.0)
    first = watcher.digest()
    assert watcher.digest() == first
    rows.owed("j")
    assert watcher.digest() != first
    monkeypatch.setattr(live, "INTERVAL", 60.0)
    looks: list[str] = []
    monkeypatch.setattr(model, "counts", lambda *_: looks.append("counts"))
    watcher.overview()
    assert not looks
    model.close()


def test_a_postgres_that_stops_answering_is_away(database: str) -> None:
    """A page waits neither for its answer nor for those who wait already, and later pages work."""
    ledger = PostgresLedger(lambda: database, connect_timeout=0.2, answer_timeout=0.5, keep=True)

    def ask(seconds: float) -> None:
        with ledger._begin() as connection:
            connection.execute(sa.text("select pg_sleep(:seconds)"), {"seconds": seconds})

    with closing(ledger), ExitStack() as waiting:
        with pytest.raises(StoreUnavailable, match=r"no answer in 0\.5 s"):
            ask(SLOWEST)  # a server that is stopped says as little
        ask(0)
        for _ in range(4):
            waiting.enter_context(ledger._begin())
        with pytest.raises(StoreUnavailable, match="before this one"):
            ask(0)
        waiting.close()
        ask(0)


def test_a_browser_does_not_wait_for_the_look_of_another_one(database: str) -> None:
    """While one browser looks, the others get the digest from before, and keep no thread."""
    from jobguard.dashboard import live
    from jobguard.operations.act import Operations

    with closing(Operations(lambda: database)) as model:
        watcher = live.Watcher(model, "default")
        known = watcher.digest()
        with watcher._lock, ThreadPoolExecutor(1) as pool:
            assert pool.submit(watcher.digest).result(timeout=SLOWEST) == known != ""


def test_curves_have_a_point_for_each_minute() -> None:
    """The chart covers one hour without gaps, and not the minute that runs: it would seem a fall."""
    from jobguard.dashboard.views import chart_of

    now = datetime.now(UTC).replace(second=0, microsecond=0)
    rows = [
        {"minute": now - timedelta(minutes=ago), "minutes_ago": ago, "what": what, "count": count}
        for ago, what, count in (
            *((0, "completed", 5), (1, "restored", 4), (1, "dead", 1)),
            *((60, "completed", 7), (90, "completed", 9)),
        )
    ]
    chart = json.loads(json.dumps(chart_of(rows)))
    assert len(chart["minutes"]) == 60 and chart["minutes"][-1] - chart["minutes"][0] == 59 * 60
    assert {name: sum(curve) for name, curve in chart["curves"].items()} == {
        "completed": 7, "failed or dead": 1, "put back": 4
    }  # fmt: skip
    assert datetime.fromtimestamp(chart["minutes"][-1], UTC) == now - timedelta(minutes=1)
