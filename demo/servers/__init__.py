"""Real PostgreSQL and Redis servers as child processes, for the demo, the tests and the benchmarks.

Each server has its own temporary folder and its own port on 127.0.0.1. It keeps both across
restarts, and removes both when it is closed. It can be killed, paused and restarted, so that the
failures of a machine can be reproduced here in a second.

Not for production: every user of this machine can connect without a password.
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
