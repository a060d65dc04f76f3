"""Rows of the second-stage loader: they fit their chips, their RAM and each other."""

from __future__ import annotations

import dataclasses

import pytest

from bridged import chips, stub
from bridged.chips.model import Confidence
from bridged.chips.second_stage import NO_SECOND_BANK, SECOND_STAGES, SecondStage, Symbol
from bridged.target.second_stage import INLET_BYTES

ROWS = tuple(SECOND_STAGES.values())


def name(row: SecondStage) -> str:
    return f"{row.pid:#x}"


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_every_field_says_where_it_comes_from(row: SecondStage) -> None:
    assert set(row.provenance) == {field.name for field in dataclasses.fields(row)} - {"provenance"}
    assert all(p.confidence is not Confidence.SILICON for p in row.provenance.values()), "nobody has reported a trial"
    assert all(row.provenance[f].confidence is Confidence.MEMORY for f in ("pokes", "flash", "usart", "remaining"))


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_its_ram_is_what_the_rom_loader_lets_us_write(row: SecondStage) -> None:
    chip = chips.by_pid(row.pid)
    assert any(r.covers(row.ram.start, row.ram.end) for r in chip.stub_ram)
    assert row.ring_bytes & (row.ring_bytes - 1) == 0
    assert INLET_BYTES <= 32768, "the DMA counts 16 bits"
    assert row.ring_bytes >= 2 * (row.block_bytes + 16), "one block is programmed while the next comes"
    least = stub.CODE_OFFSET + stub.CODE_LIMIT_BYTES + stub.STACK_BYTES + INLET_BYTES + row.ring_bytes + row.block_bytes + 4
    assert least <= row.ram.size


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_pokes_and_registers(row: SecondStage) -> None:
    assert 0 < len(row.pokes) <= stub.POKES_MAX
    assert [p.value for p in row.pokes if isinstance(p.value, Symbol)] == [Symbol.INLET_BYTES, Symbol.INLET]
    for poke in row.pokes:
        assert poke.address % 4 == 0
        assert poke.wait or poke.keep != 0xFFFFFFFF or poke.value, "neither waits nor writes"
        if isinstance(poke.value, int):
            assert not poke.value & ~0xFFFFFFFF
            assert not poke.wait or not poke.value & ~poke.keep, "waits for bits that it masks"
    assert row.pokes[-1].address == row.remaining - 4, "the DMA is switched on last, and what it counts lies next to that"


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_the_flash_controller_fits_the_chip(row: SecondStage) -> None:
    chip, flash = chips.by_pid(row.pid), row.flash
    assert flash.unit_bytes % flash.store_bytes == 0
    assert flash.unit_bytes <= max(chip.flash_word_bytes, 4), "what is programmed at once is not more than an ECC word"
    assert not chip.ecc or flash.unit_bytes == chip.flash_word_bytes
    banks = max(len(layout.banks) for layout in chip.layouts)
    assert len(flash.code_of_bank) >= min(banks, 2) or not chip.layout_confirmed
    assert not flash.lock & (flash.program | flash.erase | flash.start)
    assert flash.bank_step < NO_SECOND_BANK
