"""The highest rate that a target carries, and flash programmed as wide as its supply allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from bridged import chips, config
from bridged.errors import ApplicationRunning, BaudUnavailable
from bridged.events import Phase, Retried, Warned
from bridged.jobs.past import learned, past_of
from bridged.jobs.records import TargetRecord
from bridged.protocol.flow import Send, SetFormat
from bridged.sim import virtual
from bridged.sim.application import Behaviour
from bridged.sim.device import Mode
from bridged.sim.loader import Timing
from bridged.target import lines, session
from bridged.target.request import Past, Request, Result, Wiring
from bridged.target.speed import faster_bauds, lower_baud, too_many, voltage_code
from tests.target.bench import WIRED, Bench, make_image

NRST = config.Lines(kind="socket", socket="/nowhere", nrst="nrst")
LADDER = (921600, 460800, 256000, 230400, 115200, 57600)


def request(chip: str = "H743", **settings: object) -> Request:
    return Request(**{"kind": "flash", "wiring": WIRED, "chip": chip, "bauds": LADDER, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chip", "settings", "expected"),
    [
        ("H743", {}, (921600, 460800, 256000, 230400)),  # measures in hardware
        ("L476", {}, (256000, 230400)),  # by software: not above 256000
        ("L476", {"past": Past(good_bauds=(460800,))}, (460800, 256000, 230400)),  # but for what it has done before
        ("H743", {"past": Past(bad_bauds=(921600, 256000))}, (460800, 230400)),
        ("F756", {}, ()),  # its table begins at 57600 for a reason
        ("F756", {"past": Past(good_bauds=(115200,))}, (115200,)),
        ("H743", {"baud": 460800}, (921600,)),
        ("H743", {"wiring": Wiring(has_boot0=True)}, ()),  # a wrong rate is only got rid of by a reset
        ("H743", {"bauds": ()}, ()),
    ],
)
def test_rates_that_are_worth_a_reset(chip: str, settings: dict[str, object], expected: tuple[int, ...]) -> None:
    assert faster_bauds(request(chip, **settings), chips.find(chip)) == expected


@pytest.mark.parametrize(
    ("chip", "settings", "expected"),
    [
        ("H743", {}, (921600, 460800, 256000, 230400, 115200, 57600)),
        ("H743", {"bauds": ()}, (115200,)),  # nobody asked for less than what ST tests
        ("H743", {"bauds": (), "baud": 921600}, (921600, 460800, 230400, 115200)),
        ("F407", {"bauds": (), "baud": 921600}, (921600, 230400, 115200)),  # by software: 460800 is not worth it
        ("F407", {"bauds": (), "baud": 460800, "past": Past(bad_bauds=(230400,))}, (460800, 115200)),
        ("F756", {"bauds": (), "baud": 460800}, (460800, 115200, 57600)),
        ("F756", {"bauds": ()}, (57600,)),
        ("F373", {"bauds": (), "baud": 115200}, (115200, 57600)),  # 57600 is the limit of its loader
    ],
)
def test_a_session_with_errors_steps_down_to_the_next_rate(
    chip: str, settings: dict[str, object], expected: tuple[int, ...]
) -> None:
    asked, found = request(chip, **settings), chips.find(chip)
    steps = [expected[0]]
    while (lower := lower_baud(steps[-1], asked, found)) != steps[-1]:
        steps.append(lower)
    assert tuple(steps) == expected


@pytest.mark.parametrize(
    ("times", "enough"),
    [((0, 4, 9), True), ((0, 4, 11), False), ((0, 100, 105, 109), True), (range(0, 180, 20), False), (range(0, 200, 20), True)],
)
def test_a_lower_rate_is_for_errors_that_come_often(times: Sequence[float], enough: bool) -> None:
    assert too_many(list(times)) is enough


# Fixed rates that the part does not manage: where the session ends up, and how many resets that costs in all, the one into the
# application at its end included. The second time begins with what worked.
@pytest.mark.parametrize(
    ("chip", "fixed", "most", "used", "failed", "resets"),
    [
        ("H743", 460800, 300_000, 230400, [460800], 5),
        ("H743", 921600, 500_000, 460800, [921600], 5),
        ("H743", 460800, 115200, 115200, [460800, 230400], 6),
        ("H743", 460800, 60_000, 57600, [460800, 230400, 115200], 8),
        ("F407", 460800, None, 230400, [460800], 5),
        ("F756", 460800, None, 115200, [460800], 5),
        ("F756", 460800, 60_000, 57600, [460800, 115200], 7),
    ],
)
def test_a_fixed_rate_that_is_too_high_costs_some_resets_once_and_no_more_time_than_it_must(
    chip: str, fixed: int, most: int | None, used: int, failed: list[int], resets: int
) -> None:
    bench = Bench(chip, settings={"max_baud": most, "rate_error": 0.0})
    image = make_image(bench.chip, 4096)
    stats = bench.device.stats
    first = bench.run("flash", image, baud=fixed)
    assert (first.baud, sorted(first.bad_bauds, reverse=True)) == (used, failed)
    assert bench.holds(image)
    assert [w.code for w in bench.events(Warned)] == ["RATE_LOWERED"]
    assert stats.resets == resets
    # As the journal hands it on, and for as long as it does (``jobs.past``).
    past = past_of(learned(TargetRecord("a"), first.to_dict(), 1e9), (), 1e9 + 60)
    again = bench.run("verify", image, baud=fixed, past=past)
    assert (again.baud, again.bad_bauds) == (used, [])
    assert stats.resets == resets + 2
    assert [w.code for w in bench.events(Warned)] == ["RATE_LOWERED"], "every time it says that it is not what is configured"
    # It was mended: after a week, or where examine looks (``jobs.known``).
    better = Bench(chip, settings={"max_baud": 1_000_000, "rate_error": 0.0})
    assert better.run("identify", baud=fixed, past=replace(past, bad_bauds=())).baud == fixed


def test_what_is_remembered_is_never_the_reason_why_a_target_is_not_reached() -> None:
    # 115200 carries nothing any more, and what failed last week would work.
    bench = Bench("H743", settings={"max_baud": 1_000_000, "rate_error": 0.0})
    only = frozenset({460800})

    def deaf(_number: int, step: object) -> None:
        if isinstance(step, SetFormat):
            bench.device._max_baud = 1_000_000 if step.baud in only else 1200

    past = Past(good_bauds=(115200,), bad_bauds=(460800, 230400))
    flow = session.run(request(kind="identify", bauds=(), baud=460800, past=past))
    assert virtual.run(flow, bench.device, before=deaf).baud == 460800


def test_silence_is_held_against_no_rate_where_the_loader_only_needed_longer() -> None:
    # A part that nobody named needs half a second; all faster rates were tried after a tenth.
    bench = Bench("H743", settings={"max_baud": 1_000_000, "timing": Timing(startup_s=0.5)}, request={"chip": ""})
    result = bench.run("identify", bauds=LADDER)
    assert (result.baud, result.bad_bauds) == (115200, [])


def test_a_rate_that_worked_before_has_two_tries() -> None:
    def run(past: Past) -> Result:
        bench = Bench("H743", settings={"max_baud": 1_000_000, "faults": ["lose:0x00:0:opcode"]})
        return bench.run("identify", bauds=(460800,), past=past)

    assert run(Past()).baud == 115200
    assert run(Past(good_bauds=(460800,))).baud == 460800


@pytest.mark.parametrize(
    ("chip", "volts", "code"),
    [("F407", 3.3, 3), ("F407", 2.7, 3), ("F407", 2.5, 2), ("F407", 2.2, 1), ("F407", 1.8, 0), ("F407", 0, 0), ("F756", 3, 3),
     ("F207", 3, 3), ("L476", 3.3, 0), ("H743", 3.3, 0)],
)  # fmt: skip
def test_the_voltage_range_and_never_vpp(chip: str, volts: float, code: int) -> None:
    assert voltage_code(request(chip, supply_v=volts), chips.find(chip)) == code


@pytest.mark.parametrize(("most", "used", "failed"), [(1_000_000, 921600, []), (300_000, 256000, [921600, 460800])])
def test_the_highest_rate_that_the_loader_measures_is_used(most: int, used: int, failed: list[int]) -> None:
    bench = Bench("H743", settings={"max_baud": most})
    image = make_image(bench.chip, 8192)
    result = bench.run("flash", image, bauds=LADDER)
    assert (result.baud, result.bad_bauds) == (used, failed)
    assert result.evidence == "full"
    assert bench.holds(image)
    assert bench.boots()


@pytest.mark.parametrize("settings", [{}, {"bauds": (), "baud": 921600}])
def test_a_rate_that_the_driver_cannot_make_is_passed_over(settings: dict[str, Any]) -> None:
    bench = Bench("H743", settings={"max_baud": 1_000_000})

    def no_fast_divider(_number: int, step: object) -> None:
        if isinstance(step, SetFormat) and step.baud > 500_000:
            raise BaudUnavailable("the divider ends there", baud=step.baud)

    flow = session.run(request(kind="identify", **settings))
    result = virtual.run(flow, bench.device, before=no_fast_divider)
    assert (result.baud, result.bad_bauds) == (460800, [921600])


def test_a_rate_at_which_two_readings_differ_is_not_believed() -> None:
    # Get and Get ID are answered, and the first reading of flash has a wrong bit.
    bench = Bench("H743", settings={"max_baud": 1_000_000, "faults": ["misread:0x08000010"]})
    result = bench.run("identify", bauds=(921600, 460800))
    assert (result.baud, result.bad_bauds) == (460800, [921600])
    # So is a fixed one, as long as it is above what everybody uses.
    bench = Bench("H743", settings={"max_baud": 1_000_000, "faults": ["misread:0x08000010"]})
    assert bench.run("identify", baud=460800).baud == 460800
    assert [e.step for e in bench.events(Retried)] == ["sync"], "after one more reset"
    bench = Bench("H743", settings={"faults": ["misread:0x08000010"]})
    bench.run("identify")
    assert bench.events(Retried) == []


@pytest.mark.parametrize(
    ("settings", "parity", "resets"),
    [
        ({}, "E", 1),
        ({}, "N", 2),  # Heard with parity it is noise: one more reset, to hear it as it speaks.
        ({"bauds": LADDER}, "N", 2),  # As it is at another rate.
        ({"baud": 460800}, "N", 2),
        ({"application_baud": 9600, "bauds": LADDER}, "N", 2),
    ],
)
def test_application_output_ends_it_at_once(settings: dict[str, Any], parity: str, resets: int) -> None:
    only_reset = Wiring(has_reset=True, enter=lines.default_enter(NRST), leave=lines.default_leave(NRST))
    bench = Bench("H743", settings={"application": Behaviour(settings.get("application_baud", 115200), parity)})
    bench.put(make_image(bench.chip, 4096))
    bench.uart.pause(1.0)
    before = bench.device.stats.resets
    with pytest.raises(ApplicationRunning, match="bench application"):
        bench.run("identify", wiring=only_reset, application_parity=parity, **settings)
    assert bench.device.stats.resets - before == resets + 1, "and one to let it start"


def test_noise_that_is_no_application_costs_one_reset_and_the_loader_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("H743", settings={"faults": ["hang:rx:0"]})
    receive, noise = virtual.VirtualUart.receive, [bytes.fromhex("e1 83 91 a5 c1")]

    def heard(uart: virtual.VirtualUart, count: int, timeout_s: float) -> bytes:
        return receive(uart, count, timeout_s) or (noise.pop() if noise else b"")

    monkeypatch.setattr(virtual.VirtualUart, "receive", heard)
    assert bench.run("identify").baud == 115200
    assert bench.device.stats.resets == 4, "noise, a look, the loader, the application"


def test_a_driver_that_can_make_no_rate_is_told_as_such() -> None:
    def no_divider(_number: int, step: object) -> None:
        if isinstance(step, SetFormat) and step.parity == "E":
            raise BaudUnavailable("there is no divider", baud=step.baud)

    bench = Bench("H743")
    bench.put(make_image(bench.chip, 4096))
    with pytest.raises(BaudUnavailable):
        virtual.run(session.run(request(kind="identify")), bench.device, before=no_divider)
    bench.uart.pause(1.0)
    assert bench.device.mode is Mode.APPLICATION, "the last reset was into it"


def test_a_rate_that_makes_errors_is_left_for_a_lower_one_and_the_job_goes_on() -> None:
    # Above 300000 baud bytes are lost now and then, as on a wire that is too long for more.
    bench = Bench("H743", settings={"max_baud": 1_000_000})
    image = make_image(bench.chip, 65536)
    count = 0

    def too_long(_number: int, step: object) -> None:
        nonlocal count
        if isinstance(step, Send) and len(step.data) > 200 and bench.device.baud > 300_000:
            count += 1
            if count % 8 == 0:
                bench.device.faults.add(f"nack:0x31:{bench.device.stats.commands[0x31]}:address")
                bench.device.faults.add(f"nack:0x31:{bench.device.stats.commands[0x31] + 1}:address")

    result = virtual.run(session.run(request(), image), bench.device, before=too_long)
    assert result.baud == 256000
    assert result.bad_bauds == [921600, 460800]
    assert bench.holds(image)


def test_a_rate_that_a_reset_no_longer_brings_back_is_left_and_remembered() -> None:
    # It was measured right once; after the reset in the middle it never is again.
    bench = Bench("H743", settings={"max_baud": 1_000_000, "faults": ["lose:0x31:20:data"]})
    image = make_image(bench.chip, 16384)

    def worse(_number: int, step: object) -> None:
        if isinstance(step, SetFormat) and bench.device.stats.commands[0x31] > 20:
            bench.device._max_baud = 300_000

    result = virtual.run(session.run(request(), image), bench.device, before=worse)
    assert (result.baud, result.bad_bauds) == (256000, [921600, 460800])
    assert bench.holds(image)


@pytest.mark.parametrize("chip", ["F407", "F756"])
def test_wide_programming_is_faster_and_told_again_after_every_reset(chip: str) -> None:
    image = make_image(chips.find(chip), 65536)
    narrow, wide, again = Bench(chip), Bench(chip), Bench(chip, settings={"faults": ["lose:0x31:40:data"]})
    slow = narrow.run("flash", image)
    fast = wide.run("flash", image, supply_v=3.3)
    assert (slow.supply_range, fast.supply_range) == (0, 3)
    assert wide.holds(image)
    erase, write = Phase.ERASE, Phase.WRITE
    took_ns = [b.account.phases[erase].total_ns - b.account.phases[erase].wire_ns for b in (narrow, wide)]
    assert took_ns[1] < 0.6 * took_ns[0]
    saved_ns = narrow.account.phases[write].total_ns - wide.account.phases[write].total_ns
    assert saved_ns > 0
    # A reset in the middle: the block is found written, and the one command more is the supply, told anew.
    again.run("flash", image, supply_v=3.3)
    assert again.events(Retried)
    assert again.device.stats.commands[0x31] == wide.device.stats.commands[0x31] + 1
    assert again.holds(image)


def test_a_loader_that_refuses_the_voltage_range_programs_all_the_same() -> None:
    bench = Bench("F407", settings={"faults": ["nack:0x31:0:address"]})
    image = make_image(bench.chip, 8192)
    assert bench.run("flash", image, supply_v=3.3).supply_range == 3, "once may be an accident"
    bench = Bench("F407", settings={"faults": ["nack:0x31:0:address", "nack:0x31:1:address"]})
    result = bench.run("flash", image, supply_v=3.3)
    assert result.supply_range == 0
    assert [w.code for w in bench.events(Warned)] == ["SUPPLY_REFUSED"]
    assert bench.holds(image)
    # After a reset in the middle as well: what was wide before is not any more, and the result says so.
    bench = Bench("F407", settings={"faults": ["lose:0x31:10:data", "nack:0x31:11:address", "nack:0x31:12:address"]})
    assert bench.run("flash", image, supply_v=3.3).supply_range == 0
    assert bench.holds(image)
