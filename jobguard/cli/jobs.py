"""``jobguard jobs``: which jobs there are, and the whole road of one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import islice
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
    redis_option,
    redis_urls_from,
    safe,
    settings_of,
    table_of,
)
from jobguard.operations.brokers import Brokers
from jobguard.operations.job import Job, read_job
from jobguard.operations.read import STATES, JobFilter, Page, ReadModel, Row


@click.group(invoke_without_command=True)
@postgres_option
@namespace_option
@click.option(
    "--state",
    "states",
    type=click.Choice(STATES),
    multiple=True,
    help="May be given several times.",
)
@click.option("--queue", metavar="NAME", help="Only this queue.")
@click.option("--task", metavar="NAME", help="Only this task.")
@click.option("--worker", metavar="NAME", help="The name, host or id of the worker that ran it.")
@click.option(
    "--since", type=MOMENT, metavar="TIME", help="Recorded since: 10m, or 2026-01-31T14:00."
)
@click.option("--until", type=MOMENT, metavar="TIME", help="Recorded before.")
@click.option("--error", metavar="TEXT", help="A part of its error.")
@click.option(
    "--limit", type=click.IntRange(1, 100_000), default=50, help="Largest number of jobs."
)
@click.option(
    "--offset", type=click.IntRange(0), default=0, help="Skip so many; --after is faster."
)
@click.option(
    "--after", metavar="TOKEN", help="Continue after the page that ended with this token."
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    postgres: str | None,
    namespace: str | None,
    states: tuple[str, ...],
    queue: str | None,
    task: str | None,
    worker: str | None,
    since: datetime | None,
    until: datetime | None,
    error: str | None,
    limit: int,
    offset: int,
    after: str | None,
    as_json: bool,
) -> None:
    """List jobs, newest first; `jobs show ID` tells everything about one.

    Without --state, all jobs that are owed or have ended, but no delivery that a later one replaced.
    """
    if ctx.invoked_subcommand is not None:
        return
    wanted = JobFilter(states, queue, task, worker, since, until, error)
    with open_ledger(postgres, namespace) as (ledger, tenant):
        page = collect(ledger, tenant, wanted, limit=limit, offset=offset, after=after)
    if as_json:
        print_json({"jobs": page.rows, "after": page.after})
        return
    if page.rows:
        console().print(jobs_table(page.rows))
    else:
        click.echo("none")
    if page.after is not None:
        click.echo(f"more: --after {page.after}", err=True)


def collect(
    ledger: ReadModel,
    namespace: str,
    wanted: JobFilter,
    *,
    limit: int,
    offset: int = 0,
    after: str | None = None,
) -> Page:
    """Return as many rows as there are, up to the limit: pages may be shorter than asked."""
    rows: list[Row] = []
    if offset:
        skipped = islice(ledger.each_job(namespace, wanted, after=after), offset)
        count, token = 0, None
        for row in skipped:
            count, token = count + 1, row["token"]
        if count < offset:
            return Page((), None)
        after = str(token)
    while True:
        page = ledger.list_jobs(namespace, wanted, limit=limit - len(rows), after=after)
        rows += page.rows
        after = page.after
        if after is None or len(rows) >= limit:
            return Page(rows, after)


def jobs_table(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the table of a list of jobs."""
    titles = ("state", "job", "queue", "task", "recorded", "attempt", "worker", "note")
    table = table_of({title: "right" if title == "attempt" else "left" for title in titles})
    for row in rows:
        table.add_row(
            cell(state_of(row)),
            *map(cell, (row["job_id"], row["queue"], row["task"])),
            age(row["recorded_at"] or row["ended_at"]),
            str(row["attempt"]),
            cell(row["worker_name"] or row["worker_host"]),
            cell(note_of(row)),
        )
    return table


def state_of(row: Mapping[str, Any]) -> str:
    """Return the state of a listed job, with the mark of a stuck one."""
    return f"{row['state']}, stuck" if row["stuck"] else str(row["state"])


def note_of(row: Mapping[str, Any]) -> str:
    """Return the first thing that a person asks about a listed job."""
    if row["error"]:
        lines = str(row["error"]).strip().splitlines()
        return lines[-1][:100] if lines else ""
    if row["suspected"]:
        return f"absent: {row['suspected']}"
    if row["crashes"]:
        return f"{row['crashes']} worker deaths"
    return f"put back {row['recoveries']} times" if row["recoveries"] else ""


@command.command()
@postgres_option
@namespace_option
@redis_option
@click.argument("job_id")
@click.option("--no-redis", is_flag=True, help="Do not ask Redis where the job is now.")
@json_option
def show(
    postgres: str | None,
    namespace: str | None,
    redis_urls: tuple[str, ...],
    job_id: str,
    no_redis: bool,
    as_json: bool,
) -> None:
    """Tell everything about one job: its deliveries, where Redis has it now, and why.

    Arguments are shown if they are JSON, and never unpickled; JOBGUARD_REDACT_ARGUMENTS=1 hides them.
    """
    settings = settings_of(namespace)
    brokers = None if no_redis else Brokers(redis_urls_from(redis_urls))
    with open_ledger(postgres, namespace) as (ledger, tenant):
        job = read_job(ledger, tenant, job_id, settings, brokers)
    if as_json:
        print_json(job.as_dict())
    elif job:
        _print(job)
    if not job:
        click.echo(safe(f"no job {job_id} is known in the namespace {tenant!r}"), err=True)
        raise click.exceptions.Exit(1)


def _print(job: Job) -> None:
    out = console()
    newest = job[0]
    lines = {
        "job": job.id,
        "state": job.state,
        "why": job.why,
        "queue": f"{newest['queue']} ({newest['library']} at {newest['address']})",
        "task": newest["task"],
        "arguments": _arguments(job),
        "in Redis": newest["presence"] or newest["presence_error"] or "not asked",
    }
    for name, value in lines.items():
        if name != "in Redis" or newest["ended_at"] is None:
            out.print(f"{name:10} {safe(value)}", markup=False)
    out.print()
    table = table_of({"time": "left", "event": "left", "delivery": "left", "detail": "left"})
    for event in job.road:
        first = str(event["detail"]).strip().splitlines()
        table.add_row(
            f"{event['at'].astimezone():%Y-%m-%d %H:%M:%S}",
            cell(event["event"]),
            str(event["token"])[-12:],
            cell(first[-1][:200] if first else ""),
        )
    out.print(table)
    for row in job:
        for error in row["errors"] or ():
            out.print(f"\nerror of delivery {row['token']}:")
            for line in str(error).splitlines():
                out.print(f"  {safe(line)}", markup=False)


def _arguments(job: Job) -> str:
    if job.arguments is None:
        return job.arguments_note
    args = [json.dumps(value, ensure_ascii=False) for value in job.arguments["args"]]
    kwargs = job.arguments["kwargs"]
    args += [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in kwargs.items()]
    return ", ".join(args)[:2000] or "none"
