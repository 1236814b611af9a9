"""The pages that only show something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from jobguard.dashboard.fields import query
from jobguard.errors import ConfigurationError
from jobguard.model import Outcome
from jobguard.operations.act import REPLAYED
from jobguard.operations.job import read_job
from jobguard.operations.read import STATES, JobFilter

if TYPE_CHECKING:
    from jobguard.dashboard.application import Site

_LIST = 50
_MINUTES = 60
CURVES = {
    "completed": ("completed",),
    "failed or dead": ("failed", "dead"),
    "put back": ("restored",),
}


def overview(site: Site, request: Request) -> Response:
    """Show what a person on call asks first."""
    now = site.watcher.overview()
    return site.render(
        request,
        "overview.html",
        now_=now,
        queues=sorted(now.queues, key=lambda q: (-q.counts.stuck, -q.owed, q.queue)),
        chart=chart_of(now.activity),
        incidents=site.ledger.incidents(site.namespace, limit=10),
    )


def queue(site: Site, request: Request) -> Response:
    """Show one queue: its numbers, curves, errors, and newest jobs."""
    name = query(request).get("name", "")
    now = site.watcher.overview()
    return site.render(
        request,
        "queue.html",
        name=name,
        queues=[one for one in now.queues if one.queue == name],
        trust=[one for one in now.state["queues"] if one["queue"] == name],
        held=[
            why for key, why in now.state["brake"]["held"].items() if key.partition("/")[2] == name
        ],
        chart=chart_of(site.ledger.activity(site.namespace, minutes=_MINUTES, queue=name)),
        errors=site.ledger.errors(site.namespace, queue=name, limit=10),
        page=site.ledger.list_jobs(site.namespace, JobFilter(queue=name), limit=20),
    )


def jobs(site: Site, request: Request) -> Response:
    """List jobs by filters."""
    given = query(request)
    wanted = filter_of(given)
    page = site.ledger.list_jobs(
        site.namespace, wanted, limit=_LIST, after=given.get("after") or None
    )
    return site.render(request, "jobs.html", page=page, given=given, states=STATES)


def job(site: Site, request: Request) -> Response:
    """Show everything about one job."""
    job_id = query(request).get("id", "")
    found = read_job(site.ledger, site.namespace, job_id, site.settings, site.brokers)
    return site.render(request, "job.html", 200 if found else 404, job=found)


def errors(site: Site, request: Request) -> Response:
    """Show the jobs that were given up, by kind of error."""
    name = query(request).get("queue") or None
    groups = site.ledger.errors(site.namespace, queue=name)
    return site.render(request, "errors.html", groups=groups, queue=name)


def incidents(site: Site, request: Request) -> Response:
    """Show losses and what people did, on a time line."""
    before = moment_in(query(request), "before")
    rows = site.ledger.incidents(site.namespace, limit=_LIST, before=before)
    more = rows[-1]["opened_at"].isoformat() if len(rows) == _LIST else None
    return site.render(request, "incidents.html", rows=rows, more=more)


def incident(site: Site, request: Request) -> Response:
    """Show what was put back while an incident was open."""
    number = query(request).get("id", "")
    if not number.isdecimal() or len(number) > 18:
        raise ConfigurationError("this is no number of an incident")
    rows = site.ledger.recovered(site.namespace, int(number), limit=500)
    return site.render(request, "incident.html", rows=rows, number=number)


def workers(site: Site, request: Request) -> Response:
    """Show the guarded workers."""
    gone = bool(query(request).get("gone"))
    rows = site.ledger.workers(site.namespace, gone=gone)
    return site.render(request, "workers.html", rows=rows, gone=gone)


def replay(site: Site, request: Request) -> Response:
    """Show the form of a replay."""
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    return site.render(
        request,
        "replay.html",
        since=(now - timedelta(minutes=10)).isoformat(timespec="minutes")[:16],
        until=now.isoformat(timespec="minutes")[:16],
        outcomes=REPLAYED,
        completed=Outcome.COMPLETED,
    )


def filter_of(given: Mapping[str, str]) -> JobFilter:
    """Return the filter that a form describes. Raises ConfigurationError."""
    priority = given.get("priority") or None
    if priority is not None and not priority.removeprefix("-").isdecimal():
        raise ConfigurationError(f"{priority!r} is no priority")
    return JobFilter(
        states=tuple(filter(None, given.get("state", "").split(","))),
        queue=given.get("queue") or None,
        task=given.get("task") or None,
        worker=given.get("worker") or None,
        since=moment_in(given, "since"),
        until=moment_in(given, "until"),
        error=given.get("error") or None,
        priority=None if priority is None else int(priority),
        due_before=moment_in(given, "due_before"),
    )


def moment_in(given: Mapping[str, str], name: str) -> datetime | None:
    """Return the time in a field, in UTC if it has no offset. Raises ConfigurationError."""
    text = given.get(name, "").strip()
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
        return at if at.tzinfo else at.replace(tzinfo=UTC)
    except ValueError:
        raise ConfigurationError(f"{text!r} is no time: give 2026-01-31T14:00") from None


def chart_of(activity: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the curves of the last hour, a point for each complete minute."""
    end = datetime.now(UTC).replace(second=0, microsecond=0)
    if activity:  # Each row tells the minute that runs by the database's clock.
        end = activity[0]["minute"].astimezone(UTC) + timedelta(minutes=activity[0]["minutes_ago"])
    minutes = [end - timedelta(minutes=ago) for ago in range(_MINUTES, 0, -1)]
    curves = {name: [0] * _MINUTES for name in CURVES}
    for row in activity:
        ago = row["minutes_ago"]
        for name, kinds in CURVES.items():
            if 1 <= ago <= _MINUTES and row["what"] in kinds:
                curves[name][-ago] += row["count"]
    return {"minutes": [int(at.timestamp()) for at in minutes], "curves": curves}
