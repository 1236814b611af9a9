"""The state of a namespace at one moment, as `jobguard top` and the page show it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobguard.operations.explain import duration
from jobguard.operations.read import Counted, ReadModel
from jobguard.store.protocols import Counts

_MINUTES = 60
_RECENT = 5
"""Minutes over which a rate is averaged."""


@dataclass(frozen=True, slots=True)
class Hold:
    """One hold, as it is shown to a person."""

    name: str
    address: str
    reason: str
    command: str
    """The command that ends it."""


def unsent(state: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for what SQL or a schedule asked for, and the leader cannot send."""
    held = state["held_requests"]
    if held["count"]:
        yield (
            f"NOT SENT: {held['count']} jobs that SQL or a schedule asked for, such as {held['job_id']}: "
            f"{held['error']}"
        )
    for schedule in state["failed_schedules"]:
        yield f"NOT PLANNED: schedule {schedule['name']}: {schedule['error']}"


def holds(state: Mapping[str, Any]) -> Iterator[Hold]:
    """Yield the holds of an overview of the ledger."""
    addresses = {str(source["id"]): source["address"] for source in state["sources"]}
    for key, why in state["brake"]["held"].items():
        source, _, queue = key.partition("/")
        whole = queue == "*"
        yield Hold(
            "every queue" if whole else f"queue {queue}",
            addresses.get(source, source),
            why.get("reason", ""),
            "jobguard resume" if whole else f"jobguard resume --queue {shlex.quote(queue)}",
        )


@dataclass(frozen=True, slots=True)
class QueueNow:
    """One queue of one source."""

    source: str
    queue: str
    counts: Counts
    oldest: float | None
    """Seconds since its oldest pending job was due."""
    ended_a_minute: float
    restored_a_minute: float

    @property
    def owed(self) -> int:
        """The number of owed jobs."""
        return self.counts.pending + self.counts.scheduled + self.counts.processing


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything that a first look asks."""

    namespace: str
    state: Mapping[str, Any]
    """Leader, brake, sources, installation and queues: see ReadModel.state."""
    counted: Counted
    queues: Sequence[QueueNow]
    workers: Sequence[Mapping[str, Any]]
    open_incidents: Sequence[Mapping[str, Any]]
    activity: Sequence[Mapping[str, Any]]
    """What ended and was restored in each of the last minutes."""

    def lines(self) -> Iterator[str]:
        """Yield what a person must know first, a sentence each."""
        leader, brake = self.state["leader"], self.state["brake"]
        if leader is None:
            yield "leader: none yet; run `jobguard reconcile`"
        elif not leader["live"]:
            yield f"leader: NONE; {leader['host']} pid {leader['pid']} led last (term {leader['term']})"
        else:
            yield f"leader: {leader['host']} pid {leader['pid']}, term {leader['term']}"
        if brake["paused_at"]:
            yield f"PAUSED since {brake['paused_at']:%Y-%m-%d %H:%M:%S}: `jobguard resume`"
        for held in holds(self.state):
            yield f"HELD: {held.name} of {held.address}: {held.reason}"
        yield from unsent(self.state)
        for source in self.state["sources"]:
            if source["watched_seconds"] is None:
                yield f"{source['library']} at {source['address']} was never watched"
            elif source["watched_seconds"] > 10:
                ago = duration(source["watched_seconds"])
                yield f"{source['library']} at {source['address']} was last watched {ago} ago"
        for queue in self.state["queues"]:
            if queue["unguarded"]:
                yield (
                    f"NOT TRUSTED: queue {queue['queue']} has unguarded workers, and nothing goes back: "
                    f"{', '.join(queue['unguarded'])}"
                )
        total = self.counted.total
        when = f", as counted {self.counted.at:%H:%M:%S}" if self.counted.at else ""
        yield (
            f"owed: {total.pending:,} pending, {total.scheduled:,} scheduled, {total.processing:,} "
            f"processing, {total.stuck:,} of them stuck{when}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        return {
            **self.state,
            "counted_at": self.counted.at,
            "total": asdict(self.counted.total),
            "counts": [
                {
                    "source": one.source,
                    "queue": one.queue,
                    **asdict(one.counts),
                    "oldest_pending_seconds": one.oldest,
                    "ended_a_minute": one.ended_a_minute,
                    "restored_a_minute": one.restored_a_minute,
                }
                for one in self.queues
            ],
            "workers": list(self.workers),
            "incidents": list(self.open_incidents),
            "activity": list(self.activity),
        }


def overview_of(model: ReadModel, namespace: str) -> Overview:
    """Read the state of a namespace. Raises StoreUnavailable."""
    counted = model.counts(namespace)
    activity = model.activity(namespace, minutes=_MINUTES)
    return Overview(
        namespace,
        model.state(namespace),
        counted,
        _queues(counted, activity),
        model.workers(namespace),
        model.incidents(namespace, still_open=True),
        activity,
    )


def _queues(counted: Counted, activity: Sequence[Mapping[str, Any]]) -> list[QueueNow]:
    # Of complete minutes, so that a rate changes once a minute; or of the first minute, which still runs.
    age = min(_RECENT, max((row["minutes_ago"] for row in activity), default=0))
    spread: dict[tuple[str, str, str], int] = {}
    for row in activity:
        if min(1, age) <= row["minutes_ago"] <= age:
            what = "restored" if row["what"] == "restored" else "ended"
            key = (row["source"], row["queue"], what)
            spread[key] = spread.get(key, 0) + row["count"]
    span = max(1, age)
    return [
        QueueNow(
            source,
            queue,
            counts,
            counted.oldest.get((source, queue)),
            spread.get((source, queue, "ended"), 0) / span,
            spread.get((source, queue, "restored"), 0) / span,
        )
        for (source, queue), counts in counted.counts.items()
    ]
