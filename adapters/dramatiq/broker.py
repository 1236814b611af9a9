"""The reconciler's view of a RedisBroker: where its messages are, and how they are restored.

This module imports neither Dramatiq nor user code, and decodes no message.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from redis.exceptions import RedisError

from jobguard.adapter import Source
from jobguard.adapters.dramatiq.backlog import BacklogReader
from jobguard.adapters.dramatiq.envelope import UnknownEnvelope, decode
from jobguard.adapters.dramatiq.layout import (
    Layout,
    canonical,
    counted_key,
    finish_key,
    is_short_lived,
    is_stranger,
    is_worker,
    name_of,
    worker_of,
)
from jobguard.adapters.dramatiq.render import render
from jobguard.client_list import Consumers
from jobguard.members import ListReader
from jobguard.model import (
    Backlog,
    Delivery,
    EndedPart,
    Observation,
    OpenJoin,
    Owed,
    Part,
    Presence,
    Request,
    Restorable,
    Restored,
)
from jobguard.scripts import RESTORES_A_TRIP, SEARCHED, Script, chunks, restored_by

if TYPE_CHECKING:
    import redis


IDS_A_CALL = 1_000
"""Number of ids in one script call. Redis is blocked during a script: 1,000 ids take about 2 ms."""
_SILENT = 10_000
"""Milliseconds of silence after which a worker, which polls every second, has made its last fetch."""
_CONSUMER_SECONDS = 15.0
"""Seconds after its last heartbeat in Redis for which a process counts as a consumer."""
_FIRST_INSPECTION = 60.0
"""The same limit at the first inspection, where the clocks of two machines are compared."""


class DramatiqBroker:
    """The keys of one RedisBroker in one Redis."""

    def __init__(self, source: Source, client: redis.Redis):
        self._layout = Layout.parse(source.prefix)
        self._backlog = BacklogReader(client, self._layout)
        self._address = source.address
        self._client = cast(Any, client)
        self._presence = Script(client, __package__, "presence.lua")
        self._restore = Script(client, __package__, "restore.lua")
        self._report = Script(client, __package__, "report.lua")
        self._abandon = Script(client, __package__, "abandon.lua")
        self._bury = Script(client, __package__, "bury.lua")
        self._rejoin = Script(client, __package__, "rejoin.lua")
        self._discard = Script(client, __package__, "discard.lua")
        self._reader = ListReader(self._client)
        self._heartbeats: dict[str, tuple[float, float]] | None = None
        """By worker: its last heartbeat, and the time (by our clock) when that heartbeat was first seen."""

    def presence(self, page: Sequence[Owed]) -> Mapping[UUID, Observation]:
        """Return where Redis has each of these deliveries.

        The order is: the message, then the lists, then the sets of fetched ids. A delivery that
        moves in the meantime is therefore seen twice and not missed. A delivery that is restored in
        the meantime may be missed once.
        """
        places = dict(zip((owed.token for owed in page), self._places(page), strict=True))
        names = {owed.token: _list_of(owed.queue, places[owed.token]) for owed in page}
        there = {token: name for token, name in names.items() if name}
        ages = {owed.token: owed.age for owed in page}
        wanted: dict[str, dict[bytes, float]] = {}
        for token, name in there.items():
            wanted.setdefault(self._layout.key(name), {})[str(token).encode()] = ages[token]
        lists = self._reader.find(wanted)
        holders = self._holders(
            {
                t: name
                for t, name in there.items()
                if str(t).encode() not in lists[self._layout.key(name)]
            }
        )
        return {
            owed.token: _observe(
                places[owed.token],
                in_list=str(owed.token).encode()
                in lists.get(self._layout.key(names[owed.token]), ()),
                holder=holders.get(owed.token),
            )
            for owed in page
        }

    def restore(
        self, deliveries: Sequence[Restorable], *, deadline: float
    ) -> Mapping[UUID, Restored]:
        """Restore these in this order, each atomically, unless the clock of Redis is past the deadline."""
        done: dict[UUID, Restored] = {}
        calls: list[tuple[UUID, list[Any], list[Any]]] = []
        for delivery in deliveries:
            if delivery.running:  # a running delivery is not searched for
                done[delivery.token] = Restored.PRESENT
                continue
            try:
                calls.append((delivery.token, *self._call(delivery, deadline)))
            except UnknownEnvelope:
                done[delivery.token] = Restored.UNREADABLE
        return done | restored_by(self._restore, calls)

    def abandon(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Remove these from the fetched ids of silent workers; else Dramatiq would requeue them."""
        acks = self._layout.acks_prefix
        self._abandon.run(
            [
                (
                    [self._layout.heartbeats],
                    [str(owed.token), acks, owed.queue, _SILENT, repr(deadline)],
                )
                for owed in page
            ]
        )

    def bury(self, page: Sequence[Owed], *, deadline: float) -> None:
        """Show these among the dead letters, where people search for them."""
        acks = self._layout.acks_prefix
        self._bury.run(
            [
                (self._lists_of(owed.queue), [str(owed.token), acks, owed.queue, repr(deadline)])
                for owed in page
            ]
        )

    def report(
        self, dead: Sequence[Restorable], *, deadline: float, all_of_them: bool = False
    ) -> None:
        """Push these once more: only a worker knows whether their actors have a failure callback."""
        calls: list[tuple[list[Any], list[Any]]] = []
        for one in dead:
            with suppress(UnknownEnvelope):
                envelope = decode(one.envelope)
                list_ = self._layout.key(canonical(envelope.queue))
                mark = self._layout.report(one.token)
                args = [repr(deadline), str(one.token), envelope.data_for(one.token)]
                calls.append(([list_, f"{list_}.msgs", mark], args))
        for batch in chunks(calls, RESTORES_A_TRIP):
            self._report.run(batch)

    def hide(self, page: Sequence[Owed]) -> None:
        """Do nothing: nothing of a running delivery is restored."""

    def discard(self, page: Sequence[Owed], *, erase: bool = False) -> None:
        """Delete these messages, except those that a worker has fetched; ``erase``: those too."""
        layout = self._layout
        calls: list[tuple[list[Any], list[Any]]] = []
        for owed in page:
            args = [str(owed.token), layout.acks_prefix, owed.queue, "1" if erase else "", SEARCHED]
            calls.append((self._lists_of(owed.queue), args))
        for batch in chunks(calls, RESTORES_A_TRIP):
            _raise_error(self._discard.run(batch))

    def parts(self, ended: Sequence[Restorable]) -> Mapping[UUID, Part]:
        """Return nothing: Redis keeps nothing of a completed message, so an inspection cannot see it."""
        return {}

    def rejoin(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Restore the barriers of these groups; with ``finish``, notify a worker of each complete group."""
        if finish:
            self._finish(joins, deadline)
            return
        calls = []
        for join in joins:
            state = json.loads(join.state or b"{}")
            # A barrier in another Redis was not lost with this one. A group without a barrier, or
            # with one of another version, is left alone.
            if state.get("at") != self._address or not join.size:
                continue
            counted = [part.job_id for part in join.parts]
            left = max(1, join.size - len(counted))
            keys = [join.id, counted_key(join.id)]
            calls.append((keys, [repr(deadline), left, state["ttl"], *counted]))
        for batch in chunks(calls, RESTORES_A_TRIP):
            _raise_error(self._rejoin.run(batch))

    def _finish(self, joins: Sequence[OpenJoin], deadline: float) -> None:
        """Push the last member again; its worker finds that it has ended, and reads the finish key."""
        parts_counted: list[tuple[OpenJoin, EndedPart]] = []
        for join in joins:
            part = next((part for part in reversed(join.parts) if part.envelope), None)
            if part is not None:
                parts_counted.append((join, part))
        with self._client.pipeline(transaction=False) as pipe:
            for join, _ in parts_counted:
                pipe.set(finish_key(join.id), 1, ex=86_400)
            pipe.execute()
        again = [
            Restorable(part.token, part.job_id, part.queue, part.envelope, None, None)
            for _, part in parts_counted
        ]
        self.restore(again, deadline=deadline)

    def backlog(
        self, queues: Collection[str], *, after: str = "", limit: int, mark: bool
    ) -> Backlog:
        """Return a page of the deliveries that wait in these queues; see Broker."""
        return self._backlog.page(queues, after=after, limit=limit, mark=mark)

    def consumers(self) -> Mapping[str, frozenset[str]]:
        """Return the workers that may consume any queue: the guarded ones, and all that may be unguarded.

        Redis does not know which queues an idle worker polls. It also cannot distinguish a worker
        from a producer that sends a heartbeat now and then. So every process that sends heartbeats
        and is not known as guarded may have consumed any queue.
        """
        now = time.monotonic()
        beats = dict(self._client.zrange(self._layout.heartbeats, 0, -1, withscores=True))
        seen, known = (
            {raw.decode(errors="replace"): score for raw, score in beats.items()},
            self._heartbeats,
        )
        if known is None:
            cut = (float(self._client.time()[0]) - _FIRST_INSPECTION) * 1000
            never = float("-inf")
            self._heartbeats = {
                w: (score, now if score > cut else never) for w, score in seen.items()
            }
        else:
            self._heartbeats = {
                worker: known[worker] if known.get(worker, (None,))[0] == score else (score, now)
                for worker, score in seen.items()
            }
        active = [
            worker for worker, (_, at) in self._heartbeats.items() if now - at < _CONSUMER_SECONDS
        ]
        guarded = frozenset(map(name_of, filter(is_worker, active)))
        strangers = frozenset(filter(is_stranger, active))
        return Consumers({}, strangers | guarded, proved=guarded, alive=guarded)

    def render(self, request: Request, token: UUID) -> Delivery:
        """Return the delivery of a message that SQL or a schedule asked for."""
        return render(request, token)

    def _places(self, page: Sequence[Owed]) -> Iterator[str]:
        for owed in chunks(page, IDS_A_CALL):
            pairs = chain.from_iterable((str(one.token), one.queue) for one in owed)
            (answer,) = _raise_error(self._presence.run([([], [self._layout.key(""), *pairs])]))
            self._reader.pause()
            yield from answer.decode()

    def pause_with(self, work: Callable[[], None]) -> None:
        """Call this between two pieces of a long read; see Broker."""
        self._reader.pause = work

    def _holders(self, unlisted: Mapping[UUID, str]) -> dict[UUID, str]:
        """Return the worker that has fetched each of these (token, list) pairs."""
        if not unlisted:
            return {}
        workers = [
            raw.decode(errors="replace")
            for raw in self._client.zrange(self._layout.heartbeats, 0, -1)
        ]
        of: dict[str, list[UUID]] = {}
        for token, name in unlisted.items():
            of.setdefault(name, []).append(token)
        asked = [(worker, name) for name in of for worker in workers if not is_short_lived(worker)]
        with self._client.pipeline(transaction=False) as pipe:
            for worker, name in asked:
                pipe.smismember(self._layout.acks(worker, name), [str(t) for t in of[name]])
            answers = pipe.execute() if asked else []
        return {
            token: name_of(worker)
            for (worker, name), fetched in zip(asked, answers, strict=True)
            for token, has in zip(of[name], fetched, strict=True)
            if has
        }

    def _call(self, delivery: Restorable, deadline: float) -> tuple[list[Any], list[Any]]:
        envelope, layout = decode(delivery.envelope), self._layout
        list_, expires = layout.key(envelope.queue), delivery.expires_at
        dead_letters = layout.key(canonical(envelope.queue))
        return [list_, f"{list_}.msgs", f"{dead_letters}.XQ.msgs", layout.heartbeats], [
            repr(deadline),
            str(delivery.token),
            envelope.data_for(delivery.token),
            "" if expires is None else int(expires * 1000),
            layout.acks_prefix,
            envelope.queue,
            worker_of(delivery.taken_by),
        ]

    def _lists_of(self, queue: str) -> list[str]:
        names = (queue, f"{queue}.DQ", f"{queue}.XQ")
        keys = [self._layout.key(end) for name in names for end in (name, f"{name}.msgs")]
        return [*keys, self._layout.heartbeats]


def _list_of(queue: str, place: str) -> str:
    """Return the list that must contain a message at this place; '' if there is none."""
    return {"1": queue, "2": f"{queue}.DQ"}.get(place, "")


def _observe(place: str, *, in_list: bool, holder: str | None) -> Observation:
    if place == "0":
        return Observation(Presence.ABSENT, "missing")
    if place == "3":
        return Observation(Presence.FAILED, "dead letter")
    delayed = place == "2"
    if in_list:
        return Observation(Presence.SCHEDULED if delayed else Presence.WAITING, "list")
    if holder is not None:  # fetched: it runs, or it is about to run
        state = Presence.SCHEDULED if delayed else Presence.RUNNING
        return Observation(state, "fetched", taken_by=holder)
    # Dramatiq writes the message and its place in one script.
    return Observation(Presence.ABSENT, "stranded", pushed=True)


def _raise_error(answers: list[Any]) -> list[Any]:
    for answer in answers:
        if isinstance(answer, RedisError):
            raise answer
    return answers
