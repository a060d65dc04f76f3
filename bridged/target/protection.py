"""Protection and option bytes: reading them, changing them, and what they mean for a session. Flows without I/O.

Every command here makes the loader reset the target (AN3155), and most of their ACKs say nothing about the work behind them. So
there is one way to send any of them, ``_launch``: the hazard is declared, the command sent, and whatever is answered, nothing
more is sent and no line moves until the time is over (P9); then the target is reset, synchronised from nothing, and asked what
is so now. Only that counts. A command that got lost on the wire is thereby found out and sent again, a bounded number of times.

- Readout Unprotect sends both ACKs before it erases, and erases everything: twice the worst mass erase. Level 0 comes after the
  erase (RM0090): finding it proves that everything is gone.
- A write of option bytes is a write of the whole block, read before and merged; the block as it was is on disk first, so that a
  run that was interrupted merges with that again and not with what a cut-off write left.
- Write protection is added to what is protected already, although the loader's own command replaces the set.
- A flash that ends in readout protection proves, boots and asks the application first. That it may be protected now is on disk
  (``PROVEN``), so that a job which is interrupted behind that point is not taken for one that must erase everything again.

Document: AN3155 (commands).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from bridged.chips.model import Chip, Quirk, Range
from bridged.chips.option_rows import layout_of
from bridged.chips.options import (
    Decoded,
    OptionLayout,
    WrpKind,
    areas,
    check,
    decode,
    refuse_names,
    same_values,
    with_fields,
    with_protected,
    with_raw,
)
from bridged.errors import (
    BadRequest,
    ConsentMissing,
    EntryWouldBeLost,
    Garbled,
    ImageDoesNotFit,
    LayoutUnknown,
    Nack,
    NoReply,
    NotAllowed,
    OptionBytesDiffer,
    OptionBytesLost,
    ProtectionUnchanged,
    ReadProtected,
    Unsupported,
    VerifyError,
)
from bridged.events import Identified, Phase, Planned, Retried, Warned
from bridged.images.model import Image
from bridged.images.plan import check_protected
from bridged.images.vectors import check_vectors_for
from bridged.protocol import an3155
from bridged.protocol.an3155 import Command, Timing
from bridged.protocol.flow import Barrier, Checkpoint, Flow, Hazard, Now, Pause, Report
from bridged.target.dialogue import Dialogue
from bridged.target.entry import enter, phase_started
from bridged.target.expect import Conversation
from bridged.target.identify import Known, try_register
from bridged.target.kept import NOTHING_KEPT
from bridged.target.request import Request, Result
from bridged.target.wishes import ERASE_EVERYTHING

LAUNCHES = 3  # Of one command: a byte that was lost shows only behind the whole wait.
OPTION_WORST_S = 1.0  # Erasing and writing option bytes: as long as a small sector of an F4, from memory.
OPTION_LEAST_S = 5.0
SLOW_MASS_ERASE_S = 0.5
SLOW_LEAST_S = 25.0
ENTER_S = 60.0  # All attempts to enter, at all rates.
SAMPLES = 64  # Sectors that are looked at after everything was erased.
SAMPLE_BYTES = 128
_BLOCK = struct.Struct("<8sI")
_BLOCK_MAGIC = b"BROPTB1\n"
_PROVEN_MAGIC = b"BRPROV1\n"


def _must_come_back(request: Request) -> None:
    """The loader resets behind these commands: without our own reset and BOOT0 nobody would find out what came of it."""
    wiring = request.wiring
    if not ((wiring.has_boot0 or wiring.boot0_by_hand) and (wiring.has_reset or wiring.has_power)):
        raise EntryWouldBeLost("NRST or BOOT0 is not wired: the loader resets after this command and must be entered again")


# --- sending what resets the target -----------------------------------------------------------------------------------


def option_wait_s(chip: Chip) -> float:
    """Twice the worst case of a change of option bytes, and never less than a floor."""
    smallest = min((run.erase_max_s for lay in chip.layouts for bank in lay.banks for run in bank.runs), default=0.0)
    return max(OPTION_LEAST_S, 2 * max(OPTION_WORST_S, smallest))


def unprotect_wait_s(chip: Chip) -> float:
    """Twice the worst mass erase, and the change of option bytes after it."""
    least = SLOW_LEAST_S if chip.mass_erase_max_s >= SLOW_MASS_ERASE_S else OPTION_LEAST_S
    return max(least, 2 * chip.mass_erase_max_s + 1) + option_wait_s(chip)


def longest_s(chip: Chip) -> float:
    """A bound for the protection at the end of a flash, with every command sent as often as it may be."""
    return LAUNCHES * (option_wait_s(chip) + ENTER_S)


def _needs(line: Dialogue, command: Command) -> Flow[None]:
    if command not in line.loader.commands:
        yield from line.confirm()  # The answer to Get has no checksum.
    if command not in line.loader.commands:
        raise Unsupported(f"this loader has no {command.title} ({command:#04x})", opcode=int(command))


def _launch(line: Dialogue, command: Callable[[Timing], Flow[None]], wait_s: float, what: str) -> Flow[None]:
    """See the module docstring."""
    yield Hazard(wait_s)
    begun: float = yield Now()
    try:
        yield from command(line.timing)
    except (Nack, NoReply, Garbled) as error:
        yield Report(Retried(what, f"{error.code}: {error.message}; waiting until the flash is certainly at rest"))
    now: float = yield Now()
    yield Pause(max(0.0, begun + wait_s - now))
    yield Hazard(0)
    yield from line.reconnect()


def is_protected(line: Dialogue, chip: Chip) -> Flow[bool]:
    """Whether Read Memory is refused at its opcode, three times and once after a reset, by a loader that answers else."""
    for attempt in range(LAUNCHES):
        try:
            yield from line.read(chip.flash_base, 4)
        except Nack as error:
            if error.facts.get("stage") == "opcode":
                yield from line.confirm()
                return True
            if attempt == LAUNCHES - 1:
                raise
            yield from line.reconnect()  # A stray ACK before the refusal makes it look like one of the address.
        else:
            return False
    raise AssertionError("the last attempt returns or raises")


# --- option bytes -----------------------------------------------------------------------------------------------------


def read_options(known: Known) -> Flow[tuple[OptionLayout | None, dict[int, bytes], Decoded]]:
    """All option bytes that the loader shows, and what they say. Raises ``ReadProtected``."""
    chip = known.chip
    layout = layout_of(chip)
    raw: dict[int, bytes] = {}
    for area in areas(chip, layout):
        parts = []
        for at in range(area.start, area.end, chip.read_max_bytes):
            count = min(chip.read_max_bytes, area.end - at)
            parts.append((yield from try_register(chip, at, count, known.line)))
        if all(parts):
            raw[area.start] = b"".join(parts)
    return layout, raw, decode(chip, layout, raw, known.flash)


def option_bytes(request: Request, known: Known, kept: bytes, result: Result) -> Flow[None]:
    """Read and decode; where the job names fields, write the merged block and read it again."""
    yield from phase_started(Phase.READ)
    layout, raw, before = yield from read_options(known)
    result.options = {"layout": layout.name if layout else "", "before": before.to_dict()}
    if layout is not None:
        result.options |= {"source": layout.source.source, "confidence": layout.source.confidence.value}
    wishes = request.wishes
    if not wishes.writes_options:
        return
    refuse_names(dict(wishes.fields))
    layout, block = _writable(known, layout, raw)
    base = _saved_block(kept, layout) or block
    if wishes.fields:
        wanted = with_fields(layout, base, dict(wishes.fields))
    else:
        wanted = with_raw(layout, base, wishes.patches, wishes.named)
    yield from _write(request, known, layout, block, base, wanted, before, result, resumed=bool(kept))


def _writable(known: Known, layout: OptionLayout | None, raw: dict[int, bytes]) -> tuple[OptionLayout, bytes]:
    if layout is None:
        raise Unsupported(
            f"{known.chip.title}: the layout of its option bytes cannot be cited, so they are shown and not written",
            pid=known.chip.pid,
        )
    if layout.block.start not in raw:
        raise Unsupported(f"{known.chip.title}: its loader does not show the option bytes at {layout.block.start:#010x}")
    return layout, raw[layout.block.start]


def _saved_block(kept: bytes, layout: OptionLayout) -> bytes:
    """The block that an interrupted run had read before it wrote; empty where there is none."""
    if len(kept) < _BLOCK.size:
        return b""
    magic, start = _BLOCK.unpack_from(kept)
    block = kept[_BLOCK.size :]
    return block if (magic, start, len(block)) == (_BLOCK_MAGIC, layout.block.start, layout.block.size) else b""


def _write(
    request: Request,
    known: Known,
    layout: OptionLayout,
    block: bytes,
    base: bytes,
    wanted: bytes,
    before: Decoded,
    result: Result,
    *,
    resumed: bool,
) -> Flow[None]:
    """``block``: as it is now; ``base``: as it was when the job began; ``wanted``: what is to be there."""
    chip = known.chip
    check(chip, layout, base, wanted)
    result.changed = resumed
    if same_values(layout, block, wanted) and not before.broken:
        result.options["after"] = before.to_dict()
        return
    _must_come_back(request)
    yield from _needs(known.line, Command.WRITE_MEMORY)
    wait_s = option_wait_s(chip)
    yield from _planned(wait_s)
    yield Checkpoint()
    yield from phase_started(Phase.WRITE, len(wanted))
    yield Barrier("options", wait_s, _BLOCK.pack(_BLOCK_MAGIC, layout.block.start) + base)
    after = before
    for _ in range(LAUNCHES):
        result.changed = True
        yield from _launch(
            known.line,
            lambda timing: an3155.write_memory(layout.block.start, wanted, timing, ack_max_s=wait_s),
            wait_s,
            "option bytes",
        )
        try:
            _, raw, after = yield from read_options(known)
        except ReadProtected as error:
            raise OptionBytesLost(f"the option bytes were written, and then {error.message}") from error
        result.options["after"] = after.to_dict()
        now = raw.get(layout.block.start, b"")
        if len(now) == len(wanted) and same_values(layout, now, wanted) and not after.broken:
            yield Barrier("erased")
            yield from _warn_launch(known)
            return
    asked = decode(chip, layout, {layout.block.start: wanted}, None).fields
    differing = ", ".join(name for name, value in asked.items() if after.fields.get(name) != value)
    raise OptionBytesDiffer(
        f"{chip.title}: after {LAUNCHES} writes of the option bytes these differ still: {differing or 'their complements'}",
        fields=differing,
    )


def _warn_launch(known: Known) -> Flow[None]:
    if known.chip.has(Quirk.OPTION_LAUNCH_MISSING, known.loader_id):
        text = "this loader version writes option bytes and does not load them: they come into force at the next power-on"
        yield Report(Warned("POWER_CYCLE_NEEDED", text))


def _planned(wait_s: float) -> Flow[None]:
    yield Report(Planned(0, 0, 0, 0, wait_s, 60 + LAUNCHES * (wait_s + ENTER_S)))


# --- protect ----------------------------------------------------------------------------------------------------------


def protect(request: Request, known: Known, kept: bytes, result: Result) -> Flow[None]:
    """Readout protection of level 1, or write protection of named sectors besides those that have it."""
    if request.wishes.what == "write":
        yield from _protect_sectors(request, known, kept, result)
        return
    if known.protected:
        return
    if layout_of(known.chip) is not None:
        _, _, before = yield from read_options(known)
        result.options = {"before": before.to_dict()}
    _must_come_back(request)
    yield from _planned(option_wait_s(known.chip))
    yield Checkpoint()
    yield from lock_readout(known.line, known.chip, result, b"")


def lock_readout(line: Dialogue, chip: Chip, result: Result, kept: bytes) -> Flow[None]:
    """Readout Protect, and the proof: Read Memory is refused, while the loader answers else."""
    yield from _needs(line, Command.READOUT_PROTECT)
    wait_s = option_wait_s(chip)
    yield from phase_started(Phase.PROTECT)
    yield Barrier("protecting", wait_s, kept)
    for _ in range(LAUNCHES):
        result.changed = True
        yield from _launch(line, lambda timing: an3155.readout_protect(timing, wait_s=wait_s), wait_s, "protect")
        if (yield from is_protected(line, chip)):
            result.protected = True
            yield Barrier("erased")
            return
    raise ProtectionUnchanged(f"{chip.title}: Readout Protect was sent {LAUNCHES} times, and Read Memory is allowed still")


def _protect_sectors(request: Request, known: Known, kept: bytes, result: Result) -> Flow[None]:
    chip, flash = known.chip, known.flash
    if known.protected and kept:
        raise OptionBytesLost(f"{chip.title}: the job had begun to write option bytes, and now readout protection is on")
    if known.protected:
        raise ReadProtected(f"{chip.title}: readout protection is on; which sectors are write-protected cannot be read")
    if flash is None:
        raise Unsupported(f"{chip.title}: {known.why_no_flash}")
    layout, raw, before = yield from read_options(known)
    result.options = {"before": before.to_dict()}
    if layout is None or layout.wrp is None or layout.block.start not in raw:
        raise Unsupported(f"{chip.title}: which option bytes protect which sectors is not known", pid=chip.pid)
    block = raw[layout.block.start]
    base = _saved_block(kept, layout) or block
    wanted = with_fields(layout, base, with_protected(layout, base, flash, request.wishes.sectors))
    if layout.wrp.kind is not WrpKind.SECTORS:
        yield from _write(request, known, layout, block, base, wanted, before, result, resumed=bool(kept))
        return
    target = decode(chip, layout, {layout.block.start: wanted}, flash).protected or ()
    codes = [s.code for s in flash.sectors if any(r.covers(s.address, s.end) for r in target)]
    yield from _change_sectors(
        request, known, target, lambda timing, wait_s: an3155.write_protect(codes, timing, wait_s=wait_s), before, result
    )


def _change_sectors(
    request: Request,
    known: Known,
    target: tuple[Range, ...],
    command: Callable[[Timing, float], Flow[None]],
    before: Decoded,
    result: Result,
) -> Flow[None]:
    """Send ``command`` until exactly ``target`` is write-protected."""
    chip = known.chip
    result.options["after"] = before.to_dict()
    if before.protected == target:
        return
    _must_come_back(request)
    wait_s = option_wait_s(chip)
    yield from _planned(wait_s)
    yield Checkpoint()
    yield from phase_started(Phase.PROTECT if target else Phase.UNPROTECT)
    yield Barrier("options", wait_s, b"")
    after = before
    for _ in range(LAUNCHES):
        result.changed = True
        yield from _launch(known.line, lambda timing: command(timing, wait_s), wait_s, "write protection")
        try:
            _, _, after = yield from read_options(known)
        except ReadProtected as error:
            raise OptionBytesLost(f"write protection was changed, and then {error.message}") from error
        result.options["after"] = after.to_dict()
        if after.protected == target and not after.broken:
            yield Barrier("erased")
            yield from _warn_launch(known)
            return
    shown = ", ".join(after.to_dict().get("write_protected", [])) or "nothing"
    raise ProtectionUnchanged(f"{chip.title}: after {LAUNCHES} attempts write-protected are: {shown}")


# --- unprotect --------------------------------------------------------------------------------------------------------


def unprotect(request: Request, known: Known, kept: bytes, result: Result) -> Flow[bool]:
    """Remove readout protection, which erases everything, or write protection, which erases nothing.

    Whether everything was erased, by an interrupted run of this job perhaps.
    """
    if request.wishes.what == "write":
        yield from _unprotect_sectors(request, known, result)
        return False
    if known.protected or (yield from is_protected(known.line, known.chip)):
        yield from unlock_readout(request, known.line, known.chip, result)
    elif kept:
        result.changed = True
    else:
        yield Report(Warned("NOT_PROTECTED", "readout protection is off: there is nothing to remove, and nothing was erased"))
    return result.changed


def _unprotect_sectors(request: Request, known: Known, result: Result) -> Flow[None]:
    chip = known.chip
    if known.protected:
        raise ReadProtected(f"{chip.title}: readout protection is on, so write protection can be neither read nor changed")
    yield from _needs(known.line, Command.WRITE_UNPROTECT)
    _, _, before = yield from read_options(known)
    result.options = {"before": before.to_dict()}
    if before.protected is None:
        raise Unsupported(f"{chip.title}: its write protection cannot be read, so nothing could prove that it is gone")
    if before.pcrop:
        raise NotAllowed(
            f"{chip.title}: PCROP is on; removing write protection there would extend it instead, and only removing readout "
            "protection ends it"
        )
    yield from _change_sectors(
        request, known, (), lambda timing, wait_s: an3155.write_unprotect(timing, wait_s=wait_s), before, result
    )


def unlock_readout(request: Request, line: Dialogue, chip: Chip, result: Result) -> Flow[None]:
    """Readout Unprotect: everything is erased. The job must say so, and no configured range may stand against it."""
    if ERASE_EVERYTHING not in request.force:
        raise ConsentMissing(f"removing readout protection erases everything; say force={ERASE_EVERYTHING}")
    check_protected((), request.protect, everything=True)
    _must_come_back(request)
    yield from _needs(line, Command.READOUT_UNPROTECT)
    if not (yield from is_protected(line, chip)):  # Asked once more: what follows cannot be undone.
        raise ProtectionUnchanged(f"{chip.title}: Read Memory was refused, and is allowed now; nothing was done")
    # P10: no option bit can be read, but the loader was entered with BOOT0 high. A part that came here because it is empty has
    # nothing to lose, and for all others that is the proof.
    wait_s = unprotect_wait_s(chip)
    yield Report(Planned(0, 0, 0, 0, wait_s, 60 + LAUNCHES * (wait_s + ENTER_S)))
    yield Checkpoint()
    yield from phase_started(Phase.UNPROTECT)
    yield Barrier("erasing", wait_s, NOTHING_KEPT)
    result.changed = True
    for _ in range(LAUNCHES):
        yield from _launch(line, lambda timing: an3155.readout_unprotect(timing, wait_s=wait_s), wait_s, "unprotect")
        if not (yield from is_protected(line, chip)):
            result.protected = False
            yield Barrier("erased")
            return
    raise ProtectionUnchanged(
        f"{chip.title}: Readout Unprotect was sent {LAUNCHES} times, each time {wait_s:.0f} s passed, and Read Memory is "
        "refused still"
    )


def check_blank(known: Known, result: Result) -> Flow[None]:
    """After everything was erased: the ends of sectors, spread over the flash. Write-protected ones are erased as well."""
    if known.flash is None:
        return
    sectors = known.flash.sectors
    step = max(1, len(sectors) // SAMPLES)
    chosen = [*sectors[::step], sectors[-1]]
    yield from phase_started(Phase.VERIFY, 2 * SAMPLE_BYTES * len(chosen))
    for sector in chosen:
        yield Checkpoint()
        for address in (sector.address, sector.end - SAMPLE_BYTES):
            data = yield from known.line.read(address, SAMPLE_BYTES)
            if data.count(known.chip.erased_value) != len(data):
                data = yield from known.line.read(address, SAMPLE_BYTES)
            if data.count(known.chip.erased_value) != len(data):
                raise VerifyError(
                    f"readout protection is off, and {address:#010x} is not blank; flash it or erase it", address=address
                )
            result.bytes_compared += len(data)


# --- a protected target in a flash or an ensure -----------------------------------------------------------------------


def when_protected(
    request: Request, line: Dialogue, chip: Chip, image: Image, result: Result, refused: ReadProtected
) -> Flow[bool]:
    """What becomes of a flash or an ensure of a protected target. True: it is done. False: unprotected, and everything blank.

    An ensure can compare nothing there. The gateway's record is all there is to ask; the answer names it and its age, and
    nobody is told that anything was proven.
    """
    result.protected = True
    names = "/".join(chip.names)
    yield Report(
        Identified(chip.pid, chip.family, names, line.loader.version_text, None, request.flash_bytes, "", "", protected=True)
    )
    if request.kind == "ensure" and request.past.content == image.digest:
        result.content, result.evidence, result.age_s = image.digest, "record", round(request.past.age_s, 1)
        text = f"readout protection is on, nothing could be read: by the record of {request.past.age_s:.0f} s ago it is there"
        yield Report(Warned("BY_RECORD_ONLY", text))
        return True
    if not request.wishes.unprotect:
        known = "the record does not say that this image is there" if request.kind == "ensure" else ""
        raise ReadProtected("; ".join(filter(None, (refused.message, known))), **refused.facts) from refused
    _look_ahead(request, chip, image)
    yield from unlock_readout(request, line, chip, result)
    return False


def _look_ahead(request: Request, chip: Chip, image: Image) -> None:
    """What would refuse the flash after everything is erased refuses it now, as far as it can be known without reading.

    Raises ``ImageDoesNotFit``, ``ImageNotBootable``, ``LayoutUnknown``.
    """
    size = request.flash_bytes or request.past.flash_bytes
    most = size or chip.flash_max_bytes
    for seg in image.segments:
        if seg.address < chip.flash_base or seg.end > chip.flash_base + most:
            raise ImageDoesNotFit(
                f"the image has bytes at {seg.address:#010x}..{seg.end - 1:#010x}, and the flash of {chip.title} is at most "
                f"{most // 1024} KiB from {chip.flash_base:#010x}; nothing was erased",
                start=seg.address,
                end=seg.end,
            )
    if "vectors" not in request.force:
        check_vectors_for(image, chip, most, request.spans)
    possible = chip.layouts_for(size) if size else chip.layouts
    named = request.layout in {lay.name for lay in possible}
    sure = (
        chip.layout_confirmed
        and bool(possible)
        and all(lay.confirmed or lay.name != request.past.layout != "" for lay in possible)
    )
    if not (named or sure) or not (size or chip.flash_size_register):
        names = ", ".join(dict.fromkeys(lay.name for lay in possible)) or "none"
        raise LayoutUnknown(
            f"{chip.title}: while readout protection is on nobody can say whether its flash can be written afterwards, so it "
            f"is not erased; state `flash_kib` and `layout` ({names})",
            pid=chip.pid,
        )


def proven_marker(digest: str) -> bytes:
    """What is on disk before the readout protection that a flash ends in: all of this content was proven, and is alive."""
    return _PROVEN_MAGIC + digest.encode()


def is_proven(kept: bytes, image: Image | None) -> bool:
    """Raises ``BadRequest`` where the marker is of another content."""
    if not kept.startswith(_PROVEN_MAGIC):
        return False
    if image is None or kept != proven_marker(image.digest):
        raise BadRequest("the interrupted job had proven another content than its image has now")
    return True


def protect_last(request: Request, result: Result, chip: Chip, digest: str) -> Flow[Dialogue]:
    """Into the loader once more, and readout protection on, if it is not yet. The caller starts the application again."""
    connected = yield from enter(request, result, result.baud or None)
    line = Dialogue(request, result, connected)
    yield from line.confirm()
    if (yield from is_protected(line, chip)):
        result.protected = True
        yield Barrier("erased")
    else:
        yield from lock_readout(line, chip, result, proven_marker(digest))
    return line


def unasked(request: Request) -> Request:
    """The same without a health probe: it was passed before."""
    return replace(request, health=Conversation())
