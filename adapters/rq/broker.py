"""The broker of RQ for the reconciler: find deliveries in Redis, and restore them.

This module imports neither RQ nor user code, and unpickles nothing. It writes the bytes of RQ back
unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import chain
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from redis.exceptions import RedisError, ResponseError

from jobguard.adapter import Source
from jobguard.adapters.rq.backlog import BacklogReader
from jobguard.adapters.rq.ended_workers import EndedWorkers
from jobguard.adapters.rq.envelope import Mode, UnknownEnvelope, decode
from jobguard.adapters.rq.layout import FIELD, KEPT, SPENT, TIMESTAMP, WORKER_FIELD, Layout
from jobguard.adapters.rq.render import render
from jobguard.client_list import Consumers, Listener, Listeners
from jobguard.client_names import nameable
from jobguard.members import ListReader
from jobguard.model import (
    Backlog,
    Delivery,
    Join,
    Observation,
    OpenJoin,
    Owed,
    Part,
    Presence,
    Request,
    Restorable,
    Restored,
)
from jobguard.scripts import RESTORES_A_TRIP, SEARCHED, Script, chunks, is_past, restored_by

if TYPE_CHECKING:
    import redis


IDS_A_CALL = 1_000
"""The number of ids in one call of a script. A script blocks Redis: 1,000 ids take about 5 ms."""
_POPS = frozenset({"blmove", "blpop", "brpoplpush"})
"""The commands with which RQ's workers wait for a job."""

_ENDED = {
    "finished": Presence.FINISHED,
    "failed": Presence.FAILED,
    "stopped": Presence.FAILED,
    "canceled": Presence.CANCELLED,
}


class RQBroker:
    """Inspect and restore the jobs of one RQ in one Redis."""

    def __init__(self, source: Source, client: redis.Redis):
        self._layout = Layout.parse(source.prefix)
        self._backlog = BacklogReader(client, self._layout)
        self._client = client
        self._listeners = Listeners(client, source)
        self._ended = EndedWorkers(client, self._layout, str(source))
        self._presence = Script(client, __package__, "presence.lua")
        self._restore = Script(client, __package__, "restore.lua")
        self._abandon = Script(client, __package__, "abandon.lua")
        self._skip = Script(client, __package__, "skip.lua")
        self._hide = Script(client, __package__, "hide.lua")
        self._report = Script(client, __package__, "report.lua")
        self._discard = Script(client, __package__, "discard.lua")
        self._reader = ListReader(client)
        self._in_lists: set[tuple[str, str]] = set()
        """Each (queue, id) that the last inspection found in a list, with or without a hash."""

    def presence(self, page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        """Return where Redis has each of these deliveries."""
        seen = dict(zip((owed.token for owed in page), self._inspect(page), strict=True))
        lists = self._find_in_lists([owed for owed in page if seen[owed.token][1] == "queued"])
        self._in_lists = {
            (owed.queue, owed.job_id)
            for owed in page
            if owed.queue in lists
            and (
                owed.job_id in lists[owed.queue]
                or self._reader.has(self._layout.queue(owed.queue), owed.job_id.encode())
            )
        }
        return {
            owed.token: _observe(owed, *seen[owed.token], lists.get(owed.queue, {}))
            for owed in page
        }

    def restore(
        self, deliveries: Sequence[Restorable], *, deadline: float
    ) -> Mapping[UUID, Restored]:
        """Restore these in the given order, each atomically, unless Redis' clock is past the deadline.

        The given order is the order in which they were recorded. A push to the front goes to the
        front again, and therefore the jobs get the same order as the first time.
        """
        done: dict[UUID, Restored] = {}
        calls: list[tuple[UUID, list[Any], list[Any]]] = []
        for delivery in deliveries:
            try:
                calls.append((delivery.token, *self._call(delivery, deadline)))
            except UnknownEnvelope:
                done[delivery.token] = Restored.UNREADABLE
        return done | restored_by(self._restore, calls)

    def abandon(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Remove the runs of dead workers from RQ's registries."""
        layout = self._layout
        calls: list[tuple[list[Any], list[Any]]] = [
            (
                [*layout.run(owed.job_id, owed.queue)],
                [owed.job_id, owed.token.hex, layout.base, repr(deadline)],
            )
            for owed in page
        ]
        for batch in chunks(calls, RESTORES_A_TRIP):
            self._abandon.run(batch)

    def bury(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Move these to RQ's registry of failed jobs, where people search for them."""
        if is_past(self._client, deadline):
            return
        self.abandon(page, deadline=deadline)
        self._show_failed(page)

    def _show_failed(self, page: Sequence[Owed | Restorable]) -> None:
        calls: list[tuple[list[Any], list[Any]]] = [
            (
                [*self._layout.ending(owed.job_id, owed.queue)],
                [owed.job_id, owed.token.hex, "failed", *KEPT],
            )
            for owed in page
        ]
        for batch in chunks(calls, RESTORES_A_TRIP):
            self._skip.run(batch)

    def report(
        self, dead: Sequence[Restorable], *, deadline: float, all_of_them: bool = False
    ) -> None:
        """Push those with a failure callback once more: the worker calls the callback, and not the job."""
        wanted = [one for one in dead if all_of_them or _has_failure_callback(one)]
        # A job that vanished needs its hash again. A restore of a running job writes nothing else.
        done = self.restore([replace(one, running=True) for one in wanted], deadline=deadline)
        self._show_failed([one for one in wanted if done.get(one.token) is Restored.RESTORED])
        reports: list[tuple[list[Any], list[Any]]] = [
            (
                [self._layout.job(one.job_id), self._layout.queue(one.queue)],
                [one.job_id, one.token.hex, repr(deadline)],
            )
            for one in wanted
        ]
        for batch in chunks(reports, RESTORES_A_TRIP):
            self._report.run(batch)

    def hide(self, page: Sequence[Owed]) -> None:
        """Delete the hash of each of these if its status is still "started": RQ will write no end."""
        calls: list[tuple[list[Any], list[Any]]] = [
            ([self._layout.job(owed.job_id)], [owed.token.hex]) for owed in page
        ]
        self._hide.run(calls)

    def discard(self, page: Sequence[Owed], *, erase: bool = False) -> None:
        """Cancel these as RQ cancels a job; ``erase``: delete them, with their results."""
        calls: list[tuple[list[Any], list[Any]]] = [
            (
                self._layout.places(owed.job_id, owed.queue),
                [owed.job_id, owed.token.hex, "1" if erase else "", SEARCHED],
            )
            for owed in page
        ]
        for batch in chunks(calls, RESTORES_A_TRIP):
            for answer in self._discard.run(batch):
                if isinstance(answer, RedisError):
                    raise answer

    def rejoin(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Do nothing: RQ has no counter for joins, because a dependent stores the ids of its parents."""

    def parts(self, ended: Sequence[Restorable]) -> Mapping[UUID, Part]:
        """Return nothing: RQ has no counter for joins."""
        return {}

    def backlog(
        self, queues: Collection[str], *, after: str = "", limit: int, mark: bool
    ) -> Backlog:
        """Return a page of the deliveries that wait in these queues; see Broker."""
        return self._backlog.page(queues, after=after, limit=limit, mark=mark)

    def consumers(self) -> Consumers:
        """Return RQ's names of the workers by queue, and the connections of no known worker."""
        prefix = self._layout.queue_prefix
        queues: set[bytes] = cast(Any, self._client).smembers(self._layout.queues_key)
        keys = [key.decode(errors="replace") for key in queues]
        names = sorted(key.removeprefix(prefix) for key in keys if key.startswith(prefix))
        with self._client.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.smembers(self._layout.workers(name))
            members = pipe.execute()
        # A killed worker stays in the set, but its own key expires when its heartbeats stop.
        known = sorted(frozenset(chain.from_iterable(members)))
        with self._client.pipeline(transaction=False) as pipe:
            for key in known:
                pipe.exists(key)
                pipe.hget(key, WORKER_FIELD)
            found = pipe.execute(raise_on_error=False)  # a key may have another type
        alive = {key for key, there in zip(known, found[::2], strict=True) if there}
        worker = f"{self._layout.base}:worker:"
        sessions = {
            key.decode(errors="replace").removeprefix(worker): session.decode(errors="replace")
            for key, session in zip(known, found[1::2], strict=True)
            if isinstance(session, bytes)
        }
        by_queue = {
            name: frozenset(
                key.decode(errors="replace").removeprefix(worker) for key in keys if key in alive
            )
            for name, keys in zip(names, members, strict=True)
        }
        registered = frozenset(chain.from_iterable(by_queue.values()))
        clients = self._listeners.inspect()
        strangers = self._unexplained(clients, registered)
        named = {c.mark.name for c in clients if c.ours and c.mark is not None}
        proved = frozenset(name for name in registered if nameable(name) in named)
        for queue, ended in self._ended.find(registered).items():
            by_queue[queue] = by_queue.get(queue, frozenset()) | ended
        return Consumers(
            by_queue, strangers, self._listeners.refused, proved, proved, sessions=sessions
        )

    def render(self, request: Request, token: UUID) -> Delivery:
        """Return the delivery of a job that SQL or a schedule asked for."""
        return render(request, token)

    def _unexplained(
        self, clients: Sequence[Listener], registered: frozenset[str]
    ) -> frozenset[str]:
        """Return the connections of workers that are neither guarded nor registered.

        Each worker subscribes to a channel with its name, and waits for jobs on one connection. A
        registered worker accounts for one subscription and one waiting connection; whether it is
        guarded is decided by its name and its queues. Redis can lose the registration of a live
        worker, and two workers with the same name share one registration.
        """
        bare = [client for client in clients if client.here and not client.ours]
        subscribed = [client.text for client in bare if client.subscribes]
        waiting = [client.text for client in bare if client.blocked and client.command in _POPS]
        guarded = Counter(c.mark.name for c in clients if c.ours and c.subscribes and c.mark)
        unnamed = {nameable(name) for name in registered} - guarded.keys()
        unexplained = set(waiting) if len(waiting) > len(unnamed) else set[str]()
        if subscribed:
            subscribers = self._subscribers()
            if any(n > guarded[name] + (name in unnamed) for name, n in subscribers.items()):
                unexplained.update(subscribed)
        return frozenset(unexplained)

    def _subscribers(self) -> Mapping[str, int]:
        """Return the number of subscribers per worker name, in all databases of this Redis server."""
        prefix = f"{self._layout.base}:pubsub:"
        client: Any = self._client
        try:
            channels = client.pubsub_channels(f"{prefix}*")
            subscribers = client.pubsub_numsub(*channels) if channels else []
        except ResponseError as error:
            self._listeners.refused = str(error)
            return {}
        counts = Counter[str]()
        for channel, n in subscribers:
            counts[nameable(channel.decode(errors="replace").removeprefix(prefix))] += n
        return counts

    def _inspect(self, page: Sequence[Owed]) -> Iterator[tuple[str, str, str, str, Join | None]]:
        """Return for each delivery: token, status and time from its hash, its place, and its join."""
        for owed in chunks(page, IDS_A_CALL):
            pairs = chain.from_iterable((one.job_id, one.queue) for one in owed)
            args = [self._layout.base, self._layout.job_prefix, *pairs]
            (answers,) = self._presence.run([([], args)])
            if isinstance(answers, RedisError):
                raise answers
            self._reader.pause()
            for answer in answers:
                texts = (part.decode(errors="replace") for part in answer[:4])
                jg, status, enqueued_at, place = texts
                yield jg, status, enqueued_at, place, _join(*answer[4:])

    def _find_in_lists(self, queued: Sequence[Owed]) -> dict[str, dict[str, str]]:
        """Return for each queue which of these ids are in its lists, and in which one."""
        wanted: dict[str, dict[bytes, float]] = {}
        for owed in queued:
            wanted.setdefault(owed.queue, {})[owed.job_id.encode()] = owed.age
        keys = {queue: self._layout.queue(queue) for queue in wanted}
        found = self._reader.find({keys[queue]: ids for queue, ids in wanted.items()})
        lists = {
            queue: dict.fromkeys((id.decode() for id in found[key]), "list")
            for queue, key in keys.items()
        }
        # What is starting now is there, and what a worker had taken when it died.
        unlisted = [queue for queue, key in keys.items() if len(found[key]) < len(wanted[queue])]
        with self._client.pipeline(transaction=False) as pipe:
            for queue in unlisted:
                pipe.lrange(self._layout.intermediate(queue), 0, -1)
            for queue, ids in zip(unlisted, pipe.execute() if unlisted else (), strict=True):
                for job_id in ids:
                    lists[queue].setdefault(job_id.decode(errors="replace"), "intermediate")
        return lists

    def pause_with(self, work: Callable[[], None]) -> None:
        """Call this between two pieces of a long read; see Broker."""
        self._reader.pause = work

    def _call(self, delivery: Restorable, deadline: float) -> tuple[list[Any], list[Any]]:
        routing, fields = decode(delivery.envelope)
        # A requeued delivery has the envelope of the delivery before it, with the old token.
        fields = {**fields, FIELD.encode(): delivery.token.hex.encode()}
        layout, job_id, queue = self._layout, delivery.job_id, delivery.queue
        expires = delivery.expires_at
        older = [token.hex for token in delivery.replaces]
        return [
            layout.job(job_id),
            layout.queue(queue),
            layout.intermediate(queue),
            layout.queues_key,
            layout.wip(queue),
            layout.executions(job_id),
        ], [
            repr(deadline),
            job_id,
            delivery.token.hex,
            routing.mode.value,
            int(routing.at_front or _waits_in_front(routing.mode, fields)),
            routing.score,
            "" if expires is None else int(expires * 1000),
            layout.base,
            layout.job_prefix,
            layout.queue_prefix,
            queue,
            routing.group,
            routing.rate_key,
            routing.rate_concurrency,
            int(routing.allow_failure),
            _known(delivery),
            int((queue, job_id) in self._in_lists),
            len(older),
            *older,
            len(routing.parents),
            *routing.parents,
            datetime.now(UTC).strftime(TIMESTAMP),
            *chain.from_iterable(fields.items()),
        ]


def _has_failure_callback(dead: Restorable) -> bool:
    with suppress(UnknownEnvelope):
        return bool(decode(dead.envelope)[1].get(b"failure_callback_name"))
    return False


def _known(delivery: Restorable) -> str:
    """Return the argument of restore.lua for the known state of a delivery."""
    if delivery.takeover:
        return "takeover"
    if delivery.running:
        return "running"
    return "released" if delivery.released else ""


def _waits_in_front(mode: Mode, fields: Mapping[bytes, bytes]) -> bool:
    """Return True if RQ pushes a deferred job to the front after its parents: a field of its hash."""
    return mode is Mode.DEFERRED and fields.get(b"enqueue_at_front") == b"1"


def _join(
    lost: Sequence[bytes] | None = None, any_end: int = 0, doubtful: Sequence[bytes] = ()
) -> Join | None:
    tokens = tuple(_other(token.decode(errors="replace")) for token in doubtful)
    if lost is None or None in tokens:
        return None
    return Join(
        tuple(parent.decode(errors="replace") for parent in lost),
        failure_will_do=bool(any_end),
        doubtful=tuple(token for token in tokens if token is not None),
    )


def _observe(
    owed: Owed,
    jg: str,
    status: str,
    enqueued_at: str,
    place: str,
    join: Join | None,
    lists: Mapping[str, str],
) -> Observation:
    if place == "missing":
        return Observation(Presence.ABSENT, "missing", bodiless=True)
    ended = _ENDED.get(status)
    if jg.rstrip(SPENT) != owed.token.hex or (jg.endswith(SPENT) and ended is None):
        # The mark means that RQ wrote an end. With any other status, an unguarded program has
        # pushed the job again.
        other = jg.rstrip(SPENT) if ended is not None else jg
        return Observation(Presence.OVERWRITTEN, f"token:{jg}:{status}", _other(other))
    if place == "placed" and not jg.endswith(SPENT):
        return Observation(Presence.SCHEDULED, status, joins=join)
    if ended is not None:
        return Observation(ended, status)
    if place == "running":
        return Observation(Presence.RUNNING, status)
    found_in = lists.get(owed.job_id) if status == "queued" else None
    if found_in == "list":
        return Observation(Presence.WAITING, "list")
    if found_in == "intermediate":  # starting, or its worker is dead: the next inspection decides
        return Observation(Presence.ABSENT, f"intermediate:{enqueued_at}", pushed=True)
    # RQ writes the job and its place in one transaction.
    return Observation(Presence.ABSENT, f"stranded:{status}:{enqueued_at}", pushed=True)


def _other(jg: str) -> UUID | None:
    try:
        return UUID(hex=jg) if len(jg) == 32 else None
    except ValueError:
        return None
