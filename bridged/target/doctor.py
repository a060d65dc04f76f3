"""The target half of the doctor: what is wrong between this gateway and this chip, found out without changing its flash.

It listens, holds NRST, looks whether the application falls silent, starts the loader, asks it everything that can be asked, and
starts the application again. Each finding has a stable code, what was seen, and what to do. The symptoms and their likely
causes follow AN2606 (activation, start-up, limitations by loader version), AN3155, and reports of users. A flow without I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

from bridged import chips
from bridged.chips.model import Chip
from bridged.errors import (
    ApplicationRunning,
    BridgedError,
    Garbled,
    LoaderError,
    Loopback,
    Nack,
    NoReply,
    NoSync,
    SyncNoise,
    WrongChip,
    WrongParity,
)
from bridged.events import Phase
from bridged.protocol.flow import Checkpoint, Drain, Flow, Pause, Receive, Send, SetFormat, SetLines
from bridged.target.dialogue import Dialogue
from bridged.target.entry import Connected, enter, phase_started
from bridged.target.expect import printable
from bridged.target.identify import Known, identify, read_option
from bridged.target.request import Request, Result

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"

LISTEN_S = 1.0
HELD_S = 0.3
SLOW_GET_ID_S = 0.005  # Between the two bytes: sent back to back, a start bit would fall where a stop bit is expected.


@dataclass(frozen=True, slots=True)
class Finding:
    """``level``: ok, note, warning or problem. ``code`` is stable. ``remedy`` may be empty where there is nothing to do."""

    level: str
    code: str
    text: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        return {"level": self.level, "code": self.code, "text": self.text, "remedy": self.remedy}


@dataclass(frozen=True, slots=True)
class Manners:
    """What the application said before, during and after a reset with BOOT0 low."""

    before: bytes = b""
    held: bytes = b""
    after: bytes = b""


def examine(request: Request, result: Result) -> Flow[list[Finding]]:
    """All findings, problems first. Raises only what makes looking impossible (port or lines gone)."""
    found: list[Finding] = []
    yield from phase_started(Phase.IDENTIFY)
    chip = chips.find(request.chip) if request.chip else None
    manners = yield from _listen(request, found)
    yield Checkpoint()
    try:
        connected = yield from enter(request, result)
    except (LoaderError, WrongChip) as error:
        found.append((yield from _why_no_loader(request, chip, error, manners)))
        _pins(chip, found)
    else:
        yield from _ask(request, connected, result, found)
    order = [PROBLEM, WARNING, NOTE, OK]
    return sorted(found, key=lambda f: order.index(f.level))


def _listen(request: Request, found: list[Finding]) -> Flow[Manners]:
    """Does the application speak, and does NRST silence it?"""
    yield SetFormat(request.application_baud, request.application_parity)
    yield Drain(0.02, 0.1)
    before: bytes = yield Receive(4096, LISTEN_S)
    if not request.wiring.has_reset:
        found.append(
            Finding(
                WARNING,
                "NRST_NOT_WIRED",
                "no line drives NRST, so nothing can be tried a second time",
                "Wire NRST: open-drain, low for reset; every recovery depends on it.",
            )
        )
        return Manners(before)
    yield SetLines(reset=True, boot0=False)
    yield Drain(0.02, 0.1)  # What was on its way.
    held: bytes = yield Receive(4096, HELD_S)
    yield SetLines(reset=False)
    after: bytes = yield Receive(4096, max(LISTEN_S, request.listen_s))
    if held:
        found.append(
            Finding(
                PROBLEM,
                "TALKS_IN_RESET",
                f"while NRST was held low it went on speaking: {printable(held)[:80]!r}",
                "NRST does not reach the chip, is inverted, or another device speaks on this line.",
            )
        )
    elif after:
        found.append(Finding(OK, "RESET_WORKS", f"NRST low silences it, and it starts with {printable(after)[:80]!r}"))
    else:
        found.append(
            Finding(
                NOTE,
                "APPLICATION_SILENT",
                "no byte came from the application, before or after a reset",
                "Normal for blank flash, or an application that is silent or speaks at another rate.",
            )
        )
    start = after[:12]
    if len(start) >= 8 and after.count(start) > 1:
        found.append(
            Finding(
                WARNING,
                "RESETS_ITSELF",
                f"it started {after.count(start)} times within {max(LISTEN_S, request.listen_s):g} s",
                "An external watchdog or a crash loop: stop it while flashing, or it resets the loader as well.",
            )
        )
    return Manners(before, held, after)


def _why_no_loader(request: Request, chip: Chip | None, error: BridgedError, manners: Manners) -> Flow[Finding]:
    """The loader did not answer; what was heard tells the causes apart."""
    pattern = f" (AN2606 pattern {chip.activation_pattern})" if chip and chip.activation_pattern else ""
    match error:
        case WrongChip():
            return Finding(PROBLEM, "WRONG_CHIP", error.message, error.hint.remedy)
        case Loopback():
            return Finding(PROBLEM, "LOOPBACK", error.message, error.hint.remedy)
        case ApplicationRunning():
            return Finding(
                PROBLEM,
                "BOOT0_NOT_SEEN",
                f"the target resets but starts its application although BOOT0 is driven high: {error.message}",
                f"Measure BOOT0 at the chip during reset; option bits may ignore the pin{pattern}.",
            )
        case WrongParity():
            return (yield from _parity(request, error))
        case SyncNoise() | Garbled() | NoReply():
            return Finding(
                PROBLEM,
                "RATE_OR_NOISE",
                f"something answers, but not understandably at any rate: {error.message}",
                "Another device on these pins, a target TX that is loaded (PA9 is VBUS on boards with USB OTG), or noise; "
                "try `baud = 57600`, check ground and pins.",
            )
        case NoSync() if manners.after and not manners.held:
            return Finding(
                PROBLEM,
                "BOOT0_NOT_SEEN",
                "NRST works and the application speaks after it, but with BOOT0 high nothing answers 0x7F",
                f"BOOT0 does not reach the chip or is ignored{pattern}, or the loader listens on other pins.",
            )
        case _:
            return Finding(
                PROBLEM,
                "NOTHING_HEARD",
                f"no byte came from the target, with or without BOOT0: {error.message}",
                "Check power and ground, TX to RX crossed, and the pins; unplug USB, which the loader may have chosen instead.",
            )


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
    return Finding(PROBLEM, "WRONG_PARITY", f"{error.message}{proof}: parity on the wire is not even", error.hint.remedy)


def _ask(request: Request, connected: Connected, result: Result, found: list[Finding]) -> Flow[None]:
    """Everything that a loader tells."""
    after_ms = connected.wait_s * 1000
    text = f"the loader answers at {connected.baud} baud, attempt {connected.attempt}, {after_ms:.0f} ms after reset"
    found.append(Finding(OK if connected.attempt == 1 else NOTE, "LOADER_ANSWERS", text))
    if connected.already:
        found.append(
            Finding(
                WARNING,
                "NOT_RESET",
                "the loader had been synchronised before the reset",
                "NRST does not reach the chip: it was still in the loader from an earlier session.",
            )
        )
    if connected.junk.strip(b"\x00"):
        found.append(
            Finding(NOTE, "JUNK_BEFORE_ACK", f"{connected.junk[:16].hex(' ')} came before the ACK", "Usually harmless noise.")
        )
    line = Dialogue(request, result, connected)
    result.pid, result.loader = line.pid, line.loader.version_text
    chip = connected.chip
    if chip is None:
        found.append(
            Finding(
                PROBLEM,
                "UNKNOWN_CHIP",
                f"product id {line.pid:#05x} is in no table of this version",
                "Report it, with its name.",
            )
        )
        return
    if line.loader.odd:
        text = f"Get announced {line.loader.announced} commands and listed {len(line.loader.commands)}"
        found.append(Finding(NOTE, "GET_COUNT_ODD", text, "Known of the H743 loader V9.0; understood."))
    known = yield from identify(request, line, chip, result)
    protected = False
    try:
        yield from line.read(chip.flash_base, 4)
    except Nack:
        protected = True
    _report_identity(known, result, found, protected=protected)
    if protected:
        found.append(
            Finding(
                PROBLEM,
                "READ_PROTECTED",
                "Read Memory is refused while Get and Get ID are answered: readout protection is on",
                "Removing it erases the whole flash; no job does that unless it says so.",
            )
        )
        return
    yield from _options(request, known, found)
    _pins(chip, found)


def _report_identity(known: Known, result: Result, found: list[Finding], *, protected: bool) -> None:
    chip = known.chip
    size = f"{result.flash_bytes // 1024} KiB of flash" if result.flash_bytes else "flash size unknown"
    version = f", version byte {result.loader_id:#04x}" if result.loader_id is not None else ""
    found.append(Finding(OK, "IDENTIFIED", f"{chip.title}, {size}, loader protocol {result.loader}{version}"))
    if known.flash is None and not protected:
        found.append(Finding(PROBLEM, "LAYOUT_UNKNOWN", known.why_no_flash, "State `layout` in the target's configuration."))
    for row in chip.quirks:
        if not row.loader_ids or result.loader_id in row.loader_ids:
            found.append(Finding(NOTE, f"QUIRK_{row.quirk.name}", f"{row.text} ({row.source})"))


def _options(request: Request, known: Known, found: list[Finding]) -> Flow[None]:
    """Option bits that decide whether the loader and the application can be reached."""
    chip = known.chip
    for check in chip.entry_checks:
        word = yield from read_option(chip, check.option, known.line)
        if word is None:
            found.append(Finding(NOTE, "OPTION_UNREADABLE", f"{check.option.name} cannot be read through this loader"))
        elif check.option.value(word) in check.values:
            found.append(Finding(OK, "ENTRY_OPTION", f"{check.option.name} = {check.option.value(word):#x}: BOOT0 is obeyed"))
        else:
            found.append(
                Finding(
                    PROBLEM,
                    "ENTRY_WOULD_BE_LOST",
                    f"{check.option.name} = {check.option.value(word):#x}: {check.otherwise}",
                    "After an erase nothing could start the loader again; correct the option bytes first.",
                )
            )
    for unreachable in chip.app_checks:
        word = yield from read_option(chip, unreachable.option, known.line)
        if word is not None and not unreachable.holds(word):
            found.append(
                Finding(
                    PROBLEM,
                    "APPLICATION_UNREACHABLE",
                    f"{unreachable.option.name} = {unreachable.option.value(word):#06x}: {unreachable.otherwise}",
                    "The application cannot start, however well it was flashed; write the factory value back.",
                )
            )
    wiring = request.wiring
    if not (wiring.has_boot0 or wiring.boot0_by_hand):
        found.append(
            Finding(
                WARNING,
                "BOOT0_NOT_WIRED",
                "no line drives BOOT0",
                "Jobs that erase are refused unless they say entry=one-shot.",
            )
        )
    if chip.empty_check:
        word_bytes = yield from known.line.read(chip.flash_base, 4)
        if word_bytes == bytes([chip.erased_value]) * 4:
            text = "the flash is empty: this part starts its loader by itself, also with BOOT0 low, and remembers that"
            found.append(Finding(NOTE, "EMPTY", text, "After the first flash it needs a power cycle, or is started by Go."))


def _pins(chip: Chip | None, found: list[Finding]) -> None:
    if chip is None:
        found.append(Finding(NOTE, "CHIP_NOT_CONFIGURED", "`chip` is not configured: its pins cannot be named"))
        return
    pins = "; ".join(f"USART{number} {text}".strip() for number, text in chip.usart_pins)
    if pins:
        text = f"the loader of {chip.title} listens on {pins}; the first interface that speaks wins, USB and CAN included"
        found.append(Finding(NOTE, "LOADER_PINS", text))
