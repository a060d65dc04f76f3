"""``Contents``: what jobs and plans want in flash, built without taking the worker threads that all else needs.

An image can keep its parser busy for a minute or two, and there are as many such images as somebody cares to send. What was
parsed before is there at once. For the rest there are ``PARSERS`` threads and a queue: who waits in it can leave it, and who
wants the very same content gets what comes of the first one's parsing, be it a refusal.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bridged.errors import Stopped
from bridged.images import content
from bridged.images.content import Content, Wanted
from bridged.images.model import Image
from bridged.jobs.ports import Images

PARSERS = 2  # At once; a plan has one of them at most. More would take memory and cores, and be no faster on a gateway.


@dataclass(slots=True)
class _Build:
    """A content on its way, and the store as it sees it: when nobody wants it any more, no further image is begun."""

    store: Images
    waiting: int = 0
    made: asyncio.Future[Content] | None = None

    def get(self, ref: str) -> Any:
        return self.store.get(ref)

    def load(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> Image:
        if not self.waiting:
            raise Stopped("nobody waits for this content any more")
        return self.store.load(staged, base_address, type_hint)


class Contents:
    def __init__(self, store: Images) -> None:
        self._store = store
        self._threads = ThreadPoolExecutor(PARSERS, "parsing")
        self._builds: dict[Wanted, _Build] = {}
        self._closed = False

    async def build(self, wanted: Wanted) -> Content:
        """See ``content.build``. Cancelling it ends the waiting; an image that is being parsed already is parsed to its end.

        Raises ``Stopped`` when closed.
        """
        if await asyncio.to_thread(self._at_hand, wanted):
            return await asyncio.to_thread(content.build, wanted, self._store)
        self._check_open()
        build = self._builds.setdefault(wanted, _Build(self._store))
        build.waiting += 1
        try:
            if build.made is None:
                build.made = asyncio.get_running_loop().run_in_executor(self._threads, content.build, wanted, build)
            return await asyncio.shield(build.made)
        except asyncio.CancelledError:
            self._check_open()
            raise
        finally:
            build.waiting -= 1
            if not build.waiting:
                del self._builds[wanted]
                if build.made is not None:
                    build.made.cancel()

    def close(self) -> None:
        """Nothing is begun any more. Who waits is told; a parser that runs ends within its own limits."""
        self._closed = True
        for build in self._builds.values():
            if build.made is not None:
                build.made.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _check_open(self) -> None:
        if self._closed:
            raise Stopped("the daemon is stopping")

    def _at_hand(self, wanted: Wanted) -> bool:
        found = ((self._store.get(part.ref), part.address) for part in wanted.parts)
        return all(self._store.at_hand(staged, address, wanted.type_hint) for staged, address in found)
