"""Messages in memory: a worker process has fetched them, and neither acknowledged nor requeued them.

Redis knows only the fetched ids. If the two sets differ for longer than a moment, the worker has
lost a message from its memory, and no other worker would ever run it: see lost_messages.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import redis
from dramatiq.broker import Consumer, MessageProxy
from dramatiq.errors import ConnectionClosed, DecodeError

from jobguard.log import log_event


class InFlightMessages:
    """The ids in the memory of this process, with their lists; one entry for each copy."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, list[str]] = {}
        """A message has several copies if a leader restored it and this process fetched it again."""
        self._ignored: set[str] = set()

    def __contains__(self, rid: str) -> bool:
        return rid in self._queues or rid in self._ignored

    def take(self, rid: str, queue: str) -> None:
        """Note that this id is in memory now."""
        with self._lock:
            self._queues.setdefault(rid, []).append(queue)

    def ignore(self, rid: str) -> None:
        """Ignore this id from now on: its message can neither run nor be requeued here."""
        with self._lock:
            self._ignored.add(rid)

    def drop(self, rids: Iterable[str]) -> None:
        """Remove one copy of each of these ids."""
        with self._lock:
            for rid in rids:
                copies = self._queues.pop(rid, [])[1:]
                if copies:
                    self._queues[rid] = copies

    def forget(self, queue: str) -> None:
        """Remove the delayed messages of a queue: Dramatiq discards them with their consumer."""
        with self._lock:
            left = {rid: [q for q in qs if q != queue] for rid, qs in self._queues.items()}
            self._queues = {rid: queues for rid, queues in left.items() if queues}


class GuardedConsumer(Consumer):
    """A consumer that tracks its messages, and continues after a bad message or an outage."""

    def __init__(
        self,
        inner: Any,
        queue: str,
        in_flight: InFlightMessages,
        undecodable: Callable[[str, DecodeError], None],
    ) -> None:
        self.inner = inner
        self._queue = queue
        self._in_flight = in_flight
        self._undecodable = undecodable
        if queue.endswith(".DQ"):
            in_flight.forget(queue)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __next__(self) -> MessageProxy | None:
        try:
            message: MessageProxy | None = next(self.inner)
        except DecodeError as error:
            # Without this, Dramatiq restarts the consumer and forgets the other messages that it
            # fetched.
            self._undecodable(self._queue, error)
            return None
        if message is not None:
            self._in_flight.take(message.options["redis_message_id"], self._queue)
        return message

    def ack(self, message: MessageProxy) -> None:
        """Acknowledge a message; Dramatiq tries again if Redis is away."""
        self._then_forget(self.inner.ack, message)

    def nack(self, message: MessageProxy) -> None:
        """Move a message to the dead letters."""
        self._then_forget(self.inner.nack, message)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Requeue these. If Redis does not accept them now, they are found and requeued later."""
        several = list(messages)
        try:
            self.inner.requeue(several)
        except redis.RedisError as error:  # it would end the thread of the consumer for good
            log_event("requeue_failed", queue=self._queue, error=str(error))
        finally:
            self._in_flight.drop(message.options["redis_message_id"] for message in several)

    def close(self) -> None:
        """Close the consumer."""
        self.inner.close()

    def _then_forget(self, how: Callable[[MessageProxy], None], message: MessageProxy) -> None:
        try:
            how(message)
        except ConnectionClosed:
            raise
        except BaseException:
            self._in_flight.drop([message.options["redis_message_id"]])
            raise
        self._in_flight.drop([message.options["redis_message_id"]])
