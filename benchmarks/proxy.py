"""A network that is slow: a proxy for TCP that delays every byte by half of a round trip.

Run as a program: HOST PORT MILLISECONDS. It prints its own port, and runs until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from contextlib import suppress


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Copy one direction. Bytes that follow each other are delayed side by side."""
    loop = asyncio.get_running_loop()
    waiting: deque[tuple[float, bytes]] = deque()
    more = asyncio.Event()

    async def send() -> None:
        while True:
            while not waiting:
                more.clear()
                await more.wait()
            due, data = waiting.popleft()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not data:
                writer.close()
                return
            writer.write(data)
            await writer.drain()

    sending = asyncio.ensure_future(send())
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            waiting.append((loop.time() + delay, data))
            more.set()
    waiting.append((loop.time() + delay, b""))
    more.set()
    with suppress(OSError):
        await sending


async def _serve(host: str, port: int, delay: float) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, port)
        await asyncio.gather(_pipe(reader, there_writer, delay), _pipe(there_reader, writer, delay))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 2000))
