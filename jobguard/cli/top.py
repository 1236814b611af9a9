"""``jobguard top``: the state of a namespace, live in a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

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
    table_of,
)
from jobguard.cli.incidents import line_of
from jobguard.cli.workers import workers_table
from jobguard.errors import StoreUnavailable
from jobguard.operations.overview import Overview, overview_of

_SHOWN = 15
"""Queues and workers on one screen."""


@click.command()
@postgres_option
@namespace_option
@click.option(
    "--interval", type=click.FloatRange(0.2, 3600), default=2.0, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Show one picture and exit, as in a pipe.")
@json_option
def command(
    postgres: str | None, namespace: str | None, interval: float, once: bool, as_json: bool
) -> None:
    """Show queues, workers, leader and incidents, live; Ctrl-C ends it."""
    with open_ledger(postgres, namespace) as (ledger, tenant):
        now = overview_of(ledger, tenant)
        if as_json:
            print_json(now.as_dict())
            return
        out = console()
        if once or not sys.stdout.isatty():
            out.print(picture(now))
            return
        from rich.live import Live

        with Live(picture(now), console=out, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                try:
                    live.update(picture(overview_of(ledger, tenant)), refresh=True)
                except StoreUnavailable as error:
                    live.update(cell(f"PostgreSQL does not answer: {error}"), refresh=True)


def picture(now: Overview) -> Any:
    """Return one picture of the state."""
    from rich.console import Group

    parts: list[Any] = [cell(line) for line in now.lines()]
    states = ("pending", "scheduled", "processing", "stuck", "failed", "dead")
    numbers = (*states, "waits", "done/min", "back/min")
    table = table_of({"source": "left", "queue": "left"} | dict.fromkeys(numbers, "right"))
    busiest = sorted(now.queues, key=lambda q: (-q.counts.stuck, -q.owed, q.queue))
    for one in busiest[:_SHOWN]:
        table.add_row(
            cell(one.source),
            cell(one.queue),
            *(f"{getattr(one.counts, state):,}" for state in states),
            ago(one.oldest) if one.oldest is not None else "",
            f"{one.ended_a_minute:,.0f}",
            f"{one.restored_a_minute:,.0f}",
        )
    parts += [cell(""), table]
    if len(now.queues) > _SHOWN:
        parts.append(cell(f"and {len(now.queues) - _SHOWN} more queues"))
    if now.workers:
        parts += [cell(""), workers_table(now.workers[:_SHOWN])]
    if now.open_incidents:
        parts.append(cell(""))
        for row in now.open_incidents[:_SHOWN]:
            parts.append(cell("incident " + " ".join(safe(part) for part in line_of(row))))
    return Group(*parts)
