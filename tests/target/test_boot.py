"""How a job leaves its target (``boot``): started by a reset, a power cycle or Go, or not at all, and then who must do what.

Parts with an empty check remember from power-on that their flash was empty, and enter their loader at every reset until their
power is cycled (AN2606): the simulator does so. What is not the image's fault is no failure and no reason for a rollback.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from bridged import errors
from bridged.events import Warned
from bridged.protocol.flow import Barrier
from bridged.sim.application import Behaviour
from bridged.sim.device import Mode
from bridged.sim.virtual import PowerCut
from bridged.target.expect import Conversation
from bridged.target.kept import NOTHING_KEPT, decode_kept, was_empty
from bridged.target.request import Boot, Wiring
from tests.target.bench import WIRED, Bench, make_image
from tests.target.kinds import POWER_ONLY, POWERED

G0 = {"options": {"nBOOT_SEL": 0}}
TRIGGER = Behaviour(trigger=b"bootloader")
BY_TRIGGER: dict[str, Any] = {"wiring": Wiring(), "enter_by": b"bootloader\n"}
NO_GO = ["nack:0x21:0:opcode:*"]


@dataclass(frozen=True)
class Row:
    """``used``: an older application is in flash, and was when the power came on."""

    what: str
    kind: str
    boot: Boot
    part: str = "G071"
    device: dict[str, Any] = field(default_factory=dict)
    wiring: Wiring = WIRED
    used: bool = False
    warned: tuple[str, ...] = ()
    runs: bool = True


ROWS = (
    Row("a used part", "flash", Boot.RESET, used=True),
    Row("a part without an empty check", "flash", Boot.RESET, "F407"),
    Row("the first flash of an empty part", "flash", Boot.GO, warned=("EMPTY_FLAG",)),
    Row("the same, with a power line", "flash", Boot.POWER_CYCLE, wiring=POWERED),
    Row("the same, with nothing but a power line", "flash", Boot.POWER_CYCLE, wiring=POWER_ONLY),
    Row(
        "the same, and Go is refused",
        "flash",
        Boot.NEEDS_POWER_CYCLE,
        device={"faults": NO_GO},
        warned=("NEEDS_POWER_CYCLE",),
        runs=False,
    ),
    Row("an empty part that is only identified", "identify", Boot.EMPTY, warned=("NOT_STARTED",), runs=False),
    Row("an empty part without an empty check", "identify", Boot.RESET, "F407", runs=False),
)


@pytest.mark.parametrize("row", ROWS, ids=[row.what for row in ROWS])
def test_a_job_says_how_it_left_its_target(row: Row) -> None:
    bench = Bench(row.part, {**(G0 if row.part == "G071" else {}), **row.device})
    image = make_image(bench.chip, 3000)
    if row.used:
        bench.put(make_image(bench.chip, 3000, seed=5))
    result = bench.run(row.kind, image if row.kind == "flash" else None, wiring=row.wiring)
    assert result.boot is row.boot
    assert result.to_dict()["boot"] == row.boot.value
    assert tuple(w.code for w in bench.events(Warned)) == row.warned
    assert (bench.device.mode is Mode.APPLICATION) is row.runs
    assert result.boot.started is (row.boot not in (Boot.EMPTY, Boot.NEEDS_POWER_CYCLE, Boot.NEEDS_RESET))


@pytest.mark.parametrize("kind", ["ensure", "verify", "identify", "reset", "doctor"])
def test_every_later_job_starts_it_again_until_its_power_was_cycled(kind: str) -> None:
    bench = Bench("G071", G0)
    image = make_image(bench.chip, 3000)
    assert bench.run("flash", image).boot is Boot.GO
    wanted = image if kind in ("ensure", "verify") else None
    assert bench.run(kind, wanted).boot is Boot.GO
    assert bench.device.mode is Mode.APPLICATION
    assert bench.run(kind, wanted, wiring=POWERED).boot is Boot.POWER_CYCLE
    assert bench.run(kind, wanted).boot is Boot.RESET


@pytest.mark.parametrize("faults", [NO_GO, []], ids=["Go is refused", "started by Go it says something else"])
def test_an_image_that_only_a_power_cycle_can_start_is_not_judged(faults: list[str]) -> None:
    bench = Bench("G071", {**G0, "faults": faults})
    image = make_image(bench.chip, 3000)
    result = bench.run("flash", image, health=Conversation(expect="another banner", within_s=0.5))
    assert (result.evidence, result.boot, result.health) == ("full", Boot.NEEDS_POWER_CYCLE, "")
    assert "NEEDS_POWER_CYCLE" in {w.code for w in bench.events(Warned)}
    assert bench.run("verify", image, wiring=POWERED, health=Conversation(expect="bench")).health == "passed"


def test_one_that_can_be_started_is() -> None:
    bench = Bench("G071", G0)
    with pytest.raises(errors.Unhealthy):
        bench.run("flash", make_image(bench.chip, 3000), wiring=POWERED, health=Conversation(expect="another", within_s=0.5))


@pytest.mark.parametrize("part_done", [0.1, 0.5, 1.0])
def test_a_job_that_is_resumed_knows_that_its_part_was_empty(part_done: float) -> None:
    """Its flash says nothing about that any more: empty in the middle of a flash, or complete already."""
    bench = Bench("G071", G0)
    image = make_image(bench.chip, 3000)
    kept, first = b"", 0

    def barrier(step: Barrier) -> None:
        nonlocal kept, first
        if not kept:
            kept, first = step.kept, calm.account.all.sends

    calm = Bench("G071", G0)
    calm.run("flash", image, barrier=barrier)
    last = calm.account.all.sends - 3  # Read Memory and Go: all is proven.
    kept = b""
    with pytest.raises(PowerCut):
        bench.run("flash", image, barrier=barrier, cut_after_exchange=first + 1 + int((last - first - 1) * part_done))
    assert was_empty(kept)
    assert decode_kept(kept).outside is None
    result = bench.run("flash", image, kept)
    assert (result.was_empty, result.boot) == (True, Boot.GO)
    assert bench.device.mode is Mode.APPLICATION


def test_a_part_that_is_empty_because_its_job_erased_it_was_not_empty() -> None:
    bench = Bench("G071", G0)
    bench.put(make_image(bench.chip, 3000, seed=5))
    image = make_image(bench.chip, 3000)
    kept = b""

    def barrier(step: Barrier) -> None:
        nonlocal kept
        kept = kept or step.kept
        if step.state == "erased":
            raise PowerCut

    with pytest.raises(PowerCut):
        bench.run("flash", image, barrier=barrier)
    assert not was_empty(kept)
    result = bench.run("flash", image, kept)
    assert (result.was_empty, result.boot) == (False, Boot.RESET)


def test_what_cannot_be_understood_was_not_empty() -> None:
    assert not was_empty(b"")
    assert not was_empty(NOTHING_KEPT)
    assert not was_empty(b"BRKEPT2\n\x01")
    assert not was_empty(b"anything")


# --- two banks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["F429", "L476", "G474"])
def test_a_loader_that_chooses_the_bank_is_told_before_the_erase_and_what_runs_is_what_it_chose(part: str) -> None:
    """BFB2: at each start bank 2 comes first, where a stack pointer is there (AN2606), however well bank 1 was flashed."""
    bench = Bench(part, {"options": {"BFB2": 1}})
    second = next(s.address for s in bench.device.memory.map.sectors if s.bank == 2)
    image = make_image(bench.chip, 3000)
    assert not bench.boots(), "no bank holds anything: the loader stays"
    assert bench.device.mode is Mode.MEASURING
    result = bench.run("flash", image)
    assert (result.evidence, result.boot, result.banner) == ("full", Boot.RESET, "bench application")
    assert ["there is none now" in w.text for w in bench.events(Warned) if w.code == "OTHER_BANK"] == [True]
    other = make_image(bench.chip, 3000, offset=second - bench.chip.flash_base, banner=b"the other bank")
    assert bench.run("flash", other).banner == "the other bank"
    with pytest.raises(errors.Unhealthy, match="the other bank"):
        bench.run("flash", make_image(bench.chip, 2000), health=Conversation(expect="bench", within_s=0.5))
    assert ["does not start" in w.text for w in bench.events(Warned) if w.code == "OTHER_BANK"] == [True]


# --- nothing is wired ---------------------------------------------------------------------------------------------------


def triggered(part: str = "L476", **settings: Any) -> Bench:
    """Its application jumps into the loader when it is asked; no line could do so."""
    bench = Bench(part, {"application": TRIGGER, **settings})
    bench.put(make_image(bench.chip, 3000, seed=5))
    assert bench.boots()
    return bench


@pytest.mark.parametrize("kind", ["identify", "verify", "flash"])
def test_an_application_that_was_asked_to_jump_into_the_loader_is_started_again(kind: str) -> None:
    bench = triggered()
    image = make_image(bench.chip, 3000, seed=5)
    result = bench.run(kind, image if kind != "identify" else None, one_shot=True, **BY_TRIGGER)
    assert result.boot is Boot.GO
    assert bench.device.mode is Mode.APPLICATION


@pytest.mark.parametrize(
    ("loader_id", "boot", "warned"),
    [
        (0x92, Boot.GO, []),
        (0xD3, Boot.GO, ["NEEDS_POWER_CYCLE"]),
        (0xD2, Boot.NEEDS_RESET, ["NOT_STARTED"]),
        (0x90, Boot.NEEDS_RESET, ["GET_COUNT_ODD", "NOT_STARTED"]),
    ],
)
def test_go_of_a_loader_version_that_has_its_limits(loader_id: int, boot: Boot, warned: list[str]) -> None:
    """Supply mode locked; Go broken; its first ACK missing, where waiting for it would leave the loader in mid-command."""
    bench = triggered("H743", loader_id=loader_id)
    result = bench.run("identify", None, **BY_TRIGGER)
    assert result.boot is boot
    assert [w.code for w in bench.events(Warned)] == warned
    assert bench.device.mode is (Mode.APPLICATION if boot is Boot.GO else Mode.LOADER)
    assert bench.device.stats.commands[0x21] == (boot is Boot.GO)


@pytest.mark.parametrize(
    ("kind", "request_", "error"),
    [
        ("flash", {}, errors.EntryWouldBeLost),
        ("verify", {}, errors.VerifyError),
        ("read", {"address": 0x40000000, "length": 16}, errors.Nack),
        ("erase", {"address": 0x08000004, "length": 4}, errors.BadRequest),
    ],
)
def test_so_it_is_after_a_job_that_was_refused_or_failed(
    kind: str, request_: dict[str, Any], error: type[errors.BridgedError]
) -> None:
    bench = triggered()
    image = make_image(bench.chip, 3000) if kind in ("flash", "verify") else None
    with pytest.raises(error):
        bench.run(kind, image, **BY_TRIGGER, **request_)
    bench.device.advance(bench.device.now_ns + 100_000_000)
    assert not bench.device.stats.erases
    assert bench.device.mode is Mode.APPLICATION


def test_where_the_loader_may_be_in_the_middle_of_a_command_nothing_is_sent_and_a_person_is_told() -> None:
    bench = triggered()
    bench.device.faults.add("hang:0x11:0:address")
    with pytest.raises(errors.LoaderError) as caught:
        bench.run("verify", make_image(bench.chip, 3000), **BY_TRIGGER)
    assert caught.value.facts["boot"] == "needs_reset"
    assert [w.code for w in bench.events(Warned)][-1] == "NOT_STARTED"


def test_a_part_that_a_person_put_into_its_loader_stays_there_and_a_failed_job_says_so() -> None:
    bench = Bench("L476")
    bench.put(make_image(bench.chip, 3000, seed=5))
    bench.device.force_loader()
    with pytest.raises(errors.VerifyError) as caught:
        bench.run("verify", make_image(bench.chip, 3000), wiring=Wiring(boot0_by_hand=True))
    assert caught.value.facts["boot"] == "needs_reset"
    assert [w.code for w in bench.events(Warned)][-1] == "NOT_STARTED"
    assert bench.device.mode is Mode.LOADER


def test_where_the_loader_never_answered_nobody_is_told_that_it_stays_there() -> None:
    bench = Bench("L476")
    bench.put(make_image(bench.chip, 3000, seed=5))
    assert bench.boots()
    with pytest.raises(errors.BridgedError) as caught:
        bench.run("verify", make_image(bench.chip, 3000), wiring=Wiring(boot0_by_hand=True))
    assert "boot" not in caught.value.facts
    assert bench.events(Warned) == []
