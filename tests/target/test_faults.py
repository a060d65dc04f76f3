"""Faults in virtual time: one transient accident anywhere is recovered without help; any number never makes a false success.

Each example flashes a short image over an older one and injects faults by position: bytes lost, flipped and added both ways,
ACKs lost, late and turned into NACKs, a target that resets or hangs, a word programmed or read wrong, an erase without an end.
``BRIDGED_FAULTS`` scales the number of examples (``make soak`` sets it); the default is for every day.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bridged import errors
from bridged.errors import BridgedError
from bridged.events import Retried
from bridged.sim.device import Device
from bridged.sim.virtual import Account, run
from bridged.target import session
from bridged.target.request import Request, Wiring
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
EXAMPLES = int(os.environ.get("BRIDGED_FAULTS", "600"))
SCALE = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
pytestmark = pytest.mark.timeout(120 + EXAMPLES // 20)
LONGEST_S = 120.0  # Two erases that never answer, on a part with slow sectors, and all attempts to enter.


@cache
def traffic(part: str) -> tuple[int, int]:
    """Bytes in and out of an undisturbed run."""
    bench = one(part, [])
    bench.run("flash", make_image(bench.chip, SIZE), discard_outside=True)
    return bench.device.stats.bytes_in, bench.device.stats.bytes_out


def one(part: str, faults: list[str]) -> Bench:
    bench = Bench(part, {**PARTS[part], "rate_error": 0.0, "faults": faults})
    bench.put(make_image(bench.chip, SIZE, seed=5))
    return bench


@st.composite
def faults_for(draw: st.DrawFn, part: str) -> str:
    rx, tx = traffic(part)
    erase = "0x43" if part == "0x410" else "0x44"
    base = 0x08000000
    kind = draw(st.sampled_from(["rx", "tx", "stage", "cell", "erase"]))
    match kind:
        case "rx" | "tx":
            ways = ["lose", "flip", "insert", "reset", "hang"] if kind == "rx" else ["lose", "flip", "insert"]
            way = draw(st.sampled_from(ways))
            text = f"{way}:{kind}:{draw(st.integers(0, (rx if kind == 'rx' else tx) - 1))}"
            if way == "flip":
                text += f":{1 << draw(st.integers(0, 7)):#x}"
            elif way == "insert":
                text += f":{draw(st.sampled_from([0x00, 0x79, 0x1F, 0xFF, 0x7F, 0x31, 0x44])):#x}"
            return text
        case "stage":
            opcode, stages = draw(
                st.sampled_from(
                    [
                        ("0x00", ("opcode",)),
                        ("0x02", ("opcode",)),
                        ("0x11", ("opcode", "address", "length")),
                        ("0x31", ("opcode", "address", "data")),
                        (erase, ("opcode", "list")),
                    ]
                )
            )
            stage = draw(st.sampled_from(stages))
            which = draw(st.integers(0, 3))
            match draw(st.sampled_from(["nack", "lose", "late"])):
                case "nack":
                    return f"nack:{opcode}:{which}:{stage}"
                case "lose":
                    return f"lose:{opcode}:{which}:{stage}"
                case _:
                    return f"late:{opcode}:{which}:{stage}:{draw(st.sampled_from([0.1, 0.3, 1, 3]))}"
        case "cell":
            return f"{draw(st.sampled_from(['misprogram', 'misread']))}:{base + draw(st.integers(0, SIZE - 1)):#x}"
        case _:
            return f"erase-hang:{draw(st.integers(0, 1))}"


def honest(bench: Bench, faults: list[str], *, may_fail: bool) -> None:
    """Flash. Success must mean that the flash holds the image, and a failure must say why."""
    image = make_image(bench.chip, SIZE)
    failure: BridgedError | None = None
    try:
        result = bench.run("flash", image, discard_outside=True)
    except BridgedError as error:
        failure = error
    if failure is None:
        assert bench.holds(image), f"{faults}: a false success"
        assert result.evidence == "full"
    else:
        assert may_fail, f"{faults}: {failure.code} {failure.message}; {[e.reason for e in bench.events(Retried)]}"
        assert failure.code != "INTERNAL"
        assert failure.message
    assert bench.account.total_s < LONGEST_S, faults
    if not any(f.startswith(("erase-hang", "reset", "hang", "late")) for f in faults):
        assert bench.account.violations == [], faults
    assert not bench.device.lines["boot0"]
    assert bench.device.lines["nrst"]


@SCALE
@given(st.data())
def test_one_transient_fault_anywhere_is_recovered_without_help(data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(list(PARTS)))
    fault = data.draw(faults_for(part))
    honest(one(part, [fault]), [fault], may_fail=False)


@SCALE
@given(st.data())
def test_any_number_of_faults_never_makes_a_false_success(data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(list(PARTS)))
    faults = data.draw(st.lists(faults_for(part), min_size=2, max_size=8))
    cells = [f.split(":")[1] for f in faults if f.startswith("mis")]
    assume(len(cells) == len(set(cells)))  # A wrong reading that undoes a wrong bit cannot be told from a right one.
    honest(one(part, faults), faults, may_fail=True)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("misprogram:0x08000010:0x01:*", errors.VerifyError),
        ("misread:0x08000210:0x01:*", errors.VerifyError),
        ("misread:0x08000010:0x01:*", errors.NotErased),
    ],
)
def test_a_permanent_fault_ends_in_its_error(part: str, fault: str, error: type[BridgedError]) -> None:
    bench = one(part, [fault])
    with pytest.raises(error):
        bench.run("flash", make_image(bench.chip, SIZE), discard_outside=True)
    assert bench.account.total_s < LONGEST_S


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ([f"nack:0x31:{n}:address" for n in range(40)], errors.Nack),
        ([f"erase-hang:{n}" for n in range(5)], errors.EraseTimeout),
    ],
)
def test_a_fault_that_comes_every_time_ends_in_its_error(part: str, faults: list[str], error: type[BridgedError]) -> None:
    bench = one(part, faults)
    with pytest.raises(error):
        bench.run("flash", make_image(bench.chip, SIZE), discard_outside=True)
    assert bench.account.total_s < LONGEST_S


@pytest.mark.parametrize("fault", ["lose:rx:300", "lose:tx:300", "flip:rx:300", "insert:rx:300:0x5a", "nack:0x11:3:address"])
def test_without_nrst_a_reading_session_recovers_by_filling_up(fault: str) -> None:
    device = Device(Bench("L476").chip, faults=[fault], rate_error=0.0)
    device.force_loader()
    account = Account()
    request = Request("read", Wiring(boot0_by_hand=True), "L476", address=0x08000000, length=2000, listen_s=0)
    result = run(session.run(request), device, account=account)
    assert result.data == b"\xff" * 2000


def test_a_link_that_is_bad_altogether_is_told_and_not_nursed() -> None:
    bench = one("L476", [f"lose:tx:{n}" for n in range(200, 4000, 7)])
    with pytest.raises(BridgedError) as caught:
        bench.run("flash", make_image(bench.chip, SIZE), discard_outside=True, wiring=WIRED)
    assert caught.value.code in {"UNSTABLE_LINK", "NO_REPLY", "NO_SYNC", "GARBLED", "NACK"}
    assert bench.account.total_s < LONGEST_S
