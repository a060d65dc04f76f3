"""The rows: every product id is there, every field says where it comes from, every sector map is a partition of the flash.

The lists and maps below are typed again from the documents, not computed from the tables.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields, replace

import pytest

from bridged.chips import CHIPS, by_pid
from bridged.chips.model import Chip, Confidence, FlashMap, Layout, Quirk
from bridged.errors import LayoutUnknown, UnknownChip

KIB = 1024
MIB = 1024 * KIB

PIDS = {
    "C0": "443 453 44C 493 44D",
    "C5": "44E 44F 45A",
    "F0": "440 444 442 445 448",
    "F1": "412 410 414 420 428 418 430",
    "F2": "411",
    "F3": "432 422 439 438 446",
    "F4": "413 419 423 433 458 431 441 421 434 463",
    "F7": "452 449 451",
    "G0": "466 456 460 467",
    "G4": "468 469 479",
    "H5": "474 478 484 47A",
    "H7": "483 450 480 485",
    "L0": "457 425 417 447",
    "L1": "416 429 427 436 437",
    "L4": "464 435 462 415 461 470 471",
    "L5": "472",
    "U0": "459 489",
    "U3": "454 42A",
    "U5": "455 482 481 476",
    "WB": "494 495 496",
    "WBA": "4B2 492 4B0",
    "WL": "497",
}
FOREIGN = "641 9A8 9B0 3B 3F 06 5F 03 2F 801 50494b36 504d4b36 50494836 504d4836 50494b37 504d4b37 50494837 504d4837"
ALL = sorted(CHIPS.values(), key=lambda chip: chip.pid)
GENUINE = [chip for chip in ALL if not chip.foreign]


def name(chip: Chip) -> str:
    return f"{chip.pid:#x}"


def test_every_product_id_has_a_row_in_its_family_and_there_is_no_other() -> None:
    expected = {int(pid, 16): family for family, pids in PIDS.items() for pid in pids.split()}
    assert {chip.pid: chip.family for chip in GENUINE} == expected
    assert {chip.pid for chip in ALL if chip.foreign} == {int(pid, 16) for pid in FOREIGN.split()}
    assert len(CHIPS) == 104


def test_an_unknown_product_id_is_named() -> None:
    with pytest.raises(UnknownChip, match="0x7ff") as caught:
        by_pid(0x7FF)
    assert caught.value.facts["pid"] == 0x7FF


@pytest.mark.parametrize("chip", ALL, ids=name)
def test_every_field_says_where_it_comes_from_and_nothing_claims_silicon(chip: Chip) -> None:
    assert set(chip.provenance) == {field.name for field in fields(Chip)} - {"provenance"} | {"layouts.erase_s"}
    for field, entry in chip.provenance.items():
        assert entry.confidence is not Confidence.SILICON, f"{field}: nobody has reported a trial on a real part"
        assert len(entry.source) >= 5, f"{field}: no source named"
    options = [layout.when[0] for layout in chip.layouts if layout.when]
    options += [check.option for check in chip.entry_checks] + [check.option for check in chip.app_checks]
    assert all(option.confidence is not Confidence.SILICON for option in options)
    if not chip.layout_confirmed:
        assert chip.provenance["layouts"].confidence is Confidence.UNSURE


@pytest.mark.parametrize("chip", ALL, ids=name)
def test_values_are_possible(chip: Chip) -> None:
    assert chip.parity == ("N" if chip.family in {"WB0", "WL3", "BlueNRG"} else "E")
    assert chip.erase_command in (0x43, 0x44)
    assert chip.erased_value == (0x00 if chip.family in {"L0", "L1"} else 0xFF)
    assert chip.write_align_bytes % 4 == 0
    assert chip.write_align_bytes >= chip.flash_word_bytes
    assert chip.write_max_bytes % chip.write_align_bytes == 0
    assert 0 < chip.read_max_bytes <= 256
    assert chip.startup_s, "how long after reset the loader listens"
    assert list(chip.startup_s) == sorted(chip.startup_s)
    assert chip.startup_s[0] > 0
    assert chip.startup_s[-1] <= 2.56
    assert 1200 <= chip.first_baud <= chip.max_baud <= 115200
    assert 1 <= chip.sectors_per_erase <= 128
    assert chip.mass_erase_max_s > 0
    assert chip.write_ack_max_s >= 1.0
    if not chip.foreign:
        assert chip.ram, "a stack pointer could not be judged"
        assert chip.loader_ids or chip.family in {"F1", "WB"}
        assert chip.usart_pins
    for area in chip.stub_ram:
        assert any(ram.covers(area.start, area.end) for ram in chip.ram), "RAM for a stub must be RAM"


def test_startup_delays_that_a_fixed_wait_of_half_a_second_would_miss() -> None:
    assert by_pid(0x480).startup_s == (0.545,)
    assert by_pid(0x415).startup_s == (0.055, 2.56)
    assert by_pid(0x439).startup_s[-1] == 0.5608
    assert by_pid(0x418).startup_s[-1] == 0.5244


# --- sector maps ----------------------------------------------------------------------------------------------------


def sizes_of(chip: Chip, layout: Layout) -> list[int]:
    listed = list(layout.sizes) or [1 << n for n in range(13, 24)]
    if not layout.sizes:
        listed += [192 * KIB, 320 * KIB, 384 * KIB, 768 * KIB, 1536 * KIB, chip.flash_max_bytes]
    return [size for size in listed if 0 < size <= chip.flash_max_bytes]


def check_partition(chip: Chip, layout: Layout, found: FlashMap) -> None:
    assert found.layout == layout.name
    codes = [sector.code for sector in found.sectors]
    assert codes == sorted(set(codes)), "numbers are unique and rise with the address"
    assert sum(sector.size_bytes for sector in found.sectors) == found.size_bytes
    assert found.sectors[0].address == chip.flash_base
    assert found.sectors[0].code == 0
    banks = sorted({sector.bank for sector in found.sectors})
    assert banks == list(range(1, len(layout.banks) + 1))
    for before, after in zip(found.sectors, found.sectors[1:], strict=False):
        assert before.end <= after.address
        if before.bank == after.bank:
            assert (before.end, before.code + 1) == (after.address, after.code), "no hole within a bank"
    for bank in banks:
        assert sum(s.size_bytes for s in found.sectors if s.bank == bank) == found.size_bytes // len(banks)
    for sector in found.sectors:
        assert 0 < sector.erase_typ_s < sector.erase_max_s <= 4.0
        assert sector.code <= 0xFFEF, "0xFFF0 and above are special in 0x44"


@pytest.mark.parametrize("chip", ALL, ids=name)
def test_every_map_partitions_its_flash(chip: Chip) -> None:
    for layout in chip.layouts:
        good = 0
        for size in sizes_of(chip, layout):
            try:
                found = chip.flash_map(size, layout.name)
            except LayoutUnknown:
                assert size not in layout.sizes, f"{layout.name} claims {size} bytes and does not cover them"
                assert size != chip.flash_max_bytes, f"{layout.name} does not cover the largest part"
                continue
            check_partition(chip, layout, found)
            good += 1
        assert good or not chip.flash_max_bytes


@pytest.mark.parametrize("chip", GENUINE, ids=name)
def test_the_layouts_of_a_size_can_be_told_apart(chip: Chip) -> None:
    every_size = {size for layout in chip.layouts for size in sizes_of(chip, layout)}
    assert chip.layouts_for(chip.flash_max_bytes), "the largest part has a layout"
    for size in every_size:
        layouts = chip.layouts_for(size)
        assert len({layout.name for layout in layouts}) == len(layouts)
        chosen = [layout.when for layout in layouts if layout.when]
        assert len(set(chosen)) == len(chosen)
        assert len({(option.address, option.shift) for option, _ in chosen}) <= 1, "one option field decides"
        if chosen:
            assert {value for _, value in chosen} == {0, 1}, "every value of the option selects a layout"
            assert layouts[0].when or not layouts[0].confirmed
        else:
            assert all(not layout.confirmed for layout in layouts[1:]), "a named alternative is never sure"


@pytest.mark.parametrize("chip", GENUINE, ids=name)
def test_erase_times_are_generous(chip: Chip) -> None:
    """At least what the data sheets that could be read or are well known say for the size."""
    slow = chip.family in {"F2", "F4", "F7", "H7"}
    for layout in chip.layouts:
        for run in (run for bank in layout.banks for run in bank.runs):
            least = {128: 0.0032, 256: 0.0032, 1 * KIB: 0.04, 2 * KIB: 0.022, 4 * KIB: 0.022, 8 * KIB: 0.022}.get(
                run.size_bytes
            )
            least = {16 * KIB: 0.8, 32 * KIB: 0.8, 64 * KIB: 2.4}.get(run.size_bytes, 2.4) if least is None else least
            assert run.erase_max_s >= least
            assert slow or run.size_bytes <= 8 * KIB
    if slow and chip.pid not in (0x480, 0x485):
        assert chip.mass_erase_max_s >= 30.0
    if chip.pid in (0x450, 0x419, 0x434, 0x451):
        assert chip.mass_erase_max_s >= 60.0, "two banks"


# Address, size and number of sectors of each run, with the number of the first.
Rows = list[tuple[int, int, int, int]]

MAPS: list[tuple[int, int, str | None, Rows]] = [
    # product id, flash size, layout (None: default), runs as (offset, code, count, size)
    (0x410, 64 * KIB, None, [(0, 0, 64, 1 * KIB)]),
    (0x410, 128 * KIB, None, [(0, 0, 128, 1 * KIB)]),
    (0x414, 512 * KIB, None, [(0, 0, 256, 2 * KIB)]),
    (0x413, 1 * MIB, None, [(0, 0, 4, 16 * KIB), (64 * KIB, 4, 1, 64 * KIB), (128 * KIB, 5, 7, 128 * KIB)]),
    (0x413, 512 * KIB, None, [(0, 0, 4, 16 * KIB), (64 * KIB, 4, 1, 64 * KIB), (128 * KIB, 5, 3, 128 * KIB)]),
    (
        0x419,
        2 * MIB,
        None,
        [
            (0, 0, 4, 16 * KIB),
            (64 * KIB, 4, 1, 64 * KIB),
            (128 * KIB, 5, 7, 128 * KIB),
            (1 * MIB, 12, 4, 16 * KIB),
            (1 * MIB + 64 * KIB, 16, 1, 64 * KIB),
            (1 * MIB + 128 * KIB, 17, 7, 128 * KIB),
        ],
    ),
    (0x419, 1 * MIB, None, [(0, 0, 4, 16 * KIB), (64 * KIB, 4, 1, 64 * KIB), (128 * KIB, 5, 7, 128 * KIB)]),
    (
        0x419,
        1 * MIB,
        "dual",
        [
            (0, 0, 4, 16 * KIB),
            (64 * KIB, 4, 1, 64 * KIB),
            (128 * KIB, 5, 3, 128 * KIB),
            (512 * KIB, 12, 4, 16 * KIB),
            (576 * KIB, 16, 1, 64 * KIB),
            (640 * KIB, 17, 3, 128 * KIB),
        ],
    ),
    (0x463, 1536 * KIB, None, [(0, 0, 4, 16 * KIB), (64 * KIB, 4, 1, 64 * KIB), (128 * KIB, 5, 11, 128 * KIB)]),
    (0x449, 1 * MIB, None, [(0, 0, 4, 32 * KIB), (128 * KIB, 4, 1, 128 * KIB), (256 * KIB, 5, 3, 256 * KIB)]),
    (0x449, 64 * KIB, None, [(0, 0, 2, 32 * KIB)]),
    (0x452, 64 * KIB, None, [(0, 0, 4, 16 * KIB)]),
    (0x452, 512 * KIB, None, [(0, 0, 4, 16 * KIB), (64 * KIB, 4, 1, 64 * KIB), (128 * KIB, 5, 3, 128 * KIB)]),
    (0x451, 2 * MIB, None, [(0, 0, 4, 32 * KIB), (128 * KIB, 4, 1, 128 * KIB), (256 * KIB, 5, 7, 256 * KIB)]),
    (
        0x451,
        2 * MIB,
        "dual",
        [
            (0, 0, 4, 16 * KIB),
            (64 * KIB, 4, 1, 64 * KIB),
            (128 * KIB, 5, 7, 128 * KIB),
            (1 * MIB, 12, 4, 16 * KIB),
            (1 * MIB + 64 * KIB, 16, 1, 64 * KIB),
            (1 * MIB + 128 * KIB, 17, 7, 128 * KIB),
        ],
    ),
    (0x415, 1 * MIB, None, [(0, 0, 512, 2 * KIB)]),
    (0x415, 512 * KIB, "single", [(0, 0, 256, 2 * KIB)]),
    (0x415, 512 * KIB, "dual", [(0, 0, 128, 2 * KIB), (256 * KIB, 256, 128, 2 * KIB)]),
    (0x467, 512 * KIB, None, [(0, 0, 128, 2 * KIB), (256 * KIB, 256, 128, 2 * KIB)]),
    (0x467, 512 * KIB, "dual-linear", [(0, 0, 256, 2 * KIB)]),
    (0x469, 512 * KIB, None, [(0, 0, 256, 2 * KIB)]),
    (0x469, 512 * KIB, "single", [(0, 0, 128, 4 * KIB)]),
    (0x450, 2 * MIB, None, [(0, 0, 16, 128 * KIB)]),
    (0x450, 1 * MIB, None, [(0, 0, 4, 128 * KIB), (1 * MIB, 8, 4, 128 * KIB)]),
    (0x450, 128 * KIB, None, [(0, 0, 1, 128 * KIB)]),
    (0x483, 1 * MIB, None, [(0, 0, 8, 128 * KIB)]),
    (0x470, 2 * MIB, None, [(0, 0, 512, 4 * KIB)]),
    (0x470, 2 * MIB, "single", [(0, 0, 256, 8 * KIB)]),
    (0x472, 512 * KIB, None, [(0, 0, 256, 2 * KIB)]),
    (0x482, 2 * MIB, None, [(0, 0, 256, 8 * KIB)]),
    (0x447, 192 * KIB, None, [(0, 0, 1536, 128)]),
    (0x437, 512 * KIB, None, [(0, 0, 2048, 256)]),
]


@pytest.mark.parametrize(
    ("pid", "size", "layout", "rows"), MAPS, ids=[f"{p:#x}-{s // KIB}K-{lay or 'default'}" for p, s, lay, _ in MAPS]
)
def test_maps_as_the_documents_have_them(pid: int, size: int, layout: str | None, rows: Rows) -> None:
    chip = by_pid(pid)
    expected = [
        (code + n, chip.flash_base + offset + n * each, each) for offset, code, count, each in rows for n in range(count)
    ]
    assert [(s.code, s.address, s.size_bytes) for s in chip.flash_map(size, layout).sectors] == expected


def test_bank_two_of_two_equal_banks() -> None:
    for pid, size in ((0x415, 1 * MIB), (0x450, 2 * MIB), (0x419, 2 * MIB), (0x470, 2 * MIB)):
        chip = by_pid(pid)
        in_two = [s.address for s in chip.flash_map(size).sectors if s.bank == 2]
        assert min(in_two) == chip.flash_base + size // 2


@pytest.mark.parametrize(
    ("pid", "register", "kib"),
    [
        (0x436, 0, 384),
        (0x436, 1, 256),
        (0x436, 2, 0),
        (0x436, 384, 384),
        (0x429, 0xFF80, 128),
        (0x429, 0x0040, 64),
        (0x416, 0xFF80, 0),
        (0x437, 1, 0),  # a page is 256 bytes
        (0x437, 7, 0),
        (0x425, 8, 8),
        (0x413, 1024, 1024),
        (0x413, 0xFFFF, 0),
        (0x421, 320, 0),
        (0x421, 32, 32),
        (0x421, 40, 0),
        (0x449, 64, 64),
        (0x450, 64, 64),  # There is no layout for it, which is another error.
    ],
)
def test_a_flash_size_that_cannot_be_is_none(pid: int, register: int, kib: int) -> None:
    assert by_pid(pid).flash_bytes_of(register) == kib * KIB


@pytest.mark.parametrize("chip", ALL, ids=name)
def test_the_sizes_that_parts_have_are_believed(chip: Chip) -> None:
    codes = {code for code, _ in chip.flash_size_codes}
    for layout in chip.layouts:
        for size in sizes_of(chip, layout):
            with suppress(LayoutUnknown):
                chip.flash_map(size, layout.name)
                assert size // KIB in codes or chip.flash_bytes_of(size // KIB) == size


def test_a_size_that_no_part_has_gets_no_map() -> None:
    with pytest.raises(LayoutUnknown, match="do not add up"):
        by_pid(0x421).flash_map(320 * KIB)
    for size in (0, -1024, 2 * MIB):
        with pytest.raises(LayoutUnknown):
            by_pid(0x421).flash_map(size)
    with pytest.raises(LayoutUnknown, match="dual"):
        by_pid(0x450).flash_map(2 * MIB, "single")


@pytest.mark.parametrize(
    ("pid", "size", "layout", "sure"),
    [
        (0x419, 2 * MIB, "dual", True),
        (0x419, 1 * MIB, "single", True),
        (0x419, 1 * MIB, "dual", False),
        (0x450, 2 * MIB, "dual", True),
        (0x450, 1 * MIB, "dual", False),
        (0x450, 1 * MIB, "dual-linear", False),
        (0x467, 512 * KIB, "dual", False),
        (0x467, 128 * KIB, "uniform", True),
        (0x469, 512 * KIB, "dual", True),
        (0x469, 256 * KIB, "dual", False),
        (0x415, 512 * KIB, "dual", False),
        (0x484, 2 * MIB, "dual", False),
    ],
)
def test_a_second_bank_with_unsure_numbers_is_not_confirmed(pid: int, size: int, layout: str, sure: bool) -> None:
    chip = by_pid(pid)
    (found,) = (lay for lay in chip.layouts_for(size) if lay.name == layout)
    assert (found.confirmed and chip.layout_confirmed) is sure


def test_one_bank_counted_through_is_confirmed_everywhere_but_where_the_row_says_why_not() -> None:
    unsure = {chip.pid for chip in GENUINE if not chip.layout_confirmed}
    assert unsure == {0x44E, 0x44F, 0x45A, 0x496, 0x4B2, 0x4B0}
    assert all(not chip.layout_confirmed for chip in ALL if chip.foreign)


# --- the way back (P10) ---------------------------------------------------------------------------------------------


def entry_holds(chip: Chip, words: dict[int, int]) -> bool:
    return all(check.holds(words[check.option.address]) for check in chip.entry_checks)


def app_holds(chip: Chip, words: dict[int, int]) -> bool:
    return all(check.holds(words[check.option.address]) for check in chip.app_checks)


F7_FACTORY = {0x1FFF0008: 0x0000FFFF, 0x1FFF0010: 0xFF7F0080, 0x1FFF0018: 0xFFBF0040}
H7_FACTORY = {0x52002040: 0x1FF00800}


@pytest.mark.parametrize("pid", [0x449, 0x452, 0x451])
def test_f7_boot_addresses(pid: int) -> None:
    chip = by_pid(pid)
    assert entry_holds(chip, F7_FACTORY)
    assert app_holds(chip, F7_FACTORY)
    # Both addresses at the loader, as a user's screenshot showed: the loader is reached, the application never.
    trap = F7_FACTORY | {0x1FFF0010: 0xFFBF0040}
    assert entry_holds(chip, trap)
    assert not app_holds(chip, trap)
    # A user received parts with both at 0xFFFF: the pin does nothing.
    assert not entry_holds(chip, F7_FACTORY | {0x1FFF0018: 0x0000FFFF})


@pytest.mark.parametrize("pid", [0x450, 0x483, 0x480])
def test_h7_boot_addresses(pid: int) -> None:
    chip = by_pid(pid)
    assert entry_holds(chip, H7_FACTORY)
    assert app_holds(chip, H7_FACTORY)
    assert not entry_holds(chip, {0x52002040: 0x00400800}), "0x0040 is the F7's value and no memory here"
    assert not app_holds(chip, {0x52002040: 0x1FF01FF0})


@pytest.mark.parametrize("pid", [0x466, 0x456, 0x460, 0x467])
def test_g0_ignores_the_pin_from_the_factory(pid: int) -> None:
    chip = by_pid(pid)
    assert not chip.boot0_pin_obeyed
    sel, boot1, boot0 = 1 << 24, 1 << 25, 1 << 26
    assert not entry_holds(chip, {0x1FFF7800: sel | boot1 | boot0})
    assert entry_holds(chip, {0x1FFF7800: boot1 | boot0})
    assert not entry_holds(chip, {0x1FFF7800: boot0}), "nBOOT1 0: SRAM"
    assert app_holds(chip, {0x1FFF7800: sel | boot1 | boot0})
    assert not app_holds(chip, {0x1FFF7800: sel | boot1})
    assert app_holds(chip, {0x1FFF7800: boot1}), "the pin decides"


@pytest.mark.parametrize("pid", [0x464, 0x435, 0x462, 0x461, 0x468, 0x469, 0x479, 0x495, 0x494, 0x497])
def test_nswboot0_decides_whether_the_pin_counts(pid: int) -> None:
    chip = by_pid(pid)
    assert chip.boot0_pin_obeyed
    optr = 0x1FFF8000 if pid == 0x495 else 0x1FFF7800
    boot1, sw, boot0 = 1 << 23, 1 << 26, 1 << 27
    lock = {0x1FFF7828: 0} if chip.family == "G4" else {}
    assert entry_holds(chip, {optr: boot1 | sw | boot0} | lock)
    assert not entry_holds(chip, {optr: boot1 | boot0} | lock)
    assert not entry_holds(chip, {optr: sw | boot0} | lock)
    assert app_holds(chip, {optr: boot1 | boot0})
    assert not app_holds(chip, {optr: boot1})
    if lock:
        assert not entry_holds(chip, {optr: boot1 | sw | boot0, 0x1FFF7828: 1 << 16})


def test_f0_and_f3_user_byte() -> None:
    factory = {0x1FFFF800: 0x00FF55AA}  # production value in RM0091
    for pid in (0x440, 0x444, 0x442, 0x445, 0x448, 0x432, 0x422, 0x439, 0x438, 0x446):
        chip = by_pid(pid)
        assert entry_holds(chip, factory)
        assert app_holds(chip, factory)
        assert not entry_holds(chip, {0x1FFFF800: 0x10EF55AA}), "nBOOT1 cleared"
    for pid in (0x442, 0x445):
        chip = by_pid(pid)
        assert not entry_holds(chip, {0x1FFFF800: 0x807F55AA}), "BOOT_SEL cleared"
        assert app_holds(chip, {0x1FFFF800: 0x807F55AA})
        assert not app_holds(chip, {0x1FFFF800: 0x887755AA}), "BOOT_SEL and nBOOT0 cleared"


def test_option_fields_lie_where_the_loader_maps_option_bytes() -> None:
    for chip in GENUINE:
        options = [check.option for check in chip.entry_checks] + [check.option for check in chip.app_checks]
        options += [layout.when[0] for layout in chip.layouts if layout.when]
        for option in options:
            if option.confidence is Confidence.UNSURE:
                continue  # a register of which it is not known whether the loader lets a host read it
            if chip.pid == 0x496:
                continue
            assert any(area.covers(option.address, option.address + 4) for area in chip.option_bytes), f"{chip.title}: {option}"
            assert option.shift + option.mask.bit_length() <= 32


def test_the_two_bank_bits_avoid_the_complement() -> None:
    """On F4 and F7 a word in memory is a 16-bit value below its complement, so no field may lie in the upper half."""
    for chip in GENUINE:
        if chip.family in {"F4", "F7"}:
            options = [check.option for check in chip.entry_checks] + [lay.when[0] for lay in chip.layouts if lay.when]
            assert all(option.shift + option.mask.bit_length() <= 16 for option in options)


def test_where_an_empty_flash_leads_to_the_loader() -> None:
    empty = {chip.pid for chip in GENUINE if chip.empty_check}
    documented = "445 442 457 464 435 462 461 466 456 460 467 443 453 44C 493 44D 459 489 494 495"
    assert {int(pid, 16) for pid in documented.split()} <= empty
    assert not empty & {0x410, 0x413, 0x419, 0x449, 0x450, 0x415, 0x469, 0x468, 0x447}


# --- loader versions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pid", "quirk", "yes", "no"),
    [
        (0x450, Quirk.GET_COUNT_WRONG, "90", "91 92 D3"),
        (0x450, Quirk.GO_FIRST_ACK_MISSING, "90", "91"),
        (0x450, Quirk.EXTRA_RESET_AFTER_POWER_UP, "90", "D3 91"),
        (0x450, Quirk.GO_BROKEN, "D2", "D3 90"),
        (0x450, Quirk.BANK_ERASE_BROKEN, "D3", "D2 90"),
        (0x450, Quirk.ERASE_NOT_AWAITED, "91", "90 92"),
        (0x449, Quirk.RATE_JITTER, "70 90", ""),
        (0x452, Quirk.RATE_JITTER, "90", ""),
        (0x451, Quirk.RATE_JITTER, "93", ""),
        (0x460, Quirk.ONE_SECTOR_PER_ERASE, "B3", "B2 B4"),
        (0x460, Quirk.ERASE_NOT_AWAITED, "B3", "B4"),
        (0x460, Quirk.OPTION_LAUNCH_MISSING, "B2", "B3"),
        (0x467, Quirk.ONE_SECTOR_PER_ERASE, "D0 92", ""),
        (0x467, Quirk.EMPTY_FLAG_CLEARED_BY_LOADER, "D0 92", ""),
        (0x413, Quirk.TWO_NACKS, "31", "90"),
        (0x413, Quirk.NO_NACK_ON_BAD_ADDRESS, "30", "31 90"),
        (0x416, Quirk.NO_NACK_ON_BAD_ADDRESS, "20", ""),
        (0x430, Quirk.NO_NACK_ON_BAD_ADDRESS, "21", ""),
        (0x427, Quirk.TWO_NACKS, "40", ""),
        (0x415, Quirk.RAM_WRITE_BROKEN, "A1 90", "A2 91 92"),
        (0x461, Quirk.BANK_ERASE_BROKEN, "93", ""),
        (0x425, Quirk.NO_RAM_ACCESS, "C0", ""),
        (0x483, Quirk.POWER_CYCLE_AFTER_GO, "91 92", "93"),
    ],
)
def test_quirks_by_loader_version(pid: int, quirk: Quirk, yes: str, no: str) -> None:
    chip = by_pid(pid)
    assert all(chip.has(quirk, int(loader, 16)) for loader in yes.split())
    assert not any(chip.has(quirk, int(loader, 16)) for loader in no.split())
    assert chip.has(quirk, None), "an unknown version is taken to have it"


def test_quirks_that_are_not_there() -> None:
    assert not by_pid(0x410).quirks
    assert not by_pid(0x450).has(Quirk.RATE_JITTER, None)


def test_one_page_per_erase_where_a_loader_fails_with_more() -> None:
    assert {chip.pid for chip in GENUINE if chip.sectors_per_erase == 1} == {0x460, 0x467}


def test_rates() -> None:
    assert {chip.pid for chip in GENUINE if chip.first_baud != 115200} == {0x449, 0x451, 0x452, 0x432}
    assert {chip.pid for chip in GENUINE if chip.max_baud != 115200} == {0x432}
    assert not any(chip.hardware_autobaud for chip in GENUINE if chip.family[0] == "F" or chip.family in {"L0", "L1", "L4"})
    assert all(chip.hardware_autobaud for chip in GENUINE if chip.family in {"G0", "G4", "H5", "H7", "L5", "U5", "WB"})


def test_families_with_ecc() -> None:
    ecc = {chip.family for chip in GENUINE if chip.ecc}
    assert ecc == {"L4", "L5", "G0", "G4", "H5", "H7", "U0", "U3", "U5", "WB", "WBA", "WL", "C0", "C5"}
    assert all(chip.ecc for chip in GENUINE if chip.family in ecc)


def test_titles_are_for_people() -> None:
    assert by_pid(0x449).title == "STM32F7 F745, F746, F750, F756 (product id 0x449)"
    assert by_pid(0x801).title == "Wiznet W7500 (product id 0x801)"


def test_a_row_is_frozen() -> None:
    chip = by_pid(0x449)
    with pytest.raises(AttributeError):
        chip.pid = 1  # type: ignore[misc]
    assert replace(chip, flash_max_bytes=1).pid == 0x449
