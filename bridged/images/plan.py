"""The plan: what a flash will do to one chip, computed before anything is touched. Pure: no I/O, no clock.

A plan says which sectors are erased and in what order, which bytes of those sectors lie outside the image and must be kept
(P6), which blocks are written and in what order, and what will be read back as the proof. It can be printed, tested, refused.

Invariants, each with a property test over all chips:

- Only sectors that share a byte with the image are erased; nothing is ever widened.
- Blocks are pieces of 256 bytes (or what the loader takes) on their own boundaries, padded with the erased value, inside
  erased sectors: that meets every alignment that AN2606 demands. No address is written twice: a word of ECC flash is
  programmed once an erase.
- Blank blocks are not written, but they are read back like all others: the proof covers every byte of the image.
- The sectors with a vector table are erased first, and the blocks with the tables written last, after all others are proven:
  at no moment can a half-written image boot, nor a half-written application be started by a bootloader that stays. So it is
  with the table of a bootloader that is kept in a sector which the image touches; in front of the image's own it is the very
  last block.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from bridged.chips.model import Chip, FlashMap, Range, Sector, joined
from bridged.errors import ImageDoesNotFit, NotAllowed
from bridged.events import SectorProven
from bridged.images.model import Image, sha256_hex

if TYPE_CHECKING:
    from bridged.chips.second_stage import SecondStage

BLOCK_BYTES = 256  # The most that one Write Memory takes, and a multiple of every alignment that AN2606 demands.
TURNAROUNDS = 3  # Write Memory and Read Memory: opcode, address, data or length; each awaits its ACK.


@dataclass(frozen=True, slots=True)
class Block:
    """One Write Memory: an aligned address and padded data."""

    address: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """``content``: what the touched flash shall hold, the image and what is kept.

    ``covered``: where ``content`` is all that there is: what the image leaves open there was read, or may be lost.
    ``outside``: ranges of the sectors to be erased that are in neither image nor ``covered``; empty after ``keeping``.
    ``erase`` and ``proven``: sectors to erase in order, and those that hold already what they shall.
    ``vectors``: addresses of vector tables of the image, first the one that the part starts from. ``tables``: the same, and
    before them those that are kept: of a bootloader in front of the image, in a sector that it shares with it.
    """

    chip: Chip
    flash: FlashMap
    image: Image
    content: Image
    erase: tuple[Sector, ...]
    proven: tuple[Sector, ...]
    outside: tuple[Range, ...]
    vectors: tuple[int, ...]
    covered: tuple[Range, ...]
    tables: tuple[int, ...]

    def keeping(self, kept: Image | None) -> Plan:
        """The plan after the bytes of ``outside`` were read; ``kept`` holds those that are not blank, None where all are, or
        where they may be lost."""
        content = self.content if kept is None else self.content.merged_with(kept)
        covered = (*self.covered, *(s.range for s in self.erase))
        return make_plan(self.image, self.chip, self.flash, map(self.proof, self.proven), content, self.vectors, covered)

    def leaving(self, sectors: Iterable[Sector]) -> Plan:
        """The plan after ``sectors`` were found to hold what they shall; a vector table goes with what still changes."""
        proofs = map(self.proof, (*self.proven, *sectors))
        return make_plan(self.image, self.chip, self.flash, proofs, self.content, self.vectors, self.covered)

    def unread(self) -> tuple[Range, ...]:
        """What an erase would take along that nobody has read, nor said to be lost (P6)."""
        return _gaps(self.erase, self.image, self.covered)

    def proof(self, sector: Sector) -> SectorProven:
        """What is said of a sector that was found to hold what it shall."""
        return SectorProven(sector.address, sector.size_bytes, self.sector_digest(sector))

    def sector_digest(self, sector: Sector) -> str:
        """SHA-256 of what the whole sector shall hold, blank bytes included."""
        data = self.content.read(sector.address, sector.size_bytes, self.chip.erased_value)
        return sha256_hex(data)

    def held(self) -> tuple[Range, ...]:
        """The blocks that make something bootable and are therefore written last: those with the vector tables that are erased,
        the one that the part starts from behind all others."""
        found: list[Range] = []
        for address in self.tables:
            block = _block_at(self.flash, self.chip, address)
            if block not in found and any(s.address <= address < s.end for s in self.erase):
                found.append(block)
        return tuple(reversed(found))

    def blocks(self) -> tuple[Block, ...]:
        """All Write Memory blocks by address, blank ones left out, those with vector tables last."""
        blank, held = self.chip.erased_value, self.held()
        found: list[Block] = []
        last: dict[int, Block] = {}
        for sector in sorted(self.erase, key=lambda s: s.address):
            step = _step(self.chip, sector)
            for at in range(sector.address, sector.end, step):
                data = self.content.read(at, step, blank)
                if data.count(blank) == step:
                    continue
                if any(r.start == at for r in held):
                    last[at] = Block(at, data)
                else:
                    found.append(Block(at, data))
        return (*found, *(last[r.start] for r in held if r.start in last))

    def reads(self) -> tuple[tuple[int, int], ...]:
        """What is read back as the proof, as (address, count): every byte of the content, in the fewest reads.

        The parts that hold vector tables come last, on their own, since they are written last.
        """
        held = self.held()
        body: list[tuple[int, int]] = []
        tails: dict[int, list[tuple[int, int]]] = {r.start: [] for r in held}
        for seg in self.content.segments:
            edges = {v for r in held for v in (r.start, r.end) if seg.address < v < seg.end}
            for lo, hi in pairwise(sorted({seg.address, seg.end, *edges})):
                tail = next((tails[r.start] for r in held if lo in r), body)
                tail.extend(_pieces(lo, hi, self.chip.read_max_bytes))
        return tuple(body + [read for tail in tails.values() for read in tail])

    def estimate_s(self, baud: int, *, turnaround_s: float = 0.0) -> float:
        """Seconds for typical erase times: keep, erase, write and read back."""
        frame_s = 11 / baud
        wire = sum(12 + len(b.data) for b in self.blocks()) + sum(12 + n for _, n in self.reads())
        wire += sum(12 + n for r in self.outside for _, n in _pieces(r.start, r.end, self.chip.read_max_bytes))
        turns = TURNAROUNDS * (len(self.blocks()) + len(self.reads()))
        return wire * frame_s + turns * turnaround_s + sum(s.erase_typ_s for s in self.erase)

    def streamed_s(self, row: SecondStage, baud: int, blank: Iterable[Sector] = ()) -> float:
        """The same by the second-stage loader, once it runs at ``baud``. ``blank`` sectors are not erased.

        While a sector is erased what belongs into it comes in, as far as the ring takes it; while it is programmed the rest.
        """
        from bridged.chips.second_stage import CRC_CYCLES, WRITE_CYCLES  # late: most sessions never load it

        stays, byte_s, flash = set(blank), 10 / baud, row.flash
        program_s = flash.unit_typ_s / flash.unit_bytes + WRITE_CYCLES / row.clock_hz
        seconds = self.outside_bytes * byte_s + self.content.size_bytes * CRC_CYCLES / row.clock_hz
        sizes = dict.fromkeys(self.erase, 0)
        for block in self.blocks():
            sector = self.flash.sector_at(block.address)
            assert sector is not None
            sizes[sector] += len(block.data)
        for sector, count in sizes.items():
            erase_s = 0.0 if sector in stays else sector.erase_typ_s
            hidden_s = min(erase_s, row.ring_bytes * byte_s)
            seconds += erase_s + max(count * program_s, count * byte_s - hidden_s)
        return seconds

    @property
    def erase_bytes(self) -> int:
        return sum(s.size_bytes for s in self.erase)

    @property
    def write_bytes(self) -> int:
        return sum(len(b.data) for b in self.blocks())

    @property
    def outside_bytes(self) -> int:
        return sum(r.size for r in self.outside)


def make_plan(
    image: Image,
    chip: Chip,
    flash: FlashMap,
    proven: Iterable[SectorProven] = (),
    content: Image | None = None,
    vectors: tuple[int, ...] = (),
    covered: Iterable[Range] = (),
) -> Plan:
    """Plan to have ``image`` in ``flash``. ``proven``: sectors that an interrupted run journaled as proven; each counts only
    if its digest is that of the content wanted now. ``content``: the image with kept bytes, once they are known, and
    ``covered`` where they are. ``vectors``: as in ``Plan``; without them the flash base if the image reaches it, else its first
    address.

    Raises ``ImageDoesNotFit`` naming the first range that is not flash of this chip.
    """
    for seg in image.segments:
        if not flash.covers(seg.address, seg.end):
            raise ImageDoesNotFit(
                f"the image has bytes at {seg.address:#010x}..{seg.end - 1:#010x}, and the flash of {chip.title} is "
                f"{flash.base:#010x}..{flash.base + flash.size_bytes - 1:#010x} ({flash.size_bytes // 1024} KiB, "
                f"layout {flash.layout})",
                start=seg.address,
                end=seg.end,
                flash_base=flash.base,
                flash_bytes=flash.size_bytes,
            )
    wanted = content or image
    touched = [s for s in flash.sectors if any(seg.address < s.end and s.address < seg.end for seg in image.segments)]
    vectors = vectors or (flash.base if image.start <= flash.base < image.end else image.start,)
    # From what lies in front of the image's own table the part starts before it, from what lies behind it after.
    kept = _kept_tables(image, wanted, chip, flash, vectors)
    tables = (*(t for t in kept if t < vectors[0]), *vectors, *(t for t in kept if t > vectors[0]))
    plan = Plan(chip, flash, image, wanted, (), (), (), vectors, (), tables)
    digests = {(p.address, p.size_bytes): p.digest for p in proven}
    done = [s for s in touched if digests.get((s.address, s.size_bytes)) == plan.sector_digest(s)]
    changed = [s for s in touched if s not in done]
    # What changes takes the sector of its vector table along, and whatever does the one that the part starts from: they go
    # first and come back last.
    for number, address in enumerate(vectors):
        end = min((v for v in vectors if v > address), default=image.end) if number else image.end
        if changed and (not number or any(s.address < end and address < s.end for s in changed)):
            done = [s for s in done if not s.address <= address < s.end]

    def order(sector: Sector) -> tuple[int, int]:
        return next((n for n, v in enumerate(tables) if sector.address <= v < sector.end), len(tables)), sector.address

    erase = sorted((s for s in touched if s not in done), key=order)
    known = joined(covered)
    outside = _gaps(erase, image, known)
    return Plan(chip, flash, image, wanted, tuple(erase), tuple(done), outside, vectors, known, tables)


def check_protected(
    sectors: Iterable[Sector], protect: Iterable[Range], flash: FlashMap | None = None, *, everything: bool = False
) -> None:
    """Raises ``NotAllowed`` where one of ``sectors``, which a job would erase, shares a byte with a range of ``protect``.

    ``flash``: where it is known; a range without a byte of it guards nothing, and its author thinks that it does.
    ``everything``: the whole flash is to be erased, which no range may stand against, wherever it is.
    """
    ranges = sorted(protect, key=lambda r: r.start)
    for sector in sectors:
        for kept in ranges:
            if kept.start < sector.end and sector.address < kept.end:
                raise NotAllowed(
                    f"sector {sector.code} ({sector.address:#010x}..{sector.end - 1:#010x}) would be erased, and the "
                    f"configuration protects {kept.start:#010x}..{kept.end - 1:#010x} of this target",
                    sector=sector.code,
                    address=sector.address,
                    protected_start=kept.start,
                    protected_end=kept.end,
                )
    if everything and ranges:
        raise NotAllowed(
            "the whole flash would be erased, and the configuration protects "
            f"{ranges[0].start:#010x}..{ranges[0].end - 1:#010x} of this target",
            protected_start=ranges[0].start,
            protected_end=ranges[0].end,
        )
    for kept in ranges if flash else ():
        if flash and not flash.sectors_in(kept.start, kept.end):
            raise NotAllowed(
                f"the configuration protects {kept.start:#010x}..{kept.end - 1:#010x} of this target, and the flash of this "
                f"part is {flash.base:#010x}..{flash.sectors[-1].end - 1:#010x}: correct `protect` before anything is erased",
                protected_start=kept.start,
                protected_end=kept.end,
            )


def _gaps(sectors: Iterable[Sector], image: Image, covered: Iterable[Range]) -> tuple[Range, ...]:
    """The parts of ``sectors`` that neither the image nor ``covered`` holds, by address, joined where they touch."""
    taken = sorted([*((s.address, s.end) for s in image.segments), *((r.start, r.end) for r in covered)])
    found: list[Range] = []
    for sector in sorted(sectors, key=lambda s: s.address):
        at = sector.address
        for start, end in taken:
            if end <= at or start >= sector.end:
                continue
            if start > at:
                found.append(Range(at, start))
            at = min(end, sector.end)
        if at < sector.end:
            found.append(Range(at, sector.end))
    return joined(found)


def _kept_tables(image: Image, content: Image, chip: Chip, flash: FlashMap, vectors: tuple[int, ...]) -> list[int]:
    """The starts of the flash and of its second bank, where the block there has bytes that are kept: from such a table the part
    starts before anything of the image, and the code behind it comes back with all the rest."""
    found: list[int] = []
    for bank in sorted({s.bank for s in flash.sectors}):
        start = min(s.address for s in flash.sectors if s.bank == bank)
        block = _block_at(flash, chip, start)
        kept = content.read(start, block.size, chip.erased_value) != image.read(start, block.size, chip.erased_value)
        if kept and not any(v in block for v in vectors):
            found.append(start)
    return found


def _block_at(flash: FlashMap, chip: Chip, address: int) -> Range:
    """The block of one Write Memory that ``address`` lies in."""
    step = _step(chip, flash.sector_at(address))
    return Range(address // step * step, address // step * step + step)


def _step(chip: Chip, sector: Sector | None) -> int:
    """Bytes of one block there: a block never crosses a sector, and L0 has pages of 128 bytes."""
    return min(chip.write_max_bytes, sector.size_bytes if sector else BLOCK_BYTES)


def _pieces(start: int, end: int, most: int) -> list[tuple[int, int]]:
    return [(at, min(most, end - at)) for at in range(start, end, most)]
