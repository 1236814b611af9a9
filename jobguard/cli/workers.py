"""``jobguard workers``: the guarded workers, and what they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from jobguard.cli.common import (
    age,
    ago,
    cell,
    console,
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
    print_json,
    table_of,
)


@click.command()
@postgres_option
@namespace_option
@click.option("--gone", is_flag=True, help="Also workers that left or died in the last 15 minutes.")
@json_option
def command(postgres: str | None, namespace: str | None, gone: bool, as_json: bool) -> None:
    """List guarded workers: queues, last beat, and what they run."""
    with open_ledger(postgres, namespace) as (ledger, tenant):
        rows = ledger.workers(tenant, gone=gone)
    if as_json:
        print_json(rows)
    elif rows:
        console().print(workers_table(rows))
    else:
        click.echo("none")


def workers_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the table of workers."""
    titles = (
        "worker",
        "host",
        "pid",
        "state",
        "queues",
        "beat",
        "started",
        "runs",
        "jobs",
        "unwritten",
    )
    table = table_of({t: "right" if t in ("pid", "beat", "runs") else "left" for t in titles})
    for row in rows:
        unwritten = row["unflushed_seconds"]
        table.add_row(
            cell(row["name"] or row["id"]),
            cell(row["host"]),
            str(row["pid"]),
            row["state"],
            cell(", ".join(row["queues"])),
            f"{ago(row['beat_seconds'])} ago",
            f"{age(row['started_at'])} ago",
            str(row["claims"]),
            cell(", ".join(row["jobs"] or ())),
            "" if unwritten is None else f"reports of {ago(unwritten)}",
        )
    return table
