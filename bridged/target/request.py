"""What a session is told and what it tells: plain data, JSON-ready, shared by the daemon and the session process."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from bridged.chips.model import Range
from bridged.events import Phase, SectorProven
from bridged.images.model import Span
from bridged.protocol.flow import Pause, SetLines
from bridged.protocol.xmodem import How
from bridged.target.expect import Conversation
from bridged.target.wishes import Wishes

Sequence = tuple[SetLines | Pause, ...]


@dataclass(frozen=True, slots=True)
class Wiring:
    """Which lines can be driven, and the sequences into the loader and into the application (levels are logical).

    ``boot0_by_hand``: a person or a jumper holds BOOT0 high.
    """

    has_reset: bool = False
    has_boot0: bool = False
    has_power: bool = False
    boot0_by_hand: bool = False
    enter: Sequence = ()
    leave: Sequence = ()

    @property
    def can_restart(self) -> bool:
        """Whether the way out of the loader restarts the chip: by NRST, or by its power."""
        return any(isinstance(step, SetLines) and (step.reset or step.power is False) for step in self.leave)


@dataclass(frozen=True, slots=True)
class Receiver:
    """A bootloader of the target's own, for jobs of kind xmodem. ``enter``: what keeps it from going on; ``begin``: what makes
    it receive; ``success``: what says that the image is there. ``baud`` 0: that of the application."""

    reset: bool = True
    reset_after: bool = True
    baud: int = 0
    enter: Conversation = Conversation()
    begin: Conversation = Conversation()
    success: Conversation = Conversation()
    how: How = How()


@dataclass(frozen=True, slots=True)
class Tried:
    """How the second-stage loader ended here last: ``failures`` sessions in a row, the last ``age_s`` ago and for ``why``.

    ``key``: of the loader's build, this target's configuration, the chip and its ROM loader; where one of them is another
    now, it says nothing.
    """

    key: str = ""
    failures: int = 0
    age_s: float = 0.0
    why: str = ""

    @property
    def enough(self) -> bool:
        """Whether it is no longer tried; a single failure may have been an accident."""
        return self.failures >= 2


@dataclass(frozen=True, slots=True)
class Past:
    """What the journal remembers of this target. ``uid``: of the chip that it is about, hex; another chip has no past.

    ``content``: what was last proven in it, ``age_s`` ago; empty while nobody knows.

    ``settled``: nothing of its flash was erased by us and not proven since; False too where all of it shall be written.

    ``good_bauds`` and ``bad_bauds``: rates that carried a whole session, and rates that failed not long ago. ``sectors``: what
    was last proven in its flash; never taken for granted, only looked at first. ``flash_bytes``, ``layout``: as it was last
    identified, for a look ahead where protection lets nobody ask. ``second_stage``: see ``Tried``.
    """

    uid: str = ""
    content: str = ""
    age_s: float = 0.0
    good_bauds: tuple[int, ...] = ()
    bad_bauds: tuple[int, ...] = ()
    sectors: tuple[SectorProven, ...] = ()
    flash_bytes: int = 0
    layout: str = ""
    settled: bool = True
    second_stage: Tried = Tried()


NO_PAST = Past()


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that a session is told, besides the image. JSON-ready by ``to_dict`` and ``from_dict``.

    ``kind``: flash, ensure, verify, read, erase, identify, reset, doctor, option-bytes, protect, unprotect or xmodem.
    ``chip``: as configured, empty for any.
    ``baud`` 0: what the chip prefers, else 115200; ``bauds``: higher ones that may be tried. ``supply_v``: lowest supply of the
    target in volts, 0 unknown. ``address`` and ``length``: for read and erase; erase with length 0 means
    everything.
    ``enter_by``: what makes the application jump into the loader. ``interlock`` and ``health``: see ``expect``.
    ``force``: names of checks that the job overrides. ``proven``: sectors that an interrupted run of this job proved.
    ``spans``: where each of several images lies that were combined; empty for one image, which needs no telling apart.
    ``protect``: no sector that overlaps one of these may be erased. ``wishes``: about readout and write protection and option
    bytes. ``evidence``: full or sample, what an ensure is content with. ``past``: see ``Past``. ``second_stage``: auto or off;
    ``second_stage_baud``: the highest rate that is tried with it. ``configured``: a fingerprint of all that is configured for
    this target, for what is remembered only as long as nobody changes it. ``receiver``: see ``Receiver``.
    """

    kind: str
    wiring: Wiring = Wiring()
    chip: str = ""
    baud: int = 0
    bauds: tuple[int, ...] = ()
    supply_v: float = 0.0
    flash_bytes: int = 0
    layout: str = ""
    startup_s: float = 0.0
    application_baud: int = 115200
    application_parity: str = "N"
    listen_s: float = 1.0
    enter_by: bytes = b""
    interlock: Conversation = Conversation()
    health: Conversation = Conversation()
    discard_outside: bool = False
    one_shot: bool = False
    stay_in_loader: bool = False
    force: frozenset[str] = frozenset()
    address: int = 0
    length: int = 0
    proven: tuple[SectorProven, ...] = ()
    spans: tuple[Span, ...] = ()
    protect: tuple[Range, ...] = ()
    past: Past = Past()
    wishes: Wishes = Wishes()
    evidence: str = "full"
    second_stage: str = "off"
    second_stage_baud: int = 921600
    configured: str = ""
    receiver: Receiver = Receiver()

    @property
    def after_s(self) -> float:
        """How long the application may be listened to at the end: at its first start and at one more (Go, or the probe)."""
        return 2 * self.listen_s + bool(self.health) * 2 * (self.health.within_s + self.health.quiet_s)

    @property
    def by_application(self) -> bool:
        """Whether nothing but the application leads into the loader: once it is erased, a reset would lose the target (P10)."""
        return bool(self.enter_by) and not (self.wiring.has_boot0 or self.wiring.boot0_by_hand)

    def to_dict(self) -> dict[str, Any]:
        special = (
            "wiring",
            "force",
            "proven",
            "spans",
            "protect",
            "enter_by",
            "interlock",
            "health",
            "bauds",
            "past",
            "wishes",
            "receiver",
        )
        flat = {f: getattr(self, f) for f in self.__slots__ if f not in special}
        flat["enter_by"] = self.enter_by.decode("latin-1")
        flat["interlock"], flat["health"] = _talk_to_list(self.interlock), _talk_to_list(self.health)
        flat["wishes"] = self.wishes.to_list()
        wiring = {f: getattr(self.wiring, f) for f in Wiring.__slots__ if f not in ("enter", "leave")}
        wiring["enter"] = [_step_to_list(s) for s in self.wiring.enter]
        wiring["leave"] = [_step_to_list(s) for s in self.wiring.leave]
        proven = [[p.address, p.size_bytes, p.digest] for p in self.proven]
        spans = [[s.name, s.start, s.end] for s in self.spans]
        protect = [[r.start, r.end] for r in self.protect]
        flat |= {"wiring": wiring, "force": sorted(self.force), "proven": proven, "spans": spans, "protect": protect}
        return {
            **flat,
            "bauds": list(self.bauds),
            "past": _past_to_list(self.past),
            "receiver": _receiver_to_list(self.receiver),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Request:
        flat = dict(data)
        wiring = dict(flat.pop("wiring"))
        wiring["enter"] = tuple(_step_from_list(s) for s in wiring["enter"])
        wiring["leave"] = tuple(_step_from_list(s) for s in wiring["leave"])
        flat["enter_by"] = flat["enter_by"].encode("latin-1")
        flat["interlock"], flat["health"] = _talk_from_list(flat["interlock"]), _talk_from_list(flat["health"])
        flat["wishes"] = Wishes.from_list(flat["wishes"])
        flat["force"] = frozenset(flat["force"])
        flat["proven"] = tuple(SectorProven(*p) for p in flat["proven"])
        flat["spans"] = tuple(Span(*s) for s in flat["spans"])
        flat["protect"] = tuple(Range(*r) for r in flat["protect"])
        flat["bauds"], flat["past"] = tuple(flat["bauds"]), _past_from_list(flat["past"])
        flat["receiver"] = _receiver_from_list(flat["receiver"])
        return cls(wiring=Wiring(**wiring), **flat)


def _past_to_list(past: Past) -> list[Any]:
    sectors = [[s.address, s.size_bytes, s.digest] for s in past.sectors]
    rates = list(past.good_bauds), list(past.bad_bauds)
    tried = [getattr(past.second_stage, name) for name in Tried.__slots__]
    return [past.uid, past.content, past.age_s, *rates, sectors, past.flash_bytes, past.layout, past.settled, tried]


def _past_from_list(data: list[Any]) -> Past:
    uid, content, age_s, good, bad, sectors, flash_bytes, layout, settled, tried = data
    proven = tuple(SectorProven(*s) for s in sectors)
    return Past(uid, content, age_s, tuple(good), tuple(bad), proven, flash_bytes, layout, settled, Tried(*tried))


def _receiver_to_list(receiver: Receiver) -> list[Any]:
    talks = [_talk_to_list(talk) for talk in (receiver.enter, receiver.begin, receiver.success)]
    how = [getattr(receiver.how, name) for name in How.__slots__]
    return [receiver.reset, receiver.reset_after, receiver.baud, *talks, how]


def _receiver_from_list(data: list[Any]) -> Receiver:
    reset, reset_after, baud, enter, begin, success, how = data
    talks = _talk_from_list(enter), _talk_from_list(begin), _talk_from_list(success)
    return Receiver(reset, reset_after, baud, *talks, How(*how))


def _talk_to_list(talk: Conversation) -> list[Any]:
    return [talk.send.decode("latin-1"), talk.expect, talk.within_s, talk.quiet_s, talk.line]


def _talk_from_list(data: list[Any]) -> Conversation:
    return Conversation(data[0].encode("latin-1"), data[1], data[2], data[3], data[4])


def _step_to_list(step: SetLines | Pause) -> list[Any]:
    return ["pause", step.seconds] if isinstance(step, Pause) else ["lines", step.reset, step.boot0, step.power]


def _step_from_list(data: list[Any]) -> SetLines | Pause:
    return Pause(data[1]) if data[0] == "pause" else SetLines(data[1], data[2], data[3])


class Boot(StrEnum):
    """How the target was left: ``boot`` of a job's result.

    ``GO``: jumped into from the loader, because a reset would have led there again. ``NEEDS_POWER_CYCLE``: the image is proven,
    and only somebody who switches the supply off and on can start it. ``NEEDS_RESET``: it stays in its loader, for nothing is
    wired that could reset it. ``EMPTY``: flash holds nothing that could be started.
    """

    RESET = "reset"
    POWER_CYCLE = "power_cycle"
    GO = "go"
    NEEDS_POWER_CYCLE = "needs_power_cycle"
    NEEDS_RESET = "needs_reset"
    IN_LOADER = "in_loader"
    EMPTY = "empty"

    @property
    def started(self) -> bool:
        """Whether an application may be expected to speak."""
        return self in (Boot.RESET, Boot.POWER_CYCLE, Boot.GO)


@dataclass(slots=True)
class PhaseCost:
    """What one phase took. ``wire_bytes``: bytes that AN3155 needs for it, both directions, at 11 bit times each."""

    seconds: float = 0.0
    payload_bytes: int = 0
    wire_bytes: int = 0


@dataclass(slots=True)
class Result:
    """What a session did; filled in as it goes, so that a failed one can tell how far it came.

    ``evidence``: ``full`` when every byte of the content was compared, ``record`` when only the record could be asked,
    ``receiver`` when the target's own bootloader said so.
    ``was_empty``: the flash held no vectors before this job. ``changed``: something was erased or changed, perhaps by an
    earlier run of the same job. ``health``: ``passed`` when the application answered the health probe, ``failed`` when one that
    was not changed did not. ``boot``: how it was left, None before the end. ``baud``: the last rate that was used;
    ``bad_bauds``: those that failed before. ``bytes_checksummed``: those of ``bytes_compared`` that a checksum proved which the
    target computed. ``supply_range``: the voltage range that the loader was told, 0 for none. ``data``: for kind read.
    ``proof``: by what it was proven: ``read-back``, ``checksum`` (the ROM loader's own, as far as it goes) or ``crc-on-target``
    (computed by the second-stage loader). ``second_stage``: ``used``, at ``second_stage_baud``, or why it was not; empty where
    nobody asked for it. ``second_stage_key``: as in ``Tried``, for who remembers it.
    ``options``: option bytes ``before`` and ``after``, as ``chips.options.Decoded.to_dict`` shows them. ``protected``: readout
    protection is on. ``age_s``: of the record, where that is the evidence.
    """

    kind: str
    changed: bool = False
    evidence: str = ""
    content: str = ""
    pid: int = 0
    family: str = ""
    names: str = ""
    loader: str = ""
    loader_id: int | None = None
    uid: str = ""
    flash_bytes: int = 0
    layout: str = ""
    baud: int = 0
    bad_bauds: list[int] = field(default_factory=list)
    supply_range: int = 0
    sectors_erased: int = 0
    sectors_skipped: int = 0
    bytes_skipped: int = 0
    bytes_written: int = 0
    bytes_compared: int = 0
    bytes_checksummed: int = 0
    bytes_kept: int = 0
    seconds: float = 0.0
    banner: str = ""
    health: str = ""
    boot: Boot | None = None
    was_empty: bool = False
    phases: dict[str, PhaseCost] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    protected: bool = False
    age_s: float = 0.0
    proof: str = ""
    second_stage: str = ""
    second_stage_baud: int = 0
    second_stage_key: str = ""
    data: bytes = b""

    def fails_at(self, *bauds: int) -> None:
        """Rates that failed, each noted once."""
        self.bad_bauds += [baud for baud in bauds if baud not in self.bad_bauds]

    def cost(self, phase: Phase) -> PhaseCost:
        """What a phase took so far, to be added to."""
        return self.phases.setdefault(phase.value, PhaseCost())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without ``data``."""
        out = {f: getattr(self, f) for f in self.__slots__ if f not in ("data", "phases")}
        out["phases"] = {
            name: {"seconds": round(c.seconds, 6), "payload_bytes": c.payload_bytes, "wire_bytes": c.wire_bytes}
            for name, c in self.phases.items()
        }
        return out
