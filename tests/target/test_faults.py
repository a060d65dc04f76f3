"""Faults in virtual time: one transient accident anywhere is recovered without help; any number never makes a false success; a
fault that stays ends in an error that names it, within the times that the session states.

Each example runs a job over an older image and injects faults by position: bytes lost, flipped and added both ways,
ACKs lost, late and turned into NACKs, a target that resets or hangs, a word programmed or read wrong, an erase without an end.
``BRIDGED_FAULTS`` scales the number of examples (``make soak`` sets it); the default is for every day.
"""

from __future__ import annotations

import os
import random
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from bridged import errors
from bridged.errors import BridgedError
from bridged.events import Retried, SectorErased
from bridged.images.model import Image
from bridged.protocol.flow import Flow
from bridged.sim.device import Device, Mode
from bridged.sim.virtual import Account, run
from bridged.target import session
from bridged.target.dialogue import Dialogue
from bridged.target.request import Request, Wiring
from tests.target.bench import WIRED, Bench, make_image
from tests.target.kinds import (
    KINDS,
    PARTS,
    POWER_ONLY,
    POWERED,
    SIZE,
    bench_of,
    judge,
    overtime,
    run_kind,
    traffic_of,
)

EXAMPLES = int(os.environ.get("BRIDGED_FAULTS", "600"))
SCALE = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
pytestmark = pytest.mark.timeout(120 + EXAMPLES // 20)


@cache
def traffic(part: str, name: str = "flash", wiring: Wiring = WIRED) -> tuple[int, int]:
    """Bytes in and out of an undisturbed run."""
    return traffic_of(part, name, wiring)


def one(part: str, faults: list[str]) -> Bench:
    return bench_of(part, faults)


@st.composite
def faults_for(draw: st.DrawFn, part: str, name: str = "flash") -> str:
    rx, tx = traffic(part, name)
    erase = "0x43" if part == "0x410" else "0x44"
    base = 0x08000000
    kind = draw(st.sampled_from((["rx"] if rx else []) + ["tx", "stage", "cell", "erase"]))
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
    assert overtime(bench) == "", faults
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
    assert overtime(bench) == ""


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
    assert overtime(bench) == ""


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
    assert overtime(bench) == ""


# --- every kind of job ------------------------------------------------------------------------------------------------


def ended(part: str, name: str, faults: list[str], wiring: Wiring = WIRED) -> tuple[str, Bench]:
    """The code of the error that the job ended in, empty for success. Whatever happened, its end must be honest."""
    bench = bench_of(part, faults)
    error: BridgedError | None = None
    result = None
    try:
        result = run_kind(bench, name, wiring)
    except BridgedError as caught:
        error = caught
    assert judge(bench, name, result, error) == "", (part, name, faults)
    return error.code if error else "", bench


@SCALE
@given(st.data())
def test_one_transient_fault_in_any_kind_of_job_is_recovered_without_help(data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(list(PARTS)))
    name = data.draw(st.sampled_from(list(KINDS)))
    fault = data.draw(faults_for(part, name))
    assume(not fault.startswith("misread") or name != "read")  # Two readings agree that were both right, or the first was not.
    assume(name != "reset into the loader" or not fault.startswith("hang:rx:4"))  # It hangs after its last answer.
    code, bench = ended(part, name, [fault])
    assert code == "", (part, name, fault)
    assert name != "ensure, there already" or not bench.device.stats.erases, (part, fault)  # One bad reading is no reason.


@SCALE
@given(st.data())
def test_any_number_of_faults_in_any_kind_of_job_never_makes_a_false_success(data: st.DataObject) -> None:
    part = data.draw(st.sampled_from(list(PARTS)))
    name = data.draw(st.sampled_from(["verify", "ensure, there already", "flash and keep", "erase", "reset"]))
    faults = data.draw(st.lists(faults_for(part, name), min_size=2, max_size=8))
    cells = [f.split(":")[1] for f in faults if f.startswith("mis")]
    assume(len(cells) == len(set(cells)))
    ended(part, name, faults)


@pytest.mark.parametrize("wiring", [POWERED, POWER_ONLY], ids=["with NRST", "without NRST"])
@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize("part", ["0x410", "L476", "H743"])
def test_a_supply_that_fails_is_switched_on_again_and_the_job_goes_on(part: str, name: str, wiring: Wiring) -> None:
    rx, _ = traffic(part, name, wiring)
    last = rx - (name == "reset into the loader")  # What happens after its last answer nobody sees.
    for position in range(0, last, max(1, last // 12)):
        assert ended(part, name, [f"power:rx:{position}"], wiring)[0] == "", position


def test_the_power_is_cycled_only_where_nothing_cheaper_helped() -> None:
    code, bench = ended("L476", "flash", ["hang:rx:300"], POWERED)
    assert (code, bench.device.stats.power_cycles) == ("", 2)  # That of the bench's own making.
    code, bench = ended("L476", "flash", ["power:rx:300"], POWERED)
    assert (code, bench.device.stats.power_cycles) == ("", 3)
    code, bench = ended("L476", "flash", ["power:rx:300"])
    assert code == "NO_SYNC"


# What a fault that stays is called. ``*``: any stage, and any of these is right.
DEAF = {"NO_REPLY", "GARBLED", "UNSTABLE_LINK", "NO_SYNC"}
STAYING = [
    (["nack:0x00:0:opcode:*"], {"WRONG_PARITY"}),
    (["nack:0x02:0:opcode:*"], {"NACK"}),
    (["nack:0x11:0:opcode:*"], {"READ_PROTECTED"}),
    (["nack:0x11:0:address:*"], {"LAYOUT_UNKNOWN", "NACK"}),
    (["nack:0x11:0:length:*"], {"LAYOUT_UNKNOWN", "NACK"}),
    *[([f"{way}:{command}:*"], DEAF) for way in ("lose", "hang", "flip") for command in ("0x00:0:opcode", "0x02:0:opcode")],
    *[([f"{way}:0x11:0:{stage}:*"], DEAF) for way in ("lose", "hang", "flip") for stage in ("opcode", "address", "length")],
    (["late:0x11:0:opcode:2:*"], DEAF),
    ([f"lose:tx:{n}" for n in range(0, 4000, 7)], DEAF),
    ([f"flip:tx:{n}" for n in range(0, 4000, 7)], DEAF),
    ([f"lose:rx:{n}" for n in range(0, 4000, 7)], DEAF),
    ([f"flip:rx:{n}" for n in range(0, 4000, 7)], DEAF | {"NACK"}),
    ([f"reset:rx:{n}" for n in range(0, 4000, 30)], DEAF | {""}),  # Commands that fit in between are enough for some jobs.
]
STAYING_WRITING = [
    (["nack:0x31:0:opcode:*"], {"NACK"}),
    (["nack:0x31:0:address:*"], {"NACK"}),
    (["hang:0x31:0:opcode:*"], DEAF),
    (["lose:0x31:0:address:*"], DEAF | {"VERIFY_MISMATCH"}),
    (["nack:ERASE:0:opcode:*"], {"NACK"}),
    (["nack:ERASE:0:list:*"], {"NACK"}),
    (["lose:ERASE:0:opcode:*"], DEAF),
    (["hang:ERASE:0:list:*"], {"ERASE_TIMEOUT"}),
    (["lose:ERASE:0:list:*"], {"ERASE_TIMEOUT"}),
    ([f"erase-hang:{n}" for n in range(12)], {"ERASE_TIMEOUT"}),
    (["misprogram:0x08000010:0x01:*"], {"VERIFY_MISMATCH"}),
    (["misprogram:0x08000210:0x01:*"], {"VERIFY_MISMATCH"}),
    (["misread:0x08000210:0x01:*"], {"VERIFY_MISMATCH"}),
    (["misread:0x08000010:0x01:*"], {"NOT_ERASED"}),
]


@pytest.mark.parametrize(
    "name", ["flash", "flash and keep", "ensure, another image there", "verify", "read", "identify", "erase"]
)
@pytest.mark.parametrize("part", PARTS)
def test_a_fault_that_stays_ends_within_the_stated_bound_with_a_right_cause(part: str, name: str) -> None:
    table = STAYING + (STAYING_WRITING if KINDS[name].image == "new" else [])
    for texts, right in table:
        faults = [text.replace("ERASE", "0x43" if part == "0x410" else "0x44") for text in texts]
        code, bench = ended(part, name, faults)
        if name == "identify" and right & {"READ_PROTECTED", "LAYOUT_UNKNOWN"}:
            continue  # That is an answer: what is known of the part besides.
        assert code in right, (part, name, texts[0], code, [e.reason for e in bench.events(Retried)][-3:])


@pytest.mark.parametrize("part", PARTS)
def test_a_doctor_has_a_finding_for_a_fault_that_stays(part: str) -> None:
    for texts, _ in STAYING:
        bench = bench_of(part, texts)
        result = run_kind(bench, "doctor")
        assert result.findings[0]["level"] in ("problem", "warning"), (part, texts[0])
        assert overtime(bench) == ""
        assert bench.device.mode is Mode.APPLICATION


# --- what a power cut tears ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", [0, 1, 2], ids=["vectors", "witness", "another"])
@pytest.mark.parametrize("kind", ["resumed", "flash", "ensure"])
@pytest.mark.parametrize(("name", "how"), [("L476", "program"), ("G071", "erase"), ("H743", "program")])
def test_a_word_that_was_torn_is_erased_and_ends_no_job(name: str, kind: str, how: str, torn: int) -> None:
    """ECC flash: reading it silences the loader until a reset, each time anew, until its sector is erased."""
    options = {"options": {"nBOOT_SEL": 0}} if name == "G071" else {}
    bench = Bench(name, settings={"ecc_faults": True, **options})
    memory = bench.device.memory
    sectors = memory.map.sectors[:4]
    pieces = [(s.address, random.Random(s.code).randbytes(600)) for s in sectors[1:]]
    image = make_image(bench.chip, 600).merged_with(Image.of(pieces))
    barriers: list[bytes] = []
    bench.run("flash", image, barrier=lambda step: barriers.append(step.kept))
    sector = sectors[torn]
    if how == "program":
        memory.erase(sector)
        memory.interrupt_program(sector.address, image.read(sector.address, 256), 0.0)
    else:
        memory.interrupt_erase(sector, 0.3)
    assert memory.torn
    before = dict(bench.device.stats.erases)
    usual_s = bench.account.total_s
    kept = barriers[0] if kind == "resumed" else b""
    result = bench.run("ensure" if kind == "ensure" else "flash", image, kept, discard_outside=True)
    assert result.evidence == "full"
    assert bench.holds(image)
    assert not memory.torn
    assert bench.device.stats.erases[sector.code] == before[sector.code] + 1
    assert bench.account.total_s < usual_s + 25


def test_a_torn_word_beside_the_image_is_lost_only_if_the_job_says_so() -> None:
    bench = Bench("L476", settings={"ecc_faults": True})
    memory = bench.device.memory
    memory.interrupt_program(0x08000400, b"neighbour" * 8, 0.0)
    image = make_image(bench.chip, 600)
    with pytest.raises(errors.OutsideUnreadable, match="cannot be read"):
        bench.run("flash", image)
    assert not bench.device.stats.erases
    bench.run("flash", image, discard_outside=True)
    assert bench.holds(image)


def test_a_stray_byte_where_a_torn_word_is_looked_for_is_recovered() -> None:
    for at in range(90, 130):
        honest(one("L476", [f"insert:rx:{at}:0x0"]), [f"insert:rx:{at}:0x0"], may_fail=False)


@pytest.mark.parametrize("name", ["F407", "L476"])
def test_a_link_that_alters_what_it_reads_leaves_no_first_erase_unwatched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the part: no neighbour is given up for a torn word where it is the line that cannot be believed."""
    bench, read, altered = Bench(name), Dialogue.read, 0

    def reading(self: Dialogue, address: int, count: int, **how: Any) -> Flow[bytes]:
        nonlocal altered
        data: bytes = yield from read(self, address, count, **how)
        if address == second.address and count > 4:
            altered += 1
            data = bytes([data[0] ^ altered]) + data[1:]
        return data

    second = bench.device.memory.map.sectors[1]
    monkeypatch.setattr(Dialogue, "read", reading)
    with pytest.raises(errors.UnstableLink):
        bench.run("flash", make_image(bench.chip, 1000))
    assert altered
    assert not bench.events(SectorErased)
