"""What can go wrong: one tree of typed errors, each with a stable code, and one table of causes and remedies.

An error says what was attempted, where, what was expected and what came back. Its ``code`` is part of the public
interface (line protocol, HTTP, metrics, job records): it never changes meaning. The likely cause and the remedy are not
written where the error is raised but in ``HINTS``, so that all advice can be read and reviewed in one place.

Errors cross the border between the session process and the daemon as dictionaries (``as_dict`` / ``from_dict``).
This module knows nothing of any other module of ours. The tree and the table are one file, so that neither grows without the
other; a code without advice fails a test.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, ClassVar

FactValue = str | int | float | bool | None


class BridgedError(Exception):
    """Base of every failure that a user can meet.

    ``message``: what was attempted, where, what was expected, what came. ``facts``: the same as data (JSON scalars).
    ``code``: stable, upper case. ``retryable``: whether the same request may succeed later with nothing changed.
    """

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **facts: FactValue) -> None:
        super().__init__(message)
        self.message = message
        self.facts: dict[str, FactValue] = facts

    @property
    def hint(self) -> Hint:
        """Likely cause and remedy for this code."""
        return HINTS[self.code]

    def as_dict(self) -> dict[str, Any]:
        """Shape: ``{code, message, facts, retryable, cause, remedy}``; JSON-serialisable."""
        return {
            "code": self.code,
            "message": self.message,
            "facts": self.facts,
            "retryable": self.retryable,
            "cause": self.hint.cause,
            "remedy": self.hint.remedy,
        }


def from_dict(data: dict[str, Any]) -> BridgedError:
    """The error that ``as_dict`` described. An unknown code (a newer peer) becomes a plain ``BridgedError``."""
    cls = BY_CODE.get(str(data.get("code")), BridgedError)
    return cls(str(data.get("message", "")), **dict(data.get("facts") or {}))


# --- configuration ------------------------------------------------------------------------------------------------


class ConfigError(BridgedError):
    code = "CONFIG"


# --- images -------------------------------------------------------------------------------------------------------


class ImageError(BridgedError):
    code = "IMAGE"


class UnknownFormat(ImageError):
    code = "IMAGE_FORMAT"


class CorruptImage(ImageError):
    code = "IMAGE_CORRUPT"


class OverlappingImage(ImageError):
    code = "IMAGE_OVERLAP"


class EmptyImage(ImageError):
    code = "IMAGE_EMPTY"


class ImageDoesNotFit(ImageError):
    code = "IMAGE_DOES_NOT_FIT"


class ImageNotBootable(ImageError):
    """Stack pointer or reset vector cannot be right for this chip."""

    code = "IMAGE_NOT_BOOTABLE"


class ImageTooLarge(ImageError):
    code = "IMAGE_TOO_LARGE"


class ImageAddressMissing(ImageError):
    code = "IMAGE_ADDRESS_MISSING"


class UnknownImage(ImageError):
    code = "UNKNOWN_IMAGE"


class DigestMismatch(ImageError):
    code = "DIGEST_MISMATCH"


# --- target: link -------------------------------------------------------------------------------------------------


class TargetError(BridgedError):
    code = "TARGET"


class LinkError(TargetError):
    code = "LINK"


class PortBusy(LinkError):
    code = "PORT_BUSY"
    retryable = True


class PortGone(LinkError):
    code = "PORT_GONE"
    retryable = True


class PortForbidden(LinkError):
    code = "PORT_FORBIDDEN"


class ParityUnavailable(LinkError):
    code = "PARITY_UNAVAILABLE"


class BaudUnavailable(LinkError):
    code = "BAUD_UNAVAILABLE"


class LineUnavailable(LinkError):
    code = "LINE_UNAVAILABLE"


class TargetBroken(LinkError):
    """The lines could not be brought back to idle; nobody may use the target until a person has looked."""

    code = "TARGET_BROKEN"


# --- target: loader -----------------------------------------------------------------------------------------------


class LoaderError(TargetError):
    code = "LOADER"


class NoSync(LoaderError):
    """No answer at all to 0x7F."""

    code = "NO_SYNC"
    retryable = True


class SyncNoise(LoaderError):
    """Bytes came, but no acknowledgement: a wrong rate, noise."""

    code = "SYNC_NOISE"
    retryable = True


class ApplicationRunning(LoaderError):
    """The target talks, but it is its application that talks."""

    code = "APPLICATION_RUNNING"


class Loopback(LoaderError):
    code = "LOOPBACK"


class WrongParity(LoaderError):
    """Synchronised, then NACK to Get: the loader sees odd parity or none."""

    code = "WRONG_PARITY"


class Nack(LoaderError):
    code = "NACK"
    retryable = True


class NoReply(LoaderError):
    code = "NO_REPLY"
    retryable = True


class Garbled(LoaderError):
    code = "GARBLED"
    retryable = True


class UnstableLink(LoaderError):
    """The link loses or changes so much that its answers cannot be believed."""

    code = "UNSTABLE_LINK"
    retryable = True


class EraseTimeout(LoaderError):
    code = "ERASE_TIMEOUT"


class NotErased(LoaderError):
    """An erase was acknowledged, and the sector is not blank."""

    code = "NOT_ERASED"


class WrongSector(LoaderError):
    """The first erase touched another sector than planned."""

    code = "WRONG_SECTOR"


class SecondStageFailed(LoaderError):
    """The second-stage loader did not start, or gave up; the job goes on with the ROM loader."""

    code = "SECOND_STAGE_FAILED"


class TransferFailed(TargetError):
    """XMODEM: the receiver did not ask, did not acknowledge, or canceled."""

    code = "XMODEM_FAILED"
    retryable = True


class TransferUnconfirmed(TargetError):
    """XMODEM: everything was acknowledged, and what proves success did not come."""

    code = "XMODEM_UNCONFIRMED"


class NotSafeToStop(TargetError):
    """The interlock did not allow to reset the target."""

    code = "NOT_SAFE_TO_STOP"
    retryable = True


class Unhealthy(TargetError):
    """The new image is proven to be in flash, and its health probe failed."""

    code = "UNHEALTHY"


class SessionDied(LoaderError):
    code = "SESSION_DIED"
    retryable = True


class DeadlineExceeded(LoaderError):
    code = "DEADLINE_EXCEEDED"
    retryable = True


# --- target: chip -------------------------------------------------------------------------------------------------


class ChipError(TargetError):
    code = "CHIP"


class UnknownChip(ChipError):
    code = "UNKNOWN_CHIP"


class WrongChip(ChipError):
    code = "WRONG_CHIP"


class ReadProtected(ChipError):
    code = "READ_PROTECTED"


class Unsupported(ChipError):
    code = "UNSUPPORTED"


class LayoutUnknown(ChipError):
    code = "LAYOUT_UNKNOWN"


class EntryWouldBeLost(ChipError):
    """After the erase nothing proves that the ROM loader could be entered again (P10)."""

    code = "ENTRY_WOULD_BE_LOST"


class ProtectionUnchanged(ChipError):
    """A change of protection was acknowledged, and reading back does not show it."""

    code = "PROTECTION_UNCHANGED"


class OptionBytesDiffer(ChipError):
    """Option bytes were written, and reading back shows something else."""

    code = "OPTION_BYTES_DIFFER"


class OptionBytesLost(ChipError):
    """Writing option bytes was cut off: the loader shows nothing any more."""

    code = "OPTION_BYTES_LOST"


class OutsideUnreadable(ChipError):
    """Bytes of a touched sector outside the image cannot be read, so they could not be kept (P6)."""

    code = "OUTSIDE_UNREADABLE"


class VerifyError(TargetError):
    code = "VERIFY_MISMATCH"


# --- jobs ---------------------------------------------------------------------------------------------------------


class JobError(BridgedError):
    code = "JOB"


class UnknownJob(JobError):
    code = "UNKNOWN_JOB"


class UnknownTrace(JobError):
    code = "UNKNOWN_TRACE"


class UnknownTarget(JobError):
    code = "UNKNOWN_TARGET"


class TargetBusy(JobError):
    code = "TARGET_BUSY"
    retryable = True


class NotCancellable(JobError):
    code = "NOT_CANCELLABLE"


class Canceled(JobError):
    code = "CANCELED"


class Stopped(JobError):
    """The daemon is stopping; the job is parked and resumed at the next start."""

    code = "STOPPED"
    retryable = True


class QueueFull(JobError):
    code = "QUEUE_FULL"
    retryable = True


class StorageError(JobError):
    """What has to be on disk cannot get there now. Itself: somebody else keeps the journal locked."""

    code = "STORAGE"
    retryable = True


class StorageFull(StorageError):
    code = "STORAGE_FULL"


class StorageFailed(StorageError):
    """The disk itself fails (I/O error, read-only file system)."""

    code = "STORAGE_FAILED"


def disk_error(error: OSError, doing: str) -> StorageError:
    """What the disk said, translated. Raise it ``from error``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"{doing}: the disk is full ({error.strerror})")
    return StorageFailed(f"{doing}: {error.strerror or error}", errno=error.errno)


class JournalError(JobError):
    code = "JOURNAL"


class IdempotencyConflict(JobError):
    """The same id was used for another request."""

    code = "ID_CONFLICT"


# --- requests -----------------------------------------------------------------------------------------------------


class RequestError(BridgedError):
    code = "REQUEST"


class BadRequest(RequestError):
    code = "BAD_REQUEST"


class UnknownVerb(RequestError):
    code = "UNKNOWN_VERB"


class ForeignProtocol(RequestError):
    """The peer speaks HTTP, TLS or SSH to the line protocol, or HTTP to a console."""

    code = "FOREIGN_PROTOCOL"


class NotAllowed(RequestError):
    code = "NOT_ALLOWED"


class BadSignature(NotAllowed):
    """No signature where one is needed, or not the right one."""

    code = "SIGNATURE"


class AgainstPolicy(NotAllowed):
    """A rule of the target's policy; the fact ``rule`` names it."""

    code = "POLICY"


class ConsentMissing(RequestError):
    """What the job asks for destroys, or resets, more than it names."""

    code = "CONSENT_MISSING"


class LoginFirst(RequestError):
    """Nobody has said yet who this is."""

    code = "LOGIN_FIRST"


class WrongToken(RequestError):
    code = "BAD_TOKEN"


class UnknownCredential(RequestError):
    code = "UNKNOWN_CREDENTIAL"


class UnknownPath(RequestError):
    """There is no such resource over HTTP, or not with this method."""

    code = "UNKNOWN_PATH"


class Changed(RequestError):
    """Something is not any more as the client saw it, and it said that this matters."""

    code = "CHANGED"


class ForeignOrigin(RequestError):
    """A web page of somebody else, or a name that is not ours: a browser was made to ask."""

    code = "FOREIGN_ORIGIN"


class TooLarge(RequestError):
    code = "TOO_LARGE"


class TooMany(RequestError):
    code = "TOO_MANY"
    retryable = True


class DaemonUnreachable(RequestError):
    code = "DAEMON_UNREACHABLE"
    retryable = True


# --- fleets -------------------------------------------------------------------------------------------------------


class FleetError(BridgedError):
    """Something between a gateway, an operator and the broker."""

    code = "FLEET"


class FleetUnreachable(FleetError):
    """No broker answers, or it gave no answer in time."""

    code = "FLEET_UNREACHABLE"
    retryable = True


class FleetRefused(FleetError):
    """The broker does not know us, or a right is missing there."""

    code = "FLEET_REFUSED"


class FleetCommand(FleetError):
    """A message that is no command for this gateway."""

    code = "FLEET_COMMAND"


class FleetStale(FleetError):
    """A command so old that nobody can tell any more whether it was carried out."""

    code = "FLEET_STALE"


class FleetExpired(FleetError):
    code = "FLEET_EXPIRED"


class UnknownArtifact(FleetError):
    code = "UNKNOWN_ARTIFACT"


class UnknownRollout(FleetError):
    code = "UNKNOWN_ROLLOUT"


class RolloutChanged(FleetError):
    """Somebody else changed it meanwhile."""

    code = "ROLLOUT_CHANGED"
    retryable = True


@dataclass(frozen=True, slots=True)
class Hint:
    """Advice for a person at the target: the likely cause in one sentence, then what to do. ``sign``: what is seen by who has
    not looked at the code; docs/troubleshooting.md goes by it. Empty where nobody could see anything but the code."""

    cause: str
    remedy: str
    sign: str = ""


HINTS: dict[str, Hint] = {
    "INTERNAL": Hint(
        "A defect in bridged.", "Keep the journal and the trace of the job and report them; the target was released."
    ),
    "CONFIG": Hint(
        "The configuration file has a mistake, or names what this machine cannot give now.",
        "Correct what is named; `bridged check-config FILE` lists every mistake at once. Who has an address that is in use: "
        "`ss -ltnp`.",
    ),
    "IMAGE": Hint("The image cannot be used.", "See the message; build the image again and compare its SHA-256."),
    "IMAGE_FORMAT": Hint(
        "The bytes are none of the formats that were asked for.",
        "Say the format (`type=bin|hex|elf|srec|dfuse`); a BIN needs `addr=` as well.",
        "The file was taken, and is no firmware to the gateway.",
    ),
    "IMAGE_CORRUPT": Hint(
        "The file was cut short or changed on its way, or the tool that wrote it is at fault.",
        "Build or copy the file again; the message names the line or offset.",
        "The file was taken, and a line or an offset of it is named.",
    ),
    "IMAGE_OVERLAP": Hint(
        "Two places of the file, or two of the images, claim the same address.",
        "Correct the linker script or the addresses (`IMAGE@ADDR`); to lay bytes over an image say `patch=`.",
    ),
    "IMAGE_EMPTY": Hint(
        "The file holds no byte to be loaded.",
        "For an ELF: check that segments of type PT_LOAD have a file size; for a BIN: check the build.",
    ),
    "IMAGE_DOES_NOT_FIT": Hint(
        "The image was linked for another chip or another address, or the part is smaller than thought.",
        "Compare the address range in the message with the flash of the chip that was identified.",
        "The job is refused: addresses outside of the flash.",
    ),
    "IMAGE_NOT_BOOTABLE": Hint(
        "The first two words are not a stack pointer in RAM and an odd reset vector inside the same image: it was linked for "
        "another address or chip, or has no vector table.",
        "Compare its linker script with the address in the message; `force=vectors` overrides where it is meant so.",
        "The job is refused because of the vector table.",
    ),
    "IMAGE_TOO_LARGE": Hint(
        "The file, or what its gzip holds, exceeds a limit.", "Raise `store.image_limit_mib`, or send the right file."
    ),
    "IMAGE_ADDRESS_MISSING": Hint(
        "A raw binary does not say where it belongs.",
        "Add `addr=0x08000000` (or wherever it was linked for).",
        "A BIN is refused.",
    ),
    "UNKNOWN_IMAGE": Hint(
        "No staged image has this name or digest; it was never sent whole, or has been removed since.",
        "Send it with PUT; `HAVE sha256` says how much of it is here.",
    ),
    "DIGEST_MISMATCH": Hint(
        "The bytes that arrived are not the bytes that were announced.",
        "Compute the SHA-256 of the file again and resend it; nothing was staged.",
        "An upload was taken to its last byte, and is not there.",
    ),
    "TARGET": Hint("The target or its wiring failed.", "See the message."),
    "LINK": Hint("The serial port or a control line failed.", "Check the device, its cable and its permissions."),
    "PORT_BUSY": Hint(
        "Another process has the serial port open: a getty, ModemManager, a terminal program, another bridged.",
        "The message names it where the kernel tells; stop it, or mask `serial-getty@…`.",
        "The target is `absent`, or a job is refused at once, and the port is there.",
    ),
    "PORT_GONE": Hint(
        "The serial device vanished or was never there: unplugged, not powered, renamed.",
        "Plug it in again; use a name under /dev/serial/by-id or a udev link, which does not change.",
        "The target is `absent`, its device is not in /dev; or a job stops in the middle and is `interrupted`.",
    ),
    "PORT_FORBIDDEN": Hint(
        "The account that bridged runs as may not open the serial device, or the sandbox of its unit hides it.",
        "Permission denied: add the account to group `dialout` (unit: `SupplementaryGroups=dialout`). Operation not "
        "permitted: the unit's `DeviceAllow=` has to name the driver (`char-tty[A-Z]*`), and means only those that were "
        "loaded when the service started: `systemctl restart bridged`, and /etc/modules-load.d for the next boot.",
        "The target is `absent`: permission denied, or operation not permitted.",
    ),
    "PARITY_UNAVAILABLE": Hint(
        "The driver of this port dropped even parity without an error; the mini UART of a Raspberry Pi has no parity.",
        "Use a PL011: `dtoverlay=disable-bt` or `miniuart-bt` and /dev/ttyAMA0; on a Pi 4 also `dtoverlay=uart2` to "
        "`uart5`; on a Pi 5 `dtparam=uart0=on`.",
        "No job begins on this port, whatever is wired to it.",
    ),
    "BAUD_UNAVAILABLE": Hint(
        "The driver cannot make this baud rate.",
        "Choose another `baud`, for example 115200 or 57600.",
        "A job ends before anything is sent, at an unusual `baud`.",
    ),
    "LINE_UNAVAILABLE": Hint(
        "A control line (NRST, BOOT0, power) is not wired, or cannot be taken or driven.",
        "Check the name of the line in the configuration, who else holds it (`gpioinfo`), and group `gpio`.",
        "The target is `absent` although its port is there, or a job ends before its first reset.",
    ),
    "TARGET_BROKEN": Hint(
        "NRST or BOOT0 could not be brought back to idle after a session.",
        "Look at the wiring, then restart bridged or reload it to clear the mark.",
        "The target is `broken`, and every job for it is refused.",
    ),
    "LOADER": Hint("The ROM loader did not do what was asked.", "See the message."),
    "NO_SYNC": Hint(
        "The chip is not in its loader (BOOT0 not high at reset, or option bits ignore the pin), or TX/RX are swapped "
        "or on pins that this loader does not listen to, or it has no power.",
        "Measure BOOT0 and NRST at the chip during reset; compare the pins with those in the message, swap TX and RX; unplug "
        "the target's USB. On an L47x without a 32 kHz crystal the loader needs 2.6 s (`startup_s`).",
        "No byte comes back at all.",
    ),
    "SYNC_NOISE": Hint(
        "The loader measured a wrong baud rate (F7, F4, L4 and F2 do so now and then), or the line is noisy.",
        "It is tried again by itself after a reset and at a lower rate; if it stays so set `baud = 57600` and check "
        "ground and cable.",
        "Other bytes come back each time.",
    ),
    "APPLICATION_RUNNING": Hint(
        "The target resets but starts its application: it does not see BOOT0 high, or its option bits ignore the pin.",
        "Measure BOOT0 at the chip during reset. High and still ignored: option bytes (nSWBOOT0, nBOOT_SEL, BOOT_ADD) or the "
        "BOOT1 pin; see the activation pattern in the message.",
        "Text of the application comes where the loader should answer.",
    ),
    "LOOPBACK": Hint(
        "The byte that was sent came back: TX and RX are shorted, or the adapter is half-duplex with echo.",
        "Take the target off the cable: if the byte still comes back it is the cable or the adapter.",
        "Our own byte comes back.",
    ),
    "WRONG_PARITY": Hint(
        "Sync worked, then Get was refused: parity on the wire is not even.",
        "Use a port that can do 8E1: on a Raspberry Pi a PL011 and not the mini UART, else another adapter.",
        "Sync works, then everything is refused.",
    ),
    "NACK": Hint(
        "The loader refused: a byte was lost or flipped, the address is not allowed, or the command is protected.",
        "Try again; if it stays so lower the baud rate and check for lost bytes (bridges without buffering).",
        "A command is refused, at one address or now and then.",
    ),
    "NO_REPLY": Hint(
        "A byte was lost on the way, the target was reset or lost power, or it is still busy.",
        "Try again; check supply and watchdog of the target, lower the baud rate. `sudo bridged doctor` tells whether another "
        "program takes the answers.",
        "Sync works, then there is silence.",
    ),
    "GARBLED": Hint(
        "The answer was neither ACK nor NACK: noise, a wrong baud rate, or somebody else talks on the line.",
        "Try again; check that the application's UART pins are not shared and lower the baud rate.",
        "An answer is neither yes nor no.",
    ),
    "UNSTABLE_LINK": Hint(
        "The wire loses or changes bytes all the time: a loose contact, no common ground, noise, a rate at its limit.",
        "Check ground, cable and supply, set `baud = 57600` or less, and look at the retries in the log of the job. "
        "`sudo bridged doctor` tells whether another program takes some of the bytes.",
        "The job repeats command after command and gives up.",
    ),
    "ERASE_TIMEOUT": Hint(
        "The flash took longer than twice the worst case that is known, or the target lost power while erasing.",
        "Check the supply; worn flash erases slowly. The sector is erased again by the next job.",
        "Phase `erase` does not end (up to 4 s for a large sector of F4, F7 and H7, 32 s for a whole flash, are usual).",
    ),
    "NOT_ERASED": Hint(
        "The sector is write-protected (loaders skip such sectors and acknowledge), a cell is worn out, or the layout differs.",
        "`bridged option-bytes TARGET` shows write protection, `bridged unprotect TARGET --write` removes it; where none is "
        "set, state the `layout` of the target or replace the part.",
        "The erase was acknowledged, and the old bytes are still there.",
    ),
    "WRONG_SECTOR": Hint(
        "The flash is laid out differently than thought (dual bank, another part), or the chip swaps its banks.",
        "State the layout in the target's configuration (`layout = ...`); nothing but the named sector was erased.",
        "The first erase changed another sector than it should.",
    ),
    "SECOND_STAGE_FAILED": Hint(
        "The second-stage loader did not start on this part (its table was never tried on silicon), or the line is too bad.",
        "None is needed: the job goes on through the ROM loader. Please report the part and the message.",
        "A job takes longer than the one before, and its result says `second_stage=given up`.",
    ),
    "XMODEM_FAILED": Hint(
        "The target's bootloader is not waiting for XMODEM (`xmodem.enter`, `xmodem.begin`, rate), or the line loses bytes.",
        "See in `bridged trace` what it said; try `sx` on the console. An image that was begun is incomplete: run it again.",
        "A transfer by XMODEM does not begin, or stops.",
    ),
    "XMODEM_UNCONFIRMED": Hint(
        "The bootloader refused the image behind its last block (signature, size), or `xmodem.success` expects other words.",
        "The message has what it said. Correct `xmodem.success`, or the image.",
        "All blocks were taken by XMODEM, and the job fails all the same.",
    ),
    "NOT_SAFE_TO_STOP": Hint(
        "The application did not say that it may be stopped (`application.interlock`, `lines.safe`), so it was not reset.",
        "Bring the machine into a safe state and submit again; `force=interlock` overrides.",
        "The job is refused before the target was reset.",
    ),
    "UNHEALTHY": Hint(
        "The image was proven in flash as asked, but what it says is not what `application.health` expects.",
        "Read what it said in the message; where a last known good image exists it was restored (state rolled_back).",
        "The image is proven, and the job ends `rolled_back` or `failed`.",
    ),
    "SESSION_DIED": Hint(
        "The session process was killed or crashed.",
        "The target was released after its hazard time; look for the out-of-memory killer in the kernel log.",
        "A job fails from one moment to the next, without a word of the target.",
    ),
    "DEADLINE_EXCEEDED": Hint(
        "The session ran longer than its plan allows and was ended.",
        "Look at the trace of the job: which command had no end?",
        "A job is ended by the gateway after a long time.",
    ),
    "CHIP": Hint("The chip cannot do what was asked.", "See the message."),
    "UNKNOWN_CHIP": Hint(
        "The product id is in no table of this version.",
        "Check the message for the id; `READ` works, flashing needs a chip that is known.",
        "The loader answers, and its product id is known to nobody.",
    ),
    "WRONG_CHIP": Hint(
        "Another chip than configured answered: a swapped board or cable.",
        "Correct the wiring or the `chip` of the target; nothing was changed.",
        "Another chip than configured answers.",
    ),
    "READ_PROTECTED": Hint(
        "Readout protection is on (H5: product state), so the loader refuses everything but Get, Get Version, Get ID.",
        "Removing it erases the whole flash; it is never done unless a job says so (`UNPROTECT`, or `unprotect=1` of a FLASH).",
        "The chip is identified, and nothing can be read.",
    ),
    "PROTECTION_UNCHANGED": Hint(
        "The loader acknowledged and the part did not do it, or a byte was lost each time; parts whose option bytes come into "
        "force at power-on only need a power cycle.",
        "Cycle the power and look again (`OPTION-BYTES`, `DOCTOR`); the message says what was read.",
        "Protection was set or removed, and the next look shows the old one.",
    ),
    "OPTION_BYTES_DIFFER": Hint(
        "The loader of this part writes fewer option bytes than the block has, or a reset of the target cut the write off.",
        "Compare before and after in the result of the job; nothing that is never to be written was sent.",
        "Option bytes were written, and read back otherwise.",
    ),
    "OPTION_BYTES_LOST": Hint(
        "The target lost its power or was reset from outside while its option bytes were written: erased ones mean readout "
        "protection.",
        "`UNPROTECT` with `force=erase-everything` makes it usable again; then flash it and set its option bytes anew.",
        "The part is suddenly protected after its option bytes were written.",
    ),
    "UNSUPPORTED": Hint(
        "This loader or chip has no such function.",
        "See the message for what it has.",
        "The job is refused: this loader or chip cannot do it.",
    ),
    "LAYOUT_UNKNOWN": Hint(
        "The sector layout depends on option bits that could not be read, or the source for this part is unsure.",
        "State it: `layout = ...` in the target's configuration; the message lists the names.",
        "The chip is known, and the job is refused because of its layout.",
    ),
    "ENTRY_WOULD_BE_LOST": Hint(
        "The loader was entered by a way that will not exist once the application is erased.",
        "Wire NRST and BOOT0, correct the option bits named in the message, or say `entry=one-shot` with somebody "
        "at the board.",
        "The job is refused before the erase: nobody could enter the loader again afterwards.",
    ),
    "OUTSIDE_UNREADABLE": Hint(
        "A sector that must be erased holds bytes outside the image, and they cannot be read to be kept.",
        "Add `outside=discard` if they may be lost.",
        "The job is refused before the erase: a sector holds more than the image.",
    ),
    "VERIFY_MISMATCH": Hint(
        "The flash differs from the image. In a verify: another firmware is in there. After a write: write protection, a worn "
        "cell, swapped banks.",
        "In a verify: flash it, or compare with the image that should be there (INFO names the last one that was proven). "
        "After a write: the message names the first address, and from the start of a sector on it is write protection. Try "
        "again once.",
        "What is in flash is not what was written, or not what was expected.",
    ),
    "JOB": Hint("The job cannot be done.", "See the message."),
    "UNKNOWN_JOB": Hint("No job has this id; old ones are removed after a while.", "List them with JOBS."),
    "UNKNOWN_TRACE": Hint(
        "Recordings are kept of jobs that failed or were given `trace=1`, and only the last few (`store.traces`).",
        "Repeat the job with `trace=1`.",
    ),
    "UNKNOWN_TARGET": Hint("No target has this name.", "List them with TARGETS."),
    "TARGET_BUSY": Hint(
        "Somebody else holds the target.",
        "The message says who; wait, or ask them.",
        "A console or a lock is refused; somebody has the target.",
    ),
    "NOT_CANCELLABLE": Hint(
        "Between the first erase and the proof a cancel would leave the target without firmware.",
        "Wait for the end, or say `force` if that is what you want.",
    ),
    "CANCELED": Hint("Somebody canceled the job.", "Submit it again when it is wanted."),
    "STOPPED": Hint("The daemon was stopped.", "The job goes on by itself at the next start."),
    "QUEUE_FULL": Hint("Too many jobs wait.", "Try again later, or raise `jobs.queue_limit`."),
    "STORAGE": Hint(
        "Another program, `sqlite3` for one, keeps the journal locked.",
        "End that program. It is tried again by itself; no destructive step is started meanwhile.",
        "Jobs wait, or do not end, while the disk has room.",
    ),
    "STORAGE_FULL": Hint(
        "The disk or a quota is full.",
        "Make room on that disk, or raise `store.limit_mib`; images that nothing needs go by themselves. No destructive step "
        "is started meanwhile.",
        "Uploads and jobs are refused; or one stays in its last phase, with `reason=STORAGE_FULL`.",
    ),
    "STORAGE_FAILED": Hint(
        "The disk failed or became read-only (an SD card at its end does this), or the daemon may not write there.",
        "A directory that the message calls missing or forbidden has to exist and belong to the daemon's user "
        "(`gateway.state_dir`); else look at the kernel log, replace the card. No destructive step is started "
        "meanwhile; the end of a job that was running is told when it can be written, or the job goes on at the next start.",
        "Uploads and jobs are refused; or one stays in its last phase, with `reason=STORAGE_FAILED`.",
    ),
    "JOURNAL": Hint(
        "The journal cannot be used.",
        "See the message; a journal of a newer version needs the newer bridged and is left as it is. A damaged one: "
        "put `state.db` of a back-up there, or move it and `state.db-*` aside; then jobs, records and bytes kept for an "
        "interrupted flash are gone, so flash anew what was running. Images stay.",
        "The daemon does not start, and its configuration has no mistake.",
    ),
    "ID_CONFLICT": Hint(
        "This id was used before for a different request.",
        "Use a new id for a new request; the same one finds the job.",
    ),
    "REQUEST": Hint("The request cannot be served.", "See the message."),
    "BAD_REQUEST": Hint(
        "An argument is missing, unknown or out of range.",
        "The message says what is wrong; `HELP VERB` shows what is expected, on the command line `--help` behind the command.",
    ),
    "UNKNOWN_VERB": Hint("There is no such verb.", "`HELP` lists the verbs."),
    "FOREIGN_PROTOCOL": Hint(
        "A browser, a TLS client or another program was pointed at the port of the line protocol.",
        "Speak to it with `bridged` or `nc`; metrics are on a port of their own (7102).",
        "A browser or another program gets one line and is closed.",
    ),
    "NOT_ALLOWED": Hint(
        "A right is missing, or policy forbids this.",
        "The message says which scope, target or rule. Root on the gateway has every scope over the Unix socket "
        "(`sudo bridged …`); elsewhere a token has what it was made with (`bridged token add`).",
        "The gateway answers, and refuses what is asked for.",
    ),
    "SIGNATURE": Hint(
        "The image is not signed, was changed after it was signed, or the key is not one that this gateway trusts.",
        "Sign the very file that is sent (`minisign -S -m FILE`) and give its signature (`sig=`, `--sig`); trusted keys are in "
        "`signing.keys`.",
    ),
    "POLICY": Hint(
        "The policy of this target (`targets.NAME.policy`) does not allow this image.",
        "The message names the rule; sign an image that meets it, or change the policy on the gateway.",
    ),
    "CONSENT_MISSING": Hint(
        "The job would destroy, or reset, more than it says.", "Say it in the words of the message if that is what you want."
    ),
    "LOGIN_FIRST": Hint(
        "Beyond loopback and the Unix socket nothing is answered without a token or a client certificate.",
        "Make a token on the gateway (`bridged token add NAME --scope flash`) and give it to the client: `AUTH TOKEN`, "
        "BRIDGED_TOKEN_FILE, or `token_file` in its configuration.",
        "From elsewhere the gateway answers, and every command is refused.",
    ),
    "BAD_TOKEN": Hint(
        "The token was mistyped, revoked or has expired.",
        "`bridged token list` on the gateway shows which there are; each further wrong one makes this address wait longer.",
        "A token is refused, and each try takes longer.",
    ),
    "UNKNOWN_CREDENTIAL": Hint("No token or certificate has this name.", "`bridged token list` shows which there are."),
    "UNKNOWN_PATH": Hint(
        "There is nothing at this path, or nothing with this method.", "`/v1/openapi.json` lists what there is."
    ),
    "CHANGED": Hint(
        "Something happened to the target since you looked at it, and the request says that this matters (`If-Match`).",
        "Look at it again, and send the request with its new ETag if you still want it.",
    ),
    "FOREIGN_ORIGIN": Hint(
        "A web page from elsewhere made a browser ask, or bridged was addressed by a name that it does not know.",
        "Open the page of bridged itself; where it has a name of its own add that to `api.hosts`.",
        "The web page says that it may not ask.",
    ),
    "TOO_LARGE": Hint("The request exceeds a limit.", "The message names the limit."),
    "TOO_MANY": Hint(
        "Too many connections or requests at once.",
        "Wait and try again.",
        "A connection is closed as soon as it is made.",
    ),
    "DAEMON_UNREACHABLE": Hint(
        "No bridged daemon answers there.",
        "Start it (`systemctl start bridged`), or say where it is (`--gateway`, BRIDGED_GATEWAY).",
        "`bridged` finds no gateway.",
    ),
    "FLEET": Hint("The broker of the fleet answered with an error.", "See the message."),
    "FLEET_UNREACHABLE": Hint(
        "No server of the broker answers: no network, the wrong address or port, or it is electing a leader (seconds).",
        "Nothing is lost: it is tried again by itself. If it stays, look at `fleet.servers`, `IPAddressAllow=` of the unit "
        "(docs/security.md), the firewall and the broker.",
        "The gateway is not seen by its fleet.",
    ),
    "FLEET_REFUSED": Hint(
        "The broker does not accept the credential, its certificate is not signed by a known CA, or a permission is missing.",
        "Compare with what `bridged fleet permissions` prints for this name, and with `[fleet]`; then reload the broker.",
        "The gateway is not seen by its fleet, and the broker is reached.",
    ),
    "FLEET_COMMAND": Hint(
        "A message of the fleet is malformed, of another version, or meant for another gateway.",
        "Bring the older side up to date; if it is meant for another gateway, somebody may be redirecting messages.",
    ),
    "FLEET_STALE": Hint(
        "The command is older than what this gateway remembers, so it may have been carried out already: streams of the broker "
        "were restored, or its consumer was made anew.",
        "Start a new roll-out for this target if the image is still wanted.",
    ),
    "FLEET_EXPIRED": Hint(
        "The gateway was off or offline, or its window stayed closed, until the time of the command was over.",
        "Start a new roll-out for the targets that expired, with a longer `--expires`.",
    ),
    "UNKNOWN_ARTIFACT": Hint(
        "The artifact was never put, or was removed from the object store.", "`bridged fleet artifact put FILE` first."
    ),
    "UNKNOWN_ROLLOUT": Hint("No roll-out has this name.", "`bridged fleet rollouts` lists them."),
    "ROLLOUT_CHANGED": Hint(
        "Somebody else changed the roll-out in the same moment.", "Look at it (`bridged fleet status`) and try again."
    ),
}


def _tree(cls: type[BridgedError]) -> list[type[BridgedError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _tree(sub))]


BY_CODE: dict[str, type[BridgedError]] = {cls.code: cls for cls in _tree(BridgedError)}
