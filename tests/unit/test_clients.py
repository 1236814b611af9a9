"""The address of a Redis, and clients made from its URL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from jobguard.clients import address_of, bounded, client_from_url
from jobguard.errors import ConfigurationError

T = TypeVar("T")


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


class _Connection:
    """A connection of a host without timeouts."""

    socket_timeout: float | None = None


class _Pool:
    """A pool that gives out the connection that was released last."""

    def __init__(self) -> None:
        self.idle = [_Connection(), _Connection()]

    def get_connection(self) -> _Connection:
        """Give out a connection."""
        return self.idle.pop()

    def release(self, connection: _Connection) -> None:
        """Take a connection back."""
        self.idle.append(connection)


def _elsewhere(work: Callable[[], T]) -> T:
    """Return what another thread gets."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result(60)


@pytest.mark.parametrize("used", [False, True])
def test_no_other_thread_has_a_connection_with_our_bound(used: bool) -> None:
    """A connection has our bound while this thread has it, and its own timeout before it is released."""
    pool = _Pool()
    ours = pool.get_connection()
    with bounded(pool, ours, 0.5, used=used):
        theirs = _elsewhere(pool.get_connection)
        assert theirs is not ours and theirs.socket_timeout is None
        pool.release(theirs)
        assert used or pool.get_connection() is ours
        assert ours.socket_timeout == 0.5
        pool.release(ours)
        assert ours.socket_timeout is None
        assert _elsewhere(pool.get_connection) is ours
        assert pool.get_connection().socket_timeout == 0.5, "a second command has the bound too"
    assert theirs.socket_timeout is None
    assert pool.idle == []


def test_a_connection_that_no_command_took_is_released() -> None:
    """A push that sends nothing leaves the host's pool as it was."""
    pool = _Pool()
    with bounded(pool, pool.get_connection(), 0.5):
        pass
    assert [each.socket_timeout for each in pool.idle] == [None, None]
