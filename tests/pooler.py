"""A minimal pooler in transaction mode: its clients share sessions of one server.

The pooler answers a login itself, with a backend number that is not the server's. It lends a session from
the first message to the end of the transaction. It does not reset a session between two clients.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_NUMBERS = itertools.count(1_000_000)


class Pooler:
    """A pooler with ``size`` sessions of the database at ``url``; ``hidden``: with the server's numbers."""

    def __init__(self, url: str, *, size: int = 1, hidden: bool = False) -> None:
        self.url = url
        self.logins = 0
        self._hidden = hidden
        self._keys: dict[socket.socket, bytes] = {}
        self._free = threading.Semaphore(size)
        self._idle: list[socket.socket] = []
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._parameters = b""
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Pooler:
        """Serve until the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close all connections."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):  # a thread in accept() does not notice a close
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for one in self._open:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()

    @property
    def client_url(self) -> str:
        """The URL for clients."""
        there = urlsplit(self.url)
        return (
            f"postgresql://{there.username}@127.0.0.1:{self._listener.getsockname()[1]}{there.path}"
        )

    def move(self, url: str) -> None:
        """Lend sessions of another server from now on."""
        with self._lock:
            self.url = url
            for one in self._idle:
                one.close()
            self._idle.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._lock:
                    self._open.append(client)
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError), client:
            while True:
                startup = _startup(client)
                code = struct.unpack("!I", startup[:4])[0]
                if code in (80877103, 80877104):  # TLS, GSSAPI
                    client.sendall(b"N")
                    continue
                if code == 80877102:
                    return
                break
            self.logins += 1
            with self._session() as server:
                key = self._keys[server]  # now the parameters of the server are known, too
            if not self._hidden:
                key = struct.pack("!II", next(_NUMBERS), 7)
            client.sendall(
                _message(b"R", struct.pack("!I", 0))
                + self._parameters
                + _message(b"K", key)
                + _message(b"Z", b"I")
            )
            while True:
                first = _read(client)
                if first[:1] == b"X":
                    return
                with self._session() as server:
                    self._transaction(client, server, first)

    def _transaction(self, client: socket.socket, server: socket.socket, first: bytes) -> None:
        message, state = first, b""
        while state != b"I":
            if not message:
                message = _read(client)
            server.sendall(message)
            ends, message = message[:1] in (b"S", b"Q"), b""
            while ends:
                answer = _read(server)
                client.sendall(answer)
                if answer[:1] == b"Z":
                    state = answer[5:6]
                    break

    @contextlib.contextmanager
    def _session(self) -> Iterator[socket.socket]:
        with self._free:
            with self._lock:
                server = self._idle.pop() if self._idle else None
                url = self.url
            if server is None:
                server = self._connect(url)
            try:
                yield server
            except BaseException:
                server.close()
                raise
            with self._lock:
                if url == self.url:
                    self._idle.append(server)
                else:
                    server.close()

    def _connect(self, url: str) -> socket.socket:
        there = urlsplit(url)
        server = socket.create_connection((there.hostname or "127.0.0.1", there.port or 5432))
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self._open.append(server)
        pairs = f"user\0{there.username}\0database\0{there.path[1:]}\0client_encoding\0utf8\0\0"
        body = struct.pack("!I", 196608) + pairs.encode()
        server.sendall(struct.pack("!I", len(body) + 4) + body)
        parameters = b""
        while (answer := _read(server))[:1] != b"Z":
            if answer[:1] == b"E":
                raise EOFError(answer)
            if answer[:1] == b"S":
                parameters += answer
            if answer[:1] == b"K":
                self._keys[server] = answer[5:]
        self._parameters = parameters
        return server


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


def _startup(sock: socket.socket) -> bytes:
    (length,) = struct.unpack("!I", _exactly(sock, 4))
    return _exactly(sock, length - 4)


def _read(sock: socket.socket) -> bytes:
    head = _exactly(sock, 5)
    return head + _exactly(sock, struct.unpack("!I", head[1:])[0] - 4)


def _exactly(sock: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        part = sock.recv(count - len(found))
        if not part:
            raise EOFError
        found += part
    return found
