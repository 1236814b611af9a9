"""Group commit without a thread: callers join the batch that one of them commits.

It commits the records of producers, and the claims of workers whose jobs run in threads.

The first caller that finds no open batch becomes the leader of a new one. While an earlier batch is
being committed, other callers join. When the leader's turn comes, it closes the batch and writes it
as one statement. So a lone producer pays one commit and never waits for others, and sixteen threads
share one commit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from jobguard.errors import BadRow, StoreUnavailable, is_host_interrupt
from jobguard.locks import Turn, lock

Row = TypeVar("Row")
Answer = TypeVar("Answer")

_LARGEST = 500
"""The maximum number of deliveries in a batch; the next caller opens another batch."""
_WAIT_SHARE = 0.25
"""The share of a usual commit for which a leader waits, if the batch before had several callers."""


@dataclass(slots=True)
class _Part(Generic[Row, Answer]):
    """The rows of one caller in a batch."""

    rows: Sequence[Row]
    done: threading.Lock = field(default_factory=lock)
    answer: Answer | None = None
    error: BaseException | None = None


@dataclass(slots=True)
class _Batch(Generic[Row, Answer]):
    parts: list[_Part[Row, Answer]] = field(default_factory=list)
    size: int = 0
    wanted: int = 0
    full: threading.Event = field(default_factory=lambda: threading.Event())


class GroupCommit(Generic[Row, Answer]):
    """Combines the rows of many threads into few statements; the answer is one for the whole batch."""

    def __init__(self, write: Callable[[Sequence[Row]], Answer], *, timeout: float) -> None:
        self._write = write
        self._timeout = timeout
        self._joining = threading.Lock()
        self._committing = Turn()
        self._commits = False  # a leader has the turn
        self._open: _Batch[Row, Answer] | None = None
        self._usual = 0.0  # seconds of a commit, smoothed
        self._last = 0  # parts in the batch before

    @property
    def is_idle(self) -> bool:
        """Return True if a caller would find no other caller here, as far as is known."""
        return self._last <= 1 and self._open is None and not self._commits

    def submit(self, rows: Sequence[Row]) -> Answer:
        """Return when these rows are committed, with or without the rows of other callers.

        Raises the error of the write for these rows: BadRow only to the caller whose row is bad.
        """
        part: _Part[Row, Answer] = _Part(rows)
        with self._joining:
            batch = self._open
            leads = batch is None or batch.size + len(rows) > _LARGEST
            if batch is None or leads:
                batch = self._open = _Batch()
            if not leads:
                part.done.acquire()
            batch.parts.append(part)
            batch.size += len(rows)
            if batch.wanted and len(batch.parts) >= batch.wanted:
                batch.full.set()
        if leads:
            self._lead(batch)
        elif not part.done.acquire(timeout=self._timeout):
            self._close(batch)  # a signal may have interrupted its leader before it began
            raise StoreUnavailable("the batch was not committed in time")
        if part.error is not None:
            raise part.error
        assert part.answer is not None
        return part.answer

    def _lead(self, batch: _Batch[Row, Answer]) -> None:
        commits = False
        try:
            commits = self._committing.take(0)
            queued = not commits
            if queued:
                commits = self._committing.take(self._timeout)
            self._commits = self._commits or commits
            if not commits:
                raise StoreUnavailable("the batch before was not committed in time")
            self._wait_for_others(batch, queued)
            self._close(batch)
            began = time.monotonic()
            self._commit(batch.parts)
            took = time.monotonic() - began
            self._usual = took if not self._usual else 0.9 * self._usual + 0.1 * took
            self._last = len(batch.parts)
        except BaseException as error:
            # This includes an exception that a signal raised in this thread: the other callers must
            # neither hang because of it nor receive it.
            is_ours = isinstance(error, Exception) and not is_host_interrupt(error)
            self._release(batch, error if is_ours else StoreUnavailable(str(error)))
            raise
        finally:
            if commits:
                self._commits = False
                self._committing.free()
            self._wake(batch)

    def _wait_for_others(self, batch: _Batch[Row, Answer], queued: bool) -> None:
        if self._last <= 1 and not queued:
            return
        with self._joining:
            here = len(batch.parts)
            batch.wanted = self._last + here if queued else self._last
            waits = here < batch.wanted
        if waits:
            batch.full.wait(_WAIT_SHARE * self._usual)

    def _close(self, batch: _Batch[Row, Answer]) -> None:
        with self._joining:
            if self._open is batch:
                self._open = None

    def _release(self, batch: _Batch[Row, Answer], error: BaseException) -> None:
        self._close(batch)
        for part in batch.parts:
            if part.answer is None and part.error is None:
                part.error = error

    @staticmethod
    def _wake(batch: _Batch[Any, Any]) -> None:
        for part in batch.parts[1:]:  # the first is the leader
            part.done.release()

    def _commit(self, parts: Sequence[_Part[Row, Answer]]) -> None:
        rows = [row for part in parts for row in part.rows]
        try:
            answer = self._write(rows)
        except BadRow:
            if len(parts) == 1:
                raise
            for part in parts:
                self._commit_alone(part)
            return
        for part in parts:
            part.answer = answer

    def _commit_alone(self, part: _Part[Row, Answer]) -> None:
        try:
            part.answer = self._write(part.rows)
        except Exception as error:
            part.error = error
