"""Send the beats of a worker to Postgres and to Redis, with a beat process where threads may be blocked.

The beat thread is a thread of the operating system, and uses its own connection, which no circuit
breaker delays. No other thread beats: of two concurrent beats the older one could arrive last, with
too short a list.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from jobguard import hooks, os_threads
from jobguard.errors import JobguardError
from jobguard.host.beat_process import BeatProcess
from jobguard.host_safety import contain_errors
from jobguard.log import log_event, remind
from jobguard.model import Beat, new_token
from jobguard.pulse import NO_PULSE, beat_key, hears_dead_key, parse_pulse, read_pulse

if TYPE_CHECKING:
    import redis

    from jobguard.host.in_flight import InFlight
    from jobguard.host.tracker_api import TrackerApi
    from jobguard.store.protocols import BeatReply, HostStore

_STEP = 0.05
"""Seconds between two attempts of a worker to register."""
_CHECK_EVERY = 0.02
"""Seconds between two checks of the progress of a connection."""
_STRIDE = 1 << 20
"""The step from one beat number of a worker to its next; the numbers between belong to its beat process."""
_TAKE_OVER_OFFSET = 1 << 60
"""The offset of a child's beats: they follow those of its worker and the worker's beat process."""
_CONNINFO_MAX_AGE = 60.0
"""Seconds for which a beat process may use the same address, because its password may rotate."""
_SHORTEST_PAUSE = 0.25
"""The minimum seconds between two beats, even if there is much to report."""


class BeatSender:
    """The beats of one worker process, and the id by which Postgres knows it."""

    def __init__(
        self,
        tracker: TrackerApi,
        store: HostStore,
        in_flight: InFlight,
        *,
        name: str,
        queues: Sequence[str],
        inherited: tuple[UUID, int] | None,
        lists: Callable[[], Iterable[UUID]] | None,
        unflushed: Callable[[], float | None],
    ) -> None:
        self.id, self.pid = inherited or (new_token(), os.getpid())
        self.name = name
        self.queues = tuple(queues)
        self.leader_live = True  # until a beat hears something else
        self.known = inherited is not None
        """Whether Postgres knows this id."""
        self.named_at = time.monotonic()
        self.ended: os_threads.Event | None = None
        self._tracker = tracker
        self._settings = tracker.settings
        self._store = store
        self._in_flight = in_flight
        self._lists = lists
        self._unflushed = unflushed
        self._children: frozenset[UUID] = frozenset()
        self._conninfo: tuple[float, str] | None = None  # sent to the beat process at this time
        self._now = os_threads.Event()
        self._stop = os_threads.Event()
        self._counter = 0
        self._redis: redis.Redis | None = None
        self._pulse: tuple[UUID, int] | None = None  # as the last beat to Redis read it

    @property
    def is_mine(self) -> bool:
        """Return True if this process started the session; a forked child only inherited it."""
        return self.pid == os.getpid()

    # -- the thread --------------------------------------------------------------------------------

    def introduce(self) -> None:
        """Beat once, and wait no longer than for one record."""
        deadline = time.monotonic() + self._settings.record_timeout
        received = self.beat()
        while not received and time.monotonic() < deadline:
            # Nothing waits for a worker that has not started; a worker unknown to Postgres would
            # start jobs without claims.
            time.sleep(_STEP)
            received = self._beat_postgres(self._snapshot())

    def start(self, after_beat: Callable[[], None]) -> None:
        """Beat from now on; call ``after_beat`` after each beat that Postgres has received."""

        def run() -> None:
            interval = self._settings.beat_interval
            pause = min(_SHORTEST_PAUSE, interval)
            while not self._stop.wait(pause):
                # Beat at once if Postgres does not know of a delivery that this worker runs or ran:
                # until the delivery is on the list of a beat, its absence from Redis would be taken
                # for a loss.
                self._now.wait(interval - pause)
                self._now.clear()
                if self._stop.is_set():
                    return
                with contain_errors("beats"):
                    if self.beat():
                        after_beat()
                remind()

        self.ended = os_threads.start(run, name="jobguard-beat")

    def beat_now(self) -> None:
        """Beat at once."""
        self._now.set()

    def introduced(self) -> UUID | None:
        """Return the id by which Postgres knows this worker; if there is none yet, ask for a beat."""
        with self._in_flight.lock:
            if self.known:
                return self.id
        if self.is_mine:
            self._now.set()
        elif self._in_flight.children.worker() == self.id:
            # The worker has beaten since it forked this child. The child must not beat: its list is
            # not the worker's whole list.
            self.known = True
            return self.id
        return None

    def consumes(self, queues: Sequence[str]) -> None:
        """Report from the next beat on that the worker takes jobs from these queues; see Session."""
        queues = tuple(queues)
        if queues != self.queues:
            self.queues = queues
            # If the worker died before this report, no beat would name the new queues.
            self._now.set()

    def stop(self) -> None:
        """Stop all beats, including those of the beat process."""
        if self._in_flight.beat_process is not None:
            self._in_flight.beat_process.close()
        self._stop.set()
        self._now.set()

    # -- one beat ----------------------------------------------------------------------------------

    def beat(self) -> bool:
        """Report to both stores that this worker is alive; return True if Postgres received the beat."""
        beat = self._snapshot()
        received = self._beat_postgres(beat)
        # Redis comes second, so that a name that does not resolve, or a Redis that hangs, delays no
        # beat.
        self._pulse = self._beat_redis(beat.counter)
        if self._in_flight.beat_process is not None:
            self._report(self._in_flight.beat_process, beat)
        return received

    def _snapshot(self) -> Beat:
        others = self._others() | self._in_flight.children.running()
        with self._in_flight.lock:
            self._counter += _STRIDE
            if self._in_flight.beat_process is not None:
                self._in_flight.beat_process.counts(self._counter)
            in_flight = tuple(self._in_flight.tokens() | others)
            worker, counter = self.id, self._counter
        return Beat(
            worker=worker,
            counter=counter,
            claims=in_flight,
            name=self.name,
            host=socket.gethostname(),
            pid=self.pid,
            queues=self.queues,
            unflushed_since=self._unflushed(),
            pulse=self._pulse,
        )

    def _others(self) -> frozenset[UUID]:
        """Return the deliveries that the adapter lists for children; on an error, the previous list."""
        if self._lists is not None:
            with contain_errors("lists"):
                self._children = frozenset(self._lists())
        return self._children

    def _beat_postgres(self, beat: Beat) -> bool:
        source = self._tracker.source
        try:
            if not self.known:
                self._connect()
            reply: BeatReply = self._store.beat(source.id, beat, namespace=source.namespace)
        except JobguardError as error:
            log_event("beat_unheard", store="postgres", error=str(error))
            return False
        except Exception as error:
            log_event("guest_failed", where="beat", error=str(error), exc_info=True)
            return False
        self.leader_live = reply.leader_live
        if reply.dead:
            self.register_again(beat.worker)
            return self._beat_postgres(self._snapshot())
        with self._in_flight.lock:
            self.known = self.known or beat.worker == self.id
            if self.known:
                self._in_flight.children.introduce(self.id)
        if not self._tracker.circuit.closed:
            self._tracker.circuit.answered()
        return True

    def _connect(self) -> None:
        """Reach Postgres as a producer does, because it must know the source before it knows the worker.

        No other caller may advance the connection, and each network step of it may need a check.
        """
        deadline = time.monotonic() + self._settings.record_timeout
        while not self._tracker.circuit.check() and time.monotonic() < deadline:
            if self._stop.wait(_CHECK_EVERY):
                break
        self._tracker.connect()

    def register_again(self, before: UUID) -> None:
        """Continue under a new id: a leader has declared this worker dead, and its claims are void."""
        with self._in_flight.lock:
            if self.id != before:
                return  # another thread has received the same answer
            self.id, self._counter, self.known = new_token(), 0, False
            self.named_at = time.monotonic()
        log_event("worker_renewed", was=before, worker=self.id)

    def _beat_redis(self, counter: int) -> tuple[UUID, int] | None:
        try:
            client = self._client()
            if client is None:
                return None
            pipe = client.pipeline(transaction=False)
            seconds = int(4 * self._settings.worker_timeout)
            pipe.set(beat_key(self.id), counter, ex=seconds)
            read_pulse(pipe, self._tracker.source)
            if hooks.heard(self._tracker.source.id, "dead"):
                pipe.set(hears_dead_key(self._tracker.source.id), 1, ex=seconds)
            answers: list[Any] = pipe.execute(raise_on_error=False)
            if isinstance(answers[0], Exception):  # a full Redis still shows its pulse
                log_event("beat_unheard", store="redis", error=str(answers[0]))
        except Exception as error:
            log_event("beat_unheard", store="redis", error=str(error))
            return None
        if isinstance(answers[1], Exception):
            return None
        pulse = parse_pulse(answers[1])
        if pulse is None:
            return NO_PULSE
        if pulse.source != self._tracker.source.id:
            log_event("source_differs", source=str(self._tracker.source))
        return pulse.epoch, pulse.n

    def _client(self) -> redis.Redis | None:
        if self._redis is None and self._tracker.client is not None:
            self._redis = self._tracker.client()
        return self._redis

    # -- beats from other processes ----------------------------------------------------------------

    def start_beat_process(self) -> None:
        """Prepare the process that beats while the interpreter is blocked, if it can reach the store."""
        if self._store.conninfo() is None:
            return
        # A beat seals nothing, and a callable that returns keys cannot go through the pipe.
        settings = replace(self._settings, encrypt=None)
        self._in_flight.beat_process = BeatProcess(
            {
                "source": self._tracker.source.id,
                "namespace": self._tracker.source.namespace,
                "interval": self._settings.beat_interval,
                "timeout": self._settings.worker_timeout,
                "settings": asdict(settings),
            }
        )

    def _report(self, beat_process: BeatProcess, beat: Beat) -> None:
        with contain_errors("beat process"):
            at = time.monotonic()
            if self._conninfo is None or at - self._conninfo[0] > _CONNINFO_MAX_AGE:
                self._conninfo = (at, self._store.conninfo() or "")
            # Starts and ends since the beat are reported in this order as well.
            with self._in_flight.lock:
                claims = tuple(self._in_flight.tokens() | self._children)
                now = replace(
                    beat, worker=self.id, counter=self._counter, claims=claims, pulse=None
                )
                beat_process.beat(now, self._conninfo[1])

    def take_over_beats(self, token: UUID) -> None:
        """Continue the worker's beats in a child that outlived the worker and runs this delivery."""
        log_event("worker_inherited", worker=self.id, name=self.name)
        self._redis = None  # its connection is the parent's
        self._in_flight.only(token)
        self._lists, self._children = None, frozenset()
        self._counter += _TAKE_OVER_OFFSET

    # -- the end -----------------------------------------------------------------------------------

    def leave(self) -> None:
        """Deregister from both stores: this worker has no claims any more."""
        try:
            self._store.leave(self.id)
        except Exception as error:
            log_event("beat_unheard", store="postgres", error=str(error))
        try:
            if (client := self._client()) is not None:
                client.delete(beat_key(self.id))
        except Exception as error:
            log_event("beat_unheard", store="redis", error=str(error))

    def close(self) -> None:
        """Close the connection."""
        self._store.close()
