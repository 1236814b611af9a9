"""What a worker process has in hand: fetched, and neither acknowledged nor given back.

Redis knows only what was fetched. Where the two differ for longer than a moment, the worker has lost a
message out of its memory, and nobody else would ever run it: see heal.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import redis
from dramatiq.broker import Consumer, MessageProxy
from dramatiq.errors import ConnectionClosed, DecodeError

log = logging.getLogger("jobguard")


class InFlightMessages:
    """The ids that this process has in hand, by list, once for each copy in its memory."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[str, list[str]] = {}
        """Several copies of one message: a leader restored it, and this process fetched it again."""
        self._never: set[str] = set()

    def __contains__(self, rid: str) -> bool:
        return rid in self._queues or rid in self._never

    def take(self, rid: str, queue: str) -> None:
        """This is in hand now."""
        with self._lock:
            self._queues.setdefault(rid, []).append(queue)

    def keep_off(self, rid: str) -> None:
        """This can neither be run nor be given back: whatever becomes of it, it is not for us."""
        with self._lock:
            self._never.add(rid)

    def drop(self, rids: Iterable[str]) -> None:
        """One copy of each is not in hand any more."""
        with self._lock:
            for rid in rids:
                copies = self._queues.pop(rid, [])[1:]
                if copies:
                    self._queues[rid] = copies

    def forget(self, queue: str) -> None:
        """What was delayed here is out of memory: Dramatiq throws it away with the consumer."""
        with self._lock:
            left = {rid: [q for q in qs if q != queue] for rid, qs in self._queues.items()}
            self._queues = {rid: queues for rid, queues in left.items() if queues}


class GuardedConsumer(Consumer):
    """A consumer that notes what comes and goes, and that neither poison nor an outage ends."""

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
            # Else Dramatiq starts the consumer anew, and forgets what else it had fetched.
            self._undecodable(self._queue, error)
            return None
        if message is not None:
            self._in_flight.take(message.options["redis_message_id"], self._queue)
        return message

    def ack(self, message: MessageProxy) -> None:
        """Acknowledge it; Dramatiq tries again if Redis is away."""
        self._then_forget(self.inner.ack, message)

    def nack(self, message: MessageProxy) -> None:
        """Move it to the dead letters."""
        self._then_forget(self.inner.nack, message)

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Give these back. What Redis does not hear of now is found missing, and put back then."""
        several = list(messages)
        try:
            self.inner.requeue(several)
        except redis.RedisError as error:  # it would end the consumer's thread for good
            log.warning("messages of queue %s were not given back: %s", self._queue, error)
        finally:
            self._in_flight.drop(message.options["redis_message_id"] for message in several)

    def close(self) -> None:
        """Close it."""
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
