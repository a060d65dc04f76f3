"""A job of kind xmodem: an image by XMODEM to a bootloader that the target has in its own flash.

The ROM loader has no part in it. The bootloader is started by a reset, or is there already; it is talked to as the application
is (``expect``): what keeps it from going on, the command that makes it receive, the transfer, and at last the words by which it
says that the image is there and good. Without those words there is no success: an acknowledged block says nothing about flash.
They are the target's word all the same, and the evidence is called ``receiver``; nothing was read back (P3).

Whatever fails, the receiver is canceled (``protocol.xmodem``) and the target released by ``session.run``. Flows without I/O.
"""

from __future__ import annotations

from dataclasses import replace

from bridged.errors import BadRequest, ImageTooLarge, LineUnavailable, TransferFailed, TransferUnconfirmed
from bridged.events import Phase, Planned
from bridged.images.model import Image
from bridged.protocol import xmodem
from bridged.protocol.flow import Barrier, Checkpoint, Flow, Hazard, Now, Report, Send, SetFormat
from bridged.target.entry import boot, leave, listen, phase_started
from bridged.target.expect import Conversation, talk
from bridged.target.kept import NOTHING_KEPT
from bridged.target.request import PhaseCost, Receiver, Request, Result

LIMIT_BYTES = 16 << 20  # At 115200 baud this takes half an hour; what is larger has a hole in it.
SAID_CHARS = 200


def transfer(request: Request, image: Image, result: Result) -> Flow[None]:
    """Raises ``TransferFailed`` and ``TransferUnconfirmed``."""
    receiver = request.receiver
    if not receiver.success.expect:
        raise BadRequest("xmodem.success.expect is not configured: nothing would say whether the transfer went well")
    data = _bytes_of(image, receiver)
    baud = receiver.baud or request.application_baud
    seconds = len(data) * 10.5 / baud
    talking_s = receiver.enter.within_s + receiver.begin.within_s + receiver.how.start_s + receiver.success.within_s
    limit_s = 120 + talking_s + 10 * seconds + 2 * receiver.how.tries * receiver.how.answer_s
    yield Report(Planned(0, 0, len(data), 0, seconds, limit_s + 2 * request.listen_s + request.health.within_s))
    yield from phase_started(Phase.ACTIVATE)
    its_own = replace(request, application_baud=baud)
    if receiver.reset:
        if not request.wiring.can_restart:
            raise LineUnavailable(
                "the target is to be reset into its bootloader (xmodem.reset), and neither NRST nor power is wired", line="nrst"
            )
        yield from leave(its_own, running=True)
    yield SetFormat(baud, request.application_parity)
    yield Checkpoint()
    yield from _say(receiver.enter, "enter")
    yield Checkpoint()  # From here on it is said that the flash changes: the last moment at which nothing has happened.
    byte_s = (10 + (request.application_parity != "N")) / baud
    block_s = xmodem.FRAME_MOST_BYTES * byte_s + receiver.how.answer_s
    told_to_begin = bool(receiver.begin or receiver.begin.send)
    if told_to_begin:
        # Some bootloaders erase at that command, and ask for the first block only when they have: what they answer until then,
        # if anything, does not say whether the flash is at rest (P9).
        work_s = receiver.begin.within_s + receiver.how.start_s
        yield from _touch(image, result, max(work_s, block_s))
        yield Hazard(work_s)
        yield from _say(receiver.begin, "begin")
    yield from phase_started(Phase.SYNC)
    crc = yield from xmodem.invitation(receiver.how)
    if told_to_begin:
        yield Hazard(0)
    yield Checkpoint()
    if not told_to_begin:
        yield from _touch(image, result, block_s)
    yield from phase_started(Phase.WRITE, len(data))
    begun: float = yield Now()
    sent = yield from xmodem.send(data, receiver.how, crc=crc, byte_s=byte_s)
    ended: float = yield Now()
    result.bytes_written = len(data)
    result.phases[Phase.WRITE.value] = PhaseCost(ended - begun, len(data), len(data) + sent.padded + 6 * sent.blocks)
    yield from phase_started(Phase.VERIFY)
    heard = yield from talk(receiver.success)
    if not heard.good:
        raise TransferUnconfirmed(
            f"all {sent.blocks} blocks were acknowledged, and then {heard.lacks(receiver.success)} within "
            f"{receiver.success.within_s:g} s; {_said(heard.text)}",
            within_s=receiver.success.within_s,
        )
    yield Barrier("erased")
    result.evidence, result.proof = "receiver", "receiver"
    if receiver.reset_after and request.wiring.can_restart:
        yield from boot(request, result, running=True)
    else:
        yield from phase_started(Phase.BOOT)
        yield SetFormat(request.application_baud, request.application_parity)
        yield from listen(request, result)


def _touch(image: Image, result: Result, hazard_s: float) -> Flow[None]:
    """What comes next may erase the flash of the target."""
    yield Barrier("erasing", hazard_s, NOTHING_KEPT)
    result.changed, result.content = True, image.digest


def _bytes_of(image: Image, receiver: Receiver) -> bytes:
    """From the first byte to the last, holes filled with what also fills the last block."""
    if image.end - image.start > LIMIT_BYTES:
        raise ImageTooLarge(
            f"from first to last byte the image has {image.end - image.start} bytes, at most {LIMIT_BYTES} go by XMODEM",
            limit_bytes=LIMIT_BYTES,
        )
    return image.read(image.start, image.end - image.start, receiver.how.pad)


def _say(what: Conversation, stage: str) -> Flow[None]:
    if not what:
        if what.send:
            yield Send(what.send)
        return
    heard = yield from talk(what)
    if not heard.good:
        raise TransferFailed(
            f"xmodem.{stage}: {heard.lacks(what)} within {what.within_s:g} s; {_said(heard.text)}", stage=stage
        )


def _said(text: str) -> str:
    return f"it said {text[-SAID_CHARS:]!r}" if text else "it said nothing"
