"""One sentence on why a delivery stands where it stands, and what happens next. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobguard.model import Presence
from jobguard.settings import Settings

_LEADERLESS = "no reconciler leads: run `jobguard reconcile`"


def duration(seconds: float) -> str:
    """Return a length of time in a short form: 4 s, 3 min, 2 h, 5 d."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def why_requested(row: Mapping[str, Any]) -> str:
    """Return why a job that SQL or a schedule asked for has no delivery yet."""
    if row["state"] == "held":
        return (
            f"it cannot be sent: {row['errors'][-1]}; mend the cause and `jobguard requeue` it, or "
            "`jobguard cancel` it"
        )
    return "it was requested; the reconciler that leads sends it within a second"


def why_ended(row: Mapping[str, Any]) -> str:
    """Return the sentence for a delivery that has ended. ``row``: a row of the history."""
    state = row["state"]
    reasons = str((row.get("errors") or [""])[-1]).strip().splitlines()
    reason = reasons[-1][:200] if reasons else f"{row['crashes']} worker deaths"
    if row.get("next") is not None:
        return f"{state}; it was sent again as delivery {row['next']}"
    return {
        "completed": "it ran to its end",
        "failed": "its library gave it up; `jobguard dead requeue` sends it again",
        "dead": f"given up: {reason}; `jobguard dead requeue` sends it again",
        "cancelled": "cancelled: it does not run again",
        "superseded": "a later delivery of the same job replaced it",
    }[state]


def why_owed(row: Mapping[str, Any], presence: Presence | None, settings: Settings) -> str:
    """Return the sentence for an owed delivery. ``row``: of ReadModel.standing.

    ``presence``: where Redis has it now; None: Redis could not be asked.
    """
    if row["claim_number"] is not None:
        return _claimed(row, settings)
    if row["in_outbox"]:
        return _with_leader(row, "recorded, and the leader pushes it at once")
    if row["due_in"] > 0:
        return _scheduled(row, presence, settings)
    if row["backoff"] > 0:
        return _with_leader(
            row,
            f"its worker died ({row['crashes']} of {settings.crash_budget} times); it goes back in "
            f"{duration(row['backoff'])}",
        )
    if row["suspected"] is not None or presence in (Presence.ABSENT, Presence.OVERWRITTEN):
        return _absent(row, presence, settings)
    if presence is Presence.RUNNING:
        return "Redis shows it as running, and no claim is recorded: an unguarded worker may run it"
    if presence in (Presence.FINISHED, Presence.FAILED, Presence.CANCELLED):
        return _with_leader(
            row, f"its library shows it as {presence.value}; the leader records this end"
        )
    if presence is Presence.SCHEDULED:
        return "it waits in Redis until the jobs that it depends on have ended, or until it is due"
    if presence is None:
        return f"recorded {duration(row['age'])} ago, and waits for a worker as far as is known"
    return f"it waits in Redis for a worker of queue {row['queue']}, for {duration(row['age'])}"


def _claimed(row: Mapping[str, Any], settings: Settings) -> str:
    ran = duration(row["running_for"] or 0)
    name = row["worker_name"] or "a worker that is not known"
    if row["runs"]:
        return f"it runs for {ran} on {name}, which beat {duration(row['beat_age'] or 0)} ago"
    for ago, what in ((row["dead_for"], "died"), (row["left_for"], "left")):
        if ago is not None:
            return _next(row, f"claimed by a worker that {what} {duration(ago)} ago", 0.0)
    if not row["worker_known"]:
        return _next(row, "claimed by a worker that is not known any more", 0.0)
    silent = row["beat_age"] or 0.0
    if silent > 2 * settings.beat_interval:
        left = max(0.0, settings.worker_timeout - silent)
        return _next(
            row,
            f"claimed by {name}, which has been silent for {duration(silent)}",
            left + settings.beat_interval,
        )
    return _next(
        row, f"claimed by {name}, which is alive and does not list it any more", settings.grace
    )


def _scheduled(row: Mapping[str, Any], presence: Presence | None, settings: Settings) -> str:
    due = f"due in {duration(row['due_in'])}"
    if presence is Presence.ABSENT:
        return _next(row, f"{due}, and absent from Redis", settings.grace)
    return due if presence is None else f"{due}; Redis holds it until then"


def _absent(row: Mapping[str, Any], presence: Presence | None, settings: Settings) -> str:
    if presence in (Presence.WAITING, Presence.SCHEDULED):
        return "it was seen absent, and Redis has it again; the leader forgets the suspicion"
    if presence is Presence.OVERWRITTEN:
        return (
            "another delivery of its id is in its place; the leader closes it when this is certain"
        )
    if not row["unsent"] and (row["suspected"] == "untrusted" or row["trusted"] is False):
        return "absent from Redis, and an unguarded worker may have run it: check, then `jobguard requeue`"
    if row["unguarded"]:
        return (
            f"absent from Redis; queue {row['queue']} has unguarded workers, so nothing goes back: see "
            "`jobguard doctor`"
        )
    seen = row["suspected_for"]
    grace = settings.loss_grace if row["suspected"] in ("incident", "worker") else settings.grace
    left = grace if seen is None else max(0.0, grace - seen)
    cause = f" ({row['suspected']})" if row["suspected"] else ""
    return _next(row, f"absent from Redis{cause}", left)


def _next(row: Mapping[str, Any], fact: str, seconds: float) -> str:
    """Add what happens next to a fact about a delivery that is to go back."""
    if row["paused_at"] is not None:
        return f"{fact}; recoveries are paused: `jobguard resume`"
    if row["held"]:
        reason = row["held"].get("reason", "")
        return f"{fact}; queue {row['queue']} is held ({reason}): `jobguard resume --queue NAME`"
    if not row["led"]:
        return f"{fact}; {_LEADERLESS}"
    if row["crashes"] >= 1 and row["claim_number"] is not None and row["left_for"] is None:
        fact = f"{fact} (death {row['crashes'] + 1})"
    wait = max(seconds, row["backoff"])
    return f"{fact}; goes back in {duration(wait)}" if wait >= 1 else f"{fact}; goes back now"


def _with_leader(row: Mapping[str, Any], fact: str) -> str:
    return fact if row["led"] else f"{fact}; {_LEADERLESS}"
