"""The highest rate that a target carries, and flash programmed as wide as its supply allows."""

from __future__ import annotations

import pytest

from bridged import chips
from bridged.errors import BaudUnavailable
from bridged.events import Phase, Retried, Warned
from bridged.protocol.flow import Send, SetFormat
from bridged.sim import virtual
from bridged.target import session
from bridged.target.request import Past, Request, Wiring
from bridged.target.speed import faster_bauds, lower_baud, voltage_code
from tests.target.bench import WIRED, Bench, make_image

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


def test_the_next_lower_rate() -> None:
    chip = chips.find("H743")
    assert [lower_baud(b, request(), chip) for b in (921600, 230400, 115200)] == [460800, 115200, 115200]


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


def test_a_rate_that_the_driver_cannot_make_is_passed_over() -> None:
    bench = Bench("H743", settings={"max_baud": 1_000_000})

    def no_fast_divider(_number: int, step: object) -> None:
        if isinstance(step, SetFormat) and step.baud > 500_000:
            raise BaudUnavailable("the divider ends there", baud=step.baud)

    flow = session.run(request(kind="identify"))
    result = virtual.run(flow, bench.device, before=no_fast_divider)
    assert (result.baud, result.bad_bauds) == (460800, [921600])


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
    result = bench.run("flash", image, supply_v=3.3)
    assert result.supply_range == 0
    assert [w.code for w in bench.events(Warned)] == ["SUPPLY_REFUSED"]
    assert bench.holds(image)
