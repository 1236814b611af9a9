"""Find messages that a live worker has lost from its memory, and requeue them.

Dramatiq forgets messages that it has fetched: delayed messages when the connection breaks, a whole
fetch if its answer is lost, and messages whose acknowledgement failed in an unforeseen way. Their
ids stay in the set of the ids that this worker has fetched, which no other process reads while the
worker lives. So the worker compares that set with its memory twice, and requeues the ids that are
only in the set. If such a message has ended after all, the fence skips it.

This module also restarts the thread of a consumer that an error has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import redis
from dramatiq import Message
from dramatiq.errors import DecodeError

from jobguard.adapters.dramatiq.layout import Layout
from jobguard.clients import own_client
from jobguard.host_safety import contain_errors
from jobguard.log import log_event

if TYPE_CHECKING:
    from dramatiq.brokers.redis import RedisBroker

    from jobguard.adapters.dramatiq.consumer import InFlightMessages


INTERVAL = 2.0
"""Seconds between two checks: a message needs a moment on its way from Redis into memory."""
_TIMEOUT = 1.0


class LostMessages:
    """The thread that checks one worker."""

    def __init__(
        self,
        broker: RedisBroker,
        worker: Any,
        in_flight: InFlightMessages,
        remove_ended: Callable[[], None],
        *,
        workers: Callable[[], Iterable[Any]],
    ) -> None:
        self._broker = broker
        self._worker = worker
        self._in_flight = in_flight
        self._remove_ended = remove_ended
        self._workers = workers
        self._layout = Layout(broker.namespace)
        self._client: Any = None
        self._suspects: set[tuple[str, str]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="jobguard-heal", daemon=True)

    def start(self) -> None:
        """Start the checks."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the checks: from now on the worker itself requeues its messages."""
        self._stop.set()

    def check(self) -> None:
        """Check once. Raise RedisError if Redis does not answer."""
        self._restart_consumers()
        self._remove_ended()
        suspects = {
            (queue, rid) for queue in list(self._worker.consumers) for rid in self._lost(queue)
        }
        certain, self._suspects = suspects & self._suspects, suspects - self._suspects
        for queue in {queue for queue, _ in certain}:
            rids = [rid for name, rid in certain if name == queue and rid not in self._in_flight]
            if rids and not self._stop.is_set():
                log_event("messages_lost", queue=queue, count=len(rids))
                self._broker.do_requeue(queue, *rids)

    def _loop(self) -> None:
        while not self._stop.wait(INTERVAL):
            with contain_errors("lost_messages"):
                try:
                    self.check()
                except redis.RedisError as error:
                    log_event("messages_unchecked", error=str(error))

    def _lost(self, queue: str) -> set[str]:
        """Return the ids that this worker has in Redis and not in its memory."""
        if self._client is None:
            self._client = own_client(self._broker.client, timeout=_TIMEOUT)
        fetched = self._client.smembers(self._layout.acks(self._broker.broker_id, queue))
        lost = {rid for raw in fetched if (rid := raw.decode()) not in self._in_flight}
        return lost - self._cached(queue) if lost else lost

    def _cached(self, queue: str) -> set[str]:
        """Return the ids that the consumers of this process have fetched and not yet processed."""
        threads = [worker.consumers.get(queue) for worker in self._workers()]
        consumers = [getattr(thread, "consumer", None) for thread in threads]
        found = set()
        for data in [d for each in consumers for d in list(getattr(each, "message_cache", ()))]:
            try:
                found.add(Message.decode(data).options["redis_message_id"])
            except (DecodeError, KeyError, TypeError):
                continue
        return found

    def _restart_consumers(self) -> None:
        for queue, thread in list(self._worker.consumers.items()):
            if thread.is_alive() or self._stop.is_set() or not thread.running:
                continue
            log_event("consumer_restarted", queue=queue)
            del self._worker.consumers[queue]
            self._worker._add_consumer(queue, delay=queue.endswith(".DQ"))
