"""Faults: their texts, and that each one does what it says at the place that it names, once."""

from __future__ import annotations

import pytest

from bridged.errors import BadRequest
from bridged.sim.device import Mode
from bridged.sim.faults import ByteFault, CellFault, EraseHang, Fault, Faults, StageFault, parse
from bridged.sim.virtual import VirtualUart
from tests.sim.dialogue import address, enter, erase, frame, make, read, synced, talk, write

BASE = 0x08000000


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("lose:rx:1234", ByteFault("lose", "rx", 1234)),
        ("lose:tx:0", ByteFault("lose", "tx", 0)),
        ("flip:tx:99:0x10", ByteFault("flip", "tx", 99, 0x10)),
        ("flip:rx:0x63", ByteFault("flip", "rx", 99, 1)),
        ("insert:tx:0:0xff", ByteFault("insert", "tx", 0, 0xFF)),
        ("insert:rx:3", ByteFault("insert", "rx", 3, 0)),
        ("reset:rx:100", ByteFault("reset", "rx", 100)),
        ("hang:rx:100", ByteFault("hang", "rx", 100)),
        ("power:rx:100", ByteFault("power", "rx", 100)),
        ("nack:0x31:5", StageFault("nack", 0x31, 5, "opcode", mask=0x80)),
        ("nack:0x31:5:data", StageFault("nack", 0x31, 5, "data", mask=0x80)),
        ("nack:0x31:5:data:*", StageFault("nack", 0x31, 5, "data", mask=0x80, repeated=True)),
        ("hang:0x44:0:list", StageFault("hang", 0x44, 0, "list", mask=0x80)),
        ("lose:0x11:2:length", StageFault("lose", 0x11, 2, "length", mask=0x80)),
        ("flip:0x11:2:address:1", StageFault("flip", 0x11, 2, "address", mask=1)),
        ("late:0x31:0:data:1.5", StageFault("late", 0x31, 0, "data", seconds=1.5)),
        ("erase-hang:2", EraseHang(2)),
        ("misprogram:0x08001000", CellFault("misprogram", 0x08001000)),
        ("misprogram:0x08001000:0x80:*", CellFault("misprogram", 0x08001000, 0x80, repeated=True)),
        ("misread:0x08001000", CellFault("misread", 0x08001000)),
    ],
)
def test_texts(text: str, fault: Fault) -> None:
    assert parse(text) == fault


@pytest.mark.parametrize(
    "text",
    [
        "", "lose", "lose:rx", "lose:up:3", "lose:rx:-1", "lose:rx:x", "lose:rx:1:2", "flip:rx:1:256", "flip:rx:1:2:3",
        "reset:tx:1", "power:tx:1", "nack:0x31", "nack:0x131:1", "nack:0x31:1:nowhere", "nack:0x31:1:data:2", "lose:0x31:1",
        "late:0x31:1:data", "late:0x31:1:data:x", "late:0x31:1:data:-1", "late:0x31:1:data:nan", "erase-hang", "erase-hang:x",
        "misprogram", "misprogram:zz", "misprogram:1:256", "explode:rx:1", "lose:rx:1:*", "erase-hang:1:*",
    ],
)  # fmt: skip
def test_texts_that_are_refused_with_their_words(text: str) -> None:
    with pytest.raises(BadRequest) as caught:
        parse(text)
    assert repr(text) in caught.value.message
    assert caught.value.facts["fault"] == text


def with_fault(*texts: str, chip: str = "F407") -> VirtualUart:
    return enter(make(chip, faults=texts))


def test_a_lost_byte_from_the_host_stalls_until_another_comes() -> None:
    uart = with_fault("lose:rx:2")
    talk(uart, "> 7F", "< 79", "> 00 FF", "< -", "> 00", "< 1f", "> 01 FE", "< 79 31 00 00 79")
    assert uart.device.faults.happened == [ByteFault("lose", "rx", 2)]


def test_a_flipped_byte_from_the_host_is_refused() -> None:
    talk(with_fault("flip:rx:1:0x04"), "> 7F", "< 79", "> 01 FE", "< 1f", "> 01 FE", "< 79 31 00 00 79")


def test_an_inserted_byte_shifts_the_frame() -> None:
    talk(with_fault("insert:rx:1:0x33"), "> 7F", "< 79", "> 01 FE", "< 1f", "> 01", "< 1f")


def test_a_glitch_before_the_first_byte_is_measured() -> None:
    uart = with_fault("insert:rx:0:0x00")
    talk(uart, "> 7F", "< -")
    assert uart.device.mode is Mode.DEAF


def test_lost_flipped_and_inserted_bytes_to_the_host() -> None:
    uart = with_fault("insert:tx:0:0x00", "lose:tx:1", "flip:tx:2:0x80", "flip:tx:4")
    talk(uart, "> 7F", "< 00 79", "> 01 FE", "< b1 00 01 79")


def test_a_reset_by_itself_at_a_byte() -> None:
    uart = with_fault("reset:rx:4")
    talk(uart, "> 7F", "< 79", "> 11 EE", "< 79", f"> {address(BASE)} sum", "< -")
    assert uart.device.stats.self_resets == 1
    talk(uart, "> 7F", "< 79")  # BOOT0 is still high


def test_a_power_failure_at_a_byte_lasts_until_power_is_cycled() -> None:
    uart = with_fault("power:rx:2")
    talk(uart, "> 7F", "< 79", "> 00 FF", "< -")
    assert uart.device.mode is Mode.OFF
    uart.set_lines(reset=True)
    uart.pause(0.1)
    uart.set_lines(reset=False)
    uart.pause(0.2)
    talk(uart, "> 7F", "< -")
    uart.set_lines(power=False)
    uart.pause(0.1)
    uart.set_lines(power=True)
    uart.pause(0.2)
    talk(uart, "> 7F", "< 79")


def test_a_hang_lasts_until_reset() -> None:
    uart = with_fault("hang:rx:3")
    talk(uart, "> 7F", "< 79", "> 01 FE", "< 79 31 00 00 79", "> 01 FE", "< -", "> 01 FE", "< -")
    synced(uart.device)


def test_a_refusal_at_one_stage_of_one_command() -> None:
    uart = with_fault("nack:0x01:1", "nack:0x31:0:data")
    talk(uart, "> 7F", "< 79", "> 01 FE", "< 79 31 00 00 79", "> 01 FE", "< 1f", "> 01 FE", "< 79 31 00 00 79")
    write(uart, BASE, b"\x11" * 4, last="1f")
    assert len(uart.device.faults.happened) == 2


def test_a_repeated_refusal_goes_on() -> None:
    uart = with_fault("nack:0x01:1:*")
    talk(uart, "> 7F", "< 79", "> 01 FE", "< 79 31 00 00 79", "> 01 FE", "< 1f", "> 01 FE", "< 1f")


def test_lost_changed_and_late_acks() -> None:
    uart = with_fault("lose:0x01:0:opcode", "flip:0x01:1:done:0x80", "late:0x01:2:opcode:3", "hang:0x01:3:done")
    talk(uart, "> 7F", "< 79", "> 01 FE", "< 31 00 00 79", "> 01 FE", "< 79 31 00 00 f9")
    uart.send(b"\x01\xfe")
    assert uart.receive(5, 2.9) == b""
    assert uart.receive(5, 0.2) == bytes.fromhex("7931000079")
    talk(uart, "> 01 FE", "< 79 31 00 00", "> 01 FE", "< -")


def test_an_erase_that_never_ends() -> None:
    uart = synced(make("F407", faults=["erase-hang:1"]))
    erase(uart, 0)
    talk(uart, "> 44 BB", "< 79", "> 00 00 00 01 sum", "< -")
    assert uart.device.hazard == "erase"


def test_cells_programmed_wrong_once_and_for_ever() -> None:
    for text, second in (("misprogram:0x08000002:0x10", 0xFF), ("misprogram:0x08000002:0x10:*", 0xEF)):
        uart = synced(make("F407", faults=[text]))
        write(uart, BASE, b"\xff" * 4)
        assert read(uart, BASE, 4) == b"\xff\xff\xef\xff"
        erase(uart, 0)
        write(uart, BASE, b"\xff" * 4)
        assert read(uart, BASE, 4) == bytes((0xFF, 0xFF, second, 0xFF))


def test_a_misread_leaves_the_flash_alone() -> None:
    uart = synced(make("F407", faults=["misread:0x08000002"]))
    assert read(uart, BASE, 4) == b"\xff\xff\xfe\xff"
    assert read(uart, BASE, 4) == b"\xff\xff\xff\xff"


def test_faults_can_be_added_later() -> None:
    faults = Faults()
    assert faults.next_bytes("rx", 10) == []
    faults.add("lose:rx:3")  # in the past: never happens
    faults.add("lose:rx:12")
    assert faults.next_bytes("rx", 5) == [(2, ByteFault("lose", "rx", 12))]
    assert faults.next_bytes("rx", 5) == []
    assert faults.happened == [ByteFault("lose", "rx", 12)]


def test_a_fault_in_the_middle_of_a_block_keeps_the_times_of_its_neighbours() -> None:
    ends = []
    for texts in ([], ["flip:rx:60:0x01"]):
        uart = synced(make("F407", faults=texts))
        talk(uart, "> 31 CE", "< 79", f"> {address(BASE)} sum", "< 79")
        uart.send(frame("ff " + "11 " * 256 + "sum"))
        uart.receive(1, 1)
        ends.append(uart.now_ns)
    assert ends[0] - ends[1] == 1_024_000  # refused: only the programming is missing
