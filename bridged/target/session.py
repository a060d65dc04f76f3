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

from bridged import chips
from bridged.chips.model import Chip
from bridged.errors import (
    BadRequest,
    BridgedError,
    ImageDoesNotFit,
    LineUnavailable,
    LinkError,
    LoaderError,
    Nack,
    OptionBytesLost,
    ReadProtected,
    UnknownChip,
)
from bridged.events import Phase, Planned
from bridged.images.model import Image
from bridged.protocol.an3155 import Timing
from bridged.protocol.flow import Barrier, Checkpoint, Flow, Now, Progress, Report, SetLines
from bridged.target.dialogue import Dialogue, pieces
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
from bridged.target.erasing import erase_range
from bridged.target.identify import Known, identify
from bridged.target.kept import NOTHING_KEPT
from bridged.target.program import program, prove_still
from bridged.target.protection import (
    check_blank,
    is_protected,
    is_proven,
    lock_readout,
    option_bytes,
    protect,
    protect_last,
    proven_marker,
    unasked,
    unprotect,
    when_protected,
)
from bridged.target.request import Request, Result
from bridged.target.speed import start_baud

READ_BYTES = 256  # Of a part that is in no table.


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
    if line.chip is not None and not _only_looks(request):
        line.chip.refuse_foreign()  # Whatever the configuration states.
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
        if known:
            _check_within(request, known)
        result.data = yield from _read(request.address, request.length, line)
    elif request.kind == "erase" and known:
        yield from erase_range(request, known, result)
    elif request.kind in ("flash", "ensure", "verify") and known:
        if image is None:
            raise BadRequest(f"a job of kind {request.kind} needs an image")
        yield from program(request, known, image, kept, result)
    elif request.kind == "option-bytes" and known:
        yield from option_bytes(request, known, kept, result)
    elif request.kind == "protect" and known:
        yield from protect(request, known, kept, result)
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
    """An interrupted run had proven everything, had heard the application, and was about to protect it.

    Where it got as far as that, nothing can be read any more. Where it did not, another board may be there by now, or another
    firmware: what can be looked at is looked at before it is shut for ever.
    """
    assert image is not None
    chip = line.chip
    if chip is None:
        raise UnknownChip(f"product id {line.pid:#05x} is in no table of this version", pid=line.pid)
    result.changed, result.content = True, image.digest
    result.health = "passed" if request.health else ""
    if (yield from is_protected(line, chip)):
        result.pid, result.loader, result.family = line.pid, line.loader.version_text, chip.family
        result.names = "/".join(chip.names)
        result.evidence, result.protected = "full", True
        yield Barrier("erased")
    elif known := (yield from _know(request, line, result)):
        yield from prove_still(request, known, image, result)
        yield from lock_readout(line, chip, result, proven_marker(image.digest))
    yield from boot(unasked(request), result, line.chip, line.timing)


def _configured(request: Request) -> tuple[Chip | None, Timing]:
    """What is known of a part whose loader is not talked to: enough to see that it is in there again after a reset."""
    chip = chips.find(request.chip) if request.chip else None
    return chip, Timing.at(start_baud(request, chip))


def _know(request: Request, line: Dialogue, result: Result) -> Flow[Known | None]:
    """What is known of the chip; None where its product id is in no table, which is enough to identify and to read."""
    result.pid, result.loader = line.pid, line.loader.version_text
    if line.chip is None:
        if request.kind in ("identify", "read"):
            return None
        raise UnknownChip(f"product id {line.pid:#05x} is in no table of this version", pid=line.pid)
    return (yield from identify(request, line, line.chip, result))


def _only_looks(request: Request) -> bool:
    return request.kind in ("identify", "read") or (request.kind == "option-bytes" and not request.wishes.writes_options)


def _check_within(request: Request, known: Known) -> None:
    """A read that runs out of the flash hangs the loader; it would look like a bad link. Where the layout is unsure nobody
    knows where the flash ends before the largest part's does."""
    chip, end = known.chip, request.address + request.length
    flash_end = known.flash.sectors[-1].end if known.flash else chip.flash_base + chip.flash_max_bytes
    if chip.flash_base <= request.address < flash_end < end:
        raise ImageDoesNotFit(
            f"the read begins in the flash of {chip.title} and ends beyond it: {request.address:#010x}..{end - 1:#010x}, "
            f"the flash ends at {flash_end - 1:#010x}",
            start=request.address,
            end=end,
        )


def _read(address: int, length: int, line: Dialogue) -> Flow[bytes]:
    seconds = length * 1.05 * line.timing.byte_s
    yield Report(Planned(0, 0, 0, length, seconds, 60 + 4 * seconds + line.request.after_s))
    yield from phase_started(Phase.READ, length)
    most = line.chip.read_max_bytes if line.chip else READ_BYTES
    parts: list[bytes] = []
    done = 0
    for at, count in pieces(address, address + length, most):
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
