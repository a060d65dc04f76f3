"""Every command of the simulated ROM loader, byte by byte, with the deviations of parts and versions.

What must come is written down from AN3155 and AN2606, not computed by our host code. The dialogues are strict: any byte
more or less fails the test.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from bridged.chips import find
from bridged.sim.device import Mode
from bridged.sim.loader import Timing, crc32_mpeg, protocol_version
from bridged.sim.virtual import VirtualUart
from bridged.sim.wire import Format
from tests.sim.dialogue import address, bootable, enter, erase, frame, make, read, synced, talk, write

BASE = 0x08000000
FF = 0xFF


def flash(uart: VirtualUart, at: int, count: int) -> bytes:
    memory = uart.device.memory
    return bytes(memory.flash[at - memory.base : at - memory.base + count])


# --- information ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chip", "options", "answer"),
    [
        ("F407", {}, "79 0b 31 00 01 02 11 21 31 44 63 73 82 92 79"),
        ("0x410", {}, "79 0b 22 00 01 02 11 21 31 43 63 73 82 92 79"),
        ("F756", {"protocol": 0x33, "checksum": True}, "79 0c 33 00 01 02 11 21 31 44 63 73 82 92 a1 79"),
        ("H563", {}, "79 0a 40 00 01 02 11 21 31 44 50 63 73 79"),  # ten commands, neither 0x82 nor 0x92
        # Loader V9.0 of the H743 announces 13 commands and has 11.
        ("H743", {"loader_id": 0x90}, "79 0d 31 00 01 02 11 21 31 44 63 73 82 92 79"),
        ("H743", {"loader_id": 0xD3}, "79 0b 31 00 01 02 11 21 31 44 63 73 82 92 79"),
    ],
)
def test_get(chip: str, options: dict[str, Any], answer: str) -> None:
    device = make(chip, **options)
    uart = enter(device)
    if device.mode is Mode.DEAF:  # this version wants one more reset after power-up
        uart = enter(device)
    talk(uart, "> 7F", "< 79", "> 00 FF", f"< {answer}")


def test_get_version_and_get_id() -> None:
    talk(synced("L476"), "> 01 FE", "< 79 31 00 00 79", "> 02 FD", "< 79 01 04 15 79")


def test_loaders_of_another_family_speak_without_parity_and_name_the_product_last() -> None:
    device = make("0x3b")
    assert device.chip.parity == "N"
    talk(synced(device), "> 02 FD", "< 79 02 00 00 3b 79", "> 44 BB", "< 1f")


@pytest.mark.parametrize(
    ("text", "version"), [("2.2 (2.0 loader answers 2.0)", 0x22), ("3.1", 0x31), ("", 0x31), ("4.0", 0x40)]
)
def test_version_of_a_row(text: str, version: int) -> None:
    assert protocol_version(text) == version


# --- framing --------------------------------------------------------------------------------------------------------


def test_a_second_sync_byte_is_an_opcode_without_its_complement() -> None:
    uart = synced("F407")
    talk(uart, "> 7F", "< -")  # it waits, for ever
    uart.pause(3600)
    talk(uart, "> 7F", "< 1f", "> 01 FE", "< 79 31 00 00 79")


def test_unknown_opcodes_and_wrong_complements_are_refused() -> None:
    talk(synced("F407"), "> FF 00", "< 1f", "> 43 BC", "< 1f", "> A1 5E", "< 1f", "> 00 FE", "< 1f", "> 50 AF", "< 1f")


def test_there_is_no_timeout_between_bytes() -> None:
    uart = synced("F407")
    talk(uart, "> 11", "< -")
    uart.pause(86400)
    talk(uart, "> EE", "< 79", "> 08 00", "< -")
    uart.pause(86400)
    talk(uart, "> 00 00 08", "< 79", "> 00 FF", "< 79 ff")


def test_a_refused_stage_ends_the_command() -> None:
    uart = synced("F407")
    talk(uart, "> 11 EE", "< 79", "> 08 00 00 00 09", "< 1f", "> 01 FE", "< 79 31 00 00 79")
    talk(uart, "> 11 EE", "< 79", f"> {address(BASE)} sum", "< 79", "> 03 03", "< 1f", "> 02 FD", "< 79 01 04 13 79")


# --- read -----------------------------------------------------------------------------------------------------------


def test_read_of_everything_that_a_loader_shows() -> None:
    uart = synced("F407", flash_bytes=512 * 1024, loader_id=0x31, seed=4)
    memory = uart.device.memory
    memory.load_flash(bytes(range(256)))
    assert read(uart, BASE, 256) == bytes(range(256))
    assert read(uart, BASE + 3, 1) == b"\x03"
    assert read(uart, 0x1FFF7A22, 2) == (512).to_bytes(2, "little")
    assert read(uart, 0x1FFF7A10, 12) == memory.uid
    assert read(uart, 0x1FFF7A00, 256)[0x10:0x1C] == memory.uid
    assert read(uart, uart.device.chip.loader_id_address or 0, 1) == b"\x31"
    assert read(uart, 0x1FFFC001, 1) == b"\xaa"  # readout protection: level 0
    write(uart, 0x20004000, b"\x01\x02\x03\x04")
    assert read(uart, 0x20004000, 4) == b"\x01\x02\x03\x04"


@pytest.mark.parametrize("at", [0x00000000, 0x07FFFFFC, 0x08100000, 0x20000000, 0x40000000, 0xFFFFFFFC])
def test_read_where_nothing_may_be_read(at: int) -> None:
    talk(synced("F407"), "> 11 EE", "< 79", f"> {address(at)} sum", "< 1f")


def test_reading_beyond_the_end_of_flash_is_a_bus_fault() -> None:
    uart = synced("F407")
    talk(uart, "> 11 EE", "< 79", f"> {address(0x080FFFFC)} sum", "< 79", "> 07 F8", "< -", "> 00 FF", "< -")
    assert uart.device.mode is Mode.DEAD


# --- write: what the cells do ---------------------------------------------------------------------------------------


def test_f4_programs_only_from_one_to_zero() -> None:
    uart = synced("F407")
    write(uart, BASE, b"\xf0" * 8)
    write(uart, BASE, b"\x3c" * 4)
    assert flash(uart, BASE, 8) == b"\x30" * 4 + b"\xf0" * 4


def test_l4_refuses_a_programmed_word_and_everything_after_it() -> None:
    uart = synced("L476")
    write(uart, BASE, b"\x11" * 8)
    write(uart, BASE, b"\x10" * 8)
    assert flash(uart, BASE, 8) == b"\x11" * 8
    write(uart, BASE + 64, b"\x22" * 8)  # acknowledged all the same
    assert flash(uart, BASE + 64, 8) == b"\xff" * 8
    uart = synced(uart.device)  # a reset clears the error
    write(uart, BASE + 64, b"\x22" * 8)
    assert flash(uart, BASE + 64, 8) == b"\x22" * 8
    write(uart, BASE, bytes(8))  # zeros may always be written
    assert flash(uart, BASE, 8) == bytes(8)


def test_f1_skips_a_programmed_half_word_only() -> None:
    uart = synced("0x410")
    write(uart, BASE, b"\x11" * 4)
    write(uart, BASE, b"\x10" * 4 + b"\x22" * 4)
    assert flash(uart, BASE, 8) == b"\x11" * 4 + b"\x22" * 4


def test_h7_breaks_the_ecc_of_a_word_that_is_written_twice() -> None:
    uart = synced("H743", loader_id=0xD3)
    write(uart, BASE, b"\xff" * 32)  # programs the ECC of a blank word
    write(uart, BASE, b"\x22" * 32)
    assert flash(uart, BASE, 32) not in (b"\x22" * 32, b"\xff" * 32)
    write(uart, BASE + 32, b"\x33" * 8)  # part of a word: the rest is filled with 0xFF, and counts as written
    write(uart, BASE + 40, b"\x44" * 8)
    assert flash(uart, BASE + 40, 8) != b"\x44" * 8
    write(uart, BASE + 64, b"\x55" * 32)
    write(uart, BASE + 64, b"\x55" * 32)  # the same again has the same ECC
    assert flash(uart, BASE + 64, 32) == b"\x55" * 32
    erase(uart, 0)
    write(uart, BASE, b"\x22" * 32)
    assert flash(uart, BASE, 32) == b"\x22" * 32


def test_l0_erases_to_zero() -> None:
    uart = synced("L072")
    assert read(uart, BASE, 8) == bytes(8)
    write(uart, BASE, b"\x5a" * 8)
    write(uart, BASE, b"\xff" * 8)
    assert flash(uart, BASE, 8) == b"\x5a" * 8
    erase(uart, 0)
    assert flash(uart, BASE, 8) == bytes(8)


@pytest.mark.parametrize(
    ("chip", "align"),
    [("0x410", 4), ("F407", 4), ("L476", 8), ("F756", 8), ("G071", 4), ("H743", 8), ("H563", 16), ("U575", 16)],
)
def test_alignment_of_an2606_table_7(chip: str, align: int) -> None:
    """A write that is not aligned programs nothing, and so does every one after it; all are acknowledged."""
    good = b"\x11" * 32
    for at, data in ((BASE + align // 2, good), (BASE, good[: align + align // 2])):
        device = make(chip, options={"nBOOT_SEL": 0} if chip == "G071" else {})
        uart = synced(device)
        write(uart, BASE + 256, good)
        assert flash(uart, BASE + 256, 32) == good
        write(uart, at, data)
        write(uart, BASE + 512, good)
        assert flash(uart, BASE, 256) == b"\xff" * 256
        assert flash(uart, BASE + 512, 32) == b"\xff" * 32


def test_write_with_a_wrong_checksum_programs_nothing() -> None:
    uart = synced("F407")
    talk(uart, "> 31 CE", "< 79", f"> {address(BASE)} sum", "< 79", "> 03 01 02 03 04 00", "< 1f")
    assert flash(uart, BASE, 4) == b"\xff" * 4


@pytest.mark.parametrize("at", [0x1FFF0000, 0x1FFFC004, 0x20000000, 0x40023C00, 0x08100000])
def test_write_where_nothing_may_be_written(at: int) -> None:
    talk(synced("F407"), "> 31 CE", "< 79", f"> {address(at)} sum", "< 1f")


def test_filler_completes_a_write_whose_byte_was_lost_when_it_equals_it() -> None:
    """Why a host must not fill up with 0xFF: of 55 FF 01 02 the FF got lost; garbage is programmed, and acknowledged."""
    uart = synced("F407")
    talk(uart, "> 31 CE", "< 79", f"> {address(BASE)} sum", "< 79", "> 03 55 01 02 AA", "< -", "> FF", "< 79")
    assert flash(uart, BASE, 4) == b"\x55\x01\x02\xaa"


def test_time_of_programming() -> None:
    for seconds in (0.001, 0.05):
        uart = synced("F407", timing=Timing(program_s_per_256=seconds, reply_s=0))
        start = uart.now_ns
        uart.send(b"\x31\xce")
        assert uart.receive(1, 1) == b"\x79"
        uart.send(bytes.fromhex("0800000008"))
        assert uart.receive(1, 1) == b"\x79"
        uart.send(b"\xff" + bytes(256) + b"\xff")
        assert uart.receive(1, 1) == b"\x79"
        assert uart.now_ns - start == (2 + 1 + 5 + 1 + 258 + 1) * 95486 + round(seconds * 1e9)


def test_voltage_range_halves_erase_times_of_f2_f4_f7() -> None:
    seconds = {}
    for level in (0, 3):
        uart = synced("F407", timing=Timing(spread=0))
        write(uart, 0xFFFF0000, bytes((level, FF, FF, FF)))
        start = uart.now_ns
        erase(uart, 5)
        seconds[level] = (uart.now_ns - start) / 1e9
    assert seconds[3] == pytest.approx(seconds[0] / 2, abs=0.06)
    talk(synced("F407"), "> 31 CE", "< 79", "> FF FF 00 00 00", "< 79", "> 03 05 FF FF FF sum", "< 1f")
    talk(synced("L476"), "> 31 CE", "< 79", "> FF FF 00 00 00", "< 1f")


# --- erase ----------------------------------------------------------------------------------------------------------


def test_extended_erase_erases_exactly_the_listed_sectors_in_their_time() -> None:
    uart = synced("F407", timing=Timing(spread=0))
    uart.device.memory.load_flash(bytes(1 << 20))
    start = uart.now_ns
    erase(uart, 1, 5)
    assert (uart.now_ns - start) / 1e9 == pytest.approx(0.4 + 2.0, abs=0.06)
    blank = [s.code for s in uart.device.memory.map.sectors if uart.device.memory.blank(s.address, s.end)]
    assert blank == [1, 5]
    assert uart.device.stats.erases == {1: 1, 5: 1}


def test_times_of_erases_are_drawn_within_their_limits() -> None:
    uart = synced("F407", seed=9)
    times = []
    for _ in range(20):
        start = uart.now_ns
        erase(uart, 1)
        times.append((uart.now_ns - start) / 1e9 - 0.05)
    assert 0.28 < min(times) < max(times) <= 0.8
    assert len({round(t, 4) for t in times}) > 10


def test_erase_of_the_older_loaders() -> None:
    uart = synced("0x410")
    uart.device.memory.load_flash(bytes(128 * 1024))
    talk(uart, "> 43 BC", "< 79", "> 01 00 02 sum", "< 79")
    assert [s.code for s in uart.device.memory.map.sectors if uart.device.memory.blank(s.address, s.end)] == [0, 2]
    talk(uart, "> 43 BC", "< 79", "> FF 01", "< 79")  # acknowledged, and nothing happens
    assert uart.device.stats.mass_erases == 0
    talk(uart, "> 43 BC", "< 79", "> 00 05 00", "< 1f")
    talk(uart, "> 43 BC", "< 79", "> FF 00", "< 79")
    assert uart.device.memory.blank(BASE, BASE + 128 * 1024)


@pytest.mark.parametrize("code", range(0xFFF0, 0xFFFD))
def test_reserved_codes_of_extended_erase(code: int) -> None:
    talk(synced("L476"), "> 44 BB", "< 79", f"> {code.to_bytes(2, 'big').hex(' ')} sum", "< 1f")


def test_mass_and_bank_erase() -> None:
    uart = synced("L476")
    memory = uart.device.memory
    half = BASE + 512 * 1024
    memory.load_flash(bytes(1 << 20))
    talk(uart, "> 44 BB", "< 79", "> FF FD 02", "< 79")
    assert memory.blank(half, BASE + (1 << 20))
    assert not memory.blank(half - 1, half)
    talk(uart, "> 44 BB", "< 79", "> FF FE 01", "< 79")
    assert memory.blank(BASE, half)
    talk(synced("F407"), "> 44 BB", "< 79", "> FF FE 01", "< 1f")  # one bank
    talk(synced("L072"), "> 44 BB", "< 79", "> FF FF 00", "< 1f")  # no mass erase on L0


def test_mass_erase_times() -> None:
    for seconds in (0.6, 20.0):
        uart = synced("F407", timing=Timing(mass_erase_s=seconds))
        talk(uart, "> 44 BB", "< 79")
        uart.send(b"\xff\xff\x00")
        assert uart.receive(1, seconds - 0.001) == b""
        assert uart.receive(1, 0.01) == b"\x79"
    uart = synced("F407", timing=Timing(mass_erase_s=None))
    talk(uart, "> 44 BB", "< 79", "> FF FF 00", "< -")
    assert uart.device.hazard == "erase"


def test_only_the_last_581_numbers_of_a_long_list_count() -> None:
    uart = synced("0x422")
    memory = uart.device.memory
    memory.load_flash(bytes(256 * 1024))
    codes = [0, 1, *[3000] * 579, 5, 6]
    erase(uart, *codes)
    assert [s.code for s in memory.map.sectors if memory.blank(s.address, s.end)] == [5, 6]


def test_numbers_without_a_sector_and_protected_sectors_are_skipped_in_silence() -> None:
    uart = synced("F407")
    memory = uart.device.memory
    memory.load_flash(bytes(1 << 20))
    memory.protected = {1}
    erase(uart, 0, 1, 77)
    assert memory.blank(BASE, BASE + 16 * 1024)
    assert not memory.blank(BASE + 16 * 1024, BASE + 32 * 1024)
    write(uart, BASE + 16 * 1024, b"\x11" * 4)
    assert flash(uart, BASE + 16 * 1024, 4) == bytes(4)


def test_a_wrong_count_stalls_the_loader_until_the_bytes_come() -> None:
    uart = synced("F407")
    talk(uart, "> 44 BB", "< 79", "> 00 02 00 01 00 02 01", "< -", "> 00 02", "< 1f")


def test_one_sector_per_erase_where_the_loader_has_that_fault() -> None:
    """G07x loader V11.3: of a list one page is erased, and that is not awaited; both are acknowledged at once."""
    uart = synced("G071", loader_id=0xB3, options={"nBOOT_SEL": 0})
    memory = uart.device.memory
    memory.load_flash(bytes(128 * 1024))
    erase(uart, 2, 3)
    assert uart.device.hazard == "erase" or memory.blank(BASE + 4096, BASE + 6144)
    uart.pause(1)
    assert [s.code for s in memory.map.sectors if memory.blank(s.address, s.end)] == [2]


def test_h743_v9_1_answers_before_the_erase_is_over_and_hangs_when_touched_then() -> None:
    device = make("H743", loader_id=0x91)
    uart = enter(device)
    if device.mode is Mode.DEAF:
        uart = enter(device)
    talk(uart, "> 7F", "< 79")
    device.memory.load_flash(bytes(2 << 20))
    last = device.memory.map.sectors[-1]
    erase(uart, last.code)
    assert device.hazard == "erase"
    assert not device.memory.blank(last.address, last.end)
    talk(uart, "> 11 EE", "< 79", f"> {address(BASE)} sum", "< 79", "> 00 FF", "< -")
    assert device.mode is Mode.DEAD


# --- protection -----------------------------------------------------------------------------------------------------


def test_readout_protection_leaves_four_commands() -> None:
    uart = synced("F407", rdp=1)
    for refused in ("11 EE", "21 DE", "31 CE", "44 BB", "63 9C", "73 8C", "82 7D"):
        uart.send(bytes.fromhex(refused))
        assert set(uart.drain(0.05, 1)) == {0x1F}
    talk(uart, "> 00 FF", "< 79 0b 31 00 01 02 11 21 31 44 63 73 82 92 79", "> 01 FE", "< 79 31 00 00 79")
    talk(uart, "> 02 FD", "< 79 01 04 13 79")


def test_two_nacks_where_the_loader_sends_them() -> None:
    talk(synced("F407", rdp=1, loader_id=0x31), "> 11 EE", "< 1f 1f", "> 44 BB", "< 1f")


def test_a_bad_address_without_nack_where_the_loader_sends_none() -> None:
    uart = synced("F407", loader_id=0x30)
    talk(
        uart,
        "> 11 EE",
        "< 79",
        f"> {address(0x40000000)} sum",
        "< -",
        "> 00 FF",
        "< 79 0b 31 00 01 02 11 21 31 44 63 73 82 92 79",
    )


def test_protect_and_unprotect_reset_the_chip() -> None:
    device = make("F407")
    device.memory.load_flash(bootable(device.chip))
    uart = synced(device)
    talk(uart, "> 82 7D", "< 79 79")
    uart.pause(0.2)
    assert device.memory.rdp == 1
    assert device.stats.self_resets == 1
    talk(uart, "> 7F", "< 79", "> 11 EE", "< 1f")
    talk(synced(device), "> 92 6D", "< 79 79")  # both before anything is erased
    assert not device.memory.blank(BASE, BASE + 4)
    assert device.hazard == "erase"
    uart = VirtualUart(device)
    uart.pause(70)
    assert device.memory.rdp == 0
    assert device.memory.blank(BASE, BASE + (1 << 20))
    talk(uart, "> 7F", "< 79", "> 11 EE", "< 79")


def test_write_protection_is_silent() -> None:
    device = make("F407")
    uart = synced(device)
    talk(uart, "> 63 9C", "< 79", "> 01 00 01 sum", "< 79")
    uart.pause(0.3)
    assert device.memory.protected == {0, 1}
    talk(uart, "> 7F", "< 79")
    write(uart, BASE, b"\x11" * 4)
    assert flash(uart, BASE, 4) == b"\xff" * 4
    talk(uart, "> 73 8C", "< 79 79")
    uart.pause(0.3)
    talk(uart, "> 7F", "< 79")
    write(uart, BASE, b"\x11" * 4)
    assert flash(uart, BASE, 4) == b"\x11" * 4


def test_option_bytes_are_written_as_a_whole_and_reset_the_chip() -> None:
    """The forum's recipe for the F756: BOOT_ADD0 = 0x0040 reaches the loader with the pin low, and never the application."""
    device = make("F756")
    device.memory.load_flash(bootable(device.chip))
    uart = synced(device)
    options = bytearray(read(uart, 0x1FFF0000, 32))
    assert options[0x10:0x14] == bytes.fromhex("80007fff")
    assert options[0x18:0x1C] == bytes.fromhex("4000bfff")
    options[0x10:0x14] = bytes.fromhex("4000bfff")
    write(uart, 0x1FFF0000, bytes(options))
    uart.set_lines(boot0=False)
    for _ in range(2):
        uart.set_lines(reset=True)
        uart.pause(0.02)
        uart.set_lines(reset=False)
        uart.pause(0.5)
        assert device.mode is Mode.MEASURING


def test_a_reset_during_an_option_write_leaves_a_part_that_no_pin_brings_to_the_loader() -> None:
    device = make("F756")
    uart = synced(device)
    options = read(uart, 0x1FFF0000, 32)
    talk(uart, "> 31 CE", "< 79", f"> {address(0x1FFF0000)} sum", "< 79")
    uart.send(frame(f"1f {options.hex(' ')} sum"))
    assert device.hazard == "option bytes"
    uart.pause(0.01)
    uart = enter(device)
    assert device.stats.hazard_resets[0][1] == "reset during option bytes"
    assert device.mode is Mode.DEAD


def test_level_2_never_enters_the_loader() -> None:
    device = make("F407", rdp=2)
    enter(device)
    assert device.mode is Mode.DEAD


# --- go, checksum, special ------------------------------------------------------------------------------------------


def test_go_starts_the_application() -> None:
    device = make("F407")
    device.memory.load_flash(bootable(device.chip))
    uart = synced(device)
    talk(uart, "> 21 DE", "< 79")
    uart.send(bytes.fromhex("0800000008"))
    assert uart.receive(1, 1) == b"\x79"
    uart.set_format(Format(115200, "N"))
    assert uart.drain(0.1, 1) == b"hello\r\n"
    assert device.mode is Mode.APPLICATION


def test_an_application_at_8n1_is_garbled_for_a_host_at_8e1() -> None:
    device = make("F407")
    device.memory.load_flash(bootable(device.chip))
    uart = synced(device)
    uart.send(b"\x21\xde\x08\x00\x00\x00\x08")
    found = uart.drain(0.1, 1)
    assert found.startswith(b"\x79\x79")
    assert len(found) > 3
    assert b"hello" not in found


def test_go_to_nowhere_is_refused() -> None:
    talk(synced("F407"), "> 21 DE", "< 79", f"> {address(0x40000000)} sum", "< 1f")


def test_go_into_ram_calls_whoever_plays_the_code_there() -> None:
    jumps: list[int] = []
    uart = synced("F407", on_go=lambda _, at: jumps.append(at))
    talk(uart, "> 21 DE", "< 79", f"> {address(0x20003000)} sum", "< 79")
    assert jumps == [0x20003000]


def test_checksum_on_the_target() -> None:
    uart = synced("F407", checksum=True, protocol=0x33)
    data = random.Random(1).randbytes(64)
    uart.device.memory.load_flash(data)
    crc = crc32_mpeg(data).to_bytes(4, "big")
    head = ("> A1 5E", "< 79", f"> {address(BASE)} sum", "< 79")
    talk(
        uart, *head, "> 00 00 00 10 sum", "< 79", "> 04 C1 1D B7 sum", "< 79", "> FF FF FF FF sum", "< 79",
        f"< 79 {crc.hex(' ')} {crc[0] ^ crc[1] ^ crc[2] ^ crc[3]:02x}",
    )  # fmt: skip
    talk(uart, *head, "> 00 00 00 00 00", "< 1f")


def test_crc_of_the_crc_unit() -> None:
    """The value that ST's examples give for one word."""
    assert crc32_mpeg((0x12345678).to_bytes(4, "little")) == 0xDF8A8A2B


def test_special_commands_are_refused_unless_the_family_has_them() -> None:
    talk(synced("H563"), "> 50 AF", "< 79", "> 00 05 05", "< 1f", "> 51 AE", "< 1f")
    talk(synced("U575"), "> 50 AF", "< 79", "> 00 82 82", "< 79", "> 00 04 00 00 00 01 sum", "< 79 00 00 00 01 00 79")


def test_ram_of_a_loader_that_damages_it() -> None:
    uart = synced("L476", loader_id=0x92)
    broken = any(q.quirk.value == "ram-write-broken" and 0x92 in q.loader_ids for q in find("L476").quirks)
    write(uart, 0x20004000, b"\x11" * 8)
    assert (read(uart, 0x20004000, 8) != b"\x11" * 8) is broken
