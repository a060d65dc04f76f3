"""What each kind of job must have done when it says that it succeeded, whatever happened on the way; and how long it may take.

Used by the tests of faults and by ``make reliability``. Every job runs on a part that holds an older application, and must
leave an application running (P4), the loader where it was asked for, or blank flash where it was erased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bridged import config
from bridged.errors import BridgedError
from bridged.events import Planned
from bridged.images.model import Image
from bridged.sim.device import Mode
from bridged.sim.faults import Faults
from bridged.sim.virtual import Account
from bridged.target import lines
from bridged.target.process import ENTER_LIMIT_S
from bridged.target.request import Result, Wiring
from tests.target.bench import WIRED, Bench, make_image

PARTS: dict[str, dict[str, Any]] = {
    "0x410": {},
    "F407": {},
    "L476": {},
    "F756": {},
    "H743": {},
    "G071": {"options": {"nBOOT_SEL": 0}},
    "U575": {},
}
SIZE = 700
BASE = 0x08000000
READ_BYTES = 600

_POWER = config.Lines(kind="socket", socket="/nowhere", nrst="nrst", boot0="boot0", power="power")
_NO_NRST = config.Lines(kind="socket", socket="/nowhere", boot0="boot0", power="power")


def wiring_of(settings: config.Lines) -> Wiring:
    driven = lines.wired(settings)
    return Wiring(
        has_reset=lines.Line.RESET in driven,
        has_boot0=lines.Line.BOOT0 in driven,
        has_power=lines.Line.POWER in driven,
        enter=lines.default_enter(settings),
        leave=lines.default_leave(settings),
    )


POWERED = wiring_of(_POWER)
POWER_ONLY = wiring_of(_NO_NRST)  # A supply that can be switched, and no NRST.


@dataclass(frozen=True)
class Kind:
    """``image``: which of the bench's two it takes. ``did``: whether it did what its success says, judged by the device and not
    by what the session read. ``leaves``: what runs afterwards."""

    kind: str
    did: Callable[[Bench, Result], bool]
    image: str = ""
    request: dict[str, Any] = field(default_factory=dict)
    leaves: Mode | None = Mode.APPLICATION


def old(bench: Bench) -> Image:
    return make_image(bench.chip, SIZE, seed=5)


def new(bench: Bench) -> Image:
    return make_image(bench.chip, SIZE)


def _identified(bench: Bench, result: Result) -> bool:
    memory = bench.device.memory
    right = result.uid in ("", memory.uid.hex()) and result.flash_bytes in (0, memory.map.size_bytes)  # Or not known at all.
    return right and result.pid == bench.chip.pid and bench.holds(old(bench))


def _sector_blank(bench: Bench, result: Result) -> bool:
    first = bench.device.memory.map.sectors[0]
    return result.evidence == "full" and bench.device.memory.blank(first.address, first.end)


def _examined(bench: Bench, result: Result) -> bool:
    levels = {finding["level"] for finding in result.findings}
    return bool(levels) and "problem" not in levels and bench.holds(old(bench))


KINDS: dict[str, Kind] = {
    "flash": Kind(
        "flash", lambda b, r: r.evidence == "full" and r.changed and b.holds(new(b)), "new", {"discard_outside": True}
    ),
    "flash and keep": Kind("flash", lambda b, r: r.evidence == "full" and b.holds(new(b)), "new"),
    "ensure, another image there": Kind("ensure", lambda b, r: r.evidence == "full" and b.holds(new(b)), "new"),
    "ensure, there already": Kind(
        "ensure", lambda b, r: r.evidence == "full" and b.holds(old(b)), "old", {"discard_outside": True}
    ),
    "verify": Kind("verify", lambda b, r: r.evidence == "full" and b.holds(old(b)), "old"),
    "read": Kind("read", lambda b, r: r.data == old(b).read(BASE, READ_BYTES), "", {"address": BASE, "length": READ_BYTES}),
    "erase": Kind("erase", _sector_blank, "", {"address": BASE}, leaves=None),
    "identify": Kind("identify", _identified),
    "reset": Kind("reset", lambda b, _: b.holds(old(b))),
    "reset into the loader": Kind("reset", lambda b, _: b.holds(old(b)), "", {"stay_in_loader": True}, leaves=Mode.LOADER),
    "doctor": Kind("doctor", _examined),
}


def bench_of(part: str, faults: list[str]) -> Bench:
    """A part with the older application in flash; positions of ``faults`` count from the first byte of the job."""
    bench = Bench(part, {**PARTS[part], "rate_error": 0.0})
    bench.put(old(bench))
    bench.device.faults = Faults(faults)
    return bench


def run_kind(bench: Bench, name: str, wiring: Wiring = WIRED, **request: Any) -> Result:
    """One job. Raises what it raises."""
    kind = KINDS[name]
    image = {"old": old, "new": new}[kind.image](bench) if kind.image else None
    asked = {"wiring": wiring, "listen_s": 0.2, **kind.request, **request}
    if name == "erase":
        asked["length"] = bench.device.memory.map.sectors[0].size_bytes
    return bench.run(kind.kind, image, **asked)


def judge(bench: Bench, name: str, result: Result | None, error: BridgedError | None = None) -> str:
    """What is wrong with how a job ended: a false success, a target that was not released, a stated bound that was not kept."""
    kind = KINDS[name]
    if result is not None and not kind.did(bench, result):
        return "a false success"
    lines_now = bench.device.lines
    if lines_now["boot0"] or not lines_now["nrst"]:
        return f"lines not idle: {lines_now}"
    mode = bench.device.mode
    if result is not None and kind.leaves is not None and mode is not kind.leaves:
        return f"left in mode {mode.value} ({bench.device.why})"
    if error is not None and (error.code == "INTERNAL" or not error.message or not error.hint.remedy):
        return f"an error that says nothing: {error.code} {error.message!r}"
    return overtime(bench)


def overtime(bench: Bench) -> str:
    return beyond(bench.account, bench.started_s)


def beyond(account: Account, started_s: float) -> str:
    """How far a session went beyond the times that it stated: until its plan, and from there to its end. Empty: not at all."""
    ended = account.total_s
    planned = [(when / 1e9 - started_s, event.limit_s) for when, event in account.events if isinstance(event, Planned)]
    first = planned[0][0] if planned else ended
    if first > ENTER_LIMIT_S:
        return f"{first:.1f} s until the plan, at most {ENTER_LIMIT_S:g} are allowed"
    if planned and ended - planned[-1][0] > planned[-1][1]:
        return f"{ended - planned[-1][0]:.1f} s since the plan, which states {planned[-1][1]:.1f}"
    return ""


def traffic_of(part: str, name: str, wiring: Wiring = WIRED) -> tuple[int, int]:
    """Bytes to the target and from it in an undisturbed job."""
    bench = bench_of(part, [])
    before = bench.device.stats.bytes_in, bench.device.stats.bytes_out
    run_kind(bench, name, wiring)
    return bench.device.stats.bytes_in - before[0], bench.device.stats.bytes_out - before[1]
