"""Gates on the running binary: no byte lost at any clock and rate, its cost in instructions, and what rubbish does to it.

All figures are virtual: instructions and the time that ``machine`` makes of them, never this computer's clock.
"""

from __future__ import annotations

import dataclasses
import zlib
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridged.chips.second_stage import SECOND_STAGES
from bridged.protocol import stub as wire
from bridged.protocol.stub import Verb
from tests.stub import full_flash
from tests.stub.bench import Bench, bench, pattern
from tests.stub.parts import PARTS

FLASH = 0x08000000
BLANK = b"\xff" * 0x20000
PER_BYTE_INSTRUCTIONS = 48  # take, CRC, compare, program and compare again of one byte, waiting not counted

# Name, clock and rate: those whose divisor is at least 16 and within 2.5 %.
RATES = [
    (name, clock, baud)
    for name, clocks in {"F103": (8, 24, 72), "L476": (16, 64), "G071": (16, 64), "H743": (64, 400)}.items()
    for clock in clocks
    for baud in (115200, 230400, 460800, 921600, 2_000_000)
    if clock * 1_000_000 / baud >= 16 and abs(clock * 1e6 / round(clock * 1e6 / baud) / baud - 1) <= 0.025
]


def stream(b: Bench, count: int) -> tuple[float, bytes]:
    """Write ``count`` bytes to blank flash; seconds that it took, and the content."""
    data = pattern(count, count)
    step = b.row.block_bytes
    before = b.uart.now_ns
    b.run(b.link.run([wire.write(FLASH + at, data[at : at + step], 1.0) for at in range(0, count, step)]))
    return (b.uart.now_ns - before) / 1e9, data


@pytest.mark.parametrize(("name", "clock_mhz", "baud"), RATES)
def test_no_byte_is_lost_at_any_clock_and_rate(name: str, clock_mhz: int, baud: int) -> None:
    # A small ring is filled and emptied in less time.
    row = dataclasses.replace(SECOND_STAGES[PARTS[name].pid], ring_bytes=4096, block_bytes=1024)
    b = bench(name, row=row, baud=baud, clock_hz=clock_mhz * 1_000_000, content=BLANK, started=False)
    b.greet()
    before = b.machine.lost  # noise before it listened
    count = 2 * b.row.ring_bytes
    seconds, data = stream(b, count)
    assert b.machine.flash_is(FLASH, count) == data
    status = b.run(b.link.status())
    assert (status.bad_frames, status.bad_headers, status.gaps, status.pauses) == (0, 0, 0, 0)
    assert b.machine.lost == before
    assert b.link.resent == 0
    # Reception and programming overlap: the longer of both, and a little of the other at both ends.
    on_wire_s = count * 10 / baud
    programming_s = count / b.machine.flash.UNIT * b.machine.flash.times.program / 1e9
    cpu_s = count * PER_BYTE_INSTRUCTIONS * b.machine.cycles / (clock_mhz * 1e6)
    both_ends_s = 3 * b.row.block_bytes * (10 / baud) + 2 * b.row.block_bytes / count * (programming_s + cpu_s)
    assert seconds <= 1.05 * max(on_wire_s, programming_s + cpu_s) + both_ends_s


def test_the_ring_is_never_overfilled_while_it_erases() -> None:
    """A sector of 2 s, and the host has sent what the ring takes long before."""
    b = bench("F407", content=b"\x00" * 0x20000)
    data = pattern(1, 8 * 4096)
    commands = [
        wire.erase([(FLASH, 0, 16384)], 1.0, 1.0),
        wire.erase([(FLASH + 16384, 1, 16384)], 1.0, 1.0),
        *(wire.write(FLASH + at, data[at : at + 4096], 1.0) for at in range(0, len(data), 4096)),
    ]
    before = b.uart.now_ns
    b.run(b.link.change_rate(460800, 139))
    b.run(b.link.run(commands))
    assert b.machine.flash_is(FLASH, len(data)) == data
    assert b.run(b.link.status()).bad_frames == 0
    wire_s, flash_s = len(data) * 10 / 460800, 0.8 + len(data) * 16e-6
    assert (b.uart.now_ns - before) / 1e9 < flash_s + 0.55 * wire_s, "most of the wire's time is hidden behind the erase"


def test_cost_in_instructions() -> None:
    b = bench("L476", baud=115200, content=BLANK, started=False)
    b.greet()
    before = b.machine.instructions
    count = 16384
    stream(b, count)
    assert (b.machine.instructions - before) / count <= 1.25 * PER_BYTE_INSTRUCTIONS


@pytest.mark.parametrize(("name", "limit"), [("G071", 32 * 1024), ("L476", 32 * 1024), ("F103", 16 * 1024)])
def test_flash_on_a_bad_line(name: str, limit: int) -> None:
    """One frame in twenty is hit. ``make soak`` does all six parts, whole."""
    full_flash.write_all(name, clean=False, seed=5, limit=limit)


@pytest.mark.parametrize(("name", "limit"), [("G071", 49152), ("L476", 49152), ("F103", 16384)])
def test_at_921600_the_flash_is_what_takes_time(name: str, limit: int) -> None:
    """Modelled, with flash times from memory. Parts with sectors of 128 KiB wait for the wire too: 32 % on an F407."""
    seconds, floor = full_flash.write_all(name, clean=True, limit=limit)
    assert seconds < 1.25 * floor


# --- rubbish


def alive(b: Bench) -> None:
    b.link._left.clear()
    b.uart.inbox.clear()
    assert b.run(b.link.hello()).build == b.upload.build
    assert b.machine.flash.erases == []
    assert b.machine.flash.programmed == 0
    assert b.machine.resets == 0


def test_thousands_of_spoilt_frames_change_nothing() -> None:
    """Every frame is a valid WRITE, ERASE or GO with one to three bytes changed: one that passes would do damage."""
    random = Random(6)
    b = bench("L476", baud=921600, clock_hz=64_000_000, started=False)
    b.greet()
    for _ in range(1500):
        verb = random.choice((Verb.WRITE, Verb.ERASE, Verb.FILL, Verb.GO))
        data = bytearray(wire.frame(verb, random.randrange(2), random.randbytes(random.choice((4, 12, 40)))))
        for _ in range(random.randrange(1, 4)):
            data[random.randrange(len(data))] ^= random.randrange(1, 256)
        try:
            if wire.head_of(bytes(data)) and zlib.crc32(data[1:-4]) == int.from_bytes(data[-4:], "little"):
                continue  # two changes that undid each other
        except IndexError:
            continue
        b.uart.send(bytes(data))
    b.uart.pause(0.3)
    assert b.machine.violations == []
    alive(b)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=60),
            st.just(b"\xa5"),
            st.builds(wire.frame, st.sampled_from([0x10, 0x55, 0x80, 0xFF]), st.integers(0, 255), st.binary(max_size=60)),
            st.builds(
                lambda verb, payload: wire.frame(verb, 0, payload),
                st.sampled_from([Verb.ERASE, Verb.WRITE, Verb.FILL, Verb.CRC, Verb.READ]),
                st.binary(max_size=11).filter(lambda payload: len(payload) not in (8, 12)),
            ),
            st.builds(lambda data, cut: data[:cut], st.just(wire.frame(Verb.WRITE, 0, bytes(200))), st.integers(0, 210)),
        ),
        max_size=12,
    )
)
def test_any_bytes_at_all(pieces: list[bytes]) -> None:
    """Noise, marks, unknown verbs, wrong lengths, frames that end early: it answers HELLO afterwards and touched nothing."""
    b = bench("G071", started=False)
    b.greet()
    for piece in pieces:
        b.uart.send(piece)
    b.uart.pause(0.25)
    assert b.machine.violations == []
    alive(b)


# --- the header check


def test_every_single_and_double_bit_error_in_a_header_is_noticed() -> None:
    head = wire.frame(Verb.WRITE, 0x5C, bytes(0x1F))[:7]
    bits = 8 * len(head)
    number = int.from_bytes(head, "little")
    for first in range(8, bits):
        for second in range(first, bits):
            changed = number ^ 1 << first ^ (1 << second if second != first else 0)
            assert wire.head_of(changed.to_bytes(7, "little")) is None
    assert wire.head_of(head) == (Verb.WRITE, 0x5C, 0x1F)
