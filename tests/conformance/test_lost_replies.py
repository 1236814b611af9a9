"""A connection to Redis that breaks after the write and before the reply: the job runs once.

Nobody can know whether such a push arrived. It is accepted, or its error says that the job stays
recorded; in both cases the leader looks for it, and pushes it only if it is absent.
"""

from __future__ import annotations

import pkgutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

import jobguard
from jobguard.guard import JobGuard
from tests.conformance.conftest import LIBRARIES
from tests.conformance.library import QUEUE, Library
from tests.conformance.test_refusals import led
from tests.conformance.words import BRISK, Records
from tests.support import eventually


class Network:
    """A proxy to Redis that breaks a connection when a client sends a certain word through it."""

    def __init__(self, redis_url: str) -> None:
        to = urlsplit(redis_url)
        self._to = str(to.hostname), int(to.port or 6379)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = redis_url.replace(f":{to.port}", f":{port}")
        self.word = b""
        self.arrives = True
        """What contains the word reaches Redis, whose reply is lost; otherwise it is lost itself."""
        self.breaks = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        with suppress(OSError):  # a thread in accept() does not notice a close
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                inner, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(inner,), daemon=True).start()

    def _carry(self, inner: socket.socket) -> None:
        broken = threading.Event()
        with inner, socket.create_connection(self._to) as outer, suppress(OSError):
            back = threading.Thread(target=self._answer, args=(outer, inner, broken), daemon=True)
            back.start()
            while data := inner.recv(1 << 16):
                if self.word and self.word in data:
                    self.word, self.breaks = b"", self.breaks + 1
                    broken.set()
                    if self.arrives:
                        outer.sendall(data)
                        back.join(10)  # Redis has answered, so that it has done it.
                    return
                outer.sendall(data)

    def _answer(self, outer: socket.socket, inner: socket.socket, broken: threading.Event) -> None:
        with suppress(OSError):
            while data := outer.recv(1 << 16):
                if broken.is_set():
                    return
                inner.sendall(data)
        with suppress(OSError):
            inner.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def network(redis_url: str) -> Iterator[Network]:
    """Give a network between the host and Redis."""
    made = Network(redis_url)
    yield made
    made.close()


@pytest.mark.parametrize("arrives", [True, False], ids=["reply lost", "push lost"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_an_ambiguous_push_runs_once(
    network: Network, redis_url: str, tmp_path: Path, database: str, name: str, arrives: bool
) -> None:
    """Single sends and batches, in order, and nothing is sent twice or lost."""
    kind: type[Library] = pkgutil.resolve_name(LIBRARIES[name])
    library, direct = kind(network.url, tmp_path / "ledger"), kind(redis_url, tmp_path / "ledger")
    records, network.arrives = Records(database), arrives
    sent = ["first", "single", "one", "batched", "three", "last"]
    with (
        jobguard.guard(library.target(), postgres=database, **BRISK) as guard,
        led(database),
    ):
        library.send("say", "first", job_id="first-id")
        network.word = b"single-id"
        library.send("say", "single", job_id="single-id")
        tracker: Any = guard._tracker
        eventually(lambda: not tracker.broker_in_doubt(), 10)
        with guard.batch():
            library.send("say", "one", job_id="one-id")
            network.word = b"batched-id"
            library.send("say", "batched", job_id="batched-id")
            library.send("say", "three", job_id="three-id")
        library.send("say", "last", job_id="last-id")
        assert network.breaks == 2
        assert len(records.owed()) == len(sent)
        recovered(guard, direct, records, count=len(sent))
        library.work()
    assert sorted(library.said()) == sorted(sent)
    assert records.owed() == []
    for each in (library, direct, records):
        each.close()


def recovered(guard: JobGuard, direct: Library, records: Records, count: int) -> None:
    """Let a leader look for the jobs until all of them wait in Redis."""
    with psycopg.connect(records.database, autocommit=True) as connection:
        connection.execute("update jobguard.leader set expires_at = now()")
        connection.execute(
            "insert into jobguard.queues (source, queue, trusted_since)"
            " select id, %s, '-infinity' from jobguard.sources on conflict (source, queue)"
            " do update set trusted_since = '-infinity'",
            [QUEUE],
        )
    passes: list[Any] = []

    def all_wait() -> bool:
        passes.append(guard.reconcile())
        return len(set(direct.waiting())) >= count

    eventually(all_wait, 60)
