"""The errors of jobguard. All derive from JobguardError. The docstring is also the default message."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from functools import partial
from types import CodeType
from typing import Any

_interrupts: set[type[BaseException]] = set()


def host_interrupts(*kinds: type[BaseException]) -> None:
    """Register exceptions that the host raises in its own code by a signal: a time limit, a shutdown.

    The signal may arrive while code of jobguard runs. The exception must then reach the host.
    """
    _interrupts.update(kinds)


def is_host_interrupt(error: BaseException) -> bool:
    """Return True if the host raised this exception by a signal, so that jobguard must not catch it."""
    return isinstance(error, tuple(_interrupts)) or _is_of_a_signal_handler(error)


def _is_of_a_signal_handler(error: BaseException) -> bool:
    """Return True if a function that handles a signal raised it, as time limits made of SIGALRM do."""
    if threading.current_thread() is not threading.main_thread():
        return False  # signals are handled in the main thread alone
    handlers = {_code_of(signal.getsignal(number)) for number in signal.valid_signals()} - {None}
    return not handlers.isdisjoint(_codes_in(error))


def _codes_in(error: BaseException) -> Iterator[CodeType]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code
        trace = trace.tb_next


def _code_of(handler: Any) -> CodeType | None:
    """Return the code of a Python function, method, partial function or callable object."""
    while isinstance(handler, partial):
        handler = handler.func
    if not callable(handler):  # SIG_DFL, SIG_IGN, None
        return None
    if not hasattr(handler, "__code__") and not hasattr(handler, "__func__"):
        handler = type(handler).__call__
    code: CodeType | None = getattr(getattr(handler, "__func__", handler), "__code__", None)
    return code


class JobguardError(Exception):
    """An error occurred in jobguard."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())


class UnsupportedTarget(JobguardError):
    """This target cannot be guarded."""


class ConfigurationError(JobguardError):
    """A setting is missing or invalid."""


class NoPostgres(ConfigurationError):
    """No argument and no variable names a Postgres."""


class ConflictingGuard(JobguardError):
    """This source is already guarded with other settings."""


class StoreUnavailable(JobguardError):
    """Postgres could not be reached in time."""


class NotWritten(StoreUnavailable):
    """Postgres could not be reached or refused the request: nothing was written."""


class BreakerOpen(NotWritten):
    """Postgres failed a moment ago. Calls to it are stopped until it answers again."""


class NotMigrated(NotWritten):
    """The schema does not exist. Run `jobguard migrate`."""


class NoRights(NotWritten):
    """The role may not use the schema. Run `jobguard migrate --roles`, and grant it one of these roles."""


class NotTransactional(NotWritten):
    """This cannot be sent as a part of a transaction: nothing was sent."""


class InvalidKey(ConfigurationError):
    """The key of a job, or the rule for it, is invalid: nothing was sent."""


class KeyHeld(NotWritten):
    """Another job holds the key: nothing was sent."""


class EffectInProgress(JobguardError):
    """Another run does this effect at this moment. The job may try again later."""


class EffectInDoubt(JobguardError):
    """An earlier run began this effect and did not report its end: it may have happened."""


class EffectResultRefused(ConfigurationError):
    """The result of an effect is no JSON or too large. The effect itself has happened."""


class TooManyConnections(NotWritten):
    """Postgres has no free connection for this role or for any role."""


class SchemaMismatch(JobguardError):
    """The schema of the database has another version. Run `jobguard migrate` with this version."""


class KeysUnavailable(NotWritten):
    """The keys of the setting encrypt cannot be read: nothing was written."""


class Unsealable(JobguardError):
    """It is sealed, and this process has no key for it. Set JOBGUARD_ENCRYPT to the file of keys."""


class BadRow(JobguardError):
    """Postgres refuses this row because of its content. It would refuse the row again."""


class NotEnded(JobguardError, TimeoutError):
    """The job has not ended in this time."""


class CannotRender(JobguardError):
    """The message of this job cannot be made without the application."""


class WrongInstallation(JobguardError):
    """This database belongs to another installation than JOBGUARD_INSTALLATION names."""


class WorkersDied(JobguardError):
    """jobguard gave the job up: its workers died, or the rule of its task forbids another run."""


class NotLeading(JobguardError):
    """This process is not the leader, or no longer the leader: nothing was changed."""
