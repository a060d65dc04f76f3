"""Roll-outs: what is next, given the plan, its state, what the gateways have reported, and the time. Pure: no I/O, no clock.

A roll-out is a fixed list of units (one target of one gateway, each in a wave), a ``Spec`` of what they shall get and when to
stop, and a small ``State`` that changes only by compare-and-set. Everything else follows from the reports, of which there is
one for each unit, its last. So any machine that can read these three continues where another one was killed, and two that run
at the same time decide the same, or one of them loses the compare-and-set.

Invariants, each with a property test (tests/fleet/test_rollout.py):

- A wave is released only after every unit of the waves before it has ended, or has been silent for ``wave_timeout_s``, and then
  for ``soak_s`` nothing else has gone wrong; and never while a threshold is exceeded.
- ``done`` and ``canceled`` never change; only what the silent have not begun may still be taken back from one that is done. A
  paused roll-out releases nothing.
- A unit is told once; again only in a later round, and only where the earlier command was taken back before it began.
- What is said follows from what is stored: said again, by whomever and whenever, it is the same byte for byte.

What has begun at a gateway is the gateway's to finish: to pause lets released waves come to their end; a threshold, and
``cancel``, also take back what has not begun.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from bridged.errors import BadRequest
from bridged.fleet.wire import Artifact, Cancel, Command, Report

MAX_WAVES = 100  # One a day for a quarter; a release time is stored for each.
FAILED = frozenset({"failed", "rolled_back", "rejected", "timed_out", "expired"})


class Phase(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    CANCELED = "canceled"


OVER = frozenset({Phase.DONE, Phase.CANCELED})
THRESHOLD = "threshold"


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    gateway: str
    target: str
    wave: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return self.gateway, self.target


@dataclass(frozen=True, slots=True)
class Spec:
    """``max_failures``: with more failures than these it stops; ``max_share``: with a larger share of failures among the units
    that have ended, from ``share_after`` of those on. ``None``: not asked. ``expires_s``: a command that has not begun so long
    after the release of its wave is not begun any more."""

    id: str
    artifact: Artifact | None
    kind: str = "ensure"
    options: Mapping[str, Any] = field(default_factory=dict)
    max_failures: int | None = 0
    max_share: float | None = None
    share_after: int = 10
    wave_timeout_s: float = 86400.0
    soak_s: float = 0.0
    expires_s: float = 30 * 86400.0


@dataclass(frozen=True, slots=True)
class State:
    """``wave``: the last one that was released, -1: none. ``released``: when, for each. ``settled``: since when the released
    waves are complete, 0: they are not. ``round``: how often what was taken back has been said again. ``retract``: what has not
    begun is taken back."""

    phase: Phase = Phase.RUNNING
    wave: int = -1
    released: tuple[float, ...] = ()
    settled: float = 0.0
    round: int = 0
    retract: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Tally:
    """Units by what became of them; ``silent``: released ones that have not ended in the time of their wave."""

    units: int
    released: int
    succeeded: int
    failed: int
    canceled: int
    running: int
    silent: int
    states: Mapping[str, int]

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.canceled


@dataclass(frozen=True, slots=True)
class Step:
    """``say`` and ``take_back`` are to be published once ``state`` is stored; to publish them again does no harm."""

    state: State
    tally: Tally
    say: tuple[Command, ...] = ()
    take_back: tuple[Cancel, ...] = ()


Reports = Mapping[tuple[str, str], Report]


def step(spec: Spec, units: Sequence[Unit], state: State, reports: Reports, now: float) -> Step:
    tally = count(spec, units, state, reports, now)
    state = _next(spec, units, state, reports, tally, now)
    tally = count(spec, units, state, reports, now)
    released = [unit for unit in units if unit.wave <= state.wave]
    say: tuple[Command, ...] = ()
    back: tuple[Cancel, ...] = ()
    if state.retract:
        back = tuple(
            Cancel(unit.gateway, spec.id, unit.target, state.round)
            for unit in released
            if not _ended(reports.get(unit.key), state.round)
        )
    elif state.phase not in OVER:
        say = tuple(_command(spec, unit, state) for unit in released if _to_say(reports.get(unit.key), state.round))
    return Step(state, tally, say, back)


def _to_say(found: Report | None, turn: int) -> bool:
    return found is None or (found.state == "canceled" and found.round < turn)


def _ended(found: Report | None, turn: int) -> bool:
    """Nothing of it can begin any more. Who was taken back and is told again has not ended by the end of the earlier round."""
    return found is not None and found.ended and not _to_say(found, turn)


def _command(spec: Spec, unit: Unit, state: State) -> Command:
    """The same whoever makes it, and whenever: only what is stored goes into it."""
    expires = state.released[unit.wave] + spec.expires_s if spec.expires_s else 0.0
    return Command(unit.gateway, spec.id, unit.target, state.round, spec.kind, spec.artifact, spec.options, expires)


def _next(spec: Spec, units: Sequence[Unit], state: State, reports: Reports, tally: Tally, now: float) -> State:
    if state.phase is not Phase.RUNNING:
        return state
    if text := exceeded(spec, tally):
        return replace(state, phase=Phase.PAUSED, reason=f"{THRESHOLD}: {text}", retract=True, settled=0.0)
    last = max((unit.wave for unit in units), default=-1)
    if state.wave >= 0 and not _complete(spec, units, state, reports, now):
        return replace(state, settled=0.0)
    if state.wave >= 0 and not state.settled:
        state = replace(state, settled=now)
    if state.wave >= 0 and state.wave < last and now < state.settled + spec.soak_s:
        return state
    if state.wave >= last:
        return replace(state, phase=Phase.DONE)
    return replace(state, wave=state.wave + 1, released=(*state.released, now), settled=0.0)


def _complete(spec: Spec, units: Sequence[Unit], state: State, reports: Reports, now: float) -> bool:
    """Every released unit has ended, or its wave's time is over. Canceled by somebody at the gateway is an end, too."""
    for unit in units:
        in_time = unit.wave <= state.wave and now < state.released[unit.wave] + spec.wave_timeout_s
        if in_time and not _ended(reports.get(unit.key), state.round):
            return False
    return True


def exceeded(spec: Spec, tally: Tally) -> str:
    """Which threshold, in words."""
    if spec.max_failures is not None and tally.failed > spec.max_failures:
        return f"{tally.failed} failed, at most {spec.max_failures} may"
    ended = tally.succeeded + tally.failed
    if spec.max_share is not None and ended >= max(1, spec.share_after) and tally.failed > spec.max_share * ended:
        return f"{tally.failed} of {ended} failed, at most {spec.max_share:.3g} of them may"
    return ""


def count(spec: Spec, units: Sequence[Unit], state: State, reports: Reports, now: float) -> Tally:
    states: Counter[str] = Counter()
    released = running = silent = 0
    for unit in units:
        if unit.wave > state.wave:
            continue
        released += 1
        found = reports.get(unit.key)
        ended = _ended(found, state.round)
        states[found.state if found and (ended or not found.ended) else "unheard"] += 1
        if not ended:
            late = now >= state.released[unit.wave] + spec.wave_timeout_s
            running, silent = running + (not late), silent + late
    failed = sum(states[name] for name in FAILED)
    return Tally(
        len(units), released, states["succeeded"], failed, states["canceled"], running, silent, dict(sorted(states.items()))
    )


# --- what a person decides --------------------------------------------------------------------------------------------


def pause(state: State) -> State:
    _not_over(state)
    return replace(state, phase=Phase.PAUSED, reason=state.reason or "by an operator")


def resume(spec: Spec, state: State, tally: Tally) -> State:
    """Raises ``BadRequest`` where a threshold is exceeded: the decision to go on belongs into the thresholds."""
    _not_over(state)
    if text := exceeded(spec, tally):
        raise BadRequest(
            f"roll-out {spec.id} stays paused: {text}; to go on all the same, allow more (--max-failures, --max-share)"
        )
    again = state.round + 1 if state.retract else state.round
    return replace(state, phase=Phase.RUNNING, reason="", retract=False, round=again, settled=0.0)


def cancel(state: State, tally: Tally) -> State:
    """May be repeated. One that is done stays so, for it is what those want who have it; the others are not to begin any more.
    Raises ``BadRequest`` where there are no others."""
    if state.phase is Phase.CANCELED or (state.phase is Phase.DONE and state.retract):
        return state
    if state.phase is Phase.DONE:
        if tally.ended == tally.units:
            raise BadRequest("the roll-out is done and every target has ended: nothing is left to take back")
        return replace(state, reason="what had not begun is taken back, by an operator", retract=True)
    return replace(state, phase=Phase.CANCELED, reason="by an operator", retract=True)


def _not_over(state: State) -> None:
    if state.phase in OVER:
        raise BadRequest(f"the roll-out is {state.phase}, which is its end")


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan(
    id: str, chosen: Sequence[tuple[str, str]], waves: Sequence[str], canary: Sequence[tuple[str, str]] = ()
) -> list[Unit]:
    """``waves``: how many units each has, ``5`` or ``10%`` of all; the rest is one more. ``canary``: units of a wave before.

    Who comes when is drawn by the roll-out's id: no site is first in every roll-out, nor all of it in one wave.
    """
    if len(waves) > MAX_WAVES:
        raise BadRequest(f"{len(waves)} waves; at most {MAX_WAVES}")
    first = sorted(set(canary))
    rest = sorted(set(chosen) - set(first), key=lambda key: hashlib.sha256(f"{id} {key[0]} {key[1]}".encode()).digest())
    total, found, wave = len(rest) + len(first), [Unit(*key, 0) for key in first], int(bool(first))
    for text in waves:
        size = min(_size(text, total), len(rest))
        if size:
            found += [Unit(*key, wave) for key in rest[:size]]
            rest, wave = rest[size:], wave + 1
    return found + [Unit(*key, wave) for key in rest]


def _size(text: str, total: int) -> int:
    number = text.removesuffix("%")
    if not number.isascii() or not number.isdigit() or not int(number) or (number != text and int(number) > 100):
        raise BadRequest(f"wave {text[:20]!r}: expected a number of targets, or a percentage as 10%")
    return max(1, total * int(number) // 100) if number != text else int(number)
