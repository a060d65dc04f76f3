"""Every instruction of the second-stage loader taken out, one at a time: ``python -m tests.stub.mutations [--functions a,b]``.

A loader that lacks an instruction and passes ``scenario``, ``families`` and ``starts`` shows a hole in the tests or an
instruction that is not needed. The whole binary takes seven and a half minutes of CPU time; ``make soak`` runs it. It fails
when more than ``SURVIVORS_PERCENT`` survive, and lists them with their function (``stub.map``), for a person to look at.

When it was last looked at, 81 of 1,330 survived (6.1 %). What they are, for whoever finds more:

- what the compiler made of units of one store and of several at once (``compare``: no part needs its general loop for words),
  guards of loops that are never empty (``poke_count``, ``unit``), flags and registers that are right already;
- ranges that the wrap of unsigned numbers would refuse as well (``in_flash``, the inlet, ``take`` at the end of the ring);
- barriers (DSB), which an emulator without a write buffer does not need;
- speed: pieces of one byte instead of 256, one more look at the clock;
- what ends in the same state: SysTick's first value, a USART switched off that is off, what is waited for after the reset.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bridged import stub
from bridged.chips.second_stage import SECOND_STAGES
from bridged.protocol import stub as wire
from bridged.protocol.flow import Flow, Receive, Send
from bridged.protocol.stub import Reason, Verb
from bridged.sim.wire import Format
from tests.stub.bench import Bench, bench, pattern
from tests.stub.parts import PARTS

FLASH = 0x08000000
NOP = 0x46C0  # mov r8, r8: as good as none on ARMv6-M
PADDING = (b"\xc0\x46", b"\x00\x00")  # What the compiler puts before literals; movs r0, r0 stands nowhere else.
SURVIVORS_PERCENT = 8.0
LONGEST_NS = 60_000_000_000  # A loader that lacks an instruction may keep its host waiting for ever.
MAP = Path(stub.__file__).parent / "stub.map"


class Unexpected(Exception):
    """The loader did something else than it should."""


def must(condition: bool) -> None:
    if not condition:
        raise Unexpected


def functions() -> dict[str, list[range]]:
    """Name to the bytes of the code that belong to it: its instructions, not the literals behind or between them."""
    found: dict[str, range] = {}
    marks: list[tuple[int, str]] = []
    for line in MAP.read_text().splitlines():
        match = re.fullmatch(r"\s*([0-9a-f]+)\s+[0-9a-f]+\s+([0-9a-f]+)\s+1\s+(\$[td]|\w+)", line)
        if match is None:
            continue
        at, size, name = int(match[1], 16) - stub.CODE_OFFSET, int(match[2], 16), match[3]
        if name in ("$t", "$d"):
            marks.append((at, name))
        elif at & 1:
            found[name] = range(at - 1, at - 1 + size)
    ends = [at for at, _ in marks[1:]] + [len(stub.load().code)]
    code = [range(at, end) for (at, name), end in zip(marks, ends, strict=True) if name == "$t"]
    return {
        name: [range(max(c.start, f.start), min(c.stop, f.stop)) for c in code if c.start < f.stop and f.start < c.stop]
        for name, f in found.items()
    }


def without(code: bytes, at: int) -> tuple[bytes, int]:
    """The code with the instruction at ``at`` taken out, and its length. What aligns literals changes nothing."""
    (first,) = struct.unpack_from("<H", code, at)
    size = 4 if first >> 11 in (0x1D, 0x1E, 0x1F) else 2
    return code[:at] + struct.pack("<H", NOP) * (size // 2) + code[at + size :], size


def exchange(b: Bench, data: bytes, count: int, timeout_s: float = 0.15) -> bytes:
    def flow() -> Flow[bytes]:
        yield Send(data)
        answer: bytes = yield Receive(count, timeout_s)
        return answer

    return b.run(flow())


def refused(b: Bench, data: bytes, timeout_s: float = 0.15) -> tuple[int, int, Reason, int, int]:
    """Send ``data`` and take its refusal apart: number, expected number, reason, address, detail."""
    answer = exchange(b, data, 27, timeout_s)
    must(len(answer) == 27 and wire.frame(Verb.NAK | 0x80, answer[2], answer[7:23]) == answer)
    found = wire.refusal_of(wire.Answer(answer[1], answer[2], answer[7:23]))
    if found is None:
        raise Unexpected
    return answer[2], found.expected, found.reason, found.where, found.detail


def done(b: Bench, number: int, verb: Verb, payload: bytes, timeout_s: float = 0.15) -> None:
    """Have one command carried out."""
    must(exchange(b, wire.frame(verb, number, payload), 11, timeout_s) == wire.frame(verb | 0x80, number))
    must(all(bank.locked for bank in b.machine.flash.banks))


def started(name: str, code: stub.Code, **how: Any) -> Bench:
    b = bench(name, code=code, started=False, **how)
    b.machine.until_ns = LONGEST_NS
    return b


def field(b: Bench, name: str) -> int:
    """Where a field of the context is."""
    return b.upload.address + 4 * stub.FIELDS.index(name)


def move_ring(b: Bench, left: int) -> None:
    """Send noise until ``left`` bytes fit before the end of the ring."""
    size = b.row.ring_bytes
    b.uart.send(b"x" * ((size - left - int.from_bytes(b.machine.read(field(b, "written"), 4), "little")) % size))
    b.uart.pause(0.002)


def ranges(*words: int) -> bytes:
    return struct.pack(f"<{len(words)}I", *words)


def scenario(code: stub.Code, name: str = "L476") -> None:
    """Everything once, on blank and used flash, with faults of the line and of the flash. Raises when something is wrong."""
    row = dataclasses.replace(SECOND_STAGES[PARTS[name].pid], ring_bytes=2048)  # the ring's end is met often
    b = started(name, code, row=row, oscillator=1.02)
    b.uart.pause(0.115)  # it greets, and listens for the second time
    b.uart.inbox.clear()
    greeting = wire.frame(Verb.HELLO | 0x80, 0, b"\0" * 36)
    heard = exchange(b, b"\x55" * 64, len(greeting))
    must(len(heard) == len(greeting) and wire.frame(Verb.HELLO | 0x80, 0, heard[7:43]) == heard)
    found = wire.greeting_of(heard[7:43])
    must(found.build == code.build and abs(found.clock_hz(115200, 0) / b.row.clock_hz / 1.02 - 1) < 0.006)
    must(found.cpuid == b.machine.part.cpuid and found.ccr == 0x200 and abs(found.brr - 496) <= 3)
    must(found.brr == b.machine.usart.reg("brr") == (found.train + 128) >> 8)
    exchange(b, wire.frame(Verb.HELLO, 1), 47)
    must(b.machine.registers()["primask"] == 1)
    page, data = 2048, pattern(1, 1024)
    # As a ROM loader may leave the controller: unlocked, and at work.
    bank = b.machine.flash.banks[0]
    bank.locked, bank.busy_until = False, b.machine.now_ns + 8_000_000

    # Erase, write twice, a duplicate, a gap, a spoilt frame, noise before a frame, frames that end early.
    done(b, 0, Verb.ERASE, ranges(FLASH + page, 1, page))
    done(b, 0, Verb.ERASE, ranges(FLASH + page, 1, page))
    must(b.machine.flash.erases == [FLASH + page])
    must(b.machine.flash_is(FLASH, page) == b"\x5a" * page and b.machine.flash_is(FLASH + 2 * page, 64) == b"\x5a" * 64)
    first = wire.frame(Verb.WRITE, 1, ranges(FLASH + page) + data)
    must(refused(b, first[:40] + b"!" + first[41:]) == (1, 1, Reason.BAD_CRC, 0, 0) and b.machine.flash.programmed == 0)
    second = wire.frame(Verb.WRITE, 2, ranges(FLASH + page) + data)
    must(exchange(b, second, 1) == b"")  # told already
    must(exchange(b, b"\xa5\xa5x" + first, 11) == wire.frame(Verb.WRITE | 0x80, 1))
    must(exchange(b, second, 11) == wire.frame(Verb.WRITE | 0x80, 2))
    must(b.machine.flash.programmed == len(data) // 8)
    must(b.machine.flash_is(FLASH + page, page) == data + b"\xff" * (page - len(data)))
    must(refused(b, first[:300]) == (1, 3, Reason.PAUSE, 0, 0))
    must(exchange(b, second[:-2], 1) == b"")
    nothing = ranges(FLASH)
    number = 3
    # What is told once, and then not again before something went well.
    for spoilt, how in (
        (b"\xa5\x02\x03", (0, Reason.PAUSE)),
        (b"\xa5\x02\x03\x04\x05\x06", (0, Reason.PAUSE)),
        (b"\xa5\x02\x03\x04\x05\x06\x07", (0, Reason.BAD_HEADER)),
        (wire.frame(Verb.WRITE, 77, bytes(4101))[:30], (77, Reason.TOO_LONG)),
        (wire.frame(Verb.WRITE, 78, nothing)[:-1] + b"!", (78, Reason.BAD_CRC)),
        (wire.frame(Verb.WRITE, 81, nothing)[:-2] + b"!!", (81, Reason.BAD_CRC)),
        (wire.frame(0x20, 79), (79, Reason.BAD_VERB)),
        (wire.frame(Verb.WRITE, 80, nothing), (80, Reason.OUT_OF_SEQUENCE)),
    ):
        done(b, number, Verb.WRITE, nothing)
        number += 1
        at, expected, reason, _, _ = refused(b, spoilt)
        must((at, expected, reason) == (how[0], number, how[1]))
        b.uart.pause(0.01)
        must(exchange(b, wire.frame(Verb.WRITE, number + 40, nothing), 1, 0.02) == b"")
    for other in (data[::-1], data[:4] + bytes(4)):
        told = refused(b, wire.frame(Verb.WRITE, number, ranges(FLASH + page) + other))
        must(told == (number, number, Reason.NOT_BLANK, FLASH + page, 0))

    # The flash's own faults.
    at = FLASH + page + 1024
    for fault, reason in (("error", Reason.FLASH_ERROR), ("wrong", Reason.NOT_EQUAL)):
        b.machine.flash.fail_program[at] = fault
        told = refused(b, wire.frame(Verb.WRITE, number, ranges(at) + data[:16]))
        must(told == (number, number, reason, at, b.machine.flash.ONE_FOR_REFUSAL if fault == "error" else 0))
        at += 64
    for fault, reason, where, detail in (
        ("error", Reason.FLASH_ERROR, FLASH, b.machine.flash.ONE_FOR_REFUSAL),
        ("wrong", Reason.NOT_ERASED, FLASH + page // 2, 0xFFFFFFFE),
    ):
        b.machine.flash.fail_erase[FLASH] = fault
        told = refused(b, wire.frame(Verb.ERASE, number, ranges(FLASH, 0, page)))
        must(told == (number, number, reason, where, detail))

    # Arguments: what is refused, and which address and number the NAK names.
    end = FLASH + 0x100000
    for verb, payload, where, detail in (
        (Verb.ERASE, ranges(FLASH - page, 0, page), FLASH - page, page),
        (Verb.ERASE, ranges(FLASH + 2, 0, page), FLASH + 2, page),
        (Verb.ERASE, bytes(11), 0, 11),
        (Verb.WRITE, ranges(FLASH - 8) + data[:8], FLASH - 8, 8),
        (Verb.WRITE, ranges(end) + data[:8], end, 8),
        (Verb.WRITE, ranges(end + page) + data[:8], end + page, 8),
        (Verb.WRITE, ranges(end - 8) + data[:16], end - 8, 16),
        (Verb.WRITE, ranges(at + 4) + data[:8], at + 4, 8),
        (Verb.WRITE, ranges(at) + data[:4], at, 4),
        (Verb.WRITE, b"123", 0, 3),
        (Verb.FILL, ranges(FLASH, 8), FLASH, 8),
        (Verb.FILL, ranges(end, 8, 0), end, 8),
        (Verb.CHECK, ranges(FLASH, 8), FLASH, 8),
        (Verb.CHECK, ranges(FLASH, 0x100001, 0), FLASH, 0x100001),
        (Verb.CRC, bytes(8), 0, 8),
        (Verb.CRC, ranges(FLASH, 4, 1026), 0, 12),
        (Verb.READ, ranges(FLASH, 4101), 0, 8),
        (Verb.READ, ranges(FLASH, 4) + b"x", 0, 9),
        (Verb.BAUD, bytes(8), 0, 8),
        (Verb.GO, bytes(8), 0, 8),
    ):
        must(refused(b, wire.frame(verb, number, payload)) == (number, number, Reason.BAD_ARGUMENT, where, detail))
    for unknown, payload in (
        (0x20, b""),
        (0x20, nothing),
        (0x20, ranges(FLASH, 4)),
        (0x20, ranges(FLASH, 4, 1)),
        (11, nothing),
    ):
        told = refused(b, wire.frame(unknown, number, payload))
        must(told == (number, number, Reason.BAD_VERB, 0, len(payload)))

    # What is left: fill, CRC, read, several sectors, nothing at all, status.
    done(b, number, Verb.FILL, ranges(FLASH + page + 1536, 272, 0x5A))
    must(b.machine.flash_is(FLASH + page + 1528, 288) == b"\xff" * 8 + b"\x5a" * 272 + b"\xff" * 8)
    number += 1
    told = refused(b, wire.frame(Verb.FILL, number, ranges(FLASH + page + 768, 512, 0x5A)))
    must(told == (number, number, Reason.NOT_BLANK, FLASH + page + 768, 0))
    content = b.machine.flash_is(FLASH, 3 * page)
    done(b, number, Verb.CHECK, ranges(FLASH + 5, 3000, zlib.crc32(content[5:3005])), 0.3)
    number += 1
    told = refused(b, wire.frame(Verb.CHECK, number, ranges(FLASH + 5, 3000, zlib.crc32(content[5:3005]) ^ 1)), 0.3)
    must(told == (number, number, Reason.NOT_EQUAL, FLASH + 5, 3000))
    sums = struct.pack("<3I", *(zlib.crc32(content[n * page : n * page + page]) for n in range(3)))
    must(exchange(b, wire.frame(Verb.CRC, 9, ranges(FLASH, page, 3)), 23, 0.3) == wire.frame(Verb.CRC | 0x80, 9, sums))
    must(exchange(b, wire.frame(Verb.CRC, 9, ranges(FLASH, page, 0)), 11) == wire.frame(Verb.CRC | 0x80, 9))
    asked = wire.frame(Verb.READ, 10, ranges(FLASH + page - 3, 77))
    must(exchange(b, asked, 88) == wire.frame(Verb.READ | 0x80, 10, content[page - 3 : page + 74]))
    both = ranges(FLASH + 0x80000, 256, page, FLASH + 3 * page, 3, page)
    for verb, payload in (
        (Verb.ERASE, both),
        (Verb.ERASE, ranges(FLASH + 4 * page, 4, 0)),
        (Verb.FILL, nothing + bytes(8)),
        (Verb.CHECK, nothing + bytes(8)),
    ):
        done(b, number, verb, payload)
        number += 1
    must(b.machine.flash.erases[-3:] == [FLASH + 0x80000, FLASH + 3 * page, FLASH + 4 * page])
    told = refused(b, wire.frame(Verb.ERASE, number, both[:16]))
    must(told == (number, number, Reason.BAD_ARGUMENT, 0, 4))
    status = wire.status_of(exchange(b, wire.frame(Verb.STATUS, 1), 51)[7:47])
    must((status.expected, status.stopped, status.bad_frames, status.gaps) == (number, False, 3, 10))
    must((status.frames, status.bad_headers, status.pauses) == (68, 5, 2))

    # The longest frame, across the end of a ring that fills while flash is erased. Then it is compared and left alone: nothing
    # waits for the flash then, but the watchdog does not wait either.
    whole = ranges(FLASH + 3 * page) + b"".join(pattern(n, 1024) for n in range(4))
    again = wire.frame(Verb.ERASE, number, ranges(FLASH + 3 * page, 3, page, FLASH + 4 * page, 4, page))
    long = wire.frame(Verb.WRITE, number + 1, whole)
    move_ring(b, 300)
    b.uart.send(again + long[:1500])
    b.uart.pause(0.03)
    b.uart.send(long[1500:])
    must(exchange(b, b"", 22, 0.6) == wire.frame(Verb.ERASE | 0x80, number) + wire.frame(Verb.WRITE | 0x80, number + 1))
    must(b.machine.flash_is(FLASH + 3 * page, 4096) == whole[4:])
    done(b, number + 2, Verb.WRITE, whole, 0.3)
    number += 3
    move_ring(b, 1)
    done(b, number, Verb.WRITE, nothing)

    # The rate: one that both have, with bytes that come while it computes; one that the line does not carry; the old one.
    b.link.baud = 115200
    must(b.run(b.link.change_rate(460800, 124)))
    check = wire.frame(Verb.CHECK, number + 1, ranges(FLASH, 3 * page, zlib.crc32(b.machine.flash_is(FLASH, 3 * page))))
    more = wire.frame(Verb.WRITE, number + 2, ranges(FLASH + 4 * page) + whole[4 + page : 4 + 2 * page])
    must(exchange(b, check + more, 22) == wire.frame(Verb.CHECK | 0x80, number + 1) + wire.frame(Verb.WRITE | 0x80, number + 2))
    must(exchange(b, wire.frame(Verb.BAUD, 1, ranges(62)), 11) == wire.frame(Verb.BAUD | 0x80, 1))
    before = b.machine.out_bytes
    b.uart.pause(0.45)
    must(b.machine.usart.reg("brr") == 62)
    b.uart.pause(0.1)
    must(b.machine.usart.reg("brr") == 124 and b.machine.out_bytes == before)  # It says nothing of its own accord.
    number += 3
    told = refused(b, wire.frame(Verb.WRITE, number, ranges(end) + data[:8]))
    must(told == (number, number, Reason.BAD_ARGUMENT, end, 8))
    done(b, number, Verb.WRITE, nothing)
    must(b.run(b.link.abort()).stopped)
    stopped = wire.frame(Verb.WRITE, number + 1, ranges(FLASH) + data)
    must(refused(b, stopped) == (number + 1, number + 1, Reason.STOPPED, 0, 0))
    must(exchange(b, stopped, 1, 0.02) == b"")
    must(b.greet().brr == 124)
    must(refused(b, wire.frame(Verb.WRITE, 9, nothing))[:3] == (9, 0, Reason.OUT_OF_SEQUENCE))
    # Numbers begin anew after 255.
    b.machine.write(field(b, "expected"), ranges(255))
    done(b, 255, Verb.WRITE, nothing)
    done(b, 0, Verb.WRITE, nothing)
    must(exchange(b, wire.frame(Verb.WRITE, 254, nothing), 11) == wire.frame(Verb.WRITE | 0x80, 0))
    must(b.machine.longest_watchdog_gap < 8192 and b.machine.stack_used() <= 256)
    exchange(b, wire.frame(Verb.GO, 1, bytes(4)), 11)
    b.uart.pause(0.01)
    must(b.machine.resets == 1 and not b.machine.usart.on and not b.machine.systick[0x10])


def starts(code: stub.Code) -> None:
    """The start without a train, with one that is none, and the way into an application."""
    row = SECOND_STAGES[PARTS["G071"].pid]
    hello, nominal = len(wire.frame(Verb.HELLO | 0x80, 0, bytes(36))), round(row.clock_hz / 115200)

    def greets(b: Bench, first_s: float, last_s: float) -> None:
        before = b.uart.now_ns
        found = wire.greeting_of(exchange(b, b"", hello, last_s)[7:43])
        must((found.train, found.brr) == (0, nominal) and b.uart.now_ns - before >= first_s * 1e9)

    for times, rx, level in (
        (((0.045, 0.065), (0.095, 0.115)), row.rx, 1),
        (((0.045, 0.065), (0.095, 0.115)), row.rx, 0),  # the line is held low: as good as no train
        (((0.0, 0.015), (0.045, 0.065), (0.045, 0.065)), (0, 10), 1),  # it is told not to listen
    ):
        b = started("G071", code, row=dataclasses.replace(row, rx=rx))
        b.machine.level = level
        for first_s, last_s in times:
            greets(b, first_s, last_s)
    # Half and twice the rate that was agreed, and trains with a pause in one of the two measurements: none is believed.
    for rate, pieces in ((57600, (64,)), (230400, (64,)), (115200, (14, 26)), (115200, (27, 13))):
        b = started("G071", code)
        b.uart.set_format(Format(rate, "N"))
        for count in pieces:
            b.uart.send(b"\x55" * count)
            b.uart.pause(0.0001)
        b.uart.set_format(Format(115200, "N"))
        b.uart.inbox.clear()
        b.uart.pause(0.3)
        found = wire.greeting_of(bytes(b.uart.inbox[-hello:])[7:43])
        must((found.train, found.brr) == (0, nominal))
    b.greet()
    place = 0x20001000
    b.machine.write(place, struct.pack("<IIHH", 0x20001800, place + 9, 0xE7FE, 0xE7FE))
    must(exchange(b, wire.frame(Verb.GO, 1, ranges(place)), 11) == wire.frame(Verb.GO | 0x80, 1))
    b.uart.pause(0.01)
    must(b.machine.pc == place + 9 and b.machine.registers() == {"msp": 0x20001800, "primask": 0})
    must(b.machine.vectors == place and not b.machine.usart.on and not b.machine.systick[0x10])


def families(code: stub.Code) -> None:
    """What ``scenario`` cannot meet on an L4: bytes and half words, sectors by address, the second controller of an H7."""
    for name, number, sizes, bank2 in (("F103", 0, 1024, 0), ("F407", 1, 16384, 0), ("H743", 1, 131072, 0x08100000)):
        b = started(name, code, oscillator=0.98)
        b.uart.send(b"\x55" * 64)
        must(abs(b.greet().clock_hz(115200, 0) / b.row.clock_hz / 0.98 - 1) < 0.006)
        for start in filter(None, (FLASH + sizes, bank2 and bank2 + sizes)):
            erase = wire.erase([(start, number, sizes)], 4.0, 0.0)
            data = pattern(len(name), 64)
            first = wire.write(start + 64, data, 0.1)
            b.run(b.link.run([erase, first, first]))
            must(b.machine.flash.erases[-1:] == [start] and b.machine.flash.programmed <= 64 + 64)
            must(b.machine.flash_is(start, 192) == b"\xff" * 64 + data + b"\xff" * 64)
            b.machine.flash.fail_program[start + 128] = "wrong"
            told = refused(b, wire.frame(Verb.WRITE, 3, ranges(start + 128) + data))
            must(told == (3, 3, Reason.NOT_EQUAL, start + 128, 0))
            told = refused(b, wire.frame(Verb.WRITE, 3, ranges(start + 64) + bytes([data[0] ^ 1, *data[1:]])))
            must(told == (3, 3, Reason.NOT_BLANK, start + 64, 0))
            b.run(b.link.hello())
        if bank2:
            told = refused(b, wire.frame(Verb.WRITE, 0, ranges(bank2 - 32) + bytes(64)))
            must(told == (0, 0, Reason.BAD_ARGUMENT, bank2 - 32, 64))
            told = refused(b, wire.frame(Verb.WRITE, 0, ranges(bank2 - 16) + bytes(32)))
            must(told == (0, 0, Reason.BAD_ARGUMENT, bank2 - 16, 32))
        must(all(bank.locked for bank in b.machine.flash.banks) and b.machine.longest_watchdog_gap < 8192)


def survives(code: bytes) -> bool:
    changed = stub.Code(code, hashlib.sha256(code).hexdigest())
    try:
        scenario(changed)
        families(changed)
        starts(changed)
    except Exception:  # whatever it is, it was noticed: a wrong answer, a violation, or the emulator's own for wild code
        return False
    return True


def mutants(code: bytes, wanted: set[str]) -> Iterator[tuple[str, int, bytes]]:
    for name, spans in functions().items():
        for span in spans if not wanted or name in wanted else ():
            at = span.start
            while at < span.stop:
                changed, size = without(code, at)
                if code[at : at + size] not in PADDING:
                    yield name, at, changed
                at += size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stub.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--functions", default="", help="comma-separated; all without it")
    arguments = parser.parse_args()
    code = stub.load().code
    for each in (scenario, families, starts):
        each(stub.load())
    left, count = [], 0
    for name, at, changed in mutants(code, set(filter(None, arguments.functions.split(",")))):
        count += 1
        if survives(changed):
            left.append(f"{name}+{at:#x}")
            print(f"survives: {name} at {at + stub.CODE_OFFSET:#x}: {code[at : at + 2][::-1].hex()}", flush=True)
    percent = 100 * len(left) / max(1, count)
    print(f"{len(left)} of {count} mutants survive ({percent:.1f} %), at most {SURVIVORS_PERCENT} % may")
    return int(percent > SURVIVORS_PERCENT)


if __name__ == "__main__":
    sys.exit(main())
