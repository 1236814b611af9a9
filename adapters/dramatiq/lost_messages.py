"""What a living worker has lost out of its memory, put back.

Dramatiq forgets messages that it has fetched: those delayed, when the connection breaks; a whole fetch
whose answer was lost; those whose acknowledgement failed in an unforeseen way. They stay in the set of
what this worker has fetched, where nobody looks for them as long as it lives. So the worker compares
that set with what it has in hand, twice, and gives back what is in its name alone. Whatever of it has
ended all the same, the fence skips.

It also starts anew the thread of a consumer that an error has ended.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import redis
from dramatiq import Message
from dramatiq.errors import DecodeError

from jobguard.adapters.dramatiq.layout import Layout
from jobguard.clients import own_client

if TYPE_CHECKING:
    from dramatiq.brokers.redis import RedisBroker

    from jobguard.adapters.dramatiq.consumer import InFlightMessages

log = logging.getLogger("jobguard")

INTERVAL = 2.0
"""Seconds between two looks: a message is on its way from Redis into memory for a moment."""
_TIMEOUT = 1.0


class LostMessages:
    """The thread that looks after one worker."""

    def __init__(
        self,
        broker: RedisBroker,
        worker: Any,
        in_flight: InFlightMessages,
        tidy: Callable[[], None],
    ) -> None:
        self._broker = broker
        self._worker = worker
        self._in_flight = in_flight
        self._tidy = tidy
        self._layout = Layout(broker.namespace)
        self._client: Any = None
        self._suspects: set[tuple[str, str]] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="jobguard-heal", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more: what the worker gives up now, it gives back by itself."""
        self._stop.set()

    def check(self) -> None:
        """Look once. Raises RedisError."""
        self._revive()
        self._tidy()
        suspects = {
            (queue, rid) for queue in list(self._worker.consumers) for rid in self._lost(queue)
        }
        certain, self._suspects = suspects & self._suspects, suspects - self._suspects
        for queue in {queue for queue, _ in certain}:
            rids = [rid for name, rid in certain if name == queue and rid not in self._in_flight]
            if rids and not self._stop.is_set():
                log.warning("%d messages of queue %s were forgotten, and go back", len(rids), queue)
                self._broker.do_requeue(queue, *rids)

    def _loop(self) -> None:
        while not self._stop.wait(INTERVAL):
            try:
                self.check()
            except redis.RedisError as error:
                log.debug("jobguard cannot look for forgotten messages: %s", error)
            except Exception:
                log.exception("jobguard could not look for forgotten messages")

    def _lost(self, queue: str) -> set[str]:
        """Return the ids that Redis believes this worker has, and that it has not."""
        if self._client is None:
            self._client = own_client(self._broker.client, timeout=_TIMEOUT)
        fetched = self._client.smembers(self._layout.acks(self._broker.broker_id, queue))
        lost = {rid for raw in fetched if (rid := raw.decode()) not in self._in_flight}
        return lost - self._cached(queue) if lost else lost

    def _cached(self, queue: str) -> set[str]:
        """Return the ids of what the consumer has fetched and not yet looked at."""
        thread = self._worker.consumers.get(queue)
        found = set()
        for data in list(getattr(getattr(thread, "consumer", None), "message_cache", ())):
            try:
                found.add(Message.decode(data).options["redis_message_id"])
            except (DecodeError, KeyError, TypeError):
                continue
        return found

    def _revive(self) -> None:
        for queue, thread in list(self._worker.consumers.items()):
            if thread.is_alive() or self._stop.is_set() or not thread.running:
                continue
            log.error("the consumer of queue %s had ended; it is started anew", queue)
            del self._worker.consumers[queue]
            self._worker._add_consumer(queue, delay=queue.endswith(".DQ"))
