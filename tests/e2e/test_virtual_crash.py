"""The whole gateway is killed, again and again, at any step of any session and at any commit of its journal; the next goes on.

Jobs, queue, journal on a disk, store and owner are the real ones, and so is the session, in virtual time (``virtual_gateway``):
a life of a gateway costs 0.2 s, so that dozens of them fit into a test run (``BRIDGED_CRASHES``). What must hold: no job is
lost or ends twice (P5), nobody moves a line while a part erases (P9), every job ends as ``succeeded`` and the part agrees (P3),
what lies beside the image is kept (P6), the application runs (P4). With the real processes and signals: test_kill_points.py.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bridged import config
from bridged.images.model import Image
from bridged.jobs.model import TERMINAL, JobKind, JobState, Submission
from bridged.sim.device import Device, Mode
from bridged.sim.virtual import VirtualUart
from tests.e2e.virtual_gateway import NOWHERE, VirtualGateway
from tests.product import SHM
from tests.target.bench import make_image
from tests.target.kinds import BASE, PARTS, SIZE

CRASHES = int(os.environ.get("BRIDGED_CRASHES", "30"))
NAMES = {"f103": "0x410", "l476": "L476", "f756": "F756", "h743": "H743"}
STEPS = 800  # Of a job, about.


@dataclass
class World:
    """The parts, the disk, and what a client was told."""

    root: Path
    rng: random.Random
    devices: dict[str, Device] = field(default_factory=dict)
    beside: dict[str, Image] = field(default_factory=dict)
    asked: dict[str, tuple[str, Image, JobKind]] = field(default_factory=dict)  # by our own id
    told: dict[str, str] = field(default_factory=dict)  # our id: theirs
    ended: dict[str, JobState] = field(default_factory=dict)
    last: dict[str, Image] = field(default_factory=dict)
    jobs: int = 0
    deaths: Counter[str] = field(default_factory=Counter)
    images: dict[tuple[str, int], tuple[str, Image]] = field(default_factory=dict)

    def gateway(self) -> VirtualGateway:
        application = config.Application(listen_s=0.2)
        parts = {name: (part, {**PARTS[part], "rate_error": 0.0}) for name, part in NAMES.items()}
        limits = config.Jobs(resume_limit=1000)
        return VirtualGateway(self.root, parts, config.Target(port=NOWHERE, application=application), limits, self.devices)

    def furnish(self, gateway: VirtualGateway) -> None:
        """Something beside where the images go, in the same sector where there is room, and power that came on after that."""
        for name, device in gateway.devices.items():
            sector = device.memory.map.sectors[0]
            at = sector.end - 64 if sector.size_bytes >= 4096 else device.memory.map.sectors[3].address
            self.beside[name] = Image.of([(at, random.Random(name).randbytes(64))])
            for image in (make_image(device.chip, SIZE, seed=3), self.beside[name]):
                for seg in image.segments:
                    device.memory.program(seg.address, seg.data + b"\xff" * (-len(seg.data) % 32))
            uart = VirtualUart(device)
            uart.set_lines(power=False)
            uart.pause(1.0)
            uart.set_lines(power=True)
            for turn in range(2):
                image = make_image(device.chip, SIZE, seed=turn)
                self.images[name, turn] = gateway.stage(f"{name}-{turn}.bin", image.segments[0].data), image

    async def ask(self, gateway: VirtualGateway) -> None:
        """As clients do: submit with an id of one's own, again after a death, and wait."""
        for own, (name, image, kind) in self.asked.items():
            if own in self.ended:
                continue
            sha256 = next(sha for sha, made in self.images.values() if made is image)
            job = await gateway.jobs.submit(Submission(kind, name, f"{sha256}@{BASE:#010x}", {}, own, "test"))
            assert self.told.setdefault(own, job.id) == job.id, "one id made two jobs"
        for own, job_id in self.told.items():
            done = await gateway.jobs.wait(job_id, 60)
            if gateway.life.over:
                return
            if done.terminal:
                self.ended.setdefault(own, done.state)
            assert done.terminal, done


async def one_life(world: World, gateway: VirtualGateway, crash: str) -> bool:
    """Until everything has ended, or the gateway has. Whether it lived."""
    rng = world.rng
    busy = sorted({name for own, (name, _, _) in world.asked.items() if own not in world.ended})
    if crash in ("step", "erasing") and busy:
        target = gateway.targets[rng.choice(busy)]
        target.crash_erasing = crash == "erasing"
        target.crash_after = rng.randrange(3 if target.crash_erasing else STEPS)
    elif crash == "commit":
        left = rng.randrange(30)

        def commit() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                gateway.life.end()

        gateway.journal.on_commit = commit
    await gateway.jobs.start()
    for target in gateway.targets.values():
        await target.open()
    asking = asyncio.ensure_future(world.ask(gateway))
    dying = asyncio.ensure_future(gateway.life.ended.wait())
    await asyncio.wait({asking, dying}, return_when=asyncio.FIRST_COMPLETED)
    if not gateway.life.over:
        dying.cancel()
        await asking
        return True
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await gateway.crash()
    assert gateway.life.violations == []
    world.deaths[crash] += 1
    return False


def check(world: World, gateway: VirtualGateway) -> None:
    assert gateway.journal.sessions() == []
    assert gateway.life.violations == []
    for own, (name, _, _) in world.asked.items():
        updates = gateway.jobs.log(world.told[own])
        assert [u.state for u in updates if u.state in TERMINAL] == [JobState.SUCCEEDED], (own, name, world.ended[own])
    world.last.update((name, image) for name, image, _ in world.asked.values())
    for forgotten in (world.asked, world.told, world.ended):
        forgotten.clear()
    for name, device in world.devices.items():
        for image in (*([world.last[name]] if name in world.last else []), world.beside[name]):
            assert all(device.memory.read(s.address, len(s.data)) == s.data for s in image.segments), name
        device.advance(device.now_ns + 1_000_000_000)
        assert device.mode is Mode.APPLICATION, (name, device.mode, device.why)
        assert device.stats.hazard_resets == [], name
        assert (device.lines["nrst"], device.lines["boot0"]) == (True, False)


async def play(root: Path, seed: int, crashes: int) -> World:
    world = World(root, random.Random(seed))
    first = world.gateway()
    world.furnish(first)
    await first.__aenter__()
    await first.__aexit__()
    while world.deaths.total() < crashes:
        for name in NAMES:
            for _ in range(world.rng.randrange(3)):
                kind = world.rng.choice([JobKind.FLASH, JobKind.FLASH, JobKind.ENSURE])
                world.asked[f"job-{world.jobs}"] = name, world.images[name, world.rng.randrange(2)][1], kind
                world.jobs += 1
        while True:
            crash = world.rng.choice(["step", "commit", "erasing"])
            gateway = world.gateway()
            if await one_life(world, gateway, crash):
                break
        try:
            check(world, gateway)
        finally:
            await gateway.__aexit__()
    return world


@pytest.mark.timeout(120 + CRASHES)
@pytest.mark.parametrize("seed", range(1))
def test_a_gateway_that_dies_at_any_moment_loses_nothing(seed: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bridged-crash-", dir=SHM if SHM.is_dir() else None) as root:
        world = asyncio.run(play(Path(root), seed, CRASHES))
    print(f"{world.deaths} deaths, {world.jobs} jobs")
    assert all(world.deaths[crash] > CRASHES // 10 for crash in ("step", "commit", "erasing"))
