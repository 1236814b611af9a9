"""The one middleware of ours: Dramatiq's own hooks, each handed on to the half that knows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from dramatiq.broker import MessageProxy
from dramatiq.middleware import Middleware

from jobguard.errors import is_host_interrupt

if TYPE_CHECKING:
    from dramatiq import Broker, Message, Worker

    from jobguard.adapters.dramatiq.producer import Producer
    from jobguard.adapters.dramatiq.worker import WorkerHooks

log = logging.getLogger("jobguard")


class GuardMiddleware(Middleware):
    """Stands last, so that a claim is asked for when nothing else keeps a message from running."""

    def __init__(self, producer: Producer, worker: WorkerHooks) -> None:
        self._producer = producer
        self._worker = worker

    def before_enqueue(self, broker: Any, message: Message[Any], delay: int | None) -> None:
        """Choose its id."""
        try:
            self._producer.before_enqueue(message)
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log.exception("jobguard could not name message %s", message.message_id)

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        """Stand last again, whoever was added since, and begin to beat."""
        # Another list: Dramatiq goes through the old one at this very moment.
        broker.middleware = [*(each for each in broker.middleware if each is not self), self]
        self._worker.begin(worker)

    def before_worker_shutdown(self, broker: Any, worker: Worker) -> None:
        """The end has begun."""
        self._worker.stop()

    def after_worker_shutdown(self, broker: Any, worker: Worker) -> None:
        """All that ran has ended, and what was fetched is given back."""
        self._worker.end()

    def before_process_message(self, broker: Any, message: MessageProxy) -> None:
        """No start without a claim."""
        self._worker.claim(message)

    def after_process_message(
        self,
        broker: Any,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        """First of all that comes after the actor: retries and pipelines are still to come."""
        self._worker.returned(message, exception)

    def after_skip_message(self, broker: Any, message: MessageProxy) -> None:
        """It does not run."""
        self._worker.skipped(message)

    def before_ack(self, broker: Any, message: MessageProxy) -> None:
        """Everything that comes after the actor has been done: now it has ended."""
        self._worker.acknowledged(message)

    def before_nack(self, broker: Any, message: MessageProxy) -> None:
        """It has failed for good."""
        self._worker.rejected(message)
