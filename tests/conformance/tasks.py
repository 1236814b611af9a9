"""The tasks of the suite: plain functions that each library registers in its own way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

import jobguard

PROBES: list[Callable[[], object]] = []
"""The functions that ``probe`` calls, if the worker is this process."""


def say(ledger: str, word: object = "ran") -> None:
    """Write a word to the ledger."""
    with Path(ledger).open("a") as file:
        file.write(f"{word}\n")


def fail(ledger: str, word: object = "ran") -> None:
    """Fail."""
    say(ledger, word)
    raise ValueError("fails on purpose")


def pay(ledger: str, database: str) -> None:
    """Do two effects once, and fail in the first attempt."""
    with psycopg.connect(database) as connection, jobguard.once("pay", conn=connection) as first:
        if first:
            connection.execute("insert into public.payments default values")
            first.result = "paid"
    jobguard.once("mail", lambda: say(ledger, f"mail:{first.result}"))
    asyncio.run(_pay(ledger, database))
    if jobguard.current().attempt == 1:
        raise ValueError("fails on purpose")


async def _pay(ledger: str, database: str) -> None:
    async def mail() -> None:
        say(ledger, "sms")

    async with (
        await psycopg.AsyncConnection.connect(database) as connection,
        jobguard.aonce("pay by phone", conn=connection) as first,
    ):
        if first:
            await connection.execute("insert into public.payments default values")
    await jobguard.aonce("sms", mail)


def probe(ledger: str, word: object = "ran") -> None:
    """Call the probes while the task runs."""
    say(ledger, word)
    for call in PROBES:
        call()


def nap(ledger: str, word: object = "ran") -> None:
    """Take a moment, so that several jobs run at the same time."""
    say(ledger, f"{word}:begun")
    time.sleep(0.3)
    say(ledger, word)


def die(ledger: str, word: object = "ran") -> None:
    """Kill the worker, unless the test has created the file ``.cured``."""
    say(ledger, word)
    if not Path(f"{ledger}.cured").exists():
        os.kill(os.getpid(), signal.SIGKILL)


def hold(ledger: str, word: object = "ran") -> None:
    """Own a lock while the process dies, and write what the run knows of the previous one."""
    job = jobguard.current()
    with jobguard.lock("import", wait=5) as mine:
        known = job.predecessor is not None
        say(ledger, f"{mine},{job.recovered},{job.crashes},{known}")
        die(ledger, word)
