"""``jobguard incidents``: what was lost, what was put back, and what people did."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

import click

from jobguard.cli.common import (
    MOMENT,
    age,
    cell,
    console,
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
    print_json,
    table_of,
)


@click.group(invoke_without_command=True)
@postgres_option
@namespace_option
@click.option("--open", "still_open", is_flag=True, help="Only losses that are not over.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=50, help="Largest number of lines."
)
@click.option("--before", type=MOMENT, metavar="TIME", help="Only those that began before.")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    postgres: str | None,
    namespace: str | None,
    still_open: bool,
    limit: int,
    before: datetime | None,
    as_json: bool,
) -> None:
    """List losses and what people did to jobs, newest first.

    `incidents show ID` lists what was put back.
    """
    if ctx.invoked_subcommand is not None:
        return
    with open_ledger(postgres, namespace) as (ledger, tenant):
        rows = ledger.incidents(tenant, limit=limit, before=before, still_open=still_open)
    if as_json:
        print_json(rows)
    elif not rows:
        click.echo("none")
    else:
        table = table_of(
            dict.fromkeys(("id", "began", "what"), "left")
            | {"missing": "right", "put back": "right"}
            | dict.fromkeys(("where or who", "state", "detail"), "left")
        )
        for row in rows:
            table.add_row(*map(cell, line_of(row)))
        console().print(table)


def line_of(row: Mapping[str, Any]) -> tuple[object, ...]:
    """Return the cells of an incident or an action."""
    began = f"{row['opened_at'].astimezone():%Y-%m-%d %H:%M:%S}"
    if row["kind"] == "action":
        return ("", began, row["cause"], "", row["restored"], row["actor"], "done", row["detail"])
    place = f"{row['library']} at {row['address']}"
    state = "open" if row["closed_at"] is None else f"over after {_lasted(row)}"
    return (
        *(row["id"], began, row["cause"], row["missing"], row["restored"], place, state),
        row["detail"],
    )


def _lasted(row: Mapping[str, Any]) -> str:
    return f"{(row['closed_at'] - row['opened_at']).total_seconds():.0f} s"


@command.command()
@postgres_option
@namespace_option
@click.argument("incident", type=int, metavar="ID")
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=100, help="Largest number of jobs."
)
@json_option
def show(
    postgres: str | None, namespace: str | None, incident: int, limit: int, as_json: bool
) -> None:
    """List the jobs that were put back while an incident was open."""
    with open_ledger(postgres, namespace) as (ledger, tenant):
        rows = ledger.recovered(tenant, incident, limit=limit)
    if as_json:
        print_json(rows)
        return
    if not rows:
        click.echo("none")
        return
    table = table_of(
        dict.fromkeys(("put back", "cause", "job", "queue", "task", "state now"), "left")
    )
    for row in rows:
        of = (row["cause"], row["job_id"], row["queue"], row["task"], row["state"])
        table.add_row(f"{age(row['restored_at'])} ago", *map(cell, of))
    console().print(table)
