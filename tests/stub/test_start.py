"""From the ROM loader to the second one and back: upload, Go, greeting, a job, and the ways in which it does not begin."""

from __future__ import annotations

import dataclasses
import zlib

import pytest

from bridged import stub
from bridged.chips.second_stage import SECOND_STAGES, why_not
from bridged.errors import SecondStageFailed
from bridged.protocol import an3155
from bridged.protocol import stub as wire
from bridged.protocol.an3155 import Timing
from bridged.protocol.flow import Flow
from bridged.protocol.stub import Greeting, Link
from bridged.sim.virtual import VirtualUart, run
from bridged.sim.wire import Format
from bridged.target.second_stage import make_upload, sector_code
from tests.stub.bench import ALL, pattern
from tests.stub.whole import Whole

BAUD = 57600
TIMING = Timing.at(BAUD)
FLASH = 0x08000000


def prepared(whole: Whole) -> tuple[VirtualUart, int, bytes, bytes]:
    """The part in its ROM loader, synchronised; where the image goes, the image, and the build."""
    whole.enter()
    uart = VirtualUart(whole, Format(BAUD, "E"))  # type: ignore[arg-type]
    run(an3155.synchronise(TIMING), uart)
    flash = whole.chip.flash_map(len(whole.rom.memory.flash))
    upload = make_upload(SECOND_STAGES[whole.chip.pid], flash, BAUD, stub.load())
    return uart, upload.address, upload.image, upload.build


def upload(address: int, image: bytes) -> Flow[None]:
    for at in range(0, len(image), 256):
        block = image[at : at + 256]
        yield from an3155.write_memory(address + at, block + bytes(-len(block) % 4), TIMING)


def begin(address: int, image: bytes, build: bytes) -> Flow[tuple[Link, Greeting]]:
    yield from upload(address, image)
    return (yield from wire.start(address, build, BAUD, TIMING))


@pytest.mark.parametrize("oscillator", [0.98, 1.02])
@pytest.mark.parametrize("name", ALL)
def test_upload_go_greeting_and_a_job(name: str, oscillator: float) -> None:
    whole = Whole(name, oscillator=oscillator)
    uart, address, image, build = prepared(whole)
    before = uart.now_ns
    link, greeting = run(begin(address, image, build), uart)
    assert (uart.now_ns - before) / 1e9 < 1.2, "3.5 KiB at 57600 and the greeting"
    machine, row = whole.machine, SECOND_STAGES[whole.chip.pid]
    assert machine is not None
    assert greeting.clock_hz(BAUD, 0) == pytest.approx(row.clock_hz * oscillator, rel=0.006)
    flash = whole.chip.flash_map(len(whole.rom.memory.flash))
    sector, data = flash.sectors[0], pattern(1, 1024)
    commands = [
        wire.erase([(sector.address, sector_code(row, flash, sector), sector.size_bytes)], 5.0, 5.0),
        wire.write(FLASH, data, 0.5),
    ]
    run(link.run(commands), uart)
    assert run(link.crc_map(FLASH, 1024, 1, byte_s=5e-6), uart) == [zlib.crc32(data)]
    assert machine.violations == []
    uart.set_lines(reset=True)
    uart.pause(0.02)
    uart.set_lines(reset=False)
    assert whole.rom.memory.flash[:1024] == data


def test_a_loader_that_never_greets_is_given_up_soon() -> None:
    whole = Whole("F407", deaf=True)
    uart, address, image, build = prepared(whole)
    run(upload(address, image), uart)
    before = uart.now_ns
    with pytest.raises(SecondStageFailed, match="did not greet within 1 s"):
        run(wire.start(address, build, BAUD, TIMING), uart)
    assert 0.9 < (uart.now_ns - before) / 1e9 < 1.6


def test_another_build_is_not_used() -> None:
    whole = Whole("L476")
    uart, address, image, _ = prepared(whole)
    with pytest.raises(SecondStageFailed, match="another program greets"):
        run(begin(address, image, b"12345678"), uart)


def test_the_data_cache_must_be_off() -> None:
    greeting = wire.greeting_of(bytes(32) + (1 << 16).to_bytes(4, "little"))
    assert greeting.data_cache
    assert not dataclasses.replace(greeting, ccr=0x200).data_cache


def test_who_is_in_the_table_and_may_use_it() -> None:
    from bridged import chips

    for pid in SECOND_STAGES:
        chip = chips.by_pid(pid)
        newest = 0x92 if pid == 0x450 else max(chip.loader_ids, default=None)
        assert why_not(chip, newest) == "", hex(pid)
    assert "not in the table" in why_not(chips.by_pid(0x440), None)
    assert "ram-write-broken" in why_not(chips.by_pid(0x415), 0xA1)
    h743 = chips.by_pid(0x450)
    assert "go-broken" in why_not(h743, 0xD2)
    assert "go-first-ack-missing" in why_not(h743, 0x90)
    assert "power-cycle-after-go" in why_not(h743, 0xD3)
    assert why_not(h743, 0x91) == why_not(h743, 0x92) == ""
