"""Readout protection as sessions in virtual time, and every fault at every position of what protects or unprotects."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from bridged import errors
from bridged.chips.model import Range
from bridged.chips.option_rows import LAYOUTS
from bridged.errors import BridgedError
from bridged.sim.loader import Timing
from bridged.target.protection import unprotect_wait_s
from bridged.target.request import Past, Request
from bridged.target.wishes import wishes_of
from tests.target.bench import WIRED, Bench, make_image
from tests.target.protection_bench import CONSENT, FAST, PARTS, WHOLE, ask, block, one, unharmed

# --- readout protection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", [*PARTS, "L476", "H743"])
def test_protect_and_unprotect(part: str) -> None:
    bench = one(part)
    result = ask(bench, "protect")
    assert (result.changed, result.protected, bench.device.memory.rdp) == (True, True, 1)
    assert [b.state for b in bench.account.barriers] == ["protecting", "erased"]
    unharmed(bench)
    assert bench.boots()
    again = ask(bench, "protect")
    assert (again.changed, again.protected) == (False, True)
    assert bench.account.barriers == []

    result = ask(bench, "unprotect", **CONSENT)
    assert (result.changed, result.protected, bench.device.memory.rdp) == (True, False, 0)
    memory = bench.device.memory
    assert memory.blank(memory.base, memory.end)
    assert [b.state for b in bench.account.barriers] == ["erasing", "erased"]
    assert bench.account.barriers[0].hazard_s == unprotect_wait_s(bench.chip) >= 2 * bench.chip.mass_erase_max_s
    assert bench.account.overruns == 0
    unharmed(bench)

    again = ask(bench, "unprotect", **CONSENT)
    assert not again.changed
    assert bench.account.barriers == []


def test_after_both_acks_nothing_is_sent_and_no_line_moves_for_twice_the_worst_case() -> None:
    bench = one("F407", rdp=1, timing=Timing(mass_erase_s=60.0))
    moved: list[float] = []
    set_lines = bench.device.set_lines

    def watch(at_ns: int, **levels: Any) -> None:
        moved.append(at_ns / 1e9)
        set_lines(at_ns, **levels)

    bench.device.set_lines = watch  # type: ignore[method-assign]
    ask(bench, "unprotect", **CONSENT)
    (start,) = [at / 1e9 for at, seconds in bench.account.hazards if seconds == unprotect_wait_s(bench.chip)][:1]
    assert not [at for at in moved if start < at < start + 2 * bench.chip.mass_erase_max_s]
    assert bench.device.memory.rdp == 0
    assert bench.account.overruns == 0
    unharmed(bench)


@pytest.mark.parametrize("kind", ["unprotect", "flash"])
def test_removing_readout_protection_takes_its_consent_and_no_protected_range(kind: str) -> None:
    bench = one("F407", rdp=1)
    params: dict[str, Any] = {"unprotect": True} if kind == "flash" else {}
    image = make_image(bench.chip, 700) if kind == "flash" else None
    with pytest.raises(errors.ConsentMissing) as caught:
        wishes_of(kind, params)
    assert "erases the whole flash" in caught.value.message
    with pytest.raises(errors.NotAllowed):
        ask(bench, kind, image, protect_ranges=(Range(0x080E0000, 0x080E0001),), **params, **CONSENT)
    assert (bench.device.memory.rdp, bench.device.stats.mass_erases) == (1, 0)
    assert bench.account.barriers == []


def test_write_protection_stays_when_readout_protection_goes_and_the_report_says_so() -> None:
    bench = one("F407")
    ask(bench, "protect", what="write", sectors="2")
    ask(bench, "protect")
    ask(bench, "unprotect", **CONSENT)
    assert bench.device.memory.blank(bench.device.memory.base, bench.device.memory.end)
    assert ask(bench, "option-bytes").options["before"]["write_protected"] == ["0x08008000..0x0800bfff"]


def test_option_bytes_of_a_protected_part_cannot_be_read_and_that_is_said() -> None:
    bench = one("F407", rdp=1)
    asked: list[tuple[str, dict[str, Any]]] = [
        ("option-bytes", {}),
        ("option-bytes", {"set": "BOR_LEV:1"}),
        ("protect", {"what": "write", "sectors": "1"}),
        ("unprotect", {"what": "write"}),
    ]
    for kind, params in asked:
        with pytest.raises(errors.ReadProtected):
            ask(bench, kind, **params)


def test_an_erase_that_never_ends_is_told_and_the_target_stays_protected() -> None:
    bench = one("F407", faults=("erase-hang:0", "erase-hang:1", "erase-hang:2"), rdp=1)
    with pytest.raises(errors.ProtectionUnchanged):
        ask(bench, "unprotect", **CONSENT)
    assert bench.device.memory.rdp == 1
    assert bench.account.violations  # Its time was over: twice the worst case, and once more for each attempt.
    assert bench.account.total_s < 3 * (unprotect_wait_s(bench.chip) + 10) + 30


# --- every fault at every position -----------------------------------------------------------------------------------


JOBS: dict[str, tuple[str, dict[str, Any], int]] = {
    "option write": ("option-bytes", {"set": "BOR_LEV:1"}, 0),
    "write protect": ("protect", {"what": "write", "sectors": "1"}, 0),
    "write unprotect": ("unprotect", {"what": "write"}, 0),
    "protect": ("protect", {}, 0),
    "unprotect": ("unprotect", CONSENT, 1),
}


STEP = 1 if int(os.environ.get("BRIDGED_FAULTS", "0")) > 1000 else 3  # `make soak` takes every position of every kind.


def prepared(job: str, faults: tuple[str, ...] = ()) -> Bench:
    bench = one("F407", faults, rdp=JOBS[job][2], timing=FAST, flash_bytes=512 * 1024)
    if job == "write unprotect":
        bench.device.memory.protect({1, 2})
        bench.device.memory.load_options()
    return bench


def done(job: str, bench: Bench) -> bool:
    memory = bench.device.memory
    match job:
        case "option write":
            return LAYOUTS[0x413].get(block(bench), "BOR_LEV") == 1 and memory.rdp == 0
        case "write protect":
            return memory.protected == {1}
        case "write unprotect":
            return memory.protected == set()
        case "protect":
            return memory.rdp == 1
        case _:
            return memory.rdp == 0 and memory.blank(memory.base, memory.end)


def honest(job: str, bench: Bench, fault: str) -> str:
    """The code of the error that it ended with, empty for a success, which must be one."""
    kind, params, _ = JOBS[job]
    try:
        result = ask(bench, kind, **params)
    except BridgedError as error:
        return error.code
    assert done(job, bench), f"{fault}: a false success"
    assert result.changed
    return ""


@cache
def traffic(job: str) -> tuple[int, int]:
    bench = prepared(job)
    kind, params, _ = JOBS[job]
    ask(bench, kind, **params)
    assert done(job, bench)
    return bench.device.stats.bytes_in, bench.device.stats.bytes_out


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("way", ["lose:rx", "flip:rx", "insert:rx", "lose:tx", "flip:tx", "insert:tx"])
def test_a_fault_at_every_position_never_makes_a_false_success_nor_a_reset_within_the_hazard(job: str, way: str) -> None:
    rx, tx = traffic(job)
    failed = []
    count = rx if way.endswith("rx") else tx
    # The verification at the end reads a lot and is like any other reading; what changes something comes before.
    for position in range(0, min(count, 400), 1 if way.startswith("lose:rx") else STEP):
        fault = f"{way}:{position}" + {"flip": ":0x10", "insert": ":0x79"}.get(way.partition(":")[0], "")
        bench = prepared(job, (fault,))
        problem = honest(job, bench, fault)
        if problem:
            failed.append((fault, problem))
        assert bench.device.stats.hazard_resets == [], fault
        assert bench.account.violations == [], fault
        assert bench.account.overruns == 0 or "insert" in fault, fault
        assert bench.device.memory.rdp in (0, 1)
        unharmed(bench)
    assert failed == [], "one transient fault is recovered without help"


@pytest.mark.parametrize("job", JOBS)
def test_a_target_that_resets_or_hangs_at_any_byte_ends_defined(job: str) -> None:
    """Its own reset in the middle of a change is nobody's fault here; what is said afterwards must be true all the same."""
    rx, _ = traffic(job)
    for position in range(0, min(rx, 160), STEP):
        for way in ("reset", "hang"):
            bench = prepared(job, (f"{way}:rx:{position}",))
            assert honest(job, bench, f"{way}:{position}") != "INTERNAL"
            assert bench.account.violations == [], (way, position)
            assert not bench.device.lines["boot0"]


# --- wishes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "params", "says"),
    [
        ("option-bytes", {"set": "IWDG_SW"}, "NAME:VALUE"),
        ("option-bytes", {"set": "A:1,a:2"}, "twice"),
        ("option-bytes", {"set": "A:1", "raw": "0x1:00", "fields": "A"}, "one of them"),
        ("option-bytes", {"raw": "0x1FFFC000:EF"}, "fields="),
        ("option-bytes", {"fields": "A"}, "fields="),
        ("option-bytes", {"raw": "0x1FFFC000:E", "fields": "A"}, "ADDR:HEX"),
        ("protect", {"what": "write"}, "name them"),
        ("protect", {"sectors": "1"}, "name them"),
        ("protect", {"what": "all"}, "readout or write"),
        ("protect", {"what": "write", "sectors": "5-2"}, "lower one first"),
        ("protect", {"what": "write", "sectors": "0-9999"}, "at most"),
        ("protect", {"what": "write", "sectors": "x"}, "numbers such as"),
        ("flash", {"unprotect": True, "force": "erase-everything", "entry": "one-shot"}, "one-shot"),
    ],
)
def test_wishes_that_cannot_be_understood(kind: str, params: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.BadRequest) as caught:
        wishes_of(kind, params)
    assert says in caught.value.message


def test_wishes_survive_their_way_to_the_session_process() -> None:
    for kind, params in (
        ("option-bytes", {"raw": "0x1FFFC000:EFAA,0x1FFFC008:FF", "fields": "BOR_LEV,nWRP"}),
        ("option-bytes", {"set": "BOR_LEV:0x1,WDG_SW=0"}),
        ("protect", {"what": "write", "sectors": "0,2-4"}),
        ("ensure", WHOLE),
    ):
        wishes = wishes_of(kind, params)
        request = Request(kind, WIRED, wishes=wishes, past=Past(content="ab", age_s=1.5))
        assert Request.from_dict(request.to_dict()) == request
        assert request.wishes == replace(wishes)
