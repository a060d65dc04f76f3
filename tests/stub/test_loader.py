"""The shipped binary in emulation, driven by the flows of ``protocol.stub``: each verb, each refusal, on each part.

Whatever a test does, a violation of the models' rules on the way fails it (``Bench.run``).
"""

from __future__ import annotations

import dataclasses
import struct
import zlib
from collections.abc import Sequence
from random import Random

import pytest

from bridged.chips.model import Range
from bridged.chips.second_stage import FLASH_F4_X32, SECOND_STAGES
from bridged.errors import SecondStageFailed
from bridged.protocol import stub as wire
from bridged.protocol.flow import Flow, Hazard, Now, Progress, Receive, Send
from bridged.protocol.stub import Command, Reason, Verb
from bridged.sim.virtual import VirtualUart, run
from bridged.sim.wire import Format
from bridged.target.second_stage import make_upload, rate_near, sector_code
from tests.stub.bench import ALL, Bench, bench, noise, pattern
from tests.stub.machine import Machine
from tests.stub.parts import PARTS

FLASH = 0x08000000
FAST = dataclasses.replace(SECOND_STAGES[0x413], flash=FLASH_F4_X32)  # F407 at 2.7 V and more
WATCHDOG_INSTRUCTIONS = 8192  # the shortest useful window of an independent watchdog is milliseconds


def erases(b: Bench, start: int, count: int) -> list[Command]:
    return [
        wire.erase([(s.address, sector_code(b.row, b.flash, s), s.size_bytes)], 2 * s.erase_max_s, 2 * s.erase_max_s)
        for s in b.flash.sectors_in(start, start + count)
    ]


def writes(b: Bench, start: int, data: bytes) -> list[Command]:
    step = b.row.block_bytes
    return [wire.write(start + at, data[at : at + step], 1.0) for at in range(0, len(data), step)]


def crc(b: Bench, start: int, count: int) -> int:
    return b.run(b.link.crc_map(start, count, 1, byte_s=5e-6))[0]


def refused(b: Bench, commands: Sequence[Command], first: int = 0) -> SecondStageFailed:
    with pytest.raises(SecondStageFailed) as caught:
        b.run(b.link.run(commands, first))
    return caught.value


# --- the start


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("oscillator", [0.97, 1.0, 1.03])
def test_it_greets_and_measures_its_clock(name: str, oscillator: float) -> None:
    b = bench(name, oscillator=oscillator)
    greeting = b.greet()
    assert (greeting.protocol, greeting.build) == (1, b.upload.build)
    assert (greeting.ring_bytes, greeting.cpuid) == (b.row.ring_bytes, PARTS[name].cpuid)
    assert greeting.block_max == b.row.block_bytes + 4
    assert greeting.clock_hz(115200, 0) == pytest.approx(b.row.clock_hz * oscillator, rel=0.006)
    assert b.machine.usart.format.baud == pytest.approx(115200, rel=0.012)


def test_without_a_train_it_keeps_the_nominal_rate_and_greets_again_and_again() -> None:
    b = bench("F407", started=False)
    b.uart.pause(0.6)
    heard = b.uart.drain(0.01, 0.2)
    assert heard.count(b.upload.build) == 6, "at once, and then after 50 ms of waiting for a train and 50 ms of listening"
    assert b.greet().train == 0


def test_a_train_with_a_pause_in_it_is_not_believed() -> None:
    b = bench("F407", oscillator=1.02, started=False)
    b.uart.send(b"\x55" * 20)  # 256 bits are measured
    b.uart.pause(0.003)
    b.uart.send(b"\x55" * 20)
    assert b.greet().train == 0


def test_what_is_no_train_is_not_believed() -> None:
    """A square wave that is an eighth off is somebody else's."""
    b = bench("F407", started=False)
    b.uart.set_format(Format(90000, "N"))
    b.uart.send(b"\x55" * 64)
    b.uart.set_format(Format(115200, "N"))
    assert b.greet().train == 0


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shift", [0x4, 0x100, 0x5FC])
def test_it_runs_wherever_it_is_put(name: str, shift: int) -> None:
    row = SECOND_STAGES[PARTS[name].pid]
    ring = row.ring_bytes if name not in ("F103", "G071") else row.ring_bytes // 2
    b = bench(name, row=dataclasses.replace(row, ram=Range(row.ram.start + shift, row.ram.end), ring_bytes=ring))
    data = pattern(shift, 1024)
    b.run(b.link.run([*erases(b, FLASH, 1024), *writes(b, FLASH, data)]))
    assert b.machine.flash_is(FLASH, 1024) == data


# --- flash


@pytest.mark.parametrize("name", ALL)
def test_erase_write_and_proof(name: str) -> None:
    b = bench(name, oscillator=0.985)
    count = 5 * 1024 + 64
    data = pattern(7, count)
    sectors = b.flash.sectors_in(FLASH, FLASH + count)
    assert b.run(b.link.run([*erases(b, FLASH, count), *writes(b, FLASH, data)])) == len(sectors) + -(
        -count // b.row.block_bytes
    )
    assert b.machine.flash_is(FLASH, count) == data
    end = sectors[-1].end
    assert b.machine.flash_is(FLASH + count, end - FLASH - count) == b"\xff" * (end - FLASH - count)
    assert b.machine.flash_is(end, 256) == b"\x5a" * 256, "the neighbour is as it was"
    assert crc(b, FLASH, count) == zlib.crc32(data)
    assert b.machine.flash.erases == [s.address for s in sectors]
    assert all(bank.locked for bank in b.machine.flash.banks)
    assert b.machine.stack_used() <= 256
    assert b.machine.longest_watchdog_gap <= WATCHDOG_INSTRUCTIONS


@pytest.mark.parametrize(("name", "start"), [("L476", 0x08080000), ("H743", 0x08100000)])
def test_the_second_bank(name: str, start: int) -> None:
    b = bench(name)
    data = pattern(3, 4096)
    b.run(b.link.run([*erases(b, start, 4096), *writes(b, start, data)]))
    assert b.machine.flash_is(start, 4096) == data
    assert b.machine.flash_is(FLASH, 4096) == b"\x5a" * 4096
    assert b.machine.flash.erases == [s.address for s in b.flash.sectors_in(start, start + 4096)]


@pytest.mark.parametrize("name", ALL)
def test_what_is_there_is_not_programmed_again(name: str) -> None:
    data = pattern(9, 2048)
    b = bench(name, content=data)
    b.run(b.link.run(writes(b, FLASH, data)))
    assert b.machine.flash.programmed == 0
    changed = bytes([data[0] ^ 1]) + data[1:]
    error = refused(b, writes(b, FLASH, changed), len(writes(b, FLASH, data)))
    assert (error.facts["reason"], error.facts["address"]) == ("NOT_BLANK", FLASH)
    assert b.machine.flash.programmed == 0
    assert b.machine.flash_is(FLASH, 2048) == data


@pytest.mark.parametrize("name", ALL)
def test_fill(name: str) -> None:
    b = bench(name)
    commands = [*erases(b, FLASH, 1024), wire.write(FLASH + 64, b"\x00" * 640, 1.0)]
    assert commands[-1].verb is Verb.FILL
    b.run(b.link.run(commands))
    assert b.machine.flash_is(FLASH, 1024) == b"\xff" * 64 + b"\0" * 640 + b"\xff" * 320


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("fault", "reason"), [("error", "FLASH_ERROR"), ("wrong", "NOT_EQUAL"), ("stuck", "NOT_EQUAL")])
def test_a_word_that_does_not_take_is_told_and_what_follows_is_not_written(name: str, fault: str, reason: str) -> None:
    b = bench(name)
    step, unit = 256, b.machine.flash.UNIT
    at = FLASH + step + 4 * unit
    b.run(b.link.run(erases(b, FLASH, 3 * step)))
    b.machine.flash.fail_program[at] = fault
    data = bytes(n % 251 for n in range(3 * step))
    commands = [wire.write(FLASH + n, data[n : n + step], 0.1) for n in range(0, 3 * step, step)]
    error = refused(b, commands, len(erases(b, FLASH, 3 * step)))
    assert (error.facts["reason"], error.facts["address"]) == (reason, at)
    assert (error.facts["detail"] == b.machine.flash.ONE_FOR_REFUSAL) is (reason == "FLASH_ERROR")
    assert b.machine.flash_is(FLASH, step) == data[:step]
    assert b.machine.flash_is(at + unit, 2 * step - 4 * unit - unit) == b"\xff" * (2 * step - 5 * unit)
    # The error is cleared before the next command: the sector is erased again and everything goes well.
    b.greet()
    b.run(b.link.run([*erases(b, FLASH, 3 * step), *commands]))
    assert b.machine.flash_is(FLASH, 3 * step) == data


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("fault", "reason"), [("error", "FLASH_ERROR"), ("wrong", "NOT_ERASED")])
def test_an_erase_that_fails_is_told_and_nothing_is_programmed(name: str, fault: str, reason: str) -> None:
    b = bench(name)
    b.machine.flash.fail_erase[FLASH] = fault
    error = refused(b, [*erases(b, FLASH, 1024), *writes(b, FLASH, pattern(2, 1024))])
    assert (error.facts["verb"], error.facts["reason"]) == ("ERASE", reason)
    assert b.machine.flash.programmed == 0
    assert b.account.hazards[-1][1] == 0, "the loader said that it stopped, so the hazard is over"


def test_behind_a_check_that_fails_nothing_is_carried_out() -> None:
    """It is how a stream may go on right behind the first erase, which must have been the right one."""
    content = pattern(5, 3 * 2048)
    b = bench("L476", content=content)
    beside = content[4096:4352]
    stream = [
        *erases(b, FLASH + 2048, 2048),
        wire.check(FLASH + 2048, b"\xff" * 256, 0.1),
        wire.check(FLASH + 4096, beside, 0.1),
    ]
    b.run(b.link.run([*stream, *writes(b, FLASH + 2048, pattern(6, 1024))]))
    assert b.machine.flash_is(FLASH + 2048, 1024) == pattern(6, 1024)
    b.greet()
    wrong = wire.check(FLASH + 4096, beside[:-1] + bytes([beside[-1] ^ 1]), 0.1)
    error = refused(b, [wrong, *writes(b, FLASH + 3072, pattern(7, 1024)), *erases(b, FLASH, 2048)])
    assert error.facts == {"verb": "CHECK", "reason": "NOT_EQUAL", "address": FLASH + 4096, "detail": 256}
    assert b.machine.flash_is(FLASH + 3072, 1024) == b"\xff" * 1024
    assert b.machine.flash.erases == [FLASH + 2048]


BAD = [
    wire.erase([(FLASH - 0x1000, 0, 2048)], 1.0, 1.0),
    wire.erase([(FLASH + 2, 0, 2048)], 1.0, 1.0),
    wire.erase([(FLASH, 0, 0x7FFFFFFF)], 1.0, 1.0),
    Command(Verb.ERASE, b"\0" * 13, 1.0),
    wire.write(FLASH - 32, b"\1" * 32, 1.0),
    wire.write(0x20000000, b"\1" * 32, 1.0),
    wire.write(FLASH + 0x200000 - 32, pattern(1, 64), 1.0),
    Command(Verb.WRITE, b"\0\0", 1.0),
    Command(Verb.FILL, struct.pack("<II", FLASH, 32), 1.0),
    Command(Verb.CHECK, struct.pack("<III", FLASH, 0x7FFFFFFF, 0), 1.0),
    Command(Verb.CHECK, struct.pack("<II", FLASH, 32), 1.0),
    Command(Verb.FILL, struct.pack("<III", FLASH, 0xFFFFFFE0, 0), 1.0),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_range_that_is_not_flash_is_refused(number: int) -> None:
    b = bench("H743")
    error = refused(b, [BAD[number]])
    assert error.facts["reason"] == "BAD_ARGUMENT"
    assert b.machine.flash.erases == []
    assert b.machine.flash.programmed == 0


@pytest.mark.parametrize(("name", "count"), [("F103", 3), ("L476", 4), ("G071", 12), ("H743", 48)])
def test_half_a_unit_is_refused(name: str, count: int) -> None:
    b = bench(name)
    b.run(b.link.run(erases(b, FLASH, 64)))
    first = len(erases(b, FLASH, 64))
    assert refused(b, [wire.write(FLASH, bytes(range(count)), 1.0)], first).facts["reason"] == "BAD_ARGUMENT"
    unit = b.machine.flash.UNIT
    assert refused(b, [wire.write(FLASH + unit // 2, bytes(range(unit)), 1.0)], first).facts["reason"] == "BAD_ARGUMENT"
    assert b.machine.flash_is(FLASH, 64) == b"\xff" * 64


def test_a_range_across_two_controllers_is_refused() -> None:
    b = bench("H743")
    assert refused(b, [wire.write(0x08100000 - 32, pattern(1, 64), 1.0)]).facts["reason"] == "BAD_ARGUMENT"


def test_x32_is_four_times_as_fast() -> None:
    times = []
    for row in (SECOND_STAGES[0x413], FAST):
        b = bench("F407", row=row, content=b"\xff" * 0x100000)
        before = b.uart.now_ns
        b.run(b.link.run([wire.write(FLASH, pattern(1, 1024), 1.0)]))
        times.append(b.uart.now_ns - before - 1039 * b.uart.format.byte_ns)
        assert b.machine.flash_is(FLASH, 1024) == pattern(1, 1024)
    assert 2.5 < times[0] / times[1] < 4.5


# --- questions


@pytest.mark.parametrize("name", ALL)
def test_crc_map_and_read(name: str) -> None:
    content = pattern(11, 16384)
    b = bench(name, content=content)
    found = b.run(b.link.crc_map(FLASH + 1024, 1024, 8, byte_s=5e-6))
    assert found == [zlib.crc32(content[at : at + 1024]) for at in range(1024, 9 * 1024, 1024)]
    assert b.run(b.link.read(FLASH + 5, 999)) == content[5:1004]


def test_too_much_at_once_is_refused() -> None:
    b = bench("F103")
    for flow in (b.link.crc_map(FLASH, 4, 258, byte_s=1e-6), b.link.read(FLASH, 1029), b.link.ask(Verb.READ, b"1234567")):
        with pytest.raises(SecondStageFailed, match="BAD_ARGUMENT"):
            b.run(flow)
    with pytest.raises(SecondStageFailed, match="TOO_LONG"):
        b.run(b.link.ask(Verb.READ, bytes(1029)))


def test_a_verb_that_does_not_exist_is_refused() -> None:
    b = bench("F103")

    def ask() -> Flow[bytes]:
        yield Send(wire.frame(0x20, 7))
        answer: bytes = yield Receive(27, 1.0)
        return answer

    heard = b.run(ask())
    assert wire.head_of(heard[:7]) == (Verb.NAK | 0x80, 7, 16)
    refusal = wire.refusal_of(wire.Answer(heard[1], heard[2], heard[7:23]))
    assert refusal is not None
    assert refusal.reason is Reason.BAD_VERB


def test_after_abort_nothing_is_changed_until_hello() -> None:
    b = bench("L476", content=b"\xff" * 4096)
    assert b.run(b.link.abort()).stopped
    assert refused(b, writes(b, FLASH, pattern(1, 64))).facts["reason"] == "STOPPED"
    assert b.machine.flash.programmed == 0
    b.greet()
    b.run(b.link.run(writes(b, FLASH, pattern(1, 64))))
    assert b.machine.flash_is(FLASH, 64) == pattern(1, 64)


def test_go_resets() -> None:
    b = bench("G071")
    b.run(b.link.ask(Verb.GO, struct.pack("<I", 0)))
    b.uart.pause(0.01)
    assert b.machine.resets == 1


def test_go_to_an_application() -> None:
    """It runs with its own stack, interrupts enabled, and the loader's USART off."""
    place = 0x20001000
    b = bench("L476")
    code = struct.pack("<IIHH", 0x20001800, place + 9, 0xE7FE, 0xE7FE)  # an endless loop
    b.machine.write(place, code)
    b.run(b.link.ask(Verb.GO, struct.pack("<I", place)))
    b.uart.pause(0.01)
    assert b.machine.pc == place + 9
    assert b.machine.registers() == {"msp": 0x20001800, "primask": 0}
    assert not b.machine.usart.on


# --- the rate


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("baud", [230400, 460800, 921600])
def test_another_rate(name: str, baud: int) -> None:
    b = bench(name, oscillator=1.01)
    clock = b.greet().clock_hz(115200, 0)
    chosen, brr = rate_near(clock, baud)
    assert chosen == pytest.approx(baud, rel=0.035)
    assert b.run(b.link.change_rate(chosen, brr))
    assert b.machine.usart.format.baud == pytest.approx(chosen, rel=0.015)
    data = pattern(baud, 4096)
    b.run(b.link.run([*erases(b, FLASH, 4096), *writes(b, FLASH, data)]))
    assert b.machine.flash_is(FLASH, 4096) == data
    assert b.machine.usart.overrun is False


def test_a_rate_that_the_line_does_not_carry_is_left_again() -> None:
    b = bench("F756")
    before = b.machine.usart.format.baud
    assert not b.run(b.link.change_rate(460800, 30)), "BRR of another rate than the host's"
    assert b.machine.usart.format.baud == before
    assert b.uart.format.baud == 115200
    b.run(b.link.run([*erases(b, FLASH, 64), *writes(b, FLASH, bytes(range(64)))]))
    assert b.machine.flash_is(FLASH, 64) == bytes(range(64))


# --- accidents


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for seed, name in enumerate(ALL)])
def test_a_line_that_spoils_one_frame_in_ten(name: str, seed: int) -> None:
    """Both directions. One byte in 20,000 is changed, lost or doubled; more often in short answers."""
    row = SECOND_STAGES[PARTS[name].pid]
    b = bench(name, row=dataclasses.replace(row, flash=FLASH_F4_X32) if name in ("F407", "F756") else row)
    b.machine.drop_or_flip = noise(seed, 20_000)
    b.machine.spoil_answers = noise(seed + 100, 150)
    count = 16 * 1024
    data = pattern(seed, count)
    b.run(b.link.run([*erases(b, FLASH, count), *writes(b, FLASH, data)]))
    assert b.machine.flash_is(FLASH, count) == data
    assert crc(b, FLASH, count) == zlib.crc32(data)
    assert b.machine.flash.erases == [s.address for s in b.flash.sectors_in(FLASH, FLASH + count)], "none twice"


class Spoil:
    """Changes byte number ``at`` of what comes: ``lost``, ``flipped`` or ``doubled``."""

    def __init__(self, at: int, how: str) -> None:
        self.at, self.how = at, how

    def __call__(self, number: int, value: int) -> bytes:
        if number != self.at:
            return bytes([value])
        return {"lost": b"", "flipped": bytes([value ^ 0x10]), "doubled": bytes([value, value])}[self.how]


@pytest.mark.parametrize("how", ["lost", "flipped", "doubled"])
def test_each_byte_of_a_small_job_may_be_spoilt(how: str) -> None:
    """Every position of every frame, there and back (of the other two ways every third)."""
    data = [pattern(1, 16), pattern(2, 16)]
    plain = bench("L476", content=b"\xff" * 2048, started=False)
    plain.greet()
    start_in, start_out = plain.machine.in_bytes, plain.machine.out_bytes
    commands = [wire.write(FLASH + 16 * n, piece, 0.1) for n, piece in enumerate(data)]
    plain.run(plain.link.run(commands))
    for side, first, last in (
        ("drop_or_flip", start_in, plain.machine.in_bytes),
        ("spoil_answers", start_out, plain.machine.out_bytes),
    ):
        assert last - first >= 22
        for at in range(first, last, 1 if how == "lost" else 3):
            b = bench("L476", content=b"\xff" * 2048, started=False)
            b.greet()
            setattr(b.machine, side, Spoil(at, how))
            b.run(b.link.run(commands))
            assert b.machine.flash_is(FLASH, 48) == b"".join(data) + b"\xff" * 16, (side, at)


def test_a_frame_that_ends_early_is_asked_for_again() -> None:
    b = bench("F103", content=b"\xff" * 4096)
    cut = wire.frame(Verb.WRITE, 0, struct.pack("<I", FLASH) + pattern(1, 512))[:300]

    def half_a_frame() -> Flow[bytes]:
        yield Send(cut)
        answer: bytes = yield Receive(11 + 16, 1.0)
        return answer

    heard = b.run(half_a_frame())
    refusal = wire.refusal_of(wire.Answer(heard[1], heard[2], heard[7:23]))
    assert refusal is not None
    assert refusal.reason is Reason.PAUSE
    b.run(b.link.run(writes(b, FLASH, pattern(1, 512))))
    assert b.machine.flash_is(FLASH, 512) == pattern(1, 512)
    assert b.run(b.link.status()).pauses == 1


def test_a_gap_is_told_once_and_closed() -> None:
    b = bench("F103", content=b"\xff" * 8192)
    frames = [wire.frame(Verb.WRITE, n, struct.pack("<I", FLASH + 64 * n) + pattern(n, 64)) for n in range(4)]

    def without_the_second() -> Flow[bytes]:
        yield Send(frames[0] + frames[2] + frames[3])
        answers: bytes = yield Receive(200, 0.2)
        return answers

    heard = b.run(without_the_second())
    assert len(heard) == 11 + 27, "an answer to the first, one NAK for both others"
    assert b.run(b.link.status()).gaps == 2
    commands = [wire.write(FLASH + 64 * n, pattern(n, 64), 0.1) for n in range(4)]
    b.run(b.link.run(commands))
    assert b.machine.flash_is(FLASH, 256) == b"".join(pattern(n, 64) for n in range(4))


def test_two_spoilt_frames_under_way_are_sent_again_once() -> None:
    """Each is refused. Were all sent anew for each refusal, a long window on a bad line would cause more of them than it
    answers, and never end."""
    data = pattern(3, 8192)
    b = bench("L476", content=data)
    commands = [wire.write(FLASH + at, data[at : at + 256], 0.1) for at in range(0, len(data), 256)]
    size, first = len(wire.frame(Verb.WRITE, 0, bytes(260))), b.machine.in_bytes
    spoilt = {first + size * n + 50 for n in (3, 9, 20)}
    b.machine.drop_or_flip = lambda number, value: bytes([value ^ (number in spoilt)])
    b.run(b.link.run(commands))
    assert b.link.resent == len(commands) - 3
    assert b.run(b.link.status()).bad_frames == 3


def test_a_line_that_never_falls_silent_is_given_up() -> None:
    """An application that prints for ever, or a loader at another rate: each byte may begin a frame, and none does."""
    now, noise = 0.0, Random(1)

    def talk() -> None:
        nonlocal now
        flow = wire.Link(115200, 4096).hello()
        answer: object = None
        while now < 60:
            step = flow.send(answer)
            answer = now if isinstance(step, Now) else None
            if isinstance(step, Receive):
                now += step.count * 10 / 115200
                answer = bytes(noise.choice((0xA5, noise.randrange(256))) for _ in range(step.count))

    with pytest.raises(SecondStageFailed, match="did not answer HELLO, asked 6 times"):
        talk()
    assert now < 6 * 1.0


def test_hazards_cover_every_erase_that_is_under_way() -> None:
    b = bench("L476")
    b.run(b.link.run([*erases(b, FLASH, 6144), *writes(b, FLASH, pattern(1, 6144))]))
    each = b.flash.sectors[0].erase_max_s * 2
    values = [round(seconds / each) for _, seconds in b.account.hazards]
    assert values == [1, 2, 3, 2, 1, 0], "one more with each that is sent, one less with each answer"


def test_progress_is_told_in_order() -> None:
    b = bench("L476", content=b"\xff" * 8192)
    seen: list[int] = []

    def told(done: int) -> wire.Told:
        return lambda _seconds: [Progress(done)]

    commands = [wire.write(FLASH + 64 * n, pattern(n, 64), 0.1, told(64 * (n + 1))) for n in range(8)]
    b.machine.drop_or_flip = noise(4, 300)
    run(b.link.run(commands), b.uart, progress=seen.append)
    assert seen == [64 * n for n in range(1, 9)]


def test_many_answers_to_what_was_sent_twice_are_no_failure() -> None:
    """After a lost answer the whole window is sent again, and each of its frames is answered with the same old number."""
    stale = wire.frame(Verb.WRITE | 0x80, 255)
    coming = stale * 60 + wire.frame(Verb.WRITE | 0x80, 0)
    flow = wire.Link(115200, 4096).run([wire.write(FLASH, b"12345678", 0.1)])
    answer: object = None
    result: object = None
    for _ in range(10_000):
        try:
            step = flow.send(answer)
        except StopIteration as ended:
            result = ended.value
            break
        answer = None
        if isinstance(step, Receive):
            answer, coming = coming[: step.count], coming[step.count :]
        elif isinstance(step, Now):
            answer = 1.0
    assert result == 1
    assert coming == b""


def test_a_loader_that_greets_and_does_not_hear_is_given_up() -> None:
    """Its greetings come for ever, and each is a good frame."""
    b = bench("F407", started=False)
    b.machine.drop_or_flip = lambda _number, _value: b""
    before = b.uart.now_ns
    with pytest.raises(SecondStageFailed, match="did not answer HELLO"):
        b.greet()
    assert b.uart.now_ns - before < 4e9


def test_a_line_that_is_dead_is_given_up() -> None:
    b = bench("F407")
    b.machine.drop_or_flip = lambda _number, _value: b""
    assert "not carried out" in refused(b, writes(b, FLASH, pattern(1, 64))).message
    with pytest.raises(SecondStageFailed, match="did not answer STATUS"):
        b.run(b.link.status())


# --- the models are sharp


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("H743", {"ram": Range(0x20004100, 0x20020000), "ring_bytes": 32768}, "DMA: cannot reach 0x2000"),
        ("F407", {"ram": Range(0x10000000, 0x10010000), "ring_bytes": 32768}, "DMA: cannot reach 0x1000"),
        ("L476", {"flash": SECOND_STAGES[0x413].flash}, "access to 0x40023c0c"),
        ("G071", {"flash": dataclasses.replace(SECOND_STAGES[0x460].flash, lock=0)}, "locked"),
        ("H743", {"flash": dataclasses.replace(SECOND_STAGES[0x450].flash, unit_bytes=8)}, "not carried out"),
        ("F407", {"flash": dataclasses.replace(FLASH_F4_X32, program=1)}, "store of 4 bytes"),
        ("L476", {"flash": dataclasses.replace(SECOND_STAGES[0x415].flash, busy=0)}, "while busy"),
        ("F103", {"flash": dataclasses.replace(SECOND_STAGES[0x410].flash, erase=0)}, "start without erase"),
    ],
)
def test_a_wrong_row_does_not_pass(name: str, change: dict[str, object], complaint: str) -> None:
    part = PARTS[name]
    row = dataclasses.replace(SECOND_STAGES[part.pid], **change)  # type: ignore[arg-type]
    b = bench(name, row=row, started=False)

    def work() -> None:
        b.greet()
        b.run(b.link.run([*erases(b, FLASH, 2048), *writes(b, FLASH, pattern(1, 2048))]))

    with pytest.raises((AssertionError, SecondStageFailed), match=complaint):
        work()


def test_the_image_fits_its_ram_or_is_refused() -> None:
    from bridged import chips, stub
    from bridged.errors import Unsupported

    row = SECOND_STAGES[0x410]
    flash = chips.by_pid(0x410).flash_map(128 * 1024)
    with pytest.raises(Unsupported, match="bytes of RAM"):
        make_upload(dataclasses.replace(row, ram=Range(0x20000200, 0x20002000)), flash, 115200, stub.load())
    with pytest.raises(Unsupported, match="cannot be made"):
        make_upload(row, flash, 3_000_000, stub.load())


def test_reset_in_the_machine_is_what_virtual_time_expects() -> None:
    """The machine is a device for ``sim.virtual``: its own lines, and what works while a reset would do damage."""
    b = bench("F407")
    assert isinstance(b.machine, Machine)
    assert isinstance(b.uart, VirtualUart)
    b.uart.send(wire.frame(Verb.ERASE, 0, struct.pack("<III", FLASH, 0, 16384)))
    b.uart.pause(0.1)
    assert b.machine.hazard == "erase"
    b.uart.pause(0.5)
    assert b.machine.hazard == ""
    assert Hazard(0).seconds == 0
