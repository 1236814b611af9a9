"""The address of Postgres: convert every usual spelling of it into a string that libpq reads.

The result is a function and not a string, because passwords rotate: a secret's file is read, and a
callable is called, again at each connect. This module does not import psycopg, so that a host that never
writes to Postgres does not load it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias
from urllib.parse import quote, unquote, unquote_to_bytes

from jobguard.errors import ConfigurationError, JobguardError, NoPostgres, StoreUnavailable

Given: TypeAlias = str | Mapping[str, Any] | Callable[[], str | Mapping[str, Any]]

FILE_VARIABLE = "JOBGUARD_POSTGRES_URL_FILE"
VARIABLES = ("JOBGUARD_POSTGRES_URL", "DATABASE_URL")

# libpq refuses unknown options. Options of other drivers are therefore dropped.
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
KEYWORDS = frozenset(
    """
    application_name channel_binding client_encoding connect_timeout dbname
    fallback_application_name gssdelegation gssencmode gsslib host hostaddr keepalives
    keepalives_count keepalives_idle keepalives_interval krbsrvname load_balance_hosts
    max_protocol_version min_protocol_version oauth_client_id oauth_client_secret oauth_issuer
    oauth_scope options passfile password port replication require_auth requirepeer
    scram_client_key scram_server_key service ssl_max_protocol_version ssl_min_protocol_version
    sslcert sslcertmode sslcompression sslcrl sslcrldir sslkey sslkeylogfile sslmode
    sslnegotiation sslpassword sslrootcert sslsni target_session_attrs tcp_user_timeout user
    """.split()  # noqa: SIM905 - a list would need 48 lines
)

# Names of the same options in other programs. To drop an option for TLS would be a silent downgrade.
_ALIASES = {"database": "dbname", "name": "dbname", "username": "user", "ssl": "sslmode"}
_SSLMODES = {"true": "require", "1": "require", "no-verify": "require", "false": "prefer"}

_WITH_AT = ("user", "username", "password")  # options whose value may hold a plain @

_SCHEMES = ("postgres", "postgresql", "postgis", "pgsql")
_URL = re.compile(r"(?P<scheme>[A-Za-z][\w+.-]*)://(?P<place>[^?]*)(?:\?(?P<query>.*))?", re.DOTALL)
_PAIR = re.compile(r"(\w+)\s*=\s*('(?:[^'\\]|\\.)*'|(?:[^\s'\\]|\\.)*)", re.DOTALL)
_PAIRS = re.compile(rf"\s*(?:{_PAIR.pattern}(?:\s+|$))+", re.DOTALL)
_PLACE = re.compile(r"(?:\[[0-9A-Fa-f:.%]*\]|[\w.%~-]*)(?::\d*)?")


def postgres_conninfo(
    given: Given | None = None, environ: Mapping[str, str] | None = None
) -> Callable[[], str]:
    """Return a function that returns the address of Postgres; it is called at each connect.

    The argument has priority, then JOBGUARD_POSTGRES_URL_FILE, JOBGUARD_POSTGRES_URL, DATABASE_URL.

    Raises NoPostgres if no Postgres is named, and ConfigurationError for a wrong value. The returned
    function raises StoreUnavailable if a file or a callable fails, because both may work again at the next
    connect.
    """
    environ = os.environ if environ is None else environ
    if callable(given):
        return _later(given, "the function given as postgres")
    if given is not None:
        return _always(normalise(given))
    if path := environ.get(FILE_VARIABLE, "").strip():
        return _later(lambda: _content(path), FILE_VARIABLE)
    for variable in VARIABLES:
        if url := environ.get(variable, "").strip():
            try:
                return _always(normalise(url, where=variable))
            except ConfigurationError as error:
                if variable != VARIABLES[0]:  # DATABASE_URL is the application's; SQLite in a test
                    raise NoPostgres(str(error)) from None
                raise
    raise NoPostgres(
        "no Postgres is named: give postgres=…, or set JOBGUARD_POSTGRES_URL, "
        "JOBGUARD_POSTGRES_URL_FILE or DATABASE_URL"
    )


def normalise(given: str | Mapping[str, Any], *, where: str = "postgres") -> str:
    """Return a string for libpq from a URL, a conninfo string or a mapping in any usual spelling.

    Raises ConfigurationError, which names ``where`` and never contains a password.
    """
    if isinstance(given, Mapping):
        return _from_mapping(given, where)
    given = given.strip()
    if not given:
        raise ConfigurationError(f"{where} is empty: give a postgresql:// URL")
    url = _URL.fullmatch(given)
    if url:
        return _from_url(url, where)
    if _PAIRS.fullmatch(given):
        return _checked_pairs(given, where)
    scheme = given.partition(":")[0] if ":" in given[:20] else ""
    if scheme in ("sqlite", "mysql"):  # sqlite::memory: and the like
        raise _not_postgres(scheme, where)
    raise ConfigurationError(
        f"{where} is neither a postgresql:// URL nor a libpq string like 'host=… dbname=…'"
    )


def describe(conninfo: str, environ: Mapping[str, str] | None = None) -> str:
    """Return ``host:port/db`` of a normalised conninfo, for people; never a password."""
    environ = os.environ if environ is None else environ
    known = _parsed(conninfo)
    user = known.get("user") or environ.get("PGUSER", "")
    database = known.get("dbname") or environ.get("PGDATABASE") or user
    hosts = (known.get("host") or known.get("hostaddr") or environ.get("PGHOST") or "").split(",")
    ports = (known.get("port") or environ.get("PGPORT") or "").split(",")
    ports = ports if len(ports) == len(hosts) else ports[:1] * len(hosts)
    places = (
        f"{host or 'localhost'}:{port or '5432'}" for host, port in zip(hosts, ports, strict=True)
    )
    if "://" in database or "=" in database:
        database = "(a database named by a connection string)"  # the string may contain a password
    return f"{','.join(places)}/{database}"


def _always(conninfo: str) -> Callable[[], str]:
    return lambda: conninfo


def _later(ask: Callable[[], str | Mapping[str, Any]], where: str) -> Callable[[], str]:
    def conninfo() -> str:
        try:
            return normalise(ask(), where=where)
        except JobguardError as error:
            raise StoreUnavailable(str(error)) from error
        except Exception as error:
            # Only the type: the message of the user's function may contain the secret.
            detail = str(error) if isinstance(error, OSError) else type(error).__name__
            raise StoreUnavailable(f"{where} gave no address of Postgres: {detail}") from error

    return conninfo


def _content(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read().strip()


def _not_postgres(what: str, where: str) -> ConfigurationError:
    return ConfigurationError(
        f"{where} names {what}; jobguard keeps its ledger in PostgreSQL: "
        "set JOBGUARD_POSTGRES_URL to a postgresql:// URL"
    )


def _from_url(url: re.Match[str], where: str) -> str:
    # The URL stays in libpq's own grammar (several hosts, sockets, a '#' in the password), which urlsplit
    # would split wrongly. Only the scheme and the query are changed.
    scheme = url["scheme"].lower()
    if scheme.partition("+")[0] not in _SCHEMES:
        raise _not_postgres(f"a {scheme}:// URL", where)
    place = _checked_place(url["place"], url["query"] or "", where)
    query = _known(_query(url["query"] or ""))
    pairs = "&".join(f"{key}={quote(value, safe='/:,')}" for key, value in query.items())
    return f"postgresql://{place}" + (f"?{pairs}" if pairs else "")


def _checked_place(place: str, query: str, where: str) -> str:
    """Return the place with its account percent-encoded.

    libpq cuts a URL at the first @ and prints the part that it cannot read. That can be a part of a
    password that is not encoded. Therefore libpq gets no URL that it could cut inside a password.
    """
    authority, slash, database = place.partition("/")
    account, at, hosts = authority.rpartition("@")
    astray = [option for option in query.split("&") if "@" in option]
    if (
        "@" in database
        or not all(_PLACE.fullmatch(host) for host in hosts.split(","))
        or not all(option.partition("=")[0] in _WITH_AT for option in astray)
    ):
        raise ConfigurationError(
            f"{where} cannot be read as a URL. In a password write / as %2F, ? as %3F, @ as %40, "
            "# as %23, : as %3A and % as %25"
        )
    user, colon, password = account.partition(":")
    encoded = [quote(unquote_to_bytes(part), safe="") for part in (user, password)]
    if "%00" in account:
        raise ConfigurationError(f"{where} contains a zero byte (%00)")
    return f"{encoded[0]}{colon}{encoded[1]}{at}{hosts}{slash}{database}"


def _checked_pairs(given: str, where: str) -> str:
    # libpq prints a keyword that it does not know. The keyword may be a part of an unquoted password.
    unknown = [key for key, _ in _PAIR.findall(given) if key not in KEYWORDS]
    if not unknown:
        return given
    close = difflib.get_close_matches(unknown[0], KEYWORDS, n=1)
    raise ConfigurationError(
        f"{where} has a keyword that libpq does not know"
        + (f" (did you mean {close[0]}?)" if close else "")
        + "; put a value with spaces in single quotes"
    )


def _query(text: str) -> Iterable[tuple[str, str]]:
    hosts: list[str] = []
    for part in filter(None, text.split("&")):
        key, _, value = part.partition("=")
        # Not parse_qsl: libpq does not read '+' as a space.
        key, value = unquote(key), unquote(value)
        if key == "host":
            hosts.append(value)
        else:
            yield key, value
    if len(hosts) < 2:
        yield from (("host", host) for host in hosts)
        return
    # SQLAlchemy names several hosts like this: ?host=a:5432&host=b:5432
    places = [host.rpartition(":") if ":" in host else (host, "", "") for host in hosts]
    yield "host", ",".join(name for name, _, _ in places)
    if any(port for _, _, port in places):
        yield "port", ",".join(port or "5432" for _, _, port in places)


def _from_mapping(given: Mapping[str, Any], where: str) -> str:
    pairs = {str(key).lower(): value for key, value in given.items()}
    engine = str(pairs.get("engine", "")).lower()
    for other in ("sqlite", "mysql", "oracle", "mssql"):
        if other in engine:
            raise _not_postgres(f"a database of the kind {other}", where)
    options = pairs.get("options")
    if isinstance(options, Mapping):  # Django's; libpq's own "options" is a string
        pairs = {**pairs, "options": None, **options}
    known = _known((key, str(value)) for key, value in pairs.items() if value not in (None, ""))
    if not known:
        raise ConfigurationError(f"{where} is a mapping without host, dbname, user or the like")
    return " ".join(f"{key}={_quoted(value)}" for key, value in known.items())


def _known(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    known: dict[str, str] = {}
    for key, value in pairs:
        name = _ALIASES.get(key, key)
        if name == "sslmode":
            value = _SSLMODES.get(value.lower(), value)
        if name in KEYWORDS and (name == key or name not in known):
            known[name] = value
    return known


def _quoted(value: str) -> str:
    if re.fullmatch(r"[\w./:,@+-]+", value):
        return value
    return "'" + value.replace("\\", r"\\").replace("'", r"\'") + "'"


def _parsed(conninfo: str) -> dict[str, str]:
    url = _URL.fullmatch(conninfo.strip())
    if not url:
        return {
            key: re.sub(r"\\(.)", r"\1", value.removeprefix("'").removesuffix("'"))
            for key, value in _PAIR.findall(conninfo)
        }
    account_and_hosts, _, database = url["place"].partition("/")
    account, _, hosts = account_and_hosts.rpartition("@")
    places = [_host_and_port(place) for place in hosts.split(",")]
    known = {
        "user": unquote(account.partition(":")[0]),
        "dbname": unquote(database),
        "host": ",".join(host for host, _ in places),
        "port": ",".join(port for _, port in places),
    }
    return known | dict(_query(url["query"] or ""))


def _host_and_port(place: str) -> tuple[str, str]:
    address = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(\d*))?", place)
    return (unquote(address[1]), address[2] or "") if address else (unquote(place), "")
