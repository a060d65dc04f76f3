"""The pokes of a row: in which order they must come, and that each of them is needed."""

from __future__ import annotations

import dataclasses

import pytest

from bridged.chips.second_stage import SECOND_STAGES, SecondStage
from bridged.errors import SecondStageFailed
from bridged.protocol import stub as wire
from bridged.protocol.stub import Verb
from tests.stub.bench import ALL, bench, pattern
from tests.stub.parts import PARTS

FLASH = 0x08000000


def late(name: str, register: int) -> SecondStage:
    """The row with each poke of ``register`` behind all others."""
    row = SECOND_STAGES[PARTS[name].pid]
    moved = tuple(p for p in row.pokes if p.address == register)
    return dataclasses.replace(row, pokes=(*(p for p in row.pokes if p not in moved), *moved))


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("F407", late("F407", 0x40023C00), "core at 64 MHz with 1 wait states"),
        ("F756", late("F756", 0x40023C00), "core at 64 MHz with 1 wait states"),
        ("L476", late("L476", 0x40022000), "core at 56 MHz with 1 wait states"),
        ("G071", late("G071", 0x40022000), "core at 56 MHz with 0 wait states"),
        ("F103", late("F103", 0x40022000), "core at 36 MHz with 0 wait states"),
        ("F407", late("F407", 0x40023804), "the PLL is changed while it is on"),
        ("L476", late("L476", 0x4002100C), "the PLL is changed while it is on"),
        ("H743", late("H743", 0x52002000), ""),
    ],
)
def test_the_clock_is_fast_only_when_flash_is_slow_and_the_pll_is_set_while_it_is_off(
    name: str, row: SecondStage, complaint: str
) -> None:
    b = bench(name, row=row, started=False)
    b.uart.pause(0.01)
    assert bool(b.machine.violations) is bool(complaint)
    assert complaint in "; ".join(b.machine.violations)


@pytest.mark.parametrize("name", ["F407", "F756", "F103"])
def test_no_bus_is_faster_than_it_may(name: str) -> None:
    row = SECOND_STAGES[PARTS[name].pid]
    selects = 0x40021004 if name == "F103" else 0x40023808
    prescaler = 0x700 if name == "F103" else 0x1C00
    pokes = [p if p.address != selects else dataclasses.replace(p, value=int(p.value) & ~prescaler) for p in row.pokes]  # type: ignore[arg-type]
    b = bench(name, row=dataclasses.replace(row, pokes=tuple(pokes)), started=False)
    b.uart.pause(0.01)
    assert "first bus at" in "; ".join(b.machine.violations)


# Pokes that undo what a ROM may have left and this machine does not have: the oscillator is on already, the registers of the
# USART and the DMA are zero, the pull-ups are not modelled, and no cache is either.
HARMLESS = {
    "F407": "4001100c 40011010 4002000c 40023800 40026440 40026454",
    "F756": "40011000 40011004 4002000c 40023800 40026440 40026454",
    "L476": "40013800 40013804 40020058 4800000c",
    "G071": "40013800 40013804 40020008 40021000 5000000c",
    "F103": "4001380c 40013810 40020058 40021000",
    "H743": "40011000 40011004 40020010 40020024 52002000 5802000c 58024400",
}


@pytest.mark.parametrize("name", ALL)
def test_every_poke_is_needed(name: str) -> None:
    """Without any one of them the models complain, or it does not work; but for ``HARMLESS``."""
    part = PARTS[name]
    row = SECOND_STAGES[part.pid]
    idle = []
    for number in range(len(row.pokes)):
        less = dataclasses.replace(row, pokes=row.pokes[:number] + row.pokes[number + 1 :])
        b = bench(name, row=less, content=b"\xff" * 2048, started=False)
        b.uart.pause(0.08)
        if b.machine.violations or b.upload.build not in b.uart.drain(0.01, 0.02):
            continue
        try:
            b.run(b.link.ask(Verb.HELLO, tries=1))
            b.run(b.link.run([wire.write(FLASH, pattern(1, 64), 0.1)]))
        except (AssertionError, SecondStageFailed):
            continue
        idle.append(row.pokes[number])
    found = sorted({f"{p.address:x}" for p in idle if not p.wait})
    assert " ".join(found) == HARMLESS[name]
