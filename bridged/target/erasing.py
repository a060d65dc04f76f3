"""Erasing: never more than was named, in commands of a bounded time, and never believed before it was looked at.

The first sector of an erase goes alone: it must be blank at both ends and its neighbours unchanged before the rest goes. Before
the first command the daemon has the hazard, and the bytes that are kept, on disk (the ``erasing`` barrier, P6 and P9).

Documents: AN3155 (Erase, Extended Erase), AN2606 (how many sectors a command may have, loaders that acknowledge too early).
"""

from __future__ import annotations

from collections.abc import Iterable

from bridged.chips.model import Chip, FlashMap, Quirk, Sector
from bridged.errors import BadRequest, ImageDoesNotFit, Nack
from bridged.events import Phase, Planned, Retried, SectorErased, StepDone, Warned
from bridged.images.plan import check_protected
from bridged.protocol import an3155
from bridged.protocol.an3155 import Command, MassErase, Timing
from bridged.protocol.flow import Barrier, Checkpoint, Flow, Now, Progress, Report
from bridged.target.dialogue import SLOW_ERASE_LEAST_S, SLOW_SECTOR_S, different, erase_wait_s, not_erased, pieces, wrong_sector
from bridged.target.entry import phase_started
from bridged.target.identify import Known
from bridged.target.kept import NOTHING_KEPT
from bridged.target.request import Request, Result
from bridged.target.way_back import check_entry

ERASE_BATCH_S = 4.0  # Longest worst case of one erase command of several sectors: progress, and a bounded wait.
CHECK_BYTES = 256
ASKING_S = 0.1  # What a command and its answers take beside the erase: up to 260 bytes, and what an adapter adds to an answer.


def erase_range(request: Request, known: Known, result: Result) -> Flow[None]:
    """Erase exactly the range that the job names, and prove it blank. A range that cuts a sector is refused, not widened."""
    yield from phase_started(Phase.PLAN)
    flash, chip = known.flash_map(), known.chip
    start = request.address if request.length else flash.base
    end = start + request.length if request.length else flash.sectors[-1].end
    sectors = flash.sectors_in(start, end)
    if not flash.covers(start, end) and request.length:
        raise ImageDoesNotFit(
            f"{start:#010x}..{end - 1:#010x} is not within the flash of {chip.title} "
            f"({flash.base:#010x}..{flash.sectors[-1].end - 1:#010x})",
            start=start,
            end=end,
        )
    if request.length and (sectors[0].address != start or sectors[-1].end != end):
        raise BadRequest(
            f"the range {start:#010x}..{end - 1:#010x} cuts a sector; the sectors there are "
            f"{sectors[0].address:#010x}..{sectors[-1].end - 1:#010x}",
            start=sectors[0].address,
            end=sectors[-1].end,
        )
    check_protected(sectors, request.protect, flash, everything=not request.length)
    yield from check_entry(request, known)
    yield from known.line.use_supply()
    total = sum(s.size_bytes for s in sectors)
    seconds = sum(s.erase_typ_s for s in sectors) + total * 1.05 * known.line.timing.byte_s
    limit_s = (
        60 + 4 * seconds + 2 * chip.mass_erase_max_s + sum(erase_wait_s(b) for b in batches(sectors, chip, known.loader_id))
    )
    limit_s += request.after_s
    yield Report(Planned(len(sectors), total, 0, 0, seconds, limit_s))
    if request.one_shot:
        known.line.may_reset = False  # As in ``_program``.
    # Where an erase is not awaited, one of everything would leave nothing to tell its end by: sector by sector it has a bound.
    at_once = not request.length and chip.mass_erase and not chip.has(Quirk.ERASE_NOT_AWAITED, known.loader_id)
    if not at_once or not (yield from _mass_erase(sectors, known, result)):
        yield from erase(sectors, known, result, NOTHING_KEPT)
    yield from phase_started(Phase.VERIFY, total)
    done = 0
    for sector in sectors:
        for address, count in pieces(sector.address, sector.end, chip.read_max_bytes):
            yield Checkpoint()
            data = yield from known.line.read(address, count)
            if data.count(chip.erased_value) != count:
                data = yield from known.line.read(address, count)
            expected = bytes([chip.erased_value]) * count
            if data != expected:
                raise different(address, expected, data)
            done += count
            yield Progress(done)
    result.bytes_compared, result.evidence, result.proof = done, "full", "read-back"


def erase(sectors: tuple[Sector, ...], known: Known, result: Result, kept: bytes) -> Flow[None]:
    """Erase ``sectors``: the first one alone and looked at, before the rest goes.

    1. The daemon has "erasing", the kept bytes and the longest hazard on disk. 2. Samples of the first sector and of its
    neighbours are read. 3. It is erased; it must be blank at both ends, its neighbours unchanged. 4. The rest, in batches.
    """
    flash = known.flash_map()
    commands = batches(sectors, known.chip, known.loader_id)
    yield from phase_started(Phase.ERASE, sum(s.size_bytes for s in sectors))
    cost = result.cost(Phase.ERASE)
    begun: float = yield Now()
    witnesses = yield from _witnesses(sectors[0], flash, known)
    yield Barrier("erasing", max(erase_wait_s(b) for b in commands), kept)
    known.line.erasing = True
    done = 0
    for number, batch in enumerate(commands):
        yield Checkpoint()
        seconds = yield from erase_batch(batch, known)
        for sector in batch:
            yield Report(SectorErased(sector.address, sector.size_bytes, seconds / len(batch)))
        if not _early_s(batch, known) and seconds > sum(s.erase_max_s for s in batch) + ASKING_S:
            text = f"erasing {len(batch)} sectors from {batch[0].address:#010x} took {seconds:.1f} s: worn or slow flash"
            yield Report(Warned("SLOW_ERASE", text))
        if number == 0:
            yield from _check_first(sectors[0], witnesses, known)
        done += sum(s.size_bytes for s in batch)
        result.sectors_erased += len(batch)
        yield Progress(done)
    result.changed = True
    yield Barrier("erased")
    cost.payload_bytes += done
    cost.seconds += (yield Now()) - begun


def erase_batch(batch: list[Sector], known: Known) -> Flow[float]:
    codes, wait_s = [s.code for s in batch], erase_wait_s(batch)

    def command(timing: Timing) -> Flow[None]:
        if known.line.loader.erase_command is Command.ERASE:
            yield from an3155.erase(codes, timing, wait_s=wait_s)
        else:
            yield from an3155.extended_erase(codes, timing, wait_s=wait_s)

    begun: float = yield Now()
    yield from known.line.erase(command, wait_s, _early_s(batch, known))
    ended: float = yield Now()
    yield Report(StepDone("erase", ended - begun))
    return ended - begun


def _early_s(batch: list[Sector], known: Known) -> float:
    """The ACK of some loaders comes early (AN2606): so long the flash may still work, whatever they answer."""
    return 2 * sum(s.erase_max_s for s in batch) if known.chip.has(Quirk.ERASE_NOT_AWAITED, known.loader_id) else 0.0


def batches(sectors: Iterable[Sector], chip: Chip, loader_id: int | None) -> list[list[Sector]]:
    """Sectors of one command each: within the loader's limit and a bounded worst case. The first and slow ones go alone."""
    most = chip.sectors_per_erase
    if chip.has(Quirk.ONE_SECTOR_PER_ERASE, loader_id) or chip.has(Quirk.ERASE_NOT_AWAITED, loader_id):
        most = 1
    found: list[list[Sector]] = []
    for index, sector in enumerate(sectors):
        last = found[-1] if found else []
        worst = sum(s.erase_max_s for s in last) + sector.erase_max_s
        if index < 2 or len(last) >= most or worst > ERASE_BATCH_S or sector.erase_max_s >= SLOW_SECTOR_S:
            found.append([sector])
        else:
            last.append(sector)
    return found


def _mass_erase(sectors: tuple[Sector, ...], known: Known, result: Result) -> Flow[bool]:
    """Erase everything by one command, which is what the job names. False when the loader refuses; nothing is erased then."""
    wait_s = max(SLOW_ERASE_LEAST_S, 2 * known.chip.mass_erase_max_s + 1)
    yield from phase_started(Phase.ERASE, sum(s.size_bytes for s in sectors))
    begun: float = yield Now()
    yield Barrier("erasing", wait_s, NOTHING_KEPT)
    yield Checkpoint()
    known.line.erasing = True

    def command(timing: Timing) -> Flow[None]:
        if known.line.loader.erase_command is Command.ERASE:
            yield from an3155.erase_all(timing, wait_s=wait_s)
        else:
            yield from an3155.extended_erase_special(MassErase.ALL, timing, wait_s=wait_s)

    try:
        yield from known.line.erase(command, wait_s)
    except Nack as error:
        yield Report(Retried("erase", f"mass erase refused, erasing sector by sector: {error.message}"))
        return False
    yield Barrier("erased")
    result.changed, result.sectors_erased = True, len(sectors)
    result.cost(Phase.ERASE).seconds += (yield Now()) - begun
    return True


def _witnesses(sector: Sector, flash: FlashMap, known: Known) -> Flow[dict[int, bytes]]:
    """Blocks of the neighbouring sectors next to ``sector``, by address; what a power cut tore cannot be one."""
    count = min(CHECK_BYTES, known.chip.read_max_bytes)
    before, after = flash.neighbours(sector)
    found: dict[int, bytes] = {}
    for address in ([before.end - count] if before else []) + ([after.address] if after else []):
        yield Checkpoint()
        data = yield from known.line.read_torn(address, count)
        if data is None:  # Of an interrupted erase or write: it is to be erased itself, or nobody could tell what became of it.
            yield Report(Retried("witness", f"{address:#010x} cannot be read, so the first erase is not judged by it"))
        else:
            found[address] = data
    return found


def _check_first(sector: Sector, witnesses: dict[int, bytes], known: Known) -> Flow[None]:
    count = min(CHECK_BYTES, known.chip.read_max_bytes, sector.size_bytes)
    for address in (sector.address, sector.end - count):
        data = yield from known.line.read(address, count)
        if data.count(known.chip.erased_value) != count:
            data = yield from known.line.read(address, count)
        if data.count(known.chip.erased_value) != count:
            raise not_erased(sector, address, count)
    for address, before in witnesses.items():
        data = yield from known.line.read(address, len(before))
        if data != before:
            data = yield from known.line.read(address, len(before))
        if data != before:
            raise wrong_sector(sector, address)
