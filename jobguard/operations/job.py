"""One job with all its deliveries: what happened to it, where it is now, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload
from uuid import UUID

from jobguard.errors import KeysUnavailable, NoRights, Unsealable
from jobguard.model import Presence
from jobguard.operations.brokers import LARGEST_ENVELOPE, Brokers, NoRedis, arguments_of
from jobguard.operations.explain import why_ended, why_owed, why_requested
from jobguard.operations.read import ReadModel
from jobguard.settings import Settings

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Job(Sequence[Row]):
    """A job: the sequence of its deliveries, newest first, each a mapping.

    A job has one delivery for each push: a retry supersedes the delivery before it. Of an unknown id there
    is none, and the job is false. Each delivery has ``state``, ``why``, its times, worker, attempt, errors,
    ``recoveries_by_cause``, and ``presence``: where Redis has it now (None: it has ended, or Redis was not
    asked or did not answer; then ``presence_error`` says why).
    """

    id: str
    deliveries: Sequence[Row] = ()
    arguments: Row | None = None
    """``args`` and ``kwargs``; None if they are pickled, redacted, or not kept."""
    arguments_note: str = ""
    """Why there are no arguments."""
    road: Sequence[Row] = field(default_factory=tuple)
    """All events of all deliveries in the order of time: ``at``, ``event``, ``token``, ``detail``."""

    @property
    def state(self) -> str:
        """The state of the newest delivery; "unknown" of an unknown id."""
        return str(self.deliveries[0]["state"]) if self.deliveries else "unknown"

    @property
    def why(self) -> str:
        """One sentence on why it stands there, and what happens next."""
        return str(self.deliveries[0]["why"]) if self.deliveries else "no such job is known"

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.deliveries[index]

    def __len__(self) -> int:
        return len(self.deliveries)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.deliveries)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data, for JSON."""
        return {
            "job_id": self.id,
            "state": self.state,
            "why": self.why,
            "arguments": self.arguments,
            "arguments_note": self.arguments_note,
            "deliveries": [dict(row) for row in self.deliveries],
            "road": [dict(event) for event in self.road],
        }


def read_job(
    model: ReadModel, namespace: str, job_id: str, settings: Settings, brokers: Brokers | None
) -> Job:
    """Return a job. ``brokers``: to ask Redis where it is; None: do not ask. Raises StoreUnavailable."""
    rows = model.job(namespace, job_id)
    if not rows:
        return Job(job_id)
    requested = [row for row in rows if row["token"] is None]
    owed = [row["token"] for row in rows if row["ended_at"] is None and row not in requested]
    standing = {row["token"]: row for row in model.standing(namespace, owed)} if owed else {}
    found, problem = _presence(list(standing.values()), brokers)
    recoveries: dict[UUID, list[Row]] = {}
    for one in model.recoveries([row["token"] for row in rows]):
        recoveries.setdefault(one["token"], []).append(one)
    deliveries = []
    for row in rows:
        token = row["token"]
        put_back = recoveries.get(token, [])
        added: dict[str, Any] = {"recovered": put_back, "presence": None, "presence_error": None}
        if token in standing:
            seen = found.get(token)
            added["presence"] = seen.presence.value if seen is not None else None
            added["presence_error"] = problem
            place: Presence | None = seen.presence if seen is not None else None
            added["why"] = why_owed(standing[token], place, settings)
        elif row in requested:
            added["why"] = why_requested(row)
        elif row["ended_at"] is None:
            added["why"] = "it ended at this moment"
        else:
            added["why"] = why_ended(row)
        deliveries.append({**row, **added})
    arguments, note = _arguments(model, namespace, rows, settings)
    return Job(job_id, deliveries, arguments, note, _road(deliveries))


def _presence(
    standing: list[Row], brokers: Brokers | None
) -> tuple[Mapping[UUID, Any], str | None]:
    if brokers is None or not standing:
        return {}, None
    found: dict[UUID, Any] = {}
    problem = None
    for source in {row["source"] for row in standing}:
        try:
            found.update(brokers.presence([row for row in standing if row["source"] == source]))
        except NoRedis as error:
            problem = str(error)
    return found, problem


def _arguments(
    model: ReadModel, namespace: str, rows: Sequence[Row], settings: Settings
) -> tuple[Row | None, str]:
    if settings.redact_arguments:
        return None, "redacted (redact_arguments)"
    for row in rows:
        if not row["kept"]:
            continue
        try:
            kept = model.envelope(namespace, row["token"], most=LARGEST_ENVELOPE)
        except (NoRights, Unsealable, KeysUnavailable) as error:
            return None, f"not readable here: {error}"
        if kept is not None:
            arguments = arguments_of(*kept)
            note = "" if arguments is not None else "not JSON: only the application can read them"
            return arguments, note
    return None, "not kept: the job has ended, or its message is large"


def _road(deliveries: Sequence[Row]) -> list[Row]:
    """Return the events of all deliveries in the order of time."""
    events: list[dict[str, Any]] = []

    def add(at: Any, event: str, row: Row, detail: str = "") -> None:
        if at is not None:
            events.append({"at": at, "event": event, "token": row["token"], "detail": detail})

    for row in deliveries:
        queue = f"queue {row['queue']}, attempt {row['attempt']}"
        add(row["recorded_at"], "recorded", row, queue)
        for one in row["recovered"]:
            add(one["restored_at"], "put back", row, one["cause"])
        worker = row["worker_name"] or row["worker"] or ""
        add(row["claimed_at"], "started", row, f"worker {worker}" if worker else "")
        detail = row["errors"][-1] if row["errors"] else ""
        add(row["ended_at"], row["state"], row, detail)
    return sorted(events, key=lambda event: event["at"])
