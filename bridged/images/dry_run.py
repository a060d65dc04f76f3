"""A plan in numbers for a target that nobody touches: what PLAN shows.

It works from what the configuration states and what the last identification found, and names what it had to assume. The
session plans again from what the chip itself says; this is for people and for refusing nonsense early. Pure: no I/O, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bridged import chips
from bridged.errors import UnknownChip
from bridged.images.model import Image
from bridged.images.plan import make_plan


@dataclass(frozen=True, slots=True)
class Seen:
    """What the last identification found; it counts only while the same chip is meant. 0 and empty where unknown."""

    pid: int = 0
    flash_bytes: int = 0
    layout: str = ""


def dry_run(
    image: Image, *, chip: str = "", flash_bytes: int = 0, layout: str = "", baud: int = 0, seen: Seen | None = None
) -> dict[str, Any]:
    """``{chip, pid, layout, flash_bytes, sectors, write_bytes, keep_bytes, erase_bytes, seconds, baud, assumed}``.

    ``chip``, ``flash_bytes``, ``layout``, ``baud``: as configured, empty or 0 where not. ``sectors``: ``{code, address, size,
    action}`` by address, action ``erase`` (to be erased, written and proven) or ``keep`` (its bytes outside the image are read
    and restored as well). ``assumed``: what was guessed. Raises ``UnknownChip``, ``LayoutUnknown``, ``ImageDoesNotFit``.
    """
    last = seen or Seen()
    if not chip and not last.pid:
        raise UnknownChip("neither configured nor identified yet: which chip is it? Run ID, or state `chip`")
    found = chips.find(chip) if chip else chips.by_pid(last.pid)
    if last.pid == found.pid:
        flash_bytes, layout = flash_bytes or last.flash_bytes, layout or last.layout
    assumed: list[str] = []
    if not flash_bytes:
        flash_bytes = found.flash_max_bytes
        assumed.append(f"flash of {flash_bytes // 1024} KiB, the largest of this chip")
    flash = found.flash_map(flash_bytes, layout or None)
    if not layout and len(found.layouts_for(flash_bytes)) > 1:
        assumed.append(f"layout {flash.layout}")
    rate = baud or found.first_baud
    plan = make_plan(image, found, flash)
    partial = {s.address for s in plan.erase if any(r.start < s.end and s.address < r.end for r in plan.outside)}
    return {
        "chip": found.title,
        "pid": found.pid,
        "layout": flash.layout,
        "flash_bytes": flash_bytes,
        "sectors": [
            {
                "code": sector.code,
                "address": sector.address,
                "size": sector.size_bytes,
                "action": "keep" if sector.address in partial else "erase",
            }
            for sector in sorted(plan.erase, key=lambda s: s.address)
        ],
        "write_bytes": plan.write_bytes,
        "keep_bytes": plan.outside_bytes,
        "erase_bytes": plan.erase_bytes,
        "seconds": round(plan.estimate_s(rate), 3),
        "baud": rate,
        "assumed": assumed,
    }
