"""The session: one job on one target, from entering the loader to the running application, as one flow without I/O.

It takes a whole ``Image`` in memory and never a stream, socket or path (P1); it yields steps of ``protocol.flow`` and knows
nothing of descriptors, processes, clocks, journals or clients. Each stage returns the value that the next one needs
(``Synced``, ``Identified``, ``Plan``), so they cannot be called out of order.

What holds at every point, and is tested in virtual time:

- Nothing is erased before the plan is complete, the bytes to be kept are read, the way back into the loader is proven (P10)
  and the daemon has all of that on disk (the ``erasing`` barrier).
- Success means that every byte of the content was read back and compared (P3).
- However it ends, BOOT0 and NRST return to idle and the target is reset into its application (P4), after the hazard (P9):
  ``SetLines`` waits for it in every driver.
- An unexpected exception leaves the target as orderly as an expected one.

Documents: AN3155 (commands), AN2606 (activation, errata); the order of erase and write is the design's, see ``images.plan``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from bridged import chips
from bridged.chips.model import Chip, FlashMap, Quirk, Sector
from bridged.errors import (
    BadRequest,
    BridgedError,
    EntryWouldBeLost,
    Garbled,
    ImageDoesNotFit,
    LayoutUnknown,
    LineUnavailable,
    LinkError,
    LoaderError,
    Nack,
    NoReply,
    NotErased,
    OptionBytesLost,
    OutsideUnreadable,
    ReadProtected,
    UnknownChip,
    VerifyError,
    WrongSector,
)
from bridged.events import (
    Phase,
    Planned,
    Retried,
    SectorErased,
    SectorProven,
    StepDone,
    Warned,
)
from bridged.images.model import Image
from bridged.images.plan import Block, Plan, check_protected, make_plan
from bridged.images.vectors import check_vectors_for, flash_range, vector_addresses
from bridged.protocol import an3155
from bridged.protocol.an3155 import Command, MassErase, Timing
from bridged.protocol.flow import (
    Barrier,
    Checkpoint,
    Flow,
    Now,
    Pause,
    Progress,
    Report,
    SetLines,
)
from bridged.target.dialogue import SLOW_ERASE_LEAST_S, SLOW_SECTOR_S, Dialogue, Dirty, different, erase_wait_s
from bridged.target.entry import (
    ask_interlock,
    boot,
    enter,
    leave,
    phase_started,
    say_not_started,
    start_by_go,
    stay_in_loader,
)
from bridged.target.identify import Known, identify
from bridged.target.kept import NOTHING_KEPT, Kept, decode_kept, encode_kept
from bridged.target.protection import (
    check_blank,
    check_entry,
    is_proven,
    longest_s,
    option_bytes,
    protect,
    protect_last,
    unasked,
    unprotect,
    when_protected,
)
from bridged.target.request import PhaseCost, Request, Result
from bridged.target.speed import first_baud

if TYPE_CHECKING:  # What a session without it never loads: 1.7 MiB, and a sixth of its start.
    from bridged.target.streaming import Stage

ERASE_BATCH_S = 4.0  # Longest worst case of one erase command of several sectors: progress, and a bounded wait.
CHECK_BYTES = 256
SECTOR_TRIES = 3
SAMPLES = 16  # Blocks of an image that is looked at by sample: half a second at 115200 baud.


# --- the whole ----------------------------------------------------------------------------------------------------


def run(request: Request, image: Image | None = None, kept: bytes = b"") -> Flow[Result]:
    """One session. ``image``: what flash, ensure and verify want; ``kept``: what an interrupted run had saved at its barrier.

    Raises any ``TargetError`` or ``ImageError``; the target was released then, unless ``LineUnavailable`` or ``PortGone`` says
    that it could not be.
    """
    result = Result(kind=request.kind)
    entered: list[Dialogue] = []
    started: float = yield Now()
    if not kept:  # Once a run of this job has begun to erase there is nobody who could answer.
        yield from ask_interlock(request)
    try:
        yield from _work(request, image, kept, result, entered)
    except GeneratorExit:  # The process is going away: nothing can be yielded any more; the daemon releases the lines.
        raise
    except BaseException as error:
        yield from phase_started(Phase.RELEASE)
        line = entered[0] if entered else None
        try:
            if request.by_application and (kept or (line is not None and line.erasing)):
                yield from stay_in_loader(request, result)
            elif request.wiring.can_restart:
                yield from leave(request)
            else:
                yield from _leave_without_lines(request, result, line, error)
        except LinkError as second:  # The first error is what the job died of; the driver has noted that lines failed.
            if isinstance(error, BridgedError):
                error.facts["release"] = second.message
        if isinstance(error, BridgedError) and result.boot is not None and not result.boot.started:
            error.facts["boot"] = result.boot.value
        raise
    ended: float = yield Now()
    result.seconds = ended - started
    return result


def _leave_without_lines(request: Request, result: Result, line: Dialogue | None, error: BaseException) -> Flow[None]:
    """Nothing is wired that could reset it. An application that was asked to jump into the loader is started again by Go,
    where the loader waits for a command; what would be sent in the middle of another could be taken for its data."""
    at_boundary = isinstance(error, BridgedError) and not isinstance(error, LinkError | LoaderError)
    if line is not None and line.chip is not None and request.enter_by and (at_boundary or isinstance(error, Nack)):
        yield from start_by_go(request, line.chip, line.timing, result)
        return
    yield from leave(request)
    if result.pid or request.enter_by:
        yield from say_not_started(result)


def _work(request: Request, image: Image | None, kept: bytes, result: Result, entered: list[Dialogue]) -> Flow[None]:
    if request.kind == "reset" and not request.stay_in_loader:
        if not request.wiring.can_restart:
            raise LineUnavailable("a reset was asked for, and neither NRST nor power is wired", line="nrst")
        yield from boot(request, result, *_configured(request), running=True)
        return
    if request.kind == "doctor":
        from bridged.target.doctor import examine  # No flash needs it, and a session is to be small and start soon.

        result.findings = [finding.as_dict() for finding in (yield from examine(request, result))]
        yield from boot(request, result, *(_configured(request) if result.pid else ()))
        return
    if request.kind == "xmodem":
        if image is None:
            raise BadRequest("a job of kind xmodem needs an image")
        from bridged.target.transfer import transfer

        yield from transfer(request, image, result)
        return
    connected = yield from enter(request, result, erased=bool(kept))
    result.baud = connected.baud
    yield from phase_started(Phase.IDENTIFY)
    if request.kind == "reset":
        yield SetLines(boot0=False)  # The loader was chosen when NRST was released; the pin matters at the next reset only.
        return
    line = Dialogue(request, result, connected)
    entered.append(line)
    yield from line.confirm()
    if is_proven(kept, image):
        yield from _protect_now(request, line, image, result)
        return
    try:
        known = yield from _know(request, line, result)
    except ReadProtected as refused:
        if request.kind == "option-bytes" and kept:
            raise OptionBytesLost(f"the job had begun to write option bytes, and now {refused.message}") from refused
        if request.kind not in ("flash", "ensure") or image is None or line.chip is None:
            raise
        if (yield from when_protected(request, line, line.chip, image, result, refused)):
            yield from boot(request, result, line.chip, line.timing)
            return
        kept = NOTHING_KEPT  # Everything is blank: there is nothing to be kept, and nothing to be read for that.
        known = yield from _know(request, line, result)
    if request.kind == "read":
        result.data = yield from _read(request.address, request.length, line)
    elif request.kind == "erase" and known:
        yield from _erase_range(request, known, result)
    elif request.kind in ("flash", "ensure", "verify") and known:
        if image is None:
            raise BadRequest(f"a job of kind {request.kind} needs an image")
        yield from _program(request, known, image, kept, result)
    elif request.kind == "option-bytes" and known:
        yield from option_bytes(request, known, kept, result)
    elif request.kind == "protect" and known:
        yield from protect(request, known, result)
    elif request.kind == "unprotect" and known:
        erased = yield from unprotect(request, known, kept, result)
        if erased and (again := (yield from _know(request, line, result))):
            yield from check_blank(again, result)
    elif request.kind != "identify":
        raise BadRequest(f"there is no job of kind {request.kind!r}")
    yield from boot(request, result, line.chip, line.timing)
    if request.wishes.protect and image is not None and line.chip:
        locked = yield from protect_last(request, result, line.chip, image.digest)
        yield from boot(unasked(request), result, locked.chip, locked.timing)


def _protect_now(request: Request, line: Dialogue, image: Image | None, result: Result) -> Flow[None]:
    """An interrupted run had proven everything, had heard the application, and was about to protect it."""
    assert image is not None
    chip = line.chip
    if chip is None:
        raise UnknownChip(f"product id {line.pid:#05x} is in no table of this version", pid=line.pid)
    result.pid, result.loader, result.family, result.names = (
        line.pid,
        line.loader.version_text,
        chip.family,
        "/".join(chip.names),
    )
    result.changed, result.content, result.evidence = True, image.digest, "full"
    result.health = "passed" if request.health else ""
    locked = yield from protect_last(request, result, chip, image.digest)
    yield from boot(unasked(request), result, locked.chip, locked.timing)


def _configured(request: Request) -> tuple[Chip | None, Timing]:
    """What is known of a part whose loader is not talked to: enough to see that it is in there again after a reset."""
    chip = chips.find(request.chip) if request.chip else None
    return chip, Timing.at(first_baud(request, chip))


def _know(request: Request, line: Dialogue, result: Result) -> Flow[Known | None]:
    """What is known of the chip; None where its product id is in no table, which is enough to identify and to read."""
    result.pid, result.loader = line.pid, line.loader.version_text
    if line.chip is None:
        if request.kind in ("identify", "read"):
            return None
        raise UnknownChip(f"product id {line.pid:#05x} is in no table of this version", pid=line.pid)
    return (yield from identify(request, line, line.chip, result))


# --- flash, ensure, verify ----------------------------------------------------------------------------------------


def _program(request: Request, known: Known, image: Image, kept: bytes, result: Result) -> Flow[None]:
    yield from phase_started(Phase.PLAN)
    flash = _flash_of(known)
    saved = decode_kept(kept) if kept else None
    result.changed = saved is not None
    closed: EntryWouldBeLost | None = None
    content = saved.content(image) if saved else None
    vectors = vector_addresses(image, flash_range(known.chip, flash.size_bytes), request.spans)
    plan = make_plan(image, known.chip, flash, request.proven, content, vectors)
    if saved:
        saved.check(plan.erase)
    result.content = image.digest
    seconds = plan.estimate_s(result.baud)
    limit_s = _limit_s(plan, request, known, seconds)
    if request.second_stage == "auto":
        limit_s *= 2  # It may be given up at the very end.
    yield Report(Planned(len(plan.erase), plan.erase_bytes, plan.write_bytes, plan.outside_bytes, seconds, limit_s))
    if request.kind != "verify" and "vectors" not in request.force:
        check_vectors_for(image, known.chip, result.flash_bytes, request.spans)
    if saved is None and (yield from _sampled(plan, request, known, result)):
        return
    if request.second_stage == "auto":
        from bridged.target import streaming

        if not streaming.reason_not(request, known):
            closed = yield from _closed(request, known)
        stage = yield from streaming.begin(request, known, flash, result)
        if stage is not None:
            try:
                yield from _by_second_stage(stage, plan, saved, closed, limit_s)
                yield from streaming.end(stage)
                return
            except LoaderError as error:
                yield from streaming.give_up(known.line, error, result)
            if stage.kept:  # From here on it is as if an interrupted job were resumed.
                saved = decode_kept(stage.kept)
                plan = make_plan(image, known.chip, flash, request.proven, saved.content(image), vectors)
    yield from _by_rom_loader(request, known, plan, saved, result)
    if result.evidence == "full":
        result.proof = "checksum" if result.bytes_checksummed else "read-back"


def _by_rom_loader(request: Request, known: Known, plan: Plan, saved: Kept | None, result: Result) -> Flow[None]:
    """Compare, erase, write, prove by AN3155. ``saved``: what an interrupted run kept, None for a fresh start."""
    if request.kind in ("verify", "ensure"):
        # The content, not the image: what an interrupted run kept may not be back yet.
        same = yield from _compare(replace(plan, erase=()), known, result, tolerate=request.kind == "ensure")
        if same:
            result.evidence = "full"
            return
    if saved is None:
        plan = yield from _leave_alone(plan, request, known, result)
        if not plan.erase:
            result.evidence = "full"
            return
    yield from known.line.use_supply()
    check_protected(plan.erase, request.protect)  # Not before: an ensure that finds its image touches nothing.
    yield from check_entry(request, known)
    if saved is None:
        plan = plan.keeping(None) if request.discard_outside else (yield from _backup(plan, known, result))
    yield Checkpoint()
    if saved:
        result.was_empty = saved.was_empty
    elif known.chip.empty_check:
        word = yield from known.line.read_twice(known.chip.flash_base, 4)
        result.was_empty = word == bytes([known.chip.erased_value]) * 4
    if request.one_shot:
        known.line.may_reset = False  # From here on nothing says that the loader could be entered again (P10).
    if plan.erase:
        yield from _erase(plan.erase, known, result, encode_kept(plan, was_empty=result.was_empty))
    # All but the vector tables is written and proven first; only then does anything become bootable.
    work = _Work(plan, known, result)
    yield from work.write(final=False)
    yield from work.prove(final=False)
    if work.held:
        yield from work.write(final=True)
        yield from work.prove(final=True)
    result.evidence = "full"


def _closed(request: Request, known: Known) -> Flow[EntryWouldBeLost | None]:
    """P10 is asked of the ROM loader, so before the other one runs; whether it matters shows later."""
    if request.kind != "verify":
        try:
            yield from check_entry(request, known)
        except EntryWouldBeLost as error:
            return error
    return None


def _by_second_stage(
    stage: Stage, plan: Plan, saved: Kept | None, closed: EntryWouldBeLost | None, limit_s: float
) -> Flow[None]:
    """The same work by the other loader. Raises ``LoaderError`` where AN3155 should go on."""
    from bridged.target import streaming

    request, known, result = stage.request, stage.known, stage.result
    if request.kind in ("verify", "ensure"):
        whole = replace(plan, erase=())
        wrong = yield from streaming.compare(stage, whole)
        if wrong is None:
            result.evidence = "full"
            return
        error = yield from streaming.difference(stage, whole, wrong)
        if request.kind == "verify":
            raise error
        yield Report(Retried("ensure", error.message))
    blank: list[Sector] = []
    if saved is None and request.past.settled:
        equal, blank = yield from streaming.look(stage, plan)
        plan = yield from streaming.leave_alone(stage, plan, equal, request.proven)
        blank = [s for s in blank if s in plan.erase]
        if not plan.erase:
            result.evidence = "full"
            return
    check_protected(plan.erase, request.protect)
    if closed is not None:
        raise closed
    if saved is None:
        parts = [] if request.discard_outside else (yield from streaming.keep(stage, plan, blank))
        result.bytes_kept = sum(len(d) for _, d in parts)
        plan = plan.keeping(Image.of(parts) if parts else None)
    seconds = streaming.estimate_s(stage, plan, blank)
    erase_bytes = plan.erase_bytes - sum(s.size_bytes for s in blank)
    yield Report(Planned(len(plan.erase) - len(blank), erase_bytes, plan.write_bytes, result.bytes_kept, seconds, limit_s))
    yield Checkpoint()
    if saved:
        result.was_empty = saved.was_empty
    elif known.chip.empty_check:
        result.was_empty = (yield from stage.link.read(known.chip.flash_base, 4)) == bytes([known.chip.erased_value]) * 4
    yield from streaming.write(stage, plan, blank)
    result.evidence = "full"


def _sampled(plan: Plan, request: Request, known: Known, result: Result) -> Flow[bool]:
    """Whether samples of what was last proven here are still there, for an ensure that asks for no more. It proves nothing."""
    past = request.past
    if (request.kind, request.evidence) != ("ensure", "sample") or past.content != plan.image.digest or past.uid != result.uid:
        return False
    if request.wishes.protect:
        return False  # Nobody can look any more afterwards.
    reads = replace(plan, erase=()).reads()
    step = max(1, len(reads) // SAMPLES)
    # The ends always, for an image of another length; between them others each time.
    chosen = sorted({reads[0], reads[-1], *reads[round(past.age_s * 1000) % step :: step]})
    yield from phase_started(Phase.VERIFY, sum(n for _, n in chosen))
    same = True
    done = 0

    def compare(address: int, data: bytes) -> Flow[bool]:
        nonlocal same, done
        same = data == plan.content.read(address, len(data))
        done += len(data)
        yield Progress(done)
        return same

    yield Checkpoint()
    yield from known.line.read_all(deque(chosen), compare)
    if not same:
        yield Report(Retried("sample", "a sample differs from what was last proven here: all is compared"))
        return False
    result.evidence, result.age_s, result.bytes_compared = "sample", round(past.age_s, 1), done
    return True


def _leave_alone(plan: Plan, request: Request, known: Known, result: Result) -> Flow[Plan]:
    """The plan without the sectors that hold already what they shall: those that were proven so before, and are read whole.

    What was proven says only where to look: a board may have been swapped, and flash forgets. The vector table's sector goes
    with whatever changes (``make_plan``).
    """
    past = request.past
    if request.kind not in ("flash", "ensure") or past.uid != result.uid:
        return plan
    before = {(s.address, s.size_bytes): s.digest for s in past.sectors}
    likely = [s for s in plan.erase if before.get((s.address, s.size_bytes)) == plan.sector_digest(s)]
    vectors = [s for s in plan.erase if s.address <= plan.vectors[0] < s.end]
    if not likely or (vectors == likely and len(plan.erase) > 1):
        return plan  # The one that would be left alone is erased with the others in any case.
    equal: list[SectorProven] = []
    reads = replace(plan, erase=()).reads()
    total = sum(n for a, n in reads if any(a < s.end and s.address < a + n for s in likely))
    yield from phase_started(Phase.PLAN, total)
    done = 0
    same = True

    def compare(address: int, data: bytes) -> Flow[bool]:
        nonlocal done, same
        same = data == plan.content.read(address, len(data))
        done += len(data)
        yield Progress(done)
        return same

    for sector in likely:
        yield Checkpoint()
        yield from known.line.read_all(deque(r for r in reads if r[0] < sector.end and sector.address < r[0] + r[1]), compare)
        if same:
            equal.append(SectorProven(sector.address, sector.size_bytes, plan.sector_digest(sector)))
        same = True
    less = make_plan(plan.image, plan.chip, plan.flash, (*request.proven, *equal), vectors=plan.vectors)
    kept = {s.address for s in plan.erase} - {s.address for s in less.erase}
    for proof in equal:
        if proof.address in kept:
            yield Report(proof)
    result.sectors_skipped, result.bytes_compared = len(kept), done
    result.bytes_skipped = sum(s.size_bytes for s in plan.erase if s.address in kept)
    seconds = less.estimate_s(result.baud)
    limit_s = _limit_s(less, request, known, seconds)
    yield Report(Planned(len(less.erase), less.erase_bytes, less.write_bytes, less.outside_bytes, seconds, limit_s))
    return less


def _limit_s(plan: Plan, request: Request, known: Known, seconds: float) -> float:
    waits_s = sum(erase_wait_s(b) for b in _batches(plan.erase, known.chip, known.loader_id))
    protecting_s = longest_s(known.chip) + _after_s(request) if request.wishes.protect else 0
    return 60 + 4 * seconds + waits_s + protecting_s + _after_s(request)


def _after_s(request: Request) -> float:
    """How long the application may be listened to at the end, at its first start and at one more (by Go, or for the probe)."""
    return 2 * request.listen_s + bool(request.health) * 2 * (request.health.within_s + request.health.quiet_s)


def _flash_of(known: Known) -> FlashMap:
    if known.flash is None:
        raise LayoutUnknown(known.why_no_flash or f"{known.chip.title}: layout unknown", pid=known.chip.pid)
    return known.flash


def _backup(plan: Plan, known: Known, result: Result) -> Flow[Plan]:
    """Read what the erase would take along with it (P6); blank parts need no keeping."""
    yield from phase_started(Phase.BACKUP, plan.outside_bytes)
    parts: list[tuple[int, bytes]] = []
    blank = bytes([known.chip.erased_value])
    done = 0
    cost = _cost(result, Phase.BACKUP)
    begun: float = yield Now()
    try:
        for gap in plan.outside:
            for address, count in _pieces(gap.start, gap.end, known.chip.read_max_bytes):
                yield Checkpoint()
                data = yield from known.line.read(address, count)
                if data.strip(blank):
                    # What is kept is written back and proven against this reading, which has no checksum: read it again.
                    data = yield from known.line.read_twice(address, count)
                done += count
                yield Progress(done)
                cost.payload_bytes += count
                cost.wire_bytes += count + 12
                used = data.rstrip(blank)
                lead = len(used) - len(used.lstrip(blank))
                parts.append((address + lead, used[lead:]))
    except Nack as error:
        raise OutsideUnreadable(
            f"bytes of a sector to be erased lie outside the image and cannot be read: {error.message}", **error.facts
        ) from error
    cost.seconds += (yield Now()) - begun
    result.bytes_kept = sum(len(d) for _, d in parts)
    return plan.keeping(Image.of(parts) if result.bytes_kept else None)


def _cost(result: Result, phase: Phase) -> PhaseCost:
    return result.phases.setdefault(phase.value, PhaseCost())


Read = tuple[int, int]  # Address and number of bytes.


class _Work:
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

    def _reads_of(self, sector: Sector, *, final: bool) -> list[tuple[int, int]]:
        overlapping = [(a, n) for a, n in self.reads if a < sector.end and sector.address < a + n]
        return [r for r in overlapping if self._is_final(r[0]) is final]

    def write(self, *, final: bool) -> Flow[None]:
        total = sum(len(b.data) for b in self.blocks if self._is_final(b.address) is final)
        if not total:
            return
        yield from phase_started(Phase.WRITE, total)
        cost = _cost(self.result, Phase.WRITE)
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
        seconds = yield from _erase_batch([sector], self.known)
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
        """Read back and compare. A sector is reported as proven when its last byte was compared.

        A difference is read again first, for the wire may have made it; what is really wrong is repaired once, if it may be.
        """
        plan, line = self.plan, self.known.line
        reads = [r for r in self.reads if self._is_final(r[0]) is final]
        if not reads:
            return
        total = sum(n for _, n in reads)
        yield from phase_started(Phase.VERIFY, total)
        cost = _cost(self.result, Phase.VERIFY)
        begun: float = yield Now()
        queue, done = deque(reads), 0
        ends = {s: last for s in plan.erase if (last := _last_byte(s, reads)) is not None}
        differs: tuple[int, bytes] | None = None

        def compare(address: int, data: bytes) -> Flow[bool]:
            nonlocal done, differs
            if data != plan.content.read(address, len(data)):
                differs = address, data
                return False
            done += len(data)
            yield Progress(min(done, total))
            for sector in [s for s, last in ends.items() if address <= last < address + len(data)]:
                del ends[sector]
                if final or not any(sector.address <= block.start < sector.end for block in self.held):
                    yield Report(SectorProven(sector.address, sector.size_bytes, plan.sector_digest(sector)))
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
            sector = self._at_fault(address, expected, data)
            if not repair or sector is None:
                raise different(address, expected, data)
            yield Report(Retried("sector", f"sector {sector.code} differs at {address:#010x} and is written again"))
            yield from self._start_over(sector, final=final)
            yield from self._write_sector(sector, final=final)
            again = [r for r in reads if r[0] < sector.end and sector.address < r[0] + r[1]]
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


def _last_byte(sector: Sector, reads: list[tuple[int, int]]) -> int | None:
    """Address of the last byte of ``sector`` that ``reads`` covers, None where they cover none."""
    ends = [min(a + n, sector.end) - 1 for a, n in reads if a < sector.end and sector.address < a + n]
    return max(ends) if ends else None


def _first_difference(expected: bytes, found: bytes) -> int:
    return next(i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b)


def _must_equal(address: int, expected: bytes, found: bytes) -> None:
    if expected != found:
        raise different(address, expected, found)


def _compare(plan: Plan, known: Known, result: Result, *, tolerate: bool) -> Flow[bool]:
    """Whether the flash holds the image; the first difference ends it, as an answer or as an error."""
    before = result.bytes_compared
    try:
        yield from _Work(plan, known, result).prove(final=False, repair=False)
    except VerifyError as error:
        if not tolerate:
            raise
        result.bytes_compared = before
        result.phases.pop(Phase.VERIFY.value, None)
        yield Report(Retried("ensure", error.message))
        return False
    return True


# --- erasing ------------------------------------------------------------------------------------------------------


def _batches(sectors: Iterable[Sector], chip: Chip, loader_id: int | None) -> list[list[Sector]]:
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


def _erase(sectors: tuple[Sector, ...], known: Known, result: Result, kept: bytes) -> Flow[None]:
    """Erase ``sectors``: the first one alone and looked at, before the rest goes.

    1. The daemon has "erasing", the kept bytes and the longest hazard on disk. 2. Samples of the first sector and of its
    neighbours are read. 3. It is erased; it must be blank at both ends, its neighbours unchanged. 4. The rest, in batches.
    """
    flash = _flash_of(known)
    batches = _batches(sectors, known.chip, known.loader_id)
    yield from phase_started(Phase.ERASE, sum(s.size_bytes for s in sectors))
    cost = _cost(result, Phase.ERASE)
    begun: float = yield Now()
    witnesses = yield from _witnesses(sectors[0], flash, known)
    yield Barrier("erasing", max(erase_wait_s(b) for b in batches), kept)
    known.line.erasing = True
    done = 0
    for number, batch in enumerate(batches):
        yield Checkpoint()
        seconds = yield from _erase_batch(batch, known)
        for sector in batch:
            yield Report(SectorErased(sector.address, sector.size_bytes, seconds / len(batch)))
        if seconds > sum(s.erase_max_s for s in batch):
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


def _erase_batch(batch: list[Sector], known: Known) -> Flow[float]:
    codes, wait_s = [s.code for s in batch], erase_wait_s(batch)
    # The ACK of some loaders comes early (AN2606): the flash still works, whatever they answer.
    early_s = 2 * sum(s.erase_max_s for s in batch) if known.chip.has(Quirk.ERASE_NOT_AWAITED, known.loader_id) else 0.0

    def command(timing: Timing) -> Flow[None]:
        if known.line.loader.erase_command is Command.ERASE:
            yield from an3155.erase(codes, timing, wait_s=wait_s)
        else:
            yield from an3155.extended_erase(codes, timing, wait_s=wait_s)
        if early_s:
            yield Pause(early_s)

    begun: float = yield Now()
    yield from known.line.erase(command, wait_s)
    ended: float = yield Now()
    yield Report(StepDone("erase", ended - begun))
    return ended - begun


def _witnesses(sector: Sector, flash: FlashMap, known: Known) -> Flow[dict[int, bytes]]:
    """Blocks of the neighbouring sectors next to ``sector``, by address."""
    count = min(CHECK_BYTES, known.chip.read_max_bytes)
    before, after = flash.neighbours(sector)
    found: dict[int, bytes] = {}
    for address in ([before.end - count] if before else []) + ([after.address] if after else []):
        yield Checkpoint()
        found[address] = yield from known.line.read_twice(address, count)
    return found


def _check_first(sector: Sector, witnesses: dict[int, bytes], known: Known) -> Flow[None]:
    count = min(CHECK_BYTES, known.chip.read_max_bytes, sector.size_bytes)
    for address in (sector.address, sector.end - count):
        data = yield from known.line.read(address, count)
        if data.count(known.chip.erased_value) != count:
            data = yield from known.line.read(address, count)
        if data.count(known.chip.erased_value) != count:
            raise NotErased(
                f"sector {sector.code}: its erase was acknowledged, and the {count} bytes at {address:#010x} are not blank",
                sector=sector.code,
                address=address,
            )
    for address, before in witnesses.items():
        data = yield from known.line.read(address, len(before))
        if data != before:
            data = yield from known.line.read(address, len(before))
        if data != before:
            raise WrongSector(
                f"sector {sector.code} ({sector.address:#010x}..{sector.end - 1:#010x}) was erased and {address:#010x} "
                "outside of it changed",
                sector=sector.code,
                address=address,
            )


def _erase_range(request: Request, known: Known, result: Result) -> Flow[None]:
    """Erase exactly the range that the job names, and prove it blank. A range that cuts a sector is refused, not widened."""
    yield from phase_started(Phase.PLAN)
    flash, chip = _flash_of(known), known.chip
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
    check_protected(sectors, request.protect, everything=not request.length)
    yield from check_entry(request, known)
    yield from known.line.use_supply()
    total = sum(s.size_bytes for s in sectors)
    seconds = sum(s.erase_typ_s for s in sectors) + total * 1.05 * known.line.timing.byte_s
    limit_s = (
        60 + 4 * seconds + 2 * chip.mass_erase_max_s + sum(erase_wait_s(b) for b in _batches(sectors, chip, known.loader_id))
    )
    limit_s += _after_s(request)
    yield Report(Planned(len(sectors), total, 0, 0, seconds, limit_s))
    if request.one_shot:
        known.line.may_reset = False  # As in ``_program``.
    if request.length or not chip.mass_erase or not (yield from _mass_erase(sectors, known, result)):
        yield from _erase(sectors, known, result, NOTHING_KEPT)
    yield from phase_started(Phase.VERIFY, total)
    done = 0
    for sector in sectors:
        for address, count in _pieces(sector.address, sector.end, chip.read_max_bytes):
            yield Checkpoint()
            data = yield from known.line.read(address, count)
            if data.count(chip.erased_value) != count:
                data = yield from known.line.read(address, count)
            _must_equal(address, bytes([chip.erased_value]) * count, data)
            done += count
            yield Progress(done)
    result.bytes_compared, result.evidence, result.proof = done, "full", "read-back"


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
    _cost(result, Phase.ERASE).seconds += (yield Now()) - begun
    return True


# --- reading ------------------------------------------------------------------------------------------------------


def _read(address: int, length: int, line: Dialogue) -> Flow[bytes]:
    seconds = length * 1.05 * line.timing.byte_s
    yield Report(Planned(0, 0, 0, length, seconds, 60 + 4 * seconds + _after_s(line.request)))
    yield from phase_started(Phase.READ, length)
    most = line.chip.read_max_bytes if line.chip else CHECK_BYTES
    parts: list[bytes] = []
    done = 0
    for at, count in _pieces(address, address + length, most):
        yield Checkpoint()
        before = line.recoveries
        try:
            parts.append((yield from line.read_twice(at, count)))
        except Nack as error:
            if before:
                yield from line.prove(error)
            if error.facts.get("stage") == "opcode":
                raise ReadProtected(f"Read Memory is refused at its opcode: {error.message}") from error
            raise
        done += count
        yield Progress(done)
    return b"".join(parts)


def _pieces(start: int, end: int, most: int) -> Iterable[tuple[int, int]]:
    return ((at, min(most, end - at)) for at in range(start, end, most))
