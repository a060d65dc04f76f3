"""A bench for the job service: a strict scripted target, a store in memory, a clock that is told the time.

The target plays the part of ``bridged.target.owner.Target``. It refuses what the real one must never see: two sessions at once
on wires that are shared, a move of the lines while it was told to hold off, a cancel with nothing running, proven sectors of
another content. What it did is in ``runs`` and ``released``.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bridged.config import Application, Config, Policy, Signing, Talk, Target, Xmodem
from bridged.config import Jobs as JobsConfig
from bridged.errors import BridgedError, Canceled, PortGone, Stopped, Unhealthy, UnknownImage
from bridged.events import (
    Event,
    Identified,
    Phase,
    PhaseStarted,
    Planned,
    SectorErased,
    SectorProven,
    StepDone,
)
from bridged.images.model import Image, Span
from bridged.jobs.journal import Journal
from bridged.jobs.model import Job, JobKind, JobState, Submission
from bridged.jobs.ports import Clock
from bridged.jobs.service import Jobs
from bridged.target.request import NO_PAST, Past

FIRMWARE = Image.of([(0x08000000, b"firmware" * 64)])
OTHER = Image.of([(0x08000000, b"another " * 64)])
FIRMWARE_FILE = hashlib.sha256(b"firmware.elf").hexdigest()
OTHER_FILE = hashlib.sha256(b"other.elf").hexdigest()
SECTORS = (SectorProven(0x08000000, 16384, "a" * 64), SectorProven(0x08004000, 16384, "b" * 64))
KEPT = b"bytes of the sector that are not the image's"
KEPT_OF_OTHER = b"bytes beside the other image"
HAZARD_S = 4.0
WITH_IMAGE = (JobKind.FLASH, JobKind.ENSURE, JobKind.VERIFY, JobKind.XMODEM)
TIMEOUT_S = 20.0  # Nothing here takes time: this only ends a hang.


def sectors_of(image: Image | None) -> tuple[SectorProven, ...]:
    """What proving ``image`` reports: the same sectors, with digests of its own."""
    return SECTORS if image in (None, FIRMWARE) else tuple(replace(s, digest=image.digest) for s in SECTORS if image)


@dataclass
class Time:
    """Stands still until somebody sleeps or ``pass_``."""

    utc_s: float = 1_700_000_000.0
    mono_s: float = 1000.0
    boot_s: float = 5000.0
    boot_id: str = "boot-1"
    slept: list[float] = field(default_factory=list)

    def pass_(self, seconds: float) -> None:
        self.utc_s += seconds
        self.mono_s += seconds
        self.boot_s += seconds

    async def sleep(self, seconds: float) -> None:
        if seconds > 0:
            self.slept.append(seconds)
            self.pass_(seconds)
        await asyncio.sleep(0)

    def clock(self) -> Clock:
        return Clock(
            utc=lambda: self.utc_s,
            monotonic=lambda: self.mono_s,
            boottime=lambda: self.boot_s,
            boot_id=self.boot_id,
            sleep=self.sleep,
        )


class Wires:
    """What targets have in common: only one session may hold it, and nothing moves before ``until``."""

    def __init__(self, time: Time) -> None:
        self.time = time
        self.holder = ""
        self.until = 0.0

    def move(self, who: str) -> None:
        assert self.holder in ("", who), f"{who} moves the lines while {self.holder} has them"
        assert self.time.mono_s >= self.until, f"{who} moves the lines within a hazard"


POINTS = ("lock", "identify", "before-erase", "erased", "proven-1", "proven-2", "boot")
STAGES = (Phase.LOCK, Phase.IDENTIFY, Phase.ERASE, Phase.WRITE, Phase.VERIFY, Phase.BOOT)


@dataclass
class Script:
    """One session. ``hold_at``: wait there for ``ScriptedTarget.go``; ``fail_at``: raise ``error`` there.
    ``stayed``: sectors that are right already."""

    hold_at: str = ""
    fail_at: str = ""
    error: BridgedError | None = None
    uid: str = "0011"
    evidence: str = "full"
    changed: bool = True
    content: str = ""
    baud: int = 0
    bad_bauds: tuple[int, ...] = ()
    stayed: tuple[SectorProven, ...] = ()


@dataclass(frozen=True)
class Run:
    job: str
    kind: str
    kept: bytes
    proven: tuple[SectorProven, ...]
    image: Image | None = None
    spans: tuple[Span, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    past: Past = NO_PAST


class ScriptedTarget:
    """See the module docstring. ``scripts``: one for each session, then sessions that succeed."""

    def __init__(self, name: str, wires: Wires, scripts: list[Script] | None = None) -> None:
        self.name = name
        self.state = "idle"
        self.reason = ""
        self.last_trace = ""
        self.unreleased = False
        self.wires = wires
        self.scripts = list(scripts or [])
        self.runs: list[Run] = []
        self.released = 0
        self.started_empty: list[str] = []
        self.erased: list[bool] = []  # at each release: whether the job had begun to erase
        self.release_error: BridgedError | None = None
        self.reached: dict[str, asyncio.Event] = {}
        self.go = asyncio.Event()
        self._changed = asyncio.Event()
        self._asked = ""
        self._asked_event = asyncio.Event()
        self.running = False
        self.locked_by = ""
        self.unlocked = asyncio.Event()
        self.health = ""  # what a session says of an image that it asked
        self.sick: tuple[Image, ...] = ()  # images that do not live

    def at(self, point: str) -> asyncio.Event:
        return self.reached.setdefault(point, asyncio.Event())

    def set_state(self, state: str, reason: str = "") -> None:
        self.state, self.reason = state, reason
        self._changed.set()
        self._changed = asyncio.Event()

    def keeps_from(self, principal: str) -> bool:
        return bool(self.locked_by) and principal != self.locked_by

    async def wait_free(self, principal: str) -> None:
        while self.keeps_from(principal):
            self.unlocked.clear()
            await self.unlocked.wait()

    def lock(self, principal: str) -> None:
        """Empty: unlock."""
        self.locked_by = principal
        self.unlocked.set()

    async def wait_present(self) -> None:
        while self.state == "absent":
            await self._changed.wait()

    async def wait_idle_hardware(self, timeout_s: float) -> bool:
        assert timeout_s > 0
        await asyncio.sleep(0)
        return self.state == "idle"

    def hold_off(self, hazard_s: float) -> None:
        self.wires.until = max(self.wires.until, self.wires.time.mono_s + hazard_s)

    async def release_after(self, hazard_s: float, empty: str = "", *, erased: bool = False) -> None:
        self.started_empty += [empty] if empty else []
        await self.wires.time.sleep(hazard_s)
        self.wires.move(self.name)
        if self.release_error is not None:
            self.set_state("absent" if isinstance(self.release_error, PortGone) else "broken", self.release_error.message)
            raise self.release_error
        self.released += 1
        self.erased.append(erased)
        self.unreleased = False

    def cancel(self) -> None:
        self._ask("cancel")

    def stop(self) -> None:
        self._ask("stop")

    def _ask(self, what: str) -> None:
        assert self.running, f"{what} with nothing running"
        self._asked = what
        self._asked_event.set()

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
    ) -> dict[str, Any]:
        assert all(value is None or isinstance(value, str | int | float | bool) for value in params.values())
        assert self.state == "idle", f"run while {self.state}"
        assert not self.running, "two sessions on one target"
        assert (image is not None) == (kind in ("flash", "ensure", "verify"))
        sectors = sectors_of(image)
        assert set(proven) <= set(sectors), "sectors that this target never proved, or not with this content"
        assert kept in (b"", KEPT_OF_OTHER if image == OTHER else KEPT), "kept beside another content"
        self.wires.move(self.name)
        self.wires.holder, self.running, self.state = self.name, True, "busy"
        self._asked = ""
        self._asked_event = asyncio.Event()
        self.runs.append(Run(job_id, kind, kept, proven, image, spans, params, past))
        script = self.scripts.pop(0) if self.scripts else Script()
        try:
            return await self._session(script, kind, image, kept, proven, on_event, on_progress, on_barrier)
        finally:
            self.wires.holder, self.running = "", False
            if self.state == "busy":
                self.state = "idle"

    async def _session(
        self,
        script: Script,
        kind: str,
        image: Image | None,
        kept: bytes,
        proven: tuple[SectorProven, ...],
        on_event: Callable[[Event], None],
        on_progress: Callable[[int], None],
        on_barrier: Callable[[str, float, bytes], Awaitable[None]],
    ) -> dict[str, Any]:
        async def point(name: str, *, checkpoint: bool = True) -> None:
            self.at(name).set()
            if script.hold_at == name:
                waits = [asyncio.ensure_future(e.wait()) for e in (self.go, self._asked_event)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for waiting in waits:
                    waiting.cancel()
            await asyncio.sleep(0)
            if checkpoint and self._asked:
                raise Canceled("canceled") if self._asked == "cancel" else Stopped("stopped")
            if script.fail_at == name and script.error is not None:
                raise script.error

        self.last_trace = "> 7f\n< 79\n"
        on_event(PhaseStarted(Phase.LOCK))
        await point("lock")
        on_event(PhaseStarted(Phase.IDENTIFY))
        on_event(Identified(0x449, "F7", "F745, F746, F750, F756", "3.1", 0x91, 1 << 20, script.uid, "single"))
        await point("identify")
        if kind in ("flash", "ensure", "erase") and script.changed:
            on_event(Planned(2, 32768, 512, len(KEPT), 1.5, 90.0))
            for sector in script.stayed:
                on_event(sector)
            on_event(PhaseStarted(Phase.ERASE, 32768))
            await point("before-erase")
            await on_barrier("erasing", HAZARD_S, kept or (KEPT_OF_OTHER if image == OTHER else KEPT))
            await point("erasing", checkpoint=False)
            for sector in sectors_of(image):
                if sector not in proven:
                    on_event(SectorErased(sector.address, sector.size_bytes, 0.5))
            on_event(StepDone("erase", 0.5))
            await on_barrier("erased", 0.0, b"")
            await point("erased")
            on_event(PhaseStarted(Phase.WRITE, 512))
            for done in (256, 512):
                on_progress(done)
                await asyncio.sleep(0)
            on_event(PhaseStarted(Phase.VERIFY, 512))
            for number, sector in enumerate(sectors_of(image), start=1):
                if sector not in proven:
                    on_event(sector)
                await point(f"proven-{number}")
        on_event(PhaseStarted(Phase.BOOT))
        await point("boot")
        if image in self.sick and kind in ("flash", "ensure"):
            on_event(PhaseStarted(Phase.HEALTH))
            raise Unhealthy("'ok' did not come; it said nothing", within_s=3.0)
        result: dict[str, Any] = {
            "kind": kind,
            "changed": script.changed,
            "evidence": script.evidence if kind in ("flash", "ensure", "verify", "erase") else "",
            "content": script.content or (image.digest if image else ""),
            "uid": script.uid,
            "baud": script.baud,
            "bad_bauds": list(script.bad_bauds),
            "bytes_written": 512,
            "health": self.health if kind in ("flash", "ensure") and script.changed else "",
        }
        if kind == "read":
            result["data"] = b"\x12\x34" * 8
        return result


@dataclass(frozen=True)
class Staged:
    sha256: str
    name: str
    path: Path


class MemoryStore:
    """Two staged images; knows them by digest and by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = {FIRMWARE_FILE: FIRMWARE, OTHER_FILE: OTHER}
        self.names = {"firmware.elf": FIRMWARE_FILE, "other.elf": OTHER_FILE}
        self.load_error: BridgedError | None = None
        self.used: list[str] = []
        self.unparsed: set[str] = set()

    def get(self, ref: str) -> Staged:
        sha256 = self.names.get(ref, ref)
        if sha256 not in self.images:
            raise UnknownImage(f"no image {ref}")
        name = next(name for name, sha in self.names.items() if sha == sha256)
        path = self.root / name
        if not path.exists():  # Its own name: what the digests are of.
            path.write_text(name)
        return Staged(sha256, name, path)

    def at_hand(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> bool:  # noqa: ARG002
        return staged.sha256 not in self.unparsed

    def use(self, ref: str) -> Staged:
        self.used.append(ref)
        return self.get(ref)

    def load(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> Image:
        assert base_address in (None, 0x08000000, 0x08004000)
        assert type_hint in ("auto", "elf")
        if self.load_error is not None:
            raise self.load_error
        image = self.images[staged.sha256]
        moved_bytes = (base_address or image.start) - image.start  # as if it were a raw binary
        return Image.of((seg.address + moved_bytes, seg.data) for seg in image.segments)


class Bench:
    """Jobs on scripted targets over a journal in ``root``. Make it inside the running loop."""

    def __init__(
        self,
        root: Path,
        *names: str,
        shares: dict[str, list[str]] | None = None,
        time: Time | None = None,
        free_bytes: int = 1 << 30,
        journal: Journal | None = None,
        health: str = "",
        rules: Policy | None = None,
        xmodem: Xmodem | None = None,
        keys: list[str] | None = None,
        **limits: int,
    ) -> None:
        self.root = root
        self.time = time or Time()
        names = names or ("m1",)
        shares = shares or {}
        together = Wires(self.time)
        joined = {name for one, others in shares.items() for name in (one, *others)}
        self.targets = {n: ScriptedTarget(n, together if n in joined else Wires(self.time)) for n in names}
        self.config = Config(
            jobs=JobsConfig(**limits),
            signing=Signing(keys or []),
            targets={
                name: Target(
                    port=f"/dev/{name}",
                    shares=shares.get(name, []),
                    application=Application(health=Talk(expect=health)),
                    policy=rules or Policy(),
                    xmodem=xmodem or Xmodem(),
                )
                for name in names
            },
        )
        for target in self.targets.values():
            target.health = "passed" if health else ""
        self.store = MemoryStore(root)
        self.journal = journal or Journal.open(root / "state.db")
        self.free_bytes = free_bytes
        self.jobs = Jobs(
            self.config,
            self.journal,
            self.store,
            self.targets,
            clock=self.time.clock(),
            free_bytes=lambda _path: self.free_bytes,
            retry_s=0.001,
            park_s=5,
        )

    def __getitem__(self, name: str) -> ScriptedTarget:
        return self.targets[name]

    async def __aenter__(self) -> Bench:
        await self.jobs.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.jobs.stop()

    async def submit(self, target: str = "m1", kind: JobKind = JobKind.FLASH, id: str = "", **params: Any) -> Job:
        image = str(params.pop("image", "firmware.elf")) if kind in WITH_IMAGE else ""
        return await self.jobs.submit(Submission(kind, target, image, params, id, "tester"))

    async def flash(self, target: str = "m1", **params: Any) -> Job:
        """Submit a flash and wait for its end."""
        return await self.end(await self.submit(target, **params))

    async def end(self, job: Job) -> Job:
        return await self.jobs.wait(job.id, TIMEOUT_S)


def run(work: Callable[[], Awaitable[None]]) -> None:
    """One test in one loop, ended when it hangs."""

    async def bounded() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await work()

    asyncio.run(bounded())


async def became(bench: Bench, job: Job, state: JobState) -> Job:
    while bench.jobs.get(job.id).state is not state:
        await asyncio.sleep(0)
    return bench.jobs.get(job.id)
