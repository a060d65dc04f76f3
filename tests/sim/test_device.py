"""The simulated chip around its loader: start, boot choice, synchronisation, receiver, resets, application.

Facts from AN2606 (activation patterns, start-up times, rate errors) and AN3155; times are exact.
"""

from __future__ import annotations

from typing import Any

import pytest

from bridged.chips import find
from bridged.sim.application import Behaviour
from bridged.sim.boot import LOADER, NOTHING, Pins, Start, decide
from bridged.sim.device import Device, Mode
from bridged.sim.loader import Timing
from bridged.sim.memory import Memory, Rule
from bridged.sim.virtual import VirtualUart
from bridged.sim.wire import Format
from tests.sim.dialogue import address, bootable, enter, erase, frame, make, read, synced, talk, write

BASE = 0x08000000
FLASH = Start(loader=False, address=BASE)
APP = Format(115200, "N")


def mode_of(device: Device) -> Mode:
    """For the type checker: it takes a mode that was asserted once as one that stays."""
    return device.mode


# --- start ----------------------------------------------------------------------------------------------------------


def released(device: Device, **options: Any) -> VirtualUart:
    """BOOT0 high, reset just released."""
    uart = VirtualUart(device, **options)
    uart.set_lines(reset=True, boot0=True)
    uart.pause(0.02)
    uart.set_lines(reset=False)
    return uart


@pytest.mark.parametrize(("chip", "startup_s"), [("F407", None), ("L476", None), ("L476", 2.56), ("H7A3", None)])
def test_nobody_listens_before_the_start_up_time(chip: str, startup_s: float | None) -> None:
    device = make(chip, timing=Timing(startup_s=startup_s))
    expected = device.chip.startup_s[0] if startup_s is None else startup_s
    uart = released(device)
    uart.pause(expected - 0.0005)
    assert mode_of(device) is Mode.STARTING
    uart.send(b"\x7f")  # lost, and over before the loader listens
    uart.pause(0.0005)
    assert mode_of(device) is Mode.MEASURING
    assert device.stats.ignored == 1
    talk(uart, "> 7F", "< 79")


def test_a_byte_half_over_when_the_loader_begins_to_listen_makes_it_deaf() -> None:
    device = make("F407", timing=Timing(startup_s=0.05))
    uart = released(device)
    uart.pause(0.05 - 0.00005)
    talk(uart, "> 7F", "< -", "> 7F", "< -")
    assert mode_of(device) is Mode.DEAF
    synced(device)


def test_the_boot_pin_counts_when_reset_is_released() -> None:
    device = make("F407")
    device.memory.load_flash(bootable(device.chip))
    uart = VirtualUart(device, APP)
    uart.set_lines(reset=True, boot0=True)
    uart.pause(0.02)
    uart.set_lines(boot0=False)
    uart.set_lines(reset=False)
    uart.set_lines(boot0=True)
    assert uart.drain(0.1, 1) == b"hello\r\n"
    assert mode_of(device) is Mode.APPLICATION


# --- what is started ------------------------------------------------------------------------------------------------


def chosen(chip: str, boot0: bool, options: dict[str, int] | None = None, boot1: bool = False, empty: bool = False) -> Start:
    device = make(chip, options=options or {})
    pattern = int("".join(c for c in device.chip.activation_pattern.split(",")[0] if c.isdigit()))
    return decide(pattern, Pins(boot0, boot1), device.memory.option, empty, BASE)


@pytest.mark.parametrize(
    ("chip", "options", "low", "high"),
    [
        ("F407", {}, FLASH, LOADER),
        ("L476", {"nBOOT1": 0}, FLASH, NOTHING),
        ("G071", {}, FLASH, FLASH),  # nBOOT_SEL is 1 from the factory: the pin is ignored
        ("G071", {"nBOOT_SEL": 0}, FLASH, LOADER),
        ("G071", {"nBOOT_SEL": 1, "nBOOT0": 0}, LOADER, LOADER),
        ("G071", {"nBOOT_SEL": 0, "BOOT_LOCK": 1}, FLASH, FLASH),
        ("G431", {}, FLASH, LOADER),
        ("G431", {"nSWBOOT0": 0}, FLASH, FLASH),
        ("G431", {"BOOT_LOCK": 1}, FLASH, FLASH),
        ("F756", {}, FLASH, LOADER),
        ("F756", {"BOOT_ADD0": 0x0040}, LOADER, LOADER),
        ("F756", {"BOOT_ADD1": 0xFFFF}, FLASH, Start(loader=False, address=0xFFFF << 14)),
        ("F756", {"BOOT_ADD0": 0x2018}, Start(loader=False, address=0x08060000), LOADER),
        ("H743", {}, FLASH, LOADER),
        ("H743", {"BOOT_ADD1": 0x0040}, FLASH, NOTHING),  # an F7 value on an H7: no memory there
        ("H563", {}, FLASH, LOADER),
        ("U575", {"nSWBOOT0": 0, "nBOOT0": 0}, LOADER, LOADER),
    ],
)
def test_activation_patterns(chip: str, options: dict[str, int], low: Start, high: Start) -> None:
    assert chosen(chip, False, options) == low
    assert chosen(chip, True, options) == high


def test_boot1_sends_the_older_families_to_sram() -> None:
    assert chosen("F407", True, boot1=True) == NOTHING
    assert chosen("F407", False, boot1=True) == FLASH


def test_the_empty_flag_is_latched_at_power_on_only() -> None:
    """After the first flash of a virgin part a reset still leads to the loader, until the power is cycled."""
    device = make("G071", loader_id=0xB2)
    uart = VirtualUart(device)
    uart.pause(0.1)
    talk(uart, "> 7F", "< 79")  # virgin: BOOT0 is low, the loader runs
    image = bootable(device.chip)
    for at in range(0, len(image), 256):
        write(uart, BASE + at, image[at : at + 256])
    for cycle, mode in (("reset", Mode.MEASURING), ("power", Mode.APPLICATION)):
        uart.set_lines(reset=True if cycle == "reset" else None, power=False if cycle == "power" else None)
        uart.pause(0.5)
        uart.set_lines(reset=False, power=True)
        uart.pause(0.5)
        assert mode_of(device) is mode


def test_where_the_loader_clears_the_empty_flag_a_reset_before_programming_hangs() -> None:
    device = make("G071", loader_id=0xB3)
    uart = VirtualUart(device)
    uart.pause(0.1)
    assert mode_of(device) is Mode.MEASURING
    uart.set_lines(reset=True)
    uart.pause(0.02)
    uart.set_lines(reset=False)
    uart.pause(0.1)
    assert mode_of(device) is Mode.DEAD
    synced(make("G071", loader_id=0xB3, options={"nBOOT_SEL": 0}))


def test_h743_v9_0_may_need_one_more_reset_after_power_up() -> None:
    device = make("H743", loader_id=0x90, powered=False)
    device.set_lines(0, boot0=True, power=True)
    uart = VirtualUart(device)
    uart.pause(0.2)
    talk(uart, "> 7F", "< -")
    talk(enter(device), "> 7F", "< 79")


# --- synchronisation ------------------------------------------------------------------------------------------------


def test_the_answer_to_the_first_byte_is_exact() -> None:
    uart = enter(make("F407", timing=Timing(sync_reply_s=0.0002)))
    start = uart.now_ns
    uart.send(b"\x7f")
    assert uart.receive(1, 0.15) == b"\x79"
    assert uart.now_ns - start == 95486 + 200_000 + 95486


@pytest.mark.parametrize("first", [0x00, 0x55, 0x79, 0xFF])
def test_any_other_first_byte_leaves_the_loader_deaf_until_reset(first: int) -> None:
    device = make("F407")
    uart = enter(device)
    talk(uart, f"> {first:02x}", "< -", "> 7F", "< -", "> 7F", "< -")
    assert mode_of(device) is Mode.DEAF
    synced(device)


def test_a_glitch_while_measuring_leaves_the_loader_deaf() -> None:
    device = make("H743", loader_id=0xD3)
    uart = enter(device)
    device.glitch(uart.now_ns)
    talk(uart, "> 7F", "< -")
    synced(device)


@pytest.mark.parametrize(("baud", "answers"), [(1200, True), (600, False), (115200, True), (230400, True), (921600, False)])
def test_rates_that_a_software_loader_measures(baud: int, answers: bool) -> None:
    uart = enter(make("F407"), Format(baud, "E"))
    uart.send(b"\x7f")
    assert (uart.receive(1, 0.5) == b"\x79") is answers


def test_hardware_measures_faster_rates_and_f378_none_above_57600() -> None:
    synced(make("H743", loader_id=0xD3), Format(921600, "E"))
    f378 = make("0x432")
    assert f378.chip.max_baud == 57600
    talk(enter(f378), "> 7F", "< -")
    synced(f378, Format(57600, "E"))


def test_the_rate_is_drawn_anew_at_every_reset_and_hardware_has_no_error() -> None:
    device = make("F756", rate_error=None, seed=1)
    errors = []
    for _ in range(200):
        uart = enter(device)
        uart.send(b"\x7f")
        uart.drain(0.01, 0.1)
        errors.append(device.baud / 115200 - 1)
    assert len(set(errors)) == 200
    assert 0.03 < max(map(abs, errors)) <= 0.06
    device = make("H743", rate_error=None, loader_id=0xD3)
    uart = synced(device)
    assert device.baud == 115200


def test_a_wrong_rate_looks_like_noise_and_a_reset_cures_it() -> None:
    seen = set()
    for seed in range(120):
        uart = enter(make("F756", rate_error=None, seed=seed))
        uart.send(b"\x7f")
        answer = uart.drain(0.02, 0.1)
        good = answer == b"\x79"
        if good:
            uart.send(b"\x00\xff")
            good = uart.drain(0.02, 0.1)[:2] == b"\x79\x0b"
        seen.add(good)
        assert len(answer) <= 2
    assert seen == {True, False}  # most seeds work, a few per cent do not


def test_errors_shrink_with_the_rate() -> None:
    for seed in range(60):
        uart = enter(make("F756", rate_error=None, seed=seed), Format(38400, "E"))
        talk(uart, "> 7F", "< 79", "> 01 FE", "< 79 31 00 00 79")


def test_the_rate_is_measured_once_and_another_rate_is_not_understood() -> None:
    uart = synced("H743", loader_id=0xD3)
    uart.set_format(Format(57600, "E"))
    uart.send(b"\x00\xff")
    assert b"\x79" not in uart.drain(0.05, 1)
    talk(synced(uart.device, Format(57600, "E")), "> 01 FE", "< 79 31 00 00 79")


# --- parity ---------------------------------------------------------------------------------------------------------


def test_without_parity_sync_works_and_get_is_refused() -> None:
    """A mini UART: 0x7F and 0x79 have parity bit 1, which looks like the stop bit; 0x00 has 0."""
    uart = enter(make("F407"), wire_parity="N")
    talk(uart, "> 7F", "< 79")
    uart.send(b"\x00\xff")
    assert uart.drain(0.05, 1)[:1] == b"\x1f"
    assert uart.device.stats.parity_errors


def test_without_parity_a_slow_get_id_works_and_a_fast_one_does_not() -> None:
    uart = enter(make("F407"), wire_parity="N")
    talk(uart, "> 7F", "< 79")
    uart.send(b"\x02")
    uart.pause(0.005)
    uart.send(b"\xfd")
    assert uart.drain(0.05, 1)[:1] == b"\x79"
    uart = enter(make("F407"), wire_parity="N")
    talk(uart, "> 7F", "< 79")
    uart.send(b"\x02\xfd")
    assert uart.drain(0.05, 1)[:1] == b"\x1f"


def test_a_pty_cannot_tell_parity() -> None:
    talk(synced("F407", Format(115200, "?")), "> 00 FF", "< 79 0b 31 00 01 02 11 21 31 44 63 73 82 92 79")


# --- the one-byte receiver ------------------------------------------------------------------------------------------


def test_bytes_during_an_erase_are_lost_except_the_first() -> None:
    uart = synced("F407")
    talk(uart, "> 44 BB", "< 79")
    uart.send(frame("00 00 00 01 sum"))
    uart.pause(0.01)
    uart.send(bytes.fromhex("31 ce 08 00 00 00 08"))
    assert uart.account.overruns == 7
    assert uart.receive(1, 10) == b"\x79"
    # 0x31 waited in the data register: the loader now wants its complement.
    talk(uart, "> 02", "< 1f", "> 02 FD", "< 79 01 04 13 79")


def test_bytes_during_programming_are_lost() -> None:
    uart = synced("F407", timing=Timing(program_s_per_256=0.02))
    talk(uart, "> 31 CE", "< 79", f"> {address(BASE)} sum", "< 79")
    uart.send(frame("ff " + "00 " * 256 + "sum"))
    uart.send(b"\x31\xce")
    assert uart.account.overruns == 2
    assert uart.receive(1, 1) == b"\x79"


def test_sending_ahead_of_one_ack_just_works_and_ahead_of_an_answer_does_not() -> None:
    uart = synced("F407")
    uart.send(frame(f"11 EE {address(BASE)}") + b"\x08\x00\xff")
    assert uart.drain(0.05, 1) == b"\x79\x79\x79\xff"
    assert uart.account.overruns == 0
    uart.send(frame(f"11 EE {address(BASE)}") + b"\x08\xff\x00" + b"\x01\xfe\x00\xff")
    assert uart.drain(0.05, 1).startswith(b"\x79\x79\x79" + b"\xff" * 256)
    assert uart.account.overruns == 3


# --- resets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.95])
def test_a_reset_in_the_middle_of_an_erase_leaves_an_undefined_sector(fraction: float) -> None:
    device = make("F407", timing=Timing(sector_erase_s=2.0))
    old = bytes(range(256)) * 64
    device.memory.load_flash(old * 2)
    uart = synced(device)
    talk(uart, "> 44 BB", "< 79")
    uart.send(frame("00 00 00 01 sum"))
    uart.pause(2.0 * fraction)
    uart = synced(device)
    assert device.stats.hazard_resets == [(device.stats.hazard_resets[0][0], "reset during erase")]
    assert device.memory.marginal == {1}
    assert read(uart, BASE, 256) == bytes(range(256))  # sector 0 is untouched
    assert read(uart, BASE + 16384, 256) != bytes(range(256))
    erase(uart, 1)
    assert not device.memory.marginal


def test_a_reset_in_the_middle_of_programming_leaves_the_words_before() -> None:
    device = make("L476", timing=Timing(program_s_per_256=0.01))
    uart = synced(device)
    talk(uart, "> 31 CE", "< 79", f"> {address(BASE)} sum", "< 79")
    uart.send(frame("ff " + "11 " * 256 + "sum"))
    uart.pause(0.005)
    uart = synced(device)
    found = read(uart, BASE, 256)
    assert found[:120] == b"\x11" * 120
    assert found[136:] == b"\xff" * 120
    assert device.stats.hazard_resets == []


def test_a_reset_cuts_an_answer() -> None:
    device = make("F407")
    uart = synced(device)
    talk(uart, "> 11 EE", "< 79", f"> {address(BASE)} sum", "< 79")
    uart.send(b"\xff\x00")
    uart.pause(0.005)
    uart.set_lines(reset=True)
    got = uart.drain(0.1, 1)
    assert got.startswith(b"\x79\xff")
    assert 40 < len(got) < 60


def test_power_loss_wipes_ram_and_keeps_flash() -> None:
    device = make("F407")
    uart = synced(device)
    write(uart, 0x20004000, b"\x11" * 4)
    write(uart, BASE, b"\x22" * 4)
    uart.set_lines(power=False)
    uart.pause(0.5)
    assert mode_of(device) is Mode.OFF
    talk(uart, "> 7F", "< -")
    uart.set_lines(power=True)
    uart = synced(device)
    assert read(uart, 0x20004000, 4) == bytes(4)
    assert read(uart, BASE, 4) == b"\x22" * 4
    assert device.stats.power_cycles == 2


# --- the application ------------------------------------------------------------------------------------------------


def booted(device: Device, form: Format = APP) -> VirtualUart:
    uart = VirtualUart(device, form)
    uart.set_lines(reset=True, boot0=False)
    uart.pause(0.02)
    uart.set_lines(reset=False)
    return uart


@pytest.mark.parametrize("chip", ["0x410", "F407", "L476", "F756", "H743"])
def test_the_banner_comes_from_the_image(chip: str) -> None:
    device = make(chip)
    device.memory.load_flash(bootable(device.chip, banner=b"version 7"))
    uart = booted(device)
    assert uart.drain(0.1, 1) == b"version 7\r\n"
    uart.send(b"status\r\n")
    assert uart.drain(0.1, 1) == b"ok status\r\n"


def test_an_image_without_descriptor_says_where_it_started() -> None:
    device = make("F407")
    device.memory.load_flash(bootable(device.chip, banner=None))
    assert booted(device).drain(0.1, 1) == b"application at 0x08000000 started\r\n"


@pytest.mark.parametrize("broken", ["blank", "stack", "even", "outside", "no code"])
def test_what_cannot_start_is_silent(broken: str) -> None:
    device = make("F407")
    image = bytearray(bootable(device.chip))
    if broken == "blank":
        image[:] = b"\xff" * len(image)
    elif broken == "stack":
        image[:4] = (0x08001000).to_bytes(4, "little")
    elif broken == "even":
        image[4:8] = (BASE + 0x100).to_bytes(4, "little")
    elif broken == "outside":
        image[4:8] = (0x09000001).to_bytes(4, "little")
    else:
        image[0x100:0x110] = b"\xff" * 16
    device.memory.load_flash(bytes(image))
    uart = booted(device)
    talk(uart, "> 7F", "< -", "> 0D", "< -")
    assert mode_of(device) is Mode.DEAD
    assert "HardFault" in device.why


def test_an_application_that_echoes_answers_a_sync_with_itself() -> None:
    device = make("F407", application=Behaviour(echo=True, answer=False))
    device.memory.load_flash(bootable(device.chip))
    uart = booted(device)
    uart.drain(0.1, 1)
    uart.send(b"\x7f\x00")
    assert uart.drain(0.1, 1) == b"\x7f\x00"


def test_a_line_that_makes_the_application_jump_into_the_loader() -> None:
    device = make("F407", application=Behaviour(trigger=b"enter loader"))
    device.memory.load_flash(bootable(device.chip))
    uart = booted(device)
    uart.drain(0.1, 1)
    uart.send(b"enter loader\n")
    uart.pause(0.2)
    uart.set_format(Format(115200, "E"))
    talk(uart, "> 7F", "< 79", "> 02 FD", "< 79 01 04 13 79")


# --- the rest -------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_device() -> None:
    def life(seed: int) -> tuple[bytes, list[int], int]:
        device = make("F756", rate_error=None, seed=seed)
        uart = enter(device, Format(38400, "E"))
        talk(uart, "> 7F", "< 79")
        ends = []
        for code in (0, 1):
            erase(uart, code)
            ends.append(uart.now_ns)
        return device.memory.uid, ends, round(device.baud)

    assert life(5) == life(5)
    assert life(5) != life(6)


def test_forced_into_the_loader_whatever_the_pins_say() -> None:
    device = make("F407")
    device.force_loader()
    uart = VirtualUart(device)
    uart.pause(0.2)
    talk(uart, "> 7F", "< 79")


def test_options_by_any_spelling_and_unknown_ones() -> None:
    memory = make("G071").memory
    assert memory.option("nBOOT0_SEL") == memory.option("nboot_sel") == 1
    assert "nBOOT_SEL" in memory
    assert "nonsense" not in memory
    with pytest.raises(KeyError):
        memory.option("nonsense")
    with pytest.raises(KeyError):
        memory.set_option("nonsense", 1)


def test_the_layout_that_was_asked_for_shows_in_the_option_bytes() -> None:
    chip = find("F767")
    for layout in chip.layouts_for(2 << 20):
        if layout.when is None:
            continue
        memory: Memory = make(chip, flash_bytes=2 << 20, layout=layout.name).memory
        spot, value = layout.when
        assert spot.value(int.from_bytes(memory.read(spot.address, 4), "little")) == value


def test_rules_of_programming_by_family() -> None:
    rules = {name: make(name).memory.rule for name in ("F407", "F756", "L476", "0x410", "H743", "H563", "L072")}
    assert rules == {
        "F407": Rule.CLEARS_BITS,
        "F756": Rule.CLEARS_BITS,
        "L476": Rule.NEEDS_BLANK,
        "0x410": Rule.NEEDS_BLANK,
        "H743": Rule.ONCE,
        "H563": Rule.ONCE,
        "L072": Rule.NEEDS_BLANK,
    }


def test_flash_content_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        make("F407").memory.load_flash(bytes((1 << 20) + 1))
