"""``find``: what a person writes as ``chip =`` in a configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bridged.chips import CHIPS, find
from bridged.errors import UnknownChip


@pytest.mark.parametrize(
    ("text", "pid"),
    [
        ("0x449", 0x449),
        ("0X44c", 0x44C),
        ("0x50494B36", 0x50494B36),
        ("F756", 0x449),
        ("STM32F756ZG", 0x449),
        ("stm32f756zgt6", 0x449),
        (" STM32F756 ", 0x449),
        ("stm32h743zi", 0x450),
        ("H753", 0x450),
        ("H7A3ZI", 0x480),
        ("H7R3L8", 0x485),
        ("L476RG", 0x415),
        ("L476", 0x415),
        ("L4R5ZI", 0x470),
        ("STM32F103C8T6", 0x410),
        ("F103RB", 0x410),
        ("F103C6", 0x412),
        ("F103ZE", 0x414),
        ("F103ZG", 0x430),
        ("F030CC", 0x442),
        ("F030C6", 0x444),
        ("F030R8", 0x440),
        ("F072", 0x448),
        ("F401RE", 0x433),
        ("F401CC", 0x423),
        ("F429ZI", 0x419),
        ("G0B1RE", 0x467),
        ("G071RB", 0x460),
        ("L151CB", 0x416),
        ("L151CB-A", 0x429),
        ("L152RC", 0x427),
        ("L152ZE", 0x437),
        ("L010F4", 0x457),
        ("WB55RG", 0x495),
        ("WB35", 0x495),
        ("WBA52CG", 0x492),
        ("H563ZI", 0x484),
        ("U575ZI", 0x482),
        ("BlueNRG-LP", 0x3F),
        ("BlueNRG-LPS", 0x3B),
        ("W7500", 0x801),
    ],
)
def test_names(text: str, pid: int) -> None:
    assert find(text).pid == pid


@pytest.mark.parametrize(
    ("text", "candidates"),
    [("F103", 4), ("F030", 3), ("F4", 10), ("H7", 4), ("GD32VW553", 8), ("STM32F401", 2)],
)
def test_a_name_that_may_be_several_lists_them(text: str, candidates: int) -> None:
    with pytest.raises(UnknownChip, match="may be any of") as caught:
        find(text)
    assert caught.value.facts["candidates"] == candidates
    assert caught.value.message.count("product id") == candidates


@pytest.mark.parametrize(
    ("text", "near"), [("F757", "F756"), ("STM32L467RG", "L476"), ("H734", "H743"), ("G497", "G491"), ("F1O3C8", "F103x8")]
)
def test_a_mistaken_name_gets_a_suggestion(text: str, near: str) -> None:
    with pytest.raises(UnknownChip, match="did you mean") as caught:
        find(text)
    assert near in caught.value.message


@pytest.mark.parametrize("text", ["", "  ", "STM32", "0x", "0x123", "0x1FFFFFFFF", "Z80", "x", "-", "F1O3C8"])
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(UnknownChip):
        find(text)


def test_every_product_id_is_found_by_its_number() -> None:
    for pid, chip in CHIPS.items():
        assert find(f"{pid:#x}") is chip


def test_every_name_in_the_tables_finds_its_row() -> None:
    plain = {name: chip.pid for chip in CHIPS.values() for name in chip.names if "x" not in name and "/" not in name}
    assert len(plain) > 120
    del plain["GD32VW553"]  # one part, eight ids
    assert {name: find(name).pid for name in plain} == plain


def test_importing_the_room_loads_no_table() -> None:
    """A session process needs one product id; the other tables must not cost it anything."""
    code = (
        "import sys, bridged.chips as c\n"
        "assert not [m for m in sys.modules if m.startswith('bridged.chips.table')]\n"
        "c.by_pid(0x449)\n"
        "print(*sorted(m for m in sys.modules if m.startswith('bridged.chips.table')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["bridged.chips.table_f2_f4_f7"]
