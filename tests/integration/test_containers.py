"""Tests with servers in containers, in the supported versions; skipped without Docker."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import psycopg
import pytest
import redis

import jobguard.schema
from jobguard.demo.servers import NamedPostgres, NamedRedis

docker = pytest.importorskip("docker", reason="testcontainers is not installed")

if TYPE_CHECKING:
    from collections.abc import Iterator


@functools.cache
def why_no_docker() -> str | None:
    """Return the reason why containers cannot be started here; None if they can."""
    try:
        client = docker.from_env(timeout=5)
        client.ping()
    except Exception as error:  # docker, requests and urllib3 have different classes
        return f"no Docker here: {type(error).__name__}"
    client.close()
    return None


@pytest.fixture(autouse=True)
def needs_docker() -> None:
    """Skip the test with the reason if there is no Docker."""
    reason = why_no_docker()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["postgres:14", "postgres:18"])
def postgres_container(request: pytest.FixtureRequest) -> Iterator[NamedPostgres]:
    """Start the oldest and the newest supported PostgreSQL."""
    from testcontainers.postgres import PostgresContainer

    with PostgresContainer(request.param, driver=None) as container:
        yield NamedPostgres(container.get_connection_url())


@pytest.fixture(params=["redis:6.2", "redis:7", "valkey/valkey:8"])
def redis_container(request: pytest.FixtureRequest) -> Iterator[NamedRedis]:
    """Start the oldest supported Redis, a common one, and Valkey."""
    from testcontainers.redis import RedisContainer

    with RedisContainer(request.param) as container:
        host, port = container.get_container_host_ip(), container.get_exposed_port(6379)
        yield NamedRedis(f"redis://{host}:{port}/0")


@pytest.mark.timeout(300)  # time to download an image
def test_the_schema_migrates_in_a_container(postgres_container: NamedPostgres) -> None:
    """The schema migrates, a second migration changes nothing, and a clone is complete."""
    url = postgres_container.create_database("migrated")
    assert jobguard.schema.migrate(url)
    assert jobguard.schema.migrate(url) == []

    clone = postgres_container.create_database("cloned", "migrated")
    with psycopg.connect(clone) as connection:
        row = connection.execute("select to_regclass('jobguard.jobs') is not null").fetchone()
    assert row == (True,)


@pytest.mark.timeout(300)  # time to download an image
def test_redis_answers_in_a_container(redis_container: NamedRedis) -> None:
    """The server has a supported version and several databases."""
    with redis.Redis.from_url(redis_container.database_url(1)) as client:
        version = str(client.info("server")["redis_version"])
        assert tuple(int(part) for part in version.split(".")[:2]) >= (6, 2)
        assert client.set("key", "value")
    with redis.Redis.from_url(redis_container.url) as client:
        assert client.get("key") is None
