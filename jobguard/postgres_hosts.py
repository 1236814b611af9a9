"""The hosts that a connection string of Postgres names."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo


def is_address(host: str) -> bool:
    """Return True if the host needs no name resolution: an address, or the folder of a socket."""
    if not host or host.startswith(("/", "@")):
        return True
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class PostgresHost:
    """One server as the connection string names it, or one of its addresses."""

    host: str
    port: str
    address: str

    @property
    def server(self) -> tuple[str, str]:
        """The identity of the server, which does not change when the addresses of its name change."""
        return self.host or self.address, self.port

    @property
    def name(self) -> str | None:
        """The name to resolve; None: no resolution is needed."""
        return None if self.address or is_address(self.host) else self.host


PRIMARY = "primary" if pq.version() >= 140000 else "read-write"


def hosts_of(given: Mapping[str, Any]) -> list[PostgresHost]:
    """Return the hosts of a connection string, in their order."""
    if not given.get("service") and not (given.get("host") or given.get("hostaddr")):
        # Read the environment here. Otherwise libpq would read it and resolve the names itself.
        defaults = {
            option.keyword.decode(): (option.val or b"").decode()
            for option in pq.Conninfo.get_defaults()
        }
        given = {k: defaults[k] for k in ("host", "hostaddr", "port") if defaults.get(k)} | dict(
            given
        )
    hosts = str(given.get("host") or "").split(",")
    addresses = str(given.get("hostaddr") or "").split(",")
    ports = str(given.get("port") or "").split(",")
    count = max(len(hosts), len(addresses))
    if len(ports) == 1:
        ports *= count
    hosts = hosts if len(hosts) == count else [""] * count
    addresses = addresses if len(addresses) == count else [""] * count
    if len(ports) != count:
        raise psycopg.OperationalError(f"{len(ports)} ports are named for {count} hosts")
    return [PostgresHost(*each) for each in zip(hosts, ports, addresses, strict=True)]


def writable(conninfo: str) -> str:
    """Return the connection string such that of several hosts only a writable one is used."""
    given = conninfo_to_dict(conninfo)
    if len(hosts_of(given)) > 1:
        given.setdefault("target_session_attrs", PRIMARY)
    return make_conninfo("", **given)
