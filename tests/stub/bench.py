"""What the tests of this room share: a part with the shipped loader in its RAM, and a host that runs flows against it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

from bridged import chips, stub
from bridged.chips.model import FlashMap
from bridged.chips.second_stage import SECOND_STAGES, SecondStage
from bridged.protocol.flow import Flow
from bridged.protocol.stub import Greeting, Link
from bridged.sim.virtual import Account, VirtualUart, run
from bridged.sim.wire import Format
from bridged.target.second_stage import Upload, make_upload
from tests.stub.machine import Machine
from tests.stub.parts import PARTS

T = TypeVar("T")
ALL = tuple(PARTS)


@dataclass
class Bench:
    """One part that runs the loader, and the host's port."""

    machine: Machine
    uart: VirtualUart
    row: SecondStage
    flash: FlashMap
    upload: Upload
    link: Link
    account: Account

    def run(self, flow: Flow[T]) -> T:
        """Run a flow to its end; a violation of the silicon's rules on the way fails the test."""
        try:
            return run(flow, self.uart, account=self.account)
        finally:
            assert self.machine.violations == [], "; ".join(self.machine.violations)

    def greet(self) -> Greeting:
        """HELLO, until the loader answers at the present rate."""
        return self.run(self.link.hello())


def bench(
    name: str,
    *,
    baud: int = 115200,
    oscillator: float = 1.0,
    content: bytes = b"",
    row: SecondStage | None = None,
    clock_hz: int | None = None,
    code: stub.Code | None = None,
    started: bool = True,
) -> Bench:
    """``started``: it has greeted, after a train, as after ``protocol.stub.start``."""
    part = PARTS[name]
    row = row or SECOND_STAGES[part.pid]
    faster = 1.0
    if clock_hz is not None:
        row, faster = dataclasses.replace(row, clock_hz=clock_hz), clock_hz / row.clock_hz
    chip = chips.by_pid(part.pid)
    flash = chip.flash_map(sum(area.size for area in part.areas))
    upload = make_upload(row, flash, baud, code or stub.load())
    machine = Machine(part, upload.address, upload.image, oscillator=oscillator, faster=faster, flash_content=content)
    account = Account()
    uart = VirtualUart(machine, Format(baud, "N"), account=account)  # type: ignore[arg-type]
    link = Link(baud, upload.ring_bytes)
    made = Bench(machine, uart, row, flash, upload, link, account)
    if started:
        uart.send(b"\x55" * 64)
        made.greet()
    return made


def noise(seed: int, one_in: int) -> Callable[[int, int], bytes]:
    """Every so many bytes one is changed, lost or doubled."""
    random = Random(seed)

    def spoil(_number: int, value: int) -> bytes:
        if random.randrange(one_in):
            return bytes([value])
        return random.choice((bytes([value ^ 1 << random.randrange(8)]), b"", bytes([value, random.randrange(256)])))

    return spoil


def pattern(seed: int, count: int) -> bytes:
    return Random(seed).randbytes(count)
