"""``once()`` as a job uses it, with a claim whose ledger is a dict."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest

import jobguard
from jobguard import effects
from jobguard.current import CurrentJob, running
from jobguard.errors import (
    ConfigurationError,
    EffectInDoubt,
    EffectInProgress,
    EffectResultRefused,
    StoreUnavailable,
)


class Claim:
    """The claim of a job whose effects are in a dict."""

    def __init__(self) -> None:
        self.effects: dict[str, str | None] = {}
        self.verdicts: list[str] = []
        self.away = 0

    def begin_effect(self, name: str, job_id: str | None, *, again: bool) -> tuple[str, str | None]:
        """Answer what the test wants, or by the dict."""
        self._reach()
        if self.verdicts:
            return self.verdicts.pop(0), None
        if name not in self.effects:
            return "first", None
        return "done", self.effects[name]

    def finish_effect(self, name: str, result: str | None) -> None:
        """Store the result."""
        self._reach()
        self.effects[name] = result

    def forget_effect(self, name: str) -> None:
        """Note the call."""
        self._reach()
        self.effects.pop(name, None)

    def _reach(self) -> None:
        if self.away:
            self.away -= 1
            raise StoreUnavailable


def nested(depth: int) -> list[Any]:
    """Return a list in a list, and so on."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.fixture
def claim(monkeypatch: pytest.MonkeyPatch) -> Claim:
    """Return the claim of the job in which the test runs."""
    monkeypatch.setattr(effects, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(effects, "_PATIENCE", 0.2)
    return Claim()


def in_job(claim: Any, work: Callable[[], Any]) -> Any:
    """Run as a job."""
    with running(CurrentJob("a", 1, _effects=claim)):
        return work()


def test_the_effect_is_done_once_and_its_result_is_kept(claim: Claim) -> None:
    """The second call returns the stored result; other jobs and other names do their own effect."""
    calls: list[int] = []

    def effect() -> dict[str, int]:
        calls.append(1)
        return {"id": len(calls)}

    for _ in range(2):
        assert in_job(claim, lambda: jobguard.once("mail", effect)) == {"id": 1}
    assert in_job(claim, lambda: jobguard.once("sms", effect)) == {"id": 2}
    with running(CurrentJob("b", 1, _effects=cast(Any, claim))):
        assert jobguard.once("mail", effect) == {"id": 3}
        assert jobguard.once("mail", effect, per="key") == {"id": 4}
    assert in_job(claim, lambda: jobguard.once("mail", effect, per="key")) == {"id": 4}


def test_a_block_learns_whether_it_is_the_first(claim: Claim) -> None:
    """The block does the effect once, and later blocks read its result."""

    def block() -> tuple[bool, Any]:
        with jobguard.once("mail") as first:
            if first:
                first.result = [1]
            return bool(first), first.result

    assert in_job(claim, block) == (True, [1])
    assert in_job(claim, block) == (False, [1])


def test_an_error_lets_the_next_run_try_again(claim: Claim) -> None:
    """An effect that raised is forgotten, also if Postgres is away for a moment."""

    def fail() -> None:
        claim.away = 3
        raise KeyError("x")

    with pytest.raises(KeyError):
        in_job(claim, lambda: jobguard.once("mail", fail))
    assert in_job(claim, lambda: jobguard.once("mail", lambda: 1)) == 1


def test_an_interrupt_leaves_the_effect_in_doubt(claim: Claim) -> None:
    """A shutdown inside the effect does not say that it did not happen."""
    claim.effects["1:a:mail"] = None

    def stop() -> None:
        raise SystemExit

    with pytest.raises(SystemExit):
        in_job(claim, lambda: jobguard.once("other", stop))
    claim.verdicts = ["left"]
    with pytest.raises(EffectInDoubt, match="run_again"):
        in_job(claim, lambda: jobguard.once("other", stop))


@pytest.mark.parametrize("result", [object(), "x" * 64_001, nested(3_000)], ids=type)
def test_a_result_that_cannot_be_kept_is_an_error_after_the_effect(
    claim: Claim, result: object
) -> None:
    """The effect counts as done, because it has happened."""
    with pytest.raises(EffectResultRefused):
        in_job(claim, lambda: jobguard.once("mail", lambda: result))
    assert in_job(claim, lambda: jobguard.once("mail", lambda: 1)) is None


def test_an_effect_of_which_nothing_has_run_is_not_done(claim: Claim) -> None:
    """A function that returns a coroutine or a generator is an error. The next run tries again."""

    async def send() -> None:
        raise AssertionError

    def each() -> Iterator[int]:
        yield 1

    with pytest.raises(ConfigurationError, match="nothing of it has run"):
        in_job(claim, lambda: jobguard.once("mail", send))
    with pytest.raises(ConfigurationError, match="nothing of it has run"):
        in_job(claim, lambda: jobguard.once("list", each))
    assert claim.effects == {}


def test_a_busy_effect_is_waited_for(claim: Claim) -> None:
    """With ``wait`` a run waits for the other one; without it, it raises at once."""
    claim.verdicts = ["busy"]
    with pytest.raises(EffectInProgress):
        in_job(claim, lambda: jobguard.once("mail", lambda: 1))
    claim.verdicts = ["busy", "busy"]
    assert in_job(claim, lambda: jobguard.once("mail", lambda: 1, wait=30)) == 1
    claim.verdicts = ["unclaimed"]
    with pytest.raises(EffectInProgress, match="no claim"):
        in_job(claim, lambda: jobguard.once("mail", lambda: 1))


def test_without_postgres_nothing_is_done(claim: Claim) -> None:
    """An effect does not begin while the ledger is away; a done one waits for it, and raises in the end."""
    calls: list[int] = []
    claim.away = 1
    with pytest.raises(StoreUnavailable):
        in_job(claim, lambda: jobguard.once("mail", lambda: calls.append(1)))
    assert calls == []

    def effect() -> int:
        claim.away = 10_000
        return 1

    with pytest.raises(StoreUnavailable):
        in_job(claim, lambda: jobguard.once("mail", effect))


def test_outside_of_a_job_the_effect_is_just_done() -> None:
    """A function that uses once() can be called in a test; a key for all jobs needs a job."""
    assert jobguard.once("mail", lambda: 1) == 1
    with jobguard.once("mail") as first:
        assert first
    with pytest.raises(ConfigurationError, match="inside a guarded job"):
        jobguard.once("mail", lambda: 1, per="key")
    with pytest.raises(ConfigurationError, match="left_behind"):
        jobguard.once("mail", lambda: 1, left_behind="retry")  # type: ignore[call-overload]


def test_asyncio(claim: Claim) -> None:
    """Coroutines and plain functions are effects too."""

    async def effect() -> int:
        return 5

    async def work() -> list[Any]:
        async with jobguard.aonce("sms") as first:
            assert first
        async with jobguard.aonce("sms") as second:
            assert not second
        with pytest.raises(KeyError):
            async with jobguard.aonce("fax"):
                raise KeyError
        return [
            await jobguard.aonce("mail", effect),
            await jobguard.aonce("mail", effect),
            await jobguard.aonce("fax", lambda: 6),
        ]

    assert in_job(claim, lambda: asyncio.run(work())) == [5, 5, 6]
