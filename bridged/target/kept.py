"""What a session keeps of the sectors that it erases, as the bytes that its barrier puts on disk (P6), and which it leaves.

A job that was interrupted and goes on cannot read those bytes again: they are erased. They are therefore only good for the
sectors that were looked at: hence the ranges beside the content. A sector outside of them was not erased by the job; what lies
beside the image in it is read first, should it have to be erased now. One that is only partly in them is refused: somebody has
changed the configured layout in between, and sectors that are larger now hold bytes that nobody saved.

Beside them stands whether the flash was empty before: parts that check for that at power-on (AN2606) do not start what was
flashed since by a reset, and after a crash nobody could find out any more.

Encoding (little-endian): magic ``BRKEPT2\\n``, u32 flags (bit 0: was empty), u32 number of ranges, for each u32 start and u32
size, then an encoded ``Image`` (``images.model``), or nothing where all that was read was blank. Bytes without that magic are
such an image alone, whose ranges are not known. Pure: no I/O.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

from bridged.chips.model import FlashMap, Range, Sector
from bridged.errors import BridgedError, CorruptImage, LayoutUnknown
from bridged.images.model import Image
from bridged.images.plan import Plan
from bridged.protocol.flow import Flow, Report
from bridged.target.request import Result

NOTHING_KEPT = b"BRIMG01\n\x00\x00\x00\x00"  # An encoded image without segments: "read, and all of it was blank".
_MAGIC = b"BRKEPT2\n"
_WAS_EMPTY = 1
_HEAD = struct.Struct("<II")  # flags, number of ranges
_ENTRY = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Kept:
    """``ranges``: whole sectors whose content outside the image is in ``outside`` (None: blank); None where not known."""

    ranges: tuple[Range, ...] | None
    outside: Image | None
    was_empty: bool = False

    def content(self, image: Image) -> Image:
        """``image`` and what was kept beside it."""
        return image if self.outside is None else image.merged_with(self.outside)

    def covered(self, flash: FlashMap) -> tuple[Range, ...]:
        """Where nothing needs to be read any more: outside of it the job has not erased anything yet."""
        return (Range(flash.base, flash.sectors[-1].end),) if self.ranges is None else self.ranges

    def check(self, sectors: Iterable[Sector]) -> None:
        """Raises ``LayoutUnknown`` where a part of one of ``sectors`` may be erased already, and another was never read."""
        for sector in sectors:
            met = [r for r in self.ranges or () if r.start < sector.end and sector.address < r.end]
            if met and not any(r.covers(sector.address, sector.end) for r in met):
                raise LayoutUnknown(
                    f"the interrupted job had other sectors: what it kept does not cover sector {sector.code} "
                    f"({sector.address:#010x}..{sector.end - 1:#010x}) of the layout that is configured now; submit it anew",
                    sector=sector.code,
                    address=sector.address,
                )


def encode_kept(plan: Plan, *, was_empty: bool = False) -> bytes:
    """The content of the touched sectors that is not in the image.

    No erase of a plan begins without it, so here is the last look (P6): a sector goes only where image and kept bytes cover all
    of it, or its rest may be lost. Raises ``BridgedError`` where it is not so, which would be a mistake of ours.
    """
    if unread := plan.unread():
        raise BridgedError(
            f"the plan would erase {unread[0].start:#010x}..{unread[0].end - 1:#010x}, which the image leaves open and nobody "
            "has read; nothing was erased",
            address=unread[0].start,
        )
    inside = [(s.address, s.end) for s in plan.image.segments]
    parts: list[tuple[int, bytes]] = []
    for seg in plan.content.segments:
        at = seg.address
        for lo, hi in inside:
            if hi <= at or lo >= seg.end:
                continue
            if lo > at:
                parts.append((at, seg.data[at - seg.address : lo - seg.address]))
            at = max(at, min(hi, seg.end))
        if at < seg.end:
            parts.append((at, seg.data[at - seg.address :]))
    ranges = b"".join(_ENTRY.pack(r.start, r.size) for r in plan.covered)
    head = _MAGIC + _HEAD.pack(_WAS_EMPTY * was_empty, len(plan.covered)) + ranges
    return head + (Image.of(parts).encode() if parts else b"")


def decode_kept(encoded: bytes) -> Kept:
    """Inverse of ``encode_kept``. Raises ``CorruptImage``."""
    if not encoded.startswith(_MAGIC):
        return Kept(None, None if encoded == NOTHING_KEPT else Image.decode(encoded))
    try:
        flags, count = _HEAD.unpack_from(encoded, len(_MAGIC))
        at = len(_MAGIC) + _HEAD.size
        found = [_ENTRY.unpack_from(encoded, at + i * _ENTRY.size) for i in range(count)]
        ranges = tuple(Range(start, start + size) for start, size in found)
    except (struct.error, ValueError) as error:
        raise CorruptImage(f"the kept bytes of an interrupted job cannot be understood: {error}") from error
    rest = encoded[at + count * _ENTRY.size :]
    return Kept(ranges, Image.decode(rest) if rest else None, bool(flags & _WAS_EMPTY))


def was_empty(encoded: bytes) -> bool:
    """Whether the job that kept this found an empty flash; False also where that cannot be understood."""
    try:
        return decode_kept(encoded).was_empty
    except CorruptImage:
        return False


def leave_as_is(plan: Plan, equal: Iterable[Sector], result: Result) -> Flow[tuple[Plan, set[Sector]]]:
    """The plan without those of the ``equal`` sectors that need not go with what changes, and these; they are proven."""
    less = plan.leaving(equal)
    stay = set(plan.erase) - set(less.erase)
    for sector in (s for s in plan.erase if s in stay):
        yield Report(plan.proof(sector))
    result.sectors_skipped += len(stay)
    result.bytes_skipped += sum(s.size_bytes for s in stay)
    return less, stay
