"""``jobguard drift``: compare the ledger with Redis, and change nothing."""

from __future__ import annotations

import click

from jobguard.cli.bulk import brokers_from
from jobguard.cli.common import (
    cell,
    console,
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
    print_json,
    redis_option,
    table_of,
)


@click.command()
@postgres_option
@namespace_option
@redis_option
@json_option
def command(
    postgres: str | None, namespace: str | None, redis_urls: tuple[str, ...], as_json: bool
) -> None:
    """Compare what PostgreSQL and Redis hold, in both directions; exit 1 if they differ.

    Jobs move while this looks: what is absent for a moment may be on its way. The leader looks twice before
    it puts a job back.
    """
    with open_ledger(postgres, namespace) as (ledger, tenant):
        found = ledger.drift(tenant, brokers_from(redis_urls))
    if as_json:
        print_json(found.as_dict())
    else:
        table = table_of({"source": "left", "queue": "left", "what": "left", "jobs": "right"})
        for (address, queue, place), count in sorted(found.places.items()):
            table.add_row(cell(address), cell(queue), cell(f"owed; in Redis: {place}"), str(count))
        for (address, what), count in sorted(found.unrecorded.items()):
            table.add_row(cell(address), "", cell(what), str(count))
        console().print(table) if table.row_count else click.echo("nothing is owed")
        for row in found.absent[:20]:
            click.echo(f"absent: {cell(row['job_id']).plain} of queue {cell(row['queue']).plain}")
        if len(found.absent) > 20:
            click.echo("more of them: jobguard jobs --state stuck")
    if found.differs:
        raise click.exceptions.Exit(1)
