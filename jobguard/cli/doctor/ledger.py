"""What the ledger says: installation, leader, brake, incidents, settings, trust."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jobguard.cli.doctor.finding import Finding, note, ok, problem
from jobguard.cli.stats import trusted_since, why_not_trusted
from jobguard.operations.overview import holds
from jobguard.settings import Settings


def judge_ledger(settings: Settings, overview: dict[str, Any]) -> Iterator[Finding]:
    """Return the findings in the ledger's overview."""
    yield from _judge_installation(settings, overview["installation"])
    yield from _judge_leader(overview)
    for source in overview["sources"]:
        if source["settings"] and source["settings"] != settings.fingerprint():
            yield problem(
                f"source {source['address']}",
                f"was set up with {source['settings']!r}, here it is {settings.fingerprint()!r}",
                "processes that disagree record in one tenant and look in another, or one puts back what "
                "another only observes",
                "set JOBGUARD_NAMESPACE and JOBGUARD_MODE alike in every process, and in this command",
            )
    if not overview["sources"]:
        yield note("sources", f"nothing has been guarded yet in the namespace {settings.namespace}")
    yield from _judge_requests(overview)
    for queue in overview["queues"]:
        about = f"queue {queue['queue']}"
        if queue["trusted_since"] is not None:
            yield ok(about, trusted_since(queue["trusted_since"]))
        elif queue["unguarded"]:
            names = ", ".join(queue["unguarded"])
            yield problem(
                about, f"unguarded workers consume it, so its jobs are not put back: {names}"
            )
        else:
            why = why_not_trusted(queue)
            yield problem(about, f"not trusted yet, so its jobs are not put back: {why}")


def _judge_requests(overview: dict[str, Any]) -> Iterator[Finding]:
    held = overview["held_requests"]
    if held["count"]:
        yield problem(
            "requests",
            f"{held['count']} jobs that SQL or a schedule asked for cannot be sent, such as job "
            f"{held['job_id']}: {held['error']}",
            "they wait until a person decides",
            f"jobguard requeue {held['job_id']} when the cause is mended, or jobguard cancel",
        )
    for schedule in overview["failed_schedules"]:
        yield problem(
            f"schedule {schedule['name']}",
            f"cannot be planned: {schedule['error']}",
            "it sends no job",
            "change it with `jobguard schedules add`, or remove it",
        )


def _judge_installation(settings: Settings, installation: dict[str, Any]) -> Iterator[Finding]:
    about, name = "installation", installation["name"]
    if settings.installation is not None and name != settings.installation:
        yield problem(
            about, f"the database is {name!r}, JOBGUARD_INSTALLATION is {settings.installation!r}"
        )
    elif name is None:
        yield note(about, "the database has no name: `jobguard migrate --installation NAME`")
    else:
        yield ok(about, name)
    if installation["moved"]:
        yield problem(
            about,
            "this database is a copy, or was moved: if it is the right one, run "
            "`jobguard resume --moved`",
        )


def _judge_leader(overview: dict[str, Any]) -> Iterator[Finding]:
    leader, brake, workers = overview["leader"], overview["brake"], overview["workers"]
    if leader is not None and leader["live"]:
        yield ok("leader", f"{leader['host']} pid {leader['pid']}, term {leader['term']}")
    else:
        yield problem("leader", "no reconciler leads: run `jobguard reconcile`")
    if brake["paused_at"]:
        yield problem("brake", f"paused since {brake['paused_at']:%Y-%m-%d %H:%M:%S}")
    for held in holds(overview):
        where = f"{held.name} is held at {held.address}"
        yield problem("brake", f"{where}: {held.reason}; `{held.command}`")
    yield ok("workers", f"{workers['alive']} alive")
    for incident in overview["incidents"]:
        # Redis is full or lacks a right: a person must repair it.
        refuses = incident["cause"] == "push"
        yield (problem if refuses else note)(
            "incident", f"{incident['cause']} at {incident['address']}: {incident['detail']}"
        )
