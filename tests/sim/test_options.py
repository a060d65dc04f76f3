"""Option bytes and protection of the simulated part: strict, as the manuals have it, and never kinder than silicon."""

from __future__ import annotations

import pytest

from bridged.sim.device import Mode
from bridged.sim.virtual import VirtualUart
from tests.sim.dialogue import enter, make, synced, talk

BASE = 0x08000000


def words(*values: int) -> str:
    return " ".join(f"{v:02X}" for v in values)


def write_options(uart: VirtualUart, base: int, data: bytes) -> None:
    where = base.to_bytes(4, "big")
    talk(uart, "> 31 CE", "< 79", f"> {words(*where)} sum", "< 79", f"> {words(len(data) - 1, *data)} sum", "< 79")
    uart.pause(0.2)


@pytest.mark.parametrize(("part", "value"), [("0x410", 0xA5), ("F072", 0xAA), ("F303xC", 0xAA), ("L476", 0xAA)])
def test_level_0_is_stored_as_the_family_has_it(part: str, value: int) -> None:
    memory = make(part).memory
    assert memory._options[0][1][0] == value
    assert memory.rdp == 0
    memory._options[0][1][0] = 0xCC
    memory.load_options()
    assert memory.rdp == (1 if part == "0x410" else 2)  # An F1 has no level 2.


def test_complements_are_computed_whatever_the_host_sent() -> None:
    device = make("0x410")
    write_options(synced(device), 0x1FFFF800, bytes.fromhex("a500fe00 12001234 ff00ff00 ff00ff00"))
    assert bytes(device.memory._options[0][1]) == bytes.fromhex("a55afe01 12ed12ed ff00ff00 ff00ff00")
    assert device.stats.self_resets == 1


def test_a_short_write_leaves_the_rest_erased() -> None:
    """All option bytes are erased first: who writes a part of the block loses the other."""
    device = make("F756")
    assert device.memory.option("BOOT_ADD1") == 0x0040
    write_options(synced(device), 0x1FFF0000, bytes.fromhex("ffaa0055"))
    assert device.memory.option("BOOT_ADD1") == 0xFFFF
    enter(device)
    assert device.mode is Mode.DEAD


def test_a_loader_that_launches_nothing_has_the_old_ones_in_force_until_power_on() -> None:
    device = make("G071", loader_id=0xB2, options={"nBOOT_SEL": 0})
    uart = synced(device)
    block = bytearray(device.memory._options[0][1])
    block[3] |= 0x01  # nBOOT_SEL
    write_options(uart, 0x1FFF7800, bytes(block))
    assert (device.stats.self_resets, device.memory.option("nBOOT_SEL")) == (0, 0)
    assert device.memory._options[0][1][3] & 1
    uart.set_lines(power=False)
    uart.pause(0.1)
    uart.set_lines(power=True)
    assert device.memory.option("nBOOT_SEL") == 1


def test_one_protected_sector_keeps_a_mass_erase_from_doing_anything_and_nobody_is_told() -> None:
    device = make("F407")
    device.memory.load_flash(bytes(range(256)) * 4)
    device.memory.protect({11})
    device.memory.load_options()
    uart = synced(device)
    talk(uart, "> 44 BB", "< 79", "> FF FF 00", "< 79")
    assert device.stats.mass_erases == 0
    assert not device.memory.blank(BASE, BASE + 1024)


def test_the_regression_erases_everything_and_then_opens() -> None:
    device = make("F407", rdp=1)
    device.memory.load_flash(b"\x11" * 1024)
    device.memory.protect({0})
    device.memory.store_rdp(1)
    device.memory.load_options()
    device.memory.write_ram(0x20004000, b"secret")
    uart = synced(device)
    talk(uart, "> 92 6D", "< 79 79")
    uart.pause(2)
    assert (device.memory.rdp, device.hazard) == (1, "erase")
    uart.pause(80)
    assert device.memory.rdp == 0
    assert device.memory.blank(BASE, BASE + 1024)
    assert device.memory.protected == {0}, "write protection stays (RM0090)"
    assert device.memory.read(0x20004000, 6) == bytes(6)


def test_a_regression_that_is_cut_off_leaves_it_protected() -> None:
    device = make("F407", rdp=1)
    uart = synced(device)
    talk(uart, "> 92 6D", "< 79 79")
    uart.pause(2)
    uart.set_lines(reset=True)
    assert device.memory.rdp == 1
    assert device.stats.hazard_resets


def test_level_2_never_enters_the_loader() -> None:
    device = make("F407")
    write_options(synced(device), 0x1FFFC000, bytes.fromhex("efcc1033efcc1033ffff0000ffff0000"))
    assert device.memory.rdp == 2
    uart = enter(device)
    uart.send(b"\x7f")
    assert uart.receive(1, 0.5) == b""


@pytest.mark.parametrize(
    ("part", "at", "data", "protected"),
    [
        ("F407", 8, "feff", {0}),
        ("F446", 8, "0280", {1}),  # SPRMOD: ones are PCROP, which is write-protected as well
        ("0x410", 8, "fe", {0, 1, 2, 3}),
        ("F072", 14, "7f", {62, 63}),
        ("C011", 0x18, "02000300", {2, 3}),
        ("C011", 0x08, "0400", {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}),  # PCROP from a quarter page on
    ],
)
def test_what_the_bits_protect(part: str, at: int, data: str, protected: set[int]) -> None:
    memory = make(part).memory
    content = memory._options[0][1]
    content[at : at + len(data) // 2] = bytes.fromhex(data)
    if part == "C011" and at == 0x08:
        content[0x10:0x12] = (0x1FF).to_bytes(2, "little")
    memory.load_options()
    assert memory.protected == protected
    for code in protected:
        sector = memory.sectors[code]
        memory.program(sector.address, b"\x11" * 16)
        assert memory.blank(sector.address, sector.end)
