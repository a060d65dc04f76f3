"""The whole flash of a part, written by the second-stage loader on a bad line: ``python -m tests.stub.full_flash [NAME ...]``.

The real binary in emulation, at 921600 baud or what its clock makes of that. One frame in twenty is hit by a changed, lost
or doubled byte, in both directions. Afterwards the flash must be what was sent, by content and by the CRC that the target
computed, no sector erased twice and no rule of the silicon broken. Less than a minute of CPU time a part, some for the H743;
``make soak`` runs all of them. ``--clean`` leaves the line alone and says how far the modelled time is from the flash's own
(times from memory: see ``parts.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import zlib

from bridged.chips.second_stage import FLASH_F4_X32, SECOND_STAGES
from bridged.protocol import stub as wire
from bridged.target.second_stage import rate_near, sector_code
from tests.stub.bench import ALL, bench, noise, pattern
from tests.stub.parts import PARTS

BAUD = 921600


def write_all(name: str, *, clean: bool, seed: int = 1, limit: int | None = None) -> tuple[float, float]:
    """Seconds that it took and seconds that the flash needs at least. Raises when anything is wrong."""
    part = PARTS[name]
    row = SECOND_STAGES[part.pid]
    if name in ("F407", "F756"):
        row = dataclasses.replace(row, flash=FLASH_F4_X32)
    b = bench(name, row=row, oscillator=1.01)
    baud, brr = rate_near(b.greet().clock_hz(115200, row.clock_hz), BAUD)
    if not b.run(b.link.change_rate(baud, brr)):
        raise AssertionError(f"{name}: {baud} baud do not work")
    areas = part.areas
    total = sum(area.size for area in areas)
    sectors = [s for s in b.flash.sectors if limit is None or s.end <= areas[0].address + limit]
    size = sum(s.size_bytes for s in sectors)
    data = pattern(seed, size)
    if not clean:
        frame = row.block_bytes + 15
        b.machine.drop_or_flip, b.machine.spoil_answers = noise(seed, 20 * frame), noise(seed + 1, 20 * 11)
    commands = []
    for sector in sectors:
        at = sector.address - areas[0].address
        key = (sector.address, sector_code(row, b.flash, sector), sector.size_bytes)
        commands.append(wire.erase([key], 2 * sector.erase_max_s, 2 * sector.erase_max_s))
        step = min(row.block_bytes, sector.size_bytes)
        for n in range(0, sector.size_bytes, step):
            commands.append(wire.write(sector.address + n, data[at + n : at + n + step], 2.0))
    before = b.uart.now_ns
    b.run(b.link.run(commands))
    cpu_s = 2e-6 * 16e6 / row.clock_hz  # for one byte of CRC
    found = b.run(b.link.crc_map(areas[0].address, size, 1, byte_s=cpu_s))
    seconds = (b.uart.now_ns - before) / 1e9
    if found != [zlib.crc32(data)] or b.machine.flash_is(areas[0].address, size) != data:
        raise AssertionError(f"{name}: the flash is not what was sent")
    if b.machine.flash.erases != [s.address for s in sectors]:
        raise AssertionError(f"{name}: a sector was erased twice or not at all")
    unit = b.machine.flash.unit(b.machine.flash.banks[0]) if name not in ("F407", "F756") else 4
    floor = sum(part.times.erase[s.size_bytes] for s in sectors) + size / unit * part.times.program
    print(
        f"{name}: {size // 1024} of {total // 1024} KiB in {seconds:.2f} s at {baud} baud, "
        f"the flash alone {floor / 1e9:.2f} s, {b.link.resent} frames again",
        flush=True,
    )
    return seconds, floor / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stub.full_flash", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", default=ALL, help=", ".join(ALL))
    parser.add_argument("--clean", action="store_true", help="leave the line alone")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    for name in arguments.names or ALL:
        write_all(name, clean=arguments.clean, seed=arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
