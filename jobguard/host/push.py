"""A push that jobguard executes: record the delivery, then let the library send it.

If Redis is away, only the record is kept, and the leader pushes it. A delivery that may have
reached Redis is never withdrawn. Each library has its own subclass, with the content of a push and
the way to send it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from jobguard import failpoint
from jobguard.clients import bounded, take_connection
from jobguard.model import Delivery, Recorded
from jobguard.redis_refusal import answer_in, takes_no_writes

if TYPE_CHECKING:
    from jobguard.adapter import Tracker


_SEND = 1.0
_SLOWEST = 1e6
"""Seconds of one send, plus bytes per second, where a leader pushes a delivery that was not sent."""


def take_back(tracker: Tracker, deliveries: Sequence[Delivery]) -> None:
    """Withdraw deliveries that are surely not in Redis; leave those with a parent to the leader.

    A move out of a delay queue that no store has is forgotten: its parent is not superseded, and the
    library moves it again. Nothing sends a retry again.
    """
    first = [delivery for delivery in deliveries if delivery.parent is None]
    moves = [one.token for one in deliveries if one.parent and one.parent.claim is None]
    retries = [one.token for one in deliveries if one.parent and one.parent.claim is not None]
    if first:
        tracker.withdraw(first)
    if moves and tracker.forget_spooled(moves):
        moves = []
    if moves or retries:
        tracker.leave_to_outbox([*moves, *retries])


@dataclass
class Push(ABC):
    """One call to the library that sends something, with the work that follows its record."""

    tracker: Tracker
    broker_down: ClassVar[tuple[type[BaseException], ...]]
    """The errors that mean that Redis is away."""
    _recorded: Recorded = field(default=Recorded(), init=False)

    @property
    @abstractmethod
    def deliveries(self) -> Sequence[Delivery]:
        """Return the deliveries to record; after `apply_refusals`, those that are left to push."""

    @abstractmethod
    def reach(self) -> None:
        """Make sure that Redis can be reached, and send nothing. Raises as the library does."""

    @abstractmethod
    def send(self) -> Any:
        """Push the deliveries that are left, as the library does."""

    def in_bounded_time(self, pool: Any, connection: Any, *, used: bool = False) -> bounded:
        """Return a block in which this connection is waited for in bounded time; see ``bounded``.

        The sender of a push that no leader would do gets the library's error after that time. A push
        that no leader would do is repeated on a connection that Redis had closed.
        """
        size = sum([len(delivery.envelope) for delivery in self.deliveries])
        kept = self.is_kept
        seconds = (_SEND if kept else self.tracker.push_deadline) + size / _SLOWEST
        return bounded(pool, connection, seconds, again=not kept, used=used)

    @property
    def is_kept(self) -> bool:
        """Return True if a leader pushes the deliveries if this push cannot be sent."""
        return self._recorded.written and self.accepts(self._recorded)

    def apply_refusals(self, recorded: Recorded) -> bool:
        """Remove the refused deliveries after the record; return False if no delivery is left to push."""
        return any(delivery.token not in recorded.refused for delivery in self.deliveries)

    def wait(self, down: BaseException | None) -> None:
        """Reach Redis, in bounded time: no leader would push. Raises as the library does."""
        down = down or self.tracker.broker_error()
        if down is not None:
            raise down
        self.reach()

    def accepts(self, recorded: Recorded) -> bool:
        """Return True if the record is enough, so that the sender need not know that it was not pushed."""
        return self.tracker.accepts_without_broker(recorded)

    def may_wait(self) -> bool:
        """Return True if the push may be deferred to the end of a batch."""
        return True

    def undo(self) -> None:  # noqa: B027 - few subclasses need it
        """Remove all memory of the push: nothing of it is in Redis, and its sender receives an error."""

    def before_record(self) -> None:  # noqa: B027 - few subclasses need it
        """Release what other threads may need while Postgres is waited for."""

    def release(self) -> None:  # noqa: B027 - few subclasses need it
        """Release the resources of this push, which is over."""

    def borrowed(self) -> AbstractContextManager[object]:
        """Return the connection for the end of a batch, if the original one may be in use elsewhere."""
        return nullcontext()

    def make(self) -> Any:
        """Record and send. Raises as the library does, or StoreUnavailable if the user asked for that.

        Returns the library's result; None if the leader pushes, or the end of a batch does.
        """
        deferred = self.tracker.defer(self.deliveries, self.finish) if self.may_wait() else None
        if deferred is not None:
            deferred()
            return None
        try:
            # Redis is reached before the record: if this fails, surely nothing was sent.
            away, down = self._check_redis()
            beside = None if away else self.tracker.record_beside(self.deliveries)
            if beside is not None:
                self._recorded = beside.expected
                self.apply_refusals(beside.expected)  # there are none
                return self._send(beside.expected, beside.result)
            self.before_record()
            begun = time.monotonic()
            try:
                recorded = self.tracker.record(self.deliveries, outbox=away)
            except BaseException:
                self.undo()
                raise
            self._recorded = recorded
            if not self.apply_refusals(recorded):
                return None
            if away:
                return self._without_broker(recorded, down, in_outbox=True)
            if recorded.written and time.monotonic() - begun > self.tracker.push_deadline:
                self._leave()
                return None
            return self._send(recorded)
        finally:
            self.release()

    def finish(self, recorded: Recorded) -> None:
        """Do the same at the end of a batch, when all of its deliveries are recorded."""
        self._recorded = recorded
        try:
            if not self.apply_refusals(recorded):
                return
            if self.tracker.broker_in_doubt() and self.tracker.accepts_without_broker(recorded):
                self._leave()
                return
            with ExitStack() as stack:
                with self._unsent():
                    stack.enter_context(self.borrowed())
                    away, down = self._check_redis()
                if away:
                    self._without_broker(recorded, down, in_outbox=False)
                else:
                    self._send(recorded)
        finally:
            self.release()

    def _check_redis(self) -> tuple[bool, BaseException | None]:
        """Return whether Redis is away, and its error if it was asked."""
        if self.tracker.broker_in_doubt():
            return True, None
        down = self.unless_up(self.reach)
        return down is not None, down

    def _without_broker(
        self, recorded: Recorded, down: BaseException | None, *, in_outbox: bool
    ) -> Any:
        if not self.tracker.accepts_without_broker(recorded):
            # A leader would push a delivery in the outbox, but the sender may receive an error here.
            in_outbox = False
            with self._unsent():
                down = self.unless_up(lambda: self.wait(down))
            if down is None:
                return self._send(recorded)
            if not self.accepts(recorded):
                self.give_up(down)
                raise down
        if not in_outbox:
            self._leave()
        return None

    @contextmanager
    def _unsent(self) -> Iterator[None]:
        """Withdraw on any error inside the block, because nothing was sent yet."""
        try:
            yield
        except BaseException as error:
            self.give_up(error)
            raise

    def _send(self, recorded: Recorded, result: Callable[[], Recorded] | None = None) -> Any:
        """Push. ``result``: waits for the commit of the record, which is under way meanwhile."""
        moves = any(delivery.parent is not None for delivery in self.deliveries)
        place = "after_move_record" if moves else "after_record"
        failpoint.hit("record_under_way" if result else place, when=recorded.written)
        try:
            sent = self.send()
        except BaseException as error:
            if result is not None:
                self._recorded = recorded = result()
            down = self.is_down(error)
            if down:
                self.tracker.broker_failed()
            if self.is_refused(error):
                if down and self.accepts(recorded):
                    self._leave()
                    return None
                self.refused(error)
                raise
            self.failed(error)
            if down and self.accepts(recorded):
                return None
            raise
        self.tracker.broker_answered()
        if result is not None:
            failpoint.hit("pushed_before_record")
            self._recorded = recorded = result()
        failpoint.hit("after_push", when=recorded.written)
        return sent

    def failed(self, error: BaseException) -> None:
        """Leave deliveries that are recorded, and may have reached Redis, to the leader."""
        self._leave()
        ids = ", ".join(delivery.job_id for delivery in self.deliveries)
        error.add_note(f"jobguard: it may have reached Redis, and stays recorded: job {ids}")

    def refused(self, error: BaseException) -> None:
        """Withdraw: Redis answered, surely nothing is there, and the sender receives this error."""
        self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        """Withdraw a push that was never sent; leave it to the leader if that may have sent it.

        Its sender receives the error.
        """
        if self._recorded.committed or self._recorded.may_be_pushed(self.tracker.push_deadline):
            self.failed(error)
            return
        take_back(self.tracker, self.deliveries)
        self.undo()

    def is_down(self, error: BaseException) -> bool:
        """Return True if this error means that Redis is away, or accepts no writes for a while."""
        if isinstance(error, self.broker_down) and answer_in(error) is None:
            return True
        return takes_no_writes(error)

    def is_refused(self, error: BaseException) -> bool:
        """Return True if Redis answered: a push is one command or script, so nothing of it is there."""
        return answer_in(error) is not None

    def _leave(self) -> None:
        self.tracker.leave_to_outbox([delivery.token for delivery in self.deliveries])

    def unless_up(self, ask: Callable[[], object]) -> BaseException | None:
        """Ask Redis; return the error if Redis is away."""
        try:
            ask()
        except self.broker_down as error:
            self.tracker.broker_failed()
            return error
        return None


@dataclass
class PoolPush(Push):
    """A push by a client that takes a connection of its pool for its one command."""

    command: ClassVar[str]
    _connection: Any = field(default=None, init=False)
    """The connection that Redis was reached by."""

    @property
    @abstractmethod
    def pool(self) -> Any:
        """Return the pool of the client; None for a test double."""

    def reach(self) -> None:
        """Take a connection, and connect if necessary. Raises as the library does."""
        if self._connection is None and (pool := self.pool) is not None:
            self._connection = take_connection(pool, self.command)

    def on_bounded(self, call: Callable[[], Any]) -> Any:
        """Call the client, and wait for its connection in bounded time."""
        pool = self.pool
        if pool is None:
            return call()
        if self._connection is None:
            self._connection = take_connection(pool, self.command)
        connection, self._connection = self._connection, None
        with self.in_bounded_time(pool, connection):
            return call()

    def before_record(self) -> None:
        """Give the connection back: the pool may be small."""
        self.release()

    def release(self) -> None:
        """Give the connection back."""
        if self._connection is not None:
            connection, self._connection = self._connection, None
            self.pool.release(connection)
