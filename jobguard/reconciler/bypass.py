"""The bound on restores that nobody claims.

Something can take jobs from Redis and run them by a way that jobguard does not see: a strategy of the
user's own, a worker that nobody could account for, a tool that deletes. To a look each of these jobs is
lost, again and again. After a delivery was put back twice, and has vanished again without a claim, it is
held, and an incident names its queue and task. A person decides: ``jobguard requeue`` or ``guard.cancel``.

What Redis lost with everything else, and what a dead worker had taken, vanished for a reason that is known.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from uuid import UUID

from jobguard.log import log_event
from jobguard.model import Cause, Owed
from jobguard.reconciler.result import PassResult, reported_absent
from jobguard.store.protocols import LeaderStore

_RESTORES = 2
"""How often a delivery is put back that nobody claims."""
_WHAT = "taken again and again without a claim: "
_REMEMBER = 100_000


class Bypass:
    """The deliveries of one source that are put back no more."""

    def __init__(self, store: LeaderStore, source: int) -> None:
        self._store = store
        self._source = source
        self._known: set[UUID] = set()
        self._seen: set[str] = set()  # in this walk over all that is owed
        self._before: set[str] | None = None  # in the one before
        self._open: dict[str, int] | None = None

    def without(
        self,
        term: int,
        lost: list[tuple[Owed, Cause]],
        left: Container[UUID],
        done: PassResult,
    ) -> list[tuple[Owed, Cause]]:
        """Return what may be put back. ``left``: what a worker had taken that is gone."""
        doubtful = [owed for owed, cause in lost if _is_doubtful(owed, cause, left)]
        if not doubtful:
            return lost
        counts = self._store.restores(self._source, [owed.token for owed in doubtful])
        held = [owed for owed in doubtful if counts.get(owed.token, 0) >= _RESTORES]
        if held:
            done.bypassed += len(held)
            self._tell(term, held)
        tokens = {owed.token for owed in held}
        return [(owed, cause) for owed, cause in lost if owed.token not in tokens]

    def _tell(self, term: int, held: Sequence[Owed]) -> None:
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
        """Close the incidents of which two whole walks have seen no delivery any more."""
        for path, incident in list(self._incidents().items()):
            if self._before is not None and path not in self._seen | self._before:
                self._store.progress(term, incident, missing=0, restored=0, close=True)
                del self._incidents()[path]
        self._before, self._seen = self._seen, set()

    def _incidents(self) -> dict[str, int]:
        """Return the open ones, also those of an earlier leader."""
        if self._open is None:
            self._open = {
                incident.detail: incident.id
                for incident in self._store.incidents(self._source)
                if incident.detail.startswith(_WHAT)
            }
        return self._open


def _path(owed: Owed) -> str:
    return f"{_WHAT}task {owed.task} of queue {owed.queue}"


def _is_doubtful(owed: Owed, cause: Cause, left: Container[UUID]) -> bool:
    return (
        owed.recoveries >= _RESTORES
        and not owed.claims
        and owed.claim_number is None
        and cause is not Cause.INCIDENT
        and owed.token not in left
        and not reported_absent(owed)
    )
