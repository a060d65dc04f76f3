"""What jobs need of others: the image store, a target, and the time.

``app`` puts the real ones in, tests their own. What a target does about its wires is its own affair.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from bridged.events import Event, SectorProven
from bridged.images.content import Source
from bridged.images.model import Image, Span
from bridged.target.request import NO_PAST, Past


class Images(Source, Protocol):
    """The image store. ``use``: as ``get``, and the image stays until its job is known to need it. ``at_hand``: ``load`` would
    need no parser. All of it may block."""

    def use(self, ref: str) -> Any: ...
    def at_hand(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> bool: ...


class TargetPort(Protocol):
    """What a lane needs of a target. All of it is called in the event loop's thread, and calls back there.

    ``state``: idle, busy, absent or broken. ``hold_off`` keeps everybody from port and lines, and comes before the target is
    opened. ``run`` has released the target when it returns or raises, or the target is ``broken``, or ``unreleased``: its
    port vanished with its lines, and ``release_after`` is to be called when it is back. ``keeps_from``: a person has locked
    it, so that new jobs of another principal wait, until ``wait_free`` returns. ``last_trace``: what the last session recorded.
    """

    last_trace: str

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def unreleased(self) -> bool: ...

    async def run(
        self,
        kind: str,
        params: dict[str, Any],
        image: Image | None,
        *,
        job_id: str,
        kept: bytes = b"",
        proven: tuple[SectorProven, ...] = (),
        spans: tuple[Span, ...] = (),
        past: Past = NO_PAST,
        on_event: Callable[[Event], None],
        on_progress: Callable[[int], None],
        on_barrier: Callable[[str, float, bytes], Awaitable[None]],
    ) -> dict[str, Any]: ...

    def cancel(self) -> None: ...
    def stop(self) -> None: ...
    def hold_off(self, hazard_s: float) -> None: ...
    async def release_after(self, hazard_s: float, empty: str = "", *, erased: bool = False) -> None: ...
    async def wait_idle_hardware(self, timeout_s: float) -> bool: ...
    async def wait_present(self) -> None: ...
    def keeps_from(self, principal: str) -> bool: ...
    async def wait_free(self, principal: str) -> None: ...


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@dataclass(frozen=True, slots=True)
class Clock:
    """All that jobs know of time, so that tests can say what it is."""

    utc: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    boottime: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
    boot_id: str = field(default_factory=_boot_id)
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
