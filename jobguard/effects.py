"""``jobguard.once()``: an effect of a job that happens at most once, even if the job runs again.

Without ``conn`` the effect is announced in the ledger before it begins, and its result is stored when it
is done. If the worker dies in between, nobody knows whether the effect happened: the policy decides. With
``conn`` the row of the effect is a part of the effect's own transaction, so that nothing is in doubt.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import TracebackType
from typing import Any, Literal, TypeVar, overload

from jobguard.current import CurrentJob, EffectLedger, current
from jobguard.errors import (
    ConfigurationError,
    EffectInDoubt,
    EffectInProgress,
    EffectResultRefused,
    StoreUnavailable,
    is_host_interrupt,
)

LeftBehind = Literal["raise", "run_again"]
Per = Literal["job", "key"]
T = TypeVar("T")

_MOST_BYTES = 64_000
_PATIENCE = 10.0
"""Seconds that a finished effect tries to store its result while Postgres is away."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


class Effect:
    """One effect in the block of once(): true if this run does it."""

    __slots__ = ("_first", "_text")

    def __init__(self, *, first: bool, text: str | None = None) -> None:
        self._first = first
        self._text = text

    def __bool__(self) -> bool:
        """Return True if the effect has not happened: the block does it now."""
        return self._first

    @property
    def result(self) -> Any:
        """The stored result of the effect. Set it in the block to store it: JSON, at most 64 kB."""
        return None if self._text is None else json.loads(self._text)

    @result.setter
    def result(self, value: Any) -> None:
        self._text = _as_json(value)


def _as_json(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise EffectResultRefused(
            f"the result of an effect is stored as JSON, and this is none: {error}. Return None or a plain "
            "value"
        ) from error
    if len(text) > _MOST_BYTES:
        raise EffectResultRefused(
            f"the result of an effect is {len(text)} bytes of JSON; {_MOST_BYTES} are stored at most. Keep "
            "the result elsewhere, and return its key"
        )
    return text


class _Once:
    """The effect of one call of once(): how it begins and how it ends."""

    def __init__(
        self, key: str, *, conn: Any, per: Per, left_behind: LeftBehind, wait: float
    ) -> None:
        if per not in ("job", "key") or left_behind not in ("raise", "run_again"):
            raise ConfigurationError(
                f"per={per!r}, left_behind={left_behind!r}: per is 'job' or 'key', left_behind is 'raise' "
                "or 'run_again'"
            )
        self.key = key
        self.conn = conn
        self.wait = wait
        self.again = left_behind == "run_again"
        self.job: CurrentJob = current()
        self.bare = self.job._effects is None
        if self.bare and per == "key":
            raise ConfigurationError(
                "once(per='key') works inside a guarded job: only a claim shows whether the process that "
                "began the effect is alive"
            )
        # Two numbers and a name cannot be mistaken for another pair of id and key.
        job_id = self.job.id or ""
        self.job_id = job_id if per == "job" else None
        self.name = f"{len(job_id)}:{job_id}:{key}" if per == "job" else f"key:{key}"

    # -- on the ledger's connection --------------------------------------------------------------

    def begin(self) -> Effect:
        """Announce the effect. Raises EffectInProgress, EffectInDoubt, StoreUnavailable."""
        until, pause = time.monotonic() + self.wait, _FIRST_PAUSE
        while True:
            assert self.job._effects is not None
            verdict, text = self.job._effects.begin_effect(self.name, self.job_id, again=self.again)
            left = until - time.monotonic()
            if verdict != "busy" or left <= 0:
                return self.judged(verdict, text)
            time.sleep(min(pause, left))
            pause = min(_LONGEST_PAUSE, 2 * pause)

    def judged(self, verdict: str, text: str | None) -> Effect:
        """Return the effect for the answer of the ledger. Raises EffectInProgress, EffectInDoubt."""
        if verdict == "first":
            return Effect(first=True)
        if verdict == "done":
            return Effect(first=False, text=text)
        if verdict == "busy":
            raise EffectInProgress(f"another run does the effect {self.key!r} at this moment")
        if verdict == "unclaimed":
            raise EffectInProgress(
                f"this run has no claim in the ledger, so that it may not begin the effect {self.key!r}"
            )
        raise EffectInDoubt(
            f"a run that has ended began the effect {self.key!r} and stored no result: it may have "
            "happened. Check, and use left_behind='run_again' if it may be repeated, or conn= if it is in "
            "this database"
        )

    def finish(self, effect: Effect) -> None:
        """Store the result. Raises StoreUnavailable if Postgres stays away."""
        ledger = self.job._effects
        assert ledger is not None
        self._insist(lambda: ledger.finish_effect(self.name, effect._text))

    def fail(self, error: Exception) -> None:
        """End an effect whose block raised: it is tried again, unless only its result was refused."""
        ledger = self.job._effects
        assert ledger is not None
        if is_host_interrupt(error):
            return  # a time limit or a shutdown does not say how far the effect has come
        try:
            if isinstance(error, EffectResultRefused):
                self.finish(Effect(first=True))
            else:
                self._insist(lambda: ledger.forget_effect(self.name))
        except StoreUnavailable as away:
            error.add_note(
                f"jobguard: the effect {self.key!r} is in doubt for the next run: {away}"
            )

    @staticmethod
    def _insist(write: Callable[[], None]) -> None:
        """Write what is known about an effect, for some time also while Postgres is away."""
        until, pause = time.monotonic() + _PATIENCE, _FIRST_PAUSE
        while True:
            try:
                return write()
            except StoreUnavailable:
                if time.monotonic() + pause > until:
                    raise
                time.sleep(pause)
                pause = min(_LONGEST_PAUSE, 2 * pause)


@contextmanager
def _block(it: _Once) -> Iterator[Effect]:
    if it.conn is not None:
        with _in_transaction(it) as effect:
            yield effect
        return
    if it.bare:
        yield Effect(first=True)
        return
    effect = it.begin()
    if not effect:
        yield effect
        return
    try:
        yield effect
    except Exception as error:
        it.fail(error)
        raise
    it.finish(effect)


@contextmanager
def _in_transaction(it: _Once) -> Iterator[Effect]:
    from jobguard.host.callers import caller_of
    from jobguard.host.transaction import begun

    caller = caller_of(it.conn)
    ledger = it.job._effects
    if ledger is None:
        with caller.begin():
            yield Effect(first=True)
        return
    with begun(ledger.installation_id, caller):
        values = _values(it, ledger)
        verdict, text = caller.execute("begin_effect_in_transaction", **values)
        effect = it.judged(verdict, ledger.unseal_result(text))
        yield effect
        if effect and effect._text is not None:
            caller.execute("store_effect", **_stored(values, ledger, effect))


@asynccontextmanager
async def _ablock(it: _Once) -> AsyncIterator[Effect]:
    if it.conn is not None:
        async with _in_async_transaction(it) as effect:
            yield effect
        return
    if it.bare:
        yield Effect(first=True)
        return
    effect = await asyncio.to_thread(it.begin)
    if not effect:
        yield effect
        return
    try:
        yield effect
    except Exception as error:
        await asyncio.to_thread(it.fail, error)
        raise
    await asyncio.to_thread(it.finish, effect)


@asynccontextmanager
async def _in_async_transaction(it: _Once) -> AsyncIterator[Effect]:
    from jobguard.host.callers import async_caller_of
    from jobguard.host.transaction import abegun

    caller = async_caller_of(it.conn)
    ledger = it.job._effects
    if ledger is None:
        async with caller.begin():
            yield Effect(first=True)
        return
    async with abegun(ledger.installation_id, caller):
        values = _values(it, ledger)
        verdict, text = await caller.execute("begin_effect_in_transaction", **values)
        effect = it.judged(verdict, ledger.unseal_result(text))
        yield effect
        if effect and effect._text is not None:
            await caller.execute("store_effect", **_stored(values, ledger, effect))


def _values(it: _Once, ledger: EffectLedger) -> dict[str, str]:
    return ledger.effect_values(it.name, it.job_id) | {"again": str(it.again)}


def _stored(values: dict[str, str], ledger: EffectLedger, effect: Effect) -> dict[str, str]:
    kept = {name: values[name] for name in ("source", "key")}
    return kept | {"result": str(ledger.seal_result(effect._text))}


@overload
def once(
    key: str,
    effect: Callable[[], T],
    *,
    conn: Any = None,
    per: Per = "job",
    left_behind: LeftBehind = "raise",
    wait: float = 0.0,
) -> T: ...
@overload
def once(
    key: str,
    *,
    conn: Any = None,
    per: Per = "job",
    left_behind: LeftBehind = "raise",
    wait: float = 0.0,
) -> Any: ...
def once(
    key: str,
    effect: Callable[[], Any] | None = None,
    *,
    conn: Any = None,
    per: Per = "job",
    left_behind: LeftBehind = "raise",
    wait: float = 0.0,
) -> Any:
    """Do an effect of the running job once, even if the job runs again.

    ``once("mail", send)`` returns what ``send`` returned, in this run or in an earlier one (JSON, at most
    64 kB). ``with once("mail") as first:`` gives an Effect that is true if the block must do it. If the
    effect raises an error, the next run tries it again.

    ``conn``: the connection of the application on which the effect writes, as for ``JobGuard.transaction``.
    The effect and the memory of it are one transaction, so that it happens exactly once. Without it, the
    effect happens at most once.
    ``per``: "job": once for this job, through retries and recoveries, until it is completed; "key": once
    for all jobs of the source.
    ``left_behind``: an earlier run began the effect, and died before it was done. "raise": raise
    EffectInDoubt; "run_again": do it again.
    ``wait``: wait at most this many seconds for another run that does it at this moment.

    Outside of a guarded job the effect is just done. Raises EffectInProgress, EffectInDoubt,
    ConfigurationError for a result that is no JSON or too large, and StoreUnavailable while Postgres is
    away: nothing is done then.
    """
    it = _Once(key, conn=conn, per=per, left_behind=left_behind, wait=wait)
    if effect is None:
        return _block(it)
    with _block(it) as first:
        if first:
            value = effect()
            if inspect.iscoroutine(value) or inspect.isgenerator(value):
                value.close()
                raise ConfigurationError(
                    f"the effect {key!r} returned a {type(value).__name__}, and nothing of it has run: use "
                    "`await jobguard.aonce(…)` for a coroutine function, or call what it returns"
                )
            first.result = value
            return value
    return first.result


class aonce:
    """Do the same for asyncio: ``await aonce("mail", send)``, or ``async with aonce("mail") as first:``.

    ``effect`` may be a coroutine function. ``conn`` is as for ``JobGuard.atransaction``. See once().
    """

    def __init__(
        self,
        key: str,
        effect: Callable[[], Any] | None = None,
        *,
        conn: Any = None,
        per: Per = "job",
        left_behind: LeftBehind = "raise",
        wait: float = 0.0,
    ) -> None:
        it = _Once(key, conn=conn, per=per, left_behind=left_behind, wait=wait)
        self._block = _ablock(it)
        self._effect = effect

    def __await__(self) -> Generator[Any, None, Any]:
        """Do the effect, and return its result."""
        return self._do().__await__()

    async def _do(self) -> Any:
        if self._effect is None:
            raise ConfigurationError(
                "await aonce() needs the effect; without one, use `async with`"
            )
        async with self._block as first:
            if first:
                value = self._effect()
                if inspect.isawaitable(value):
                    value = await value
                first.result = value
                return value
        return first.result

    async def __aenter__(self) -> Effect:
        """Begin the effect."""
        return await self._block.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        """End the effect."""
        return await self._block.__aexit__(kind, error, trace)
