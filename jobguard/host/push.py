"""A push that is ours to execute: record it, then have the library send it.

If Redis is away the record alone is kept, for the leader to push. What may have reached Redis is never
taken back. What differs from library to library is what a push is made of, and how it is sent.
"""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from uuid import UUID

from redis import exceptions

from jobguard import failpoint
from jobguard.model import Delivery, Recorded

if TYPE_CHECKING:
    from jobguard.adapter import Tracker


_SEND = 1.0
_SLOWEST = 1e6
"""Seconds of one send, and bytes a second beside that, where a leader pushes what was not sent."""

_NO_WRITES = re.compile(
    r"\b(OOM|READONLY|LOADING|MASTERDOWN|CLUSTERDOWN|NOREPLICAS|MISCONF|TRYAGAIN)\b"
)
"""The answers of a Redis that takes no writes for a while: full, a replica, alone."""
_NO_WRITES_KINDS = (
    exceptions.OutOfMemoryError,
    exceptions.ReadOnlyError,
    exceptions.BusyLoadingError,
    exceptions.ClusterDownError,  # and MASTERDOWN
    exceptions.TryAgainError,
)
"""The same where redis-py takes the first word off the answer."""
ANSWERS = (
    exceptions.ResponseError,
    exceptions.BusyLoadingError,
    exceptions.AuthenticationError,
)
"""Errors that Redis answers with: surely it did not do what it was asked."""


def answer_in(error: BaseException | None) -> BaseException | None:
    """Return the error that Redis answered with, also from inside what a library made of it.

    What came before the last error of Redis says nothing: after NOSCRIPT the script was sent again.
    """
    while error is not None and not isinstance(error, exceptions.RedisError):
        error = error.__cause__ or error.__context__
    return error if isinstance(error, ANSWERS) else None


def takes_no_writes(error: BaseException) -> bool:
    """Whether Redis answered that it takes no writes now; it may do so later."""
    answer = answer_in(error)
    if answer is None:
        return False
    return isinstance(answer, _NO_WRITES_KINDS) or _NO_WRITES.search(str(answer)) is not None


class TakesBack(Protocol):
    """What it takes to take back what was recorded."""

    def withdraw(self, deliveries: Sequence[Delivery]) -> None:
        """Take back what was surely not pushed."""

    def leave_to_outbox(self, tokens: Sequence[UUID]) -> None:
        """Leave the push to the leader."""


def take_back(recorder: TakesBack, deliveries: Sequence[Delivery]) -> None:
    """Surely nothing of it is in Redis. What takes another's place cannot be taken back."""
    first = [delivery for delivery in deliveries if delivery.parent is None]
    moved = [delivery.token for delivery in deliveries if delivery.parent is not None]
    if first:
        recorder.withdraw(first)
    if moved:
        recorder.leave_to_outbox(moved)


@dataclass
class Push(ABC):
    """One call to the library to send something, with what it needs once that is recorded."""

    tracker: Tracker
    broker_down: ClassVar[tuple[type[BaseException], ...]]
    """What says that Redis is away."""
    _recorded: Recorded = field(default=Recorded(), init=False)

    @property
    @abstractmethod
    def deliveries(self) -> Sequence[Delivery]:
        """What is recorded; after ``settle``, what is left to be pushed."""

    @abstractmethod
    def reach(self) -> None:
        """Make sure that Redis can be reached; nothing may be sent. Raises as the library does."""

    @abstractmethod
    def send(self) -> Any:
        """Push what is left, as the library does."""

    @property
    def patience(self) -> float | None:
        """How long a send may wait for Redis; None: as the library does, for nobody else would push it."""
        if not self._recorded.written or not self.accepts(self._recorded):
            return None
        size = sum(len(delivery.envelope) for delivery in self.deliveries)
        return _SEND + size / _SLOWEST

    def apply_refusals(self, recorded: Recorded) -> bool:
        """It is recorded: take out what was refused. False: nothing is left to be pushed."""
        return any(delivery.token not in recorded.refused for delivery in self.deliveries)

    def wait(self, down: BaseException | None) -> None:
        """Nobody else would push it: reach Redis with the library's own patience. Raises as it does."""
        if down is not None:
            raise down
        self.reach()

    def accepts(self, recorded: Recorded) -> bool:
        """Whether its record is enough, so that nobody need hear that it was not pushed."""
        return self.tracker.accepts_without_broker(recorded)

    def may_wait(self) -> bool:
        """Whether it may be kept for the end of a batch."""
        return True

    def undo(self) -> None:  # noqa: B027 - hardly any needs it
        """Surely nothing of it is in Redis, and its sender hears an error: let nothing remember it."""

    def release(self) -> None:  # noqa: B027 - hardly any needs it
        """This is over: give back what was held for it."""

    def borrowed(self) -> AbstractContextManager[object]:
        """What it is sent by at the end of a batch, if what it came by may be in other hands then."""
        return nullcontext()

    def make(self) -> Any:
        """Record and send it. Raises as the library does, or StoreUnavailable if the user asked for that.

        Returns what the library returned; None if the leader pushes, or the end of a batch.
        """
        deferred = self.tracker.defer(self.deliveries, self.finish) if self.may_wait() else None
        if deferred is not None:
            deferred()
            return None
        try:
            # Reached before the record: if this fails, surely nothing was sent.
            away, down = self._check_stores()
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
        """The same at the end of a batch, when all of it is recorded."""
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
                    away, down = self._check_stores()
                if away:
                    self._without_broker(recorded, down, in_outbox=False)
                else:
                    self._send(recorded)
        finally:
            self.release()

    def _check_stores(self) -> tuple[bool, BaseException | None]:
        """Whether Redis is away, and what it said if it was asked."""
        if self.tracker.broker_in_doubt():
            return True, None
        down = self.unless_up(self.reach)
        return down is not None, down

    def _without_broker(
        self, recorded: Recorded, down: BaseException | None, *, in_outbox: bool
    ) -> Any:
        if not self.tracker.accepts_without_broker(recorded):
            in_outbox = False  # where a leader would push it, though its sender may hear an error
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
        """What is raised inside, whatever it is, comes before anything was sent."""
        try:
            yield
        except BaseException as error:
            self.give_up(error)
            raise

    def _send(self, recorded: Recorded) -> Any:
        moves = any(delivery.parent is not None for delivery in self.deliveries)
        failpoint.hit("after_move_record" if moves else "after_record", when=recorded.written)
        try:
            sent = self.send()
        except BaseException as error:
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
        failpoint.hit("after_push", when=recorded.written)
        return sent

    def failed(self, error: BaseException) -> None:
        """See to what is recorded, and may have reached Redis."""
        self._leave()
        ids = ", ".join(delivery.job_id for delivery in self.deliveries)
        error.add_note(f"jobguard: it may have reached Redis, and stays recorded: job {ids}")

    def refused(self, error: BaseException) -> None:
        """Redis answered, and surely nothing of it is there; its sender hears this."""
        self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        """It was never sent, and its sender hears this: take it back, unless a leader may have sent it."""
        if self._recorded.may_be_pushed(self.tracker.push_deadline):
            self.failed(error)
            return
        take_back(self.tracker, self.deliveries)
        self.undo()

    def is_down(self, error: BaseException) -> bool:
        """Whether this says that Redis is away, or takes no writes for a while."""
        if isinstance(error, self.broker_down) and answer_in(error) is None:
            return True
        return takes_no_writes(error)

    def is_refused(self, error: BaseException) -> bool:
        """Whether Redis answered, so that surely nothing of it is there: it is one command or script."""
        return answer_in(error) is not None

    def _leave(self) -> None:
        self.tracker.leave_to_outbox([delivery.token for delivery in self.deliveries])

    def unless_up(self, ask: Callable[[], object]) -> BaseException | None:
        """Ask Redis this; what it says if it is away."""
        try:
            ask()
        except self.broker_down as error:
            self.tracker.broker_failed()
            return error
        return None
