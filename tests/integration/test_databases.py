from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest

from jobguard.demo.servers import NamedPostgres
from tests.databases import Databases

RECORD = """
insert into jobguard.jobs (source, token, job_id, queue, task, envelope)
values (1, gen_random_uuid(), 'j', 'q', 't', '')
"""
CHANGES = {
    "a table": "create table jobguard.accounts (id int)",
    "a function": "create or replace function jobguard.now_() returns int language sql return 1",
    "a setting": "alter role current_user in database {} set statement_timeout = 1",
    "statistics": "analyze jobguard.jobs",
}


@pytest.fixture
def own_databases(postgres_server: NamedPostgres, template_database: str) -> Iterator[Databases]:
    """Return databases that no other test uses."""
    made = Databases(postgres_server, template_database)
    yield made
    made.close()


def content(url: str) -> list[list[tuple[Any, ...]]]:
    """Return the identity of a database, the rows that a new one has, and a count of the others."""
    with psycopg.connect(url) as connection:
        return [
            connection.execute(query).fetchall()
            for query in (
                "select oid from pg_database where datname = current_database()",
                "select * from jobguard.migrations order by 1",
                "select * from jobguard.installation",
                "select count(*) from jobguard.jobs",
                "select max(last_value) from pg_sequences",
            )
        ]


def test_a_database_is_as_new_for_the_next_test(own_databases: Databases) -> None:
    """The next test gets the same database, with the rows of a new one and under a new name."""
    first = own_databases.take()
    before = content(first)
    with psycopg.connect(first, autocommit=True) as left_open:
        left_open.execute(RECORD)
        left_open.execute("create table accounts (id serial primary key)")
        left_open.execute(
            "insert into jobguard.requests (source, job_id, task, queue) values (1, 'j', 't', 'q')"
        )
        left_open.execute("update jobguard.installation set name = 'prod'")
        left_open.execute("delete from jobguard.migrations")
        own_databases.give_back(first)
        with pytest.raises(psycopg.OperationalError):
            left_open.execute("select 1")

    assert content(own_databases.take()) == before
    with pytest.raises(psycopg.OperationalError, match="does not exist"):
        psycopg.connect(first)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_database_with_another_definition_is_not_used_again(
    own_databases: Databases, postgres_server: NamedPostgres, change: str
) -> None:
    """A database is dropped if a test changed more than rows and tables of an application."""
    url = own_databases.take()
    ((oid,),) = content(url)[0]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(change.format(urlsplit(url).path[1:]).encode())
    own_databases.give_back(url)

    with psycopg.connect(postgres_server.url) as connection:
        assert not connection.execute("select from pg_database where oid = %s", [oid]).fetchall()
