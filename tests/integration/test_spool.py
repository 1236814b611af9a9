"""The spool on a real PostgreSQL: over a slow network, and with rows that are refused."""

from __future__ import annotations

import importlib
import os
import select
import socket
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import redis
from psycopg.conninfo import conninfo_to_dict

import jobguard
from jobguard.model import Claim, Delivery, End, Outcome, new_token
from tests.databases import rows
from tests.support import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

guards = importlib.import_module("jobguard.guard")


class Network:
    """A proxy between a host and PostgreSQL with a limited rate, or with none at all."""

    def __init__(self, database: str, rate: float) -> None:
        to = conninfo_to_dict(database)
        self._to = str(to.get("host") or "127.0.0.1"), int(to.get("port") or 5432)
        self._rate = rate
        self.closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            if self.closed:
                inner.close()
                continue
            threading.Thread(target=self._carry, args=(inner,), daemon=True).start()

    def _carry(self, inner: socket.socket) -> None:
        # Small buffers, as in a slow network: the sender notices what is not delivered yet.
        inner.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        host, port = self._to
        outer: socket.socket
        if host.startswith("/"):
            outer = socket.socket(socket.AF_UNIX)
            outer.connect(f"{host}/.s.PGSQL.{port}")
        else:
            outer = socket.create_connection((host, port))
        with inner, outer:
            while not self.closed:
                for ready in select.select([inner, outer], [], [], 0.05)[0]:
                    data = ready.recv(1 << 15)
                    if not data:
                        return
                    if ready is inner:
                        time.sleep(len(data) / self._rate)
                    (outer if ready is inner else inner).sendall(data)

    def close(self) -> None:
        """Accept no more connections."""
        self.closed = True
        with suppress(OSError):  # a thread in accept() does not notice a close
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@contextmanager
def guarded(redis_url: str, postgres: str, **settings: Any) -> Iterator[Any]:
    """Guard every queue of a Redis; give the tracker."""
    with (
        redis.Redis.from_url(redis_url) as client,
        jobguard.guard(client, postgres=postgres, retry_interval=0.1, **settings) as guard,
    ):
        yield guard._tracker


def through(network: Network, database: str) -> str:
    """Return the database's URL through this network."""
    return psycopg.conninfo.make_conninfo(database, host="127.0.0.1", port=network.port)


def delivery(job_id: str, **fields: Any) -> Delivery:
    """Return a delivery as an adapter would."""
    usual: dict[str, Any] = {"queue": "mail", "task": "t", "envelope": b"e"}
    return Delivery(token=new_token(), job_id=job_id, **(usual | fields))


def ids(database: str) -> set[str]:
    """Return the ids of owed deliveries."""
    return {str(id) for (id,) in rows(database, "select job_id from jobguard.jobs")}


def test_a_large_job_over_a_slow_network(redis_url: str, database: str) -> None:
    """A large job is recorded although it takes longer than a call may take, and it delays no other."""
    with ExitStack() as stack:
        network = Network(database, rate=2e6)
        stack.callback(network.close)
        tracker = stack.enter_context(guarded(redis_url, through(network, database)))
        tracker.connect()
        tracker.record([delivery("large", envelope=os.urandom(3_000_000))])
        tracker.record([delivery("small")])
        eventually(lambda: ids(database) == {"large", "small"}, timeout=30)
        eventually(lambda: tracker.spool.pending == 0)


@pytest.mark.parametrize(
    "odd", ["x" * 3_000, "".join(chr(0x4E00 + n * 7919 % 20_000) for n in range(30_000)), "a\x00b"]
)
def test_odd_ids_through_an_outage(redis_url: str, database: str, odd: str) -> None:
    """Jobs with odd ids are recorded, cancelled and ended during an outage, and written afterwards."""
    with ExitStack() as stack:
        network = Network(database, rate=1e9)
        stack.callback(network.close)
        tracker = stack.enter_context(guarded(redis_url, through(network, database)))
        tracker.connect()
        network.closed = True
        eventually(lambda: tracker.record([delivery("before")]).spooled)
        kept, gone = delivery(odd, fresh=True), delivery(odd + "2")
        assert tracker.record([kept]).spooled
        assert tracker.record([gone]).spooled
        tracker.cancel(job_ids=[odd + "2"])
        tracker.spool.put([End(new_token(), 0, Outcome.COMPLETED, new_token(), job_id=odd + "3")])
        assert tracker.record([delivery("after")]).spooled
        network.closed = False
        eventually(lambda: tracker.spool.pending == 0)
        assert {"before", "after"} < ids(database)
        assert tracker.spool.counts.quarantined == tracker.spool.counts.lost == 0
        session = tracker.open_session(name="w", queues=["mail"])
        assert isinstance(session.start(kept.token, lambda: kept), Claim)
        assert not isinstance(session.start(gone.token, lambda: gone), Claim)
        session.close()
