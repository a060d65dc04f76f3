"""Roll-outs as a function: whatever gateways report, in whatever order, and however often an operator's machine is replaced."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridged.errors import BadRequest
from bridged.fleet import rollout
from bridged.fleet.rollout import FAILED, OVER, Phase, Spec, State, Unit, plan, step
from bridged.fleet.wire import ENDED, Artifact, Cancel, Command, Report

ARTIFACT = Artifact("ab" * 32, 1000, "app.bin", "bin")
SPEC = Spec("r1", ARTIFACT, wave_timeout_s=100, expires_s=1000)
KEYS = [(f"gw{n}", "m1") for n in range(10)]

Reports = dict[tuple[str, str], Report]


def said(unit: Unit, state: str, turn: int = 0) -> Report:
    return Report(unit.gateway, "r1", unit.target, turn, state)


def test_a_roll_out_from_canary_to_the_end() -> None:
    units = plan("r1", KEYS, ["2", "50%"], [("gw3", "m1")])
    assert [sum(u.wave == w for u in units) for w in range(4)] == [1, 2, 5, 2]
    assert units[0] == Unit("gw3", "m1", 0)
    reports: Reports = {}
    state, now, told = State(), 0.0, []
    for _ in range(20):
        made = step(SPEC, units, state, reports, now)
        state, now = made.state, now + 1
        told += [one.gateway for one in made.say]
        for one in made.say:
            reports[(one.gateway, one.target)] = said(Unit(one.gateway, one.target), "succeeded")
    assert state.phase is Phase.DONE
    assert sorted(told) == sorted(gateway for gateway, _ in KEYS)
    assert made.tally.succeeded == 10


def test_thresholds_and_going_on_all_the_same() -> None:
    units = plan("r1", KEYS, ["2"])
    made = step(SPEC, units, State(), {}, 0)
    first, second = [u for u in units if u.wave == 0]
    reports = {first.key: said(first, "rolled_back")}
    made = step(SPEC, units, made.state, reports, 1)
    assert (made.state.phase, made.state.reason) == (Phase.PAUSED, "threshold: 1 failed, at most 0 may")
    assert made.take_back == (Cancel(second.gateway, "r1", "m1", 0),)
    with pytest.raises(BadRequest, match="allow more"):
        rollout.resume(SPEC, made.state, made.tally)
    more = replace(SPEC, max_failures=1)
    reports[second.key] = said(second, "canceled")
    state = rollout.resume(more, made.state, made.tally)
    made = step(more, units, state, reports, 2)
    assert [(one.gateway, one.round) for one in made.say] == [(second.gateway, 1)], "said again to who was taken back"
    assert made.state.wave == 0
    reports[second.key] = said(second, "succeeded", 1)
    made = step(more, units, made.state, reports, 3)
    assert made.state.wave == 1


def test_a_share_of_failures_counts_from_enough_of_them_on() -> None:
    spec = replace(SPEC, max_failures=None, max_share=0.25, share_after=4)
    units = plan("r1", KEYS, [])
    state = step(spec, units, State(), {}, 0).state
    reports = {units[0].key: said(units[0], "failed")}
    for unit in units[1:3]:
        reports[unit.key] = said(unit, "succeeded")
    assert step(spec, units, state, reports, 1).state.phase is Phase.RUNNING, "1 of 3 is too few to judge"
    reports[units[3].key] = said(units[3], "succeeded")
    assert step(spec, units, state, reports, 1).state.phase is Phase.RUNNING, "1 of 4 is not more than a quarter"
    reports[units[4].key] = said(units[4], "timed_out")
    assert step(spec, units, state, reports, 1).state.reason == "threshold: 2 of 5 failed, at most 0.25 of them may"


def test_the_silent_hold_nothing_up_and_the_soak_does() -> None:
    spec = replace(SPEC, soak_s=50)
    units = plan("r1", KEYS, ["1"])
    state = step(spec, units, State(), {}, 0).state
    assert step(spec, units, state, {}, 99).state == state
    state = step(spec, units, state, {}, 100).state
    assert (state.wave, state.settled) == (0, 100)
    assert step(spec, units, state, {}, 149).state.wave == 0
    made = step(spec, units, state, {}, 150)
    assert (made.state.wave, made.tally.silent) == (1, 1)


def test_what_the_silent_have_not_begun_is_taken_back_after_the_end() -> None:
    units = plan("r1", KEYS[:2], [])
    state = step(SPEC, units, State(), {}, 0).state
    reports = {units[0].key: said(units[0], "succeeded")}
    made = step(SPEC, units, state, reports, 100)
    assert (made.state.phase, made.tally.succeeded, made.tally.silent, made.take_back) == (Phase.DONE, 1, 1, ())
    state = rollout.cancel(made.state, made.tally)
    made = step(SPEC, units, state, reports, 101)
    assert made.state == state == rollout.cancel(state, made.tally), "said again, by another operator"
    assert made.state.phase is Phase.DONE, "the other one has it, and shall have it"
    assert made.take_back == (Cancel(units[1].gateway, "r1", "m1", 0),)
    reports[units[1].key] = said(units[1], "canceled")
    assert step(SPEC, units, state, reports, 102).take_back == ()
    with pytest.raises(BadRequest, match="nothing is left"):
        rollout.cancel(replace(state, retract=False), step(SPEC, units, state, reports, 102).tally)


def test_who_was_taken_back_and_told_again_has_not_ended() -> None:
    units = plan("r1", KEYS[:1], [])
    state = replace(step(SPEC, units, State(), {}, 0).state, round=1)
    reports = {units[0].key: said(units[0], "canceled", 0)}
    made = step(SPEC, units, state, reports, 100)
    assert (made.state.phase, made.tally.canceled, made.tally.silent) == (Phase.DONE, 0, 1)
    made = step(SPEC, units, rollout.cancel(made.state, made.tally), reports, 101)
    assert made.take_back == (Cancel(units[0].gateway, "r1", "m1", 1),)


def test_commands_are_the_same_from_every_machine() -> None:
    units = plan("r1", KEYS, ["1"])
    made = step(SPEC, units, State(), {}, 7)
    again = step(SPEC, units, made.state, {}, 70)
    assert again.state == made.state
    assert [one.encode() for one in again.say] == [one.encode() for one in made.say]
    assert made.say[0].expires == 1007


@pytest.mark.parametrize("text", ["0", "-1", "101%", "0%", "x", "", "1.5", "²"])
def test_waves_that_are_none(text: str) -> None:
    with pytest.raises(BadRequest):
        plan("r1", KEYS, [text])


class Gateways:
    """As gateways are: they take commands in order, drop repeated ones, cancel what has not begun, and end somehow."""

    def __init__(self) -> None:
        self.reports: Reports = {}
        self.begun: list[tuple[str, int]] = []
        self.back: set[tuple[str, int]] = set()

    def hear(self, message: Command | Cancel) -> None:
        key = (message.gateway, message.target)
        found = self.reports.get(key)
        if isinstance(message, Cancel):
            if found is not None and found.state == "accepted" and found.round <= message.round:
                self.reports[key] = replace(found, state="canceled")
            return
        if found is None or (found.state == "canceled" and message.round > found.round):
            self.reports[key] = Report(message.gateway, "r1", message.target, message.round, "accepted")

    def go_on(self, number: int, how: str) -> None:
        going = [key for key, found in sorted(self.reports.items()) if not found.ended]
        if going:
            key = going[number % len(going)]
            if self.reports[key].state == "accepted":
                self.begun.append((key[0], self.reports[key].round))
                self.reports[key] = replace(self.reports[key], state="running")
            else:
                self.reports[key] = replace(self.reports[key], state=how)


HOW = st.sampled_from(["succeeded"] * 6 + sorted(FAILED))
ACTION = st.one_of(
    st.tuples(st.just("gateway"), st.integers(0, 99), HOW),
    st.tuples(
        st.sampled_from(["step", "step", "step", "late", "deliver", "pause", "resume", "more", "cancel"]),
        st.integers(0, 99),
        HOW,
    ),
)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 12),
    st.lists(st.sampled_from(["1", "2", "10%", "50%"]), max_size=4),
    st.one_of(st.none(), st.integers(0, 3)),
    st.one_of(st.none(), st.sampled_from([0.0, 0.2, 0.5])),
    st.lists(ACTION, min_size=30, max_size=120),
)
def test_whatever_happens(
    count: int, waves: list[str], most: int | None, share: float | None, actions: list[tuple[str, int, str]]
) -> None:
    """Two machines drive it by turns, with messages that are repeated and late, and people who change their mind."""
    spec = replace(SPEC, max_failures=most, max_share=share, share_after=2)
    units = plan("r1", KEYS[:count] + [(f"x{n}", "m1") for n in range(count - 10)], waves)
    state, now, world = State(), 0.0, Gateways()
    mail: list[Command | Cancel] = []
    stored: dict[str, bytes] = {}
    for what, number, how in [*actions, *[("settle", 0, "")], *[("gateway", n, "succeeded") for n in range(60)]]:
        now += 1
        before = state
        if what == "gateway":
            world.go_on(number, how)
        elif what == "late":
            now += 60
        elif what == "settle":
            for message in [*mail, *step(spec, units, state, world.reports, now).take_back]:
                world.hear(message)
            if state.retract:
                waiting = [found for found in world.reports.values() if found.state == "accepted"]
                assert not waiting, "what is taken back does not begin any more"
        elif what == "deliver":
            while mail:  # The broker keeps their order for each gateway.
                world.hear(mail.pop(0))
        elif what == "more":
            spec = replace(spec, max_failures=(spec.max_failures or 0) + 5, max_share=None)
        elif what == "step":
            made = step(spec, units, state, world.reports, now)
            state = made.state
            messages: list[Command | Cancel] = [*made.say, *made.take_back]
            for message in messages:
                raw = stored.setdefault(message.subject, message.encode())  # ``only_first``
                assert raw == message.encode(), "said again it must be the same"
                mail.append(message)
            while mail and number >= 30:  # Mostly it comes at once.
                world.hear(mail.pop(0))
            if state.wave > before.wave:
                assert before.phase is Phase.RUNNING
                assert state.wave == before.wave + 1
                assert not rollout.exceeded(spec, made.tally)
                for unit in units:
                    found = world.reports.get(unit.key)
                    if unit.wave <= before.wave:
                        ended = found is not None and found.ended
                        assert ended or now >= before.released[unit.wave] + spec.wave_timeout_s
            assert all(any(u.key == (m.gateway, m.target) and u.wave <= state.wave for u in units) for m in mail)
            if state.phase is not Phase.RUNNING:
                assert state.wave == before.wave
        else:
            try:
                if what == "pause":
                    state = rollout.pause(state)
                elif what == "cancel" and number < 5:
                    state = rollout.cancel(state, rollout.count(spec, units, state, world.reports, now))
                elif what == "resume" and state.phase is Phase.PAUSED:
                    tally = rollout.count(spec, units, state, world.reports, now)
                    state = rollout.resume(spec, state, tally)
            except BadRequest:
                assert state.phase in OVER or rollout.exceeded(spec, rollout.count(spec, units, state, world.reports, now))
        if before.phase is Phase.DONE:
            assert replace(state, retract=before.retract, reason=before.reason) == before
            assert state.retract or not before.retract
        if before.phase is Phase.CANCELED:
            assert state == before
    assert len({name for name, _ in world.begun}) == len(world.begun), "a unit has begun twice"
    tally = rollout.count(spec, units, state, world.reports, now)
    assert tally.succeeded + tally.failed + tally.canceled + tally.running + tally.silent == tally.released <= tally.units
    assert set(FAILED) | {"succeeded", "canceled"} == ENDED
