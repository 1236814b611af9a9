"""The application's own connections, of several drivers, as a transaction uses them.

Nothing of the session is changed: no setting, no prepared statement, no row factory. A driver is imported
only if the application has given one of its connections.
"""

from __future__ import annotations

import importlib
import re
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from typing import Any

from jobguard.errors import ConfigurationError, UnsupportedTarget
from jobguard.schema import statements

_PARAMETER = re.compile(r"%\((\w+)\)s")
_SUPPORTED = (
    "a psycopg connection or cursor, a SQLAlchemy Connection or Session, or a Django connection"
)
_SUPPORTED_ASYNC = (
    "a psycopg AsyncConnection, a SQLAlchemy AsyncConnection or AsyncSession, "
    "or a connection of asyncpg"
)


class Caller(ABC):
    """One connection of the application."""

    autocommits = False
    """True if the driver cannot open a transaction on the connection as it is set."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """True if no transaction is open."""

    @abstractmethod
    def begin(self) -> AbstractContextManager[bool]:
        """Open a transaction, or a savepoint in the open one; give True if its end is the commit."""

    @abstractmethod
    def on_commit(self, then: Callable[[], None]) -> None:
        """Call ``then`` soon after the open transaction has ended, or never."""

    @abstractmethod
    def execute(self, name: str, **values: str) -> Sequence[Any]:
        """Execute a statement and return its first row."""

    def record(self, source: str, rows: str) -> None:
        """Record deliveries."""
        self.execute("record_in_transaction", source=source, rows=rows)

    def installation(self) -> str:
        """Return the identity of the ledger in this database. Raises as the driver does."""
        try:
            return str(self.execute("installation_id")[0])
        except Exception as error:
            raise unreadable(error) from error


def unreadable(error: Exception) -> Exception:
    """Return the error for a ledger that the connection cannot read."""
    return ConfigurationError(
        f"this connection cannot read the ledger of jobguard: {str(error).strip()}. The ledger must be in "
        "the same database (`jobguard migrate`), and the role needs the rights of jobguard_app"
    )


class PsycopgCaller(Caller):
    """A connection of psycopg 3."""

    @property
    def is_idle(self) -> bool:
        """True if no transaction is open."""
        return _is_idle(self.connection)

    @contextmanager
    def begin(self) -> Iterator[bool]:
        """Open psycopg's own transaction block."""
        owns = self.is_idle
        with self.connection.transaction():
            yield owns

    def execute(self, name: str, **values: str) -> Sequence[Any]:
        """Execute a statement on a plain cursor."""
        psycopg = importlib.import_module("psycopg")
        with psycopg.Cursor(self.connection, row_factory=psycopg.rows.tuple_row) as cursor:
            cursor.execute(statement(name), values, prepare=False)
            row: Sequence[Any] = cursor.fetchone()
            return row

    def on_commit(self, then: Callable[[], None]) -> None:
        """Hook the next call of the connection's commit; psycopg's outer blocks do not call it."""
        known = weakref.ref(self.connection)
        if "commit" in vars(self.connection):
            return

        def commit() -> None:
            it = known()
            assert it is not None
            vars(it).pop("commit", None)
            it.commit()
            then()

        self.connection.commit = commit


def _is_idle(connection: Any) -> bool:
    return str(connection.info.transaction_status.name) == "IDLE"


class SqlalchemyCaller(Caller):
    """A Connection or a Session of SQLAlchemy."""

    def __init__(self, connection: Any, *, is_session: bool) -> None:
        super().__init__(connection)
        self._is_session = is_session

    @property
    def is_idle(self) -> bool:
        """True if no transaction is open."""
        return not self.connection.in_transaction()

    @property
    def _core(self) -> Any:
        return self.connection.connection() if self._is_session else self.connection

    @contextmanager
    def begin(self) -> Iterator[bool]:
        """Open SQLAlchemy's own transaction block."""
        owns = self.is_idle
        with self.connection.begin() if owns else self.connection.begin_nested():
            self.autocommits = self.is_autocommit()
            yield owns

    def is_autocommit(self) -> bool:
        """Return True if the driver ends a transaction after each statement."""
        return bool(getattr(self._core.connection.dbapi_connection, "autocommit", False))

    def execute(self, name: str, **values: str) -> Sequence[Any]:
        """Execute a statement; SQLAlchemy translates its parameters for the driver."""
        text = importlib.import_module("sqlalchemy").text(_PARAMETER.sub(r":\1", statement(name)))
        row: Sequence[Any] = self._core.execute(text, values).fetchone()
        return row

    def on_commit(self, then: Callable[[], None]) -> None:
        """Listen for the end of the transaction.

        SQLAlchemy has no event after the commit of a Connection. The next event is that it begins again,
        or goes back to its pool.
        """
        if self._is_session:
            _sessions[self.connection] = then
        else:
            raw = self.connection.connection.dbapi_connection
            _connections[self.connection] = (raw, then)
        listened = self.connection if self._is_session else self.connection.engine
        if listened in _listened:
            return
        _listened.add(listened)
        listen = importlib.import_module("sqlalchemy.event").listen
        if self._is_session:
            listen(listened, "after_transaction_end", _session_ended)
        else:
            listen(listened, "begin", _connection_began)
            listen(listened, "checkin", _connection_returned)


_listened: weakref.WeakSet[Any] = weakref.WeakSet()
_sessions: weakref.WeakKeyDictionary[Any, Callable[[], None]] = weakref.WeakKeyDictionary()
_connections: weakref.WeakKeyDictionary[Any, tuple[Any, Callable[[], None]]] = (
    weakref.WeakKeyDictionary()
)


def _session_ended(session: Any, transaction: Any) -> None:
    then = _sessions.pop(session, None) if transaction.parent is None else None
    if then is not None:
        then()


def _connection_began(connection: Any) -> None:
    _, then = _connections.pop(connection, (None, None))
    if then is not None:
        then()


def _connection_returned(raw: Any, _record: Any) -> None:
    for connection, (theirs, _) in list(_connections.items()):
        if theirs is raw:
            _connection_began(connection)


class DjangoCaller(Caller):
    """A connection of Django."""

    def __init__(self, connection: Any, **options: Any) -> None:
        super().__init__(connection)
        self._options = options
        self._db = importlib.import_module("django.db.transaction")

    @property
    def is_idle(self) -> bool:
        """True if no block of Django is open; its hook is called only after a commit."""
        return bool(self.connection.autocommit) and not self.connection.in_atomic_block

    @contextmanager
    def begin(self) -> Iterator[bool]:
        """Open Django's own atomic block."""
        with self._db.atomic(using=self.connection.alias, **self._options):
            yield False

    def execute(self, name: str, **values: str) -> Sequence[Any]:
        """Execute a statement on a cursor of Django."""
        with self.connection.cursor() as cursor:
            cursor.execute(statement(name), values)
            row: Sequence[Any] = cursor.fetchone()
            return row

    def on_commit(self, then: Callable[[], None]) -> None:
        """Let Django call it after the commit; with autocommit switched off, Django has no such hook."""
        if self.connection.in_atomic_block or self.connection.autocommit:
            self._db.on_commit(then, using=self.connection.alias, robust=True)


def caller_of(connection: Any, **options: Any) -> Caller:
    """Return the caller for a connection of a supported driver. Raises UnsupportedTarget."""
    kinds = _kinds(connection)
    if "psycopg.Cursor" in kinds:
        return caller_of(connection.connection)
    if "psycopg.Connection" in kinds:
        return PsycopgCaller(connection)
    if "sqlalchemy.Connection" in kinds:
        return SqlalchemyCaller(connection, is_session=False)
    if "sqlalchemy.scoped_session" in kinds:
        return caller_of(connection())
    if "sqlalchemy.Session" in kinds:
        return SqlalchemyCaller(connection, is_session=True)
    if "django.BaseDatabaseWrapper" in kinds:
        return DjangoCaller(connection, **options)
    if "django.ConnectionProxy" in kinds:
        return caller_of(connection._connections[connection._alias], **options)
    if kinds & set(_ASYNC):
        raise UnsupportedTarget(f"{_name(connection)} is asynchronous: use atransaction()")
    raise UnsupportedTarget(f"transaction() does not know {_name(connection)}: give {_SUPPORTED}")


# -- asyncio ---------------------------------------------------------------------------------------


class AsyncCaller(ABC):
    """One asynchronous connection of the application; see Caller."""

    autocommits = False

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """True if no transaction is open."""

    @abstractmethod
    def begin(self) -> Any:
        """Open a transaction or a savepoint; give True if its end is the commit."""

    @abstractmethod
    async def execute(self, name: str, **values: str) -> Sequence[Any]:
        """Execute a statement and return its first row."""

    def on_commit(self, then: Callable[[], None]) -> None:  # noqa: B027 - few drivers have a hook
        """Call ``then`` soon after the open transaction has ended, or never."""

    async def record(self, source: str, rows: str) -> None:
        """Record deliveries."""
        await self.execute("record_in_transaction", source=source, rows=rows)

    async def installation(self) -> str:
        """Return the identity of the ledger in this database."""
        try:
            return str((await self.execute("installation_id"))[0])
        except Exception as error:
            raise unreadable(error) from error


class AsyncPsycopgCaller(AsyncCaller):
    """An AsyncConnection of psycopg 3."""

    @property
    def is_idle(self) -> bool:
        """True if no transaction is open."""
        return _is_idle(self.connection)

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[bool]:
        """Open psycopg's own transaction block."""
        owns = self.is_idle
        async with self.connection.transaction():
            yield owns

    async def execute(self, name: str, **values: str) -> Sequence[Any]:
        """Execute a statement on a plain cursor."""
        psycopg = importlib.import_module("psycopg")
        async with psycopg.AsyncCursor(
            self.connection, row_factory=psycopg.rows.tuple_row
        ) as cursor:
            await cursor.execute(statement(name), values, prepare=False)
            row: Sequence[Any] = await cursor.fetchone()
            return row


class AsyncSqlalchemyCaller(AsyncCaller):
    """An AsyncConnection or AsyncSession of SQLAlchemy, by its synchronous counterpart."""

    def __init__(self, connection: Any, inner: SqlalchemyCaller) -> None:
        super().__init__(inner.connection)
        self._outer = connection
        self._inner = inner

    @property
    def is_idle(self) -> bool:
        """True if no transaction is open."""
        return self._inner.is_idle

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[bool]:
        """Open SQLAlchemy's own transaction block."""
        owns = self.is_idle
        async with self._outer.begin() if owns else self._outer.begin_nested():
            self.autocommits = await self._outer.run_sync(lambda _sync: self._inner.is_autocommit())
            yield owns

    async def execute(self, name: str, **values: str) -> Sequence[Any]:
        """Execute a statement as the synchronous caller does."""
        row: Sequence[Any] = await self._outer.run_sync(
            lambda _sync: self._inner.execute(name, **values)
        )
        return row

    def on_commit(self, then: Callable[[], None]) -> None:
        """Listen for the end of the transaction."""
        self._inner.on_commit(then)


class AsyncpgCaller(AsyncCaller):
    """A connection of asyncpg, which has no hook for a commit: the leader pushes after an outer block."""

    @property
    def is_idle(self) -> bool:
        """True if no transaction is open."""
        return not self.connection.is_in_transaction()

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[bool]:
        """Open asyncpg's own transaction block."""
        owns = self.is_idle
        async with self.connection.transaction():
            yield owns

    async def execute(self, name: str, **values: str) -> Sequence[Any]:
        """Execute a statement with numbered parameters."""
        names = list(values)
        query = _PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", statement(name))
        row: Sequence[Any] = await self.connection.fetchrow(query, *values.values())
        return row


_ASYNC = (
    "psycopg.AsyncConnection",
    "sqlalchemy.AsyncConnection",
    "sqlalchemy.AsyncSession",
    "asyncpg.Connection",
    "asyncpg.PoolConnectionProxy",
)


def async_caller_of(connection: Any) -> AsyncCaller:
    """Return the caller for an asynchronous connection. Raises UnsupportedTarget."""
    kinds = _kinds(connection)
    if "psycopg.AsyncCursor" in kinds:
        return async_caller_of(connection.connection)
    if "psycopg.AsyncConnection" in kinds:
        return AsyncPsycopgCaller(connection)
    if "sqlalchemy.AsyncConnection" in kinds:
        inner = SqlalchemyCaller(connection.sync_connection, is_session=False)
        return AsyncSqlalchemyCaller(connection, inner)
    if "sqlalchemy.AsyncSession" in kinds:
        inner = SqlalchemyCaller(connection.sync_session, is_session=True)
        return AsyncSqlalchemyCaller(connection, inner)
    if "asyncpg.PoolConnectionProxy" in kinds:
        return async_caller_of(connection._con)
    if "asyncpg.Connection" in kinds:
        return AsyncpgCaller(connection)
    raise UnsupportedTarget(
        f"atransaction() does not know {_name(connection)}: give {_SUPPORTED_ASYNC}"
    )


def statement(name: str) -> str:
    """Return a statement for a connection of the application."""
    return statements()[name]


def _kinds(connection: Any) -> set[str]:
    """Return the classes of an object as ``package.Class``."""
    return {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(connection).__mro__}


def _name(connection: Any) -> str:
    return f"{type(connection).__module__}.{type(connection).__qualname__}"
