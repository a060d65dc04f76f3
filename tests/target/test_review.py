"""What a second pair of eyes found: situations at the edge of the promises, each as a session in virtual time."""

from __future__ import annotations

import itertools
import os
import socket
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridged import chips, errors
from bridged.chips.model import Range
from bridged.events import Retried, SectorErased, Synced, Warned
from bridged.images.model import Image
from bridged.images.plan import make_plan
from bridged.protocol.flow import Barrier, Drain, Flow, Hazard, Receive, Send, SetFormat, SetLines, Step
from bridged.sim import virtual
from bridged.sim.device import Mode
from bridged.sim.loader import Timing
from bridged.sim.virtual import PowerCut
from bridged.target import session
from bridged.target.board import Board
from bridged.target.kept import Kept, decode_kept, encode_kept
from bridged.target.lines import NoLines
from bridged.target.request import Request, Wiring
from bridged.target.uart import Uart
from bridged.target.worker import Control, Driver
from tests.target.bench import WIRED, Bench, make_image

POWERED = replace(WIRED, has_power=True)
UNWIRED = Wiring()
SYNC = b"\x7f"


# --- P9: the journal knows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["misprogram:0x08001000", "lose:0x31:3:data", "misprogram:0x08000010"])
def test_every_erase_is_covered_by_what_the_journal_was_told(fault: str) -> None:
    """After a SIGKILL of both processes only the journal is left: a repair that erases counts as well."""
    bench = Bench("L476", {"faults": [fault]})
    image = make_image(bench.chip, 12_000)
    told_s = 0.0
    uncovered: list[str] = []

    def before(number: int, step: Step) -> None:
        nonlocal told_s
        if isinstance(step, Barrier):
            told_s = step.hazard_s
        elif isinstance(step, Hazard) and step.seconds > told_s:
            uncovered.append(f"step {number}: a hazard of {step.seconds} s, the journal has {told_s} s")

    flow = session.run(Request("flash", WIRED, "L476"), image)
    virtual.run(flow, bench.device, account=bench.account, before=before)
    assert bench.holds(image)
    assert uncovered == []
    assert told_s == 0, "in the end no hazard is left in the journal"


# --- P10: one-shot ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flash", "erase"])
@pytest.mark.parametrize("fault", ["lose:0x44:2:list", "flip:0x44:1:opcode", "lose:0x11:12:length"])
def test_one_shot_never_resets_after_the_first_erase(kind: str, fault: str) -> None:
    """Where entry hangs on the empty flag or the application, a reset as a recovery step would lose the target."""
    bench = Bench("L476", {"faults": [fault]})
    image = make_image(bench.chip, 12_000)
    erased = False
    resets = 0

    def before(_number: int, step: Step) -> None:
        nonlocal erased, resets
        erased = erased or isinstance(step, Hazard)
        if erased and isinstance(step, SetLines) and step.boot0:
            resets += 1

    what: dict[str, Any] = {"address": 0x08000000, "length": 0x4000} if kind == "erase" else {}
    request = Request(kind, WIRED, "L476", one_shot=True, **what)
    with suppress(errors.BridgedError):
        virtual.run(session.run(request, image), bench.device, account=bench.account, before=before)
    assert erased
    assert resets == 0


# --- P3, P4: no success without the deed -------------------------------------------------------------------------------


@pytest.mark.parametrize("wiring", [UNWIRED, Wiring(has_boot0=True, leave=(SetLines(boot0=False),))])
def test_a_reset_that_nothing_can_do_is_no_success(wiring: Wiring) -> None:
    bench = Bench("L476")
    with pytest.raises(errors.BridgedError, match="NRST"):
        bench.run("reset", wiring=wiring)


def test_a_target_that_stays_in_its_loader_is_said_to() -> None:
    """Without NRST and power nobody can bring it back; a person has to know."""
    bench = Bench("L476")
    bench.put(make_image(bench.chip, 6000))
    bench.device.force_loader()
    bench.run("identify", wiring=UNWIRED)
    assert bench.device.mode is Mode.LOADER
    assert "NOT_STARTED" in {w.code for w in bench.events(Warned)}


def test_an_application_that_starts_by_a_power_cycle_is_heard() -> None:
    """Its own format has to be set before the power comes back, or its banner is garbage."""
    bench = Bench("G071", {"options": {"nBOOT_SEL": 0}})
    result = bench.run("flash", make_image(bench.chip, 6000), wiring=POWERED)
    assert result.banner == "bench application"


def test_the_application_runs_after_the_second_job_on_a_virgin_part() -> None:
    """Until its power is cycled a part that was empty at power-on enters its loader at every reset (AN2606)."""
    bench = Bench("G071", {"options": {"nBOOT_SEL": 0}})
    image = make_image(bench.chip, 6000)
    bench.run("flash", image)
    bench.run("ensure", image)
    assert bench.device.mode is Mode.APPLICATION
    assert "EMPTY_FLAG" in {w.code for w in bench.events(Warned)}


def test_a_virgin_part_that_is_only_identified_stays_in_its_loader() -> None:
    """Go into blank flash would end in a lockup."""
    bench = Bench("G071", {"options": {"nBOOT_SEL": 0}})
    bench.run("identify")
    assert bench.device.mode is not Mode.DEAD
    assert "NOT_STARTED" in {w.code for w in bench.events(Warned)}


def test_nothing_is_started_after_everything_was_erased() -> None:
    bench = Bench("L476")
    bench.put(make_image(bench.chip, 6000))
    bench.device.force_loader()
    bench.run("erase", wiring=UNWIRED, one_shot=True)
    assert bench.device.mode is Mode.LOADER


# --- resumption ----------------------------------------------------------------------------------------------------------


def test_a_resumed_ensure_restores_what_was_kept_before_it_says_so() -> None:
    """The image's own bytes can be whole while bytes that were kept from the same sector are not back yet."""
    bench = Bench("F756")
    neighbour = Image.of([(0x08005000, b"calibration data" * 32)])
    bench.put(neighbour)
    # An image whose first block is blank: there is no vector block that would be written last.
    image = Image.of([(0x08000000, b"\xff" * 256 + b"firmware" * 32)])
    kept = b""

    def barrier(step: Barrier) -> None:
        nonlocal kept
        kept = step.kept or kept

    calm = Bench("F756")
    calm.put(neighbour)
    calm.run("ensure", image, force=frozenset({"vectors"}))
    for cut in range(calm.account.all.sends):
        bench = Bench("F756")
        bench.put(neighbour)
        kept = b""
        try:
            bench.run("ensure", image, force=frozenset({"vectors"}), barrier=barrier, cut_after_exchange=cut)
        except PowerCut:
            if not kept or cut % 7:
                continue
            bench.uart = type(bench.uart)(bench.device)
            bench.uart.pause(60)
            bench.run("ensure", image, kept, force=frozenset({"vectors"}))
        assert bench.holds(image), cut
        assert bench.holds(neighbour), f"cut after exchange {cut}: what was kept is lost"


def test_a_resumed_job_is_refused_where_its_sectors_are_larger_now() -> None:
    """Somebody mends ``layout`` between the crash and the resumption: what was kept does not cover the new sectors."""
    bench = Bench("F76")
    neighbour = Image.of([(0x08006000, b"calibration data" * 32)])
    image = make_image(bench.chip, 6000)
    kept: list[bytes] = []
    bench.run("flash", image, barrier=lambda step: kept.append(step.kept), layout="dual")
    assert (
        bench.chip.flash_map(2 << 20, "dual").sectors[0].end
        < 0x08006000
        < bench.chip.flash_map(2 << 20, "single").sectors[0].end
    )

    bench = Bench("F76", {"layout": "single"})
    bench.put(neighbour)
    erased = dict(bench.device.stats.erases)
    with pytest.raises(errors.LayoutUnknown, match="submit it anew"):
        bench.run("flash", image, kept[0], layout="single")
    assert dict(bench.device.stats.erases) == erased
    bench.run("flash", image, layout="single")
    assert bench.holds(neighbour)


@given(st.binary(max_size=60))
def test_kept_bytes_that_are_damaged_are_a_typed_error(noise: bytes) -> None:
    bench = Bench("L476")
    plan = make_plan(make_image(bench.chip, 6000), bench.chip, bench.chip.flash_map(1 << 20, "dual")).keeping(None)
    whole = encode_kept(plan)
    assert decode_kept(whole) == Kept((Range(0x08000000, 0x08001800),), None)
    for damaged in (whole[:12] + noise, noise):
        with suppress(errors.CorruptImage):
            decode_kept(damaged)


# --- telling the truth ----------------------------------------------------------------------------------------------------


def test_what_the_application_said_before_the_reset_is_no_evidence() -> None:
    """A chatty application and a silent loader: BOOT0 works, the wires go elsewhere. The remedies differ."""
    bench = Bench("L476", {"timing": Timing(startup_s=60)})
    bench.uart.inbox += b"temperature 21.5 C\r\n" * 4
    flow = session.run(Request("identify", WIRED, "L476", startup_s=0.05))
    with pytest.raises(errors.NoSync):
        virtual.run(flow, bench.uart)


def test_what_was_said_before_the_reset_does_not_pass_for_a_start() -> None:
    bench = Bench("L476")
    bench.put(make_image(bench.chip, 6000))
    bench.uart.inbox += b"llo from the application before"
    result = virtual.run(session.run(Request("reset", WIRED, "L476")), bench.uart)
    assert result.banner == "bench application"


def test_a_line_that_fails_does_not_keep_the_others_from_going_idle() -> None:
    """BOOT0's relay box is gone: NRST is still pulsed, so that a target is not held or left where it is."""
    moved: list[SetLines] = []

    def before(_number: int, step: Step) -> None:
        if isinstance(step, SetLines):
            moved.append(step)
            if step.boot0 is not None:
                raise errors.LineUnavailable("its relay is gone")

    with pytest.raises(errors.LineUnavailable):
        virtual.run(session.run(Request("reset", WIRED)), Bench("L476").device, before=before)
    assert moved[-1].reset is False
    assert any(m.reset for m in moved)


@pytest.mark.parametrize("kind", ["identify", "flash"])
def test_a_port_that_is_unplugged_at_any_step_does_not_keep_its_lines_from_being_released(kind: str) -> None:
    """GPIO or a line box beside a USB adapter: bytes and formats raise from some step on, and the lines live."""
    image = make_image(chips.find("L476"), 600)
    count = 0
    for dies_at in itertools.chain(range(40), itertools.count(60, 50)):
        bench = Bench("L476")
        count = 0

        def before(number: int, step: Step, dies_at: int = dies_at) -> None:
            nonlocal count
            count = number
            if number >= dies_at and isinstance(step, Send | Receive | Drain | SetFormat):
                raise errors.PortGone("unplugged")

        wanted = image if kind == "flash" else None
        try:
            virtual.run(session.run(Request(kind, WIRED, "L476"), wanted), bench.device, before=before)
        except errors.PortGone:
            lines = bench.device.lines
            assert (lines["nrst"], lines["boot0"]) == (True, False), dies_at
            assert bench.device.mode is not Mode.LOADER
            continue
        break  # It ended before that step.
    assert count > 20


@pytest.mark.parametrize("error", [RuntimeError("a defect"), OSError(12, "no memory"), errors.PortGone("unplugged")])
def test_the_session_process_releases_the_target_after_any_error_of_a_step(error: Exception) -> None:
    """Also one that nobody foresaw: the flow hears of it, for only the flow can bring the target back."""
    moved: list[bool | None] = []

    class Wires(NoLines):
        def set(self, reset: bool | None = None, boot0: bool | None = None, power: bool | None = None) -> None:
            assert boot0 is power is None
            moved.append(reset)
            if reset is False and isinstance(error, errors.PortGone):
                raise error

    def flow() -> Flow[None]:
        try:
            yield Send(SYNC)
        except Exception:
            yield SetLines(reset=True)
            yield SetLines(reset=False)
            raise

    class Port(Uart):
        def write_all(self, data: bytes, timeout_s: float) -> None:
            raise error if data and timeout_s else AssertionError("nothing to send")

    master, slave = os.openpty()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    out = os.memfd_create("out")
    board = Board.create()
    try:
        driver = Driver(Port(slave, "pty", True, owned=False), Wires(), board, Control(theirs.fileno()), out)
        with pytest.raises(type(error)):
            driver.run(flow())
        assert moved == [True, False]
        assert board.lines_failed is isinstance(error, errors.PortGone), "the daemon has to know that lines did not obey"
    finally:
        board.close()
        for fd in (master, slave, out):
            os.close(fd)
        ours.close()
        theirs.close()


def test_sectors_erased_counts_what_was_erased() -> None:
    bench = Bench("L476")
    result = bench.run("flash", make_image(bench.chip, 12_000))
    assert result.sectors_erased == len(bench.events(SectorErased))


# --- P9 where the loader acknowledges an erase before it is over --------------------------------------------------------

EARLY: dict[str, dict[str, Any]] = {
    "H743": {"loader_id": 0x91},
    "G071": {"loader_id": 0xB3, "options": {"nBOOT_SEL": 0}},
}
# Flash size and unique id are read twice each; then the version is refused as a byte, and as the block around it.
VERSION_UNREADABLE = [f"nack:0x11:{number}:address" for number in range(4, 8)]


@pytest.mark.parametrize("faults", [[], VERSION_UNREADABLE], ids=["", "its version unreadable"])
@pytest.mark.parametrize("part", EARLY)
def test_everything_is_erased_before_the_reset_although_the_loader_answers_early(part: str, faults: list[str]) -> None:
    bench = Bench(part, {**EARLY[part], "faults": faults})
    memory = bench.device.memory
    memory.load_flash(bytes(bench.chip.flash_max_bytes))
    result = bench.run("erase")
    assert result.evidence == "full"
    assert (result.loader_id is None) is bool(faults)
    assert all(memory.blank(sector.address, sector.end) for sector in memory.map.sectors)
    assert bench.account.violations == []
    assert not memory.marginal
    assert "SLOW_ERASE" not in {warned.code for warned in bench.events(Warned)}, "it was we who waited"


@pytest.mark.parametrize("fault", ["flip:0x44:0:list", "flip:0x44:1:list:0x66"], ids=["garbage", "an ACK that became a NACK"])
@pytest.mark.parametrize("part", EARLY)
def test_a_damaged_early_answer_leads_to_no_reset_in_the_erase(part: str, fault: str) -> None:
    bench = Bench(part, {**EARLY[part], "faults": [fault]})
    bench.device.memory.load_flash(bytes(bench.chip.flash_max_bytes))
    image = make_image(bench.chip, 6000)
    bench.run("flash", image, discard_outside=True)
    assert bench.holds(image)
    assert bench.account.violations == []


# --- one flipped bit in the answer to Get ID ----------------------------------------------------------------------------

PID_BYTES = (18, 19)  # of all that the loader sends from its reset on: the ACK of the sync, 15 bytes of Get, ACK, count, these


def heard_at_sync(bench: Bench, kind: str, image: Image | None = None) -> list[int]:
    """How many bytes had come whenever Get ID was answered: the last is its ACK, and before it the product id."""
    heard: list[int] = []

    def report(event: object) -> None:
        if isinstance(event, Synced):
            heard.append(bench.account.all.bytes_in)

    bench.run(kind, image, report=report)
    return heard


@pytest.mark.parametrize("part", ["F756", "L476", "F407"])
@pytest.mark.parametrize("byte", PID_BYTES)
@pytest.mark.parametrize("bit", range(8))
def test_a_misread_product_id_does_not_choose_the_chip(part: str, byte: int, bit: int) -> None:
    bench = Bench(part, {"faults": [f"flip:tx:{byte}:{1 << bit:#04x}"]}, {"chip": ""})
    result = bench.run("identify")
    assert any(event.step == "identify" for event in bench.events(Retried)), "the fault struck elsewhere"
    assert (result.pid, result.family, result.flash_bytes) == (bench.chip.pid, bench.chip.family, bench.chip.flash_max_bytes)


@pytest.mark.parametrize("more", [[], ["lose:0x02:1:opcode"]], ids=["", "and an accident while it is confirmed"])
def test_after_a_misread_product_id_the_right_part_is_flashed(more: list[str]) -> None:
    bench = Bench("F756", {"faults": ["flip:tx:19:0x08", *more]}, {"chip": ""})
    image = make_image(bench.chip, 3000)
    result = bench.run("flash", image)
    assert bench.holds(image)
    assert (result.pid, result.evidence) == (0x449, "full")


def test_a_misread_that_looks_like_the_configured_part_is_found_out_before_anything_is_erased() -> None:
    bench = Bench("F756", {"faults": ["flip:tx:19:0x01"]}, {"chip": "0x448"})
    with pytest.raises(errors.WrongChip, match="0x449 answered"):
        bench.run("flash", make_image(bench.chip, 3000), force=frozenset({"vectors"}))
    assert not bench.device.stats.erases


def test_the_doctor_examines_the_part_that_answers_and_not_a_misreading() -> None:
    heard = heard_at_sync(Bench("L476", {}, {"chip": ""}), "doctor")
    bench = Bench("L476", {"faults": [f"flip:tx:{heard[0] - 2}:0x10"]}, {"chip": ""})
    codes = [finding["code"] for finding in bench.run("doctor").findings]
    assert any(event.step == "identify" for event in bench.events(Retried)), "the fault struck elsewhere"
    assert "DOCTOR_IDENTIFIED" in codes
    assert "DOCTOR_UNKNOWN_CHIP" not in codes


@pytest.mark.parametrize("chip", ["", "L476"])
@pytest.mark.parametrize("byte", [-3, -2])
def test_a_misread_product_id_after_a_reset_is_asked_for_again(chip: str, byte: int) -> None:
    image = make_image(chips.find("L476"), 3000)
    lost = "lose:0x31:1:data"
    heard = heard_at_sync(Bench("L476", {"faults": [lost]}, {"chip": chip}), "flash", image)
    assert len(heard) == 2, "once at the start, once after the lost ACK"
    bench = Bench("L476", {"faults": [lost, f"flip:tx:{heard[1] + byte}:0x01"]}, {"chip": chip})
    bench.run("flash", image)
    assert len(bench.events(Synced)) == 3
    assert bench.holds(image)
    assert bench.account.violations == []


def test_another_part_after_a_reset_ends_the_job() -> None:
    bench = Bench("L476", {"faults": ["lose:0x31:1:data"]}, {"chip": ""})

    def report(event: object) -> None:
        if isinstance(event, Retried):
            bench.device.chip = replace(bench.device.chip, pid=0x435)

    with pytest.raises(errors.WrongChip, match="0x415 was being worked on, and then 0x435 answered twice"):
        bench.run("flash", make_image(bench.chip, 3000), report=report)


def test_no_erase_begins_whose_sectors_nobody_has_read() -> None:
    """Whatever made the plan. And a resumed job that must erase a sector more reads first what lies beside the image in it."""
    bench = Bench("L476")
    neighbour = Image.of([(0x08001F00, b"calibration data" * 16)])
    bench.put(neighbour)
    flash = bench.device.memory.map
    first, whole = make_image(bench.chip, 6000), make_image(bench.chip, 6000).merged_with(Image.of([(0x08001800, b"more")]))
    plan = make_plan(whole, bench.chip, flash, covered=[Range(0x08000000, 0x08001800)])
    assert plan.outside == plan.unread() == (Range(0x08001804, 0x08002000),)
    with pytest.raises(errors.BridgedError, match=r"0x08001804\.\.0x08001fff, which the image leaves open"):
        encode_kept(plan)
    kept = encode_kept(make_plan(first, bench.chip, flash).keeping(None))
    barriers: list[bytes] = []
    result = bench.run("flash", whole, kept, barrier=lambda step: barriers.append(step.kept))
    assert bench.holds(neighbour)
    assert bench.holds(whole)
    assert result.bytes_kept == neighbour.size_bytes
    assert decode_kept(barriers[0]) == Kept((Range(0x08000000, 0x08002000),), neighbour)
