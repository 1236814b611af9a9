"""Notices: found in the ledger, delivered with patience, and never with a secret in the log."""

from __future__ import annotations

import json
import logging
import sys
import threading
import uuid
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from jobguard.errors import ConfigurationError
from jobguard.serving.notify import Notice, Notifier, Watcher, program, receivers
from tests.support import eventually


class Ledger:
    """What the read model answers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.held: dict[str, Any] = {}
        self.paused: datetime | None = None
        self.given_up: list[dict[str, Any]] = []

    def incidents(self, namespace: str, *, limit: int) -> list[dict[str, Any]]:
        """Return the newest first."""
        return self.rows[::-1][:limit]

    def state(self, namespace: str) -> dict[str, Any]:
        """Return the brake."""
        return {"brake": {"held": self.held, "paused_at": self.paused}}

    def dead(self, namespace: str, **wanted: Any) -> list[dict[str, Any]]:
        """Return the newest first."""
        return self.given_up[::-1][: wanted["limit"]]

    def incident(self, id: int, **more: Any) -> None:
        """Add an incident."""
        row = {"id": id, "kind": "incident", "cause": "incident", "address": "r:1/0"}
        row |= {"detail": "Redis lost its data", "opened_at": datetime.now(UTC), "closed_at": None}
        self.rows.append(row | {"missing": 0, "restored": 0, "library": "rq"} | more)

    def buried(self, error: str) -> None:
        """Add a dead job."""
        row = {"token": uuid.uuid4(), "job_id": "j", "queue": "q", "task": "t", "crashes": 3}
        self.given_up.append(row | {"errors": [error], "ended_at": datetime.now(UTC)})


def watcher(ledger: Ledger) -> Watcher:
    """Return a watcher of this ledger."""
    model: Any = ledger
    return Watcher(model, "shop")


def test_each_event_is_told_once() -> None:
    """An incident, its end, a hold, a pause and a dead job give one notice each."""
    ledger = Ledger()
    ledger.incident(1, opened_at=datetime.now(UTC) - timedelta(hours=1))
    seen = watcher(ledger)
    assert seen.look() == []
    ledger.incident(2)
    ledger.held["7/mail"] = {"since": "now", "reason": "120 jobs vanished"}
    ledger.paused = datetime.now(UTC)
    ledger.buried("password=hidden")
    found = seen.look()
    assert [one.event for one in found] == ["incident", "hold", "paused", "dead"]
    assert "queue mail is held: 120 jobs vanished" in found[1].text
    assert found[3].detail["error"] == "password=***"
    assert seen.look() == []
    ledger.rows[-1] |= {"closed_at": datetime.now(UTC), "missing": 9, "restored": 9}
    (over,) = seen.look()
    assert (over.event, over.id) == ("incident_over", "incident-over-2")
    assert seen.look() == []


def test_a_new_leader_looks_back_a_little() -> None:
    """What happened in the change of the leader is told, with the id that the one before used."""
    ledger = Ledger()
    ledger.incident(5, opened_at=datetime.now(UTC) - timedelta(seconds=20))
    (first,) = watcher(ledger).look()
    later = watcher(ledger)
    later.look()
    later.rest()
    (again,) = later.look()
    assert first.id == again.id == "incident-5"


def test_a_storm_is_a_bounded_number_of_notices() -> None:
    """Beyond the bound one notice has the number of the others."""
    ledger = Ledger()
    for id in range(50):
        ledger.incident(id)
    found = watcher(ledger).look()
    assert len(found) == 21
    assert (found[-1].event, found[-1].detail["count"]) == ("more", 30)


def notice() -> Notice:
    """Return a notice."""
    detail = {"queue": "mail", "job_id": "half a pair: \ud800"}
    return Notice("hold", "hold-1", "shop", "now", "queue mail is held", detail)


def test_a_command_gets_the_notice_as_json(tmp_path: Path) -> None:
    """The command runs without a shell, and reads the notice; its failure is an error here."""
    out = tmp_path / "out; rm x"
    code = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    program(f"{sys.executable} -c {json.dumps(code)} '{out}'")(notice())
    assert json.loads(out.read_text())["detail"] == notice().detail
    with pytest.raises(Exception, match="exit status"):
        program(f"{sys.executable} -c 'raise SystemExit(3)'")(notice())


def test_a_webhook_is_tried_again_and_then_given_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that fails is asked again with pauses; what it never takes is one line without the URL."""
    asked: list[bytes] = []
    pauses: list[float] = []
    monkeypatch.setattr(Notifier, "_sleep", lambda _, seconds: pauses.append(seconds))
    fail = [2]

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.rfile.read(int(self.headers["Content-Length"])))
            fail[0] -= 1
            self.send_response(500 if fail[0] >= 0 else 204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/hook/hidden-token"
    ledger = Ledger()
    ledger.incident(1)
    with closing(
        Notifier(watcher(ledger), receivers(url, None), lambda: True, every=0.02, backoff=9.0)
    ):
        eventually(lambda: len(asked) == 3)
        assert json.loads(asked[-1])["id"] == "incident-1"
        fail[0] = 100
        with caplog.at_level(logging.ERROR, "jobguard"):
            ledger.incident(2)
            eventually(lambda: "a notice could not be delivered" in caplog.text)
    server.shutdown()
    server.server_close()
    assert len(asked) == 8
    assert len(pauses) == 6 and all(pauses)
    assert "webhook at 127.0.0.1" in caplog.text
    assert "hidden-token" not in caplog.text


def test_a_lost_notice_shows_nothing_of_its_error(caplog: pytest.LogCaptureFixture) -> None:
    """The text of an error may have the URL or the arguments of a command: only its type is logged."""
    ledger = Ledger()
    ledger.incident(1)

    def send(_: Notice) -> None:
        raise ValueError("https://chat/hidden-token")

    told = [("chat", send)]
    with closing(Notifier(watcher(ledger), told, lambda: True, every=0.02, backoff=0.001)):
        eventually(lambda: "a notice could not be delivered" in caplog.text)
    assert "ValueError" in caplog.text
    assert "hidden-token" not in caplog.text


def test_a_follower_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Only the leader delivers."""
    ledger = Ledger()
    ledger.incident(1)
    told: list[Notice] = []
    leads = [False]
    looked = threading.Event()

    def is_leader() -> bool:
        looked.set()
        return leads[0]

    with closing(Notifier(watcher(ledger), [("x", told.append)], is_leader, every=0.02)):
        assert looked.wait(20)
        assert told == []
        leads[0] = True
        eventually(lambda: len(told) == 1)


def test_wrong_receivers_are_refused() -> None:
    """A URL without a host, another scheme and an empty command are errors at the start."""
    for url in ("ftp://x/y", "http://", "no url", "http://[::1", "http://host:port/"):
        with pytest.raises(ConfigurationError):
            receivers(url, None)
    for command in ("  ", "echo 'it"):
        with pytest.raises(ConfigurationError):
            receivers(None, command)
    assert receivers(None, None) == []
