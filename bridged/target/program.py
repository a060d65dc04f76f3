"""Flash, ensure and verify: a plan made and carried out, by the second-stage loader where one is configured, else by AN3155.

Nothing is erased before the plan is complete, the bytes to be kept are read, the way back into the loader is proven (P10) and
the daemon has all of that on disk. What was proven before and is still there is left alone (``_leave_alone``); what was asked
for by sample is only looked at (``_sampled``), which proves nothing and says so.

Documents: the order of erase and write is the design's, see ``images.plan``; docs/second-stage.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from bridged.chips.model import Sector
from bridged.errors import EntryWouldBeLost, LoaderError, Nack, NoReply, OutsideUnreadable, VerifyError, WrongSector
from bridged.events import Phase, Planned, Retried
from bridged.images.model import Image
from bridged.images.plan import Plan, check_protected, make_plan
from bridged.images.vectors import check_vectors_for, flash_range, vector_addresses
from bridged.protocol.flow import Checkpoint, Flow, Now, Progress, Report
from bridged.target.dialogue import erase_wait_s, pieces
from bridged.target.entry import phase_started
from bridged.target.erasing import batches, erase
from bridged.target.identify import Known
from bridged.target.kept import Kept, decode_kept, encode_kept, leave_as_is
from bridged.target.protection import longest_s
from bridged.target.proving import Read, Work
from bridged.target.request import Request, Result
from bridged.target.way_back import check_entry

if TYPE_CHECKING:  # What a session without it never loads: 1.7 MiB, and a sixth of its start.
    from bridged.target.streaming import Stage

SAMPLES = 16  # Blocks of an image that is looked at by sample: half a second at 115200 baud.


def program(request: Request, known: Known, image: Image, kept: bytes, result: Result) -> Flow[None]:
    yield from phase_started(Phase.PLAN)
    flash = known.flash_map()
    saved = decode_kept(kept) if kept else None
    result.changed = saved is not None
    closed: EntryWouldBeLost | None = None
    content, covered = (saved.content(image), saved.covered(flash)) if saved else (None, ())
    vectors = vector_addresses(image, flash_range(known.chip, flash.size_bytes), request.spans)
    plan = make_plan(image, known.chip, flash, request.proven, content, vectors, covered)
    if saved:
        saved.check(plan.erase)
    result.content = image.digest
    seconds = plan.estimate_s(result.baud)
    limit_s = _limit_s(plan, request, known, seconds)
    if request.second_stage == "auto":
        from bridged.target import streaming

        limit_s *= 2  # It may be given up at the very end.
        seconds = streaming.foreseen_s(request, known, plan, result) or seconds
    yield Report(Planned(len(plan.erase), plan.erase_bytes, plan.write_bytes, plan.outside_bytes, seconds, limit_s))
    if request.kind != "verify" and "vectors" not in request.force:
        check_vectors_for(image, known.chip, result.flash_bytes, request.spans)
    if saved is None and (yield from _sampled(plan, request, known, result)):
        return
    if request.second_stage == "auto":
        if not streaming.reason_not(request, known, result):
            closed = yield from _closed(request, known)
        stage = yield from streaming.begin(request, known, plan, result)
        if stage is not None:
            try:
                yield from _by_second_stage(stage, saved, closed, limit_s)
                yield from streaming.end(stage)
                return
            except WrongSector:
                raise  # Bytes are lost that no plan named (P6): no other loader makes that good.
            except LoaderError as error:
                yield from streaming.give_up(known.line, error, result)
            # From here on it is as if an interrupted job were resumed: with what was kept, and without what is proven.
            plan = stage.plan.leaving(stage.proven)
            saved = decode_kept(stage.kept) if stage.kept else saved
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
    check_protected(plan.erase, request.protect, plan.flash)  # Not before: an ensure that finds its image touches nothing.
    yield from check_entry(request, known)
    if saved is None or plan.outside:
        plan = plan.keeping(None) if request.discard_outside else (yield from _backup(plan, known, result))
    yield Checkpoint()
    if saved:
        result.was_empty = saved.was_empty
    elif known.chip.empty_check:
        word = yield from known.line.read_torn(known.chip.flash_base, 4)
        result.was_empty = word == bytes([known.chip.erased_value]) * 4
    if request.one_shot:
        known.line.may_reset = False  # From here on nothing says that the loader could be entered again (P10).
    if plan.erase:
        yield from erase(plan.erase, known, result, encode_kept(plan, was_empty=result.was_empty))
    # All but the vector tables is written and proven first; only then does anything become bootable.
    work = Work(plan, known, result)
    yield from work.write(final=False)
    yield from work.prove(final=False)
    if work.held:
        yield from work.write(final=True)
        yield from work.prove(final=True)
    result.evidence = "full"


def _compare(plan: Plan, known: Known, result: Result, *, tolerate: bool) -> Flow[bool]:
    """Whether the flash holds the image; the first difference ends it, as an answer or as an error."""
    before = result.bytes_compared
    try:
        yield from Work(plan, known, result).prove(final=False, repair=False)
    except (VerifyError, NoReply) as error:
        if not tolerate:
            raise
        if isinstance(error, NoReply):  # A torn word of ECC flash: whatever it held, it is not the image.
            yield from known.line.revive(error)
        result.bytes_compared = before
        result.phases.pop(Phase.VERIFY.value, None)
        yield Report(Retried("ensure", error.message))
        return False
    return True


def prove_still(request: Request, known: Known, image: Image, result: Result) -> Flow[None]:
    """That all of ``image`` is there, which a run of this job proved and this one has not seen. Nothing is changed.

    Raises ``VerifyError``, ``LayoutUnknown``, ``ImageDoesNotFit``.
    """
    yield from phase_started(Phase.PLAN)
    plan = replace(make_plan(image, known.chip, known.flash_map()), erase=())
    seconds = plan.estimate_s(result.baud)
    yield Report(Planned(0, 0, 0, 0, seconds, _limit_s(plan, request, known, seconds)))
    yield from _compare(plan, known, result, tolerate=False)
    result.evidence = "full"
    result.proof = "checksum" if result.bytes_checksummed else "read-back"


def _closed(request: Request, known: Known) -> Flow[EntryWouldBeLost | None]:
    """P10 is asked of the ROM loader, so before the other one runs; whether it matters shows later."""
    if request.kind != "verify":
        try:
            yield from check_entry(request, known)
        except EntryWouldBeLost as error:
            return error
    return None


def _by_second_stage(stage: Stage, saved: Kept | None, closed: EntryWouldBeLost | None, limit_s: float) -> Flow[None]:
    """The same work by the other loader. Raises ``LoaderError`` where AN3155 should go on, with ``stage.plan``."""
    from bridged.target import streaming

    request, known, result, plan = stage.request, stage.known, stage.result, stage.plan
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
        plan = stage.plan = yield from streaming.leave_alone(stage, plan, equal)
        blank = [s for s in blank if s in plan.erase]
        if not plan.erase:
            result.evidence = "full"
            return
    check_protected(plan.erase, request.protect, plan.flash)
    if closed is not None:
        raise closed
    if saved is None or plan.outside:
        parts = [] if request.discard_outside else (yield from streaming.keep(stage, plan, blank))
        result.bytes_kept = sum(len(d) for _, d in parts)
        plan = stage.plan = plan.keeping(Image.of(parts) if parts else None)
    seconds = plan.streamed_s(stage.row, stage.link.baud, blank)
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
    same, done = yield from _same(plan, known, chosen)
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
    equal: list[Sector] = []
    reads = replace(plan, erase=()).reads()
    total = sum(n for a, n in reads if any(a < s.end and s.address < a + n for s in likely))
    yield from phase_started(Phase.PLAN, total)
    done = 0
    for sector in likely:
        inside = (r for r in reads if r[0] < sector.end and sector.address < r[0] + r[1])
        same, done = yield from _same(plan, known, inside, done)
        if same:
            equal.append(sector)
    less, _ = yield from leave_as_is(plan, equal, result)
    result.bytes_compared = done
    seconds = less.estimate_s(result.baud)
    limit_s = _limit_s(less, request, known, seconds)
    yield Report(Planned(len(less.erase), less.erase_bytes, less.write_bytes, less.outside_bytes, seconds, limit_s))
    return less


def _backup(plan: Plan, known: Known, result: Result) -> Flow[Plan]:
    """Read what the erase would take along with it (P6); blank parts need no keeping."""
    yield from phase_started(Phase.BACKUP, plan.outside_bytes)
    parts: list[tuple[int, bytes]] = []
    blank = bytes([known.chip.erased_value])
    done = 0
    cost = result.cost(Phase.BACKUP)
    begun: float = yield Now()
    try:
        for gap in plan.outside:
            for address, count in pieces(gap.start, gap.end, known.chip.read_max_bytes):
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
    except (Nack, NoReply) as error:
        if isinstance(error, NoReply):
            yield from known.line.revive(error)
        raise OutsideUnreadable(
            f"bytes of a sector to be erased lie outside the image and cannot be read: {error.message}", **error.facts
        ) from error
    cost.seconds += (yield Now()) - begun
    count = sum(len(d) for _, d in parts)
    result.bytes_kept += count
    return plan.keeping(Image.of(parts) if count else None)


def _same(plan: Plan, known: Known, reads: Iterable[Read], done: int = 0) -> Flow[tuple[bool, int]]:
    """Whether the flash holds the content at ``reads``; the first difference ends it. And the bytes that were looked at, with
    the ``done`` ones before."""
    same = True

    def compare(address: int, data: bytes) -> Flow[bool]:
        nonlocal done, same
        same = data == plan.content.read(address, len(data))
        done += len(data)
        yield Progress(done)
        return same

    yield Checkpoint()
    try:
        yield from known.line.read_all(deque(reads), compare)
    except NoReply as error:
        yield from known.line.revive(error)
        return False, done
    return same, done


def _limit_s(plan: Plan, request: Request, known: Known, seconds: float) -> float:
    waits_s = sum(erase_wait_s(b) for b in batches(plan.erase, known.chip, known.loader_id))
    protecting_s = longest_s(known.chip) + request.after_s if request.wishes.protect else 0
    return 60 + 4 * seconds + waits_s + protecting_s + request.after_s
