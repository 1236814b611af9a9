"""Record what is sent inside ``guard.transaction(connection)`` in the application's own transaction.

Each job is recorded on the connection of the application, so that it exists if, and only if, the
transaction commits. With its row goes a row of the outbox. After the commit, this process takes the
push of its jobs: it asks the ledger on its own connection which of them are committed, and pushes
those. The leader pushes all others, so that no job depends on this process.

Only the ledger says what is committed. A hook of the driver says when it is worth asking.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from jobguard import failpoint
from jobguard.errors import ConfigurationError, NotTransactional
from jobguard.fork import OwnerProcess
from jobguard.host import batch as batches
from jobguard.host_safety import contain_errors
from jobguard.locks import lock
from jobguard.log import log_event
from jobguard.model import Delivery, Recorded
from jobguard.store import texts

if TYPE_CHECKING:
    from jobguard.adapter import Source
    from jobguard.host.callers import AsyncCaller, Caller

_MOST_KEPT = 10_000
_MOST_BYTES = 64 * 2**20
"""The pushes that a transaction keeps for its commit; the leader does the rest."""
_STATEMENT = 1_000
"""Deliveries in one statement."""


class TransactionTracker(Protocol):
    """The tracker, as a transaction uses it."""

    source: Source

    @property
    def push_deadline(self) -> float:
        """Return the seconds after the take in which this process may push."""

    def installation_id(self) -> str:
        """Return the identity of the ledger. Raises StoreUnavailable."""

    def take_committed(self, tokens: Sequence[UUID]) -> frozenset[UUID]:
        """Take the push of these; return the committed ones."""

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """Leave the push to the leader."""

    def seal(self, envelope: bytes) -> bytes:
        """Return the form in which the ledger stores an envelope. Raises KeysUnavailable."""


@dataclass(slots=True)
class _Sent:
    """Deliveries that one call of the library sent, and the work that pushes them."""

    tokens: frozenset[UUID]
    push: batches.Push


@dataclass
class Transaction:
    """The jobs of one source that are sent inside one block."""

    tracker: TransactionTracker
    write: Callable[[str, str], None] | None
    """Executes the statement on the application's connection, with a source and rows; None: the block
    keeps its deliveries, and writes them at its end. After the block it raises, and keeps no connection."""
    unwritten: list[Delivery] = field(default_factory=list)
    over: bool = False
    _sent: list[_Sent] = field(default_factory=list)
    _count: int = 0
    _size: int = 0
    _lock: threading.Lock = field(default_factory=lock)
    _owner: OwnerProcess = field(default_factory=OwnerProcess)

    takes_all = True
    """A batch inside the block joins it in every case."""

    @property
    def is_mine(self) -> bool:
        """Return True if this process opened the block; the transaction belongs to it alone."""
        return self._owner.is_current

    def defer(
        self, deliveries: Sequence[Delivery], push: batches.Push
    ) -> Callable[[], None] | None:
        """Return the work that records these in the transaction; None: they are no part of it.

        A push that replaces or continues a running job belongs to that run.
        """
        if not self.is_mine or self.over or any(one.parent or one.closes for one in deliveries):
            return None
        return lambda: self._record(deliveries, push)

    def _record(self, deliveries: Sequence[Delivery], push: batches.Push) -> None:
        if any(one.rule is not None for one in deliveries):
            raise NotTransactional(
                "a job with a key cannot be sent inside transaction(): other producers of the key would "
                "wait for the commit. Send it after the commit"
            )
        if self.write is None:
            self.unwritten += deliveries
        else:
            write_all(self.tracker, self.write, deliveries)
        failpoint.hit("in_transaction")
        with self._lock:
            self._count += 1
            self._size += sum(len(one.envelope) for one in deliveries)
            if self._count <= _MOST_KEPT and self._size <= _MOST_BYTES:
                self._sent.append(_Sent(frozenset(one.token for one in deliveries), push))

    def refuse(self, what: str) -> None:
        """Raise NotTransactional for a send that cannot be part of the transaction."""
        if self.is_mine and not self.over:
            raise NotTransactional(
                f"{what} cannot be sent inside transaction(): the library reads Redis for it. Send it "
                "after the commit, or outside of the block"
            )

    def push(self) -> None:
        """Push all that is committed. Raises no error of ours or of the library: the leader pushes it."""
        with self._lock:
            sent, self._sent = self._sent, []
        if not sent or not self.is_mine:
            return
        failpoint.hit("after_commit")
        with contain_errors("push after a commit"):
            self._push(sent)

    def _push(self, sent: Sequence[_Sent]) -> None:
        tracker, begun = self.tracker, time.monotonic()
        order = [token for one in sent for token in one.tokens]
        taken: set[UUID] = set()
        for at in range(0, len(order), _STATEMENT):
            taken |= tracker.take_committed(order[at : at + _STATEMENT])
        failpoint.hit("after_take")
        for one in sent:
            mine = one.tokens & taken
            if not mine:
                continue
            if time.monotonic() - begun > tracker.push_deadline / 2:
                return  # the leader pushes the rest at the deadline
            recorded = Recorded(
                refused=one.tokens - taken, leader_live=True, committed=True, at=begun
            )
            try:
                one.push(recorded)
            except Exception as error:
                log_event("push_left", source=str(tracker.source), error=str(error))
                tracker.leave_to_outbox(sorted(mine))


def write_all(
    tracker: TransactionTracker,
    write: Callable[[str, str], None],
    deliveries: Sequence[Delivery],
) -> None:
    """Record deliveries on the application's connection. Raises as its driver does."""
    for rows in rows_of(deliveries, tracker.seal):
        write(str(tracker.source.id), rows)


def rows_of(
    deliveries: Sequence[Delivery], seal: Callable[[bytes], bytes] = bytes
) -> Iterator[str]:
    """Return the deliveries as texts for the statement that records them."""
    for at in range(0, len(deliveries), _STATEMENT):
        yield json.dumps([_row(one, seal) for one in deliveries[at : at + _STATEMENT]])


def _row(one: Delivery, seal: Callable[[bytes], bytes]) -> dict[str, Any]:
    return {
        "token": str(one.token),
        "job_id": texts.escaped(one.job_id),
        "queue": texts.escaped(one.queue),
        "task": texts.escaped(one.task),
        "priority": one.priority,
        "attempt": one.attempt,
        "due": texts.moment(one.due_at),
        "expires": texts.moment(one.expires_at),
        "trace": one.trace,
        "recover": one.recover,
        "derived": one.derived,
        "envelope": base64.b64encode(seal(one.envelope)).decode(),
    }


# -- the blocks ------------------------------------------------------------------------------------

_waiting: weakref.WeakKeyDictionary[Any, list[Transaction]] = weakref.WeakKeyDictionary()
"""The ended blocks of a connection whose transaction goes on."""
_verified: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
"""The ledgers that a connection is known to reach."""


def push_committed(connection: Any) -> None:
    """Push the jobs of all ended blocks of this connection, because its transaction has ended."""
    for one in _waiting.pop(connection, []):
        one.push()


@contextmanager
def transaction(trackers: Sequence[TransactionTracker], caller: Caller) -> Iterator[None]:
    """Record what is sent inside on the caller's connection; see JobGuard.transaction."""
    if caller.is_idle:
        push_committed(caller.connection)  # of transactions that have ended without a hook
    with caller.begin() as owns:
        _verify([tracker.installation_id for tracker in trackers], caller)
        mine = [Transaction(tracker, caller.record) for tracker in trackers]
        with _opened(mine):
            yield
    _after(mine, caller, owns=owns)
    if owns:
        push_committed(caller.connection)


@asynccontextmanager
async def atransaction(
    trackers: Sequence[TransactionTracker], caller: AsyncCaller
) -> AsyncIterator[None]:
    """Record what is sent inside on the caller's connection, at the end; see JobGuard.atransaction."""
    if caller.is_idle:
        await asyncio.to_thread(push_committed, caller.connection)
    async with caller.begin() as owns:
        await _averify([tracker.installation_id for tracker in trackers], caller)
        mine = [Transaction(tracker, None) for tracker in trackers]
        with _opened(mine):
            yield
        for one in mine:
            for rows in rows_of(one.unwritten, one.tracker.seal):
                await caller.record(str(one.tracker.source.id), rows)
    _after(mine, caller, owns=owns)
    if owns:
        await asyncio.to_thread(push_committed, caller.connection)


@contextmanager
def begun(ledger: Callable[[], str], caller: Caller) -> Iterator[None]:
    """Open a transaction or a savepoint on a connection that reaches this ledger."""
    with caller.begin():
        _verify([ledger], caller)
        yield


@asynccontextmanager
async def abegun(ledger: Callable[[], str], caller: AsyncCaller) -> AsyncIterator[None]:
    """Do the same for asyncio."""
    async with caller.begin():
        await _averify([ledger], caller)
        yield


@contextmanager
def _opened(mine: Sequence[Transaction]) -> Iterator[None]:
    with ExitStack() as stack:
        for one in mine:
            stack.enter_context(batches.collecting(one.tracker.source.id, one))
        yield


def _after(mine: Sequence[Transaction], caller: Caller | AsyncCaller, *, owns: bool) -> None:
    """Keep the pushes for the end of the transaction."""
    for one in mine:
        one.write = _refuse_late  # `_waiting` must not keep the connection of a rollback alive
    _waiting.setdefault(caller.connection, []).extend(mine)
    if not owns:
        caller.on_commit(partial(_push_soon, weakref.ref(caller.connection)))


def _refuse_late(_source: str, _rows: str) -> None:
    raise NotTransactional("the block of transaction() is over: nothing was sent")


def _push_soon(known: weakref.ref[Any]) -> None:
    """Push now, or in a thread if this one runs an event loop."""
    connection = known()
    if connection is None:
        return  # the leader pushes
    with contain_errors("push after a commit"):  # the executor of the loop may be closed
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            push_committed(connection)
        else:
            loop.run_in_executor(None, push_committed, connection)


def _known(asked: Sequence[Callable[[], str]], caller: Caller | AsyncCaller) -> str | None:
    """Return the ledger that the connection must reach; None if that is known."""
    if caller.autocommits:
        raise ConfigurationError(
            "the connection is in autocommit mode, and its driver opens no transaction in it: turn "
            "autocommit off for transaction()"
        )
    ledgers = {ask() for ask in asked}
    if len(ledgers) > 1:
        raise ConfigurationError("the guards have ledgers in different databases")
    known = _verified.setdefault(caller.connection, set())
    return next((ledger for ledger in ledgers if ledger not in known), None)


def _verify(asked: Sequence[Callable[[], str]], caller: Caller) -> None:
    """Check once for each connection that it reaches the ledger of these guards.

    It is called inside the block's own transaction or savepoint, which an error ends.
    """
    ledger = _known(asked, caller)
    if ledger is not None:
        _check(ledger, caller.installation())
        _verified[caller.connection].add(ledger)


async def _averify(asked: Sequence[Callable[[], str]], caller: AsyncCaller) -> None:
    ledger = await asyncio.to_thread(_known, asked, caller)  # the first time, this asks Postgres
    if ledger is not None:
        _check(ledger, await caller.installation())
        _verified[caller.connection].add(ledger)


def _check(ledger: str, found: str) -> None:
    if found != ledger:
        raise ConfigurationError(
            "this connection is to another database than the ledger of jobguard: a transaction cannot "
            "span both. Keep the schema `jobguard` in the database of the application, or send the job "
            "after the commit"
        )
