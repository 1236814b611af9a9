"""``jobguard schedules``: jobs that the leader sends at given times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import click
import psycopg
from psycopg.rows import dict_row

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
from jobguard.conninfo import postgres_conninfo
from jobguard.errors import ConfigurationError, StoreUnavailable
from jobguard.schedules import check_timing, in_zone

_SECONDS = {"days": 86400.0, "hours": 3600.0, "minutes": 60.0, "seconds": 1.0, "microseconds": 1e-6}

_PERIODIC_TASKS = """
select t.name, t.task, t.args, t.kwargs, t.queue, t.priority, t.enabled, t.one_off, t.start_time,
       t.expires, t.exchange, t.solar_id, t.clocked_id, i.every, i.period, c.minute, c.hour,
       c.day_of_month, c.month_of_year, c.day_of_week, c.timezone
from django_celery_beat_periodictask t
left join django_celery_beat_intervalschedule i on i.id = t.interval_id
left join django_celery_beat_crontabschedule c on c.id = t.crontab_id
where t.task <> 'celery.backend_cleanup'
order by t.name
"""


class _Json(click.ParamType):  # type: ignore[type-arg]  # not generic in click 8.1
    """A JSON value of one kind."""

    def __init__(self, kind: type, name: str) -> None:
        self._kind, self.name = kind, name

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        """Return the value; fail with its place."""
        try:
            found = value if isinstance(value, self._kind) else json.loads(value)
        except ValueError as error:
            self.fail(f"{value!r} is no JSON: {error}", param, ctx)
        if not isinstance(found, self._kind):
            self.fail(f"{value!r} is no JSON {self.name}", param, ctx)
        return found


source_option = click.option(
    "--source", metavar="NAME", help="The name or address of the Redis, if the library has several."
)
_OBJECT, _ARRAY = _Json(dict, "object"), _Json(list, "array")


@click.group()
def command() -> None:
    """Jobs that the leader sends at given times, each slot once."""


@command.command("list")
@postgres_option
@namespace_option
@json_option
def list_(postgres: str | None, namespace: str | None, as_json: bool) -> None:
    """List the schedules; exit 1 if one of them cannot be planned."""
    with open_ledger(postgres, namespace) as (ledger, tenant):
        rows = ledger.schedules(tenant)
    if as_json:
        print_json(rows)
    elif rows:
        _print_table(rows)
    else:
        click.echo("none")
    if any(row["error"] for row in rows):
        raise click.exceptions.Exit(1)


@command.command()
@postgres_option
@namespace_option
@click.argument("name")
@click.option("--task", required=True, help="The name of the task; of RQ, the path of a function.")
@click.option("--queue", required=True, metavar="NAME", help="The queue of the jobs.")
@click.option("--library", help="rq, celery or dramatiq, if the namespace has several.")
@source_option
@click.option("--cron", metavar="EXPRESSION", help="Five fields, or six with seconds first.")
@click.option("--every", type=float, metavar="SECONDS", help="The interval.")
@click.option("--rule", type=_OBJECT, metavar="JSON", help='For example {"minute": [0, 30]}.')
@click.option("--args", type=_ARRAY, default="[]", metavar="JSON", help="The arguments.")
@click.option("--kwargs", type=_OBJECT, default="{}", metavar="JSON", help="Arguments by name.")
@click.option("--timezone", default="UTC", show_default=True, metavar="ZONE", help="Of the cron.")
@click.option("--start", type=datetime.fromisoformat, metavar="TIME", help="No slot before it.")
@click.option("--end", type=datetime.fromisoformat, metavar="TIME", help="No slot after it.")
@click.option(
    "--catch-up",
    type=click.Choice(("one", "all", "skip")),
    default="one",
    show_default=True,
    help="What to fire of slots that were missed.",
)
@click.option("--jitter", type=float, default=0.0, metavar="SECONDS", help="A random delay.")
@click.option("--priority", type=int, default=0, help="Of Celery: 0 to 9.")
@click.option("--max-attempts", type=int, help="How often the library may run a job.")
@json_option
def add(
    postgres: str | None,
    namespace: str | None,
    start: datetime | None,
    end: datetime | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Add a schedule, or change the one of this name."""
    timing = {name: given[name] for name in ("cron", "every", "rule", "timezone")}
    try:
        check_timing(**timing, start=start, end=end)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from error
    zone = given["timezone"]
    definition = {**given, "starts_at": in_zone(start, zone), "ends_at": in_zone(end, zone)}
    with open_ledger(postgres, namespace) as (ledger, tenant):
        changed = ledger.add_schedule(tenant, definition)
    if as_json:
        print_json({"name": given["name"], "changed": changed})
    else:
        click.echo(f"{'set' if changed else 'unchanged'}: {given['name']}")


def _change(change: str, done: str, meaning: str) -> click.Command:
    @click.command(change, help=meaning)
    @postgres_option
    @namespace_option
    @click.argument("name")
    def changed(postgres: str | None, namespace: str | None, name: str) -> None:
        with open_ledger(postgres, namespace) as (ledger, tenant):
            answer = ledger.change_schedule(tenant, name, change.removesuffix("-now"))
        click.echo(f"{done}: {answer or name}")

    return changed


for each in (
    ("remove", "removed", "Remove a schedule. Jobs that it has sent stay."),
    (
        "pause",
        "paused",
        "Stop a schedule until it is resumed. Slots in between are not made up for.",
    ),
    ("resume", "resumed", "Continue a paused schedule, or one that could not be planned."),
    ("run-now", "requested", "Ask for one run now, beside the slots, and print the job id."),
):
    command.add_command(_change(*each))


@command.command()
@postgres_option
@namespace_option
@click.option("--from", "origin", metavar="URL", help="Django's database, if it is another one.")
@click.option("--queue", default="celery", show_default=True, help="For tasks that name no queue.")
@source_option
@click.option("--dry-run", is_flag=True, help="Only say what would be imported.")
def import_django_celery_beat(
    postgres: str | None,
    namespace: str | None,
    origin: str | None,
    queue: str,
    source: str | None,
    dry_run: bool,
) -> None:
    """Import the periodic tasks that django-celery-beat keeps in Django's database.

    Afterwards, stop Celery's beat: otherwise both send every task. Disabled tasks are imported as paused
    schedules. Tasks that cannot be imported are named, and the exit code is 1.
    """
    refused = 0
    tasks = _periodic_tasks(postgres_conninfo(origin or postgres)())
    with open_ledger(postgres, namespace) as (ledger, tenant):
        for task in tasks:
            try:
                definition = _definition(task, queue)
                if not dry_run:
                    definition |= {"source": source, "library": "celery"}
                    ledger.add_schedule(tenant, definition)
            except ConfigurationError as error:
                refused += 1
                click.echo(safe(f"not imported: {task['name']}: {error}"), err=True)
                continue
            if not dry_run and not task["enabled"]:
                ledger.change_schedule(tenant, definition["name"], "pause")
            click.echo(
                f"{'would import' if dry_run else 'imported'}: {safe(definition['name'])}"
                + ("" if task["enabled"] else " (paused)")
            )
    if refused:
        raise click.exceptions.Exit(1)


def _periodic_tasks(conninfo: str) -> Sequence[Mapping[str, Any]]:
    try:
        with closing(psycopg.connect(conninfo, connect_timeout=5)) as connection:
            return connection.cursor(row_factory=dict_row).execute(_PERIODIC_TASKS).fetchall()
    except psycopg.errors.UndefinedTable:
        raise ConfigurationError(
            "there are no tables of django-celery-beat in this database: name it with --from"
        ) from None
    except psycopg.Error as error:
        raise StoreUnavailable(str(error)) from error


def _definition(task: Mapping[str, Any], queue: str) -> dict[str, Any]:
    """Return a periodic task as a schedule. Raises ConfigurationError with the reason against it."""
    if task["one_off"] or task["clocked_id"] is not None:
        raise ConfigurationError("it runs once; send it with a due time instead")
    if task["solar_id"] is not None:
        raise ConfigurationError("it follows the sun")
    if task["exchange"]:
        raise ConfigurationError(f"it is sent to the exchange {task['exchange']!r}; name a queue")
    cron = every = None
    if task["period"] is not None:
        every = task["every"] * _SECONDS[task["period"]]
    elif task["minute"] is not None:
        days = (task["day_of_month"], task["day_of_week"])
        if "*" not in days:
            raise ConfigurationError(
                f"Celery wants both of day_of_month {days[0]} and day_of_week {days[1]}; cron means either"
            )
        fields = (
            task[f] for f in ("minute", "hour", "day_of_month", "month_of_year", "day_of_week")
        )
        cron = " ".join(str(field).replace(" ", "") for field in fields)
    zone = str(task["timezone"] or "UTC") if cron else "UTC"
    check_timing(
        cron=cron,
        every=every,
        rule=None,
        timezone=zone,
        start=task["start_time"],
        end=task["expires"],
    )
    try:
        args, kwargs = json.loads(task["args"] or "[]"), json.loads(task["kwargs"] or "{}")
    except ValueError as error:
        raise ConfigurationError(f"its arguments are no JSON: {error}") from error
    return {
        "name": task["name"],
        "task": task["task"],
        "queue": task["queue"] or queue,
        "cron": cron,
        "every": every,
        "timezone": zone,
        "args": args,
        "kwargs": kwargs,
        "starts_at": task["start_time"],
        "ends_at": task["expires"],
        "priority": task["priority"] or 0,
    }


def _print_table(rows: Sequence[Any]) -> None:
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("name", "state", "when", "queue", "task", "next", "last", "skipped", "error"):
        table.add_column(name)
    now = datetime.now(UTC)
    for row in rows:
        last = row["last_at"]
        table.add_row(
            *map(cell, (row["name"], row["state"], _when(row), row["queue"], row["task"])),
            row["next_at"].isoformat(" ", "seconds") if row["next_at"] else "",
            f"{ago((now - last).total_seconds())} ago" if last else "",
            str(row["skipped"] or ""),
            cell(row["error"]),
        )
    console().print(table)


def _when(row: Mapping[str, Any]) -> str:
    if row["every"] is not None:
        return f"every {row['every']:g} s"
    when = row["cron"] or json.dumps(row["rule"])
    return when if row["timezone"] == "UTC" else f"{when} ({row['timezone']})"
