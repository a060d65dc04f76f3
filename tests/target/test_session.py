"""The session in virtual time against the strict simulator: what it does to a part, byte for byte and turn for turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridged import chips, errors
from bridged.chips.model import Range
from bridged.errors import BridgedError, Canceled, Stopped, StorageFull
from bridged.events import Identified, Phase, PhaseStarted, Planned, SectorErased, SectorProven, Warned
from bridged.images.model import Image
from bridged.protocol.flow import Barrier, SetLines
from bridged.sim.device import Mode
from bridged.sim.virtual import PowerCut
from bridged.target.erasing import batches
from bridged.target.kept import NOTHING_KEPT, decode_kept
from bridged.target.request import Wiring
from tests.target.bench import WIRED, Bench, make_image

# One part of each kind that the promise names, as `chip` of the configuration; G0 leaves the factory ignoring its pin.
PARTS: dict[str, dict[str, Any]] = {
    "0x410": {},
    "F407": {},
    "L476": {},
    "F756": {},
    "H743": {},
    "G071": {"options": {"nBOOT_SEL": 0}},
    "U575": {},
    "L053": {},
}


@pytest.mark.parametrize("part", PARTS)
def test_flash_is_proven_and_boots(part: str) -> None:
    bench = Bench(part, PARTS[part])
    bench.put(make_image(bench.chip, 3000, seed=5))
    image = make_image(bench.chip, 20_000)
    result = bench.run("flash", image)
    assert bench.holds(image)
    assert (result.changed, result.evidence, result.content) == (True, "full", image.digest)
    assert result.banner == "bench application"
    assert bench.boots()
    assert bench.account.overruns == 0
    assert bench.account.violations == []


@pytest.mark.parametrize("part", PARTS)
def test_write_and_verify_cost_exactly_what_an3155_allows(part: str) -> None:
    """Write Memory: 2 + 5 + 1 + n + 1 bytes out, 3 in. Read Memory: 2 + 5 + 2 out, 3 + n in. Three turnarounds each."""
    bench = Bench(part, PARTS[part])
    image = make_image(bench.chip, 20_000)
    plan_blocks = -(-20_000 // 256) - 4  # 1024 blank bytes in the middle are four blocks that need no write
    chip = bench.chip
    block = min(256, chip.write_max_bytes, 128 if chip.family == "L0" else 256)
    blocks = -(-20_000 // block) - 1024 // block
    assert block != 256 or blocks == plan_blocks
    bench.run("flash", image, discard_outside=True)
    wrote = bench.account.phases[Phase.WRITE]
    assert (wrote.bytes_out, wrote.bytes_in, wrote.turnarounds) == (blocks * (block + 9), blocks * 3, blocks * 3)
    reads = -(-20_000 // chip.read_max_bytes)
    proved = bench.account.phases[Phase.VERIFY]
    assert (proved.bytes_out, proved.bytes_in, proved.turnarounds) == (reads * 9, 20_000 + reads * 3, reads * 3)
    assert wrote.host_ns == proved.host_ns == bench.account.all.host_ns == 0
    assert wrote.timeouts == proved.timeouts == 0
    assert wrote.paused_ns == proved.paused_ns == 0
    assert bench.account.overruns == 0


def test_events_tell_the_story_in_order() -> None:
    bench = Bench("L476")
    bench.run("flash", make_image(bench.chip, 5000))
    phases = [e.phase for e in bench.events(PhaseStarted)]
    assert phases == [
        Phase.ACTIVATE,
        Phase.SYNC,
        Phase.IDENTIFY,
        Phase.PLAN,
        Phase.BACKUP,
        Phase.ERASE,
        Phase.WRITE,
        Phase.VERIFY,
        Phase.WRITE,
        Phase.VERIFY,
        Phase.BOOT,
    ]
    (identified,) = bench.events(Identified)
    assert (identified.pid, identified.flash_bytes, identified.layout) == (0x415, 1024 * 1024, "dual")
    assert len(identified.uid) == 24
    (planned,) = bench.events(Planned)
    assert (planned.sectors, planned.erase_bytes) == (3, 3 * 2048)
    assert [e.address for e in bench.events(SectorErased)] == [0x08000000, 0x08000800, 0x08001000]
    assert sorted(e.address for e in bench.events(SectorProven)) == [0x08000000, 0x08000800, 0x08001000]
    assert bench.events(SectorProven)[-1].address == 0x08000000, "the sector with the vectors is proven last"


def test_ensure_changes_nothing_when_it_is_already_true() -> None:
    bench = Bench("F407")
    image = make_image(bench.chip, 20_000)
    assert bench.run("ensure", image).changed
    erased = dict(bench.device.stats.erases)
    again = bench.run("ensure", image)
    assert (again.changed, again.evidence, again.bytes_compared) == (False, "full", 20_000)
    assert dict(bench.device.stats.erases) == erased
    assert bench.account.barriers == []


def test_verify_never_writes_and_names_the_first_difference() -> None:
    bench = Bench("F407")
    image = make_image(bench.chip, 20_000)
    bench.run("flash", image)
    assert bench.run("verify", image).evidence == "full"
    other = bytearray(image.segments[0].data)
    other[5000] ^= 0x10
    with pytest.raises(errors.VerifyError) as caught:
        bench.run("verify", Image.of([(0x08000000, bytes(other))]))
    assert caught.value.facts["address"] == 0x08000000 + 5000
    assert bench.account.barriers == []
    assert bench.boots(), "the target runs its application after a failed verify, too"


def test_a_word_misprogrammed_once_is_written_again_after_an_erase() -> None:
    bench = Bench("F407", {"faults": ["misprogram:0x08001000"]})
    image = make_image(bench.chip, 20_000)
    bench.run("flash", image)
    assert bench.holds(image)
    assert bench.device.stats.erases[0] == 2


def test_a_word_that_cannot_be_programmed_is_never_a_success() -> None:
    bench = Bench("F407", {"faults": ["misprogram:0x08001000:*"]})
    with pytest.raises(errors.VerifyError) as caught:
        bench.run("flash", make_image(bench.chip, 20_000))
    assert caught.value.facts["address"] == 0x08001000
    assert not bench.boots(), "what is not proven cannot boot: its vectors were never written"


@pytest.mark.parametrize("discard", [False, True])
def test_bytes_outside_the_image_are_kept_unless_discarded(discard: bool) -> None:
    bench = Bench("F756")
    neighbour = Image.of([(0x08005000, b"calibration data" * 32)])
    bench.put(neighbour)
    image = make_image(bench.chip, 10_000)
    result = bench.run("flash", image, discard_outside=discard)
    assert bench.holds(image)
    assert bench.holds(neighbour) is not discard
    assert result.bytes_kept == (0 if discard else 512)


def test_kept_bytes_reach_the_barrier_before_the_first_erase() -> None:
    bench = Bench("F756")
    neighbour = Image.of([(0x08005000, b"calibration data" * 32)])
    bench.put(neighbour)
    seen: list[tuple[str, int, bytes]] = []

    def barrier(step: Barrier) -> None:
        seen.append((step.state, sum(bench.device.stats.erases.values()), step.kept))

    bench.run("flash", make_image(bench.chip, 10_000), barrier=barrier)
    assert [(state, erases) for state, erases, _ in seen] == [("erasing", 0), ("erased", 1)]
    assert decode_kept(seen[0][2]).outside == neighbour


@pytest.mark.parametrize("error", [StorageFull("disk full"), Stopped("stopping")])
def test_nothing_is_erased_when_the_journal_cannot_take_it(error: BridgedError) -> None:
    bench = Bench("L476")
    old = make_image(bench.chip, 6000, seed=7)
    bench.put(old)

    def barrier(_step: Barrier) -> None:
        raise error

    with pytest.raises(type(error)):
        bench.run("flash", make_image(bench.chip, 6000), barrier=barrier)
    assert bench.holds(old)
    assert bench.boots()


def test_only_planned_sectors_are_touched() -> None:
    bench = Bench("F407")
    everywhere = Image.of([(s.address, bytes([s.code + 1]) * 64) for s in bench.chip.flash_map(1 << 20).sectors])
    bench.put(everywhere)
    image = make_image(bench.chip, 20_000, offset=0x4000)
    bench.run("flash", image)
    touched = {0x08004000, 0x08008000}
    for seg in everywhere.segments:
        if seg.address not in touched:
            assert bench.flash(seg.address, 64) == seg.data


# --- the way back (P10) -------------------------------------------------------------------------------------------

UNWIRED = Wiring(boot0_by_hand=True)


LOW_PIN = replace(WIRED, enter=tuple(replace(x, boot0=False) if isinstance(x, SetLines) else x for x in WIRED.enter))


@pytest.mark.parametrize(
    ("part", "device", "wiring", "told"),
    [
        ("G071", {}, WIRED, "nBOOT_SEL"),
        ("F756", {"options": {"BOOT_ADD1": 0x0080, "BOOT_ADD0": 0x0040}}, LOW_PIN, "BOOT_ADD1"),
        ("L476", {}, UNWIRED, "NRST"),
    ],
)
def test_entry_that_would_be_lost_is_refused(part: str, device: dict[str, Any], wiring: Wiring, told: str) -> None:
    bench = Bench(part, device)
    if wiring is UNWIRED:
        bench.device.force_loader()
    with pytest.raises(errors.EntryWouldBeLost, match=told):
        bench.run("flash", make_image(bench.chip, 6000), wiring=wiring)
    assert not bench.device.stats.erases


def test_one_shot_is_consent() -> None:
    bench = Bench("L476")
    bench.device.force_loader()
    image = make_image(bench.chip, 6000)
    result = bench.run("flash", image, wiring=UNWIRED, one_shot=True)
    assert bench.holds(image)
    assert result.evidence == "full"
    assert result.banner == "bench application", "without NRST the application is started by Go"


def test_a_virgin_part_that_remembers_being_empty_is_started_by_go() -> None:
    bench = Bench("G071", PARTS["G071"])
    result = bench.run("flash", make_image(bench.chip, 6000))
    assert result.banner == "bench application"
    assert "EMPTY_FLAG" in {w.code for w in bench.events(Warned)}


def test_identify_reads_and_changes_nothing() -> None:
    bench = Bench("H743")
    old = make_image(bench.chip, 6000)
    bench.put(old)
    result = bench.run("identify")
    assert (result.pid, result.flash_bytes, result.layout) == (0x450, 2 * 1024 * 1024, "dual")
    assert bench.holds(old)
    assert result.banner == "bench application"


def test_read_returns_the_bytes() -> None:
    bench = Bench("L476")
    old = make_image(bench.chip, 6000)
    bench.put(old)
    assert bench.run("read", address=0x08000010, length=3000).data == bench.flash(0x08000010, 3000)
    with pytest.raises(errors.ImageDoesNotFit, match="the flash ends at 0x080fffff"):
        bench.run("read", address=0x080FFFFF, length=2)


def test_erase_takes_exactly_the_range() -> None:
    bench = Bench("L476")
    old = make_image(bench.chip, 10_000)
    bench.put(old)
    result = bench.run("erase", address=0x08000800, length=0x1000)
    assert (result.sectors_erased, result.evidence) == (2, "full")
    assert bench.flash(0x08000800, 0x1000) == b"\xff" * 0x1000
    assert bench.flash(0x08000000, 0x800) == old.read(0x08000000, 0x800)
    assert bench.flash(0x08001800, 0x800) == old.read(0x08001800, 0x800)


@pytest.mark.parametrize(
    ("chip", "kib", "lists"),
    [
        ("L476", 64, [1, 31]),  # pages of 22 ms: the first is looked at, the others need one command
        ("L476", 512, [1, 128, 127]),  # which takes no more than 128 and 4 s
        ("F407", 128, [1] * 5),  # sectors that take half a second and more
        ("F103xB", 32, [1, 31]),
    ],
)
def test_sectors_are_erased_by_as_few_commands_as_their_time_allows(chip: str, kib: int, lists: list[int]) -> None:
    bench = Bench(chip)
    sectors = bench.device.memory.map.sectors_in(bench.chip.flash_base, bench.chip.flash_base + kib * 1024)
    found = batches(sectors, bench.chip, None)
    assert [len(batch) for batch in found] == lists
    assert [sector for batch in found for sector in batch] == list(sectors), "these, and no other"
    bench.run("flash", make_image(bench.chip, kib * 1024))
    command = 0x43 if bench.chip.erase_command == 0x43 else 0x44
    assert bench.device.stats.commands[command] == len(lists)


def test_erase_of_a_part_of_a_sector_is_refused() -> None:
    bench = Bench("L476")
    with pytest.raises(errors.BadRequest, match="cuts a sector"):
        bench.run("erase", address=0x08000800, length=0x1001)
    assert not bench.device.stats.erases


def test_reset_starts_the_application_without_the_loader() -> None:
    bench = Bench("L476")
    bench.put(make_image(bench.chip, 6000))
    assert bench.run("reset").banner == "bench application"
    assert bench.account.all.bytes_out == 0


REFUSED: list[tuple[str, str, dict[str, Any], dict[str, Any], type[BridgedError]]] = [
    ("another chip", "F407", {}, {"chip": "L476"}, errors.WrongChip),
    ("readout protection", "F407", {"rdp": 1}, {}, errors.ReadProtected),
    ("an unknown layout name", "F407", {}, {"layout": "dual"}, errors.LayoutUnknown),
    ("a smaller part", "F407", {"flash_bytes": 512 * 1024}, {"offset": 600 * 1024}, errors.ImageDoesNotFit),
]


@pytest.mark.parametrize(("name", "part", "device", "request_", "error"), REFUSED, ids=[r[0] for r in REFUSED])
def test_refused_before_anything_is_touched(
    name: str, part: str, device: dict[str, Any], request_: dict[str, Any], error: type[BridgedError]
) -> None:
    bench = Bench(part, device)
    wanted = dict(request_)
    image = make_image(bench.chip, 6000, offset=wanted.pop("offset", 0))
    with pytest.raises(error) as caught:
        bench.run("flash", image, **wanted)
    assert caught.value.hint.remedy
    assert not bench.device.stats.erases, name
    assert not bench.account.barriers


def test_an_image_that_cannot_boot_is_refused_unless_forced() -> None:
    bench = Bench("L476")
    data = Image.of([(0x08000000, bytes(range(256)) * 8)])
    with pytest.raises(errors.ImageNotBootable):
        bench.run("flash", data)
    assert not bench.device.stats.erases
    bench.run("flash", data, force=frozenset({"vectors"}))
    assert bench.holds(data)


# --- interruptions ------------------------------------------------------------------------------------------------


def at(number: int, error: BridgedError) -> Callable[[object], None]:
    """Raises ``error`` at this checkpoint, once."""
    numbers = itertools.count()

    def checkpoint(_step: object) -> None:
        if next(numbers) == number:
            raise error

    return checkpoint


def test_cancel_ends_at_a_checkpoint_and_the_target_is_released() -> None:
    bench = Bench("L476")
    old = make_image(bench.chip, 6000, seed=9)
    bench.put(old)
    with pytest.raises(Canceled):
        bench.run("verify", old, checkpoint=at(2, Canceled("canceled")))
    assert bench.account.phase is Phase.RELEASE
    assert bench.device.mode is Mode.STARTING
    assert bench.boots()


@pytest.mark.parametrize("part", ["0x410", "F407"])
def test_a_stop_strikes_between_two_commands_and_the_job_goes_on(part: str) -> None:
    """In every phase that speaks to the loader: the command is finished, the target released, and nothing is lost."""
    new = make_image(chips.find(part), 3000, seed=4)
    neighbour = Image.of([(chips.find(part).flash_base + 3072, b"precious" * 4)])

    def used() -> Bench:
        bench = Bench(part)
        bench.put(make_image(bench.chip, 3000, seed=3))
        bench.put(neighbour)
        return bench

    whole, phases = used(), list[Phase | None]()

    def note(_step: object) -> None:
        assert not whole.in_a_command
        phases.append(whole.account.phase)

    whole.run("flash", new, checkpoint=note)
    assert {Phase.BACKUP, Phase.ERASE, Phase.WRITE, Phase.VERIFY} <= set(phases)
    last = {phase: number for number, phase in enumerate(phases)}
    first = {phase: number for number, phase in reversed(list(enumerate(phases)))}
    for number in sorted({*last.values(), *first.values()}):
        bench = used()
        with pytest.raises(Stopped):
            bench.run("flash", new, checkpoint=at(number, Stopped("the daemon is stopping")))
        assert bench.account.phase is Phase.RELEASE
        assert bench.device.stats.hazard_resets == []
        assert (bench.device.lines["nrst"], bench.device.lines["boot0"]) == (True, False)
        kept = next((barrier.kept for barrier in bench.account.barriers if barrier.kept), b"")
        bench.run("flash", new, kept, proven=tuple(bench.events(SectorProven)))
        assert bench.holds(new)
        assert bench.holds(neighbour)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(part=st.sampled_from(["0x410", "F407", "L476", "F756", "H743"]), share=st.floats(0, 1))
def test_power_cut_anywhere_never_boots_half_an_image_and_resumes(part: str, share: float) -> None:
    """Cut the gateway's power after any exchange: what boots is the whole old image, the whole new one, or nothing. The job
    then resumes from what its journal had: the barrier's kept bytes and the proven sectors."""
    bench = Bench(part)
    old = make_image(bench.chip, 9000, seed=3, banner=b"old")
    neighbour = Image.of([(bench.chip.flash_base + 9216, b"precious" * 4)])
    bench.put(old)
    bench.put(neighbour)
    new = make_image(bench.chip, 9000, seed=4, banner=b"new")
    whole = Bench(part)
    whole.run("flash", new)
    exchanges = whole.account.all.sends
    kept, proven = b"", []

    def barrier(step: Barrier) -> None:
        nonlocal kept
        kept = step.kept or kept

    def report(event: object) -> None:
        if isinstance(event, SectorProven):
            proven.append(event)

    try:
        bench.run("flash", new, barrier=barrier, report=report, cut_after_exchange=round(share * (exchanges + 40)))
    except PowerCut:
        bench.uart = type(bench.uart)(bench.device)
        bench.uart.pause(60)  # the hazard
        if bench.boots():
            assert bench.holds(old) or bench.holds(new)
        bench.run("flash", new, kept, proven=tuple(proven))
    assert bench.holds(new)
    assert bench.holds(neighbour)
    assert bench.boots()


def test_resume_with_nothing_kept_does_not_read_the_outside_again() -> None:
    bench = Bench("F756")
    bench.run("flash", make_image(bench.chip, 10_000), NOTHING_KEPT)
    assert Phase.BACKUP not in bench.account.phases


def test_all_sectors_proven_before_means_only_the_proof_is_repeated() -> None:
    bench = Bench("L476")
    image = make_image(bench.chip, 10_000)
    bench.run("flash", image)
    proven = tuple(bench.events(SectorProven))
    before = dict(bench.device.stats.erases)
    result = bench.run("flash", image, NOTHING_KEPT, proven=proven)
    assert dict(bench.device.stats.erases) == before
    assert (result.changed, result.evidence) == (True, "full"), "the job has changed it, in the run that was interrupted"


def test_a_sector_whose_content_was_meant_otherwise_does_not_count_as_proven() -> None:
    bench = Bench("L476")
    bench.run("flash", make_image(bench.chip, 10_000, seed=1))
    proven = tuple(bench.events(SectorProven))
    other = make_image(bench.chip, 10_000, seed=2)
    bench.run("flash", other, NOTHING_KEPT, proven=proven)
    assert bench.holds(other)


def test_warnings_name_what_a_person_should_know() -> None:
    bench = Bench("F756", {"options": {"BOOT_ADD0": 0x0040}})
    bench.run("flash", make_image(bench.chip, 6000))
    assert "APPLICATION_UNREACHABLE" in {w.code for w in bench.events(Warned)}


# --- protected ranges ---------------------------------------------------------------------------------------------

SECTOR_2 = Range(0x08001000, 0x08001800)  # of an L476; protected from its first byte to its last, or by one byte of it


@pytest.mark.parametrize("protect", [SECTOR_2, Range(0x080017FF, 0x08001800), Range(0x08001000, 0x08001001)])
@pytest.mark.parametrize("kind", ["flash", "ensure"])
def test_a_sector_that_overlaps_a_protected_range_is_never_touched(kind: str, protect: Range) -> None:
    bench = Bench("L476", request={"protect": (Range(0x080FF800, 0x08100000), protect)})
    before = make_image(bench.chip, 3000, seed=5)
    bench.put(before)
    for image in (make_image(bench.chip, 4097), Image.of([(0x08001400, b"x")])):
        with pytest.raises(errors.NotAllowed) as caught:
            bench.run(kind, image, force=frozenset({"vectors"}))
        assert f"{protect.start:#010x}..{protect.end - 1:#010x}" in caught.value.message
        assert (caught.value.facts["sector"], caught.value.facts["protected_start"]) == (2, protect.start)
        assert bench.account.barriers == []
    assert not bench.device.stats.erases
    assert not bench.device.stats.mass_erases
    assert bench.holds(before)
    assert bench.boots()


def test_what_lies_beside_a_protected_range_is_free() -> None:
    bench = Bench("L476", request={"protect": (SECTOR_2,)})
    bench.put(Image.of([(SECTOR_2.start, b"mine" * 512)]))
    image = make_image(bench.chip, 4096)
    bench.run("flash", image)
    bench.run("flash", Image.of([(SECTOR_2.end, b"y" * 100)]), force=frozenset({"vectors"}))
    bench.run("erase", address=SECTOR_2.end, length=0x800)
    assert bench.holds(image)
    assert bench.flash(SECTOR_2.start, 2048) == b"mine" * 512


def test_verify_read_and_an_ensure_with_nothing_to_do_may_look() -> None:
    image = make_image(Bench("L476").chip, 5000)
    bench = Bench("L476", request={"protect": (SECTOR_2,)})
    bench.put(image)
    assert bench.run("verify", image).evidence == "full"
    assert bench.run("ensure", image).changed is False
    assert bench.run("read", address=SECTOR_2.start, length=16).data == image.read(SECTOR_2.start, 16)


@pytest.mark.parametrize(("address", "length"), [(0, 0), (0x08000000, 0x2000), (SECTOR_2.start, 0x800)])
def test_no_erase_takes_a_protected_range_along(address: int, length: int) -> None:
    bench = Bench("L476", request={"protect": (SECTOR_2,)})
    image = make_image(bench.chip, 5000)
    bench.put(image)
    with pytest.raises(errors.NotAllowed, match="0x08001000"):
        bench.run("erase", address=address, length=length)
    assert not bench.device.stats.erases
    assert not bench.device.stats.mass_erases
    assert bench.holds(image)


@pytest.mark.parametrize("start", [0x00800000, 0x00200000, 0x08080000])
def test_a_range_that_is_no_flash_of_the_part_guards_nothing_and_is_told(start: int) -> None:
    """A zero too few, the alias of another bus, beyond the end of this one: its author thinks that his bootloader is safe."""
    bench = Bench("F746", {"flash_bytes": 512 * 1024}, {"protect": (Range(start, start + 0x4000),)})
    image = make_image(bench.chip, 700)
    for kind, wanted in (("flash", image), ("erase", None)):
        with pytest.raises(errors.NotAllowed, match="correct `protect`"):
            bench.run(kind, wanted, address=0x08000000, length=0x8000)
    assert (bench.account.barriers, bench.device.stats.erases) == ([], {})
    bench.put(image)
    assert bench.run("ensure", image).evidence == "full", "nothing is erased"


def test_everything_is_not_erased_while_any_range_is_protected() -> None:
    """Not even one that this chip has not: whoever wrote it meant something."""
    bench = Bench("L476", request={"protect": (Range(0x20000000, 0x20000004),)})
    with pytest.raises(errors.NotAllowed, match="whole flash"):
        bench.run("erase")
    assert not bench.device.stats.erases
    assert not bench.device.stats.mass_erases
