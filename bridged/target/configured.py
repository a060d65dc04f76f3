"""From the configuration of a target to what its session is told: the wiring, and the request of one job."""

from __future__ import annotations

import hashlib
from typing import Any

from bridged import chips, config
from bridged.chips.model import Range
from bridged.config.values import parse_range
from bridged.events import SectorProven
from bridged.images.model import Span
from bridged.protocol.flow import SetLines
from bridged.protocol.xmodem import How
from bridged.target import lines as wires
from bridged.target.expect import Conversation
from bridged.target.request import NO_PAST, Past, Receiver, Request, Wiring
from bridged.target.speed import likely_baud
from bridged.target.wishes import wishes_of


def request_of(
    settings: config.Target,
    lines: wires.Lines,
    kind: str,
    params: dict[str, Any],
    proven: tuple[SectorProven, ...] = (),
    spans: tuple[Span, ...] = (),
    past: Past = NO_PAST,
) -> Request:
    """What a session is asked: the job and what is configured, as plain data. Raises ``BadRequest``, ``UnknownChip``."""
    if settings.chip:
        chips.find(settings.chip)  # A wrong name fails here, before anything moves.
    return Request(
        kind=kind,
        wiring=wiring_of(settings.lines, lines),
        chip=settings.chip,
        baud=settings.baud,
        bauds=tuple(settings.bauds),
        supply_v=settings.supply_v,
        flash_bytes=settings.flash_kib * 1024,
        layout=settings.layout,
        startup_s=settings.startup_s,
        application_baud=settings.application.baud,
        application_parity=settings.application.parity,
        listen_s=settings.application.listen_s,
        enter_by=settings.application.enter.encode("latin-1"),
        interlock=_conversation(settings.application.interlock, line="safe" if settings.lines.safe else ""),
        health=_conversation(
            settings.application.health, settings.application.crash_loop_s, "alive" if settings.lines.alive else ""
        ),
        discard_outside=params.get("outside") == "discard",
        one_shot=params.get("entry") == "one-shot",
        stay_in_loader=params.get("mode") == "boot",
        force=frozenset(str(params.get("force") or "").split(",")) - {""},
        address=int(params.get("address") or 0),
        length=int(params.get("length") or 0),
        proven=proven,
        spans=spans,
        protect=tuple(Range(*parse_range(text)) for text in settings.protect),
        past=past,
        wishes=wishes_of(kind, params),
        evidence=str(params.get("evidence") or "full"),
        second_stage=settings.stub,
        second_stage_baud=settings.stub_baud,
        configured=_fingerprint(settings),
        receiver=_receiver(settings.xmodem),
    )


def likely_baud_of(settings: config.Target, past: Past, pid: int) -> int:
    """The rate that a session will probably use, for an estimate. ``pid``: of the part that answered last, 0 for none."""
    driven = wires.wired(settings.lines)
    wiring = Wiring(has_reset=wires.Line.RESET in driven, has_power=wires.Line.POWER in driven)
    asked = Request("flash", wiring, settings.chip, settings.baud, bauds=tuple(settings.bauds), past=past)
    return likely_baud(asked, chips.find(settings.chip) if settings.chip else chips.CHIPS.get(pid))


def _fingerprint(settings: config.Target) -> str:
    """Another one for any change in this target's configuration."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:16]


def wiring_of(settings: config.Lines, lines: wires.Lines) -> Wiring:
    """What is wired, as far as the open ``lines`` know, and how the loader is entered and left."""
    enter = wires.parse_sequence(settings.enter, settings) if settings.enter else wires.default_enter(settings)
    leave = wires.parse_sequence(settings.leave, settings) if settings.leave else wires.default_leave(settings)
    if lines.has_power and not any(isinstance(step, SetLines) and step.power for step in leave):
        leave = (SetLines(power=True), *leave)  # A session may have ended while it had switched the supply off.
    return Wiring(
        has_reset=lines.has_reset,
        has_boot0=lines.has_boot0 and not lines.boot0_by_hand,
        has_power=lines.has_power,
        boot0_by_hand=lines.boot0_by_hand,
        enter=enter,
        leave=leave,
    )


def _conversation(settings: config.Talk, quiet_s: float = 0.0, line: str = "") -> Conversation:
    return Conversation(settings.send.encode("latin-1"), settings.expect, settings.within_s, quiet_s, line)


def _receiver(settings: config.Xmodem) -> Receiver:
    return Receiver(
        settings.reset,
        settings.reset_after,
        settings.baud,
        _conversation(settings.enter),
        _conversation(settings.begin),
        _conversation(settings.success),
        How(settings.block, settings.check, settings.pad, settings.start_s, settings.answer_s, settings.tries),
    )
