"""One session with one PostgreSQL server: the pipelined calls and the settings of the session.

Statements that belong together are sent in one batch (libpq's pipeline mode), so that a call needs one
round trip, however many statements it has. Every wait ends at a deadline that this module sets.

A session relies on no default of the role, the database or the server. On a direct connection, all
settings are made once, after the login. Behind a pooler, other clients use the same server session:
there no setting lasts longer than a transaction, and no statement has a name.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import re
import select
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import abc, pq
from psycopg.adapt import AdaptersMap, PyFormat, Transformer
from psycopg.errors import Diagnostic, error_from_result

from jobguard import os_threads
from jobguard.fork import OwnerProcess

Row = tuple[Any, ...]
Send = Callable[[], None] | None
"""Function that sends one command. None stands for a sync: the server answers all earlier commands."""
Steps = Generator[int, None, list[Any]]
"""Generator that yields READ, WRITE or both while it waits, and returns the results."""

READ, WRITE = 1, 2

_NAMES = 100
"""Largest number of statements that a session prepares by name. Further statements are sent unprepared.
"""
_MARGIN = 0.9
"""Share of our deadline: the server gives up before we do, so that the session stays usable."""
_CANCEL_SECONDS = 1.0
_CANCELS = 4

# Settings that the statements rely on. They override the defaults of the role, the database and the
# server.
_RELIED_ON = {
    "search_path": "pg_catalog",
    "TimeZone": "UTC",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "lock_timeout": "0",  # statement_timeout covers it
    "idle_in_transaction_session_timeout": "10s",
}
_SESSION = {
    "default_transaction_isolation": "read committed",
    "default_transaction_read_only": "off",
    "idle_session_timeout": "0",
}
# Settings that a server, or its platform, may lack.
_WHERE_POSSIBLE = {
    "client_connection_check_interval": "500ms",  # a backend gives up after its client has gone
    "jit": "off",
}
_SINCE_17 = {"transaction_timeout": "0"}

_logger = logging.getLogger(__name__)

_PIPELINES = psycopg.capabilities.has_pipeline()
_BEGIN_ANY = b"begin isolation level read committed"
_BEGIN = b"begin isolation level read committed read write"


@dataclass(slots=True)
class Exchange:
    """A statement that was sent and whose answer was not read yet."""

    steps: Steps
    wanted: int
    """What the next step waits for."""
    deadline: float
    at: int
    """The position of its result among the results."""
    length: int
    """The number of its commands: with or without a prepare."""
    name: bytes | None
    limit: int | None
    """The new time limit of the session, if it changes."""
    planned_at: float | None
    """When the plans were discarded, if they were."""


class DeadlinePassed(Exception):
    """Raised when the server did not answer in time."""


class NotAccepted(psycopg.OperationalError):
    """Raised for a standby: jobguard cannot write to it."""


def ready(fd: int, wanted: int, timeout: float) -> bool:
    """Wait until a descriptor can be read or written, or has an error."""
    timeout = max(0.0, min(timeout, 3600.0))
    if hasattr(select, "poll"):
        poller = select.poll()
        poller.register(
            fd,
            (select.POLLIN if wanted & READ else 0) | (select.POLLOUT if wanted & WRITE else 0),
        )
        return bool(poller.poll(timeout * 1000))
    # eventlet has no poll, but its own select takes any descriptor. Other selects take only small
    # ones.
    try:
        found = select.select(
            [fd] if wanted & READ else [], [fd] if wanted & WRITE else [], [], timeout
        )
    except ValueError as error:
        raise psycopg.OperationalError(f"the descriptor {fd} is too large: {error}") from error
    return any(found)


class Session:
    """An open connection. Only one thread uses it at a time."""

    def __init__(self, pgconn: pq.abc.PGconn, *, pooled: bool, reduced: bool, limit: float) -> None:
        pgconn.nonblocking = 1
        if _PIPELINES:
            pgconn.enter_pipeline_mode()
        self.pgconn = pgconn
        self.pooled = pooled
        self.failed_at: int | None = None
        self._under_way = False
        """True from the first command of an exchange to its last result."""
        self._limit = _milliseconds(limit)
        self._planned_at = time.monotonic()
        self._prepared: set[bytes] = set()
        self.adapters = AdaptersMap(psycopg.adapters)
        """Adapters for the values of this session; see psycopg.abc.AdaptContext."""
        self.connection = None
        self._settings = _RELIED_ON | ({} if reduced else _WHERE_POSSIBLE)
        if pgconn.server_version >= 170000 and not reduced:
            self._settings = self._settings | _SINCE_17

    @functools.cached_property
    def _transformer(self) -> abc.Transformer:
        return Transformer(self)

    @property
    def usable(self) -> bool:
        """Return True if the connection is open, as far as is known."""
        return self.pgconn.status == pq.ConnStatus.OK

    def add_notice_handler(self, handler: Callable[[Diagnostic], None]) -> None:
        """Pass the notices of the server to ``handler``; psycopg has a method of this name."""
        self.pgconn.notice_handler = lambda result: handler(Diagnostic(result))

    # -- the settings ------------------------------------------------------------------------------

    def apply_settings(self) -> Steps:
        """Apply all settings, and check that the server is reached directly and can be written.

        Behind a pooler, the backend's process id differs from the id that the login reported. In that
        case the settings end with this statement.
        """
        if self.pooled:
            return []
        other = f"pg_backend_pid() <> {self.pgconn.backend_pid}"
        values = self._settings | _SESSION | {"statement_timeout": str(self._limit)}
        query = f"select pg_is_in_recovery(), {other}, {_set(values, other)}"
        texts = [_BEGIN_ANY, self._time_limit(self._limit), query.encode(), b"commit"]
        results = yield from self.exchange([*map(self._plain, texts), None])
        for each in results:
            if _is_error(each):
                raise error_from_result(each)
        result = results[2]
        if result.get_value(0, 0) == b"t":
            raise NotAccepted("the server is a standby: it can only be read")
        self.pooled = result.get_value(0, 1) == b"t"
        return []

    # -- one call ----------------------------------------------------------------------------------

    def call(
        self,
        query: str,
        parameters: Mapping[str, Any] | None,
        *,
        budget: float,
        prepare: bool,
        plans: float,
        alone: bool = False,
    ) -> list[Row]:
        """Run one statement as a transaction and return its rows, within ``budget`` seconds.

        ``plans`` is the number of seconds for which plans are used. ``alone`` means that the statement
        cannot be part of a transaction with others. Raise psycopg.Error if the server answers with an
        error (``failed_at`` is the position of the failed command), or DeadlinePassed.
        """
        return self.finish(
            self.begin(query, parameters, budget=budget, prepare=prepare, plans=plans, alone=alone)
        )

    def begin(
        self,
        query: str,
        parameters: Mapping[str, Any] | None,
        *,
        budget: float,
        prepare: bool,
        plans: float,
        alone: bool = False,
    ) -> Exchange:
        """Send a statement, and do not wait for its answer; no other call may come before `finish`."""
        now = time.monotonic()
        limit = _milliseconds(budget)
        name, statement = self._statement(query, parameters, prepare and not self.pooled)
        replan = now - self._planned_at > plans and not alone
        relimit = not self.pooled and not limit * 0.8 <= self._limit <= limit
        before: list[Send] = []
        after: list[Send] = [None]
        if self.pooled and not alone:
            settings = f"select {_set(self._settings, 'true')}".encode()
            before = [*map(self._plain, [_BEGIN, self._time_limit(limit), settings])]
            after = [self._plain(b"commit"), None]
        if relimit:
            timeout = _set({"statement_timeout": str(limit)}, "false")
            before += [self._plain(f"select {timeout}".encode()), None]
        if replan:
            before.append(self._plain(b"discard plans"))
        steps = self.exchange([*before, *statement, *after])
        try:
            if self._under_way:
                # A signal stopped its caller between two steps. Its results would be taken for ours.
                raise psycopg.OperationalError("the exchange before was interrupted")
            self._under_way = True
            wanted = next(steps)
        except BaseException as error:
            self._broken(error)
            raise
        return Exchange(
            steps=steps,
            wanted=wanted,
            deadline=now + budget,
            at=sum(send is not None for send in before),
            length=len(statement),
            name=name,
            limit=limit if relimit else None,
            planned_at=now if replan else None,
        )

    def finish(self, begun: Exchange) -> list[Row]:
        """Wait for the answer to a statement and return its rows; see `call`."""
        results = self.run(begun.steps, begun.deadline, begun.wanted)
        at = begun.at
        prepared = begun.length == 2 and at < len(results) and results[at] is not None
        if begun.name is not None and prepared and results[at].status == pq.ExecStatus.COMMAND_OK:
            self._prepared.add(begun.name)  # this holds even if its first use failed
        self.failed_at = next((n for n, r in enumerate(results) if _is_error(r)), None)
        if self.failed_at is not None:
            if self.pgconn.transaction_status == pq.TransactionStatus.INERROR:
                rollback = self.exchange([self._plain(b"rollback"), None])
                self.run(rollback, max(begun.deadline, time.monotonic() + 0.05))
            raise error_from_result(results[self.failed_at])
        if begun.limit is not None:
            self._limit = begun.limit
        if begun.planned_at is not None:
            self._planned_at = begun.planned_at
        result = results[at + begun.length - 1]
        if result.status != pq.ExecStatus.TUPLES_OK:
            return []
        self._transformer.set_pgresult(result)
        return self._transformer.load_rows(0, result.ntuples, tuple)

    def _time_limit(self, limit: int) -> bytes:
        # This statement comes first and alone, so that the next ones run under our limit instead of
        # the role's.
        return b"set local statement_timeout = %d" % limit

    def _plain(self, query: bytes) -> Callable[[], None]:
        return lambda: self.pgconn.send_query_params(query, None)

    def _statement(
        self, query: str, parameters: Mapping[str, Any] | None, prepare: bool
    ) -> tuple[bytes | None, list[Send]]:
        """Return the name of the prepared statement (None: unprepared) and the commands to send it."""
        if parameters is None:
            text: bytes = query.encode()
            values: Sequence[Any] = ()
            types: tuple[int, ...] = ()
            formats: Sequence[int] = ()
        else:
            text, names, wanted = _converted(query)
            values = self._transformer.dump_sequence([parameters[n] for n in names], wanted)
            types = tuple(self._transformer.types or ())
            formats = list(self._transformer.formats or ())
        name = _name(text, types) if prepare else None
        pgconn = self.pgconn
        if name is None or (name not in self._prepared and len(self._prepared) >= _NAMES):
            return None, [
                lambda: pgconn.send_query_params(
                    text, values, param_types=types, param_formats=formats, result_format=1
                )
            ]
        sends: list[Send] = [
            lambda: pgconn.send_query_prepared(name, values, param_formats=formats, result_format=1)
        ]
        if name not in self._prepared:
            sends.insert(0, lambda: pgconn.send_prepare(name, text, param_types=types))
        return name, sends

    # -- the wire ----------------------------------------------------------------------------------

    def run(self, steps: Steps, deadline: float, wanted: int | None = None) -> list[Any]:
        """Take all steps. Raise DeadlinePassed and give the connection up if they take too long.

        ``wanted``: what the next step waits for, if the first one is taken already.
        """
        try:
            if wanted is None:
                wanted = next(steps)
            while ready(self.pgconn.socket, wanted, deadline - time.monotonic()):
                wanted = next(steps)
            raise DeadlinePassed
        except StopIteration as stop:
            results: list[Any] = stop.value
            self._under_way = False
            return results
        except BaseException as error:
            self._broken(error)
            raise

    def _broken(self, error: BaseException) -> None:
        """Give the connection up: an exchange with the server stopped in the middle."""
        if isinstance(error, psycopg.Error):
            self.pgconn.finish()
        else:  # a deadline passed, or a signal raised an exception in this thread (RQ's time limit)
            give_up(self.pgconn)

    def exchange(self, sends: Sequence[Send]) -> Steps:
        """Send all commands and return their results in order.

        A command that the server skipped after an error has a result too.
        """
        results: list[Any] = []
        if _PIPELINES:
            for send in sends:
                if send is None:
                    self.pgconn.pipeline_sync()
                else:
                    send()
            if self.pgconn.flush():
                yield from self._flush()
            syncs = sends.count(None)
            while syncs:
                # A result that is here needs no generator of its own.
                busy = self.pgconn.is_busy()
                result = (yield from self._result()) if busy else self.pgconn.get_result()
                if result is None:
                    self._check_open()
                elif result.status == pq.ExecStatus.PIPELINE_SYNC:
                    syncs -= 1
                else:
                    results.append(result)
            return results
        for send in sends:
            if send is None:
                continue
            send()
            yield from self._flush()
            last = None
            while (result := (yield from self._result())) is not None:
                last = result
            self._check_open()
            results.append(last)
            if _is_error(last):
                break
        return results

    def _flush(self) -> Generator[int, None, None]:
        while self.pgconn.flush():
            yield READ | WRITE
            self.pgconn.consume_input()  # a server that cannot send does not read either

    def _result(self) -> Generator[int, None, Any]:
        while self.pgconn.is_busy():
            yield READ
            self.pgconn.consume_input()
        return self.pgconn.get_result()

    def _check_open(self) -> None:
        if self.pgconn.status != pq.ConnStatus.OK:
            raise psycopg.OperationalError(message(self.pgconn))


def message(pgconn: pq.abc.PGconn) -> str:
    """Return the error message of libpq."""
    return pgconn.get_error_message().strip() or "connection failed"


def _is_error(result: Any) -> bool:
    return result is None or result.status in (
        pq.ExecStatus.FATAL_ERROR,
        pq.ExecStatus.BAD_RESPONSE,
    )


def _milliseconds(budget: float) -> int:
    return max(1, int(budget * _MARGIN * 1000))


def _set(values: Mapping[str, str], local: str) -> str:
    return ", ".join(f"set_config('{name}', '{value}', {local})" for name, value in values.items())


_PARAMETER = re.compile(r"%\((\w+)\)([sb])|%%")


@functools.lru_cache(maxsize=500)
def _converted(query: str) -> tuple[bytes, tuple[str, ...], tuple[PyFormat, ...]]:
    """Replace psycopg's placeholders by those of the protocol."""
    places: dict[tuple[str, str], int] = {}

    def place(found: re.Match[str]) -> str:
        if found[0] == "%%":
            return "%"
        return f"${places.setdefault((found[1], found[2]), len(places) + 1)}"

    text = _PARAMETER.sub(place, query).encode()
    formats = tuple(PyFormat.BINARY if kind == "b" else PyFormat.AUTO for _, kind in places)
    return text, tuple(name for name, _ in places), formats


@functools.lru_cache(maxsize=2000)
def _name(text: bytes, types: tuple[int, ...]) -> bytes:
    # The name is a hash of the statement: if this name is already prepared, it is the same
    # statement.
    return b"jobguard_" + hashlib.sha256(repr((text, types)).encode()).hexdigest()[:32].encode()


# -- giving up a session in the middle of a statement --------------------------------------------------


class _Cancels:
    """Send cancel requests for abandoned statements, in at most one thread of the process."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._owner = OwnerProcess()
        self._lock = os_threads.lock()
        self._left: deque[Any] = deque()
        self._running = False

    def take(self, pgconn: pq.abc.PGconn) -> bool:
        """Cancel the running statement and close the connection in the background.

        Return False if that is impossible.
        """
        if not self._owner.is_current:
            # These are connections of the parent process: no destructor may close them.
            _kept.append(self._left)
            self._begin()
        with self._lock:
            if len(self._left) >= _CANCELS:
                return False
            self._left.append(pgconn)
            if self._running:
                return True
            self._running = True
        try:
            os_threads.start(self._work, name="jobguard-cancel")
        except RuntimeError:  # the interpreter is shutting down
            with self._lock:
                self._running = False
                self._left.clear()
            return False
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    self._running = False
                    return
                pgconn = self._left.popleft()
            try:
                _cancel(pgconn)
            except Exception as error:  # the server's own time limit ends the statement too
                _logger.debug("a cancel request failed: %s", error)
            finally:
                pgconn.finish()


_kept: list[object] = []
_cancels = _Cancels()


def give_up(pgconn: pq.abc.PGconn) -> None:
    """Close a connection whose server may still run our statement, and ask the server to stop it.

    The socket is closed after the cancel request, because a pooler forwards such a request only for its
    connected clients. This function never waits.
    """
    if pgconn.status != pq.ConnStatus.OK or not _cancels.take(pgconn):
        pgconn.finish()


def _cancel(pgconn: pq.abc.PGconn) -> None:
    if not psycopg.capabilities.has_cancel_safe():
        # This call waits as long as it needs, but only in this thread: ctypes lets the other
        # threads run.
        if pq.__impl__ == "python":
            pgconn.get_cancel().cancel()
        return
    deadline = time.monotonic() + _CANCEL_SECONDS
    request = pgconn.cancel_conn()
    try:
        request.start()
        state = pq.PollingStatus.WRITING
        while state not in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
            poller = os_threads.poll()
            poller.register(
                request.socket,
                select.POLLIN if state == pq.PollingStatus.READING else select.POLLOUT,
            )
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return
            state = pq.PollingStatus(request.poll())
    finally:
        request.finish()
