"""Who holds a target: one lease, held by a job, a person's lock or a console writer. Pure: no clock of its own, no I/O.

A job takes the port from everybody, and a lock keeps the jobs and the writing of *others* away until it is given back or runs
out; a console writer holds what nobody else does. What a job interrupts comes back after it: the lock goes on, and the writer
writes on. So there is one holder at any time (``holder``), and behind it what will hold again.

- Any number may read; readers hold nothing.
- A writer that sends nothing for ``writer_idle_s`` holds nothing any more. Who writes next is the writer.
- Taking over by right: what a principal holds it may take over from anywhere, and so may who has ``right`` (the caller knows
  who that is: administrators). For others a lock runs out, and its time is bounded. No lock survives a restart of the daemon.
- A job that was interrupted after it began to erase goes on whatever the lock says: its target would stay half written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bridged.errors import TargetBusy

LOCK_LIMIT_S = 86400.0  # A lock that outlives the day belongs to somebody who has gone home.


@dataclass(frozen=True, slots=True)
class Lease:
    """Who holds the target. ``kind``: job, lock or console. ``until``: monotonic end, 0 for none."""

    holder: str
    kind: str
    since: float
    principal: str = ""
    until: float = 0.0
    note: str = ""


class Leases:
    """The lease of one target, and what comes back after a job. ``monotonic`` and ``utc`` are the caller's clocks."""

    def __init__(self, monotonic: Callable[[], float], utc: Callable[[], float], writer_idle_s: float = 60.0) -> None:
        self.writer_idle_s = writer_idle_s
        self._monotonic, self._utc = monotonic, utc
        self._job: Lease | None = None
        self._lock: Lease | None = None
        self._writer: Lease | None = None

    @property
    def holder(self) -> Lease | None:
        """Who holds it now."""
        return self._job or self.lock or self.writer

    @property
    def job(self) -> Lease | None:
        return self._job

    @property
    def lock(self) -> Lease | None:
        if self._lock is not None and self._monotonic() >= self._lock.until:
            self._lock = None
        return self._lock

    @property
    def writer(self) -> Lease | None:
        """The console writer; one that has been silent for too long is none. While a job runs nobody can write: that is not
        counted as silence."""
        if self._writer is not None and self._job is None and self._monotonic() >= self._writer.until:
            self._writer = None
        return self._writer

    # --- jobs -----------------------------------------------------------------------------------------------------

    def begin_job(self, job_id: str) -> None:
        assert self._job is None
        self._job = Lease(job_id, "job", self._utc())

    def end_job(self) -> None:
        self._job = None
        if self._writer is not None:
            self._renew(self._writer)

    def keeps_from(self, principal: str) -> bool:
        """Whether a lock keeps new jobs of ``principal`` waiting."""
        lock = self.lock
        return lock is not None and lock.principal != principal

    # --- locks ----------------------------------------------------------------------------------------------------

    def take_lock(self, principal: str, ttl_s: float, note: str = "", *, right: bool = False) -> Lease:
        """Lock, or lock anew. ``right``: also what another one has locked. Raises ``TargetBusy``."""
        lock = self.lock
        if lock is not None and lock.principal != principal and not right:
            raise self.refusal(lock, "Locking")
        now = self._monotonic()
        since = lock.since if lock is not None and lock.principal == principal else self._utc()
        self._lock = Lease(principal, "lock", since, principal, now + min(ttl_s, LOCK_LIMIT_S), note)
        if self._writer is not None and self._writer.principal != principal:
            self._writer = None
        return self._lock

    def drop_lock(self, principal: str, *, right: bool = False) -> bool:
        """Give it back; whether there was one. Raises ``TargetBusy`` where it is another one's."""
        lock = self.lock
        if lock is None:
            return False
        if lock.principal != principal and not right:
            raise self.refusal(lock, "Unlocking")
        self._lock = None
        return True

    # --- console writers --------------------------------------------------------------------------------------------

    def write(self, client: str, principal: str, *, take: bool = False, right: bool = False) -> None:
        """``client`` writes, or wants to: it holds the target afterwards. Raises ``TargetBusy`` where another one does.

        While a job runs the writer of before stays the one that writes on afterwards. ``take``: take over from another client
        of the same principal, or with ``right`` from any.
        """
        lock, writer = self.lock, self.writer
        if lock is not None and lock.principal != principal:
            raise self.refusal(lock, "Writing")
        if writer is not None and writer.holder != client:
            if not (take and (right or lock is not None or writer.principal == principal)):
                raise self.refusal(writer, "Writing")
            writer = None
        if writer is None:
            self._writer = Lease(client, "console", self._utc(), principal, self._monotonic() + self.writer_idle_s)
        else:
            self._renew(writer)

    def stop_writing(self, client: str) -> None:
        if self._writer is not None and self._writer.holder == client:
            self._writer = None

    def _renew(self, writer: Lease) -> None:
        # Not ``replace``: it is 5 us, for every piece that is written.
        until = self._monotonic() + self.writer_idle_s
        self._writer = Lease(writer.holder, writer.kind, writer.since, writer.principal, until, writer.note)

    def refusal(self, lease: Lease, attempted: str) -> TargetBusy:
        left_s = max(0.0, lease.until - self._monotonic())
        what = {"lock": "has locked it", "console": "writes on its console"}[lease.kind]
        note = f" ({lease.note})" if lease.note else ""
        return TargetBusy(
            f"{attempted}: {lease.holder} {what}{note}, for {left_s:.0f} s more unless it goes on",
            owner=lease.holder,
            kind=lease.kind,
            since=round(lease.since, 3),
            left_s=round(left_s, 1),
        )
