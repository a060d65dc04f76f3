"""Writing a plan and proving it by AN3155: every byte of the content is read back and compared, or its checksum is (P3).

Nothing becomes bootable before all the rest is proven: the blocks with vector tables are written last, and proven last. What
differs is read again, then its sector is erased and written anew: never a block rewritten over what is there.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable

from bridged.chips.model import FlashMap, Sector
from bridged.errors import Garbled, Nack, NoReply, VerifyError
from bridged.events import Phase, Retried, SectorErased, Warned
from bridged.images.plan import Block, Plan
from bridged.protocol import an3155
from bridged.protocol.an3155 import Command
from bridged.protocol.flow import Barrier, Checkpoint, Flow, Now, Progress, Report
from bridged.target.dialogue import Dirty, different, erase_wait_s
from bridged.target.entry import phase_started
from bridged.target.erasing import erase_batch
from bridged.target.identify import Known
from bridged.target.request import Result

SECTOR_TRIES = 3

Read = tuple[int, int]  # Address and number of bytes.


class Work:
    """Writing and proving one plan. ``final`` False: all but the blocks with vector tables; True: those alone.

    A sector that holds something else than it should, after an accident or for a bad word, is erased and written again, a
    bounded number of times. Nothing else is ever erased here.
    """

    def __init__(self, plan: Plan, known: Known, result: Result) -> None:
        self.plan, self.known, self.result = plan, known, result
        self.blocks = plan.blocks()
        self.reads = plan.reads()
        self.held = plan.held()
        self.repaired: set[int] = set()

    def _is_final(self, address: int) -> bool:
        return any(block.start <= address < block.end for block in self.held)

    def _in_order(self) -> list[Sector]:
        """By address, but the sector that the part starts from last: its table is the last block of all."""
        last = self.held[-1].start if self.held else -1
        return sorted(self.plan.erase, key=lambda s: (s.address <= last < s.end, s.address))

    def _blocks_of(self, sector: Sector, *, final: bool) -> list[Block]:
        return [b for b in self.blocks if sector.address <= b.address < sector.end and self._is_final(b.address) is final]

    def _reads_of(self, sector: Sector, *, final: bool) -> list[Read]:
        return [r for r in self.reads if _overlap(r, sector) and self._is_final(r[0]) is final]

    def write(self, *, final: bool) -> Flow[None]:
        total = sum(len(b.data) for b in self.blocks if self._is_final(b.address) is final)
        if not total:
            return
        yield from phase_started(Phase.WRITE, total)
        cost = self.result.cost(Phase.WRITE)
        begun: float = yield Now()
        done = 0
        for sector in self._in_order():
            done = yield from self._write_sector(sector, final=final, done=done)
        self.result.bytes_written += done
        cost.payload_bytes += done
        cost.wire_bytes += done + 12 * sum(self._is_final(b.address) is final for b in self.blocks)
        cost.seconds += (yield Now()) - begun

    def _write_sector(self, sector: Sector, *, final: bool, done: int = 0) -> Flow[int]:
        """The blocks of one sector; ``done`` bytes of the phase before it. Returns them with those of this sector."""
        line, chip = self.known.line, self.known.chip
        for attempt in range(SECTOR_TRIES):
            at = done
            queue = deque((b.address, b.data) for b in self._blocks_of(sector, final=final))

            def written(count: int) -> Flow[None]:
                nonlocal at
                at += count
                yield Progress(at)

            try:
                yield Checkpoint()
                yield from line.write_all(queue, written, ack_max_s=chip.write_ack_max_s, blank=chip.erased_value)
                return at
            except Dirty as dirty:
                if attempt == SECTOR_TRIES - 1:
                    raise VerifyError(f"{dirty.why}, {SECTOR_TRIES} times in a row", address=dirty.address) from dirty
                yield Report(Retried("sector", dirty.why))
                yield from self._start_over(sector, final=final)
        raise AssertionError("the last attempt returns or raises")

    def _start_over(self, sector: Sector, *, final: bool) -> Flow[None]:
        """Erase ``sector`` and bring it to where this stage began: for the final one all its other blocks, proven."""
        # Since "erased" the journal knows of no hazard any more, and it is all that is left after a SIGKILL of everybody (P9).
        yield Barrier("erasing", erase_wait_s([sector]))
        seconds = yield from erase_batch([sector], self.known)
        yield Barrier("erased")
        yield Report(SectorErased(sector.address, sector.size_bytes, seconds))
        if final:
            yield from self._write_sector(sector, final=False)
            for address, count in self._reads_of(sector, final=False):
                data = yield from self.known.line.read(address, count)
                if data != self.plan.content.read(address, count):
                    data = yield from self.known.line.read(address, count)
                _must_equal(address, self.plan.content.read(address, count), data)

    def prove(self, *, final: bool, repair: bool = True) -> Flow[None]:
        """Read back and compare. A sector is reported as proven when no reading of it is outstanding: the journal has it then,
        and whatever is found later, it is not erased again (P5).

        A difference is read again first, for the wire may have made it; what is really wrong is repaired once, if it may be.
        """
        plan, line = self.plan, self.known.line
        reads = [r for r in self.reads if self._is_final(r[0]) is final]
        if not reads:
            return
        total = sum(n for _, n in reads)
        yield from phase_started(Phase.VERIFY, total)
        cost = self.result.cost(Phase.VERIFY)
        begun: float = yield Now()
        queue, done = deque(reads), 0
        touched = _sectors_of(reads, plan.erase)
        outstanding: dict[Sector, set[Read]] = {}
        for read, sectors in touched.items():
            for sector in sectors:
                outstanding.setdefault(sector, set()).add(read)
        differs: tuple[int, bytes] | None = None

        def compare(address: int, data: bytes) -> Flow[bool]:
            nonlocal done, differs
            if data != plan.content.read(address, len(data)):
                differs = address, data
                return False
            done += len(data)
            yield Progress(min(done, total))
            read = address, len(data)
            for sector in [s for s in touched[read] if s in outstanding]:
                outstanding[sector].discard(read)
                if outstanding[sector]:
                    continue
                del outstanding[sector]
                if final or not any(sector.address <= block.start < sector.end for block in self.held):
                    yield Report(plan.proof(sector))
            return True

        if Command.GET_CHECKSUM in line.loader.commands:
            queue = deque((yield from self._checksummed(reads, compare)))
        while queue:
            yield Checkpoint()
            yield from line.read_all(queue, compare)
            if differs is None:
                continue
            (address, data), differs = differs, None
            expected = plan.content.read(address, len(data))
            data = yield from line.read(address, len(data))
            if data == expected:
                yield Report(Retried("verify", f"a second reading of {address:#010x} was right"))
                yield from compare(address, data)
                continue
            wrong = self._at_fault(address, expected, data)
            if not repair or wrong is None or wrong not in outstanding:  # What was reported as proven is not erased any more.
                raise different(address, expected, data)
            yield Report(Retried("sector", f"sector {wrong.code} differs at {address:#010x} and is written again"))
            yield from self._start_over(wrong, final=final)
            yield from self._write_sector(wrong, final=final)
            again = [r for r in reads if _overlap(r, wrong)]
            outstanding[wrong] = set(again)
            queue = deque(again + [r for r in queue if r not in again])
        self.result.bytes_compared += total
        cost.payload_bytes += total
        cost.wire_bytes += total + 12 * len(reads)
        cost.seconds += (yield Now()) - begun

    def _checksummed(self, reads: list[Read], compare: Callable[[int, bytes], Flow[bool]]) -> Flow[list[Read]]:
        """Prove what the loader's own checksum (0xA1) can prove, sector by sector, and return what is left to be read.

        The command is believed only when it agrees with a block that was read in this session. A range whose checksum
        differs is read, which says where. ``compare`` is given the content of each range that is right.
        """
        line, content = self.known.line, self.plan.content
        whole = [r for r in reads if not (r[0] % 4 or r[1] % 4)]
        if not whole:
            return reads
        left = list(reads)
        try:
            address, count = whole[0]
            data = yield from line.read(address, count)
            if (yield from line.checksum(address, count)) != an3155.checksum_of(data):
                yield Report(Warned("CHECKSUM_USELESS", "Get Checksum does not agree with what is read: all is read back"))
                return reads
            for run in _runs(whole, self.known.flash):
                yield Checkpoint()
                start, end = run[0][0], run[-1][0] + run[-1][1]
                if (yield from line.checksum(start, end - start)) != an3155.checksum_of(content.read(start, end - start)):
                    continue
                for read in run:
                    left.remove(read)
                    yield from compare(read[0], content.read(*read))
                self.result.bytes_checksummed += end - start
        except (Nack, NoReply, Garbled) as error:
            yield Report(Warned("CHECKSUM_USELESS", f"what is left is read back: {error.message}"))
            if not isinstance(error, Nack):
                yield from line.reconnect()
        return left

    def _at_fault(self, address: int, expected: bytes, found: bytes) -> Sector | None:
        """The sector of the first difference, if it is one of this plan's and was not repaired yet."""
        at = address + _first_difference(expected, found)
        sector = next((s for s in self.plan.erase if s.address <= at < s.end), None)
        if sector is None or sector.code in self.repaired:
            return None
        self.repaired.add(sector.code)
        return sector


def _runs(reads: Iterable[Read], flash: FlashMap | None) -> list[list[Read]]:
    """Reads that follow each other within one sector, so that a difference costs no more than the sector to find."""
    found: list[list[Read]] = []
    for read in reads:
        last = found[-1][-1] if found else None
        sector = flash.sector_at(read[0]) if flash else None
        if last and sector and last[0] + last[1] == read[0] and sector.address <= last[0]:
            found[-1].append(read)
        else:
            found.append([read])
    return found


def _sectors_of(reads: Iterable[Read], sectors: Iterable[Sector]) -> dict[Read, list[Sector]]:
    """Those of ``sectors`` that each read shares a byte with."""
    ordered = sorted(sectors, key=lambda s: s.address)
    starts = [s.address for s in ordered]
    found: dict[Read, list[Sector]] = {}
    for read in reads:
        first = max(0, bisect_right(starts, read[0]) - 1)
        found[read] = [s for s in ordered[first : bisect_left(starts, read[0] + read[1])] if _overlap(read, s)]
    return found


def _overlap(read: Read, sector: Sector) -> bool:
    return read[0] < sector.end and sector.address < read[0] + read[1]


def _first_difference(expected: bytes, found: bytes) -> int:
    return next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)


def _must_equal(address: int, expected: bytes, found: bytes) -> None:
    if expected != found:
        raise different(address, expected, found)
