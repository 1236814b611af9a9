"""What Celery counts of a chord, put back from what the ledger knows of its parts."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jobguard.adapters.celery.envelope import UnknownEnvelope, as_part, decode, fresh
from jobguard.adapters.celery.layout import Layout
from jobguard.adapters.celery.results import Results
from jobguard.adapters.celery.scripts import Script
from jobguard.job import EndedPart, OpenJoin

if TYPE_CHECKING:
    import redis

log = logging.getLogger("jobguard")

_A_TRIP = 50


class Rejoin:
    """Puts back the chords of one broker."""

    def __init__(self, client: redis.Redis, layout: Layout, *, db: int) -> None:
        self._script = Script(client, "rejoin.lua")
        self._layout = layout
        self._db = db

    def __call__(self, joins: Sequence[OpenJoin], *, finish: bool, deadline: float) -> None:
        """Put back what is missing of these; ``finish``: have the last part of each told again."""
        calls = []
        for join in joins:
            try:
                call = self._call(join, finish=finish, deadline=deadline)
            except (UnknownEnvelope, ValueError, KeyError, TypeError) as error:
                log.warning(
                    "what Celery counted of chord %s cannot be put back: %s", join.id, error
                )
                continue
            if call is not None:
                calls.append(call)
        for at in range(0, len(calls), _A_TRIP):
            for answer in self._script.run(calls[at : at + _A_TRIP]):
                if isinstance(answer, Exception):
                    raise answer

    def _call(
        self, join: OpenJoin, *, finish: bool, deadline: float
    ) -> tuple[list[Any], list[Any]] | None:
        results = Results.heard(json.loads(join.state)) if join.state else None
        if results is None or not join.size:
            return None  # nobody opened it who could say where it is
        parts = list(join.parts)
        again, where = b"", ""
        if finish:
            last = next((part for part in reversed(parts) if part.envelope), None)
            if last is None:
                return None
            parts.remove(last)
            parts.append(last)
            routing, message = decode(last.envelope)
            again = as_part(fresh(message, last.token), last.state)
            where = self._layout.list_of(routing.queue, routing.step)
        keys = [f"{results.groups}{join.id}{suffix}" for suffix in (".s", ".j", ".d", ".c", ".t")]
        return [*keys, where], [
            repr(deadline),
            results.db,
            self._db,
            max(join.size, len(parts)) if finish else join.size,
            results.expires,
            int(results.ordered),
            again,
            *(field for part in parts for field in _fields(part)),
        ]


def _fields(part: EndedPart) -> tuple[str, str, bytes]:
    """Return a part as the script takes it: who it is of, its place in the header, and its result."""
    line, result = part.state.split(b"\n", 1)
    *_, job_id, place = json.loads(line)
    score = "+inf" if place is None else str(place)
    return f"{job_id}:{score}", score, result
