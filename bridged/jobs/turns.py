"""Whose turn it is: the task of each lane, which takes its jobs in the order of their submission, and what they wait for.

A lane first brings back what a crash left in a session (P4, P9), then runs jobs. A job waits for an absent target, for
neighbours on the same wires, for the lock of a person and for a maintenance window; for the last two not if it is half done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable

from bridged.errors import BridgedError, Canceled, StorageError, TargetBroken
from bridged.jobs import policy
from bridged.jobs.book import Book
from bridged.jobs.lane import Lane, Live
from bridged.jobs.model import ABSENT, LOCKED, PARKED, WINDOW, JobState
from bridged.jobs.ports import Clock
from bridged.jobs.recovery import Recovery
from bridged.jobs.run import Runner

log = logging.getLogger(__name__)

WINDOW_S = 20.0  # How often is looked whether the maintenance window of a target has opened.


class Turns:
    """``draining``: only what runs or is half done goes on."""

    def __init__(self, book: Book, recovery: Recovery, runner: Runner, clock: Clock) -> None:
        self._book = book
        self._recovery = recovery
        self._runner = runner
        self._clock = clock
        self.draining = False

    async def serve(self, lane: Lane) -> None:
        said = ""
        while not self._book.stopping.is_set():
            try:
                await self._turn(lane)
                said = ""
            except StorageError as error:
                if error.code != said:  # Once, and not every second: the log may be on the same disk.
                    log.warning("target %s waits for the disk: %s", lane.name, error.message)
                    said = error.code
                await self._book.pause()
            except Exception:  # A defect ends its job, not the lane.
                log.exception("defect in the lane of target %s", lane.name)
                await self._book.pause()

    async def _turn(self, lane: Lane) -> None:
        """One job, or one thing to wait for."""
        lane.wake.clear()  # What happens from here on is seen below, or wakes.
        live = lane.head()
        lane.mark_free()
        if live is not None and live.cancel:  # Canceled while it ran, and its session died of something else.
            unheard = Canceled("canceled, and interrupted before that could be heard")
            await self._runner.end(lane, live, JobState.CANCELED, unheard)
            return
        untried = lane.debt is not None and not lane.debt.tried
        absent = lane.port.state == "absent"
        if not untried and not absent and self._shut(lane, live):
            await self._wait_window(lane, live)
            return
        if not untried and (self._held(live) or (live is None and not (lane.debt and absent))):
            await lane.wake.wait()
            return
        if absent and not untried:
            if live is not None:
                await self._hold(live, ABSENT)
            await self._wait_present(lane)
            return
        if live is not None and self._locked(lane, live) and (live := self._let_by(lane, live)) and self._locked(lane, live):
            await self._hold(live, LOCKED)
            await self._wait_for(lane, lane.port.wait_free(live.job.principal))
            return
        if live is not None and lane.group.lock.locked():
            await self._hold(live, LOCKED)
        async with lane.group.lock:
            problem = await self._recovery.settle(lane)
            live = lane.head()
            if live is None or self._book.stopping.is_set() or self._held(live):
                return
            if self._shut(lane, live) or self._locked(lane, live):
                return
            if lane.port.state == "absent" or (lane.debt is not None and problem is None):
                return  # Gone, or gone for a moment while it was released: once more.
            elif problem is not None:
                await self._runner.end(lane, live, JobState.FAILED, problem)
            elif lane.port.state == "broken":
                text = f"target {lane.name} is marked broken: {lane.port.reason}"
                await self._runner.end(lane, live, JobState.FAILED, TargetBroken(text, target=lane.name))
            else:
                lane.running = live
                lane.free.clear()
                try:
                    await self._run(lane, live)
                finally:
                    lane.running = None

    async def _run(self, lane: Lane, live: Live) -> None:
        try:
            await self._runner.run(lane, live)
        except Exception as error:
            if live.job.state is not JobState.RUNNING:
                raise  # It did not begin: its turn comes again.
            log.exception("defect while job %s ran", live.job.id)
            await self._runner.end(lane, live, JobState.FAILED, BridgedError(f"{type(error).__name__}: {error}"))

    def _held(self, live: Live | None) -> bool:
        """While draining only what is half done goes on."""
        return self.draining and (live is None or not live.half_done)

    def _shut(self, lane: Lane, live: Live | None) -> bool:
        """Whether a job must wait for the maintenance window."""
        if live is None or live.half_done or live.cancel:
            return False
        return not policy.is_open(lane.settings.policy, self._clock.utc())

    async def _wait_window(self, lane: Lane, live: Live | None) -> None:
        if live is not None:
            await self._hold(live, WINDOW)
        await self._wait_for(lane, self._clock.sleep(WINDOW_S))

    def _locked(self, lane: Lane, live: Live | None) -> bool:
        return live is not None and not live.half_done and lane.debt is None and lane.port.keeps_from(live.job.principal)

    def _let_by(self, lane: Lane, live: Live) -> Live:
        """The head of the queue is locked out: the first job of somebody who is not comes before it."""
        for other in lane.queue:
            if not other.job.terminal and not self._locked(lane, other):
                lane.queue.remove(other)
                lane.queue.appendleft(other)
                return other
        return live

    async def _hold(self, live: Live, reason: str) -> None:
        """Say why a job waits. One that was interrupted stays so, and parked ones stay parked: they are no failed attempt."""
        async with live.lock:
            interrupted = live.job.state is JobState.INTERRUPTED and not live.half_done and live.job.reason != PARKED
            if live.job.state is JobState.QUEUED:
                await self._book.step(live, JobState.WAITING, reason=reason)
            elif (live.job.state is JobState.WAITING or interrupted) and live.job.reason != reason:
                await self._book.step(live, None, reason=reason)

    async def _wait_present(self, lane: Lane) -> None:
        lane.free.set()
        await self._wait_for(lane, lane.port.wait_present())
        if lane.port.state != "absent" and lane.debt is not None:
            lane.debt.tried = False

    async def _wait_for(self, lane: Lane, what: Awaitable[None]) -> None:
        """Until ``what`` has happened, or something else in this lane."""
        waits = [asyncio.ensure_future(what), asyncio.ensure_future(lane.wake.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for waiting in waits:
                waiting.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
