"""The flash models, judged by code of others: the flash algorithms that pyOCD bundles, which program real silicon every day.

Each of them (Init, EraseSector, ProgramPage, UnInit) runs in an emulated core on our model of its controller and must end with
the right content and without a violation. So the rules of the models, which the second-stage loader has to keep, are not
stricter than silicon in the ways these algorithms use it; that they are not laxer is what ``test_mutations`` is about.

pyOCD is read and not imported: the algorithms are lists of numbers in its modules. It is a development dependency only.
"""

from __future__ import annotations

import ast
import importlib.metadata
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import unicorn
from unicorn import arm_const

from tests.stub.bench import pattern
from tests.stub.flash_models import F1, F4, H7, L4, Area, Controller, Times
from tests.stub.parts import F4_FLASH, F7_FLASH, KIB, cut
from tests.support import missing

emulator: Any = unicorn  # it has no type hints

BASE = 0x08000000
QUICK = Times(5_000, dict.fromkeys((KIB, 2 * KIB, *F4_FLASH, *F7_FLASH), 20_000))


@dataclass(frozen=True)
class Case:
    """``others``: registers besides those of the model that the algorithm looks at, with a plausible value.

    ``pid``: what its debug unit answers. ``sectors_each``: how many sectors its EraseSector erases.
    """

    module: str
    model: type[Controller]
    areas: tuple[Area, ...]
    registers: int
    others: tuple[tuple[int, int], ...] = ()
    pid: int = 0
    sectors_each: int = 1
    page: int = 512


CASES = (
    Case("STM32F051T8", F1, cut(BASE, [KIB] * 64), 0x40022000, ((0x1C, 0x0FFFFF02),)),
    Case("STM32F103RC", F1, cut(BASE, [2 * KIB] * 128), 0x40022000, ((0x1C, 0x03FFFFFC),)),
    Case("STM32F412xx", F4, cut(BASE, F4_FLASH), 0x40023C00, ((0x14, 0x0FFFAAED),)),
    Case("STM32F429xx", F4, cut(BASE, F4_FLASH), 0x40023C00, ((0x14, 0x0FFFAAED),)),
    Case("STM32F439xx", F4, cut(BASE, F4_FLASH), 0x40023C00, ((0x14, 0x0FFFAAED),)),
    Case("STM32F767xx", F4, cut(BASE, F7_FLASH), 0x40023C00, ((0x14, 0xFFFFAAFD),)),
    Case("STM32L432xx", L4, cut(BASE, [2 * KIB] * 128), 0x40022000, ((0x20, 0xFFEFF8AA),), pid=0x435),
    Case(
        "STM32L475xx",
        L4,
        cut(BASE, [2 * KIB] * 256) + cut(BASE + 0x80000, [2 * KIB] * 256, bank=2),
        0x40022000,
        ((0x20, 0xFFEFF8AA),),
        pid=0x415,
    ),
    Case(
        "STM32H743xx",
        H7,
        cut(BASE, [128 * KIB] * 8) + cut(BASE + 0x100000, [128 * KIB] * 8, bank=2),
        0x52002000,
        sectors_each=2,
    ),
    Case("STM32H750xx", H7, cut(BASE, [128 * KIB] * 2), 0x52002000, sectors_each=2),
)


def algorithm(module: str) -> dict[str, Any]:
    """``FLASH_ALGO`` of one of pyOCD's targets; sums of numbers are all the arithmetic in it."""
    try:
        files = importlib.metadata.files("pyocd") or []
    except importlib.metadata.PackageNotFoundError:
        missing("pyocd", "pip install pyocd (make venv)")
        raise AssertionError("unreachable") from None
    found = next(file for file in files if file.name == f"target_{module}.py")
    for node in ast.parse(Path(str(found.locate())).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and "FLASH_ALGO" in node.targets[0].id:
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(k): value(v) for k, v in zip(node.value.keys, node.value.values, strict=True) if k}
    raise AssertionError(f"no FLASH_ALGO in {found}")


def value(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return value(node.left) + value(node.right)
    if isinstance(node, ast.List | ast.Tuple):
        return [value(item) for item in node.elts]
    return ast.literal_eval(node)


class Rig:
    """A core with RAM, flash, the model, and a sink for whatever else an algorithm's Init touches (watchdog, debug unit)."""

    def __init__(self, case: Case, shift: int) -> None:
        algo = algorithm(case.module)
        self.algo, self.shift = algo, shift
        self.violations: list[str] = []
        self.now_ns = 0
        cpu = self.cpu = emulator.Uc(emulator.UC_ARCH_ARM, emulator.UC_MODE_THUMB | emulator.UC_MODE_MCLASS)
        cpu.ctl_set_cpu_model(arm_const.UC_CPU_ARM_CORTEX_M7)
        cpu.mem_map(0x20000000, 0x20000)
        size = max(a.address + a.size for a in case.areas) - BASE
        cpu.mem_map(BASE, size)
        cpu.mem_write(BASE, b"\x5a" * size)

        known = dict(case.others)

        class Model(case.model):  # type: ignore[name-defined,misc]
            def others(self) -> dict[int, int]:
                return super().others() | known  # type: ignore[no-any-return]

        self.flash: Controller = Model(case.areas, QUICK, self, self.time, self.violations)
        page = case.registers & ~0xFFF
        cpu.mmio_map(page, 0x1000, self._read, case.registers - page, self._write, case.registers - page)
        for sink in (
            0x40002000,
            0x40003000,
            0xE0042000,
            0x40021000,
            0x58004000,
            0x5C001000,
            0x58024000,
            0x40015000,
            0x1FFFF000,
        ):
            if sink != page:
                cpu.mem_map(sink, 0x1000)
        cpu.hook_add(emulator.UC_HOOK_MEM_WRITE, self._store, None, BASE, BASE + size - 1)
        cpu.mem_write(0xE0042000, struct.pack("<I", case.pid))
        load = algo["load_address"] + shift
        code = struct.pack(f"<{len(algo['instructions'])}I", *algo["instructions"])
        cpu.mem_write(load, code)

    def time(self) -> int:
        return self.now_ns

    def read(self, address: int, count: int) -> bytes:
        return bytes(self.cpu.mem_read(address, count))

    def write(self, address: int, data: bytes) -> None:
        self.cpu.mem_write(address, data)

    def _read(self, _cpu: object, offset: int, _size: int, base: int) -> int:
        self.now_ns += 1_000
        return self.flash.read(offset - base) if offset >= base else 0

    def _write(self, _cpu: object, offset: int, _size: int, word: int, base: int) -> None:
        self.now_ns += 1_000
        if offset >= base:
            self.flash.write(offset - base, word)

    def _store(self, _cpu: object, _access: int, address: int, size: int, word: int, _data: object) -> None:
        self.flash.store(address, size, word)

    def call(self, function: str, *arguments: int) -> int:
        cpu, algo = self.cpu, self.algo
        if function not in algo:
            return 0  # some have no UnInit
        for register, argument in zip(
            (arm_const.UC_ARM_REG_R0, arm_const.UC_ARM_REG_R1, arm_const.UC_ARM_REG_R2), arguments, strict=False
        ):
            cpu.reg_write(register, argument)
        cpu.reg_write(arm_const.UC_ARM_REG_R9, algo["static_base"] + self.shift)
        cpu.reg_write(arm_const.UC_ARM_REG_SP, algo["begin_stack"] + self.shift)
        end = algo["load_address"] + self.shift
        cpu.reg_write(arm_const.UC_ARM_REG_LR, end | 1)
        cpu.emu_start((algo[function] + self.shift) | 1, end, count=5_000_000)
        assert cpu.reg_read(arm_const.UC_ARM_REG_PC) & ~1 == end, f"{function} did not return"
        return int(cpu.reg_read(arm_const.UC_ARM_REG_R0))


@pytest.mark.parametrize("shift", [0, 0x4000])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.module)
def test_an_algorithm_for_real_silicon_runs_on_the_model(case: Case, shift: int) -> None:
    rig = Rig(case, shift)
    each, count = case.sectors_each, len(case.areas)
    picked = sorted({0, count - each, next((n for n, a in enumerate(case.areas) if a.bank == 2), 0)})
    data, buffer = pattern(len(case.module), case.page), 0x2000A000
    rig.write(buffer, data)
    expected: list[int] = []
    for number in picked:
        areas = case.areas[number : number + each]
        start, size = areas[0].address, sum(area.size for area in areas)
        expected += [area.address for area in areas]
        assert rig.call("pc_init", BASE, 8_000_000, 1) == 0
        assert rig.call("pc_erase_sector", start) == 0
        assert rig.call("pc_unInit", 1) == 0
        assert rig.violations == []
        assert rig.read(start, size) == b"\xff" * size
        assert rig.call("pc_init", BASE, 8_000_000, 2) == 0
        assert rig.call("pc_program_page", start, case.page, buffer) == 0
        assert rig.call("pc_unInit", 2) == 0
        assert rig.violations == []
        assert rig.read(start, size) == data + b"\xff" * (size - case.page)
    assert rig.flash.erases == expected
    unit = 4 if case.model is F4 else case.model.UNIT  # the algorithms for F4 and F7 program words
    assert rig.flash.programmed == len(picked) * case.page // unit
