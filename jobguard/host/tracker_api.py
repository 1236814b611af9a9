"""The tracker as the other modules of this package see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from uuid import UUID

    import redis

    from jobguard.adapter import Source
    from jobguard.host.circuit import Circuit
    from jobguard.host.parent import ParentStore
    from jobguard.host.spool import Released, Spool
    from jobguard.host.stream import Notes
    from jobguard.model import ClaimAnswer, Delivery, End, Ended
    from jobguard.settings import Settings
    from jobguard.store.protocols import ClaimRequest, HostStore


class TrackerApi(Protocol):
    """The part of the tracker that sessions, beats and the children of a worker use."""

    source: Source
    settings: Settings
    circuit: Circuit
    spool: Spool
    client: Callable[[], redis.Redis] | None

    @property
    def parent(self) -> ParentStore | None:
        """The way to the worker, in a child that its worker serves; else None."""

    def connect(self) -> None:
        """Reach Postgres now, or raise the reason why it cannot be used."""

    def call(self, work: Callable[[HostStore], Any]) -> Any:
        """Make one call to the store, behind the circuit."""

    def claim(self, request: ClaimRequest) -> ClaimAnswer:
        """Ask for a claim. Raises as the store does."""

    def start_unclaimed(self, request: ClaimRequest) -> None:
        """Report a start while Postgres is away to the stream."""

    def notes_of(self, delivery: Delivery) -> Notes:
        """Return what waits in the stream about this delivery."""

    @property
    def reports_may_wait(self) -> bool:
        """Whether reports of an outage may wait in the stream, as far as this process knows."""

    def record_late(self, delivery: Delivery) -> None:
        """Record a delivery that is in Redis already. Raises as the store does."""

    def recovers(self, tokens: Sequence[UUID], *, began: bool = True) -> frozenset[UUID] | None:
        """Return those that a leader restores; see Tracker."""

    def release(self, released: Released) -> None:
        """Release a claim. Raises as the store does; then it is released when Postgres is back."""

    def end(self, ends: Sequence[End]) -> Sequence[Ended]:
        """Commit ends. Raises as the store does."""

    def replay(self) -> int:
        """Write waiting entries of the spool to Postgres; return how many it took."""

    def drain_spool(self, *, last: bool = False) -> None:
        """Write all waiting entries, in bounded time."""

    def log_full_spool(self, count: int) -> None:
        """Log that this many entries find no room in the spool."""

    def for_child(self, name: str, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Make this call for a child of the worker. May raise the errors of the store."""
