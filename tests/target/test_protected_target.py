"""A flash of a target that is protected, or is to be: in one job, and across an interruption at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bridged import errors
from bridged.chips.option_rows import LAYOUTS
from bridged.errors import BridgedError
from bridged.events import Identified, Warned
from bridged.images.model import Image
from bridged.protocol.flow import Barrier, Checkpoint
from bridged.sim.loader import Timing
from bridged.sim.virtual import PowerCut
from bridged.target.protection import option_wait_s, proven_marker, unprotect_wait_s
from bridged.target.request import Past
from bridged.target.wishes import wishes_of
from tests.target.bench import Bench, make_image
from tests.target.protection_bench import CONSENT, FAST, WHOLE, ask, block, one, unharmed


@pytest.mark.parametrize("part", ["F407", "0x410", "L476", "F756", "H743", "G071"])
def test_unprotect_flash_verify_boot_protect_in_one_session(part: str) -> None:
    bench = one(part, rdp=1, flash_bytes=512 * 1024 if part == "F407" else None)
    bench.request = {"flash_bytes": bench.device.memory.map.size_bytes}
    image = make_image(bench.chip, 3000)
    result = ask(bench, "flash", image, **WHOLE)
    assert (result.evidence, result.protected, result.changed) == ("full", True, True)
    assert bench.holds(image)
    assert bench.device.memory.rdp == 1
    assert [b.state for b in bench.account.barriers] == ["erasing", "erased", "erasing", "erased", "protecting", "erased"]
    assert "bench application" in result.banner
    unharmed(bench)
    assert bench.boots()


def test_a_target_that_is_not_protected_keeps_what_is_beside_the_image() -> None:
    bench = one("L476")
    beside = make_image(bench.chip, 128, offset=0x500, seed=8)
    for seg in beside.segments:
        bench.device.memory.program(seg.address, seg.data)
    image = make_image(bench.chip, 700)
    ask(bench, "flash", image, **WHOLE)
    assert bench.holds(image)
    assert bench.holds(beside)
    assert (bench.device.memory.rdp, bench.device.stats.mass_erases) == (1, 0)


def test_without_the_wish_a_protected_target_is_refused_untouched() -> None:
    bench = one("F407", rdp=1)
    for kind in ("flash", "ensure", "verify"):
        with pytest.raises(errors.ReadProtected):
            ask(bench, kind, make_image(bench.chip, 700))
    assert bench.device.memory.rdp == 1
    assert bench.account.barriers == []


@pytest.mark.parametrize(
    ("part", "settings", "image", "error"),
    [
        ("L476", {"flash_bytes": 256 * 1024}, {}, errors.LayoutUnknown),  # Its numbering at that size is not sure.
        ("F429", {}, {}, errors.LayoutUnknown),
        ("F407", {}, {"offset": 1 << 20}, errors.ImageDoesNotFit),
        ("F407", {}, {"chip": "H743"}, errors.ImageNotBootable),
    ],
)
def test_what_would_refuse_the_flash_refuses_it_before_everything_is_erased(
    part: str, settings: dict[str, Any], image: dict[str, Any], error: type[BridgedError]
) -> None:
    bench = one(part, rdp=1, **settings)
    made = make_image(bench.chip, 768, offset=image.get("offset", 0))
    if "chip" in image:
        made = Image.of([(bench.chip.flash_base, bytes(768))])
    with pytest.raises(error):
        ask(bench, "flash", made, **WHOLE)
    assert (bench.device.memory.rdp, bench.device.stats.mass_erases) == (1, 0)
    assert bench.account.barriers == []


def test_a_size_that_is_known_from_before_is_enough_to_go_on() -> None:
    bench = one("L476", rdp=1)
    past = Past(flash_bytes=1 << 20, layout="dual")
    wishes = wishes_of("flash", WHOLE)
    result = bench.run("flash", make_image(bench.chip, 768), past=past, wishes=wishes, force=frozenset(["erase-everything"]))
    assert (result.evidence, result.protected) == ("full", True)


def test_ensure_answers_by_the_record_and_says_so() -> None:
    bench = one("F407", rdp=1)
    image, other = make_image(bench.chip, 700), make_image(bench.chip, 700, seed=3)
    result = bench.run("ensure", image, past=Past(content=image.digest, age_s=3600.0))
    assert (result.evidence, result.age_s, result.changed, result.protected) == ("record", 3600.0, False, True)
    assert result.bytes_compared == 0
    assert "BY_RECORD_ONLY" in [w.code for w in bench.events(Warned)]
    with pytest.raises(errors.ReadProtected) as caught:
        bench.run("ensure", other, past=Past(content=image.digest, age_s=3600.0))
    assert "the record does not say" in caught.value.message
    # Where the record says otherwise the wish decides.
    wishes = wishes_of("ensure", WHOLE)
    force = frozenset(["erase-everything"])
    same = bench.run("ensure", image, past=Past(content=image.digest), wishes=wishes, force=force)
    assert (same.evidence, bench.device.stats.mass_erases) == ("record", 0)
    done_ = bench.run("ensure", other, past=Past(content=image.digest), wishes=wishes, force=force)
    assert (done_.evidence, bench.device.memory.rdp) == ("full", 1)
    assert bench.holds(other)
    # A record is no evidence where the flash can be read.
    bench = one("F407")
    result = bench.run("ensure", image, past=Past(content=image.digest), discard_outside=True)
    assert (result.evidence, result.changed) == ("full", True)


class Journal:
    """What a daemon would have on disk: the last barrier's kept bytes, and the sectors that were proven."""

    def __init__(self) -> None:
        self.kept = b""
        self.until_s = 0.0

    def barrier(self, step: Barrier) -> None:
        if step.state != "erased":
            self.kept = step.kept or self.kept


def resumed_after(part: str, cut: Callable[[int], dict[str, Any]], limit: int, **settings: Any) -> int:
    """Cut the one job at a point, then run it again as the daemon does, until it is through; how many points there were."""
    for number in range(limit):
        bench = one(part, rdp=1, timing=FAST, **settings)
        image = make_image(bench.chip, 3000)
        journal = Journal()
        try:
            ask(bench, "flash", image, barrier=journal.barrier, **WHOLE, **cut(number))
        except PowerCut:
            pass
        else:
            return number
        _wait_out(bench)
        erased_before = bench.device.stats.mass_erases
        was_locked = journal.kept.startswith(b"BRPROV1")
        result = ask(bench, "flash", image, journal.kept, **WHOLE)
        assert (result.evidence, result.protected, bench.device.memory.rdp) == ("full", True, 1), number
        assert bench.holds(image), number
        assert result.content == image.digest
        assert bench.account.violations == [], number
        if was_locked:  # Everything was proven: nothing is erased again for the sake of the protection.
            assert bench.device.stats.mass_erases == erased_before, number
            assert result.bytes_written == 0
        assert bench.boots(), number
    raise AssertionError("there are more points than expected")


def _wait_out(bench: Bench) -> None:
    """Daemon and session are gone; the next start waits for the hazard that the journal has, and resets the target."""
    bench.uart = type(bench.uart)(bench.device)
    bench.uart.pause(unprotect_wait_s(bench.chip) + option_wait_s(bench.chip))
    assert bench.device.stats.hazard_resets == []
    bench.uart.set_lines(boot0=False, reset=True)
    bench.uart.pause(0.05)
    bench.uart.set_lines(reset=False)
    bench.uart.pause(0.5)


def test_the_one_job_is_resumed_after_a_power_cut_at_every_exchange() -> None:
    assert resumed_after("F407", lambda n: {"cut_after_exchange": n}, 400, flash_bytes=512 * 1024) > 60


def test_the_one_job_is_resumed_after_a_death_at_every_checkpoint() -> None:
    def at(number: int) -> dict[str, Any]:
        seen = [0]

        def checkpoint(_: Checkpoint) -> None:
            seen[0] += 1
            if seen[0] > number:
                raise PowerCut

        return {"checkpoint": checkpoint}

    assert resumed_after("0x410", at, 400) > 20


def test_a_resumed_job_protects_only_what_holds_its_image() -> None:
    """Another board may have been plugged, or this one flashed by hand, before readout protection took effect."""
    bench = one("F407", timing=FAST, flash_bytes=512 * 1024)
    there = make_image(bench.chip, 768, seed=5)
    marker = proven_marker(make_image(bench.chip, 3000).digest)
    with pytest.raises(errors.VerifyError):
        ask(bench, "flash", make_image(bench.chip, 3000), marker, **WHOLE)
    assert (bench.device.memory.rdp, bench.account.barriers, bench.holds(there)) == (0, [], True)
    unharmed(bench)
    # The one that holds it: the daemon hears who it is before the barrier at which it refuses another than the job began on.
    seen: list[str] = []
    hooks: dict[str, Any] = {"barrier": lambda step: seen.append(f"{step.state} {bench.events(Identified)[0].uid}")}
    result = ask(bench, "flash", there, proven_marker(there.digest), **hooks, **WHOLE)
    assert (result.evidence, result.bytes_compared, result.bytes_written, result.protected) == ("full", 768, 0, True)
    assert (bench.device.memory.rdp, seen[0]) == (1, f"protecting {result.uid}")
    assert result.uid
    unharmed(bench)
    # Protected already: nothing can be looked at, nothing is sent.
    result = ask(bench, "flash", there, proven_marker(there.digest), **WHOLE)
    assert (result.evidence, result.protected, [b.state for b in bench.account.barriers]) == ("full", True, ["erased"])
    unharmed(bench)


@pytest.mark.parametrize("after", [0, 1])
def test_an_option_write_is_resumed_at_every_exchange(after: int) -> None:
    """The gateway dies; the target does not. What was merged first is merged again with what was read first."""
    for number in range(200):
        bench = one("F756")
        journal = Journal()
        original = block(bench)
        try:
            ask(bench, "option-bytes", set="IWDG_STOP:0", barrier=journal.barrier, cut_after_exchange=number)
        except PowerCut:
            pass
        else:
            break
        _wait_out(bench)
        result = ask(bench, "option-bytes", kept=journal.kept, set="IWDG_STOP:0")
        assert result.options["after"]["fields"]["IWDG_STOP"] == 0, number
        layout = LAYOUTS[0x449]
        for field in layout.fields:
            if field.name != "IWDG_STOP":
                assert layout.get(block(bench), field.name) == layout.get(original, field.name), number
        assert bench.boots()
    else:
        raise AssertionError("there are more exchanges than expected")
    assert number > 30 + after


def test_a_write_of_option_bytes_that_the_target_cut_off_is_told_and_unprotect_helps() -> None:
    bench = one("F407")
    journal = Journal()
    with pytest.raises(PowerCut):
        ask(bench, "option-bytes", set="BOR_LEV:1", barrier=_then_die(journal))
    bench.device.memory.corrupt_options()  # The supply of the target went in the middle of it.
    _wait_out(bench)
    with pytest.raises(errors.OptionBytesLost):
        ask(bench, "option-bytes", kept=journal.kept, set="BOR_LEV:1")
    assert ask(bench, "unprotect", **CONSENT).changed
    assert ask(bench, "option-bytes", set="BOR_LEV:1").options["after"]["fields"]["BOR_LEV"] == 1


def test_a_write_that_got_halfway_is_finished_from_what_was_read_before_it() -> None:
    """Readable still, since the byte for protection came first; the rest is erased, and is not what is merged with."""
    bench = one("0x410")
    ask(bench, "option-bytes", set="Data0:0x12,nRST_STDBY:0")
    journal = Journal()
    with pytest.raises(PowerCut):
        ask(bench, "option-bytes", set="WDG_SW:0", barrier=_then_die(journal))
    content = bench.device.memory._options[0][1]
    content[:] = bytes.fromhex("a55a") + b"\xff" * 14
    bench.device.memory.load_options()
    _wait_out(bench)
    shown = ask(bench, "option-bytes").options["before"]
    assert (shown["readout_protection"], len(shown["broken"])) == (0, 7)
    result = ask(bench, "option-bytes", kept=journal.kept, set="WDG_SW:0")
    after = result.options["after"]
    assert "broken" not in after
    assert {name: after["fields"][name] for name in ("Data0", "nRST_STDBY", "WDG_SW", "nRST_STOP")} == {
        "Data0": "0x12",
        "nRST_STDBY": 0,
        "WDG_SW": 0,
        "nRST_STOP": 1,
    }


def test_write_protection_that_got_halfway_is_finished_from_what_was_read_before_it() -> None:
    bench = one("F072")
    ask(bench, "option-bytes", set="Data0:0x12,Data1:0x34")
    ask(bench, "protect", what="write", sectors="0-1")
    journal = Journal()
    with pytest.raises(PowerCut):
        ask(bench, "protect", what="write", sectors="2-3", barrier=_then_die(journal))
    bench.device.memory._options[0][1][4:] = b"\xff" * 12  # RDP and USER are written again, the rest is erased still.
    bench.device.memory.load_options()
    _wait_out(bench)
    result = ask(bench, "protect", kept=journal.kept, what="write", sectors="2-3")
    after = result.options["after"]
    assert (after["write_protected"], after.get("broken"), result.changed) == (["0x08000000..0x08001fff"], None, True)
    assert (after["fields"]["Data0"], after["fields"]["Data1"]) == ("0x12", "0x34")
    # Done already when it goes on: it is said that the job changed something.
    again = ask(bench, "protect", kept=journal.kept, what="write", sectors="2-3")
    assert (again.changed, bench.account.barriers) == (True, [])
    bench.device.memory.corrupt_options()
    _wait_out(bench)
    with pytest.raises(errors.OptionBytesLost):
        ask(bench, "protect", kept=journal.kept, what="write", sectors="2-3")


def _then_die(journal: Journal) -> Callable[[Barrier], None]:
    def barrier(step: Barrier) -> None:
        journal.barrier(step)
        raise PowerCut

    return barrier


def test_an_unprotect_that_the_target_cut_off_is_done_again() -> None:
    """It browns out in the middle of the mass erase: it is protected still, which is seen, and the command sent again."""
    bench = one("F407", rdp=1, timing=Timing(mass_erase_s=20.0))
    then: list[int] = []

    def brown_out() -> None:
        bench.device._system_reset()
        then.append(bench.device.memory.rdp)

    def barrier(step: Barrier) -> None:
        if step.state == "erasing":
            bench.device._at(bench.device.now_ns + 5_000_000_000, brown_out)

    result = ask(bench, "unprotect", barrier=barrier, **CONSENT)
    assert then == [1]
    assert len(bench.device.stats.hazard_resets) == 1
    assert (result.changed, bench.device.memory.rdp, bench.device.stats.mass_erases) == (True, 0, 2)
    assert bench.device.memory.blank(bench.device.memory.base, bench.device.memory.end)
    assert bench.account.violations == []
