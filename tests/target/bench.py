"""One simulated part on the bench: run sessions on it in virtual time, look into its flash, boot it."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any

from bridged import chips, config
from bridged.chips.model import Chip
from bridged.events import Event, SectorErased, SectorProven
from bridged.images.model import Image
from bridged.protocol.flow import Barrier, Checkpoint
from bridged.sim import virtual
from bridged.sim.device import Device, Mode
from bridged.sim.virtual import Account, VirtualUart
from bridged.target import lines, session
from bridged.target.request import Request, Result, Wiring

LINES = config.Lines(kind="socket", socket="/nowhere", nrst="nrst", boot0="boot0")
WIRED = Wiring(has_reset=True, has_boot0=True, enter=lines.default_enter(LINES), leave=lines.default_leave(LINES))
BANNER = b"bench application"


def make_image(chip: Chip, size_bytes: int, *, offset: int = 0, seed: int = 1, banner: bytes = BANNER) -> Image:
    """A bootable image: vectors, the simulator's banner, pseudo-random code, and a blank stretch in the middle."""
    base = chip.flash_base + offset
    body = bytearray(random.Random(seed).randbytes(size_bytes))
    body[0:8] = struct.pack("<II", chip.ram[0].start + 0x400, base + 0x101)
    mark = b"BRIDGED-APP1\0" + banner + b"\0"
    body[64 : 64 + len(mark)] = mark
    if size_bytes > 4096:
        body[2048:3072] = bytes([chip.erased_value]) * 1024
    return Image.of([(base, bytes(body))])


def check_proofs(events: Iterable[Event]) -> None:
    """What the journal was told to be proven is not erased any more (P5): after a kill nobody would know."""
    proven: set[int] = set()
    for event in events:
        if isinstance(event, SectorProven):
            proven.add(event.address)
        assert not (isinstance(event, SectorErased) and event.address in proven), event


@dataclass
class Bench:
    """``settings``: passed to the simulated ``Device``. ``request``: passed to every ``Request``."""

    chip_name: str
    settings: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.chip = chips.find(self.chip_name)
        self.device = Device(self.chip, **self.settings)
        self.uart = VirtualUart(self.device)
        self.account = Account()
        self.started_s = 0.0

    def run(
        self,
        kind: str,
        image: Image | None = None,
        kept: bytes = b"",
        *,
        checkpoint: Callable[[Checkpoint], None] | None = None,
        barrier: Callable[[Barrier], None] | None = None,
        report: Callable[[Event], None] | None = None,
        cut_after_exchange: int | None = None,
        **request: Any,
    ) -> Result:
        """One session; ``account`` holds its accounting afterwards, also when it fails."""
        wanted = Request(**{"kind": kind, "wiring": WIRED, "chip": self.chip_name, **self.request, **request})
        assert Request.from_dict(wanted.to_dict()) == wanted
        self.account = Account()
        self.started_s = self.device.now_ns / 1e9
        flow = session.run(wanted, image, kept)
        try:
            return virtual.run(
                flow,
                self.device,
                account=self.account,
                checkpoint=checkpoint,
                barrier=barrier,
                report=report,
                cut_after_exchange=cut_after_exchange,
            )
        finally:
            check_proofs([e for _, e in self.account.events])

    def events(self, kind: type[Any]) -> list[Any]:
        return [e for _, e in self.account.events if isinstance(e, kind)]

    def flash(self, address: int, count: int) -> bytes:
        return self.device.memory.read(address, count)

    def put(self, image: Image) -> None:
        """Content that was there when the power came on."""
        align = self.device.memory.align_bytes
        for seg in image.segments:
            self.device.memory.program(seg.address, seg.data + bytes([self.chip.erased_value]) * (-len(seg.data) % align))
        assert self.holds(image)
        self.uart.set_lines(power=False)
        self.uart.pause(1.0)
        self.uart.set_lines(power=True)

    def holds(self, image: Image) -> bool:
        return all(self.flash(seg.address, len(seg.data)) == seg.data for seg in image.segments)

    @property
    def in_a_command(self) -> bool:
        """The loader is at work, or waits for the rest of a command."""
        run = self.device._run
        return isinstance(run, GeneratorType) and (self.device._work is not None or run.gi_yieldfrom is not None)

    def boots(self) -> bool:
        """Whether a reset with BOOT0 low starts an application."""
        uart = VirtualUart(self.device)
        uart.set_lines(boot0=False, reset=True)
        uart.pause(0.01)
        uart.set_lines(reset=False)
        uart.pause(1.0)
        return self.device.mode is Mode.APPLICATION
