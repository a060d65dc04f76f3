"""Uploads on their way into the store, whichever listener takes them: who sends what, and who gives way to whom.

A client on a bad link comes back before TCP has noticed that its first connection died. ``Transfers`` knows each upload by
its sender and file, so that the older connection, once it has been silent for long enough, is ended for the newer one, over
the same listener or another. It knows no wire.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Protocol, TypeVar

from bridged.api.ports import StoreApi, Upload
from bridged.errors import TooMany

T = TypeVar("T")


class Transfer:
    """The bytes of one upload on their way. ``waiting_since``: loop time since when nothing came, None while we are at work.

    The same client may come back before TCP has noticed that its first connection died: ``give_way`` ends the older upload
    once it has been silent for long enough.
    """

    def __init__(self) -> None:
        self.waiting_since: float | None = None
        self.ended = asyncio.Event()
        self.taken = False
        self._timeout: asyncio.Timeout | None = None

    @contextlib.asynccontextmanager
    async def waiting(self, seconds: float) -> AsyncIterator[None]:
        """The time in which bytes must come. Raises ``TimeoutError`` also when another connection takes over."""
        try:
            async with asyncio.timeout(0 if self.taken else seconds) as self._timeout:
                self.waiting_since = asyncio.get_running_loop().time()
                yield
        finally:
            self.waiting_since = self._timeout = None

    @property
    def silent_s(self) -> float:
        return 0.0 if self.waiting_since is None else asyncio.get_running_loop().time() - self.waiting_since

    async def give_way(self) -> None:
        """End, and return when what came is synced and the store is free for the next one."""
        self.taken = True
        if self._timeout is not None:
            self._timeout.reschedule(asyncio.get_running_loop().time())
        await self.ended.wait()


class Transfers:
    """All of them. ``takeover_s``: an upload silent for so long gives way."""

    def __init__(self, takeover_s: float) -> None:
        self._takeover_s = takeover_s
        self._running: dict[tuple[str, str], Transfer] = {}

    def stalled(self, principal: str, sha256: str) -> Transfer | None:
        """An unfinished upload of this file by the same principal from which nothing has come for long enough."""
        transfer = self._running.get((principal, sha256))
        return transfer if transfer is not None and transfer.silent_s >= self._takeover_s else None

    def retry_after_s(self, principal: str, sha256: str) -> float:
        """When the running upload of this file could be taken over, should nothing more come of it."""
        transfer = self._running.get((principal, sha256))
        return max(1.0, self._takeover_s - (transfer.silent_s if transfer is not None else 0.0))

    async def have(self, store: StoreApi, principal: str, sha256: str) -> tuple[int, int | None, bool]:
        """``store.have``; an upload of this principal that has fallen silent is ended first, so that its offset is final."""
        offset, size, complete = await in_thread(store.have, sha256, principal)
        if not complete and (stalled := self.stalled(principal, sha256)):
            await stalled.give_way()
            offset, size, complete = await in_thread(store.have, sha256, principal)
        return offset, size, complete

    async def open(
        self, store: StoreApi, principal: str, size: int, sha256: str, offset: int, name: str, type_hint: str
    ) -> Upload:
        """An upload of the same file by the same client that has fallen silent is ended, and its bytes are gone on from."""
        arguments = (principal, size, sha256, offset, name, type_hint)
        return await self._taking_over(principal, sha256, lambda: store.open_upload(*arguments), undo=abandon)

    async def announce(self, store: StoreApi, principal: str, size: int, sha256: str, name: str, type_hint: str) -> bool:
        """``store.announce``, which begins afresh; as with ``open`` a silent one gives way."""
        arguments = (principal, size, sha256, name, type_hint)
        return await self._taking_over(principal, sha256, lambda: store.announce(*arguments))

    async def discard(self, store: StoreApi, principal: str, sha256: str) -> bool:
        """``store.discard``; bytes that are on their way are not waited for."""
        if (transfer := self._running.get((principal, sha256))) is not None:
            await transfer.give_way()
        return await in_thread(store.discard, principal, sha256)

    async def _taking_over(
        self, principal: str, sha256: str, call: Callable[[], T], *, undo: Callable[[T], object] | None = None
    ) -> T:
        try:
            return await in_thread(call, undo=undo)
        except TooMany as error:
            if stalled := self.stalled(principal, sha256):
                await stalled.give_way()
                return await in_thread(call, undo=undo)
            if "offset" in error.facts:
                seconds = self.retry_after_s(principal, sha256)
                text = f"{error.message}; when nothing more comes from it, it gives way in {seconds:.0f} s"
                raise TooMany(text, retry_after_s=round(seconds, 1), **error.facts) from error
            raise

    @contextlib.contextmanager
    def running(self, principal: str, sha256: str) -> Iterator[Transfer]:
        """Known under its file from here on, so that the same client can take over."""
        key, transfer = (principal, sha256), Transfer()
        self._running[key] = transfer
        try:
            yield transfer
        finally:
            transfer.ended.set()
            if self._running.get(key) is transfer:
                del self._running[key]


class Abandoned(Protocol):
    def abandon(self) -> None: ...


def abandon(upload: Abandoned) -> None:
    """An upload that is left open keeps the next one out: what to ``undo`` where it is opened."""
    upload.abandon()


async def in_thread(call: Callable[..., T], *args: Any, undo: Callable[[T], object] | None = None) -> T:
    """As ``asyncio.to_thread``, but a cancelled caller waits for the thread: nothing may use the object after us.

    ``undo``: called in a thread with the result that a cancelled caller does not get, where that must not be lost.
    """
    task = asyncio.ensure_future(asyncio.to_thread(call, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        # A task of its own, which goes to its end when we are cancelled once more.
        await asyncio.wait({asyncio.ensure_future(_left(task, undo))})
        raise


async def _left(task: asyncio.Future[T], undo: Callable[[T], object] | None) -> None:
    await asyncio.wait({task})
    if task.cancelled() or task.exception() is not None:  # Somebody has to look at it, or asyncio complains.
        return
    if undo is not None:
        await asyncio.to_thread(undo, task.result())
