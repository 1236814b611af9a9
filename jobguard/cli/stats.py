"""``jobguard stats``: how many jobs are in which state."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from jobguard.cli.common import (
    ago,
    cell,
    console,
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
    print_json,
    safe,
)
from jobguard.operations.overview import holds, unsent
from jobguard.operations.read import total_of
from jobguard.store.protocols import Counts

if TYPE_CHECKING:
    from rich.table import Table

STATES = tuple(field.name for field in dataclasses.fields(Counts))


@click.command()
@postgres_option
@namespace_option
@json_option
def command(postgres: str | None, namespace: str | None, as_json: bool) -> None:
    """Show how many jobs are in which state.

    Stuck jobs are absent from Redis, or claimed by a dead worker, and not put back yet. They are also
    pending or processing, and the total counts them once.
    """
    with open_ledger(postgres, namespace) as (ledger, tenant):
        counts, overview = ledger.stats(tenant), ledger.overview(tenant)
    if as_json:
        print_json(_report(counts, overview))
        return
    out = console()
    out.print(_table(counts))
    for line in chain(_lines(overview), _trust(overview), _legend(total_of(counts.values()))):
        out.print(safe(line), markup=False)


def _report(
    counts: Mapping[tuple[str, str], Counts], overview: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        **overview,
        "total": _with_total(total_of(counts.values())),
        "counts": [
            {"source": source, "queue": queue, **_with_total(one)}
            for (source, queue), one in counts.items()
        ],
    }


def _with_total(counts: Counts) -> dict[str, int]:
    return {**dataclasses.asdict(counts), "total": counts.total}


def _table(counts: Mapping[tuple[str, str], Counts]) -> Table:
    from rich.table import Table

    table = Table(box=None, show_footer=len(counts) > 1, header_style="bold", footer_style="bold")
    everything = _with_total(total_of(counts.values()))
    table.add_column("source", footer="total")
    table.add_column("queue")
    for state in (*STATES, "total"):
        table.add_column(state, justify="right", footer=f"{everything[state]:,}")
    for (source, queue), one in counts.items():
        numbers = _with_total(one)
        table.add_row(
            cell(source), cell(queue), *(f"{numbers[state]:,}" for state in (*STATES, "total"))
        )
    return table


def _lines(overview: Mapping[str, Any]) -> Iterable[str]:
    leader, brake, workers = overview["leader"], overview["brake"], overview["workers"]
    if leader is None:
        yield "leader: none yet; run `jobguard reconcile`"
    elif not leader["live"]:
        yield f"leader: none; {leader['host']} pid {leader['pid']} led last (term {leader['term']})"
    else:
        yield (
            f"leader: {leader['host']} pid {leader['pid']}, term {leader['term']}, "
            f"lease for another {leader['seconds_left']:.0f} s"
        )
    oldest = workers["oldest_beat_seconds"]
    beat = "" if oldest is None else f", oldest beat {ago(oldest)} ago"
    yield f"workers: {workers['alive']} alive{beat}"
    if brake["paused_at"]:
        yield f"paused since {brake['paused_at']:%Y-%m-%d %H:%M:%S}: `jobguard resume`"
    for held in holds(overview):
        yield f"held: {held.name} of {held.address}: {held.reason}"
    yield from unsent(overview)
    for incident in overview["incidents"]:
        yield (
            f"incident {incident['id']}: {incident['cause']} at {incident['address']}: "
            f"{incident['missing']} missing, {incident['restored']} put back"
            + (f"; {incident['detail']}" if incident["cause"] == "push" else "")
        )


def _trust(overview: Mapping[str, Any]) -> Iterable[str]:
    for queue in overview["queues"]:
        name = f"queue {queue['queue']} of {queue['address']}"
        if queue["unguarded"]:
            workers = ", ".join(queue["unguarded"])
            yield f"not trusted: {name} has unguarded workers, so nothing is recovered: {workers}"
        elif queue["trusted_since"] is None:
            yield f"not trusted yet: {name}: {why_not_trusted(queue)}"
        else:
            yield f"{trusted_since(queue['trusted_since'])}: {name}"


def _legend(total: Counts) -> Iterable[str]:
    """Explain the states that need an explanation, if there are jobs in them."""
    if total.stuck:
        yield (
            "stuck: the worker of the job is gone, or Redis does not have the job. The leader inspects "
            "the job again and puts it back; if the number stays, run `jobguard doctor`. `jobguard requeue "
            "--all` counts stuck jobs by cause, and asks before it puts them back"
        )
    if total.failed:
        yield "failed: given up by the library. `jobguard dead list --failed`"
    if total.dead:
        yield "dead: given up because its worker died too often. `jobguard dead list`"


def trusted_since(at: datetime) -> str:
    """Return the text for the time since which the records of a queue are recovered."""
    if at.timestamp() <= 0:
        return "trusted from its first record"
    return f"trusted since {at:%Y-%m-%d %H:%M:%S}"


def why_not_trusted(queue: Mapping[str, Any]) -> str:
    """Return why a queue without unguarded workers is not trusted, and what to do."""
    if queue.get("unguarded_at") is not None:
        return (
            f"unguarded workers were seen until {queue['unguarded_at']:%Y-%m-%d %H:%M:%S}; it is trusted "
            "after 30 s without one (600 s after a loss), with a guarded worker that consumes it"
        )
    return (
        "no leader could count its consumers or has seen a guarded worker of it; run "
        "`jobguard reconcile`, start a guarded worker, or see `jobguard doctor`"
    )
