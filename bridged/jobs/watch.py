"""One reader of job updates: bounded, and without loss of what matters.

A ``Watch`` is offered every update by the service and hands them to its reader in order. Mere progress is kept only as the
newest one for each job. State and phase changes are queued; when a slow reader lets the queue fill up, the watch remembers
for each job the first ``seq`` that found no place, and reads from there in the log once the reader has come so far. A watch
therefore holds a bounded number of updates, and still no change of state is lost.

It knows nothing of sockets or formats, and nothing waits for it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from bridged.errors import BridgedError
from bridged.jobs.model import TERMINAL, Update

QUEUE_LIMIT = 256  # Updates of some 300 bytes for each of up to 1000 readers: 75 MiB if all of them stand still.


class Watch:
    """An asynchronous iterator. It ends after the terminal update when it follows one job, and when the service stops.

    Whoever drops it is forgotten; ``aclose`` may be called, it need not be.
    """

    def __init__(
        self,
        replay: Callable[[str, int], Iterable[Update]],
        first: Iterable[Update] = (),
        *,
        job: str | None = None,
        target: str | None = None,
    ) -> None:
        self._replay = replay
        self._job = job
        self._target = target
        self._queue: deque[Update] = deque(first)
        self._gaps: dict[str, int] = {}
        self._progress: dict[str, Update] = {}
        self._wake = asyncio.Event()
        self._ended = False
        self._closed = False

    def offer(self, update: Update, *, lasting: bool) -> None:
        """Take an update without waiting. ``lasting``: it is in the log and must not be lost; else it is mere progress."""
        if self._closed or (self._job or update.job) != update.job or (self._target or update.target) != update.target:
            return
        if not lasting:
            if update.job not in self._gaps:
                self._progress[update.job] = update
        elif update.job not in self._gaps:
            self._progress.pop(update.job, None)
            if len(self._queue) < QUEUE_LIMIT:
                self._queue.append(update)
            else:
                self._gaps[update.job] = update.seq
        self._wake.set()

    def close(self) -> None:
        """No more will come; what was taken is still delivered."""
        self._closed = True
        self._wake.set()

    async def aclose(self) -> None:
        self._queue.clear()
        self._gaps.clear()
        self._progress.clear()
        self.close()

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> Update:
        while not self._ended:
            update = self._next()
            if update is not None:
                self._ended = self._job is not None and update.state in TERMINAL
                return update
            if self._closed:
                break
            self._wake.clear()
            await self._wake.wait()
        raise StopAsyncIteration

    def _next(self) -> Update | None:
        if not self._queue and self._gaps:
            job, seq = next(iter(self._gaps.items()))
            del self._gaps[job]
            try:
                self._queue.extend(self._replay(job, seq))
            except BridgedError:
                return self._next()  # So slow that the job was forgotten, or the journal closed.
        if self._queue:
            return self._queue.popleft()
        for job in self._progress:
            return self._progress.pop(job)
        return None
