"""The schema of jobguard inside the migrations of an application: Alembic and Django."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psycopg

from jobguard import schema

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(program: str, database: str) -> None:
    """Run a program with the examples on its path."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=EXAMPLES,
        env={"JOBGUARD_POSTGRES_URL": database, "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def fits(database: str) -> bool:
    """Return True if the schema is the one that this jobguard needs."""
    with psycopg.connect(database) as connection:
        return schema.check(connection) is None


def test_a_migration_of_alembic(empty_database: str) -> None:
    """Alembic creates the schema, autogenerate leaves it alone, and a downgrade removes it."""
    alembic = (
        "from alembic import command; from alembic.config import Config; c = Config();"
        "c.set_main_option('script_location', 'alembic'); command.{}(c{})"
    )
    run(alembic.format("upgrade", ", 'head'"), empty_database)
    assert fits(empty_database)
    assert schema.migrate(empty_database) == []
    run(alembic.format("check", ""), empty_database)
    run(alembic.format("downgrade", ", 'base'"), empty_database)
    assert not fits(empty_database)


def test_a_migration_of_django(empty_database: str) -> None:
    """Django creates the schema as a migration of an app, and reverses it."""
    place = psycopg.conninfo.conninfo_to_dict(empty_database)
    keys = (("NAME", "dbname"), ("USER", "user"), ("HOST", "host"), ("PORT", "port"))
    default = {"ENGINE": "django.db.backends.postgresql"}
    default |= {name: str(place[key]) for name, key in keys if key in place}
    django = (
        "import django; from django.conf import settings;"
        f"settings.configure(INSTALLED_APPS=['django_shop'], DATABASES={{'default': {default!r}}});"
        "django.setup(); from django.core.management import call_command as call;"
        "call('migrate', 'django_shop', TARGET, verbosity=0)"
    )
    run(django.replace("TARGET", "'0001'"), empty_database)
    assert fits(empty_database)
    run(django.replace("TARGET", "'zero'"), empty_database)
    assert not fits(empty_database)


def test_a_later_migration_brings_only_what_is_new(empty_database: str) -> None:
    """sql(after=N) continues where the first migration of the application ended."""
    with psycopg.connect(empty_database, autocommit=True) as connection:
        whole = schema.sql()
        third = whole.index("-- 0003_")
        connection.execute(whole[:third].encode())
        connection.execute(schema.sql(after=2).encode())
    assert fits(empty_database)
