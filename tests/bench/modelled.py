"""AN3155 and the second-stage loader in virtual time, by family: modelled, and never to be read as measured.

Whole sessions, from the reset to the running application, on a flash that is full of something else. The ROM loader is the
simulator's; the second-stage loader is the shipped binary in an emulated core (``tests/stub``). Both get the same erase and
program times, which are typical ones and partly from memory (``tests/stub/parts.py``), and a host that costs nothing. The
figures are the same on every machine, so no quiet one is needed: ``python -m tests.bench.modelled`` prints them.

Beside them stands what the flash alone needs to erase and program as much, whoever speaks. A part of the flash is written and
scaled to 1 MiB; what a session needs once, before and after it erases, writes and proves, is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bridged.chips.second_stage import row_for
from bridged.images.model import Image
from bridged.sim.loader import Timing
from tests.stub.bench import pattern
from tests.stub.parts import KIB, PARTS
from tests.stub.sessions import Sessions
from tests.target.bench import make_image

MIB = 1024 * KIB
BAUDS = (115200, 460800, 921600)
WITHIN = 25.0  # %, of the flash floor, at 921600: the aim, stated before anything was modelled.
SMALL_KIB, LARGE_KIB = 128, 512  # Of a part with small sectors, and of one with large ones; an emulated MiB takes 40 s.
SUPPLY_V = 3.3
FAMILIES = {"F407": "F4", "F756": "F7", "L476": "L4", "G071": "G0", "F103": "F1", "H743": "H7"}


def size_of(name: str) -> int:
    """How much of a part is written: enough for each of its kinds of sectors."""
    small = max(area.size for area in PARTS[name].areas) <= 4 * KIB
    return SMALL_KIB * KIB if small else LARGE_KIB * KIB


def floor_s(name: str, count: int) -> float:
    part = PARTS[name]
    row = row_for(Sessions(name).chip, SUPPLY_V)
    erase = sum(part.times.erase[a.size] for a in part.areas if a.address < part.areas[0].address + count)
    return (erase + count // row.flash.unit_bytes * part.times.program) / 1e9


def timing(name: str) -> Timing:
    """The ROM loader of the simulator with the flash of the emulated part."""
    part = PARTS[name]
    row = row_for(Sessions(name).chip, SUPPLY_V)
    sizes = {a.size for a in part.areas}
    # Parts with sectors of several sizes: their typical times are the same in both places, which a test looks after.
    erase: Any = "typical" if len(sizes) > 1 else part.times.erase[sizes.pop()] / 1e9
    return Timing(sector_erase_s=erase, spread=0.0, program_s_per_256=256 / row.flash.unit_bytes * part.times.program / 1e9)


def one(name: str, baud: int, *, second_stage: bool, count: int) -> tuple[float, float]:
    """Seconds of the whole session that writes and proves ``count`` bytes, and those of them that any size needs once."""
    s = Sessions(name, timing=timing(name))
    s.load(pattern(3, count))
    image = Image.of([(s.chip.flash_base, _whole(s, count))])
    asked = {"second_stage": "auto", "second_stage_baud": max(baud, 115200)} if second_stage else {"second_stage": "off"}
    rom_baud = 115200 if second_stage else baud
    result = s.run("flash", image, baud=rom_baud, supply_v=SUPPLY_V, listen_s=0.1, **asked)
    proof = "crc-on-target" if second_stage else "read-back"
    if result.proof != proof or not s.holds(image):
        raise AssertionError(f"{name} at {baud} baud was proven by {result.proof}: {result.second_stage}")
    return result.seconds, result.seconds - sum(
        result.phases[p].seconds for p in ("erase", "write", "verify") if p in result.phases
    )


def _whole(s: Sessions, count: int) -> bytes:
    data = bytearray(make_image(s.chip, count).segments[0].data)
    data[2048:3072] = pattern(4, 1024)  # No blank stretch: every byte goes over the wire.
    return bytes(data)


def figures(names: Sequence[str] = tuple(FAMILIES)) -> list[dict[str, Any]]:
    """A row for each family, seconds for 1 MiB. A minute a family."""
    rows = []
    for name in names:
        count = size_of(name)
        scale = MIB / count
        row: dict[str, Any] = {
            "part": name,
            "family": FAMILIES[name],
            "kib": count // KIB,
            "floor_s": scale * floor_s(name, count),
        }
        for baud in BAUDS:
            for kind, second_stage in (("rom", False), ("stub", True)):
                seconds, once = one(name, baud, second_stage=second_stage, count=count)
                row[f"{kind}_{baud}"] = once + scale * (seconds - once)
        rows.append(row)
        print(f"  modelled {name}: {row['stub_921600']:.1f} s, the flash alone {row['floor_s']:.1f} s", flush=True)
    return rows


def section(rows: Sequence[Mapping[str, Any]]) -> str:
    """A section of the page of benchmarks, without its heading."""
    text = [
        "**Modelled, not measured: no silicon was involved.** Seconds for 1 MiB of which every byte changes, from the reset to "
        "the running application, in virtual time. The ROM loader is the simulator's; the second-stage loader is the shipped "
        "binary in an emulated core at the clock of its row. Erase and program times are typical ones, partly from memory, the "
        "same for both; the host costs nothing. *Flash alone* is what erase and program need, whoever speaks. That a ROM "
        "loader answers at 460800 or 921600 baud at all is promised by nobody. Scaled from a part of the flash.\n",
        _table(
            ("", *(f"{baud}: AN3155, second stage" for baud in BAUDS), "flash alone", "over it at 921600"),
            (
                (
                    f"{row['family']} ({row['part']})",
                    *(f"{row[f'rom_{baud}']:.0f}, {row[f'stub_{baud}']:.0f}" for baud in BAUDS),
                    f"{row['floor_s']:.1f}",
                    f"{over(row):.0f} %",
                )
                for row in rows
            ),
        ),
    ]
    missed = [f"{row['family']} by {over(row) - WITHIN:.0f} points" for row in rows if over(row) > WITHIN]
    text.append(
        f"\nThe aim is at most {WITHIN:.0f} % over the flash alone at 921600 baud: "
        + (f"missed by {', '.join(missed)}." if missed else "met by all of them.")
    )
    return "\n".join(text) + "\n"


def over(row: Mapping[str, Any]) -> float:
    """Per cent over the flash alone."""
    return 100 * (float(row["stub_921600"]) / float(row["floor_s"]) - 1)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.modelled", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(FAMILIES))
    print(section(figures(parser.parse_args().names or tuple(FAMILIES))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
