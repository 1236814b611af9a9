"""The address of a Redis, and clients made from its URL."""

from __future__ import annotations

from typing import Any

import pytest

from jobguard.clients import address_of, client_from_url
from jobguard.errors import ConfigurationError


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://127.0.0.1", "localhost:6379/0"),
        ("redis://user:secret@Redis.example:6380/3", "redis.example:6380/3"),
        ("rediss://redis.example/1", "redis.example:6379/1"),
        ("unix:///run/redis.sock?db=2", "unix:/run/redis.sock/2"),
        ("sentinel://one,two:26380/main", "sentinel:main/0"),
        ("sentinel://user:secret@one:1/main/4", "sentinel:main/4"),
    ],
)
def test_a_url_has_an_address_without_a_password(url: str, address: str) -> None:
    """All spellings of a Redis have one address, which contains no password."""
    client = client_from_url(url, timeout=0.1)
    assert address_of(client) == address


def test_a_sentinel_url_names_the_sentinels_and_the_account_of_redis() -> None:
    """The account is Redis's own; a sentinel without a port has the usual port."""
    client = client_from_url("sentinel://a:b%40@[::1]:5,two/main/4", timeout=0.1)
    pool: Any = client.connection_pool
    asked = [one.connection_pool.connection_kwargs for one in pool.sentinel_manager.sentinels]
    assert [(where["host"], where["port"]) for where in asked] == [("::1", 5), ("two", 26379)]
    assert [where["socket_timeout"] for where in asked] == [0.1, 0.1]
    kwargs = pool.connection_kwargs
    assert (kwargs["username"], kwargs["password"], kwargs["db"]) == ("a", "b@", 4)


@pytest.mark.parametrize(
    "url", ["sentinel://", "sentinel://one", "sentinel:///main", "sentinel://one/m/x"]
)
def test_an_incomplete_sentinel_url_is_an_error(url: str) -> None:
    """The error shows the complete form; nothing is connected."""
    with pytest.raises(ConfigurationError, match="sentinel://"):
        client_from_url(url, timeout=0.1)
