"""The modelled section: what it compares, and that it says what it is."""

from __future__ import annotations

from bridged import chips
from tests.bench import modelled
from tests.stub.parts import KIB, PARTS


def test_both_loaders_write_the_same_and_the_second_one_in_less_time() -> None:
    rom, _ = modelled.one("G071", 115200, second_stage=False, count=16 * KIB)
    same_rate, _ = modelled.one("G071", 115200, second_stage=True, count=16 * KIB)
    fast, once = modelled.one("G071", 921600, second_stage=True, count=16 * KIB)
    assert 0 < once < fast
    assert modelled.floor_s("G071", 16 * KIB) < fast < same_rate < rom


def test_where_typical_times_are_taken_from_the_chip_they_are_those_of_the_emulated_part() -> None:
    for name in modelled.FAMILIES:
        part = PARTS[name]
        if len({a.size for a in part.areas}) > 1:
            flash = chips.by_pid(part.pid).flash_map(sum(a.size for a in part.areas))
            assert [s.erase_typ_s for s in flash.sectors] == [part.times.erase[a.size] / 1e9 for a in part.areas]


def test_the_section_says_what_it_is_and_names_a_miss() -> None:
    row = {"part": "F756", "family": "F7", "kib": 1024, "floor_s": 10.0}
    row |= {f"{kind}_{baud}": 12.0 for kind in ("rom", "stub") for baud in modelled.BAUDS}
    assert "met by all" in modelled.section([row])
    text = modelled.section([row | {"stub_921600": 13.0}])
    assert text.startswith("**Modelled, not measured: no silicon was involved.**")
    assert "missed by F7 by 5 points" in text
