"""``jobguard migrate``: bring the database's schema up to date."""

from __future__ import annotations

import click

from jobguard import schema
from jobguard.cli.common import json_option, postgres_option, print_json
from jobguard.conninfo import describe, postgres_conninfo
from jobguard.errors import JobguardError, StoreUnavailable
from jobguard.schema.roles import ROLES


@click.command()
@postgres_option
@click.option("--sql", is_flag=True, help="Print the migrations for a DBA, and change nothing.")
@click.option("--check", is_flag=True, help="Only check whether the schema fits; exit 1 if not.")
@click.option(
    "--installation",
    metavar="NAME",
    envvar="JOBGUARD_INSTALLATION",
    show_envvar=True,
    help="Name this database; processes set to another name refuse it.",
)
@click.option(
    "--roles",
    is_flag=True,
    help="Create jobguard_app, jobguard_reconciler, jobguard_reader, jobguard_enqueue, with their rights.",
)
@json_option
def command(
    postgres: str | None,
    sql: bool,
    check: bool,
    installation: str | None,
    roles: bool,
    as_json: bool,
) -> None:
    """Bring the database's schema up to date.

    It is safe to run this on two machines at once, and to run it again at any time.
    """
    if check and (sql or roles):
        raise click.UsageError("--check excludes --sql and --roles")
    if sql:
        grants = f"\n{schema.roles_sql()}\n" if roles else ""
        click.echo(f"begin;\n\n{schema.sql()}{grants}\ncommit;")
        return
    conninfo = postgres_conninfo(postgres)()
    place = describe(conninfo)
    if check:
        problem = _problem(conninfo)
        if problem is not None:
            raise problem
        applied = []
        done = f"{place} is up to date: migration {schema.latest()}"
    else:
        applied = schema.migrate(conninfo, installation=installation or None, roles=roles)
        done = (
            f"{place} now has {', '.join(applied)}" if applied else f"{place} is up to date already"
        )
        if roles:
            done += f"; grant {', '.join(ROLES)} to your logins"
    if as_json:
        print_json({"postgres": place, "applied": applied, "migration": schema.latest()})
    else:
        click.echo(done)


def _problem(conninfo: str) -> JobguardError | None:
    import psycopg

    try:
        with psycopg.connect(conninfo, autocommit=True, connect_timeout=5) as connection:
            return schema.check(connection)
    except psycopg.OperationalError as error:
        return StoreUnavailable(f"Postgres at {describe(conninfo)}: {error}")
