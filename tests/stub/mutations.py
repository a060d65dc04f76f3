"""Every instruction of the second-stage loader taken out, one at a time: ``python -m tests.stub.mutations [--functions a,b]``.

A loader that lacks an instruction and passes ``scenario`` shows a hole in the tests or an instruction that is not needed. It
takes a quarter of an hour for the whole binary; ``make soak`` runs it. It fails when more than ``SURVIVORS_PERCENT`` survive,
and lists them with their function (``stub.map``), for a person to look at.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from bridged import stub
from bridged.errors import SecondStageFailed
from bridged.protocol import stub as wire
from bridged.protocol.flow import Flow, Receive, Send
from bridged.protocol.stub import Reason, Verb
from tests.stub.bench import Bench, bench, pattern

FLASH = 0x08000000
NOP = 0x46C0  # mov r8, r8: as good as none on ARMv6-M
SURVIVORS_PERCENT = 12.0
MAP = Path(stub.__file__).parent / "stub.map"


class Unexpected(Exception):
    """The loader did something else than it should."""


def must(condition: bool) -> None:
    if not condition:
        raise Unexpected


def functions() -> dict[str, range]:
    """Name to the bytes of the code that belong to it, literals included."""
    found: dict[str, range] = {}
    for line in MAP.read_text().splitlines():
        match = re.fullmatch(r"\s*([0-9a-f]+)\s+[0-9a-f]+\s+([0-9a-f]+)\s+1\s+(\w+)", line)
        if match and int(match[1], 16) & 1:
            start = int(match[1], 16) - 1 - stub.CODE_OFFSET
            found[match[3]] = range(start, start + int(match[2], 16))
    return found


def without(code: bytes, at: int) -> tuple[bytes, int]:
    """The code with the instruction at ``at`` taken out, and its length."""
    (first,) = struct.unpack_from("<H", code, at)
    size = 4 if first >> 11 in (0x1D, 0x1E, 0x1F) else 2
    return code[:at] + struct.pack("<H", NOP) * (size // 2) + code[at + size :], size


def exchange(b: Bench, data: bytes, count: int, timeout_s: float = 0.15) -> bytes:
    def flow() -> Flow[bytes]:
        yield Send(data)
        answer: bytes = yield Receive(count, timeout_s)
        return answer

    return b.run(flow())


def refusal(answer: bytes) -> wire.Refusal:
    must(len(answer) == 27 and answer[1] == Verb.NAK | 0x80)
    found = wire.refusal_of(wire.Answer(answer[1], answer[2], answer[7:23]))
    if found is None:
        raise Unexpected
    return found


def scenario(code: stub.Code, name: str = "L476") -> None:
    """Everything once, on blank and used flash, with faults of the line and of the flash. Raises when something is wrong."""
    b = bench(name, code=code, oscillator=1.02, started=False)
    greeting = wire.frame(Verb.HELLO | 0x80, 0, b"\0" * 36)
    heard = exchange(b, b"\x55" * 64, len(greeting))
    must(len(heard) == len(greeting) and wire.frame(Verb.HELLO | 0x80, 0, heard[7:43]) == heard)
    found = wire.greeting_of(heard[7:43])
    must(found.build == code.build and abs(found.clock_hz(115200, 0) / b.row.clock_hz / 1.02 - 1) < 0.006)
    must(found.cpuid == b.machine.part.cpuid and found.ccr == 0x200 and abs(found.brr - 496) <= 3)
    exchange(b, wire.frame(Verb.HELLO, 1), 47)
    page, data = 2048, pattern(1, 1024)

    # Erase, write twice, a duplicate, a gap, a spoilt frame, noise before a frame, a frame that ends early.
    erase = wire.frame(Verb.ERASE, 0, struct.pack("<III", FLASH + page, 1, page))
    ok = wire.frame(Verb.ERASE | 0x80, 0)
    must(exchange(b, erase, 11) == ok)
    must(exchange(b, erase, 11) == ok)
    must(b.machine.flash.erases == [FLASH + page])
    must(b.machine.flash_is(FLASH, page) == b"\x5a" * page and b.machine.flash_is(FLASH + 2 * page, 64) == b"\x5a" * 64)
    first = wire.frame(Verb.WRITE, 1, struct.pack("<I", FLASH + page) + data)
    must(exchange(b, first[:40] + b"!" + first[41:], 27) != b"" and b.machine.flash.programmed == 0)
    second = wire.frame(Verb.WRITE, 2, struct.pack("<I", FLASH + page) + data)
    gap = exchange(b, second, 1)
    must(gap == b"")  # told already
    must(exchange(b, b"\xa5\xa5x" + first, 11) == wire.frame(Verb.WRITE | 0x80, 1))
    must(exchange(b, second, 11) == wire.frame(Verb.WRITE | 0x80, 2))
    must(b.machine.flash.programmed == len(data) // 8)
    must(b.machine.flash_is(FLASH + page, page) == data + b"\xff" * (page - len(data)))
    must(refusal(exchange(b, first[:300], 27)).reason is Reason.PAUSE)
    b.uart.inbox.clear()
    other = wire.frame(Verb.WRITE, 3, struct.pack("<I", FLASH + page) + data[::-1])
    told = refusal(exchange(b, other, 27))
    must(told == wire.Refusal(3, Reason.NOT_BLANK, FLASH + page, 0))

    # The flash's own faults.
    at = FLASH + page + 1024
    for fault, reason in (("error", Reason.FLASH_ERROR), ("wrong", Reason.NOT_EQUAL)):
        b.machine.flash.fail_program[at] = fault
        told = refusal(exchange(b, wire.frame(Verb.WRITE, 3, struct.pack("<I", at) + data[:16]), 27))
        must((told.reason, told.where, told.detail) == (reason, at, 0x10 if fault == "error" else 0))
        at += 64
    for fault, reason in (("error", Reason.FLASH_ERROR), ("wrong", Reason.NOT_ERASED)):
        b.machine.flash.fail_erase[FLASH] = fault
        told = refusal(exchange(b, wire.frame(Verb.ERASE, 3, struct.pack("<III", FLASH, 0, page)), 27))
        must(told.reason is reason and told.expected == 3)

    # Arguments.
    for verb, payload in (
        (Verb.ERASE, struct.pack("<III", FLASH - page, 0, page)),
        (Verb.ERASE, struct.pack("<III", FLASH + 2, 0, page)),
        (Verb.ERASE, bytes(11)),
        (Verb.WRITE, struct.pack("<I", FLASH - 8) + data[:8]),
        (Verb.WRITE, struct.pack("<I", FLASH + 0x100000) + data[:8]),
        (Verb.WRITE, struct.pack("<I", FLASH + 0xFFFF8) + data[:16]),
        (Verb.WRITE, struct.pack("<I", at + 4) + data[:8]),
        (Verb.WRITE, struct.pack("<I", at) + data[:4]),
        (Verb.WRITE, b"123"),
        (Verb.FILL, bytes(8)),
        (Verb.CHECK, bytes(8)),
        (Verb.CHECK, struct.pack("<III", FLASH, 0x100001, 0)),
        (Verb.CRC, bytes(8)),
        (Verb.CRC, struct.pack("<III", FLASH, 4, 1026)),
        (Verb.READ, struct.pack("<II", FLASH, 4101)),
        (Verb.BAUD, bytes(8)),
    ):
        must(refusal(exchange(b, wire.frame(verb, 3, payload), 27)).reason is Reason.BAD_ARGUMENT)
    must(refusal(exchange(b, wire.frame(0x20, 3), 27)).reason is Reason.BAD_VERB)
    must(refusal(exchange(b, wire.frame(Verb.WRITE, 3, bytes(4101))[:30], 27)).reason is Reason.TOO_LONG)
    b.uart.pause(0.01)

    # What is left: fill, CRC, read, status, the other bank, rates, abort, reset.
    fill = struct.pack("<III", FLASH + page + 1536, 272, 0x5A)
    must(exchange(b, wire.frame(Verb.FILL, 3, fill), 11) == wire.frame(Verb.FILL | 0x80, 3))
    must(b.machine.flash_is(FLASH + page + 1528, 288) == b"\xff" * 8 + b"\x5a" * 272 + b"\xff" * 8)
    content = b.machine.flash_is(FLASH, 3 * page)
    good = struct.pack("<III", FLASH + 5, 3000, zlib.crc32(content[5:3005]))
    must(exchange(b, wire.frame(Verb.CHECK, 4, good), 11, 0.3) == wire.frame(Verb.CHECK | 0x80, 4))
    bad = struct.pack("<III", FLASH + 5, 3000, zlib.crc32(content[5:3005]) ^ 1)
    must(refusal(exchange(b, wire.frame(Verb.CHECK, 5, bad), 27, 0.3)) == wire.Refusal(5, Reason.NOT_EQUAL, FLASH + 5, 3000))
    sums = struct.pack("<3I", *(zlib.crc32(content[n * page : n * page + page]) for n in range(3)))
    asked = wire.frame(Verb.CRC, 9, struct.pack("<III", FLASH, page, 3))
    must(exchange(b, asked, 23, 0.3) == wire.frame(Verb.CRC | 0x80, 9, sums))
    asked = wire.frame(Verb.READ, 10, struct.pack("<II", FLASH + page - 3, 77))
    must(exchange(b, asked, 88) == wire.frame(Verb.READ | 0x80, 10, content[page - 3 : page + 74]))
    for number, bank2 in ((5, struct.pack("<III", FLASH + 0x80000, 256, page)),):
        must(exchange(b, wire.frame(Verb.ERASE, number, bank2), 11) == wire.frame(Verb.ERASE | 0x80, number))
    must(b.machine.flash.erases[-1] == FLASH + 0x80000)
    status = wire.status_of(exchange(b, wire.frame(Verb.STATUS, 1), 51)[7:47])
    must((status.expected, status.stopped, status.bad_frames, status.gaps) == (6, False, 1, 1))
    must(status.frames == 35 and status.bad_headers >= 1 and status.pauses == 1)
    b.link.baud = 115200
    must(b.run(b.link.change_rate(460800, 124)))
    must(not b.run(b.link.change_rate(230400, 124)))
    must(b.run(b.link.abort()).stopped)
    told = refusal(exchange(b, wire.frame(Verb.WRITE, 6, struct.pack("<I", FLASH) + data), 27))
    must(told.reason is Reason.STOPPED)
    must(all(bank.locked for bank in b.machine.flash.banks) and b.machine.longest_watchdog_gap < 8192)
    must(b.machine.stack_used() <= 256)
    exchange(b, wire.frame(Verb.GO, 1, bytes(4)), 11)
    b.uart.pause(0.01)
    must(b.machine.resets == 1 and not b.machine.usart.on)


def families(code: stub.Code) -> None:
    """What ``scenario`` cannot meet on an L4: bytes and half words, sectors by address, the second controller of an H7."""
    for name, number, sizes, bank2 in (("F103", 0, 1024, 0), ("F407", 1, 16384, 0), ("H743", 1, 131072, 0x08100000)):
        b = bench(name, code=code)
        for start in filter(None, (FLASH + sizes, bank2 and bank2 + sizes)):
            erase = wire.erase([(start, number, sizes)], 4.0, 0.0)
            data = pattern(len(name), 64)
            first = wire.write(start + 64, data, 0.1)
            b.run(b.link.run([erase, first, first]))
            must(b.machine.flash.erases[-1:] == [start] and b.machine.flash.programmed <= 64 + 64)
            must(b.machine.flash_is(start, 192) == b"\xff" * 64 + data + b"\xff" * 64)
            other = wire.write(start + 64, bytes([data[0] ^ 1, *data[1:]]), 0.1)
            try:
                b.run(b.link.run([other], 3))
                raise Unexpected
            except SecondStageFailed as error:
                must(error.facts == {"verb": "WRITE", "reason": "NOT_BLANK", "address": start + 64, "detail": 0})
            b.run(b.link.hello())
        if bank2:
            told = refusal(exchange(b, wire.frame(Verb.WRITE, 0, struct.pack("<I", bank2 - 32) + bytes(64)), 27))
            must(told == wire.Refusal(0, Reason.BAD_ARGUMENT, bank2 - 32, 64))
            told = refusal(exchange(b, wire.frame(Verb.WRITE, 0, struct.pack("<I", bank2 - 16) + bytes(32)), 27))
            must(told.reason is Reason.BAD_ARGUMENT)
        must(all(bank.locked for bank in b.machine.flash.banks))


def survives(code: bytes) -> bool:
    changed = stub.Code(code, hashlib.sha256(code).hexdigest())
    try:
        scenario(changed)
        families(changed)
    except Exception:  # whatever it is, it was noticed: a wrong answer, a violation, or the emulator's own for wild code
        return False
    return True


def mutants(code: bytes, wanted: set[str]) -> Iterator[tuple[str, int, bytes]]:
    for name, span in functions().items():
        at = span.start
        while at < span.stop and (not wanted or name in wanted):
            changed, size = without(code, at)
            yield name, at, changed
            at += size


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stub.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--functions", default="", help="comma-separated; all without it")
    arguments = parser.parse_args()
    code = stub.load().code
    scenario(stub.load())
    families(stub.load())
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
