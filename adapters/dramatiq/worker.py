"""The working half of one guarded broker: a session, a claim for each start, an end for each claim.

Which thread does what: ``before_worker_boot`` and ``after_worker_shutdown`` run in the main thread;
``before_process_message`` and what follows to the acknowledgement in a worker thread; moves from the
delay queue, and messages for which there is no actor, in the thread of a consumer.
"""

from __future__ import annotations

import logging
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
from jobguard.adapter import running_job
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
from jobguard.errors import WorkersDied, host_interrupts, is_host_interrupt
from jobguard.model import Claim, Delivery, Outcome, Refusal, Refused
from jobguard.scripts import text_of

if TYPE_CHECKING:
    from dramatiq.brokers.redis import RedisBroker

    from jobguard.adapter import Session, Tracker

log = logging.getLogger("jobguard")

# A time limit, a shutdown: raised into a worker's thread, wherever that is.
host_interrupts(Interrupt)
_FAILED = (Outcome.FAILED, Outcome.DEAD)


class WorkerHooks:
    """What a worker process of this broker does for the ledger."""

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
        self._lost_messages: LostMessages | None = None
        self._queues: frozenset[str] = frozenset()
        self._declaring = threading.Lock()  # each consumer has a thread of its own
        self._running: dict[str, Run] = {}
        self._elsewhere: set[str] = set()
        """Ids of what another worker runs, until they are acknowledged here."""
        self._left: dict[UUID, str] = {}
        """What was skipped for that, by list: its message is left for whoever ends it."""
        self._declined: set[str] = set()
        """Ids of what the ledger keeps for a later try."""

    # -- the process -------------------------------------------------------------------------------

    def begin(self, worker: Any) -> None:
        """Begin to beat before the first message can be fetched, under a name that Redis shows."""
        self._joins.adopt()
        names = worker.consumer_whitelist or self._broker.get_declared_queues()
        self._queues = frozenset(name for name in names if self._tracker.guards(name))
        if not self._queues and self._broker.get_declared_queues():
            return
        me = new_worker()
        self._broker.broker_id = str(me)
        self.session = self._tracker.open_session(
            name=me.hex, queues=sorted(self._queues), apart=True
        )
        self._lost_messages = LostMessages(self._broker, worker, self._in_flight, self._tidy)
        self._lost_messages.start()

    def stop(self) -> None:
        """The worker stops: what dies now, dies by order."""
        if self._lost_messages is not None:
            self._lost_messages.stop()

    def end(self) -> None:
        """Say goodbye, so that what is still claimed goes back at once."""
        session, self.session = self.session, None
        self.stop()
        if session is not None:
            session.flush()
            self._tidy()
            session.close(running=bool(self._running))
            self._broker.broker_id = str(new_short_lived())

    def consume(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """RedisBroker.consume: a consumer of a list, made anew after every break of the connection."""

        @wraps(original)
        def hook(queue_name: str, *args: Any, **kwargs: Any) -> Any:
            if self.session is None and is_short_lived(self._broker.broker_id):
                # No worker of Dramatiq's, or an unguarded one: that is how it must look to a leader.
                self._broker.broker_id = str(uuid.uuid4())
            inner = original(queue_name, *args, **kwargs)
            if self.session is None or not self._tracker.guards(canonical(queue_name)):
                return inner
            self._take_from(self.session, canonical(queue_name))
            return GuardedConsumer(inner, queue_name, self._in_flight, self._undecodable)

        return hook

    def _take_from(self, session: Session, queue: str) -> None:
        """Say so if it was declared since: only what a guarded worker says it takes from is trusted."""
        with self._declaring:
            if queue not in self._queues:
                self._queues |= {queue}
                session.consumes(sorted(self._queues))

    # -- a start -----------------------------------------------------------------------------------

    def claim(self, message: MessageProxy) -> None:
        """Ask whether this may run; raises SkipMessage if it may not."""
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
                idle=lambda: self._off_the_clock(message),
            )
        except BaseException:  # interrupted by Dramatiq, for which it has failed then
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
    def _off_the_clock(self, message: MessageProxy) -> Iterator[None]:
        """Stop the time limit of Dramatiq, which began before we were asked; begin it anew after that."""
        limits: list[Any] = [m for m in self._broker.middleware if isinstance(m, TimeLimit)]
        for limit in limits:
            limit.after_skip_message(self._broker, message)
        try:
            yield
        finally:
            for limit in limits:
                limit.before_process_message(self._broker, message)

    def _skip(self, message: MessageProxy, refused: Refused) -> SkipMessage:
        """Return what keeps it from running, with all that is left to be done instead."""
        dead = refused.reason is Refusal.SPENT or refused.outcome is Outcome.DEAD
        if dead and self._is_to_report(refused):
            self._report(message)
        # Else the Results middleware stores None for what was skipped, over the result of the run.
        message.options["store_results"] = False
        if refused.reason is Refusal.CLAIMED:
            self._elsewhere.add(str(refused.token))
            self._left[refused.token] = message.queue_name
        elif refused.reason is Refusal.SPENT or refused.outcome in _FAILED:
            message.fail()
        elif refused.outcome is Outcome.COMPLETED:
            self._joins.finish(message)
        why = refused.outcome or refused.reason
        log.warning("message %s is skipped: %s", message.message_id, why.value)
        return SkipMessage(f"jobguard: {why.value}")

    def _is_to_report(self, refused: Refused) -> bool:
        """Whether this worker tells that it is dead; of several copies, one does."""
        if refused.reason is Refusal.SPENT:
            return True
        try:
            return bool(self._broker.client.delete(self._layout.report(refused.token)))
        except redis.RedisError as error:
            log.warning("jobguard cannot see whether a dead message is reported: %s", error)
            return False

    def _report(self, message: MessageProxy) -> None:
        """Have Dramatiq call back whoever waits for a failure of this message."""
        run = current_run()
        set_run(None)  # what is sent now comes of no run
        try:
            middlewares: list[Any] = self._broker.middleware
            for middleware in middlewares:
                if isinstance(middleware, Callbacks):
                    tell: Any = middleware
                    tell.after_process_message(self._broker, message, exception=WorkersDied())
        except Exception as error:
            if is_host_interrupt(error):
                raise
            log.exception("message %s is dead, and its failure callback failed", message.message_id)
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
        """Return the record of what nobody recorded, as it stands in Redis."""
        queue = message.queue_name
        raw: Any = self._broker.client.hget(f"{self._layout.key(queue)}.msgs", str(token))
        data = raw if isinstance(raw, bytes) else message._message.encode()
        return deliver(self._broker, message._message, rid=token, queue=queue, data=data)

    # -- an end ------------------------------------------------------------------------------------

    def returned(self, message: MessageProxy, error: BaseException | None) -> None:
        """The actor has returned or failed. No I/O here: the time limit may still strike."""
        run = self._run_of(message)
        if run is not None:
            run.after, run.error = True, error
            run.leave()
            failpoint.hit("after_return", when=error is None)

    def skipped(self, message: MessageProxy) -> None:
        """It was skipped: by us, by the actor, or by other middleware before we were asked."""
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
        """Dramatiq is done with it, and about to say so to Redis."""
        run = self._run_of(message)
        if run is not None:
            run.end(failed=False)
            self._done(run)

    def rejected(self, message: MessageProxy) -> None:
        """Dramatiq gives it up, and is about to move it to the dead letters."""
        run = self._run_of(message)
        if run is not None:
            # What grew too old was never tried.
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
        """There is no such actor here, perhaps not yet: it goes back, if somebody will see to that."""
        error = f"this worker has no actor {message.actor_name!r}"
        token, session = token_of(message.options.get("redis_message_id")), self.session
        if token is None or session is None:
            return
        if self._goes_back(token, job_id=message.message_id, error=error):
            self._declined.add(str(token))
            return
        run = self._run(session, message, Claim(token, 0))
        run.error = LookupError(error)
        run.end(failed=True)

    def _goes_back(self, token: UUID, *, job_id: str, error: str) -> bool:
        session = self.session
        if session is None or token not in (self._tracker.recovers([token], began=False) or ()):
            return False
        session.decline(token, job_id=job_id, error=error)
        return True

    def _undecodable(self, queue: str, error: DecodeError) -> None:
        """These bytes are no message to this worker. Nobody but Redis knows which id they have."""
        log.error("a message of queue %s cannot be decoded: %s", queue, error)
        try:
            client: Any = self._broker.client
            acks = self._layout.acks(self._broker.broker_id, queue)
            rids = [raw.decode() for raw in client.smembers(acks)]
            unknown = [rid for rid in rids if rid not in self._in_flight]
            bodies = client.hmget(f"{self._layout.key(queue)}.msgs", unknown) if unknown else []
            rid = dict(zip(bodies, unknown, strict=True)).get(error.data)
            if rid is None:
                return
            token = token_of(rid)
            if token is not None and self._goes_back(token, job_id=rid, error=str(error)):
                self.remove(queue, rid)
            else:
                self._in_flight.keep_off(rid)
        except Exception as failure:
            if is_host_interrupt(failure):
                raise
            log.exception("jobguard could not put a message of queue %s aside", queue)

    # -- Redis -------------------------------------------------------------------------------------

    def do_ack(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """RedisBroker.do_ack: leave what another worker runs alone, and nothing behind of our own."""

        @wraps(original)
        def hook(queue_name: str, rid: str) -> Any:
            if self.session is None or not self._tracker.guards(canonical(queue_name)):
                return original(queue_name, rid)
            self.remove(queue_name, rid, elsewhere=rid in self._elsewhere)
            self._elsewhere.discard(rid)
            return None

        return hook

    def do_nack(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """RedisBroker.do_nack: what goes back later is no dead letter."""

        @wraps(original)
        def hook(queue_name: str, rid: str) -> Any:
            if rid not in self._declined:
                return original(queue_name, rid)
            self.remove(queue_name, rid)
            self._declined.discard(rid)
            return None

        return hook

    def _tidy(self) -> None:
        """Remove what was left for a run that has ended since: it may have ended before we left it."""
        try:
            for token in self._tracker.tombstones(list(self._left)) or ():
                self.remove(self._left[token], str(token))
                del self._left[token]
        except redis.RedisError as error:
            log.debug("jobguard cannot remove what has ended: %s", error)

    def remove(self, queue: str, rid: str, *, elsewhere: bool = False) -> None:
        """Take a message that this worker has fetched out of Redis."""
        layout, me = self._layout, self._broker.broker_id
        list_ = layout.key(queue)
        self._ack(
            keys=[layout.acks(me, queue), f"{list_}.msgs", list_, layout.heartbeats],
            args=[rid, me, current_millis(), int(elsewhere), layout.acks_prefix, queue],
        )
