"""Several images and bytes of one unit in one flash, in virtual time: what is kept (P6), what boots, what the plan promised."""

from __future__ import annotations

from typing import Any

import pytest

from bridged import errors
from bridged.events import Planned, SectorErased, SectorProven
from bridged.images import content
from bridged.images.content import Content, Patch, wanted
from bridged.images.dry_run import dry_run
from bridged.images.model import Image, Span
from bridged.images.plan import make_plan
from bridged.protocol.flow import Barrier
from bridged.sim.virtual import PowerCut
from tests.target.bench import Bench, make_image

BASE = 0x08000000
APP_AT = 0x08010000  # F756: sectors of 32 KiB, then one of 128 KiB from 0x08020000
SERIAL_AT = 0x0800F000  # beside both images, in the second sector of the bootloader
NEIGHBOUR = Image.of([(0x0800C000, b"calibration of this unit" * 8), (0x0801F000, b"log" * 16)])


class Shelf:
    """A store that has the images already parsed."""

    def __init__(self, **images: Image) -> None:
        self.images = images
        self.name = self.sha256 = ""

    def get(self, ref: str) -> Any:
        staged = Shelf()
        staged.name = ref
        return staged

    def load(self, staged: Any, base_address: int | None = None, type_hint: str = "auto") -> Image:
        assert (base_address, type_hint) == (None, "auto")
        return self.images[staged.name]


def unit(bench: Bench, serial: str = "00112233", seed: int = 1) -> Content:
    """Bootloader, application, and a serial number beside them and a MAC inside the application."""
    shelf = Shelf(
        boot=make_image(bench.chip, 40_000, seed=seed), app=make_image(bench.chip, 30_000, offset=0x10000, seed=seed + 1)
    )
    patch = f"{SERIAL_AT:#x}:{serial},{APP_AT + 0x200:#x}:02aabbccddee"
    return content.build(wanted("app,boot", {"patch": patch}), shelf)


def test_all_of_it_is_flashed_proven_and_boots_and_the_rest_is_kept() -> None:
    bench = Bench("F756")
    bench.put(NEIGHBOUR)
    made = unit(bench)
    result = bench.run("flash", made.image, spans=made.spans)
    assert bench.holds(made.image)
    assert bench.holds(NEIGHBOUR)
    assert bench.boots()
    assert bench.flash(SERIAL_AT, 4) == bytes.fromhex("00112233")
    assert bench.flash(APP_AT + 0x200, 6) == bytes.fromhex("02aabbccddee")
    assert (result.evidence, result.content) == ("full", made.image.digest)
    assert result.bytes_kept == len(NEIGHBOUR.segments[0].data), "the other one is in a sector that nobody touched"
    assert [e.address for e in bench.events(SectorErased)] == [BASE, APP_AT, BASE + 0x8000], "what could start goes first"
    assert bench.events(SectorProven)[-1].address == BASE, "the flash base comes last, whatever else has vectors"


def test_what_the_dry_run_promised_is_what_the_session_does() -> None:
    bench = Bench("F756")
    bench.put(NEIGHBOUR)
    made = unit(bench)
    promised = dry_run(made.image, chip="F756", flash_bytes=1 << 20, layout="single", spans=made.spans)
    result = bench.run("flash", made.image, spans=made.spans)
    (planned,) = bench.events(Planned)
    assert (promised["erase_sectors"], promised["erase_bytes"], promised["keep_bytes"]) == (
        planned.sectors,
        planned.erase_bytes,
        planned.keep_bytes,
    )
    assert promised["write_bytes"] == planned.write_bytes
    assert promised["keep_bytes"] == promised["erase_bytes"] - made.image.size_bytes
    assert result.phases["backup"].payload_bytes == promised["keep_bytes"]
    assert 0 < result.bytes_kept <= promised["keep_bytes"]
    # Kept bytes that are not blank are written as well: between the two figures.
    assert promised["write_bytes"] <= result.bytes_written <= promised["erase_bytes"]


def test_discarded_bytes_are_promised_as_lost_and_are() -> None:
    bench = Bench("F756")
    bench.put(NEIGHBOUR)
    made = unit(bench)
    promised = dry_run(made.image, chip="F756", flash_bytes=1 << 20, layout="single", spans=made.spans, discard_outside=True)
    result = bench.run("flash", made.image, spans=made.spans, discard_outside=True)
    assert (promised["keep_bytes"], result.bytes_kept) == (0, 0)
    assert promised["lose_bytes"] == promised["erase_bytes"] - made.image.size_bytes
    assert result.bytes_written == promised["write_bytes"]
    assert bench.holds(made.image)
    assert not bench.holds(NEIGHBOUR)


def test_another_serial_number_is_other_content_and_the_same_one_is_nothing_to_do() -> None:
    bench = Bench("F756")
    made = unit(bench)
    bench.run("flash", made.image, spans=made.spans)
    again = bench.run("ensure", made.image, spans=made.spans)
    assert (again.changed, again.evidence) == (False, "full")
    other = unit(bench, serial="00112234")
    with pytest.raises(errors.VerifyError) as caught:
        bench.run("verify", other.image, spans=other.spans)
    assert caught.value.facts["address"] == SERIAL_AT + 3
    changed = bench.run("ensure", other.image, spans=other.spans)
    assert changed.changed
    assert bench.holds(other.image)


def test_bytes_beside_an_application_touch_their_own_sector_and_the_bootloader_stays() -> None:
    """Application and patch go in behind a bootloader that is there; the patch is below the application and has no vectors."""
    bench = Bench("F756")
    boot = make_image(bench.chip, 6000, seed=8)
    bench.put(boot)
    app = make_image(bench.chip, 30_000, offset=0x10000)
    made = content.build(wanted("app", {"patch": f"{SERIAL_AT:#x}:00112233"}), Shelf(app=app))
    bench.run("flash", made.image, spans=made.spans)
    assert bench.holds(made.image)
    assert bench.holds(boot)
    assert bench.boots()
    assert [e.address for e in bench.events(SectorErased)] == [APP_AT, BASE + 0x8000], "the application's vectors go first"
    assert bench.events(SectorProven)[-1].address == APP_AT, "and come back last"


def test_an_application_linked_for_the_flash_base_is_refused_behind_its_bootloader() -> None:
    bench = Bench("F756")
    app = Image.of([(APP_AT, make_image(bench.chip, 9000).segments[0].data)])
    made = content.build(wanted("boot,app", {}), Shelf(boot=make_image(bench.chip, 9000), app=app))
    with pytest.raises(errors.ImageNotBootable, match="vector table of app at 0x08010000"):
        bench.run("flash", made.image, spans=made.spans)
    with pytest.raises(errors.ImageNotBootable, match="vector table of app at 0x08010000"):
        dry_run(made.image, chip="F756", spans=made.spans)
    assert not bench.device.stats.erases
    bench.run("flash", made.image, spans=made.spans, force=frozenset({"vectors"}))
    assert bench.holds(made.image)


def test_a_patch_outside_the_flash_is_refused_before_anything_is_touched() -> None:
    bench = Bench("F756")
    made = content.build(wanted("app", {"patch": "0x1fff0000:aa"}), Shelf(app=make_image(bench.chip, 3000)))
    with pytest.raises(errors.ImageDoesNotFit, match="0x1fff0000"):
        bench.run("flash", made.image, spans=made.spans)
    assert not bench.device.stats.erases


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_power_cut_within_a_whole_unit_resumes_to_exactly_it(share: float) -> None:
    bench = Bench("F756")
    old = unit(bench, serial="ffeeddcc", seed=5)
    bench.put(NEIGHBOUR)
    bench.run("flash", old.image, spans=old.spans)
    made = unit(bench)
    whole = Bench("F756")
    whole.run("flash", made.image, spans=made.spans)
    kept, proven = b"", []

    def barrier(step: Barrier) -> None:
        nonlocal kept
        kept = step.kept or kept

    def report(event: object) -> None:
        if isinstance(event, SectorProven):
            proven.append(event)

    cut = round(share * whole.account.all.sends)
    with pytest.raises(PowerCut):
        bench.run("flash", made.image, spans=made.spans, barrier=barrier, report=report, cut_after_exchange=cut)
    bench.uart = type(bench.uart)(bench.device)
    bench.uart.pause(60)
    if bench.boots():
        assert bench.holds(old.image) or bench.holds(made.image)
    bench.run("flash", made.image, kept, spans=made.spans, proven=tuple(proven))
    assert bench.holds(made.image)
    assert bench.holds(NEIGHBOUR)
    assert bench.boots()


def test_the_vector_sector_stays_first_once_the_kept_bytes_are_known() -> None:
    bench = Bench("F756")
    image = make_image(bench.chip, 9000, offset=0x10000).merged_with(Image.of([(SERIAL_AT, b"0001")]))
    plan = make_plan(image, bench.chip, bench.chip.flash_map(1 << 20), vectors=(APP_AT,))
    assert plan.erase[0].address == APP_AT
    again = plan.keeping(Image.of([(SERIAL_AT + 64, b"kept")]))
    assert (again.vectors, again.erase[0].address) == ((APP_AT,), APP_AT)
    assert again.blocks()[-1].address == APP_AT
    assert content.overlaid(image, [Patch(SERIAL_AT, b"0001")]) == image


SLOTS = (0x10000, 0x40000)  # Of two applications on an F756, from which a bootloader chooses that stays.


def test_at_no_moment_can_a_bootloader_find_a_slot_that_is_half_written() -> None:
    """Not the first application alone: of each the block with the table comes when everything else is proven."""

    def slots(bench: Bench, seed: int) -> tuple[Content, list[Image]]:
        apps = {f"app{slot}": make_image(bench.chip, 900, offset=slot, seed=seed + slot) for slot in SLOTS}
        return content.build(wanted(",".join(apps), {}), Shelf(**apps)), list(apps.values())

    whole = Bench("F756")
    whole.put(make_image(whole.chip, 900, seed=9))
    (old, old_apps), (made, apps) = slots(whole, 5), slots(whole, 1)
    whole.put(old.image)
    whole.run("flash", made.image, spans=made.spans, discard_outside=True)
    sends = whole.account.all.sends
    assert [e.address for e in whole.events(SectorErased)] == [BASE + slot for slot in SLOTS]
    found = set()
    for cut in range(sends - 60, sends):  # From before the second erase on.
        bench = Bench("F756")
        bench.put(old.image)
        with pytest.raises(PowerCut):
            bench.run("flash", made.image, spans=made.spans, discard_outside=True, cut_after_exchange=cut)
        for number, (before, after) in enumerate(zip(old_apps, apps, strict=True)):
            state = next((name for name, app in (("old", before), ("new", after)) if bench.holds(app)), "")
            table = bench.flash(after.start, 8) == after.segments[0].data[:8]  # That of both, old and new.
            assert bool(state) is table, f"{cut}: a table, and behind it neither the old application nor the new one"
            found.add((number, state))
    assert found == {(0, ""), (0, "new"), (1, "old"), (1, ""), (1, "new")}


@pytest.mark.parametrize("name", ["H743", "F429"])
def test_what_is_kept_at_the_start_of_the_second_bank_displaces_no_vector_table(name: str) -> None:
    """Settings there, with a patch of the image behind them: the image's own table goes first and comes last of all."""
    whole = Bench(name)
    second = next(s for s in whole.device.memory.map.sectors if s.bank == 2).address
    settings = Image.of([(second, b"settings" * 4)])
    old, new = (
        make_image(whole.chip, 600, seed=seed).merged_with(Image.of([(second + 0x400, b"data %d" % seed)])) for seed in (3, 4)
    )

    def bench() -> Bench:
        made = Bench(name)
        made.put(old)
        at = second - made.device.memory.map.base
        made.device.memory.flash[at : at + 32] = b"settings" * 4
        return made

    whole = bench()
    sends: list[tuple[type, int]] = []
    whole.run("flash", new, report=lambda event: sends.append((type(event), whole.account.all.sends)))
    assert [e.address for e in whole.events(SectorErased)] == [BASE, second]
    first, last = next(n for what, n in sends if what is SectorErased), whole.account.all.sends
    for cut in (first + 2, *range(last - 40, last, 2)):
        made = bench()
        with pytest.raises(PowerCut):
            made.run("flash", new, cut_after_exchange=cut)
        made.uart = type(made.uart)(made.device)
        made.uart.pause(60)
        assert not made.boots() or (made.holds(new) and made.holds(settings)), cut


@pytest.mark.parametrize("patched", [False, True], ids=["application", "serial number"])
def test_a_bootloader_that_is_kept_starts_when_all_is_back_and_not_before(patched: bool) -> None:
    """Image and bootloader share a sector, so the bootloader is erased and written anew: its table is the very last block."""
    name = "F756"
    image = make_image(Bench(name).chip, 3000, offset=0x10000 if patched else 0x4000)
    if patched:  # In the bootloader, and the application elsewhere.
        image = image.merged_with(Image.of([(BASE + 0x1000, b"serial number 42")]))
    loader = make_image(Bench(name).chip, 2500, seed=9)
    force: dict[str, Any] = {"force": frozenset({"vectors"}), "spans": (Span("app", image.segments[-1].address, image.end),)}
    whole = Bench(name)
    whole.put(loader)
    whole.run("flash", image, **force)
    assert whole.events(SectorErased)[0].address == BASE
    assert [p.address for p in whole.events(SectorProven)][-1] == BASE
    sends = whole.account.all.sends
    seen = set()
    for cut in (*range(sends - 100, sends, 3), sends // 2):
        bench, kept, proven = Bench(name), list[bytes](), list[SectorProven]()
        bench.put(loader)
        with pytest.raises(PowerCut):
            bench.run(
                "flash",
                image,
                **force,
                barrier=lambda step, kept=kept: kept.append(step.kept),  # type: ignore[misc]
                report=lambda event, found=proven: found.append(event) if isinstance(event, SectorProven) else None,  # type: ignore[misc]
                cut_after_exchange=cut,
            )
        bench.uart = type(bench.uart)(bench.device)
        bench.uart.pause(60)
        back, there = bench.holds(loader), bench.holds(image)
        seen.add((back, there))
        assert bench.boots() is back, cut
        assert there or not back or not kept, f"{cut}: the bootloader starts before what it is to start is there"
        if cut % 20 == 0:
            bench.run("flash", image, kept[0], proven=tuple(proven), **force)
            assert bench.holds(loader)
            assert bench.holds(image)
            assert bench.boots()
    assert {(False, False), (True, True)} <= seen
