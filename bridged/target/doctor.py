"""The target half of the doctor: what is wrong between this gateway and this chip, found out without changing its flash.

It listens, holds NRST, looks whether the application falls silent, starts the loader, asks it everything that can be asked, and
starts the application again. What each finding means and what to do is in ``findings``. The symptoms and their likely causes
follow AN2606 (activation, start-up, limitations by loader version), AN3155, and reports of users. A flow without I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridged import chips
from bridged.chips.model import Chip
from bridged.chips.options import word_at
from bridged.errors import (
    ApplicationRunning,
    BaudUnavailable,
    BridgedError,
    Garbled,
    LoaderError,
    Loopback,
    Nack,
    NoReply,
    NoSync,
    ParityUnavailable,
    SyncNoise,
    UnstableLink,
    WrongChip,
    WrongParity,
)
from bridged.events import Phase
from bridged.findings import MACHINE, Finding, Level, found
from bridged.images.vectors import VECTORS_BYTES, flash_range, looks_like_a_table
from bridged.protocol import an3155
from bridged.protocol.an3155 import Timing
from bridged.protocol.flow import Checkpoint, Drain, Flow, Now, Overheard, Pause, Receive, Send, SetFormat, SetLines
from bridged.target.dialogue import Dialogue
from bridged.target.entry import Connected, enter, phase_started
from bridged.target.expect import printable
from bridged.target.identify import Known, identify
from bridged.target.protection import read_options
from bridged.target.request import Request, Result
from bridged.target.speed import STARTUP_LEAST_S, STARTUP_MARGIN, start_baud
from bridged.target.way_back import other_bank

LISTEN_S = 1.0
HELD_S = 0.3
TURNAROUNDS = 16  # Get Version so often: enough for a median, 20 ms of wire.
GET_VERSION_BYTES = 7  # 01 FE, ACK, version, two option bytes, ACK (AN3155).
BLOCK_WIRE_BYTES = 268  # Of one block of 256 written or read, with three turnarounds.
SLOW_SHARE = 0.1  # Of a job, added by turnarounds.
SLOW_GET_ID_S = 0.005  # Between the two bytes: sent back to back, a start bit would fall where a stop bit is expected.
F7_ITCM_FLASH = range(0x00200000, 0x00400000)  # Where an F7 sees its flash a second time; images may be linked for it.
BANK_CHOOSERS = ("3", "4", "5", "7", "14")  # AN2606 patterns whose loader starts by itself where no bank holds an application.


@dataclass(frozen=True, slots=True)
class Manners:
    """What the application said before, during and after a reset with BOOT0 low; ``loader``: it was the loader that started."""

    before: bytes = b""
    held: bytes = b""
    after: bytes = b""
    loader: bool = False


def examine(request: Request, result: Result) -> Flow[list[Finding]]:
    """All findings, problems first. Raises only what makes looking impossible (port or lines gone)."""
    here: list[Finding] = []
    yield from phase_started(Phase.IDENTIFY)
    chip = chips.find(request.chip) if request.chip else None
    manners = Manners()
    try:
        manners = yield from _listen(request, chip, here)
        yield Checkpoint()
        connected = yield from enter(request, result)
    except (ParityUnavailable, BaudUnavailable) as error:
        here.append(_say("DOCTOR_PORT_SETTINGS", error.message, error.hint.remedy))
    except (LoaderError, WrongChip) as error:
        here.append((yield from _why_no_loader(request, chip, error, manners)))
        _pins(chip, here)
    else:
        result.baud = connected.baud
        line = Dialogue(request, result, connected)
        try:
            yield from _ask(request, connected, line, manners, result, here)
        except WrongChip as error:
            here.append(_say("DOCTOR_WRONG_CHIP", error.message))
        except LoaderError as error:
            here.append(_say("DOCTOR_RATE_OR_NOISE", f"it was synchronised, and then: {error.message}"))
        if line.mended:
            count = f"{line.mended} command{'' if line.mended == 1 else 's'}"
            here.append(_say("DOCTOR_REPEATED", f"{count} had to be sent again", count=line.mended))
    order = list(Level)
    return sorted(here, key=lambda f: order.index(f.level))


def _say(code: str, text: str, remedy: str = "", **facts: str | int | bool) -> Finding:
    """The daemon knows the name of the target; a session does not."""
    return found(code, MACHINE, text, remedy, **facts)


def _listen(request: Request, chip: Chip | None, here: list[Finding]) -> Flow[Manners]:
    """Does the application speak, and does NRST silence it? Where nothing speaks: is it the loader that starts?"""
    yield SetFormat(request.application_baud, request.application_parity)
    earlier: bytes = yield Drain(0.02, 0.1)
    before: bytes = yield Receive(4096, LISTEN_S)
    yield Overheard(earlier + before)
    if not request.wiring.has_reset:
        here.append(_say("DOCTOR_NRST_NOT_WIRED", "no line drives NRST, so nothing can be tried a second time"))
        return Manners(before)
    yield SetLines(reset=True, boot0=False)
    under_way: bytes = yield Drain(0.02, 0.1)
    held: bytes = yield Receive(4096, HELD_S)
    if held:
        more: bytes = yield Receive(4096, LISTEN_S)
        under_way, held = (under_way, held + more) if more else (under_way + held, b"")  # A byte of noise is no speech.
    yield SetLines(reset=False)
    listen_s = max(LISTEN_S, request.listen_s)
    after: bytes = yield Receive(4096, listen_s)
    yield Overheard(under_way + held + after)
    loader = False
    if held:
        text = f"while NRST was held low it went on speaking: {printable(held)[:80]!r}"
        here.append(_say("DOCTOR_TALKS_IN_RESET", text))
    elif after:
        text = f"NRST low silences it, and it starts with {printable(after)[:80]!r}"
        here.append(_say("DOCTOR_RESET_WORKS", text))
    else:
        here.append(_say("DOCTOR_APPLICATION_SILENT", "no byte came from the application, before or after a reset"))
        loader = yield from _loader_starts(request, chip)
    start = after[:12]
    if len(start) >= 8 and after.count(start) > 1:
        here.append(_say("DOCTOR_RESETS_ITSELF", f"it started {after.count(start)} times within {listen_s:g} s"))
    return Manners(before, held, after, loader)


def _loader_starts(request: Request, chip: Chip | None) -> Flow[bool]:
    """After a reset with BOOT0 low: is it the loader that answers?"""
    baud = start_baud(request, chip)
    timing = Timing.at(baud)
    yield SetFormat(baud, chip.parity if chip else "E")
    yield SetLines(reset=True, boot0=False)
    yield Pause(HELD_S)
    yield Drain(0.001, 0.05)
    yield SetLines(reset=False)
    startup_s = request.startup_s or max((s * STARTUP_MARGIN for s in (chip.startup_s if chip else ())), default=0.1)
    yield Pause(max(STARTUP_LEAST_S, startup_s))
    try:
        sync = yield from an3155.synchronise(timing)
        yield from an3155.get_version(timing)
    except LoaderError:
        return False
    return not sync.already  # That it was synchronised before says that NRST does not reach it, which is another matter.


def _why_no_loader(request: Request, chip: Chip | None, error: BridgedError, manners: Manners) -> Flow[Finding]:
    """The loader did not answer; what was heard tells the causes apart."""
    pattern = f" (AN2606 pattern {chip.activation_pattern})" if chip and chip.activation_pattern else ""
    ignored = f"Measure BOOT0 at the chip during reset; option bits may ignore the pin{pattern}"
    match error:
        case WrongChip():
            return _say("DOCTOR_WRONG_CHIP", error.message)
        case Loopback():
            return _say("DOCTOR_LOOPBACK", error.message)
        case ApplicationRunning():
            text = f"the target resets but starts its application although BOOT0 is driven high: {error.message}"
            return _say("DOCTOR_BOOT0_NOT_SEEN", text, f"{ignored}.")
        case WrongParity():
            return (yield from _parity(request, error))
        case SyncNoise() | Garbled() | NoReply() | Nack() | UnstableLink():
            return _say("DOCTOR_RATE_OR_NOISE", f"something answers, but not understandably at any rate: {error.message}")
        case NoSync() if manners.after and not manners.held:
            text = "NRST works and the application speaks after it, but with BOOT0 high nothing answers 0x7F"
            return _say("DOCTOR_BOOT0_NOT_SEEN", text, f"{ignored}; or the loader listens on other pins.")
        case _:
            return _say("DOCTOR_NOTHING_HEARD", f"no byte came from the target, with or without BOOT0: {error.message}")


def _parity(request: Request, error: WrongParity) -> Flow[Finding]:
    """ACK to 0x7F, NACK to Get. Both bytes of Get ID have the parity bit that 8N1 sends by accident; slowly, they pass."""
    yield from request.wiring.enter
    yield Receive(4096, 0.3)
    yield Send(b"\x7f")
    yield Receive(1, 0.2)
    yield Send(b"\x02")
    yield Pause(SLOW_GET_ID_S)
    yield Send(b"\xfd")
    answer: bytes = yield Receive(5, 0.3)
    proof = ", and Get ID sent slowly is answered" if answer[:1] == b"\x79" else ""
    return _say("DOCTOR_WRONG_PARITY", f"{error.message}{proof}: parity on the wire is not even")


def _turnaround(line: Dialogue) -> Flow[Finding]:
    """How much longer an answer takes than its bytes do: what adapter, driver and loader add to every stage of a command."""
    found: list[float] = []
    for _ in range(TURNAROUNDS):
        begun: float = yield Now()
        yield from line.get_version()  # One that had to be repeated is an outlier, which a median bears.
        ended: float = yield Now()
        found.append(max(0.0, ended - begun - GET_VERSION_BYTES * line.timing.byte_s))
    median_s = sorted(found)[TURNAROUNDS // 2]
    share = 3 * median_s / (BLOCK_WIRE_BYTES * line.timing.byte_s)
    text = f"an answer takes {median_s * 1000:.2f} ms more than its bytes: a job takes {share:.0%} longer at {line.baud} baud"
    code = "DOCTOR_ADAPTER_SLOW" if share > SLOW_SHARE else "DOCTOR_TURNAROUND"
    return _say(code, text, turnaround_us=round(median_s * 1e6))


def _ask(
    request: Request, connected: Connected, line: Dialogue, manners: Manners, result: Result, here: list[Finding]
) -> Flow[None]:
    """Everything that a loader tells."""
    after_ms = connected.wait_s * 1000
    text = f"the loader answers at {connected.baud} baud, attempt {connected.attempt}, {after_ms:.0f} ms after reset"
    here.append(_say("DOCTOR_LOADER_ANSWERS" if connected.attempt == 1 else "DOCTOR_LOADER_LATE", text))
    if connected.already:
        here.append(_say("DOCTOR_NOT_RESET", "the loader had been synchronised before the reset"))
    if connected.junk.strip(b"\x00"):
        here.append(_say("DOCTOR_JUNK_BEFORE_ACK", f"{connected.junk[:16].hex(' ')} came before the ACK"))
    yield from line.confirm()
    result.pid, result.loader = line.pid, line.loader.version_text
    chip = line.chip
    if chip is None:
        here.append(_say("DOCTOR_UNKNOWN_CHIP", f"product id {line.pid:#05x} is in no table of this version", pid=line.pid))
        return
    if line.loader.odd:
        text = f"Get announced {line.loader.announced} commands and listed {len(line.loader.commands)}"
        here.append(_say("DOCTOR_GET_COUNT_ODD", text))
    known = yield from identify(request, line, chip, result)
    here.append((yield from _turnaround(line)))
    refused: Nack | None = None
    try:
        yield from line.read(chip.flash_base, 4)
    except Nack as error:
        refused = error
    protected = refused is not None and refused.facts.get("stage") == "opcode"
    _report_identity(known, result, here, protected=protected)
    if refused is not None and not protected:
        text = f"flash begins at {chip.flash_base:#010x} on {chip.title}, and reading there is refused: {refused.message}"
        here.append(_say("DOCTOR_FLASH_REFUSED", text))
        return
    if protected:
        text = "Read Memory is refused while Get and Get ID are answered: readout protection is on"
        here.append(_say("DOCTOR_READ_PROTECTED", text))
        return
    yield from _options(known, result, here)
    yield from _vectors(known, manners, here)
    if not (request.wiring.has_boot0 or request.wiring.boot0_by_hand):
        here.append(_say("DOCTOR_BOOT0_NOT_WIRED", "no line drives BOOT0"))
    _pins(chip, here)


def _report_identity(known: Known, result: Result, here: list[Finding], *, protected: bool) -> None:
    chip = known.chip
    size = f"{result.flash_bytes // 1024} KiB of flash" if result.flash_bytes else "flash size unknown"
    version = f", version byte {result.loader_id:#04x}" if result.loader_id is not None else ""
    here.append(_say("DOCTOR_IDENTIFIED", f"{chip.title}, {size}, loader protocol {result.loader}{version}"))
    if known.flash is None and not protected:
        here.append(_say("DOCTOR_LAYOUT_UNKNOWN", known.why_no_flash))
    for row in chip.quirks:
        if not row.loader_ids or result.loader_id in row.loader_ids:
            here.append(_say("DOCTOR_QUIRK", f"{row.text} ({row.source})", quirk=row.quirk.value))


def _options(known: Known, result: Result, here: list[Finding]) -> Flow[None]:
    """What the option bytes say: whether loader and application can be reached, and what is protected."""
    chip = known.chip
    layout, raw, seen = yield from read_options(known)
    result.options = {"before": seen.to_dict()}
    for check in chip.entry_checks:
        word = word_at(raw, check.option.address)
        if word is None:
            here.append(_say("DOCTOR_OPTION_UNREADABLE", f"{check.option.name} cannot be read through this loader"))
            continue
        text = f"{check.option.name} = {check.option.value(word):#x}"
        if check.holds(word):
            here.append(_say("DOCTOR_BOOT_OPTION", f"{text}: BOOT0 high leads to the loader"))
        else:
            here.append(_say("DOCTOR_ENTRY_WOULD_BE_LOST", f"{text}: {check.otherwise}"))
    for unreachable in chip.app_checks:
        word = word_at(raw, unreachable.option.address)
        if word is None:
            continue
        text = f"{unreachable.option.name} = {unreachable.option.value(word):#06x}"
        if unreachable.holds(word):
            here.append(_say("DOCTOR_BOOT_OPTION", f"{text}: BOOT0 low does not lead to the loader"))
        else:
            here.append(_say("DOCTOR_APPLICATION_UNREACHABLE", f"{text}: {unreachable.otherwise}"))
    if text := (yield from other_bank(known)):
        here.append(_say("DOCTOR_OTHER_BANK", text))
    if seen.fields:
        told = ", ".join(f"{name}={value}" for name, value in seen.to_dict()["fields"].items())
        here.append(_say("DOCTOR_OPTION_BYTES", told + (f" ({layout.source.source})" if layout else "")))
    for code, ranges in (("DOCTOR_WRITE_PROTECTED", seen.protected), ("DOCTOR_PCROP", seen.pcrop)):
        if ranges:
            here.append(_say(code, ", ".join(f"{r.start:#010x}..{r.end - 1:#010x}" for r in ranges)))
    if seen.broken:
        places = ", ".join(f"{address:#010x}" for address in seen.broken)
        here.append(_say("DOCTOR_OPTION_BYTES_BROKEN", f"the complements at {places} are not those of their values"))


def _vectors(known: Known, manners: Manners, here: list[Finding]) -> Flow[None]:
    """Is there anything in flash that could start, and does it?"""
    chip = known.chip
    table = yield from known.line.read_twice(chip.flash_base, VECTORS_BYTES)
    blank = table[:4] == bytes([chip.erased_value]) * 4
    reset = int.from_bytes(table[4:], "little")
    itcm = chip.family == "F7" and reset in F7_ITCM_FLASH and bool(reset & 1)
    if blank and chip.empty_check:
        text = "the flash is empty: this part starts its loader by itself, also with BOOT0 low, and remembers that"
        here.append(_say("DOCTOR_EMPTY", text))
    elif blank:
        here.append(_say("DOCTOR_NO_APPLICATION", f"the flash is blank at {chip.flash_base:#010x}"))
    elif not itcm and not looks_like_a_table(table, flash_range(chip, chip.flash_max_bytes)):
        words = f"{table[:4][::-1].hex()} and {table[4:][::-1].hex()}"
        text = f"the first words of flash, {words}, are no stack pointer and reset vector"
        here.append(_say("DOCTOR_NO_APPLICATION", text))
    by_itself = blank and (chip.empty_check or chip.activation_pattern in BANK_CHOOSERS)
    explained = by_itself or any(f.code == "DOCTOR_APPLICATION_UNREACHABLE" for f in here)
    if manners.loader and not explained:
        remedy = ""
        if chip.empty_check:
            remedy = "If its flash was empty when its power came on, cycle the power. Otherwise measure BOOT0 at the chip."
        here.append(_say("DOCTOR_LOADER_WITHOUT_BOOT0", "after a reset with BOOT0 low it is the loader that answers", remedy))


def _pins(chip: Chip | None, here: list[Finding]) -> None:
    if chip is None:
        here.append(_say("DOCTOR_CHIP_UNSET", "`chip` is not configured: the pins that its loader hears cannot be named"))
        return
    pins = "; ".join(f"USART{number} {text}".strip() for number, text in chip.usart_pins)
    if pins:
        text = f"the loader of {chip.title} listens on {pins}; the first interface that speaks wins, USB and CAN included"
        here.append(_say("DOCTOR_LOADER_PINS", text))
