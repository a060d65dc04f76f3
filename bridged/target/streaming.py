"""The work of a plan by the second-stage loader: begin it, look at the flash by checksum, erase, stream, prove. Or give it up.

``begin`` brings the loader into the target's RAM and gives a ``Stage``, or nothing where AN3155 does the job. Every doubt after
that is a ``LoaderError``: whoever holds the ``Stage`` resets the target (``give_up``) and goes on with AN3155, and the job says
why. The rules of the plan are those of ``session``:

- The sectors with vector tables are erased first, and the first erase of a session is one sector, looked at with its
  neighbours.
  A block with a table is written when all others are proven, and then proven itself; that of the start is the last.
- Before the first erase the journal has "erasing", the kept bytes and the longest hazard.
- What is proven was compared on the target: CRC-32 of every byte of the content, computed there from its flash.

What differs from AN3155: the flash is looked at first. A sector that holds what it shall stays, and one that is blank is not
erased, unless the job had been interrupted or asks for all of it (``Past.settled``): what reads blank may be half erased.
Flows without I/O.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from bridged import stub
from bridged.chips.model import FlashMap, Sector
from bridged.chips.second_stage import CRC_CYCLES, SecondStage, row_for, start_s, why_not
from bridged.errors import LoaderError, SecondStageFailed, Unsupported, VerifyError
from bridged.events import Phase, PhaseStarted, Retried, SectorErased, Warned
from bridged.images.plan import Plan
from bridged.protocol import stub as wire
from bridged.protocol.flow import Barrier, Checkpoint, Flow, Now, Progress, Report, Step
from bridged.protocol.stub import Command, Link, Reason, Verb
from bridged.target.dialogue import Dialogue, different, erase_wait_s, not_erased, wrong_sector
from bridged.target.identify import Known
from bridged.target.kept import encode_kept, leave_as_is
from bridged.target.request import Request, Result
from bridged.target.second_stage import make_upload, rate_near, sector_code

STARTS = 2  # Go is answered by one byte, which may be hit.
PIECE_BYTES = 16 * 1024  # One CRC: small enough to say where, and to show progress.
PROBES, PROBE_BYTES = 16, 1024  # Sectors, and bytes of each, for whether there is any use in asking for the rest.
QUESTION_BYTES = 64 * 1024  # Of one question, 0.2 s at 16 MHz: a lost one costs little.
CHECK_BYTES = 256
CHECK_S = 0.05
READ_BYTES = 1024  # Of one READ; its answer comes again as a whole when a byte of it is hit.
LEAST_BAUD = 115200  # Faster ones are tried, by halves.
PROOF = "crc-on-target"  # ``proof`` of a result: no byte was sent back, the target computed CRC-32 of its flash.

Piece = tuple[int, int]  # Address and number of bytes.


@dataclass(slots=True)
class Stage:
    """A loader that runs. ``plan``: what is to be done, as far as the flash was looked at; ``proven``: its sectors that are.

    ``kept``: what the barrier has put on disk, empty before the first erase."""

    request: Request
    known: Known
    result: Result
    row: SecondStage
    plan: Plan
    link: Link
    clock_hz: float
    kept: bytes = b""
    proven: list[Sector] = field(default_factory=list)
    number: int = 0

    @property
    def flash(self) -> FlashMap:
        return self.plan.flash

    @property
    def byte_s(self) -> float:
        return 2 * CRC_CYCLES / self.clock_hz

    def run(self, commands: Sequence[Command]) -> Flow[None]:
        least_s = min(erase_wait_s([s]) for s in self.flash.sectors)
        self.number = yield from self.link.run(commands, self.number, hazard_least_s=least_s)


# --- beginning, and giving up -----------------------------------------------------------------------------------------


def key_of(request: Request, known: Known, result: Result) -> str:
    """What a failure depends on, as far as anybody can know: our build, the configuration, the chip and its ROM loader."""
    parts = stub.load().build.hex(), request.configured, result.uid, f"{known.chip.pid:x}", result.loader
    return "/".join(parts)


def reason_not(request: Request, known: Known, result: Result) -> str:
    """Why AN3155 does this job, for people; empty where the second-stage loader may."""
    if not known.line.may_reset or not request.wiring.can_restart:
        return "NRST is not wired, and without it nothing brings the ROM loader back"
    if request.one_shot:
        return "the loader could not be entered again afterwards (entry=one-shot)"
    if why := why_not(known.chip, known.loader_id):
        return why
    tried = request.past.second_stage
    if tried.enough and tried.key == key_of(request, known, result):
        return (
            f"it failed here {tried.failures} times in a row, last {tried.age_s / 3600:.0f} hours ago ({tried.why}); it is "
            "tried again a week after that, and at once with another version of it or when this target's configuration changes"
        )
    return ""


def foreseen_s(request: Request, known: Known, plan: Plan, result: Result) -> float:
    """Seconds that ``plan`` may be expected to take with it, upload included; 0 where AN3155 does the job."""
    if reason_not(request, known, result):
        return 0.0
    row = row_for(known.chip, request.supply_v)
    return start_s(known.line.baud) + plan.streamed_s(row, request.second_stage_baud)


def begin(request: Request, known: Known, plan: Plan, result: Result) -> Flow[Stage | None]:
    """Upload, Go, greeting, and the fastest rate that the line carries."""
    if request.second_stage != "auto":
        return None
    if why := reason_not(request, known, result):
        result.second_stage = f"not used: {why}"
        return None
    row = row_for(known.chip, request.supply_v)
    line = known.line
    result.second_stage_key = key_of(request, known, result)
    try:
        stage = yield from _start(request, known, row, plan, result)
        yield from _go_faster(stage)
    except Unsupported as error:  # Before anything was sent.
        result.second_stage = f"not used: {error.message}"
        return None
    except LoaderError as error:
        yield from give_up(line, error, result)
        return None
    result.second_stage, result.second_stage_baud = "used", stage.link.baud
    return stage


def _start(request: Request, known: Known, row: SecondStage, plan: Plan, result: Result) -> Flow[Stage]:
    line, code = known.line, stub.load()
    for attempt in range(STARTS):
        upload = make_upload(row, plan.flash, line.baud, code)  # The rate may have been lowered.
        yield Report(PhaseStarted(Phase.LOADER, len(upload.image)))
        yield from line.to_ram(upload.address, upload.image)
        yield Checkpoint()
        try:
            link, greeting = yield from wire.start(upload.address, upload.build, line.baud, line.timing)
        except SecondStageFailed:
            raise
        except LoaderError as error:
            if attempt == STARTS - 1:
                raise
            yield Report(Retried("go", f"{error.code}: {error.message}"))
            yield from line.reconnect()
            continue
        clock_hz = greeting.clock_hz(link.baud, row.clock_hz)
        return Stage(request, known, result, row, plan, link, clock_hz)
    raise AssertionError("the last attempt returns or raises")


def _go_faster(stage: Stage) -> Flow[None]:
    """The highest rate that line and clock carry; the present one where none does. Raises ``SecondStageFailed``."""
    wanted = stage.request.second_stage_baud
    while wanted >= LEAST_BAUD and wanted > stage.link.baud:
        baud, brr = rate_near(stage.clock_hz, wanted)
        if baud > stage.link.baud and (yield from stage.link.change_rate(baud, brr)):
            return
        yield Report(Retried("rate", f"the second-stage loader was not heard at {baud} baud"))
        wanted //= 2


def give_up(line: Dialogue, error: LoaderError, result: Result) -> Flow[None]:
    """Back into the ROM loader, whatever the target does now; a hazard is waited for by ``SetLines`` (P9)."""
    result.second_stage = f"given up: {error.code}: {error.message}"
    result.proof, result.bytes_compared, result.bytes_checksummed = "", 0, 0
    yield Report(Warned("SECOND_STAGE_FAILED", f"on with the ROM loader: {error.message}"))
    yield from line.reconnect()


def end(stage: Stage) -> Flow[None]:
    """A part that was empty at power-on is started by Go (AN2606), which is the ROM loader's; all others by a reset."""
    if stage.known.chip.empty_check and stage.result.was_empty and stage.result.changed:
        yield from stage.known.line.reconnect()


# --- looking ----------------------------------------------------------------------------------------------------------


def compare(stage: Stage, plan: Plan) -> Flow[Piece | None]:
    """A piece of the content that differs, None where the target holds all of it. It ends with the first one that is found."""
    pieces = [p for _, found in _cut(plan.flash, _content(plan)) for p in found]
    wrong = None

    def differs(piece: Piece, crc: int) -> bool:
        nonlocal wrong
        wrong = piece if wrong is None and crc != _wanted(plan, piece) else wrong
        return wrong is not None

    yield from _crcs(stage, pieces, Phase.VERIFY, until=differs)
    if wrong is None:
        _count(stage.result, pieces)
    return wrong


def difference(stage: Stage, plan: Plan, piece: Piece) -> Flow[VerifyError]:
    """What differs in ``piece``. It is read for that: a CRC says only that something does."""
    start, end = piece[0], piece[0] + piece[1]
    for at in range(start, end, READ_BYTES):
        expected = plan.content.read(at, min(READ_BYTES, end - at))
        data = yield from stage.link.read(at, len(expected))
        if data != expected:
            return different(at, expected, data)
    raise SecondStageFailed(f"CRC and bytes of the {piece[1]} bytes from {start:#010x} contradict each other")


def look(stage: Stage, plan: Plan) -> Flow[tuple[list[Sector], list[Sector]]]:
    """Of the sectors that ``plan`` would erase: those that hold what they shall, and those that are blank, all of them."""
    erase = set(plan.erase)
    blank = plan.chip.erased_value
    inside = {s: p for s, p in _cut(plan.flash, _content(plan)) if s in erase}
    # Of another firmware nearly every sector differs from its first bytes on, which is soon seen. A look at some of them tells
    # whether there is any use in asking for all of many small ones, too.
    some = list(inside)[:: max(1, len(inside) // PROBES)]
    first = {s: (inside[s][0][0], min(inside[s][0][1], PROBE_BYTES)) for s in some}
    crcs = yield from _crcs(stage, list(first.values()), Phase.PLAN)
    likely = {s for s, p in first.items() if crcs[p] in (_wanted(plan, p), _crc_blank(p, blank))}
    if len(some) == len(inside):
        inside = {s: p for s, p in inside.items() if s in likely}
    elif not likely:
        inside = {}
    crcs = yield from _crcs(stage, [p for pieces in inside.values() for p in pieces], Phase.PLAN)
    equal = [s for s, pieces in inside.items() if all(crcs[p] == _wanted(plan, p) for p in pieces)]
    maybe = [s for s, pieces in inside.items() if s not in equal and all(crcs[p] == _crc_blank(p, blank) for p in pieces)]
    beside = {s: p for s, p in _cut(plan.flash, [(g.start, g.end) for g in plan.outside]) if s in maybe}
    crcs = yield from _crcs(stage, [p for pieces in beside.values() for p in pieces], Phase.PLAN)
    return equal, [s for s in maybe if all(crcs[p] == _crc_blank(p, blank) for p in beside.get(s, []))]


def leave_alone(stage: Stage, plan: Plan, equal: Iterable[Sector]) -> Flow[Plan]:
    """The plan without the ``equal`` sectors, but for those with vector tables, which go with what changes."""
    less, stay = yield from leave_as_is(plan, equal, stage.result)
    _count(stage.result, [p for s, found in _cut(plan.flash, _content(plan)) if s in stay for p in found])
    return less


def keep(stage: Stage, plan: Plan, blank: Iterable[Sector]) -> Flow[list[tuple[int, bytes]]]:
    """Read what the erases would take along with them (P6): what is not blank of it, by address."""
    stays = set(blank)
    pieces = [p for s, found in _cut(plan.flash, [(g.start, g.end) for g in plan.outside]) if s not in stays for p in found]
    yield Report(PhaseStarted(Phase.BACKUP, sum(n for _, n in pieces)))
    fill = bytes([plan.chip.erased_value])
    parts: list[tuple[int, bytes]] = []
    done = 0
    for start, count in pieces:
        for at in range(start, start + count, READ_BYTES):
            yield Checkpoint()
            data = yield from stage.link.read(at, min(READ_BYTES, start + count - at))
            used = data.rstrip(fill)
            lead = len(used) - len(used.lstrip(fill))
            parts.append((at + lead, used[lead:]))
            done += len(data)
            yield Progress(done)
    return [part for part in parts if part[1]]


# --- writing ----------------------------------------------------------------------------------------------------------


def write(stage: Stage, plan: Plan, blank: Iterable[Sector]) -> Flow[None]:
    """Erase, write and prove, in the order that the module says. Raises ``SecondStageFailed`` where anything is not right."""
    result, kept, held = stage.result, encode_kept(plan, was_empty=stage.result.was_empty), plan.held()
    stays = set(blank)
    erase = [s for s in plan.erase if s not in stays]
    worst = sorted((2 * s.erase_max_s for s in erase), reverse=True)[: wire.ERASES_AHEAD]
    witnesses = (yield from _witnesses(stage, erase[0])) if erase else {}
    yield Barrier("erasing", max(sum(worst), max((erase_wait_s([s]) for s in erase), default=0.0)), kept)
    stage.kept = kept
    result.changed = True
    begun: float = yield Now()
    blocks = _blocks(plan, stage.row.block_bytes)
    writing = Report(PhaseStarted(Phase.WRITE, sum(n for found in blocks.values() for _, n in found)))
    yield Report(PhaseStarted(Phase.ERASE, erase[0].size_bytes)) if erase else writing
    commands = [_erase(stage, erase[0], writing), *_first_checks(plan, erase[0], witnesses)] if erase else []
    done = 0

    def written(count: int, _seconds: float) -> Iterable[Step]:
        nonlocal done
        done += count
        yield Progress(done)

    for sector in plan.erase:
        if sector in erase[1:]:
            commands.append(_erase(stage, sector))
        for at, count in blocks[sector]:
            if not any(at in block for block in held):
                data = plan.content.read(at, count, plan.chip.erased_value)
                commands.append(wire.write(at, data, _write_s(plan, count), partial(written, count)))
    yield from _run_from_first(stage, commands, erase[:1])
    yield Barrier("erased")
    edges = [edge for block in held for edge in (block.start, block.end)]
    pieces = [p for _, found in _cut(plan.flash, _content(plan), edges) for p in found]
    yield from _prove(stage, plan, [p for p in pieces if not any(p[0] in block for block in held)])
    waiting = [s for s in plan.erase if any(block.start in s.range for block in held)]
    yield from _report_proven(stage, plan, [s for s in plan.erase if s not in waiting])
    for block in held:
        data = plan.content.read(block.start, block.size, plan.chip.erased_value)
        command = wire.write(block.start, data, _write_s(plan, block.size), partial(written, block.size))
        commands.append(command)
        yield from stage.run([command])
        yield from _prove(stage, plan, [p for p in pieces if p[0] in block])
    yield from _report_proven(stage, plan, waiting)
    ended: float = yield Now()
    result.sectors_erased += len(erase)
    result.bytes_written += done
    cost, proving = result.cost(Phase.WRITE), result.cost(Phase.VERIFY)
    cost.payload_bytes += done
    cost.wire_bytes += sum(len(c.payload) + 2 * wire.FRAME_BYTES for c in commands)
    cost.seconds += ended - begun - proving.seconds


def _report_proven(stage: Stage, plan: Plan, sectors: Iterable[Sector]) -> Flow[None]:
    for sector in sectors:
        stage.proven.append(sector)
        yield Report(plan.proof(sector))


def _erase(stage: Stage, sector: Sector, then: Report | None = None) -> Command:
    def told(seconds: float) -> Iterable[Step]:
        if then is not None:
            yield then
        yield Report(SectorErased(sector.address, sector.size_bytes, seconds))
        if seconds > sector.erase_max_s + 1:  # What was written before may be in it.
            text = f"erasing the sector at {sector.address:#010x} took {seconds:.1f} s: worn or slow flash"
            yield Report(Warned("SLOW_ERASE", text))

    key = sector.address, sector_code(stage.row, stage.flash, sector), sector.size_bytes
    return wire.erase([key], erase_wait_s([sector]), 2 * sector.erase_max_s, told)


def _write_s(plan: Plan, count: int) -> float:
    """The longest that programming ``count`` bytes may take; a row states it for one Write Memory."""
    return plan.chip.write_ack_max_s * -(-count // plan.chip.write_max_bytes)


def _blocks(plan: Plan, most: int) -> dict[Sector, list[Piece]]:
    """What is written to each sector, in frames of ``most`` bytes at most: pieces of 256 bytes that are not blank, joined where
    they touch."""
    held = {block.start for block in plan.held()}
    by_sector: dict[Sector, list[Piece]] = {sector: [] for sector in plan.erase}
    for block in sorted(plan.blocks(), key=lambda b: b.address):
        sector = plan.flash.sector_at(block.address)
        assert sector is not None
        found = by_sector[sector]
        at, count = found[-1] if found else (0, 0)
        joins = at + count == block.address and count + len(block.data) <= most
        if joins and at not in held and block.address not in held:
            found[-1] = at, count + len(block.data)
        else:
            found.append((block.address, len(block.data)))
    return by_sector


def _witnesses(stage: Stage, sector: Sector) -> Flow[dict[int, bytes]]:
    """What lies next to ``sector``, by address."""
    before, after = stage.flash.neighbours(sector)
    found: dict[int, bytes] = {}
    for address in ([before.end - CHECK_BYTES] if before else []) + ([after.address] if after else []):
        found[address] = yield from stage.link.read(address, CHECK_BYTES)
    return found


def _first_checks(plan: Plan, sector: Sector, witnesses: dict[int, bytes]) -> list[Command]:
    """Right behind the first erase, and before anything else: the loader has looked at every word of the sector; that it was
    this one shows beside it, and in its ends. The target compares, so that what follows may be on its way already."""
    count = min(CHECK_BYTES, sector.size_bytes)
    ends = dict.fromkeys((sector.address, sector.end - count), bytes([plan.chip.erased_value]) * count)
    return [wire.check(address, data, CHECK_S) for address, data in (ends | witnesses).items()]


def _run_from_first(stage: Stage, commands: Sequence[Command], first: Sequence[Sector]) -> Flow[None]:
    """The whole stream. Raises ``NotErased`` and ``WrongSector`` where the checks behind the ``first`` erase refuse it."""
    try:
        yield from stage.run(commands)
    except SecondStageFailed as error:
        if (error.facts.get("verb"), error.facts.get("reason")) != (Verb.CHECK.name, Reason.NOT_EQUAL.name):
            raise
        sector, address = first[0], int(error.facts["address"] or 0)
        if address in sector.range:
            raise not_erased(sector, address, min(CHECK_BYTES, sector.size_bytes)) from error
        raise wrong_sector(sector, address) from error


# --- proving ----------------------------------------------------------------------------------------------------------


def _prove(stage: Stage, plan: Plan, pieces: Sequence[Piece]) -> Flow[None]:
    """Raises ``SecondStageFailed`` where a CRC that the target computes from its flash is not that of the content."""
    begun: float = yield Now()
    crcs = yield from _crcs(stage, pieces, Phase.VERIFY)
    for address, count in pieces:
        if crcs[address, count] != _wanted(plan, (address, count)):
            raise SecondStageFailed(
                f"the CRC of the {count} bytes at {address:#010x} is not that of the image", address=address
            )
    ended: float = yield Now()
    _count(stage.result, pieces)
    cost = stage.result.cost(Phase.VERIFY)
    cost.payload_bytes += sum(n for _, n in pieces)
    cost.wire_bytes += 4 * len(pieces)
    cost.seconds += ended - begun


def _count(result: Result, pieces: Iterable[Piece]) -> None:
    total = sum(n for _, n in pieces)
    result.proof = PROOF
    result.bytes_compared += total
    result.bytes_checksummed += total


def _crcs(
    stage: Stage, pieces: Sequence[Piece], phase: Phase, until: Callable[[Piece, int], bool] = lambda _piece, _crc: False
) -> Flow[dict[Piece, int]]:
    """The CRC of each piece, as the target computes it: many of them by one question where they follow each other.

    ``until``: what ends it early, given each piece and its CRC.
    """
    found: dict[Piece, int] = {}
    if not pieces:
        return found
    yield Report(PhaseStarted(phase, sum(n for _, n in pieces)))
    at, done = 0, 0
    most = stage.row.block_bytes // 4
    while at < len(pieces):
        address, size = pieces[at]
        count = 1
        while (
            at + count < len(pieces)
            and pieces[at + count] == (address + count * size, size)
            and count < most
            and (count + 1) * size <= QUESTION_BYTES
        ):
            count += 1
        yield Checkpoint()
        crcs = yield from stage.link.crc_map(address, size, count, byte_s=stage.byte_s)
        answers = list(zip(pieces[at : at + count], crcs, strict=True))
        found |= answers
        if any([until(*answer) for answer in answers]):
            break
        at += count
        done += count * size
        yield Progress(done)
    return found


def _wanted(plan: Plan, piece: Piece) -> int:
    return zlib.crc32(plan.content.read(*piece))


def _crc_blank(piece: Piece, erased_value: int) -> int:
    return zlib.crc32(bytes([erased_value]) * piece[1])


def _content(plan: Plan) -> list[tuple[int, int]]:
    return [(seg.address, seg.end) for seg in plan.content.segments]


def _cut(
    flash: FlashMap, ranges: Iterable[tuple[int, int]], bounds: Iterable[int] = ()
) -> Iterable[tuple[Sector, list[Piece]]]:
    """``ranges`` (start and end), which are in order, by the sectors in which they lie; pieces end at ``bounds``, too."""
    by_sector: dict[Sector, list[Piece]] = {}
    for start, end in ranges:
        at = start
        while at < end:
            sector = flash.sector_at(at)
            assert sector is not None
            stop = min([end, sector.end, at - at % PIECE_BYTES + PIECE_BYTES, *(b for b in bounds if b > at)])
            by_sector.setdefault(sector, []).append((at, stop - at))
            at = stop
    return by_sector.items()
