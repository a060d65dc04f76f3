"""The whole product in the simulator: so many flashes with one random transient fault each, and faults that stay.

``python -m tests.product --flashes 10000`` (``make soak``; a few hundred in each test run). Jobs, queue, journal, store and
owner are the real ones (tests/e2e/virtual_gateway.py); each target flashes two images in turn. With a transient fault (a byte
lost, flipped or added, an ACK lost, late or refused, a target that resets, hangs or loses its supply, a word programmed or read
wrong, an erase without an end, a session process that is killed) every job must end as ``succeeded``, and the device must
agree: the image in its flash, its application running, lines idle. An image that does not pass its health probe must make way
for the one before it, with a transient fault on the way as well. With a fault that stays every job must end within the stated
times with an error that names it, and the next job, without the fault, must succeed.

Seeded: the same seed draws the same faults. Exit code 1 where anything was otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from bridged import config
from bridged.errors import BridgedError
from bridged.images.model import Image
from bridged.jobs.model import Job, JobKind, JobState
from bridged.sim.device import Mode
from bridged.sim.virtual import VirtualUart
from tests.e2e.virtual_gateway import NOWHERE, VirtualGateway, VirtualTarget
from tests.target.bench import make_image
from tests.target.kinds import BASE, PARTS, SIZE, beyond
from tests.target.test_faults import STAYING, STAYING_WRITING

KILLED = 0.03  # Of all faults: a session process that is killed.
NAMES = {**{part.lower().replace("0x410", "f103"): part for part in PARTS}, "l476-power": "L476"}
ENDED = (JobState.FAILED, JobState.REJECTED)
SHM = Path("/dev/shm")


@dataclass
class Figures:
    """What came of it. ``happened``: faults that did; one whose position lies behind the end of the job does not."""

    flashes: int = 0
    succeeded: int = 0
    happened: int = 0
    killed: int = 0
    repeated: int = 0
    rolled_back: int = 0
    staying: int = 0
    virtual_s: float = 0.0
    real_s: float = 0.0
    longest_s: float = 0.0
    kinds: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def text(self) -> str:
        kinds = ", ".join(f"{name} {count}" for name, count in sorted(self.kinds.items()))
        codes = ", ".join(f"`{name}` {count}" for name, count in sorted(self.codes.items()))
        return (
            f"{self.flashes} flashes with one random transient fault each: {self.succeeded} succeeded"
            f" ({self.happened} faults fell into the job, {self.killed} of them the death of its session process)."
            f" By kind: {kinds}. {self.virtual_s / 3600:.1f} hours of the targets' time; no session took more than"
            f" {self.longest_s:.0f} s. {self.rolled_back} flashes of an image that does not pass its health probe, with one"
            f" such fault each: the image before it was restored and proven. {self.staying} flashes with a fault that stays:"
            f" {codes}; the next flash, without it, succeeded each time."
        )


def images_of(target: VirtualTarget) -> tuple[Image, Image]:
    chip = target.device.chip
    return make_image(chip, SIZE, seed=1), make_image(chip, SIZE, seed=2)


def draw(rng: random.Random, target: VirtualTarget, traffic: tuple[int, int]) -> str:
    """One fault, its position within a job that moved so many bytes."""
    rx, tx = traffic
    erase = "0x43" if target.config.chip == "0x410" else "0x44"
    kind = rng.choice(["rx", "rx", "tx", "tx", "stage", "cell", "erase"])
    if kind in ("rx", "tx"):
        supply = ["power"] if target.config.lines.power else []
        way = rng.choice(["lose", "flip", "insert"] + (["reset", "hang", *supply] if kind == "rx" else []))
        value = {"flip": f":{1 << rng.randrange(8):#x}", "insert": f":{rng.choice((0, 0x79, 0x1F, 0xFF, 0x7F, 0x31, 0x44)):#x}"}
        return f"{way}:{kind}:{rng.randrange(rx if kind == 'rx' else tx)}{value.get(way, '')}"
    if kind == "stage":
        stages = {
            "0x00": ["opcode"],
            "0x02": ["opcode"],
            "0x11": ["opcode", "address", "length"],
            "0x31": ["opcode", "address", "data"],
            erase: ["opcode", "list"],
        }
        opcode = rng.choice(list(stages))
        where = f"{opcode}:{rng.randrange(4)}:{rng.choice(stages[opcode])}"
        return rng.choice([f"nack:{where}", f"lose:{where}", f"late:{where}:{rng.choice((0.1, 0.3, 1, 3))}"])
    if kind == "cell":
        return f"{rng.choice(('misprogram', 'misread'))}:{BASE + rng.randrange(SIZE):#x}"
    return "erase-hang:0"


def wrong(target: VirtualTarget, image: Image, job: Job) -> str:
    """What is not as a job that succeeded says; empty: all is well."""
    device = target.device
    if job.state is not JobState.SUCCEEDED or (job.result or {}).get("evidence") != "full":
        return f"{job.state} {job.error}"
    if not all(device.memory.read(seg.address, len(seg.data)) == seg.data for seg in image.segments):
        return "A FALSE SUCCESS"
    if (job.result or {}).get("health") != "passed":
        return "its application was not heard"
    if device.mode is not Mode.APPLICATION or device.lines["boot0"] or not device.lines["nrst"]:
        return f"left in mode {device.mode.value}, {device.lines}"
    return beyond(target.account, target.started_ns / 1e9)


class Product:
    def __init__(self, root: Path) -> None:
        health = config.Talk(expect="bench application", within_s=2.0)
        application = config.Application(listen_s=0.2, health=health)
        parts = {name: (part, {**PARTS[part], "rate_error": 0.0}) for name, part in NAMES.items()}
        self.gateway = VirtualGateway(root, parts, config.Target(port=NOWHERE, application=application))
        for target in self.gateway.targets.values():
            self.used(target)
        self.images: dict[tuple[str, int], str] = {}
        self.turns: Counter[str] = Counter()
        self.figures = Figures()

    def used(self, target: VirtualTarget) -> None:
        """Its flash held something when its power came on: else an empty check would keep it in its loader (test_boot.py)."""
        uart = VirtualUart(target.device)
        for seg in make_image(target.device.chip, 1024, seed=3).segments:
            target.device.memory.program(seg.address, seg.data)
        uart.set_lines(power=False)
        uart.pause(1.0)
        uart.set_lines(power=True)

    async def flash(self, name: str) -> tuple[Job, str]:
        """The other image in turn. How the job ended, and what is wrong with that."""
        target = self.gateway.targets[name]
        turn = self.turns[name] % 2
        self.turns[name] += 1
        image = images_of(target)[turn]
        if (name, turn) not in self.images:
            self.images[name, turn] = self.gateway.stage(f"{name}-{turn}.bin", image.segments[0].data)
        ref = f"{self.images[name, turn]}@{BASE:#010x}"
        before = target.device.now_ns
        job = await self.gateway.job(JobKind.FLASH, name, ref)
        self.figures.virtual_s += (target.device.now_ns - before) / 1e9
        self.figures.longest_s = max(self.figures.longest_s, target.account.total_s)
        return job, wrong(target, image, job)

    async def calm(self, name: str) -> tuple[int, int, int]:
        """Bytes to the target and from it, and frames, in a flash over another image without any fault."""
        target = self.gateway.targets[name]
        for _ in range(2):
            stats = target.device.stats
            before = stats.bytes_in, stats.bytes_out
            _, problem = await self.flash(name)
            assert not problem, (name, problem)
        return stats.bytes_in - before[0], stats.bytes_out - before[1], target.account.all.sends

    async def transient(self, name: str, flashes: int, seed: int) -> None:
        rng = random.Random(f"{seed} {name}")
        target, figures = self.gateway.targets[name], self.figures
        rx, tx, sends = await self.calm(name)
        for number in range(flashes):
            fault = "kill" if rng.random() < KILLED else draw(rng, target, (rx, tx))
            injected = self.gateway.inject(name, [] if fault == "kill" else [fault])
            if fault == "kill":
                target.kill_after = rng.randrange(2 * sends)  # Each is a step, and so is the wait for its answer.
            job, problem = await self.flash(name)
            happened = bool(injected.happened) or fault == "kill"
            figures.flashes += 1
            figures.happened += happened
            figures.killed += fault == "kill"
            figures.repeated += job.attempts > 1
            figures.kinds[fault.split(":")[0]] += 1
            figures.succeeded += not problem
            if problem:
                figures.wrong.append(f"{name} {number} {fault}: {problem}")

    async def sick(self, name: str, flashes: int, seed: int) -> None:
        """Images that say something else than the probe expects."""
        rng = random.Random(f"{seed} sick {name}")
        target, figures = self.gateway.targets[name], self.figures
        rx, tx, _ = await self.calm(name)
        good = images_of(target)[(self.turns[name] - 1) % 2]
        for number in range(flashes):
            image = make_image(target.device.chip, SIZE, seed=100 + number, banner=b"quite another")
            staged = self.gateway.stage(f"{name}-sick-{number}.bin", image.segments[0].data)
            fault = draw(rng, target, (2 * rx, 2 * tx))
            self.gateway.inject(name, [fault])
            job = await self.gateway.job(JobKind.FLASH, name, f"{staged}@{BASE:#010x}")
            restored = all(target.device.memory.read(seg.address, len(seg.data)) == seg.data for seg in good.segments)
            figures.rolled_back += job.state is JobState.ROLLED_BACK and restored
            if job.state is not JobState.ROLLED_BACK or not restored or target.device.mode is not Mode.APPLICATION:
                figures.wrong.append(f"{name} sick {number} {fault}: {job.state} {job.error}, restored: {restored}")

    async def staying(self, name: str, every: int) -> None:
        """Each fault of the table, or one of ``every``; another one on each target."""
        target, figures = self.gateway.targets[name], self.figures
        part = NAMES[name]
        for texts, right in (STAYING + STAYING_WRITING)[list(NAMES).index(name) % every :: every]:
            self.gateway.inject(name, [text.replace("ERASE", "0x43" if part == "0x410" else "0x44") for text in texts])
            job, problem = await self.flash(name)
            code = str((job.error or {}).get("code", ""))
            figures.staying += 1
            figures.codes[code or "SUCCEEDED"] += 1
            late = beyond(target.account, target.started_ns / 1e9) if code else problem
            if code not in right or late or not job.terminal or (code and job.state not in ENDED):
                figures.wrong.append(f"{name} {texts[0]}: {job.state} {job.error} {late}")
            self.gateway.inject(name, [])
            _, problem = await self.flash(name)
            if problem:
                figures.wrong.append(f"{name} after {texts[0]}: {problem}")


async def play(root: Path, flashes: int, seed: int, *, every: int = 1) -> Figures:
    """``flashes`` over all targets, which work side by side. ``every``: see ``Product.staying``."""
    product = Product(root)
    begun = time.monotonic()
    async with product.gateway as gateway:
        share, rest = divmod(flashes, len(NAMES))
        await asyncio.gather(*(product.transient(name, share + (n < rest), seed) for n, name in enumerate(NAMES)))
        await asyncio.gather(*(product.sick(name, max(1, share // 25), seed) for name in NAMES))
        await asyncio.gather(*(product.staying(name, every) for name in NAMES))
        left = gateway.journal.sessions()
        if left:
            product.figures.wrong.append(f"targets left in a session: {left}")
        product.figures.wrong += gateway.life.violations
    product.figures.real_s = time.monotonic() - begun
    return product.figures


def run(flashes: int, seed: int = 1, *, every: int = 1) -> Figures:
    """On a disk in memory where there is one: ten thousand flashes are some hundred thousand syncs."""
    with tempfile.TemporaryDirectory(prefix="bridged-product-", dir=SHM if SHM.is_dir() else None) as root:
        return asyncio.run(play(Path(root), flashes, seed, every=every))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flashes", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        figures = run(args.flashes, args.seed)
    except BridgedError as error:
        print(f"{error.code}: {error.message}", file=sys.stderr)
        return 1
    print(figures.text())
    print(f"{figures.real_s:.0f} s")
    for line in figures.wrong[:50]:
        print(line)
    return 1 if figures.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
