"""One connection to Postgres that belongs to one process and never waits longer than it was told.

psycopg waits for an answer as long as the server needs, and a server that is stopped
(``SIGSTOP``, a black hole after a failover) honours no ``statement_timeout``. So the waiting is ours:
``_Bounded.wait`` polls the socket up to a deadline, then gives the connection up.

A connection belongs to the process that made it. A child after a fork neither uses nor closes its
parent's: two processes reading one socket get each other's answers, silently.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from jobguard.errors import (
    BadRow,
    JobguardError,
    NoRights,
    NotMigrated,
    NotWritten,
    StoreUnavailable,
)
from jobguard.log import say
from jobguard.store import texts

Row = tuple[Any, ...]
Parameters = Mapping[str, Any] | Sequence[Any] | None

_NOT_MIGRATED = {
    "42P01",
    "3F000",
    "42703",
    "42883",
    "42704",
}  # table, schema, column, function, type
_NO_RIGHTS = {"42501"}
_PREPARED_LOST = {"26000", "42P05"}  # behind a pooler that hands out other sessions
# What is refused for what is in the row, or for its size: data, integrity, limits, checks, triggers.
_ROW_CLASSES = ("21", "22", "23", "27", "44", "54", "P0")
_ROW_STATES = {"40002", "42804", "42846", "42P18", "42P22"}
_AGAIN = {"40P01", "40001"}  # deadlock and serialization: the statement did nothing

# A session keeps the plans of its statements, and of those inside functions, for the sizes that tables
# had when they were made. Ours are empty at one moment and full at the next: a plan made for a few rows
# reads all of them for every claim, until somebody analyzes the table. New plans take a millisecond.
PLANS_SECONDS = 5.0

_FAST, _SLOW = 20e6, 250e3
"""Bytes a second that a payload is given time for: at first, and at last."""
_LARGE = 100_000
"""Bytes of a payload of which the time says something about the network."""
_MOST_FOR_PAYLOAD = 5.0
"""Seconds that a payload may take."""

# What a fork leaves behind in the child. Kept for ever, so that no destructor closes the parent's socket.
_inherited: list[object] = []


class _DeadlinePassed(Exception):
    """The server did not answer in time."""


class _Bounded(psycopg.Connection[Row]):
    """A psycopg connection whose every wait ends at ``deadline`` (monotonic seconds)."""

    deadline: float = float("inf")
    planned_at: float = 0.0

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        """Run a psycopg generator to its end or to the deadline.

        The protocol is that of ``psycopg.waiting``: the generator says what it waits for
        (1 read, 2 write, 3 either) and is told what is ready.
        """
        try:
            wanted = int(next(gen))
            poller = select.poll()
            poller.register(self.pgconn.socket, _EVENTS[wanted])
            while True:
                left = self.deadline - time.monotonic()
                events = poller.poll(max(0.0, min(left, 3600.0)) * 1000)
                if not events:
                    raise _DeadlinePassed
                wanted = int(gen.send(_ready(events[0][1], wanted)))
                poller.modify(self.pgconn.socket, _EVENTS[wanted])
        except StopIteration as stop:
            return stop.value
        except psycopg.Error:
            raise
        except BaseException:
            # Not an answer of the server: a deadline, or an exception thrown into this thread by a
            # signal (RQ's time limit). The conversation is broken off in the middle.
            self.pgconn.finish()
            raise


_EVENTS = {
    1: select.POLLIN,
    2: select.POLLOUT,
    3: select.POLLIN | select.POLLOUT,
}


def _ready(event: int, wanted: int) -> int:
    ready = (1 if event & select.POLLIN else 0) | (2 if event & select.POLLOUT else 0)
    return ready or wanted  # an error or a hang-up: let libpq find it on its next read


class Connecting:
    """A connection under way, carried on by whoever comes along; waits only if told to."""

    def __init__(self, conninfo: str) -> None:
        self._pgconn = pq.PGconn.connect_start(conninfo.encode())
        self._started = time.monotonic()
        self._state: int = pq.PollingStatus.WRITING

    @property
    def age(self) -> float:
        """Seconds since it was begun."""
        return time.monotonic() - self._started

    def advance(self, wait: float = 0.0) -> pq.abc.PGconn | None:
        """Take the next steps that need no waiting beyond ``wait`` seconds; the connection when it stands.

        Raises psycopg.OperationalError if it failed.
        """
        deadline = time.monotonic() + wait
        while True:
            if self._pgconn.status == pq.ConnStatus.BAD:
                raise psycopg.OperationalError(_message(self._pgconn))
            # The socket can change from step to step (several hosts, TLS retries).
            poller = select.poll()
            event = select.POLLIN if self._state == pq.PollingStatus.READING else select.POLLOUT
            poller.register(self._pgconn.socket, event)
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return None
            self._state = self._pgconn.connect_poll()
            if self._state == pq.PollingStatus.OK:
                return self._pgconn
            if self._state == pq.PollingStatus.FAILED:
                raise psycopg.OperationalError(_message(self._pgconn))

    def abandon(self) -> None:
        """Give it up."""
        self._pgconn.finish()


def _message(pgconn: pq.abc.PGconn) -> str:
    return pgconn.get_error_message().strip() or "connection failed"


class Database:
    """Statements to one Postgres, one at a time, each answered by its deadline or not at all."""

    def __init__(
        self,
        conninfo: Callable[[], str],
        *,
        connect_timeout: float,
        call_timeout: float,
        pooler: bool = False,
        application_name: str = "jobguard",
    ) -> None:
        self._conninfo = conninfo
        self._connect_timeout = connect_timeout
        self._call_timeout = call_timeout
        self._prepare = not pooler
        self._application_name = application_name
        self._pid = os.getpid()
        self._rate = _FAST
        self._lock = threading.RLock()
        self._connection: _Bounded | None = None
        self._connecting: Connecting | None = None

    def _after_fork(self) -> None:
        _inherited.append((self._connection, self._connecting, self._lock))
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._connection = None
        self._connecting = None

    @contextmanager
    def _mine(self) -> Iterator[None]:
        if self._pid != os.getpid():
            self._after_fork()
        # Others may be waiting for the same stopped server; nobody waits for all of their waits.
        if not self._lock.acquire(timeout=self._connect_timeout + self._call_timeout):
            raise NotWritten("another call to Postgres is still under way")
        try:
            yield
        finally:
            self._lock.release()

    def execute(
        self,
        query: str,
        parameters: Parameters = None,
        *,
        timeout: float | None = None,
        payload: int = 0,
    ) -> list[Row]:
        """Run one statement in a transaction of its own and return its rows.

        ``payload`` is how many bytes are sent along. They are given the time that they took of late: 1 s
        per 20 MB at first, four times as much after a miss, ``_MOST_FOR_PAYLOAD`` at most.
        A connection that turns out to be lost is made anew and the statement sent once more, within
        the same time: so every statement must be one that may run twice.
        Raises StoreUnavailable or one of its kinds (NotWritten where that is certain), BadRow, or
        JobguardError.
        """
        budget = self._call_timeout if timeout is None else timeout
        budget += min(payload / self._rate, _MOST_FOR_PAYLOAD)
        with self._mine():
            try:
                began = time.monotonic()
                rows = self._attempt(query, parameters, budget)
                if payload > _LARGE:
                    self._rate = min(_FAST, payload / (time.monotonic() - began) / 2)
                return rows
            except _Lost as lost:
                first = lost
            except StoreUnavailable:
                if payload > _LARGE:
                    self._rate = max(_SLOW, self._rate / 4)
                raise
            try:
                return self._attempt(query, parameters, budget)
            except _Lost as lost:
                raise StoreUnavailable(str(lost)) from (lost.__cause__ or first)
            except NotWritten as error:  # the first may have been, for all that
                raise StoreUnavailable(str(error)) from first

    def _attempt(self, query: str, parameters: Parameters, budget: float) -> list[Row]:
        connection = self._connected()
        now = time.monotonic()
        connection.deadline = now + budget
        try:
            if now - connection.planned_at > PLANS_SECONDS:
                connection.execute("discard plans", prepare=False)
                connection.planned_at = now
            return _rows(connection, query, parameters, self._prepare)
        except _DeadlinePassed as error:
            # A second try would wait as long again: this outage has had its one wait.
            self._drop()
            raise StoreUnavailable("Postgres did not answer in time") from error
        except UnicodeError as error:  # half a surrogate pair is no text to Postgres
            raise BadRow(str(error)) from error
        except psycopg.Error as error:
            if error.sqlstate in _PREPARED_LOST and self._prepare:
                say("pooler_found")
                self._prepare = False
                self._drop()
                raise _Lost(str(error)) from error
            if error.sqlstate in _AGAIN:
                raise _Lost(str(error)) from error
            if connection.pgconn.status != pq.ConnStatus.OK:
                self._drop()
                raise _Lost(str(error)) from error
            raise self._translated(error) from error

    def _connected(self) -> _Bounded:
        if self._connection is not None and self._connection.pgconn.status == pq.ConnStatus.OK:
            return self._connection
        self._drop()
        if not self.probe(wait=self._connect_timeout):
            self._abandon_connecting()
            raise NotWritten("Postgres did not accept a connection in time")
        assert self._connection is not None
        return self._connection

    def probe(self, wait: float = 0.0) -> bool:
        """Carry a connection on, waiting ``wait`` seconds at most; True when it stands.

        With ``wait=0`` this never blocks: a producer without threads can find out, call by call,
        whether Postgres is back. Raises StoreUnavailable if the attempt failed.
        """
        with self._mine():
            if self._connection is not None and self._connection.pgconn.status == pq.ConnStatus.OK:
                return True
            try:
                if self._connecting is not None and self._connecting.age > 5.0:
                    self._abandon_connecting()  # stuck in a server that answers no longer
                if self._connecting is None:
                    self._connecting = Connecting(self._full_conninfo())
                pgconn = self._connecting.advance(wait)
            except psycopg.Error as error:
                self._abandon_connecting()
                raise self._translated(error) from error
            if pgconn is None:
                return False
            self._connecting = None
            pgconn.nonblocking = 1
            connection = _Bounded(cast(Any, pgconn))
            connection._autocommit = True  # before any statement; the setter would send one
            connection.prepare_threshold = 0 if self._prepare else None
            connection.planned_at = time.monotonic()
            texts.register(connection)
            self._connection = connection
            return True

    def _full_conninfo(self) -> str:
        given = conninfo_to_dict(self._conninfo())
        given.setdefault("application_name", self._application_name)
        given["client_encoding"] = "utf8"
        return make_conninfo("", **given)

    def _abandon_connecting(self) -> None:
        if self._connecting is not None:
            self._connecting.abandon()
            self._connecting = None

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.pgconn.finish()
            self._connection = None

    def close(self) -> None:
        """Let go of the connection; the next call makes a new one."""
        with self._mine():
            self._drop()
            self._abandon_connecting()

    @staticmethod
    def _translated(error: psycopg.Error) -> JobguardError:
        state = error.sqlstate or ""
        text = str(error).strip()
        if state in _NOT_MIGRATED:
            return NotMigrated(f"{text} — run `jobguard migrate`")
        if state in _NO_RIGHTS:
            return NoRights(f'{text} — see "Roles and grants" in the README')
        if state[:2] in _ROW_CLASSES or state in _ROW_STATES:
            return BadRow(text)
        if not state and isinstance(error, psycopg.DataError | psycopg.ProgrammingError):
            return BadRow(text)  # psycopg itself refused it
        return NotWritten(text)


class _Lost(Exception):
    """The connection was lost, or the statement undone: it may be sent again."""


def _rows(connection: _Bounded, query: str, parameters: Parameters, prepare: bool) -> list[Row]:
    cursor = connection.execute(query, parameters, prepare=prepare, binary=True)
    return cursor.fetchall() if cursor.description is not None else []
