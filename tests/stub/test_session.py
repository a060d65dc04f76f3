"""The second-stage loader as steps of a session: what a job does with it, and without it when anything is doubtful."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from bridged import stub
from bridged.chips.model import Range, Sector
from bridged.errors import BridgedError, Canceled, EntryWouldBeLost, NotAllowed, Stopped, VerifyError, WrongSector
from bridged.events import Phase, PhaseStarted, Planned, Retried, SectorErased, SectorProven, Warned
from bridged.images.model import Image, Span
from bridged.jobs.past import learned, past_of
from bridged.jobs.records import TargetRecord
from bridged.protocol import stub as wire
from bridged.protocol.flow import Barrier, Report, Send
from bridged.sim import virtual
from bridged.sim.virtual import PowerCut
from bridged.target import session, streaming
from bridged.target.request import Past, Request, Result
from tests.stub.bench import ALL, pattern
from tests.stub.flash_models import Bank
from tests.stub.machine import Machine
from tests.stub.sessions import Sessions, hits, hits_back
from tests.target.bench import WIRED, Bench, make_image

RESUMED = Past(settled=False)


def used(name: str, count: int = 0, **settings: Any) -> Sessions:
    """A part whose flash is full of something else, or ``count`` bytes of it."""
    s = Sessions(name, **settings)
    s.load(pattern(99, count or len(s.whole.rom.memory.flash)))
    return s


def sectors_of(s: Sessions) -> tuple[Sector, ...]:
    return s.chip.flash_map(len(s.whole.rom.memory.flash)).sectors


def cuts(s: Sessions) -> list[float]:
    return [seconds for _, seconds in s.account.hazards]


@pytest.mark.parametrize("name", ALL)
def test_flash_verify_ensure_and_the_same_flash_as_by_an3155(name: str) -> None:
    s = used(name, 45_000, oscillator=1.015)
    image = make_image(s.chip, 41_003)
    result = s.run("flash", image)
    assert (result.second_stage, result.proof, result.evidence, result.changed) == ("used", "crc-on-target", "full", True)
    assert result.second_stage_baud > 880_000
    assert result.bytes_compared == result.bytes_checksummed
    foreseen, planned = s.events(Planned)
    took_s = sum(result.phases[p].seconds for p in ("write", "verify"))
    # With the erase times of the chip tables, where the emulated part has others.
    emulated = {a.address: s.whole.part.times.erase[a.size] / 1e9 for a in s.whole.part.areas}
    erased = [e.address for e in s.events(SectorErased)]
    took_s += sum(x.erase_typ_s - emulated[x.address] for x in sectors_of(s) if x.address in erased)
    assert 0.8 * took_s < planned.seconds < 1.15 * took_s, "the estimate is that of the loader that does it"
    assert planned.seconds < foreseen.seconds < planned.seconds + 2.1, "and before it runs its start is in it"
    assert result.bytes_compared >= 41_003
    assert result.banner == "bench application"
    assert s.events(Warned) == []
    assert [p.phase for p in s.events(PhaseStarted)] == [
        *(Phase.ACTIVATE, Phase.SYNC, Phase.IDENTIFY, Phase.PLAN, Phase.LOADER, Phase.PLAN, Phase.BACKUP),
        *(Phase.ERASE, Phase.WRITE, Phase.VERIFY, Phase.VERIFY, Phase.BOOT),
    ]
    by_an3155 = used(name, 45_000)
    plain = by_an3155.run("flash", image, second_stage="off")
    assert (plain.second_stage, plain.proof) == ("", "read-back")
    assert s.flash == by_an3155.flash, "bytes beside the image included"
    for kind in ("verify", "ensure"):
        again = s.run(kind, image)
        assert (again.evidence, again.proof, again.changed, again.second_stage) == ("full", "crc-on-target", False, "used")
        assert s.account.barriers == []
    assert s.whole.erases == result.sectors_erased


@pytest.mark.parametrize("name", ALL)
def test_one_frame_in_twenty_is_hit(name: str) -> None:
    """Both ways, and one in a hundred before. Whatever the job takes to it, in the end the flash is right."""
    seed = ALL.index(name)
    s = used(name, 17_000, spoil_frames=hits(seed, 20), spoil_bytes=hits_back(seed + 50, 20), spoil_rom=hits(seed + 90, 100))
    image = make_image(s.chip, 16_000)
    result = s.run("flash", image)
    assert s.holds(image)
    assert result.evidence == "full"
    assert s.boots()
    assert result.second_stage == "used" or result.second_stage.startswith("given up: ")


def test_most_sessions_on_such_a_line_end_with_the_second_stage() -> None:
    outcomes = []
    for seed in range(6):
        s = used("G071", 12_000, spoil_frames=hits(seed, 20), spoil_bytes=hits_back(seed, 20))
        outcomes.append(s.run("flash", make_image(s.chip, 10_000)).proof)
    assert outcomes.count("crc-on-target") >= 5, outcomes


# --- the rules of a plan


def test_sectors_stay_where_they_are_right_and_blank_ones_are_not_erased() -> None:
    s = used("L476")
    old = make_image(s.chip, 24_576)
    s.run("flash", old)
    body = bytearray(old.segments[0].data)
    body[9000] ^= 0x55
    s.load(s.flash[:24_576])  # All the rest is blank.
    new = Image.of([(old.start, bytes(body) + pattern(5, 4096))])
    result = s.run("flash", new)
    assert (result.sectors_erased, result.sectors_skipped) == (2, 10), "the one that differs and that of the vectors"
    assert s.holds(new)
    assert [e.address for e in s.events(SectorErased)] == [old.start, old.start + 8192]
    assert len(s.events(SectorProven)) == 14
    assert s.events(Planned)[-1].sectors == 2


def test_after_an_interrupted_job_nothing_that_reads_well_is_believed() -> None:
    s = used("L476")
    image = make_image(s.chip, 8192)
    s.run("flash", image)
    s.load(s.flash[:8192])
    grown = Image.of([(image.start, image.segments[0].data + pattern(5, 2048))])
    result = s.run("flash", grown, past=RESUMED)
    assert (result.sectors_erased, result.sectors_skipped) == (5, 0)
    assert s.holds(grown)


def test_bytes_beside_the_image_are_kept_or_lost_as_the_job_says() -> None:
    s = used("F407")
    before = s.flash
    image = make_image(s.chip, 5000, offset=0x4100)
    result = s.run("flash", image, force=frozenset({"vectors"}))
    after = s.flash
    assert result.bytes_kept > 11_300
    assert after[:0x4100] == before[:0x4100]
    assert after[0x4100 + 5000 :] == before[0x4100 + 5000 :]
    s.run("flash", image, force=frozenset({"vectors"}), discard_outside=True, past=RESUMED)
    assert s.flash[0x4000:0x4100] == b"\xff" * 256
    assert s.holds(image)


def test_verify_names_the_byte_that_differs() -> None:
    s = used("F103", 2048)
    image = make_image(s.chip, 30_000)
    s.run("flash", image)
    flash = bytearray(s.flash)
    flash[20_001] ^= 0x10
    s.load(bytes(flash))
    with pytest.raises(VerifyError) as caught:
        s.run("verify", image)
    assert caught.value.facts["address"] == s.chip.flash_base + 20_001
    assert caught.value.facts["found"] == flash[20_001]
    result = s.run("ensure", image)
    assert (result.changed, result.sectors_erased, result.sectors_skipped) == (True, 2, 28)


def test_what_the_configuration_protects_stays() -> None:
    s = used("F103")
    before = s.flash
    base = s.chip.flash_base
    with pytest.raises(NotAllowed):
        s.run("flash", make_image(s.chip, 8192), protect=(Range(base + 4096, base + 5120),))
    assert s.flash == before
    assert s.account.barriers == []


def test_the_way_back_is_proven_before_the_first_erase() -> None:
    s = used("F103")
    before = s.flash
    with pytest.raises(EntryWouldBeLost):
        s.run("flash", make_image(s.chip, 8192), wiring=dataclasses.replace(WIRED, has_boot0=False, boot0_by_hand=False))
    assert s.flash == before


def test_a_part_that_was_empty_at_power_on_is_started() -> None:
    s = Sessions("G071")
    s.load(b"")
    result = s.run("flash", make_image(s.chip, 8192), listen_s=1.0)
    assert (result.second_stage, result.boot, result.banner) == ("used", "go", "bench application")


# --- accidents


def test_at_no_moment_half_an_image_can_start() -> None:
    """The power of the gateway fails between any two frames (every fifth here): what then starts is the old or the new one."""
    reference = used("G071")
    old, new = make_image(reference.chip, 12_000, banner=b"old"), make_image(reference.chip, 12_000, seed=2, banner=b"new")
    reference.run("flash", old)
    content = reference.flash
    reference.run("flash", new)
    steps = reference.account.all.sends
    seen = set()
    for cut in (*range(1, steps, 5), steps - 1):
        s = Sessions("G071")
        s.load(content)
        barriers: list[bytes] = []
        with pytest.raises(PowerCut):
            s.run("flash", new, before=after_frames(cut), barrier=lambda b, kept=barriers: kept.append(b.kept))  # type: ignore[misc]
        s.uart.pause(1.0)  # the hazard is waited out by whoever survives
        boots = s.boots()
        whole = "old" if s.holds(old) else "new" if s.holds(new) else "half"
        seen.add((whole, boots))
        assert boots is (whole != "half"), (cut, whole)
        if cut % 3 == 0 and barriers:
            result = s.run("flash", new, kept=barriers[0], past=RESUMED)
            assert s.holds(new)
            assert result.sectors_erased == 6
    assert seen == {("old", True), ("half", False), ("new", True)}


def test_a_bootloader_that_is_kept_starts_when_all_is_back_and_not_before() -> None:
    """It shares a sector with the image; its table is the last frame of all."""
    reference = Sessions("F407")
    loader, image = make_image(reference.chip, 2500, seed=9), make_image(reference.chip, 3000, offset=0x2000)
    reference.load(loader.segments[0].data)
    reference.run("flash", image, force=frozenset({"vectors"}))
    assert [p.address for p in reference.events(SectorProven)] == [loader.start]
    steps = reference.account.all.sends
    for cut in range(steps - 5, steps - 1):
        s = Sessions("F407")
        s.load(loader.segments[0].data)
        with pytest.raises(PowerCut):
            s.run("flash", image, force=frozenset({"vectors"}), before=after_frames(cut))
        s.uart.pause(1.0)
        boots = s.boots()
        assert boots is s.holds(loader), cut
        assert s.holds(image) or not boots or not s.whole.erases, cut


def after_frames(count: int) -> Callable[[int, Any], None]:
    left = count

    def hook(_number: int, step: Any) -> None:
        nonlocal left
        if isinstance(step, Send):
            left -= 1
            if left < 0:
                raise PowerCut("cut")

    return hook


@pytest.mark.parametrize("share", [0.6, 0.9])
@pytest.mark.parametrize("name", ["F103", "G071"])
def test_an_erase_that_the_loss_of_all_power_cut_short_is_done_again(name: str, share: float) -> None:
    """Gateway and target die together. What is half erased reads blank from some time on, and is believed by no resumed job."""
    s = used(name)
    image = make_image(s.chip, 8192)
    kept: list[bytes] = []

    def cut(_number: int, _step: Any) -> None:
        machine = s.whole.machine
        if machine is not None and machine.flash.erasing and len(machine.flash.erases) > 1:
            raise PowerCut("cut")

    with pytest.raises(PowerCut):
        s.run("flash", image, before=cut, barrier=lambda b: kept.append(b.kept))
    flash = s.whole.machine.flash  # type: ignore[union-attr]
    s.uart.pause((share - flash.erased_share) * (flash.works_until - s.uart.now_ns) / (1 - flash.erased_share) / 1e9)
    assert flash.erased_share == pytest.approx(share, abs=0.05)
    half = flash.erases[-1]
    s.uart.set_lines(power=False)
    s.uart.pause(1.0)
    s.uart.set_lines(power=True)
    memory = s.whole.rom.memory
    assert [x.address for x in sectors_of(s) if x.code in memory.marginal] == [half]
    assert (memory.read(half, 64) == b"\xff" * 64) is (share > 0.7)
    marginal, content = set(memory.marginal), bytes(memory.flash)
    result = s.run("flash", image, kept=kept[0], past=RESUMED)
    assert (result.second_stage, s.holds(image), memory.marginal) == ("used", True, set())
    if share > 0.7:  # A job that knew nothing of it would believe it, and the model notices.
        memory.load_flash(content)
        memory.marginal = marginal
        with pytest.raises(AssertionError, match="whose erase was cut short"):
            s.run("flash", image)


@pytest.mark.parametrize("asked", [Canceled("enough"), Stopped("the daemon is stopping")], ids=["cancel", "stop"])
def test_who_ends_a_stream_lets_the_erase_end_and_moves_no_line_before(asked: BridgedError) -> None:
    s = used("F407")
    image = make_image(s.chip, 200_000)
    kept = b""

    def barrier(step: Any) -> None:
        nonlocal kept
        kept = step.kept if step.state == "erasing" else kept

    def end(_step: Any) -> None:
        if kept and s.whole.machine is not None and s.whole.machine.flash.erasing and len(s.events(SectorErased)) == 2:
            raise asked

    with pytest.raises(type(asked)):
        s.run("flash", image, checkpoint=end, barrier=barrier)
    assert s.account.hazard_waits == [], "it was told that the flash rests"
    assert cuts(s)[-1] == 0
    assert not s.boots()


def test_a_loader_that_never_greets() -> None:
    s = used("F407", deaf=True)
    image = make_image(s.chip, 20_000)
    result = s.run("flash", image)
    assert s.holds(image)
    assert (result.evidence, result.proof, result.boot) == ("full", "read-back", "reset")
    assert result.second_stage.startswith("given up: SECOND_STAGE_FAILED: the second-stage loader did not greet within 1 s")
    assert [w.code for w in s.events(Warned)] == ["SECOND_STAGE_FAILED"]
    assert s.account.barriers[0].state == "erasing"


def test_the_simulated_parts_never_greet() -> None:
    """``bridged sim`` runs no code in RAM: with ``stub = "auto"`` the job goes on by AN3155, and says why."""
    bench = Bench("G071", settings={"options": {"nBOOT_SEL": 0}})
    image = make_image(bench.chip, 4096)
    result = bench.run("flash", image, second_stage="auto")
    assert bench.holds(image)
    assert (result.evidence, result.proof) == ("full", "read-back")
    assert "did not greet" in result.second_stage


def test_where_it_failed_twice_it_is_not_tried_again_until_something_changes() -> None:
    """Two seconds are lost twice, and then no more; another build, configuration or chip, or a week, is a new chance."""
    s = used("F407", deaf=True)
    image = make_image(s.chip, 4096)
    record = TargetRecord("a")
    seconds = []
    for now in (1e9, 1e9 + 60, 1e9 + 3720):
        result = s.run("flash", image, past=past_of(record, (), now), configured="first", chip="F407")
        seconds.append(result.seconds)
        record = learned(record, result.to_dict(), now)
        assert s.holds(image)
    assert result.second_stage.startswith("not used: it failed here 2 times in a row, last 1 hours ago (SECOND_STAGE_FAILED: ")
    assert "it is tried again a week after that, and at once with another version of it or when" in result.second_stage
    assert s.events(Warned) == []
    assert seconds[2] < seconds[1] - 1.5
    past = past_of(record, (), 1e9 + 3721)
    again = s.run("flash", image, past=past, configured="second", chip="F407")
    assert again.second_stage.startswith("given up: ")
    key = past.second_stage.key
    assert key.split("/")[:2] == [stub.load().build.hex(), "first"]
    for other in (key.replace(key[:16], "0" * 16), f"{key}0"):
        changed = dataclasses.replace(past, second_stage=dataclasses.replace(past.second_stage, key=other))
        again = s.run("verify", image, past=changed, configured="first", chip="F407")
        assert again.second_stage.startswith("given up: ")


def one_way(above: int, frames: int | None = None) -> Callable[[Machine], None]:
    """At rates above this the line carries nothing back, and of what the host sends all, or so many short frames."""

    def on_start(machine: Machine) -> None:
        fast = 0

        def there(_number: int, value: int) -> bytes:
            nonlocal fast
            fast += above < machine.usart.format.baud < 1_000_000  # none is set before it runs
            return b"" if frames is not None and fast > frames * wire.FRAME_BYTES else bytes([value])

        machine.drop_or_flip = there
        machine.spoil_answers = lambda _n, value: bytes([value ^ 0xFF if machine.usart.format.baud > above else value])

    return on_start


@pytest.mark.parametrize(("above", "baud"), [(500_000, 460800), (200_000, 115200)])
def test_a_rate_that_works_in_one_direction_only_is_left_for_a_slower_one(above: int, baud: int) -> None:
    """The loader takes it as confirmed, since it hears the host, and is called back in that direction."""
    s = used("G071", 8192, on_start=one_way(above))
    image = make_image(s.chip, 4096)
    result = s.run("flash", image)
    assert s.holds(image)
    assert (result.second_stage, result.proof) == ("used", "crc-on-target")
    assert result.second_stage_baud == pytest.approx(baud, rel=0.03)
    assert {r.step for r in s.events(Retried)} == {"rate"}


@pytest.mark.parametrize("back", [True, False])
def test_a_rate_from_which_nothing_brings_the_loader_back_is_given_up(back: bool) -> None:
    """The loader confirms a rate at which it is not heard, and does not hear that it shall come back; or its answer to BAUD
    never comes. The job goes on with the ROM loader, and says so: after two such jobs it is not tried again."""

    def no_answer_to_baud(machine: Machine) -> None:
        sent = bytearray()

        def spoil(_number: int, value: int) -> bytes:
            sent.append(value)
            return b"" if sent[-2:-1] == b"\xa5" and value == wire.Verb.BAUD | 0x80 else bytes([value])

        machine.spoil_answers = spoil

    s = used("G071", 8192, on_start=one_way(200_000, frames=2) if back else no_answer_to_baud)
    image = make_image(s.chip, 4096)
    result = s.run("flash", image)
    assert s.holds(image)
    assert (result.evidence, result.proof) == ("full", "read-back")
    asked = "STATUS" if back else "BAUD"
    assert result.second_stage.startswith(f"given up: SECOND_STAGE_FAILED: the second-stage loader did not answer {asked}")
    assert [w.code for w in s.events(Warned)] == ["SECOND_STAGE_FAILED"]


@pytest.mark.parametrize(
    ("name", "request_", "why"),
    [
        ("F446", {}, "is not in the table of the second-stage loader"),
        ("G071", {"one_shot": True}, "entry=one-shot"),
        ("G071", {"wiring": dataclasses.replace(WIRED, has_reset=False)}, "NRST is not wired"),
        ("0x410", {"baud": 57600, "wiring": dataclasses.replace(WIRED, leave=())}, "NRST is not wired"),
    ],
)
def test_where_it_is_not_even_tried(name: str, request_: dict[str, Any], why: str) -> None:
    jumps: list[int] = []
    bench = Bench(name, settings={"on_go": lambda _device, at: jumps.append(at)})
    bench.device.force_loader()
    bench.uart.pause(3.0)
    result = Result(kind="verify")
    wanted = Request(**{"kind": "verify", "wiring": WIRED, "chip": name, "second_stage": "auto", **request_})
    image = make_image(bench.chip, 4096)
    with pytest.raises(VerifyError):
        virtual.run(session._work(wanted, image, b"", result, []), bench.device)
    assert why in result.second_stage
    assert jumps == []


def test_a_line_that_dies_in_the_middle_is_given_up_and_the_job_goes_on() -> None:
    """The loader hangs while it streams: hazard, reset, and everything anew by AN3155, with the bytes that were kept."""

    def hang(machine: Machine) -> None:
        machine.drop_or_flip = lambda number, value: bytes([value]) if number < 14_000 else b""

    s = used("L476", on_start=hang)
    before = s.flash
    image = make_image(s.chip, 30_000)
    result = s.run("flash", image)
    assert s.holds(image)
    assert s.flash[30_000:32_768] == before[30_000:32_768]
    assert (result.evidence, result.proof) == ("full", "read-back")
    assert result.second_stage.startswith("given up: SECOND_STAGE_FAILED: command ")
    assert [b.state for b in s.account.barriers] == ["erasing", "erasing", "erased"]
    assert s.boots()


@pytest.mark.parametrize("moment", ["backup", "barrier", "vectors"])
def test_what_stayed_or_is_proven_is_not_erased_by_the_rom_loader_either(moment: str) -> None:
    """The last sector stays, and nobody has read what lies behind the image in it. Then the second stage falls silent."""
    silent = False

    def watch(_number: int, step: Any) -> None:
        nonlocal silent
        if isinstance(step, Report):
            event = step.event
            backup = moment == "backup" and event == PhaseStarted(Phase.BACKUP, 0)
            vectors = moment == "vectors" and isinstance(event, SectorProven) and event.address == 0x08000800
            silent = silent or backup or vectors
        elif isinstance(step, Barrier):
            silent = silent or moment == "barrier"

    s = Sessions("L476", spoil_frames=lambda frame: b"" if silent else frame)
    image = Image.of([(s.chip.flash_base, make_image(s.chip, 3 * 2048 + 500).segments[0].data)])
    old = bytearray(image.segments[0].data + pattern(3, 2048 - 500 + 4096))
    old[2048 + 700] ^= 0x55
    s.load(bytes(old))
    result = s.run("flash", image, before=watch)
    assert result.second_stage.startswith("given up: ")
    assert s.flash[: len(old)] == image.segments[0].data + bytes(old[image.size_bytes :])
    assert 3 * 2048 not in [e.address - image.start for e in s.events(SectorErased)]
    assert (result.evidence, result.proof, result.sectors_skipped) == ("full", "read-back", 2)


@pytest.mark.parametrize("beside", [-1, 1])
def test_an_erase_that_takes_a_neighbour_along_ends_the_job_before_anything_else_is_touched(beside: int) -> None:
    """What follows is on its way already, and the target carries none of it out."""

    def wide(machine: Machine) -> None:
        erase, areas = machine.flash.start_erase, machine.flash.areas

        def both(bank: Bank) -> None:
            erase(bank)
            area = machine.flash.chosen(bank)
            assert area is not None
            other = areas[areas.index(area) + beside]
            machine.write(other.address, b"\xff" * other.size)

        machine.flash.start_erase = both  # type: ignore[method-assign]

    s = used("L476", on_start=wide)
    before = s.flash
    image = make_image(s.chip, 10_000, offset=0x4000)
    with pytest.raises(WrongSector) as caught:
        s.run("flash", image, force=frozenset({"vectors"}))
    assert caught.value.facts["address"] == (0x08004800 if beside > 0 else 0x08003F00)
    first, size = min(0x4000, 0x4000 + beside * 2048), 4096
    assert s.flash[:first] == before[:first]
    assert s.flash[first : first + size] == b"\xff" * size
    assert s.flash[first + size :] == before[first + size :]
    assert s.whole.erases == 1


def test_a_word_that_does_not_take_is_a_doubt() -> None:
    """The flash of the emulated core is at fault, and not that of the simulated part: AN3155 has the last word."""

    def fault(machine: Machine) -> None:
        machine.flash.fail_program[0x08001000] = "wrong"

    s = used("F103", on_start=fault)
    image = make_image(s.chip, 8192)
    result = s.run("flash", image)
    assert "NOT_EQUAL at 0x08001000" in result.second_stage
    assert result.proof == "read-back"
    assert s.holds(image)


def test_flash_that_is_not_what_was_programmed_is_found_by_the_crc(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit falls after the loader had compared it, and before the proof."""
    s = used("G071")
    prove = streaming._prove
    once = [True]

    def fall(stage: Any, plan: Any, pieces: Any) -> Any:
        if once.pop() if once else False:
            machine = s.whole.machine
            assert machine is not None
            machine.write(0x08001234, bytes([machine.read(0x08001234, 1)[0] ^ 1]))
        return (yield from prove(stage, plan, pieces))

    monkeypatch.setattr(streaming, "_prove", fall)
    image = make_image(s.chip, 12_000)
    result = s.run("flash", image)
    assert "is not that of the image" in result.second_stage
    assert (result.proof, result.evidence) == ("read-back", "full")
    assert s.holds(image)


def test_a_slow_port_is_used_as_it_is() -> None:
    """A rate that the port refuses is no failure; the stream goes at the rate of the ROM loader."""
    s = used("F103")
    image = make_image(s.chip, 4096)
    result = s.run("flash", image, second_stage_baud=115200)
    assert (result.second_stage, result.second_stage_baud) == ("used", 115200)


def test_of_two_applications_each_table_comes_last() -> None:
    """Slots of a bootloader that stays: what it finds in the second one is never half written."""
    s = used("L476", 40_000)
    base = s.chip.flash_base
    boot, slot = make_image(s.chip, 6000), make_image(s.chip, 9000, offset=0x4000, seed=3)
    both = Image.of([(i.start, i.segments[0].data) for i in (boot, slot)])
    spans = (Span("boot", boot.start, boot.end), Span("slot", slot.start, slot.end))
    written: list[int] = []

    def order(_number: int, step: Any) -> None:
        if isinstance(step, Send) and (head := wire.head_of(step.data[:7])) and head[0] == wire.Verb.WRITE:
            written.append(int.from_bytes(step.data[7:11], "little"))

    result = s.run("flash", both, spans=spans, before=order)
    assert result.proof == "crc-on-target"
    assert written[-2:] == [base + 0x4000, base]
    assert {base, base + 0x4000}.isdisjoint(written[:-2])
    assert s.holds(both)
