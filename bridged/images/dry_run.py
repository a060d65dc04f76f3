"""A plan in numbers for a target that nobody touches: what PLAN shows.

It works from what the configuration states and what the last identification found, and names what it had to assume. The
session plans again from what the chip itself says; this is for people and for refusing nonsense early, a wrong vector table
included. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from bridged import chips
from bridged.chips.model import Range, Sector
from bridged.chips.second_stage import row_for, start_s, why_not
from bridged.errors import UnknownChip
from bridged.images.model import Image, Span
from bridged.images.plan import Plan, check_protected, make_plan
from bridged.images.vectors import check_vectors_for, flash_range, vector_addresses


@dataclass(frozen=True, slots=True)
class Seen:
    """What the last identification found; it counts only while the same chip is meant. 0 and empty where unknown."""

    pid: int = 0
    flash_bytes: int = 0
    layout: str = ""


def dry_run(
    image: Image,
    *,
    chip: str = "",
    flash_bytes: int = 0,
    layout: str = "",
    baud: int = 0,
    seen: Seen | None = None,
    spans: Sequence[Span] = (),
    discard_outside: bool = False,
    force: frozenset[str] = frozenset(),
    protect: Sequence[tuple[int, int]] = (),
    unprotect: bool = False,
    second_stage_baud: int = 0,
    supply_v: float = 0.0,
) -> dict[str, Any]:
    """``{chip, pid, layout, flash_bytes, range, erase_sectors, erase_bytes, write_bytes, keep_bytes, lose_bytes, stay_bytes,
    seconds, seconds_most, erase_seconds, baud, assumed}``.

    ``chip``, ``flash_bytes``, ``layout``, ``baud``: as configured, empty or 0 where not. ``range``: the whole flash, see
    ``_ranges``. ``seconds``: with typical erase times and all kept bytes blank; ``seconds_most``: none of them blank.
    ``assumed``: what was guessed. ``second_stage_baud``: the rate of the second-stage loader where it will be tried, else 0.
    ``unprotect``: readout protection may be removed first, which erases everything; the answer
    then has ``if_protected``. Raises ``UnknownChip``, ``Unsupported``, ``LayoutUnknown``, ``ImageDoesNotFit``,
    ``ImageNotBootable``, and ``NotAllowed`` where a sector overlaps one of ``protect`` (start and end).
    """
    last = seen or Seen()
    if not chip and not last.pid:
        raise UnknownChip("neither configured nor identified yet: which chip is it? Run ID, or state `chip`")
    found = chips.find(chip) if chip else chips.by_pid(last.pid)
    found.refuse_foreign()
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
    plan = make_plan(image, found, flash, vectors=vector_addresses(image, flash_range(found, flash_bytes), spans))
    check_protected(plan.erase, [Range(start, end) for start, end in protect], flash, everything=unprotect)
    if "vectors" not in force:
        check_vectors_for(image, found, flash_bytes, spans)
    ranges = _ranges(plan, discard_outside)
    if discard_outside:
        plan = plan.keeping(None)
    in_use = (
        Image.of((gap.start, bytes([found.erased_value ^ 0xFF]) * gap.size) for gap in plan.outside) if plan.outside else None
    )
    most = replace(plan.keeping(in_use), outside=plan.outside)
    seconds, seconds_most = plan.estimate_s(rate), most.estimate_s(rate)
    if second_stage_baud and not why_not(found, None):
        row = row_for(found, supply_v)
        assumed.append(f"second-stage loader at {second_stage_baud} baud; {seconds:.0f} s without it")
        seconds, seconds_most = (start_s(rate) + p.streamed_s(row, second_stage_baud) for p in (plan, most))
    return {
        "chip": found.title,
        "pid": found.pid,
        "layout": flash.layout,
        "flash_bytes": flash_bytes,
        "range": ranges,
        "erase_sectors": len(plan.erase),
        "erase_bytes": plan.erase_bytes,
        "write_bytes": plan.write_bytes,
        "keep_bytes": plan.outside_bytes,
        "lose_bytes": sum(row["lose_bytes"] for row in ranges),
        "stay_bytes": flash.size_bytes - plan.erase_bytes,
        "seconds": round(seconds, 3),
        "seconds_most": round(seconds_most, 3),
        "erase_seconds": round(sum(sector.erase_typ_s for sector in plan.erase), 3),
        "baud": rate,
        "assumed": assumed,
        **({"if_protected": "the whole flash is erased first, and nothing of it is kept"} if unprotect else {}),
    }


def _ranges(plan: Plan, discard_outside: bool) -> list[dict[str, Any]]:
    """The flash as runs of sectors of one size, numbered without a gap, to which the same happens: ``{action, address, end,
    sectors, first, last, sector_bytes, write_bytes, keep_bytes, lose_bytes}``; ``end`` is exclusive, ``first`` and ``last`` are
    sector codes.

    ``action``: ``stay`` (not touched), ``write`` (erased, written, proven), ``keep`` (so, and the bytes outside the image are
    read before and put back), ``lose`` (so, and they are lost: ``outside=discard``).
    """
    erased = {sector.address for sector in plan.erase}
    written: dict[int, int] = {}
    for block in plan.blocks():
        sector = plan.flash.sector_at(block.address)
        assert sector is not None
        written[sector.address] = written.get(sector.address, 0) + len(block.data)
    rows: list[dict[str, Any]] = []
    for sector in sorted(plan.flash.sectors, key=lambda s: s.address):
        open_bytes = _outside_bytes(plan, sector) if sector.address in erased else 0
        action = (
            "stay" if sector.address not in erased else "write" if not open_bytes else "lose" if discard_outside else "keep"
        )
        if not (
            rows
            and (rows[-1]["end"], rows[-1]["last"] + 1) == (sector.address, sector.code)
            and (rows[-1]["action"], rows[-1]["sector_bytes"]) == (action, sector.size_bytes)
        ):
            rows.append(
                {
                    "action": action,
                    "address": sector.address,
                    "end": sector.address,
                    "sectors": 0,
                    "first": sector.code,
                    "last": sector.code,
                    "sector_bytes": sector.size_bytes,
                    "write_bytes": 0,
                    "keep_bytes": 0,
                    "lose_bytes": 0,
                }
            )
        row = rows[-1]
        row["end"], row["last"] = sector.end, sector.code
        row["sectors"] += 1
        row["write_bytes"] += written.get(sector.address, 0)
        if action in ("keep", "lose"):
            row[f"{action}_bytes"] += open_bytes
    return rows


def _outside_bytes(plan: Plan, sector: Sector) -> int:
    return sum(max(0, min(gap.end, sector.end) - max(gap.start, sector.address)) for gap in plan.outside)
