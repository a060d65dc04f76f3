"""What a crash left in a session: how long nobody may touch it (P9), and its way back to its application (P4).

A lane pays such a *debt* before it runs anything else, and under the lock that it shares with others on the same wires.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from bridged.config import Target as TargetConfig
from bridged.errors import BridgedError, PortGone, StorageError
from bridged.jobs.book import Book
from bridged.jobs.journal import Journal
from bridged.jobs.known import Known
from bridged.jobs.lane import Debt, Lane
from bridged.jobs.ports import Clock
from bridged.jobs.records import Change, OpenSession, TargetRecord
from bridged.target.kept import was_empty

log = logging.getLogger(__name__)

OLD_SESSION_S = 30.0  # An old session process sees that its daemon is gone and releases its target; no longer than this.


def hazard_left_s(session: OpenSession, clock: Clock) -> float:
    """How long nobody may touch the target, from now, with the process of that session gone or going (P9).

    The journal has the longest single command of a stage, not when the last one began. Within the same boot the session may
    have been killed a moment ago, in the middle of a command that it had just begun: the whole time counts, from now. After a
    reboot every command began before this boot did: what has passed since then is taken off.
    """
    if not session.hazard_s or session.boot_id == clock.boot_id:
        return session.hazard_s
    return max(0.0, session.hazard_s - clock.boottime())


def empty_chip(journal: Journal, job_id: str, record: TargetRecord | None, settings: TargetConfig) -> str:
    """Which chip ``release_after`` has to start after its reset, because its flash was empty before ``job_id``; or nothing.

    Parts that check for that at power-on enter their loader at every reset until their power is cycled (AN2606).
    """
    if not was_empty(journal.backup(job_id).kept):
        return ""
    return settings.chip or (f"{record.pid:#05x}" if record and record.pid else "")


class Recovery:
    def __init__(self, journal: Journal, known: Known, book: Book, clock: Clock) -> None:
        self._journal = journal
        self._known = known
        self._book = book
        self._clock = clock

    async def taken_up(self, session: OpenSession, lane: Lane | None) -> None:
        """The journal says that ``session`` left its target in one: a debt of ``lane``."""
        left_s = hazard_left_s(session, self._clock)
        if lane is None:
            log.warning("target %s was left in a session and is not configured any more: not released", session.target)
            with contextlib.suppress(StorageError):
                await self._book.write(Change(close=session.target))
            return
        lane.debt = Debt(self._clock.monotonic() + left_s, session.job)
        for mate in lane.group.lanes:  # Opening a neighbour would move the same wires.
            mate.port.hold_off(left_s)

    async def settle(self, lane: Lane) -> BridgedError | None:
        """With the lock of the group: bring what a crash left there back to its application. The error of ``lane`` itself."""
        problem: BridgedError | None = None
        for mate in lane.group.lanes:
            debt = mate.debt
            if debt is None or (debt.tried and mate is not lane):
                continue
            debt.tried = True
            left_s = max(0.0, debt.until - self._clock.monotonic())
            try:
                # Both may take long and may be broken off by a stop, with nothing moved. The release itself may not: an errand.
                await mate.port.wait_idle_hardware(left_s + OLD_SESSION_S)
                await self._clock.sleep(max(0.0, debt.until - self._clock.monotonic()))
                if mate.port.state == "absent":
                    continue  # Its own lane waits for it.
                await self._release(mate, debt.job)
            except BridgedError as error:
                log.warning("target %s could not be released after a crash: %s", mate.name, error.message)
                if mate is lane and not isinstance(error, PortGone):  # Gone again: it is absent, and waited for.
                    problem = error
                continue
            mate.debt = None
            mate.wake.set()
            with contextlib.suppress(StorageError):
                await self._book.write(Change(close=mate.name))
        return problem

    async def _release(self, lane: Lane, job_id: str) -> None:
        """Back to the application, also of a part that was empty when its power came on. Raises what the target raises."""
        empty = await self._empty_chip(lane, job_id)
        await self._book.errand(lane.port.release_after(0.0, empty, erased=self._book.get(job_id).touched))

    async def start_anyway(self, lane: Lane, job_id: str) -> None:
        """A job ends after its session died in the middle: nobody else will start a part that a reset does not start."""
        with contextlib.suppress(BridgedError):
            if await self._empty_chip(lane, job_id) and lane.port.state == "idle":
                await self._release(lane, job_id)

    async def _empty_chip(self, lane: Lane, job_id: str) -> str:
        return await asyncio.to_thread(empty_chip, self._journal, job_id, self._known.get(lane.name), lane.settings)
