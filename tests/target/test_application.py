"""Dealing with the application: interlock before the first reset, entry through it, and the health probe after a start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from bridged import config, errors
from bridged.events import Phase, Retried, SectorProven, Warned
from bridged.protocol.flow import Barrier, Checkpoint, Flow, Now, Overheard, ReadLine, Receive, Send
from bridged.sim import virtual
from bridged.sim.application import Behaviour
from bridged.sim.device import Mode
from bridged.sim.faults import Faults
from bridged.sim.virtual import VirtualUart
from bridged.sim.wire import Format
from bridged.target import lines, session
from bridged.target.expect import Conversation, Heard, talk
from bridged.target.kept import NOTHING_KEPT
from bridged.target.request import Boot, Request, Wiring
from tests.target.bench import WIRED, Bench, make_image

ANSWERS = Behaviour(answer=True)


def running(part: str = "L476", **settings: Any) -> Bench:
    """A part whose application runs."""
    bench = Bench(part, {"application": ANSWERS, **settings})
    bench.put(make_image(bench.chip, 3000, seed=5))
    assert bench.boots()
    return bench


def test_a_healthy_image_succeeds() -> None:
    bench = Bench("L476")
    result = bench.run("flash", make_image(bench.chip, 3000), health=Conversation(expect="bench appl.cation"))
    assert result.evidence == "full"
    assert result.banner == "bench application"
    assert Phase.HEALTH in bench.account.phases


def test_the_probe_may_ask() -> None:
    bench = Bench("L476", {"application": ANSWERS})
    bench.run("flash", make_image(bench.chip, 3000), health=Conversation(b"version\n", "ok version", 5))


@pytest.mark.parametrize("way", ["lose", "flip", "insert"])
@pytest.mark.parametrize("byte", [1, 7, 14])
def test_one_damaged_byte_of_a_banner_is_no_reason_to_undo_a_good_image(way: str, byte: int) -> None:
    health = Conversation(expect="bench application", within_s=0.5)
    calm = Bench("L476")
    image = make_image(calm.chip, 3000)
    calm.run("flash", image, health=health)
    banner_at = calm.device.stats.bytes_out - len(b"bench application\r\n")
    bench = Bench("L476", {"faults": [f"{way}:tx:{banner_at + byte}"]})
    assert bench.run("flash", image, health=health).health == "passed"
    assert [e.step for e in bench.events(Retried)] == ["health"]
    assert bench.device.mode is Mode.APPLICATION
    assert calm.events(Retried) == []


@pytest.mark.parametrize("expect", ["another banner", "ok version"])
def test_an_image_that_does_not_answer_is_unhealthy_though_proven(expect: str) -> None:
    bench = Bench("L476")
    image = make_image(bench.chip, 3000)
    with pytest.raises(errors.Unhealthy, match="it said 'bench application'"):
        bench.run("flash", image, health=Conversation(expect=expect, within_s=0.5))
    assert bench.holds(image)
    assert bench.account.total_s < 60


def test_ten_thousand_bytes_said_before_the_reset_are_the_consoles_and_confuse_nobody() -> None:
    """What piled up in the kernel while the session was started is more than one look takes."""
    bench = running()
    uart = VirtualUart(bench.device, Format(115200, "N"))
    for _ in range(50):
        uart.send(b"x" * 200 + b"\n")
    uart.pause(1.0)
    virtual.run(session.run(Request(kind="identify", wiring=WIRED, chip="L476")), uart)
    heard = b"".join(uart.account.overheard)
    assert heard == (b"ok " + b"x" * 200 + b"\r\n") * 50 + b"bench application\r\n"


def test_what_it_said_before_the_reset_does_not_count() -> None:
    bench = running()
    with pytest.raises(errors.Unhealthy):
        bench.run(
            "flash", make_image(bench.chip, 3000, banner=b"new"), health=Conversation(expect="bench application", within_s=0.5)
        )


@pytest.mark.parametrize("kind", ["flash", "ensure"])
def test_a_job_that_was_interrupted_before_its_probe_asks_though_nothing_is_left_to_write(kind: str) -> None:
    bench = Bench("L476")
    image = make_image(bench.chip, 3000)
    bench.run("flash", image)
    proven = tuple(bench.events(SectorProven))
    with pytest.raises(errors.Unhealthy):
        bench.run(kind, image, NOTHING_KEPT, proven=proven, health=Conversation(expect="another", within_s=0.5))
    assert bench.run(kind, image, NOTHING_KEPT, proven=proven, health=Conversation(expect="bench")).health == "passed"


@pytest.mark.parametrize("kind", ["ensure", "verify"])
def test_an_image_that_was_found_in_flash_is_asked_too_and_not_blamed(kind: str) -> None:
    """It may become the last known good one; but nobody asked for a change that could be taken back."""
    bench = running()
    image = make_image(bench.chip, 3000, seed=5)
    assert bench.run(kind, image, health=Conversation(expect="bench")).health == "passed"
    result = bench.run(kind, image, health=Conversation(expect="another", within_s=0.5))
    assert (result.evidence, result.changed, result.health) == ("full", False, "failed")
    assert [w.code for w in bench.events(Warned)] == ["UNHEALTHY"]


def test_a_job_that_was_interrupted_in_its_erase_asks_no_interlock() -> None:
    """There is no application any more that could answer."""
    bench = Bench("L476")
    image = make_image(bench.chip, 3000)
    ask = Conversation(b"safe?\n", "ok safe", 0.5)
    with pytest.raises(errors.NotSafeToStop):
        bench.run("flash", image, interlock=ask)
    bench.run("flash", image, NOTHING_KEPT, interlock=ask)
    assert bench.holds(image)


def test_the_interlock_says_no_and_nothing_moves() -> None:
    bench = running()
    before = bench.device.stats.resets
    with pytest.raises(errors.NotSafeToStop, match="ok may I stop"):
        bench.run("flash", make_image(bench.chip, 3000), interlock=Conversation(b"may I stop\n", "SAFE", 0.5))
    assert bench.device.stats.resets == before
    assert bench.device.mode is Mode.APPLICATION


def test_the_interlock_says_yes_or_is_overridden() -> None:
    bench = running()
    image = make_image(bench.chip, 3000)
    bench.run("flash", image, interlock=Conversation(b"safe?\n", "ok safe", 0.5))
    bench.run("flash", image, interlock=Conversation(b"safe?\n", "never", 0.5), force=frozenset({"interlock"}))


def test_entry_through_the_application_needs_consent_and_then_works() -> None:
    bench = Bench("L476", {"application": Behaviour(trigger=b"bootloader")})
    bench.put(make_image(bench.chip, 3000, seed=5))
    assert bench.boots()
    image = make_image(bench.chip, 3000)
    unwired: dict[str, Any] = {"wiring": Wiring(), "enter_by": b"bootloader\n"}
    with pytest.raises(errors.EntryWouldBeLost):
        bench.run("flash", image, **unwired)
    assert not bench.device.stats.erases
    assert bench.boots()
    result = bench.run("flash", image, **unwired, one_shot=True)
    assert (result.evidence, result.banner) == ("full", "bench application")


# --- only the application leads into the loader ---------------------------------------------------------------------------

_NRST = config.Lines(kind="socket", socket="/nowhere", nrst="nrst")
NRST_ONLY = Wiring(has_reset=True, enter=lines.default_enter(_NRST), leave=lines.default_leave(_NRST))


def asked(*faults: str) -> Bench:
    bench = Bench(
        "L476",
        {"application": Behaviour(trigger=b"bootloader"), "rate_error": 0.0},
        {"wiring": NRST_ONLY, "enter_by": b"bootloader\n", "listen_s": 0.3},
    )
    bench.put(make_image(bench.chip, 3000, seed=5))
    assert bench.boots()
    bench.device.faults = Faults(faults)
    return bench


def test_the_application_is_asked_and_not_reset_where_it_alone_leads_into_the_loader() -> None:
    bench = asked()
    before = bench.device.stats.resets
    bench.run("identify")
    assert bench.device.stats.resets == before + 1, "to start it again, in the end"
    with pytest.raises(errors.EntryWouldBeLost, match="BOOT0 not wired"):
        bench.run("flash", make_image(bench.chip, 3000))
    assert not bench.device.stats.erases
    bench.device.advance(bench.device.now_ns + 100_000_000)
    result = bench.run("flash", make_image(bench.chip, 3000), one_shot=True)
    assert (result.evidence, result.banner, result.boot) == ("full", "bench application", Boot.RESET)


@pytest.mark.parametrize("way", ["lose:rx", "lose:tx", "flip:rx", "insert:tx", "reset:rx", "hang:rx"])
def test_nrst_and_another_question_mend_what_went_wrong(way: str) -> None:
    for position in range(0, 60, 7):
        bench = asked(f"{way}:{position}")
        assert bench.run("verify", make_image(bench.chip, 3000, seed=5)).evidence == "full", position
        assert bench.device.mode is Mode.APPLICATION


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9])
def test_once_it_is_erased_nobody_resets_the_target_and_the_next_job_reaches_it(share: float) -> None:
    """P10: a reset would start nothing, and nothing else leads into the loader."""
    calm = asked()
    image = make_image(calm.chip, 3000)
    calm.run("flash", image, one_shot=True)
    passed, kept = calm.account.checkpoints, b""
    bench = asked()
    before = bench.device.stats.resets
    count = 0

    def checkpoint(_step: Checkpoint) -> None:
        nonlocal count
        count += 1
        if kept and count >= share * passed:
            raise errors.Stopped("the daemon is stopping")

    def barrier(step: Barrier) -> None:
        nonlocal kept
        kept = kept or step.kept

    with pytest.raises(errors.Stopped) as caught:
        bench.run("flash", image, one_shot=True, checkpoint=checkpoint, barrier=barrier)
    assert caught.value.facts["boot"] == "in_loader"
    assert bench.device.stats.resets == before
    assert bench.device.mode is Mode.LOADER
    result = bench.run("flash", image, kept, one_shot=True)
    assert (result.evidence, bench.device.mode) == ("full", Mode.APPLICATION)


def test_where_it_does_not_answer_any_more_it_is_not_reset_either() -> None:
    bench = asked("hang:0x31:1:address")
    before = bench.device.stats.resets
    with pytest.raises(errors.LoaderError) as caught:
        bench.run("flash", make_image(bench.chip, 3000), one_shot=True)
    assert caught.value.facts["boot"] == "in_loader"
    with pytest.raises(errors.NoSync):
        bench.run("flash", make_image(bench.chip, 3000), NOTHING_KEPT, one_shot=True)
    assert bench.device.stats.resets == before


# --- the conversation alone ---------------------------------------------------------------------------------------


def heard(
    flow: Flow[Heard], said: list[tuple[float, bytes]], line: Callable[[float], bool] | None = None
) -> tuple[Heard, list[bytes]]:
    """Play an application that says things at times, and drives a line."""
    now, sent, overheard = 0.0, [], []
    pending = list(said)
    answer: Any = None
    try:
        while True:
            step = flow.send(answer)
            match step:
                case Now():
                    answer = now
                case Send(data):
                    sent.append(data)
                    answer = None
                case Receive(_, timeout_s):
                    until = now + timeout_s
                    answer = b""
                    if pending and pending[0][0] <= until:
                        when, answer = pending.pop(0)
                        now = max(now, when)
                    else:
                        now = until
                case Overheard(data):
                    assert data
                    overheard.append(data)
                    answer = None
                case ReadLine("alive") if line is not None:
                    answer = line(now)
                case _:
                    raise AssertionError(step)
    except StopIteration as end:
        if said:
            assert b"".join(overheard) == b"".join(data for when, data in said if when <= now), "the console misses nothing"
        return end.value, sent


def test_it_asks_again_and_ends_at_the_match() -> None:
    told, sent = heard(talk(Conversation(b"hi", "re.dy", 5)), [(1.0, b"rea"), (1.5, b"dy\r\n"), (2.0, b"more")])
    assert (told.matches, told.text, sent) == (1, "ready", [b"hi", b"hi"])


def test_a_second_banner_in_the_quiet_time_is_a_crash_loop() -> None:
    talkative = Conversation(expect="boot", within_s=5, quiet_s=3)
    assert heard(talk(talkative), [(1.0, b"boot\n"), (3.0, b"boot\n")])[0].matches == 2
    assert heard(talk(talkative), [(1.0, b"boot\n"), (4.5, b"boot\n")])[0].matches == 1
    assert heard(talk(talkative), [(1.0, b"boot boot\n")])[0].matches == 2


def test_who_does_not_watch_for_a_crash_loop_may_find_a_word_twice() -> None:
    assert heard(talk(Conversation(expect="boot", within_s=5)), [(1.0, b"boot boot\n")])[0].matches == 1


ALIVE = Conversation(within_s=2, line="alive")


def test_a_line_is_waited_for_alone_or_with_words() -> None:
    assert bool(ALIVE)
    assert heard(talk(ALIVE), [], lambda now: now >= 1.5)[0] == Heard(True, 0, True, "")
    late = heard(talk(ALIVE), [], lambda now: now >= 3)[0]
    assert (late.good, late.lacks(ALIVE)) == (False, "line alive did not become active")
    both = replace(ALIVE, expect="ok")
    assert heard(talk(both), [(1.0, b"ok")], lambda now: now >= 1.5)[0].good
    mute = heard(talk(both), [], lambda _: True)[0]
    assert mute.lacks(both) == "'ok' did not come"
    dark = heard(talk(both), [(1.0, b"ok")], lambda _: False)[0]
    assert dark.lacks(both) == "line alive did not become active"
    assert heard(talk(both), [], lambda _: False)[0].lacks(both) == "'ok' did not come and line alive did not become active"


def test_a_line_that_goes_inactive_again_in_the_quiet_time_is_told() -> None:
    watched = replace(ALIVE, quiet_s=5)
    told = heard(talk(watched), [], lambda now: 1 <= now < 4)[0]
    assert (told.good, told.active) == (True, False)
    assert told.lacks(watched) == "line alive went inactive again"
    assert heard(talk(watched), [], lambda now: 1 <= now < 7)[0].lacks(watched) == ""


# --- a session that asks by lines ----------------------------------------------------------------------------------------


SAFE = Conversation(within_s=1, line="safe")


def test_the_interlock_may_be_a_line() -> None:
    bench = running(application=Behaviour(safe_after_s=5))
    image = make_image(bench.chip, 3000)
    before = bench.device.stats.resets
    with pytest.raises(errors.NotSafeToStop, match="line safe did not become active within 1 s"):
        bench.run("flash", image, interlock=SAFE)
    assert bench.device.stats.resets == before
    assert bench.device.mode is Mode.APPLICATION
    bench.run("flash", image, interlock=replace(SAFE, within_s=6))
    assert bench.holds(image)


def test_where_no_application_says_that_it_may_be_stopped_the_job_has_to_say_so() -> None:
    bench = Bench("L476")
    image = make_image(bench.chip, 3000)
    with pytest.raises(errors.NotSafeToStop):
        bench.run("flash", image, interlock=SAFE)
    bench.run("flash", image, interlock=SAFE, force=frozenset({"interlock"}))
    assert bench.holds(image)


@pytest.mark.parametrize(("alive_after_s", "healthy"), [(0.5, True), (30.0, False)])
def test_the_health_probe_may_be_a_line(alive_after_s: float, healthy: bool) -> None:
    bench = Bench("L476", {"application": Behaviour(alive_after_s=alive_after_s)})
    image = make_image(bench.chip, 3000)
    if healthy:
        assert bench.run("flash", image, health=ALIVE).health == "passed"
    else:
        with pytest.raises(errors.Unhealthy, match="line alive did not become active within 2 s"):
            bench.run("flash", image, health=ALIVE)
    assert bench.holds(image)


def test_silence_ends_in_time() -> None:
    assert heard(talk(replace(Conversation(expect="x"), within_s=2)), [])[0] == Heard(False, 0, True, "")
