"""Read the URL of a Redis, in every spelling that RQ, Celery and Dramatiq accept.

If a password is not percent-encoded, other parsers cut the URL at the wrong place: a part of the password
then appears as a host, a port, a path or an option in error texts. Therefore this module checks the parts
before they are used or printed, and none of its errors repeats the URL.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, cast
from urllib.parse import parse_qsl, unquote

import redis
from redis.connection import URL_QUERY_ARGUMENT_PARSERS
from redis.sentinel import Sentinel

from jobguard.errors import ConfigurationError

_SENTINEL_PORT = 26379
_UNIX = ("unix", "socket", "redis+socket")
_SCHEMES = ("redis", "rediss", "sentinel", *_UNIX)

# Schemes of other brokers. An error names only these: any other word may be part of a secret.
_OTHERS = ("amqp", "amqps", "http", "https", "kafka", "memory", "pyamqp", "sqs", "tcp", "valkey")

_TAKEN = {"db", "virtual_host", "username", "password", "password_file", "protocol"}
_OF_SENTINELS = {"master_name", "sentinel_username", "sentinel_password"}
# Options of the host's client. Our client has its own timeouts and its own pool.
_OF_THE_HOST = frozenset(
    """
    client_name decode_responses encoding encoding_errors health_check_interval heartbeat
    legacy_responses lib_name lib_version max_connections retry_on_error retry_on_timeout
    socket_connect_timeout socket_keepalive socket_keepalive_options socket_read_size
    socket_timeout timeout visibility_timeout
    """.split()  # noqa: SIM905
)
_CERT_REQS = {
    spelling: word
    for word in ("none", "optional", "required")
    for spelling in (word, f"cert_{word}")
}

_URL = re.compile(
    r"(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?:\?(?P<query>[^#]*))?(?P<fragment>#.*)?", re.DOTALL
)
_PLACE = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]*\]|[\w.-]*)(?::(?P<port>\d{0,5}))?")

_ENCODE = (
    "a Redis URL cannot be read: {what}. In a password write / as %2F, @ as %40, # as %23, "
    "? as %3F, : as %3A and % as %25"
)
_SENTINEL_FORM = (
    "a sentinel URL is sentinel://[user:password@]host[:port][,host[:port]]/service[/db], or "
    "Celery's sentinel://host:port;sentinel://host:port/db?master_name=SERVICE"
)


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """The address of a Redis, read from a URL."""

    kwargs: Mapping[str, Any] = field(repr=False)
    """For a connection of redis-py: host and port or path, db, account, TLS."""
    tls: bool = False
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    service: str | None = None
    """The name of the master, if sentinels know its address."""
    unknown: tuple[str, ...] = ()
    """Options of the URL that jobguard does not know."""

    def client(self, *, timeout: float) -> redis.Redis:
        """Return a client that is not connected yet."""
        if self.service is not None:
            sentinel: Any = cast(Any, Sentinel)(
                self.sentinels,
                sentinel_kwargs={
                    "socket_timeout": timeout,
                    "socket_connect_timeout": timeout,
                    **self.sentinel_kwargs,
                },
            )
            master = sentinel.master_for(self.service, ssl=self.tls, **self.kwargs)
            return cast(redis.Redis, master)
        kinds: dict[bool, type[Any]] = {False: redis.Connection, True: redis.SSLConnection}
        kind = redis.UnixDomainSocketConnection if "path" in self.kwargs else kinds[self.tls]
        pool = redis.ConnectionPool(connection_class=kind, **self.kwargs)
        return redis.Redis(connection_pool=pool)


class FilePassword(redis.CredentialProvider):
    """Credentials with the password from a file, read at each connect, for passwords that change."""

    def __init__(self, path: str, username: str | None) -> None:
        self._path = path
        self._username = username

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Return the credentials for one connection."""
        try:
            with open(self._path, encoding="utf-8") as file:
                password = file.read().strip()
        except OSError as error:
            raise redis.AuthenticationError(f"password_file: {error}") from error
        return (password,) if self._username is None else (self._username, password)


def split_urls(text: str) -> list[str]:
    """Return the URLs of a text: separated by spaces, or by ``;`` as in Celery's list of brokers.

    A list of sentinels is one URL.
    """
    found = []
    for word in text.split():
        if word.lower().startswith("sentinel://"):
            found.append(word)
        else:
            found += re.split(r";(?=[A-Za-z+]+://)", word)
    return found


def parse(url: str) -> RedisUrl:
    """Read one URL.

    Raises ConfigurationError, which never contains a part of the URL.
    """
    scheme, separator, rest = url.strip().partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in _SCHEMES:
        other = f"; {scheme}:// is not Redis" if scheme in _OTHERS else ""
        raise ConfigurationError(
            f"a Redis URL begins with {', '.join(f'{known}://' for known in _SCHEMES)}{other}"
        )
    if scheme == "sentinel":
        return _by_sentinels(rest)
    account, place, path, options = _parts(rest)
    kwargs, unknown, tls = _from_options(options)
    kwargs = _with_account(account, kwargs)
    if scheme in _UNIX:
        return _of_a_socket(place, path, kwargs, unknown)
    kwargs["host"], port = _host_and_port(place)
    kwargs["port"] = 6379 if port is None else port
    kwargs.setdefault("db", _database(path))
    return RedisUrl(kwargs, tls or scheme == "rediss", unknown=unknown)


def _parts(rest: str) -> tuple[str | None, str, str, list[tuple[str, str]]]:
    """Return account, place, path and options of the text after ``://``."""
    parts = _URL.fullmatch(rest)
    assert parts is not None  # the pattern matches every text
    account, at, place = parts["authority"].rpartition("@")
    query = parts["query"] or ""
    if "@" in parts["path"] + query or parts["fragment"]:
        raise _encode("there is an @ or a # after its host")
    if any("=" not in option for option in query.split("&") if option):
        raise _encode("an option after the ? has no =")
    options = parse_qsl(query, keep_blank_values=True)
    return account if at else None, place, parts["path"], options


def _with_account(account: str | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    if account is not None:
        username, _, password = account.partition(":")
        given = {"username": unquote(username), "password": unquote(password)}
        kwargs |= {name: value for name, value in given.items() if value}
    path = kwargs.pop("password_file", None)
    if path:
        kwargs.pop("password", None)
        kwargs["credential_provider"] = FilePassword(path, kwargs.pop("username", None))
    return kwargs


def _of_a_socket(
    place: str, path: str, kwargs: dict[str, Any], unknown: tuple[str, ...]
) -> RedisUrl:
    if place or not path.strip("/"):
        raise ConfigurationError(
            "the URL of a socket has three slashes and the path: unix:///run/redis.sock?db=0"
        )
    kwargs = {name: value for name, value in kwargs.items() if not name.startswith("ssl_")}
    return RedisUrl({"db": 0, **kwargs, "path": unquote(path)}, unknown=unknown)


def _by_sentinels(rest: str) -> RedisUrl:
    account: str | None = None
    sentinels: list[tuple[str, int]] = []
    paths: list[str] = []
    options: list[tuple[str, str]] = []
    for one in re.split(r";sentinel://", rest.rstrip(";"), flags=re.IGNORECASE):
        given, places, path, more = _parts(one)
        account = account if given is None else given
        options += more
        paths += filter(None, [path.strip("/")])
        for place in places.split(","):
            host, port = _host_and_port(place)
            if not place:
                raise ConfigurationError(_SENTINEL_FORM)
            sentinels.append((host, _SENTINEL_PORT if port is None else port))
    kwargs, unknown, tls = _from_options(options, sentinel=True)
    service = kwargs.pop("master_name", None)
    path = paths[0] if paths else ""
    if service is None:
        service, _, path = path.partition("/")
        service = unquote(service)
    if not service or service.isdigit() or not sentinels:
        raise ConfigurationError(_SENTINEL_FORM)
    if not (path or "0").isdigit():
        raise ConfigurationError(_SENTINEL_FORM)
    kwargs = _with_account(account, kwargs)
    kwargs.setdefault("db", int(path or 0))
    sentinel_kwargs = {
        name.removeprefix("sentinel_"): kwargs.pop(name)
        for name in ("sentinel_username", "sentinel_password")
        if name in kwargs
    }
    return RedisUrl(kwargs, tls, tuple(sentinels), sentinel_kwargs, service, unknown)


def _from_options(
    options: list[tuple[str, str]], *, sentinel: bool = False
) -> tuple[dict[str, Any], tuple[str, ...], bool]:
    """Return the known options as keyword arguments, the names of unknown options, and True for TLS."""
    known = _TAKEN | _tls_options() | (_OF_SENTINELS if sentinel else set())
    kwargs: dict[str, Any] = {}
    unknown = []
    for name, value in options:
        if name == "credential_provider":
            raise ConfigurationError(
                "credential_provider names code of the application, and the reconciler does not load "
                "such code. Write the token to a file and give ?password_file=/path/to/it instead: the "
                "file is read at each connect"
            )
        if name in known:
            kwargs[name] = _value(name, value)
        elif name not in _OF_THE_HOST:
            unknown.append(name)
    if "virtual_host" in kwargs:
        kwargs.setdefault("db", _database(kwargs.pop("virtual_host")))
    tls = any(name.startswith("ssl_") for name in kwargs)
    return kwargs, tuple(unknown), tls


def _value(name: str, value: str) -> Any:
    if name == "ssl_cert_reqs":
        if value.lower() not in _CERT_REQS:
            raise ConfigurationError(
                "ssl_cert_reqs of a Redis URL is none, optional or required "
                "(or CERT_NONE, CERT_OPTIONAL, CERT_REQUIRED)"
            )
        return _CERT_REQS[value.lower()]
    read: Any = URL_QUERY_ARGUMENT_PARSERS.get(name, str)
    try:
        return read(value)
    except (TypeError, ValueError):
        raise ConfigurationError(f"the option {name} of a Redis URL has a wrong value") from None


def _database(path: str) -> int:
    digits = path.replace("/", "")
    if not digits:
        return 0
    if not digits.isdecimal():
        raise _encode("the text after its host is not the number of a database")
    return int(digits)


def _host_and_port(given: str) -> tuple[str, int | None]:
    place = _PLACE.fullmatch(given)
    if place is None or int(place["port"] or 0) > 65535:
        raise _encode("the text before its path is not host:port")
    port = place["port"]
    return place["host"].strip("[]") or "localhost", int(port) if port else None


def _encode(what: str) -> ConfigurationError:
    return ConfigurationError(_ENCODE.format(what=what))


@cache
def _tls_options() -> frozenset[str]:
    named = inspect.signature(cast(Any, redis.SSLConnection).__init__).parameters
    return frozenset(name for name in named if name.startswith("ssl_")) - {"ssl_ocsp_context"}
