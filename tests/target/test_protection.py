"""Protection and option bytes as sessions in virtual time: each kind, each refusal, every fault at every position."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from bridged import errors
from bridged.chips.model import Range
from bridged.chips.option_rows import LAYOUTS
from bridged.errors import BridgedError
from bridged.events import Warned
from bridged.images.model import Image
from bridged.protocol.flow import Barrier, Checkpoint
from bridged.sim.loader import Timing
from bridged.sim.virtual import PowerCut
from bridged.target.protection import option_wait_s, unprotect_wait_s
from bridged.target.request import Past, Request, Result, Wiring
from bridged.target.wishes import Wishes, wishes_of
from tests.target.bench import WIRED, Bench, make_image

CONSENT: dict[str, Any] = {"force": "erase-everything"}
PARTS: dict[str, dict[str, Any]] = {
    "0x410": {},
    "F072": {},
    "F303xC": {},
    "F407": {},
    "F446": {},
    "F756": {},
    "G071": {"options": {"nBOOT_SEL": 0}},
    "C011": {"options": {"nBOOT_SEL": 0}},
}
# One field to change on each part, to a value that the factory did not give it.
FIELDS = {
    "0x410": "nRST_STOP:0",
    "F072": "nRST_STDBY:0",
    "F303xC": "WDG_SW:0",
    "F407": "BOR_LEV:1",
    "F446": "nRST_STOP:0",
    "F756": "IWDG_STOP:0",
    "G071": "IWDG_STDBY:0",
    "C011": "BORR_LEV:1",
}


def one(part: str, faults: tuple[str, ...] = (), *, rdp: int = 0, **settings: Any) -> Bench:
    bench = Bench(part, {**PARTS.get(part, {}), "rate_error": 0.0, "faults": faults, **settings})
    bench.put(make_image(bench.chip, 768, seed=5))
    bench.device.memory.set_rdp(rdp)
    return bench


def ask(bench: Bench, kind: str, image: Image | None = None, kept: bytes = b"", **params: Any) -> Result:
    """A session with ``params`` as a client gives them."""
    hooks = {
        name: params.pop(name) for name in ("barrier", "checkpoint", "cut_after_exchange", "protect_ranges") if name in params
    }
    force = frozenset(str(params.get("force") or "").split(",")) - {""}
    protect = hooks.pop("protect_ranges", ())
    return bench.run(kind, image, kept, wishes=wishes_of(kind, params), force=force, protect=protect, **hooks)


def block(bench: Bench) -> bytes:
    """What is stored, seen from inside the part."""
    spot, content = bench.device.memory._options[0]
    assert spot.covers(LAYOUTS[bench.chip.pid].block.start, LAYOUTS[bench.chip.pid].block.end)
    return bytes(content)


def unharmed(bench: Bench) -> None:
    """No reset in the middle of anything, no byte for deaf ears, and the application runs."""
    assert bench.device.stats.hazard_resets == []
    assert bench.account.violations == []
    assert not bench.device.lines["boot0"]
    assert bench.device.lines["nrst"]


# --- reading and writing option bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_option_bytes_are_read_and_nothing_is_touched(part: str) -> None:
    bench = one(part)
    before = block(bench)
    result = ask(bench, "option-bytes")
    shown = result.options["before"]
    assert shown["readout_protection"] == 0
    assert shown["write_protected"] == []
    assert "broken" not in shown
    assert shown["fields"]["RDP"] == ("0xa5" if part == "0x410" else "0xaa")
    assert result.options["source"]
    assert (result.changed, block(bench)) == (False, before)
    assert not bench.device.stats.commands[0x31]
    unharmed(bench)
    assert bench.boots()


@pytest.mark.parametrize("part", PARTS)
def test_a_field_is_written_and_nothing_else_changes(part: str) -> None:
    bench = one(part)
    before, image = block(bench), bench.flash(bench.chip.flash_base, 700)
    name, _, value = FIELDS[part].partition(":")
    result = ask(bench, "option-bytes", set=FIELDS[part])
    assert result.changed
    old, new = result.options["before"]["fields"], result.options["after"]["fields"]
    assert (old[name], new[name]) == (old[name], int(value))
    assert old[name] != new[name]
    assert {k: v for k, v in old.items() if k != name} == {k: v for k, v in new.items() if k != name}
    layout = LAYOUTS[bench.chip.pid]
    assert layout.get(block(bench), name) == int(value)
    changed = [i for i, (a, b) in enumerate(zip(before, block(bench), strict=True)) if a != b]
    assert 1 <= len(changed) <= 4  # The value, its complement, and on an F4 both again.
    assert bench.flash(bench.chip.flash_base, 700) == image
    assert [b.state for b in bench.account.barriers] == ["options", "erased"]
    assert bench.account.barriers[0].hazard_s == option_wait_s(bench.chip)
    assert bench.account.overruns == 0
    unharmed(bench)
    assert bench.boots()
    again = ask(bench, "option-bytes", set=FIELDS[part])
    assert not again.changed
    assert bench.account.barriers == []


def test_raw_bytes_may_change_what_they_name_and_complements_are_computed() -> None:
    bench = one("0x410")
    result = ask(bench, "option-bytes", raw="0x1FFFF804:12,0x1FFFF806:34cb", fields="Data0,Data1")
    assert (result.options["after"]["fields"]["Data0"], result.options["after"]["fields"]["Data1"]) == ("0x12", "0x34")
    assert block(bench)[4:8] == bytes.fromhex("12ed34cb")


NO = errors.NotAllowed
REFUSALS: tuple[tuple[str, dict[str, Any], type[BridgedError], str], ...] = (
    ("F407", {"set": "RDP:2"}, NO, "never written"),
    ("F407", {"set": "RDP:0xCC"}, NO, "never written"),
    ("F407", {"set": "rdp:204"}, NO, "never written"),
    ("F407", {"set": "RDP:1"}, NO, "not written by this version"),
    ("F407", {"raw": "0x1FFFC000:EFCC", "fields": "RDP"}, NO, "level 2"),
    ("F407", {"raw": "0x1FFFC000:EF00", "fields": "RDP"}, NO, "PROTECT"),
    ("F072", {"raw": "0x1FFFF800:CC33", "fields": "RDP"}, NO, "level 2"),
    ("0x410", {"raw": "0x1FFFF800:00FF", "fields": "RDP"}, NO, "PROTECT"),
    ("G071", {"set": "BOOT_LOCK:1"}, NO, "never written"),
    ("G071", {"raw": "0x1FFF7870:80FFFFFF", "fields": "BOOT_LOCK"}, NO, "BOOT_LOCK"),
    ("C011", {"raw": "0x1FFF7872:FF", "fields": "BOOT_LOCK"}, NO, "BOOT_LOCK"),
    ("U575", {"set": "TZEN:1"}, NO, "never written"),
    ("L476", {"set": "PRODUCT_STATE:0x5C"}, NO, "never written"),
    ("G071", {"set": "nBOOT_SEL:1"}, NO, "the BOOT0 pin is ignored"),
    ("G071", {"set": "nBOOT1:0"}, NO, "starts from SRAM"),
    ("F072", {"set": "nBOOT1:0"}, NO, "starts from SRAM"),
    ("F756", {"set": "BOOT_ADD1:0x0080"}, NO, "BOOT0 high does not lead to the loader"),
    ("F756", {"raw": "0x1FFF0018:8000", "fields": "BOOT_ADD1"}, NO, "BOOT0 high does not lead to the loader"),
    ("F446", {"set": "SPRMOD:1"}, NO, "not written by this version"),
    ("F767", {"set": "nDBANK:0"}, NO, "not written by this version"),
    ("0x410", {"raw": "0x1FFFF804:12", "fields": "Data1"}, NO, "Data0"),
    ("0x410", {"raw": "0x1FFFF802:F7", "fields": "WDG_SW"}, NO, "0x1ffff802"),
    ("0x410", {"raw": "0x1FFFF804:1234", "fields": "Data0"}, errors.BadRequest, "complement"),
    ("0x410", {"raw": "0x1FFFF810:12", "fields": "Data0"}, errors.BadRequest, "not within"),
    ("0x410", {"set": "nBOOT1:0"}, errors.BadRequest, "no option field"),
    ("0x410", {"set": "WDG_SW:2"}, errors.BadRequest, "largest value"),
    ("F429", {"set": "BOR_LEV:1"}, errors.Unsupported, "two pieces"),
    ("L476", {"set": "nBOOT1:1"}, errors.BadRequest, "no option field"),
    ("H743", {"set": "BOOT_ADD0:0x0800"}, errors.Unsupported, "cannot be cited"),
)


@pytest.mark.parametrize(("part", "params", "error", "says"), REFUSALS)
def test_what_must_not_be_written_is_refused_before_anything_is_touched(
    part: str, params: dict[str, Any], error: type[BridgedError], says: str
) -> None:
    bench = one(part)
    before = bytes(bench.device.memory._options[0][1]) if bench.device.memory._options else b""
    with pytest.raises(error) as caught:
        ask(bench, "option-bytes", **params)
    assert says in caught.value.message
    assert before == (bytes(bench.device.memory._options[0][1]) if bench.device.memory._options else b"")
    assert not bench.device.stats.commands[0x31]
    assert bench.account.barriers == []
    unharmed(bench)


def test_what_is_refused_is_refused_by_the_session_too_and_not_only_when_it_is_submitted() -> None:
    for wishes in (Wishes(fields=(("RDP", 2),)), Wishes(patches=((0x1FFFC001, b"\xcc"),), named=("RDP",))):
        bench = one("F407")
        with pytest.raises(errors.NotAllowed):
            bench.run("option-bytes", wishes=wishes)
        assert bench.device.memory.rdp == 0
    bench = one("F407", rdp=1)
    with pytest.raises(errors.ConsentMissing):
        bench.run("unprotect", wishes=Wishes(what="readout"))
    with pytest.raises(errors.ConsentMissing):
        bench.run("flash", make_image(bench.chip, 700), wishes=Wishes(unprotect=True))
    assert bench.device.memory.rdp == 1
    assert not bench.device.stats.mass_erases


def test_every_field_of_every_layout_is_either_written_or_refused_and_never_locks_the_part() -> None:
    """Whatever a client may name: afterwards level 2 and BOOT_LOCK are not there, and the loader answers to BOOT0."""
    for part in ("F072", "F407", "F756", "G071", "C011"):
        for field in LAYOUTS[Bench(part).chip.pid].fields:
            for value in {0, 1, field.mask, 0xCC & field.mask}:
                bench = one(part)
                try:
                    ask(bench, "option-bytes", set=f"{field.name}:{value}")
                except (errors.NotAllowed, errors.BadRequest):
                    assert not bench.device.stats.commands[0x31]
                assert bench.device.memory.rdp == 0
                assert ask(bench, "identify").pid == bench.chip.pid


def test_without_nrst_nothing_is_sent_that_resets_the_target() -> None:
    bench = one("F407")
    bench.device.force_loader()
    for kind, params in (
        ("option-bytes", {"set": "BOR_LEV:1"}),
        ("protect", {}),
        ("protect", {"what": "write", "sectors": "1"}),
    ):
        with pytest.raises(errors.EntryWouldBeLost):
            bench.run(kind, wishes=wishes_of(kind, params), wiring=Wiring(boot0_by_hand=True), listen_s=0)
        bench.device.force_loader()
    assert bench.account.barriers == []


def test_a_loader_that_does_not_launch_option_bytes_is_told() -> None:
    bench = one("G071", loader_id=0xB2)
    result = ask(bench, "option-bytes", set="IWDG_STDBY:0")
    assert result.changed
    assert [w.code for w in bench.events(Warned)] == ["POWER_CYCLE_NEEDED"]


# --- write protection -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "sectors", "more", "found", "both"),
    [
        ("F407", "1,3", "2", ["0x08004000..0x08007fff", "0x0800c000..0x0800ffff"], ["0x08004000..0x0800ffff"]),
        ("F756", "7", "0", ["0x080c0000..0x080fffff"], ["0x08000000..0x08007fff", "0x080c0000..0x080fffff"]),
        ("0x410", "0-3", "4-7", ["0x08000000..0x08000fff"], ["0x08000000..0x08001fff"]),
        ("F072", "62-63", "0-1", ["0x0801f000..0x0801ffff"], ["0x08000000..0x08000fff", "0x0801f000..0x0801ffff"]),
        ("C011", "2-4", "9", ["0x08001000..0x080027ff"], ["0x08001000..0x080027ff", "0x08004800..0x08004fff"]),
    ],
)
def test_sectors_are_protected_besides_those_that_are(
    part: str, sectors: str, more: str, found: list[str], both: list[str]
) -> None:
    bench = one(part)
    result = ask(bench, "protect", what="write", sectors=sectors)
    assert result.changed
    assert result.options["after"]["write_protected"] == found
    assert ask(bench, "protect", what="write", sectors=more).options["after"]["write_protected"] == both
    assert not ask(bench, "protect", what="write", sectors=sectors).changed
    protected = {c for c, s in bench.device.memory.sectors.items() if c in bench.device.memory.protected}
    wanted = {n for part_ in (sectors, more) for p in part_.split(",") for n in _numbers(p)}
    assert protected == wanted
    unharmed(bench)
    # A flash that needs such a sector finds out, and does not say that all is well.
    with pytest.raises((errors.NotErased, errors.VerifyError)):
        bench.run("flash", _over(bench, min(wanted)), discard_outside=True)
    assert ask(bench, "unprotect", what="write").options["after"]["write_protected"] == []
    assert not bench.device.memory.protected
    assert bench.run("flash", _over(bench, min(wanted)), discard_outside=True).evidence == "full"


def _numbers(text: str) -> range:
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def _over(bench: Bench, code: int) -> Image:
    sector = bench.device.memory.sectors[code]
    return make_image(bench.chip, 700, offset=sector.address - bench.chip.flash_base, seed=9)


@pytest.mark.parametrize(
    ("part", "sectors", "error", "says"),
    [
        ("0x410", "1", errors.BadRequest, "sectors 0-3 can only be protected together"),
        ("F407", "12", errors.BadRequest, "there is no sector 12"),
        ("C011", "1,3,5", errors.BadRequest, "2 runs"),
        ("G071", "1", errors.Unsupported, "not known well enough"),
        ("L476", "1", errors.Unsupported, "not known"),
        ("F103xG", "124", errors.BadRequest, "can only be protected together"),
    ],
)
def test_never_more_is_protected_than_was_named(part: str, sectors: str, error: type[BridgedError], says: str) -> None:
    bench = one(part)
    with pytest.raises(error) as caught:
        ask(bench, "protect", what="write", sectors=sectors)
    assert says in caught.value.message
    assert not bench.device.memory.protected
    assert bench.account.barriers == []


def test_bits_that_mean_pcrop_are_shown_as_such_and_never_changed() -> None:
    bench = one("F446")
    content = bench.device.memory._options[0][1]
    content[8:10] = (0x8002).to_bytes(2, "little")  # SPRMOD, and sector 1
    bench.device.memory._complete()
    bench.device.memory.load_options()
    shown = ask(bench, "option-bytes").options["before"]
    assert (shown["pcrop"], shown["write_protected"]) == (["0x08004000..0x08007fff"], [])
    before = block(bench)
    asked: list[tuple[str, dict[str, Any]]] = [("protect", {"what": "write", "sectors": "2"}), ("unprotect", {"what": "write"})]
    for kind, params in asked:
        with pytest.raises((errors.Unsupported, errors.NotAllowed)):
            ask(bench, kind, **params)
    assert block(bench) == before


# --- readout protection -----------------------------------------------------------------------------------------------


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


# --- every fault at every position ------------------------------------------------------------------------------------

JOBS: dict[str, tuple[str, dict[str, Any], int]] = {
    "option write": ("option-bytes", {"set": "BOR_LEV:1"}, 0),
    "write protect": ("protect", {"what": "write", "sectors": "1"}, 0),
    "write unprotect": ("unprotect", {"what": "write"}, 0),
    "protect": ("protect", {}, 0),
    "unprotect": ("unprotect", CONSENT, 1),
}
FAST = Timing(mass_erase_s=1.0)


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


# --- a protected target, in one job -----------------------------------------------------------------------------------

WHOLE: dict[str, Any] = {"unprotect": True, "protect": True, **CONSENT}


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


# --- wishes -----------------------------------------------------------------------------------------------------------


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
