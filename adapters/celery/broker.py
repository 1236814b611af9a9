"""The reconciler's view of Celery on Redis: where the deliveries are, and how to restore them.

Nothing here imports Celery or kombu, or unpickles anything: messages go back unchanged.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from jobguard.adapter import Source
from jobguard.adapters.celery.backlog import BacklogReader
from jobguard.adapters.celery.consumers import Workers
from jobguard.adapters.celery.envelope import (
    UnknownEnvelope,
    as_dead,
    decode,
    fresh,
    group_of,
    has_listeners,
    token_in,
)
from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.render import render
from jobguard.adapters.celery.results import Rejoin, Results, ends_of, part_of, read
from jobguard.adapters.celery.scan import Scan, messages_in, read_again, read_broker
from jobguard.client_list import Consumers
from jobguard.clients import own_client
from jobguard.members import nothing
from jobguard.model import (
    RAN_BEFORE_RECORD,
    Backlog,
    Delivery,
    Observation,
    OpenJoin,
    Owed,
    Part,
    Presence,
    Request,
    Restorable,
    Restored,
)
from jobguard.scripts import SEARCHED, Script, is_past, restored_by

if TYPE_CHECKING:
    import redis


_KEPT = 1.0
"""Seconds after its end for which a scan serves other pages too; a shorter scan: for its own length."""
_LARGE = 20_000
"""Messages of a scan that is too long to be made for each page: it is kept, and read on at the ends."""
_SHARE = 20
"""Such scans take at most one part in this many of the time."""
_USABLE = 5.0
"""Seconds for which a scan is proof enough to restore the deliveries that it did not see."""
_KEEP_FAILURE = 86_400
"""Seconds: as long as Celery keeps a result by default."""
_TIMEOUT = 1.0
_LONG_AGO = 3_600.0
"""Seconds after which a failure that an unguarded worker may have stored is believed."""


class CeleryBroker:
    """One Celery broker in one Redis."""

    def __init__(self, source: Source, client: redis.Redis):
        self._layout = Layout.parse(source.prefix)
        self._backlog = BacklogReader(client, self._layout)
        self._client = client
        self._restore = Script(client, __package__, "restore.lua")
        self._workers = Workers(client, source, self._layout, db=_db_of(client))
        self._rejoin = Rejoin(client, self._layout, db=_db_of(client))
        self._clients: dict[int, redis.Redis] = {}
        self._scan: Scan | None = None
        self._pause: Callable[[], None] = nothing

    def pause_with(self, work: Callable[[], None]) -> None:
        """Call this between two pieces of a long read; see Broker."""
        self._pause = work

    def presence(self, page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        """Return where Redis has each of these deliveries."""
        if not page:
            return {}
        scan = self._scan_for(page)
        scan.asked_for.update(owed.token.hex.encode() for owed in page)
        seen = {owed.token: _observe(scan, owed) for owed in page}
        absent = [owed for owed in page if seen[owed.token].presence is Presence.ABSENT]
        seen.update(self._ends(absent))
        return seen

    def restore(
        self, deliveries: Sequence[Restorable], *, deadline: float
    ) -> Mapping[UUID, Restored]:
        """Put these deliveries back, in this order, unless Redis' clock is past the deadline.

        Redis cannot be asked whether a message is in a list. The proof is the scan that did not see
        the message, together with a note of all that was put back since then.
        """
        done: dict[UUID, Restored] = {}
        calls: list[tuple[UUID, list[Any], list[Any]]] = []
        scan = self._proof(deliveries)
        # Messages that a dead worker had taken go back to the end that workers take from: the first
        # one last.
        taken_before = [delivery for delivery in deliveries if delivery.taken_by]
        for delivery in (*(d for d in deliveries if not d.taken_by), *reversed(taken_before)):
            try:
                call = self._call(delivery, deadline, scan)
            except UnknownEnvelope:
                done[delivery.token] = Restored.UNREADABLE
                continue
            if call is None:
                done[delivery.token] = Restored.PRESENT
            else:
                calls.append((delivery.token, *call))
        return done | restored_by(self._restore, calls)

    def abandon(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Do nothing: Celery itself recovers the messages of a dead worker, and the fence checks them."""

    def bury(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Store a failure, where results are kept as JSON, so that callers that wait for the result get it.

        Also delete the messages that the last of their workers had taken: Celery would bring those
        back in an hour.
        """
        if is_past(self._client, deadline):
            return
        scan = read_broker(self._client, self._layout, ())
        tags = [scan.taken[t].tag for o in page if (t := o.token.hex.encode()) in scan.taken]
        if tags:
            with self._client.pipeline() as pipe:
                pipe.hdel(self._layout.unacked, *tags)
                pipe.zrem(self._layout.unacked_index, *tags)
                pipe.execute()
        for results in self._workers.results():
            if results.json:
                self._fail(page, results)

    def report(
        self, dead: Sequence[Restorable], *, deadline: float, all_of_them: bool = False
    ) -> None:
        """Push those again that have error callbacks or a chord, so that a worker runs these."""
        seconds, micros = cast(Any, self._client).time()
        nowhere = Scan(frozenset(), int(seconds) * 1_000_000 + int(micros))
        calls: list[tuple[UUID, list[Any], list[Any]]] = []
        for one in dead:
            with suppress(UnknownEnvelope):
                wanted = all_of_them or has_listeners(one.envelope)
                call = self._call(one, deadline, nowhere) if wanted else None
                if call is not None:
                    keys, args = call
                    args[2] = as_dead(args[2])
                    calls.append((one.token, keys, args))
        restored_by(self._restore, calls)

    def hide(self, page: Sequence[Owed]) -> None:
        """Do nothing: a running task leaves no trace in the broker that other programs would look for."""

    def discard(self, page: Sequence[Owed], *, erase: bool = False) -> None:
        """Delete these messages from their lists; ``erase``: also where a worker took them."""
        client: Any = self._client
        wanted = {owed.token.hex.encode() for owed in page}
        with client.pipeline() as pipe:
            for key in self._layout.lists_of(sorted({owed.queue for owed in page})):
                if erase or client.llen(key) <= SEARCHED:
                    for raw in messages_in(client, [key]):
                        if token_in(raw) in wanted:
                            pipe.lrem(key, 1, raw)
            if erase:
                taken = read_broker(self._client, self._layout, ()).taken
                tags = [taken[token].tag for token in wanted if token in taken]
                if tags:
                    pipe.hdel(self._layout.unacked, *tags)
                    pipe.zrem(self._layout.unacked_index, *tags)
            pipe.execute()
        if erase:
            for results in self._workers.results():
                self._in(results).delete(*(results.tasks + owed.job_id for owed in page))

    def rejoin(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Put back the counters of these chords, where they are missing."""
        self._rejoin(joins, finish=finish, deadline=deadline)

    def parts(self, ended: Sequence[Restorable]) -> Mapping[UUID, Part]:
        """Return the parts of these tasks for their chords, from stored results, if both are JSON."""
        counting = {one.token: group for one in ended if (group := group_of(one.envelope))}
        ids = {one.token: one.job_id for one in ended if one.token in counting}
        found: dict[UUID, Part] = {}
        for results in self._workers.results() if ids else ():
            metas = read(self._in(results), results, list(ids.values()))
            for token, job_id in ids.items():
                part = part_of(*counting[token], job_id, metas.get(job_id, {}))
                if part is not None:
                    found[token] = part
        return found

    def backlog(
        self, queues: Collection[str], *, after: str = "", limit: int, mark: bool
    ) -> Backlog:
        """Return a page of the deliveries that wait in these queues; see Broker."""
        return self._backlog.page(queues, after=after, limit=limit, mark=mark)

    def consumers(self) -> Consumers:
        """Return Celery's names of the workers by queue, and the connections that are not guarded."""
        return self._workers.consumers()

    def render(self, request: Request, token: UUID) -> Delivery:
        """Return the delivery of a task that SQL or a schedule asked for."""
        return render(request, token, layout=self._layout)

    def _scan_for(self, page: Sequence[Owed]) -> Scan:
        """Return a scan that has not answered for these deliveries yet: the last one, if it is still young.

        Young means: since its end no more time has passed than the scan took, and no more than
        ``_KEPT``. The scan must also be younger than the youngest of these deliveries: it cannot have
        seen a message that was pushed after it.
        """
        queues = {owed.queue for owed in page}
        scan = self._scan
        if scan is not None and self._is_kept(scan, queues):
            tokens = [owed.token.hex.encode() for owed in page]
            if all(token in scan.waiting or token in scan.taken for token in tokens):
                return scan
            age = time.monotonic() - scan.begun
            if (
                age >= scan.cost + min(_KEPT, scan.cost)
                or age >= min(owed.age for owed in page)
                or not scan.asked_for.isdisjoint(tokens)
            ):
                read_again(self._client, self._layout, scan, self._pause)
            return scan
        if scan is not None:
            age = time.monotonic() - scan.begun
            if (
                age < scan.cost + min(_KEPT, scan.cost)
                and age < min(owed.age for owed in page)
                and scan.queues.issuperset(queues)
                and scan.asked_for.isdisjoint(owed.token.hex.encode() for owed in page)
            ):
                return scan
            queues |= scan.queues  # the next call will ask for the queues of the other pages
        scan = self._scan = read_broker(self._client, self._layout, queues, self._pause)
        return scan

    @staticmethod
    def _is_kept(scan: Scan, queues: set[str]) -> bool:
        """Return True if this scan is so long that it is only read on, and still young enough for that."""
        return (
            len(scan.waiting) >= _LARGE
            and time.monotonic() - scan.full_begun < _SHARE * scan.full_cost
            and scan.queues.issuperset(queues)
        )

    def _proof(self, deliveries: Sequence[Restorable]) -> Scan:
        scan = self._scan
        queues = {delivery.queue for delivery in deliveries}
        if (
            scan is not None
            and time.monotonic() - scan.begun < _USABLE
            and scan.queues.issuperset(queues)
        ):
            return scan
        if scan is not None and self._is_kept(scan, queues):
            read_again(self._client, self._layout, scan, self._pause)
            return scan
        scan = self._scan = read_broker(self._client, self._layout, queues, self._pause)
        return scan

    def _call(
        self, delivery: Restorable, deadline: float, scan: Scan
    ) -> tuple[list[Any], list[Any]] | None:
        """Return the keys and arguments of the restore; None if the message is there or needs nothing."""
        token = delivery.token.hex.encode()
        taken = scan.taken.get(token)
        if delivery.running or token in scan.waiting:
            return None
        if taken is not None and (not delivery.taken_by or taken.holder != delivery.taken_by):
            return None
        routing, message = decode(delivery.envelope)
        layout, expires = self._layout, delivery.expires_at
        return [
            layout.list_of(routing.queue, routing.step),
            layout.restored,
            layout.unacked,
            layout.unacked_index,
            layout.binding(routing.exchange),
        ], [
            repr(deadline),
            delivery.token.hex,
            fresh(message, delivery.token),
            scan.redis_time,
            "" if expires is None else repr(expires),
            taken.tag if taken is not None else "",
            taken.holder if taken is not None else "",
            routing.binding,
        ]

    def _ends(self, absent: Sequence[Owed]) -> dict[UUID, Observation]:
        """Return the ends that stored results show, without results of an earlier life of the same id."""
        now = time.time()
        since = {owed.job_id: now - owed.age - RAN_BEFORE_RECORD for owed in absent}
        ends: dict[str, Presence] = {}
        for results in self._workers.results() if absent else ():
            ends.update(ends_of(self._in(results), results, since))
        return {
            owed.token: Observation(ends[owed.job_id], "result", by_id=True)
            for owed in absent
            if owed.job_id in ends and _is_its_own(ends[owed.job_id], owed)
        }

    def _fail(self, page: Sequence[Owed], results: Results) -> None:
        client = self._in(results)
        ended = ends_of(client, results, {owed.job_id: float("-inf") for owed in page})
        with client.pipeline(transaction=False) as pipe:
            for owed in page:
                if owed.job_id not in ended:
                    key, value = results.tasks + owed.job_id, _failure(owed.job_id)
                    cast(Any, pipe).set(key, value, ex=_KEEP_FAILURE)
                    cast(Any, pipe).publish(key, value)
            pipe.execute()

    def _in(self, results: Results) -> redis.Redis:
        """Return a client for the db of the results."""
        if results.db == _db_of(self._client):
            return self._client
        if results.db not in self._clients:
            timeout = self._client.connection_pool.connection_kwargs.get("socket_timeout")
            other = own_client(self._client, timeout=timeout or _TIMEOUT)
            other.connection_pool.connection_kwargs["db"] = results.db
            self._clients[results.db] = other
        return self._clients[results.db]


def _observe(scan: Scan, owed: Owed) -> Observation:
    token = owed.token.hex.encode()
    if token in scan.waiting:
        return Observation(Presence.WAITING, "list")
    taken = scan.taken.get(token)
    if taken is not None:
        return Observation(Presence.WAITING, f"unacked:{taken.tag}", taken_by=taken.holder)
    return Observation(Presence.ABSENT, "missing")


def _failure(job_id: str) -> str:
    """Return the result of a task that too many workers died with, in Celery's format."""
    return json.dumps(
        {
            "status": "FAILURE",
            "result": {
                "exc_type": "WorkerLostError",
                "exc_message": ["jobguard gave it up: too many workers died with it"],
                "exc_module": "billiard.exceptions",
            },
            "traceback": None,
            "children": [],
            "date_done": datetime.now(UTC).isoformat(),
            "task_id": job_id,
        }
    )


def _is_its_own(end: Presence, owed: Owed) -> bool:
    """Return True if a stored end certainly belongs to this delivery, and is its last one.

    Celery also stores a failure when it could not write down a retry. That failure belongs to the
    attempt before, and is younger than the record of this attempt, which has not begun. And Celery
    stores a failure of a task that goes back into its queue (a time limit, without
    ``acks_on_failure_or_timeout``): the worker has released its claim then.
    """
    if end is not Presence.FAILED or owed.claim_number is not None:
        return True
    return owed.claims == 0 and owed.age > _LONG_AGO


def _db_of(client: redis.Redis) -> int:
    return int(client.connection_pool.connection_kwargs.get("db") or 0)
