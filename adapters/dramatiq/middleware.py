"""Our one middleware: it passes the hooks of Dramatiq to the producer or the worker half."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dramatiq.broker import MessageProxy
from dramatiq.middleware import Middleware

from jobguard.host_safety import contain_errors

if TYPE_CHECKING:
    from dramatiq import Broker, Message, Worker

    from jobguard.adapters.dramatiq.producer import Producer
    from jobguard.adapters.dramatiq.worker import WorkerHooks


class GuardMiddleware(Middleware):
    """Middleware that must be last, so that a claim is requested only if the message may run."""

    def __init__(self, producer: Producer, worker: WorkerHooks) -> None:
        self._producer = producer
        self._worker = worker

    def before_enqueue(self, broker: Any, message: Message[Any], delay: int | None) -> None:
        """Choose the id of the message."""
        with contain_errors("before_enqueue", job_id=message.message_id):
            self._producer.before_enqueue(message)

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        """Move to the end of the list, behind middleware that was added later, and start to beat."""
        # Assign a new list, because Dramatiq iterates over the old one at this moment.
        broker.middleware = [*(each for each in broker.middleware if each is not self), self]
        self._worker.begin(worker)

    def before_worker_shutdown(self, broker: Any, worker: Worker) -> None:
        """Note that the shutdown has begun."""
        self._worker.stop(worker)

    def after_worker_shutdown(self, broker: Any, worker: Worker) -> None:
        """End the session: all runs have ended, and the fetched messages are requeued."""
        self._worker.end(worker)

    def before_process_message(self, broker: Any, message: MessageProxy) -> None:
        """Request a claim before each start."""
        self._worker.claim(message)

    def after_process_message(
        self,
        broker: Any,
        message: MessageProxy,
        *,
        result: Any = None,
        exception: BaseException | None = None,
    ) -> None:
        """Note that the actor has returned; this runs before retries and pipelines."""
        self._worker.returned(message, exception)

    def after_skip_message(self, broker: Any, message: MessageProxy) -> None:
        """Note that the message does not run."""
        self._worker.skipped(message)

    def before_ack(self, broker: Any, message: MessageProxy) -> None:
        """Record the end: all hooks after the actor have run."""
        self._worker.acknowledged(message)

    def before_nack(self, broker: Any, message: MessageProxy) -> None:
        """Record that the message has failed for good."""
        self._worker.rejected(message)
