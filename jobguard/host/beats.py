"""What beats for a worker: into Postgres and into Redis, and through a stand-in where it may be starved.

Its thread is one of the operating system, on a connection of its own that no breaker holds back. Only it
beats: of two beats at once the older could come last, and list too little.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

from jobguard import os_threads
from jobguard.errors import JobguardError
from jobguard.host.beat_process import BeatProcess
from jobguard.log import log_event, remind
from jobguard.model import Beat, new_token
from jobguard.pulse import beat_key, parse_pulse, read_pulse

if TYPE_CHECKING:
    import redis

    from jobguard.adapter import Source
    from jobguard.host.circuit import Circuit
    from jobguard.host.in_flight import InFlight
    from jobguard.settings import Settings
    from jobguard.store.protocols import BeatReply, HostStore

_STEP = 0.05
"""Seconds between two tries of a worker to introduce itself."""
_CHECK_EVERY = 0.02
"""Seconds between two looks how far a connection has come."""
_STRIDE = 1 << 20
"""From one beat of a worker to its next; the numbers between are its stand-in's."""
_HEIR = 1 << 60
"""The beats of a worker's heir are counted from here: it comes after the worker and its stand-in."""
_SAY_WHERE = 60.0
"""Seconds for which a stand-in may use the same address: its password may be one that rotates."""
_BREATH = 0.25
"""Seconds between two beats at least, however much there is to tell."""


class BeatTracker(Protocol):
    """What a heart needs of the tracker whose worker it beats for."""

    source: Source
    settings: Settings
    circuit: Circuit
    client: Callable[[], redis.Redis] | None

    def connect(self) -> None:
        """Reach Postgres now, or raise why it cannot be used."""


class BeatSender:
    """The beats of one worker process, and the name by which Postgres knows it."""

    def __init__(
        self,
        tracker: BeatTracker,
        store: HostStore,
        listed: InFlight,
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
        self.leader_live = False
        self.known = inherited is not None
        """Whether Postgres has heard of this name."""
        self.named_at = time.monotonic()
        self.ended: os_threads.Event | None = None
        self._tracker = tracker
        self._settings = tracker.settings
        self._store = store
        self._listed = listed
        self._lists = lists
        self._unflushed = unflushed
        self._children: frozenset[UUID] = frozenset()
        self._conninfo: tuple[float, str] | None = None  # as the stand-in was told it, and when
        self._now = os_threads.Event()
        self._stop = os_threads.Event()
        self._counter = 0
        self._redis: redis.Redis | None = None
        self._pulse: tuple[UUID, int] | None = None  # as the last beat into Redis saw it

    @property
    def is_mine(self) -> bool:
        """Whether this process began it; a forked child only inherited it."""
        return self.pid == os.getpid()

    # -- its thread --------------------------------------------------------------------------------

    def introduce(self) -> None:
        """Beat once, with the patience of one record."""
        deadline = time.monotonic() + self._settings.record_timeout
        heard = self.beat()
        while not heard and time.monotonic() < deadline:
            # Nothing waits for a worker that has not begun; unknown, it would start jobs unclaimed.
            time.sleep(_STEP)
            heard = self._beat_postgres(self._snapshot())

    def start(self, heard: Callable[[], None]) -> None:
        """Beat from now on; ``heard`` is called after each beat that Postgres has heard."""

        def run() -> None:
            interval = self._settings.beat_interval
            breath = min(_BREATH, interval)
            while not self._stop.wait(breath):
                # At once where Postgres does not know of something that we run or ran: as long as it
                # is not on our list, its absence from Redis would be taken for a loss.
                self._now.wait(interval - breath)
                self._now.clear()
                if self._stop.is_set():
                    return
                try:
                    if self.beat():
                        heard()
                except Exception as error:
                    log_event("guest_failed", where="beats", error=str(error), exc_info=True)
                remind()

        self.ended = os_threads.start(run, name="jobguard-beat")

    def beat_now(self) -> None:
        """Beat at once."""
        self._now.set()

    def introduced(self) -> UUID | None:
        """By which name Postgres knows this worker; None: by none yet, but it is about to hear of one."""
        with self._listed.lock:
            if self.known:
                return self.id
        if self.is_mine:
            self._now.set()
        elif self._listed.children.worker() == self.id:
            # The worker has beaten since it forked us. We must not: our list is not all of its list.
            self.known = True
            return self.id
        return None

    def consumes(self, queues: Sequence[str]) -> None:
        """Say from the next beat on that it takes from these queues; see Session."""
        queues = tuple(queues)
        if queues != self.queues:
            self.queues = queues
            self._now.set()  # should we die before it is said, nobody vouches for what is new

    def stop(self) -> None:
        """Beat no more, nor have anyone else do it."""
        if self._listed.beat_process is not None:
            self._listed.beat_process.close()
        self._stop.set()
        self._now.set()

    # -- a beat ------------------------------------------------------------------------------------

    def beat(self) -> bool:
        """Say to both stores that this worker lives; True if Postgres heard it."""
        beat = self._snapshot()
        heard = self._beat_postgres(beat)
        # Second, so that a name that does not resolve, or a Redis that hangs, delays no beat.
        self._pulse = self._beat_redis(beat.counter)
        if self._listed.beat_process is not None:
            self._tell(self._listed.beat_process, beat)
        return heard

    def _snapshot(self) -> Beat:
        others = self._others() | self._listed.children.running()
        with self._listed.lock:
            self._counter += _STRIDE
            if self._listed.beat_process is not None:
                self._listed.beat_process.counts(self._counter)
            listed = tuple(self._listed.tokens() | others)
            worker, counter = self.id, self._counter
        return Beat(
            worker=worker,
            counter=counter,
            claims=listed,
            name=self.name,
            host=socket.gethostname(),
            pid=self.pid,
            queues=self.queues,
            unflushed_since=self._unflushed(),
            pulse=self._pulse,
        )

    def _others(self) -> frozenset[UUID]:
        """What children of ours may be running, as the adapter sees it; in doubt, as it saw it last."""
        if self._lists is not None:
            try:
                self._children = frozenset(self._lists())
            except Exception as error:
                log_event("guest_failed", where="lists", error=str(error), exc_info=True)
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
        with self._listed.lock:
            self.known = self.known or beat.worker == self.id
            if self.known:
                self._listed.children.introduce(self.id)
        if not self._tracker.circuit.closed:
            self._tracker.circuit.answered()
        return True

    def _connect(self) -> None:
        """Reach Postgres as its producers do, for it must know their source before it knows us.

        Nobody else may come by to carry a connection on, and a network may want a look for each step of it.
        """
        deadline = time.monotonic() + self._settings.record_timeout
        while not self._tracker.circuit.check() and time.monotonic() < deadline:
            if self._stop.wait(_CHECK_EVERY):
                break
        self._tracker.connect()

    def register_again(self, before: UUID) -> None:
        """A leader has declared us dead: what we held is others' now, and we begin anew."""
        with self._listed.lock:
            if self.id != before:
                return  # another thread has heard it as well
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
            answers: list[Any] = pipe.execute(raise_on_error=False)
            if isinstance(answers[0], Exception):  # a full Redis still shows its pulse
                log_event("beat_unheard", store="redis", error=str(answers[0]))
        except Exception as error:
            log_event("beat_unheard", store="redis", error=str(error))
            return None
        standing = parse_pulse(answers[1])
        if standing is None:
            return None
        if standing.source != self._tracker.source.id:
            log_event("source_differs", source=str(self._tracker.source))
        return standing.epoch, standing.n

    def _client(self) -> redis.Redis | None:
        if self._redis is None and self._tracker.client is not None:
            self._redis = self._tracker.client()
        return self._redis

    # -- who beats in its stead ----------------------------------------------------------------------

    def start_beat_process(self) -> None:
        """Make what beats in our stead while something holds the interpreter, if anything can."""
        if self._store.conninfo() is None:
            return
        self._listed.beat_process = BeatProcess(
            {
                "source": self._tracker.source.id,
                "namespace": self._tracker.source.namespace,
                "interval": self._settings.beat_interval,
                "settings": asdict(self._settings),
            }
        )

    def _tell(self, beat_process: BeatProcess, beat: Beat) -> None:
        try:
            at = time.monotonic()
            if self._conninfo is None or at - self._conninfo[0] > _SAY_WHERE:
                self._conninfo = (at, self._store.conninfo() or "")
            # What has begun or ended since the beat is told in this order, too.
            with self._listed.lock:
                claims = tuple(self._listed.tokens() | self._children)
                now = replace(
                    beat, worker=self.id, counter=self._counter, claims=claims, pulse=None
                )
                beat_process.beat(now, self._conninfo[1])
        except Exception as error:
            log_event("guest_failed", where="stand-in", error=str(error), exc_info=True)

    def take_over_beats(self, token: UUID) -> None:
        """In a child that outlives its worker, and runs this: its beats are the worker's from now on."""
        log_event("worker_inherited", worker=self.id, name=self.name)
        self._redis = None  # its connection is the parent's
        self._listed.only(token)
        self._lists, self._children = None, frozenset()
        self._counter += _HEIR

    # -- its end -------------------------------------------------------------------------------------

    def leave(self) -> None:
        """Say goodbye to both stores: what we held is nobody's."""
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
        """Let go of the connection."""
        self._store.close()
