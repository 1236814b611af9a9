"""Real PostgreSQL and Redis servers as children, for the demo, the tests and the benchmarks.

Each server has a temporary folder and a port of its own on 127.0.0.1, keeps both across restarts,
and takes both away when it is closed. It can be killed, paused and brought back, so that what
happens to a machine in a bad night can happen here in a second.

Not for production: whoever is on this machine may connect without a password.
"""

from __future__ import annotations

from jobguard.demo.servers.postgres import NamedPostgres, PostgresServer
from jobguard.demo.servers.process import ServerError
from jobguard.demo.servers.redis import NamedRedis, Persistence, RedisServer

__all__ = [
    "NamedPostgres",
    "NamedRedis",
    "Persistence",
    "PostgresServer",
    "RedisServer",
    "ServerError",
]
