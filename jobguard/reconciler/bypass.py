"""Bound the restores of deliveries that are never claimed.

Something can take jobs from Redis and run them in a way that jobguard does not see: a strategy
written by the user, a worker that was not counted, or a tool that deletes keys. An inspection finds
each of these jobs lost, again and again. A delivery that was restored twice and is absent again
without a claim is held, and an incident names its queue and task. A person decides with ``jobguard
requeue`` or ``guard.cancel``.

The bound does not apply to a delivery whose absence has a known cause: Redis lost data, or a dead
worker had taken it. A restore is not counted if after it a worker of the queue died that ran a job:
the delivery may have waited in that worker for its claim, above all while a job ran alone that had
killed a worker before. The crash budgets of the jobs that ran bound the number of such deaths. The
death of a worker that ran no job explains nothing: the delivery itself may have caused it.
"""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from jobguard.log import log_event
from jobguard.model import Cause, Owed
from jobguard.reconciler.result import Lost, PassResult, reported_absent
from jobguard.store.protocols import LeaderStore

_RESTORES = 2
"""How often a delivery is restored that no worker claims."""
_WHAT = "taken again and again without a claim: "
_REMEMBER = 100_000


class Bypass:
    """The deliveries of one source that are not restored any more."""

    def __init__(self, store: LeaderStore, source: int) -> None:
        self._store = store
        self._source = source
        self._known: set[UUID] = set()
        self._seen: set[str] = set()  # Paths that were seen in this walk over all owed deliveries.
        self._before: set[str] | None = None  # Paths that were seen in the walk before.
        self._open: dict[str, int] | None = None

    def without(self, term: int, lost: list[Lost], done: PassResult) -> list[Lost]:
        """Return the deliveries that may be restored."""
        unclaimed = [one.owed for one in lost if _is_unclaimed(one)]
        if not unclaimed:
            return lost
        counts = self._store.restores(self._source, [owed.token for owed in unclaimed])
        held = [owed for owed in unclaimed if counts.get(owed.token, 0) >= _RESTORES]
        if held:
            done.bypassed += len(held)
            self._report(term, held)
        tokens = {owed.token for owed in held}
        return [one for one in lost if one.owed.token not in tokens]

    def _report(self, term: int, held: Sequence[Owed]) -> None:
        opened = self._incidents()
        paths: dict[str, list[UUID]] = {}
        for owed in held:
            paths.setdefault(_path(owed), []).append(owed.token)
        for path, tokens in paths.items():
            self._seen.add(path)
            if path not in opened:
                opened[path] = self._store.open_incident(
                    term, self._source, Cause.UNEXPLAINED, path, None
                )
                log_event("restores_held", path=path, count=len(tokens))
            fresh = set(tokens) - self._known
            if fresh:
                self._known = fresh if len(self._known) > _REMEMBER else self._known | fresh
                self._store.progress(
                    term, opened[path], missing=len(fresh), restored=0, close=False
                )

    def lap_over(self, term: int) -> None:
        """Close the incidents for which two whole walks have seen no delivery."""
        for path, incident in list(self._incidents().items()):
            if self._before is not None and path not in self._seen | self._before:
                self._store.progress(term, incident, missing=0, restored=0, close=True)
                del self._incidents()[path]
        self._before, self._seen = self._seen, set()

    def _incidents(self) -> dict[str, int]:
        """Return the open incidents, including those of an earlier leader."""
        if self._open is None:
            self._open = {
                incident.detail: incident.id
                for incident in self._store.incidents(self._source)
                if incident.detail.startswith(_WHAT)
            }
        return self._open


def _path(owed: Owed) -> str:
    return f"{_WHAT}task {owed.task} of queue {owed.queue}"


def _is_unclaimed(lost: Lost) -> bool:
    owed = lost.owed
    return (
        owed.recoveries >= _RESTORES
        and not owed.claims
        and owed.claim_number is None
        and lost.cause is not Cause.INCIDENT
        and not lost.taken_by
        and not reported_absent(owed)
    )
