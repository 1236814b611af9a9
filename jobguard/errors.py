"""The errors of jobguard. All derive from JobguardError; the docstring is also the message."""

from __future__ import annotations

_interrupts: set[type[BaseException]] = set()


def host_interrupts(*kinds: type[BaseException]) -> None:
    """Name what the host throws into its own code by a signal: a time limit, a shutdown.

    It may strike inside of ours, and must reach the host all the same.
    """
    _interrupts.update(kinds)


def is_host_interrupt(error: BaseException) -> bool:
    """Whether this was thrown by the host, and is none of ours to deal with."""
    return isinstance(error, tuple(_interrupts))


class JobguardError(Exception):
    """Something went wrong in jobguard."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())


class UnsupportedTarget(JobguardError):
    """This cannot be guarded."""


class ConfigurationError(JobguardError):
    """A setting is missing or makes no sense."""


class NoPostgres(ConfigurationError):
    """Neither an argument nor a variable names a Postgres."""


class ConflictingGuard(JobguardError):
    """This source is already guarded with other settings."""


class StoreUnavailable(JobguardError):
    """Postgres could not be reached in time."""


class NotWritten(StoreUnavailable):
    """Postgres could not be asked, or refused: nothing was written."""


class BreakerOpen(NotWritten):
    """Postgres failed a moment ago; calls to it are held back until it answers again."""


class NotMigrated(NotWritten):
    """The schema is not there. Run `jobguard migrate`."""


class NoRights(NotWritten):
    """The role may not use the schema. See "Roles and grants" in the README."""


class TooManyConnections(NotWritten):
    """Postgres has no connection left for this role, or none at all."""


class SchemaMismatch(JobguardError):
    """The database's schema is of another version. Run `jobguard migrate` with this version."""


class BadRow(JobguardError):
    """Postgres refuses this row for what is in it, whenever it is sent."""


class WrongInstallation(JobguardError):
    """This database belongs to another installation than JOBGUARD_INSTALLATION says."""


class WorkersDied(JobguardError):
    """Every worker that ran this job died: its crash budget is spent, and it is not run again."""


class NotLeading(JobguardError):
    """This process is not, or no longer, the leader: nothing was changed."""
