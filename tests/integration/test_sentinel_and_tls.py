"""Connections to Redis by Sentinels, which fail over, and by TLS.

The Sentinel is a real one. The Redis of the tests is built without TLS, so the tests put a TLS proxy in
front of it. A client sees no difference.

Faults that these tests were seen to catch: jobguard's own client stays with the first master
(own_client without its service); jobguard's own client has no certificates (own_client without ``ssl_``).
"""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import trustme
from redis.sentinel import Sentinel

from jobguard.clients import client_from_url
from jobguard.demo.servers import RedisServer
from tests.conformance.words import leading
from tests.databases import rows
from tests.integration.celery.rig import a_rig
from tests.integration.hosts import Host, trusted
from tests.support import eventually

LIBRARIES = ["celery", "dramatiq", "rq"]
SERVICE = "main"


class SentinelServer(RedisServer):
    """A Sentinel that decides alone, after a short time, that a master is down."""

    def __init__(self, master: RedisServer) -> None:
        super().__init__(
            config={
                "sentinel monitor": f"{SERVICE} 127.0.0.1 {master.port} 1",
                "sentinel down-after-milliseconds": f"{SERVICE} 500",
                "sentinel failover-timeout": f"{SERVICE} 2000",
            }
        )

    def _command(self) -> tuple[list[str], dict[str, Any]]:
        arguments, more = super()._command()
        return [*arguments, "--sentinel"], more


@contextmanager
def tls_proxy(server: RedisServer, certificate: trustme.LeafCert) -> Iterator[int]:
    """Open a port that forwards TLS connections to this Redis."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)

    async def copy(source: asyncio.StreamReader, into: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                into.write(data)
                await into.drain()
        into.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside = await asyncio.open_connection("127.0.0.1", server.port)
        await asyncio.gather(copy(reader, inside[1]), copy(inside[0], writer))

    loop = asyncio.new_event_loop()
    listener = loop.run_until_complete(asyncio.start_server(accept, "127.0.0.1", 0, ssl=context))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listener.close()
        handlers = asyncio.all_tasks(loop)
        for handler in handlers:
            handler.cancel()
        loop.run_until_complete(asyncio.gather(*handlers, return_exceptions=True))
        loop.close()


@pytest.fixture
def replica(own_redis: RedisServer) -> Iterator[RedisServer]:
    """Start a replica of the first Redis."""
    follows = {"replicaof": f"127.0.0.1 {own_redis.port}", "repl-diskless-sync-delay": "0"}
    with RedisServer(config=follows) as server:
        eventually(lambda: ask(server, lambda client: client.info("replication"))["role"])
        yield server


@pytest.fixture
def sentinel(own_redis: RedisServer, replica: RedisServer) -> Iterator[SentinelServer]:
    """Start a Sentinel that knows the master and the replica."""
    with SentinelServer(own_redis) as server:

        def knows_both() -> bool:
            found: Any = ask(server, lambda client: client.sentinel_slaves(SERVICE))
            return any(one["master-link-status"] == "ok" for one in found)

        eventually(knows_both, 30)
        yield server


def ask(server: RedisServer, question: Callable[[redis.Redis], Any]) -> Any:
    """Return the answer of one Redis server, in any role."""
    with redis.Redis.from_url(server.url) as client:
        return question(client)


def cut_off(master: RedisServer, replica: RedisServer) -> None:
    """Cut off the replica. A pause alone is not enough: it would later read the data in its socket."""
    replica.pause()
    ask(master, lambda client: client.client_kill_filter(_type="replica"))


def by_sentinel(library: str, sentinel: SentinelServer) -> Host:
    """Return an application that connects by the Sentinel, in the way of its library."""
    asked: Any = cast(Any, Sentinel)([("127.0.0.1", sentinel.port)])
    return Host(
        library,
        f"sentinel://127.0.0.1:{sentinel.port}/0",
        client=asked.master_for(SERVICE),
        conf={"broker_transport_options": {"master_name": SERVICE}},
    )


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_failover_to_a_replica_that_lagged(
    library: str,
    own_redis: RedisServer,
    replica: RedisServer,
    sentinel: SentinelServer,
    database: str,
    stack: ExitStack,
) -> None:
    """Jobs that the new master did not receive are restored there; the others are not changed."""
    host = by_sentinel(library, sentinel)
    guard = host.guard(stack, database)
    assert rows(database, "select address from jobguard.sources") == [(f"sentinel:{SERVICE}/0",)]
    url = f"sentinel://127.0.0.1:{sentinel.port}/{SERVICE}/0"
    stack.enter_context(leading(guard, database, url))
    eventually(lambda: trusted(database) == 1, 30)
    replicated = [host.send() for _ in range(3)]
    assert ask(own_redis, lambda client: client.wait(1, 10_000)) == 1
    cut_off(own_redis, replica)
    missed = [host.send() for _ in range(4)]
    assert host.waiting() == 7
    own_redis.kill()
    replica.resume()

    def all_there() -> bool:
        with suppress(redis.RedisError):  # there is no master yet
            return host.waiting() == 7
        return False

    eventually(all_there, 60)
    assert ask(replica, lambda client: client.info("replication"))["role"] == "master"
    found = rows(database, "select job_id, recoveries from jobguard.jobs")
    assert {job_id for job_id, recoveries in found if recoveries} == set(missed)
    assert {job_id for job_id, recoveries in found if not recoveries} == set(replicated)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_celerys_workers_in_a_failover(
    pool: str,
    own_redis: RedisServer,
    replica: RedisServer,
    sentinel: SentinelServer,
    database: str,
    tmp_path: Path,
) -> None:
    """Celery's workers find the new master, and run each job once, also those it did not receive."""
    url = f"sentinel://127.0.0.1:{sentinel.port}/0"
    by = {"master_name": SERVICE}
    conf = {
        "broker_url": url,
        "broker_transport_options": by,
        "result_backend": url,
        "result_backend_transport_options": by,
    }
    ours = f"sentinel://127.0.0.1:{sentinel.port}/{SERVICE}/0"
    with a_rig(tmp_path, database, ours, conf) as rig:
        rig.reconciler()
        rig.worker(pool)
        rig.until(rig.trusted)
        words = [f"w{number}" for number in range(60)]
        for word in words[:20]:
            rig.send("slow", word, 0.05)
        assert ask(own_redis, lambda client: client.wait(1, 10_000)) == 1
        cut_off(own_redis, replica)
        for word in words[20:40]:
            rig.send("slow", word, 0.05)
        own_redis.kill()
        replica.resume()
        for word in words[40:]:
            rig.send("slow", word, 0.05)
        rig.until(lambda: not rig.owed(), 90)
        assert {word: rig.written()[word] for word in words} == dict.fromkeys(words, 1)
        assert ask(replica, lambda client: client.info("replication"))["role"] == "master"


@pytest.mark.parametrize("library", LIBRARIES)
def test_tls(
    library: str, own_redis: RedisServer, database: str, stack: ExitStack, tmp_path: Path
) -> None:
    """The application and the leader connect by TLS, with a certificate authority that is configured."""
    authority = trustme.CA()
    known = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(known))
    port = stack.enter_context(tls_proxy(own_redis, authority.issue_cert("127.0.0.1")))
    plain = f"rediss://127.0.0.1:{port}/0"
    url = f"{plain}?ssl_cert_reqs=required&ssl_ca_certs={known}"
    with pytest.raises(redis.ConnectionError, match="certificate"):
        redis.Redis.from_url(plain).ping()
    for word in ("CERT_NONE", "none"):  # the spellings of Celery and of redis-py
        assert client_from_url(f"{plain}?ssl_cert_reqs={word}", timeout=10.0).ping()
    host = Host(
        library,
        plain if library == "celery" else url,
        client=redis.Redis.from_url(url),
        conf={"broker_use_ssl": {"ssl_cert_reqs": ssl.CERT_REQUIRED, "ssl_ca_certs": str(known)}},
    )
    guard = host.guard(stack, database)
    stack.enter_context(leading(guard, database, url))
    eventually(lambda: trusted(database) == 1, 30)
    for _ in range(3):
        host.send()
    host.client.flushdb()
    eventually(lambda: host.waiting() == 3, 30)
