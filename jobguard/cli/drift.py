"""``jobguard drift`` and ``adopt``: where PostgreSQL and Redis differ, and what to record."""

from __future__ import annotations

import click

from jobguard.cli.bulk import brokers_from, dry_run_option, report, yes_option
from jobguard.cli.common import (
    cell,
    console,
    json_option,
    namespace_option,
    open_ledger,
    postgres_option,
    print_json,
    redis_option,
    safe,
    settings_of,
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
        found = ledger.drift(tenant, brokers_from(redis_urls), settings_of(namespace))
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


@click.command()
@postgres_option
@namespace_option
@redis_option
@click.option(
    "--queue",
    "queues",
    metavar="NAME",
    multiple=True,
    help="Also this queue, which no recorded job and no guarded worker has named; may be repeated.",
)
@yes_option
@dry_run_option
@json_option
def adopt(
    postgres: str | None,
    namespace: str | None,
    redis_urls: tuple[str, ...],
    queues: tuple[str, ...],
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Record the jobs that wait in Redis and are not in PostgreSQL, so that they are guarded too.

    An unguarded program sent them, or they are older than the guard. Each gets a token in its data in
    Redis.
    """
    settings = settings_of(namespace)
    brokers = brokers_from(redis_urls)
    with open_ledger(postgres, namespace) as (ledger, tenant):
        found = ledger.adopt(tenant, brokers, settings, queues=queues, dry=True)
        for row in found:
            click.echo(
                safe(
                    f"{row['library']} at {row['address']}: {row['waiting']} jobs wait, "
                    f"{row['recorded']} of them are not in PostgreSQL"
                ),
                err=as_json,
            )
        total = sum(row["recorded"] for row in found)
        if total and not dry_run:
            if not yes:
                click.confirm(f"Record {total} jobs?", abort=True, err=as_json)
            found = ledger.adopt(tenant, brokers, settings, queues=queues)
            total = sum(row["recorded"] for row in found)
    problems = [row["problem"] for row in found if row["problem"]]
    problems += [
        f"{row['unreadable']} jobs of {row['address']} cannot be read, and are not guarded"
        for row in found
        if row["unreadable"]
    ]
    report("to record" if dry_run else "recorded", total, problems, as_json=as_json)
