"""The worker half of one guarded broker: a session, a claim for each start, an end for each claim.

The threads: ``before_worker_boot`` and ``after_worker_shutdown`` run in the main thread.
``before_process_message`` and all steps up to the acknowledgement run in a worker thread. Moves
from the delay queue, and messages without an actor, run in the thread of a consumer.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any
from uuid import UUID

import redis
from dramatiq.broker import MessageProxy
from dramatiq.common import current_millis
from dramatiq.errors import DecodeError
from dramatiq.middleware import Callbacks, Interrupt, SkipMessage, TimeLimit

from jobguard import failpoint
from jobguard.adapter import report_dead, running_job
from jobguard.adapters.dramatiq.consumer import GuardedConsumer, InFlightMessages
from jobguard.adapters.dramatiq.joins import Joins
from jobguard.adapters.dramatiq.layout import (
    Layout,
    canonical,
    is_short_lived,
    new_short_lived,
    new_worker,
    token_of,
)
from jobguard.adapters.dramatiq.lost_messages import LostMessages
from jobguard.adapters.dramatiq.message import deliver, expires_at
from jobguard.adapters.dramatiq.run import Run, current_run, set_run
from jobguard.errors import WorkersDied, host_interrupts
from jobguard.host_safety import contain_errors
from jobguard.log import log_event
from jobguard.model import Claim, Delivery, Outcome, Refusal, Refused
from jobguard.scripts import text_of

if TYPE_CHECKING:
    from dramatiq.brokers.redis import RedisBroker

    from jobguard.adapter import Session, Tracker


# Dramatiq raises these (a time limit, a shutdown) into the thread of a worker at any point.
host_interrupts(Interrupt)
_FAILED = (Outcome.FAILED, Outcome.DEAD)


class WorkerHooks:
    """The work of one worker process for the ledger."""

    def __init__(
        self, tracker: Tracker, broker: RedisBroker, in_flight: InFlightMessages, joins: Joins
    ) -> None:
        self.session: Session | None = None
        self._tracker = tracker
        self._broker = broker
        self._in_flight = in_flight
        self._joins = joins
        self._layout = Layout(broker.namespace)
        self._ack = broker.client.register_script(text_of(__package__, "ack.lua"))
        self._lost_messages: dict[Any, LostMessages] = {}
        """For each worker of this process that takes messages from the broker."""
        self._queues: frozenset[str] = frozenset()
        self._declaring = threading.Lock()  # each consumer has a thread of its own
        self._running: dict[str, Run] = {}
        self._elsewhere: set[str] = set()
        """Ids that another worker runs, until they are acknowledged here."""
        self._left: dict[UUID, str] = {}
        """Deliveries skipped for that reason, by list; their messages stay until the run has ended."""
        self._declined: set[str] = set()
        """Ids that the ledger keeps for a later try."""

    # -- the process -------------------------------------------------------------------------------

    def begin(self, worker: Any) -> None:
        """Start to beat before the first fetch, under a name that is visible in Redis.

        Several workers of this process on one broker have one id in Redis, and one session.
        """
        self._joins.adopt()
        names = worker.consumer_whitelist or self._broker.get_declared_queues()
        queues = frozenset(name for name in names if self._tracker.guards(name))
        if not queues and self._broker.get_declared_queues():
            return
        if self.session is None:
            me = new_worker()
            self._broker.broker_id = str(me)
            self._queues = queues
            self.session = self._tracker.open_session(
                name=me.hex, queues=sorted(queues), apart=True
            )
        for queue in queues:
            self._announce_queue(self.session, queue)
        checks = LostMessages(
            self._broker,
            worker,
            self._in_flight,
            self._remove_ended,
            workers=lambda: list(self._lost_messages),
        )
        self._lost_messages[worker] = checks
        checks.start()

    def stop(self, worker: Any) -> None:
        """Stop the checks for lost messages: consumers that end from here on are part of the shutdown."""
        if worker in self._lost_messages:
            self._lost_messages[worker].stop()

    def end(self, worker: Any = None) -> None:
        """Close the session, so that messages that are still claimed are requeued at once.

        ``worker``: the one that has ended. The session is that of the others, if there are any.
        """
        for each in list(self._lost_messages) if worker is None else [worker]:
            self.stop(each)
            self._lost_messages.pop(each, None)
        if self._lost_messages:
            return
        session, self.session = self.session, None
        if session is not None:
            session.flush()
            self._remove_ended()
            session.close(running=bool(self._running))
            self._broker.broker_id = str(new_short_lived())

    def consume(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap RedisBroker.consume, which makes a new consumer of a list after every lost connection."""

        @wraps(original)
        def hook(queue_name: str, *args: Any, **kwargs: Any) -> Any:
            if self.session is None and is_short_lived(self._broker.broker_id):
                # Not a worker of Dramatiq, or an unguarded one: a leader must see it as unguarded.
                self._broker.broker_id = str(uuid.uuid4())
            inner = original(queue_name, *args, **kwargs)
            if self.session is None or not self._tracker.guards(canonical(queue_name)):
                return inner
            self._announce_queue(self.session, canonical(queue_name))
            return GuardedConsumer(inner, queue_name, self._in_flight, self._undecodable)

        return hook

    def _announce_queue(self, session: Session, queue: str) -> None:
        """Announce a queue that was declared later, because only announced queues are trusted."""
        with self._declaring:
            if queue not in self._queues:
                self._queues |= {queue}
                session.consumes(sorted(self._queues.union(session.queues)))

    # -- a start -----------------------------------------------------------------------------------

    def claim(self, message: MessageProxy) -> None:
        """Request a claim for this message; raise SkipMessage if it may not run."""
        set_run(None)
        token = token_of(message.options.get("redis_message_id"))
        session = self.session
        if session is None or token is None:
            return
        if not self._tracker.guards(canonical(message.queue_name)):
            return
        try:
            answer = self._joins.ended_before(message, token) or session.start(
                token,
                lambda: self._describe(message, token),
                idle=lambda: self._time_limit_stopped(message),
            )
        except BaseException:  # Dramatiq interrupted it, and treats it as failed
            session.mark_superseded(Claim(token, 0))
            raise
        run = self._run(session, message, Claim(token, 0))
        set_run(run)
        if isinstance(answer, Refused):
            run.reported = True
            raise self._skip(message, answer)
        run.claim = answer
        self._running[str(token)] = run
        run.current = running_job(
            self._tracker, answer, run.job_id, attempt=1 + message.options.get("retries", 0)
        )
        run.current.__enter__()
        failpoint.hit("after_claim")

    @contextmanager
    def _time_limit_stopped(self, message: MessageProxy) -> Iterator[None]:
        """Stop Dramatiq's time limit, which started before our request; restart it afterwards."""
        limits: list[Any] = [m for m in self._broker.middleware if isinstance(m, TimeLimit)]
        for limit in limits:
            limit.after_skip_message(self._broker, message)
        try:
            yield
        finally:
            for limit in limits:
                limit.before_process_message(self._broker, message)

    def _skip(self, message: MessageProxy, refused: Refused) -> SkipMessage:
        """Do the steps for a refused message, and return the exception that skips it."""
        dead = refused.reason is Refusal.SPENT or refused.outcome is Outcome.DEAD
        if dead and self._is_to_report(message, refused):
            self._report(message)
        # Without this, the Results middleware stores None for a skipped message, over its real
        # result.
        message.options["store_results"] = False
        if refused.reason is Refusal.CLAIMED:
            self._elsewhere.add(str(refused.token))
            self._left[refused.token] = message.queue_name
        elif refused.reason is Refusal.SPENT or refused.outcome in _FAILED:
            message.fail()
        elif refused.outcome is Outcome.COMPLETED:
            self._joins.finish(message)
        why = refused.outcome or refused.reason
        log_event(
            "start_skipped",
            job_id=message.message_id,
            queue=canonical(message.queue_name),
            reason=refused.reason.value,
            outcome=refused.outcome.value if refused.outcome else None,
        )
        return SkipMessage(f"jobguard: {why.value}")

    def _is_to_report(self, message: MessageProxy, refused: Refused) -> bool:
        """Return True if this worker must report the death; of several copies only one reports it."""
        if refused.reason is Refusal.SPENT:
            return True
        try:
            return bool(self._broker.client.delete(self._layout.report(refused.token)))
        except redis.RedisError as error:
            log_event("report_unknown", job_id=message.message_id, error=str(error))
            return False

    def _report(self, message: MessageProxy) -> None:
        """Call the functions of the event "dead", and have Dramatiq call the failure callbacks."""
        run = current_run()
        set_run(None)  # messages that are sent now come from no run
        try:
            attempt = 1 + message.options.get("retries", 0)
            report_dead(self._tracker, message.message_id, attempt=attempt)
            middlewares: list[Any] = self._broker.middleware
            job_id = message.message_id
            with contain_errors("failure_callback", event="callback_failed", job_id=job_id):
                for each in middlewares:
                    if isinstance(each, Callbacks):
                        callbacks: Any = each
                        callbacks.after_process_message(
                            self._broker, message, exception=WorkersDied()
                        )
        finally:
            set_run(run)

    def _run(self, session: Session, message: MessageProxy, claim: Claim) -> Run:
        return Run(
            self._tracker,
            session,
            claim,
            job_id=message.message_id,
            queue=canonical(message.queue_name),
            task=message.actor_name,
            sent_at=message.message_timestamp / 1000,
            join=self._joins.of(message),
        )

    def _describe(self, message: MessageProxy, token: UUID) -> Delivery:
        """Return the record of an unrecorded message, as it is in Redis."""
        queue = message.queue_name
        raw: Any = self._broker.client.hget(f"{self._layout.key(queue)}.msgs", str(token))
        data = raw if isinstance(raw, bytes) else message._message.encode()
        return deliver(self._broker, message._message, rid=token, queue=queue, data=data)

    # -- an end ------------------------------------------------------------------------------------

    def returned(self, message: MessageProxy, error: BaseException | None) -> None:
        """Note the return or failure of the actor. No I/O here: a time limit may still interrupt."""
        run = self._run_of(message)
        if run is not None:
            run.after, run.error = True, error
            run.leave()
            failpoint.hit("after_return", when=error is None)

    def skipped(self, message: MessageProxy) -> None:
        """Note the skip of a message: by us, by the actor, or by other middleware before our check."""
        run = self._run_of(message)
        if run is None:
            token = token_of(message.options.get("redis_message_id"))
            if self.session is None or token is None:
                return
            run = self._run(self.session, message, Claim(token, 0))
            set_run(run)
        run.skipped = run.after = True
        run.leave()

    def acknowledged(self, message: MessageProxy) -> None:
        """Report the end: Dramatiq has finished, and is about to acknowledge the message in Redis."""
        run = self._run_of(message)
        if run is not None:
            run.end(failed=False)
            self._done(run)

    def rejected(self, message: MessageProxy) -> None:
        """Report the end: Dramatiq gives up, and is about to move the message to the dead letters."""
        run = self._run_of(message)
        if run is not None:
            # A message that is too old was never tried.
            until = expires_at(self._broker, message._message)
            too_old = until is not None and until <= time.time()
            run.end(failed=not (too_old and run.skipped and run.claim.number == 0))
            self._done(run)
        elif message.actor_name not in self._broker.actors:
            self._decline(message)

    def _done(self, run: Run) -> None:
        self._running.pop(str(run.token), None)
        set_run(None)

    def _run_of(self, message: MessageProxy) -> Run | None:
        run = current_run()
        rid = message.options.get("redis_message_id")
        return run if run is not None and str(run.token) == rid else None

    def _decline(self, message: MessageProxy) -> None:
        """Decline a message whose actor is not (yet) known here, if a leader will restore it later."""
        error = f"this worker has no actor {message.actor_name!r}"
        token, session = token_of(message.options.get("redis_message_id")), self.session
        if token is None or session is None:
            return
        if session.decline(
            token,
            job_id=message.message_id,
            error=error,
            describe=lambda: self._describe(message, token),
        ):
            self._declined.add(str(token))
            return
        run = self._run(session, message, Claim(token, 0))
        run.error = LookupError(error)
        run.end(failed=True)

    def _undecodable(self, queue: str, error: DecodeError) -> None:
        """Handle bytes that this worker cannot decode. Only Redis knows their id."""
        log_event("message_undecodable", queue=queue, error=str(error))
        with contain_errors("undecodable", queue=queue):
            client: Any = self._broker.client
            acks = self._layout.acks(self._broker.broker_id, queue)
            rids = [raw.decode() for raw in client.smembers(acks)]
            unknown = [rid for rid in rids if rid not in self._in_flight]
            bodies = client.hmget(f"{self._layout.key(queue)}.msgs", unknown) if unknown else []
            rid = dict(zip(bodies, unknown, strict=True)).get(error.data)
            if rid is None:
                return
            token, session = token_of(rid), self.session
            if token is None or session is None:
                return
            if session.decline(token, job_id=rid, error=str(error)):
                self.remove(queue, rid)
            else:
                self._in_flight.ignore(rid)

    # -- Redis -------------------------------------------------------------------------------------

    def do_ack(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap RedisBroker.do_ack: keep a message that another worker runs, and remove all else of ours."""

        @wraps(original)
        def hook(queue_name: str, rid: str) -> Any:
            if self.session is None or not self._tracker.guards(canonical(queue_name)):
                return original(queue_name, rid)
            self.remove(queue_name, rid, elsewhere=rid in self._elsewhere)
            self._elsewhere.discard(rid)
            return None

        return hook

    def do_nack(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap RedisBroker.do_nack: a declined message is restored later and is no dead letter."""

        @wraps(original)
        def hook(queue_name: str, rid: str) -> Any:
            if rid not in self._declined:
                return original(queue_name, rid)
            self.remove(queue_name, rid)
            self._declined.discard(rid)
            return None

        return hook

    def _remove_ended(self) -> None:
        """Remove skipped messages whose run has ended; it may have ended before we skipped them."""
        try:
            for token in self._tracker.tombstones(list(self._left)) or ():
                self.remove(self._left[token], str(token))
                del self._left[token]
        except redis.RedisError as error:
            log_event("removal_failed", error=str(error))

    def remove(self, queue: str, rid: str, *, elsewhere: bool = False) -> None:
        """Remove a message that this worker has fetched from Redis."""
        layout, me = self._layout, self._broker.broker_id
        list_ = layout.key(queue)
        self._ack(
            keys=[layout.acks(me, queue), f"{list_}.msgs", list_, layout.heartbeats],
            args=[rid, me, current_millis(), int(elsewhere), layout.acks_prefix, queue],
        )
