"""One connection to PostgreSQL that belongs to one process and never waits past its deadline.

psycopg waits for an answer as long as the server needs, and a stopped server (``SIGSTOP``, a black hole
after a failover) does not enforce ``statement_timeout``. So this module does the waiting: every step of
a login and of a statement has a deadline, and after it the connection is given up.

A connection belongs to the process that made it. A forked child neither uses nor closes the connection
of its parent: if two processes read one socket, each can get the answers of the other without any
error.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

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
    TooManyConnections,
    is_host_interrupt,
)
from jobguard.fork import OwnerProcess
from jobguard.locks import Turn
from jobguard.log import log_event
from jobguard.postgres_hosts import PRIMARY, PostgresHost, hosts_of, is_address
from jobguard.schema import GRANT_A_ROLE
from jobguard.store import texts
from jobguard.store.names import names
from jobguard.store.wire import (
    READ,
    WRITE,
    DeadlinePassed,
    Exchange,
    Row,
    Session,
    Steps,
    message,
    ready,
)

__all__ = ["NOT_MIGRATED", "NO_RIGHTS", "PLANS_SECONDS", "Connecting", "Database", "Row"]

Parameters = Mapping[str, Any] | None

# No such table, schema, column, function, type.
NOT_MIGRATED = frozenset({"42P01", "3F000", "42703", "42883", "42704"})
NO_RIGHTS = frozenset({"42501"})
_PREPARED_LOST = {"26000", "42P05"}  # the pooler gave us another server session
# A server refuses these because of the content or the size of a row: data, integrity, limits,
# checks, triggers.
_ROW_CLASSES = ("21", "22", "23", "27", "44", "54", "P0")
_ROW_STATES = {"40002", "42804", "42846", "42P18", "42P22"}
_AGAIN = {"40P01", "40001"}  # deadlock and serialization failure: the statement changed nothing
_READ_ONLY = {"25006"}
_NOT_SUPPORTED = ("0A", "22", "42")  # classes for a setting that this server does not have
_FULL = re.compile(
    r"too many (clients|connections)|connection slots|max_client_conn", re.IGNORECASE
)

# A session keeps the plans of its statements, and of those inside functions, for the table sizes at
# planning time. Our tables are empty at one moment and full at the next: a plan made for a few rows
# reads all rows for every claim, until the table is analyzed. Making new plans takes a millisecond.
PLANS_SECONDS = 5.0

_FAST, _SLOW = 20e6, 250e3
"""Bytes per second that a payload is expected to need: the first estimate, and the lowest one."""
_LARGE = 100_000
"""Smallest payload in bytes whose duration is used to measure the network."""
_MOST_FOR_PAYLOAD = 5.0
"""Largest number of extra seconds for a payload."""
_STUCK = 5.0
"""Seconds after which an unfinished login is given up."""
_TRANSLATED = (DeadlinePassed, UnicodeError, psycopg.Error)
"""Errors of a session that are raised as errors of the store."""
_SHORT = 0.02
"""Seconds in which an answer that is here already is read, after its deadline."""
_NEXT = 2.0
"""The same limit when another server is left to try."""

# Objects of the parent process in a forked child. They are kept forever, so that no destructor
# closes the parent's socket.
_inherited: list[object] = []


class Connecting:
    """A connection attempt that proceeds step by step; it waits only if the caller asks for it."""

    def __init__(self, conninfo: str) -> None:
        self._pgconn = pq.PGconn.connect_start(conninfo.encode())
        self._started = time.monotonic()
        self._state: int = pq.PollingStatus.WRITING

    @property
    def age(self) -> float:
        """Return the seconds since the attempt began."""
        return time.monotonic() - self._started

    def advance(self, wait: float = 0.0) -> pq.abc.PGconn | None:
        """Take the next steps, waiting at most ``wait`` seconds; return the connection once it is open.

        Raise psycopg.OperationalError if the attempt failed.
        """
        deadline = time.monotonic() + wait
        while True:
            if self._pgconn.status == pq.ConnStatus.BAD:
                raise psycopg.OperationalError(message(self._pgconn))
            # The socket can change between steps (several hosts, TLS retries).
            wanted = READ if self._state == pq.PollingStatus.READING else WRITE
            if not ready(self._pgconn.socket, wanted, deadline - time.monotonic()):
                return None
            self._state = self._pgconn.connect_poll()
            if self._state == pq.PollingStatus.OK:
                return self._pgconn
            if self._state == pq.PollingStatus.FAILED:
                raise psycopg.OperationalError(message(self._pgconn))

    def abandon(self) -> None:
        """Close the connection attempt."""
        self._pgconn.finish()


class Approach:
    """A step-by-step search for a server that accepts the login and can be written.

    The servers are tried one after the other, and each gets its share of the time: a server that does
    not answer cannot prevent the attempt at the next one.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        first: PostgresHost | None,
        session: Callable[[pq.abc.PGconn], Session],
    ) -> None:
        self._given = dict(given)
        self._make = session
        self._last_good = first
        self._left = deque(hosts_of(self._given))
        self.servers = list(self._left)
        known = [place.server for place in self._left]
        if first is not None and first.server in known:
            self._left.rotate(-known.index(first.server))
        if len(known) > 1:
            self._given.setdefault("target_session_attrs", PRIMARY)
        self.place: PostgresHost | None = None
        self._until = 0.0
        self._connecting: Connecting | None = None
        self._session: Session | None = None
        self._steps: Steps | None = None
        self._wanted = 0
        self._error: Exception | None = None

    def advance(self, wait: float) -> Session | None:
        """Take the next steps for at most ``wait`` seconds; return None while the search continues.

        Raise psycopg.Error or OSError if no server accepted the login.
        """
        ends = time.monotonic() + wait
        while True:
            now = time.monotonic()
            if self.place is None:
                if not self._left:
                    raise self._error or psycopg.OperationalError("no server is left to try")
                share = (ends - now) / len(self._left)
                patience = _NEXT if len(self._left) > 1 else _STUCK
                self.place = self._left.popleft()
                self._until = now + (share if wait > 0 else patience)
            try:
                session = self._step(max(0.0, min(ends, self._until) - now))
            except (psycopg.Error, OSError) as error:
                if is_host_interrupt(error):  # a TimeoutError, raised by a signal
                    raise
                self._leave(error)
                continue
            if session is not None:
                return session
            if self.place is None:  # the place was a name, and now its addresses are known
                continue
            now = time.monotonic()
            if now >= self._until and (self._left or wait == 0):
                self._leave(psycopg.OperationalError(self.late))
            elif now >= ends:
                return None

    @property
    def late(self) -> str:
        """Return the error text that names the step which missed its deadline."""
        if self.place is not None and self.place.name is not None:
            return f"the name {self.place.name} was not resolved in time"
        return "Postgres did not accept a connection in time"

    def _step(self, wait: float) -> Session | None:
        place = self.place
        assert place is not None
        ends = time.monotonic() + wait
        if place.name is not None:
            found = names.addresses(place.name, wait)
            if found is not None:
                self._resolved(place, found)
            return None
        if self._steps is None:
            if self._connecting is None:
                self._connecting = Connecting(self._conninfo(place))
            pgconn = self._connecting.advance(wait)
            if pgconn is None:
                return None
            self._connecting = None
            self._session = self._make(pgconn)
            self._steps = self._session.apply_settings()
            self._wanted = 0
        assert self._session is not None
        try:
            while not self._wanted or ready(
                self._session.pgconn.socket, self._wanted, ends - time.monotonic()
            ):
                self._wanted = next(self._steps)
        except StopIteration:
            return self._session
        return None

    def _resolved(self, place: PostgresHost, found: Sequence[str]) -> None:
        places = [PostgresHost(place.host, place.port, address) for address in found]
        if self._last_good in places:
            places.sort(key=lambda each: each != self._last_good)
        self._left.extendleft(reversed(places))
        self.place = None

    def _conninfo(self, place: PostgresHost) -> str:
        one = {"host": place.host, "port": place.port, "hostaddr": place.address}
        return make_conninfo("", **{**self._given, **{k: v or None for k, v in one.items()}})

    def _leave(self, error: Exception) -> None:
        place = self.place
        assert place is not None
        if place.address and not is_address(place.host):
            names.forget(place.host)  # the host may have a new address
        if self._error is None or not isinstance(error, OSError):
            self._error = error
        self._stop()
        self.place = None

    def _stop(self) -> None:
        if self._connecting is not None:
            self._connecting.abandon()
        if self._session is not None:
            self._session.pgconn.finish()
        self._connecting = self._session = self._steps = None

    def abandon(self) -> PostgresHost | None:
        """Stop the search; return the server where the next search begins."""
        self._stop()
        return self._left[0] if self._left else None


class Database:
    """Run statements on one PostgreSQL server, one at a time, each with a deadline."""

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
        self._owner = OwnerProcess()
        self._rate = _FAST
        self._turn = Turn()
        self._reduced = False
        self._first: PostgresHost | None = None
        self._servers: list[PostgresHost] = []
        self._connection: Session | None = None
        self._connecting: Approach | None = None
        self._flight: Flight | None = None
        self._missed_at = 0.0

    def _after_fork(self) -> None:
        _inherited.append((self._connection, self._connecting, self._flight, self._turn))
        self._owner = OwnerProcess()
        self._turn = Turn()
        self._connection = None
        self._connecting = None
        self._flight = None

    def _take(self) -> None:
        """Take the turn: the connection belongs to this thread until it frees the turn."""
        if not self._owner.is_current:
            self._after_fork()
        # Other threads may be waiting for the same stopped server; limit the sum of these waits.
        if not self._turn.take(self._connect_timeout + self._call_timeout):
            raise NotWritten("another call to Postgres is still under way")

    def execute(
        self,
        query: str,
        parameters: Parameters = None,
        *,
        timeout: float | None = None,
        payload: int = 0,
        alone: bool = False,
    ) -> list[Row]:
        """Run one statement in a transaction of its own and return its rows.

        ``payload`` is the number of bytes that are sent along. The call gets extra time for them, by
        the rate measured in recent calls: 1 s per 20 MB at first, four times as much after a missed
        deadline, and at most ``_MOST_FOR_PAYLOAD``. If the connection turns out to be lost, a new one
        is made and the statement is sent once more within the same time. So every statement must be
        safe to run twice. ``alone`` means that the statement cannot be part of a transaction with other
        statements. Raise StoreUnavailable or a subclass (NotWritten if it is certain that nothing was
        written), BadRow, or JobguardError.
        """
        budget = self._budget(timeout, payload)
        called = time.monotonic()
        self._take()
        try:
            patience = self._patience(called)
            try:
                began = time.monotonic()
                rows = self._attempt(query, parameters, budget, patience, alone)
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
                return self._attempt(query, parameters, budget, self._connect_timeout, alone)
            except _Lost as lost:
                kind = NotWritten if first.undone and lost.undone else StoreUnavailable
                raise kind(str(lost)) from (lost.__cause__ or first)
            except NotWritten as error:  # the first attempt may have written
                if first.undone:
                    raise
                raise StoreUnavailable(str(error)) from first
        finally:
            self._turn.free()

    def begin(self, query: str, parameters: Parameters, *, payload: int = 0) -> Flight:
        """Send one statement and return before its answer comes, so that the caller can work meanwhile.

        Another call reads the answer first if it needs the connection. The rest is as in `execute`: the
        statement must be safe to run twice, also after a while. Raises the same errors.
        """
        budget = self._budget(None, payload)
        called = time.monotonic()
        self._take()
        try:
            patience = self._patience(called)
            try:
                self._flight = self._send(query, parameters, budget, patience, payload)
            except _Lost as lost:
                try:
                    patience = self._connect_timeout
                    self._flight = self._send(query, parameters, budget, patience, payload)
                except _Lost:
                    raise StoreUnavailable(str(lost)) from lost
            return self._flight
        finally:
            self._turn.free()

    def _send(
        self, query: str, parameters: Parameters, budget: float, patience: float, payload: int
    ) -> Flight:
        session = self._connected(patience)
        try:
            exchange = session.begin(
                query, parameters, budget=budget, prepare=self._prepare, plans=PLANS_SECONDS
            )
        except _TRANSLATED as error:
            self._fail(session, error)
        return Flight(self, session, exchange, query, parameters, payload)

    def read(self, flight: Flight) -> list[Row]:
        """Wait for the answer to this statement; see `begin`."""
        self._take()
        try:
            if flight is self._flight:
                self._collect()
            error = flight.error
        finally:
            self._turn.free()
        if isinstance(error, _Lost):
            # The answer is lost, and perhaps the statement.
            return self.execute(flight.query, flight.parameters, payload=flight.payload)
        if error is not None:
            raise error
        return flight.rows

    def _collect(self) -> None:
        """Read the answer to the statement that is under way, and keep it for its caller."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        exchange = flight.exchange
        # The answer came in time if it is here already, however late its caller reads it.
        exchange.deadline = max(exchange.deadline, time.monotonic() + _SHORT)
        try:
            try:
                flight.rows = flight.session.finish(exchange)
            except _TRANSLATED as error:
                self._fail(flight.session, error)
        except (_Lost, JobguardError) as error:
            flight.error = error
        except BaseException as error:  # a signal raised it in this thread
            flight.error = StoreUnavailable(f"the answer was not read: {error!r}")
            raise

    def _patience(self, called: float) -> float:
        """Read the answer that is due, and return the seconds to wait for a new connection.

        They are 0 if the statement of another caller missed its deadline while this one, which called
        at ``called``, waited for its turn: one outage causes one wait.
        """
        if self._flight is not None:
            self._collect()
        return 0.0 if self._missed_at > called else self._connect_timeout

    def _budget(self, timeout: float | None, payload: int) -> float:
        budget = self._call_timeout if timeout is None else timeout
        return budget + min(payload / self._rate, _MOST_FOR_PAYLOAD)

    def _attempt(
        self,
        query: str,
        parameters: Parameters,
        budget: float,
        patience: float,
        alone: bool,
    ) -> list[Row]:
        session = self._connected(patience)
        try:
            return session.call(
                query,
                parameters,
                budget=budget,
                prepare=self._prepare,
                plans=PLANS_SECONDS,
                alone=alone,
            )
        except _TRANSLATED as error:
            self._fail(session, error)

    def _fail(self, session: Session, error: Exception) -> NoReturn:
        """Raise the error of a call as one of the store, and drop a connection that is lost."""
        if isinstance(error, DeadlinePassed):
            # A second try would wait as long again. One outage causes one wait.
            self._drop(elsewhere=True)
            self._missed_at = time.monotonic()
            raise StoreUnavailable("Postgres did not answer in time") from error
        if isinstance(error, UnicodeError):  # PostgreSQL refuses one half of a surrogate pair
            raise BadRow(str(error)) from error
        state = getattr(error, "sqlstate", None) or ""
        if not session.usable:
            self._drop()
            raise _Lost(str(error)) from error
        if state in _PREPARED_LOST and self._prepare:
            log_event("pooler_found")
            self._prepare = False
            self._drop()
            raise _Lost(str(error), undone=True) from error
        if state in _READ_ONLY or (session.failed_at == 0 and session.pooled and state[:2] == "0A"):
            self._drop(elsewhere=True)
            raise _Lost(str(error), undone=True) from error
        if session.failed_at == 2 and session.pooled and state[:2] in _NOT_SUPPORTED:
            self._reduce(error)
            self._drop()
            raise _Lost(str(error), undone=True) from error
        if state in _AGAIN:
            raise _Lost(str(error), undone=True) from error
        raise self._translated(error) from error

    def _connected(self, patience: float) -> Session:
        if self._connection is not None and self._connection.usable:
            return self._connection
        self._drop()
        if not self._probe(patience):
            late = self._connecting.late if self._connecting is not None else ""
            self._abandon_connecting()
            raise NotWritten(late or "Postgres did not accept a connection in time")
        assert self._connection is not None
        return self._connection

    def probe(self, wait: float = 0.0) -> bool:
        """Continue a connection attempt for at most ``wait`` seconds; return True once it is open.

        With ``wait=0`` this method never blocks: a producer without threads can find out, call by call,
        whether PostgreSQL is back. Raise StoreUnavailable if the attempt failed.
        """
        self._take()
        try:
            return self._probe(wait)
        finally:
            self._turn.free()

    def _probe(self, wait: float) -> bool:
        if self._connection is not None and self._connection.usable:
            return True
        try:
            if self._connecting is None:
                self._connecting = Approach(self._where(), self._first, self._session)
            session = self._connecting.advance(wait)
        except (psycopg.Error, OSError) as error:
            self._abandon_connecting()
            if is_host_interrupt(error):
                raise
            state = getattr(error, "sqlstate", None) or ""
            if state[:2] in _NOT_SUPPORTED and not self._reduced:
                self._reduce(error)
                return self._probe(wait)
            raise self._translated(error) from error
        except BaseException:  # an exception that a signal raised in this thread
            self._abandon_connecting()
            raise
        if session is None:
            return False
        self._first, self._servers = self._connecting.place, self._connecting.servers
        self._connecting = None
        if session.pooled and self._prepare:
            log_event("pooler_found")
            self._prepare = False
        texts.register(session)
        self._connection = session
        return True

    def _session(self, pgconn: pq.abc.PGconn) -> Session:
        return Session(
            pgconn, pooled=not self._prepare, reduced=self._reduced, limit=self._call_timeout
        )

    def _reduce(self, error: Exception) -> None:
        self._reduced = True
        log_event("settings_reduced", error=str(error))

    def _where(self) -> dict[str, Any]:
        given = conninfo_to_dict(self._conninfo())
        given.setdefault("application_name", self._application_name)
        given["client_encoding"] = "utf8"
        return given

    def _abandon_connecting(self) -> None:
        if self._connecting is not None:
            self._first = self._connecting.abandon()
            self._connecting = None

    def _drop(self, *, elsewhere: bool = False) -> None:
        """Close the connection; ``elsewhere`` makes the next search begin with another server."""
        if self._connection is not None:
            self._connection.pgconn.finish()
            self._connection = None
        if elsewhere and self._first is not None:
            names.forget(self._first.host)
            known = [place.server for place in self._servers]
            if self._first.server in known:
                after = known.index(self._first.server) + 1
                self._first = self._servers[after % len(known)]

    def close(self) -> None:
        """Close the connection; the next call makes a new one."""
        self._take()
        try:
            self._collect()
            self._drop()
            self._abandon_connecting()
        finally:
            self._turn.free()

    @staticmethod
    def _translated(error: Exception) -> JobguardError:
        state = getattr(error, "sqlstate", None) or ""
        text = str(error).strip()
        if state in NOT_MIGRATED:
            return NotMigrated(f"{text} — run `jobguard migrate`")
        if state in NO_RIGHTS:
            return NoRights(f"{text}: {GRANT_A_ROLE}")
        if state[:2] in _ROW_CLASSES or state in _ROW_STATES:
            return BadRow(text)
        if not state and isinstance(error, psycopg.DataError | psycopg.ProgrammingError):
            return BadRow(text)  # psycopg itself refused the value
        if state == "53300" or (not state and _FULL.search(text)):
            return TooManyConnections(
                f"{text}: raise max_connections, or the limit of the role or the database; each "
                "process holds one connection, a worker two"
            )
        return NotWritten(text)


class Flight:
    """A statement that was sent; its answer is still to be read."""

    __slots__ = (
        "_database",
        "error",
        "exchange",
        "parameters",
        "payload",
        "query",
        "rows",
        "session",
    )

    def __init__(
        self,
        database: Database,
        session: Session,
        exchange: Exchange,
        query: str,
        parameters: Parameters,
        payload: int,
    ) -> None:
        self._database = database
        self.session, self.exchange = session, exchange
        self.query, self.parameters, self.payload = query, parameters, payload
        self.rows: list[Row] = []
        self.error: Exception | None = None

    def read(self) -> list[Row]:
        """Wait for the answer and return its rows. Raises the errors of `Database.execute`."""
        return self._database.read(self)


class _Lost(Exception):
    """Raised when the connection was lost or the statement was undone: it can be sent again."""

    def __init__(self, text: str, *, undone: bool = False) -> None:
        super().__init__(text)
        self.undone = undone
