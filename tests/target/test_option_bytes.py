"""Option bytes and write protection as sessions in virtual time: each field, each refusal."""

from __future__ import annotations

from typing import Any

import pytest

from bridged import errors
from bridged.chips.option_rows import LAYOUTS
from bridged.errors import BridgedError
from bridged.events import Warned
from bridged.images.model import Image
from bridged.target.protection import option_wait_s
from bridged.target.request import Wiring
from bridged.target.wishes import Wishes, wishes_of
from tests.target.bench import Bench, make_image
from tests.target.protection_bench import FIELDS, PARTS, ask, block, one, unharmed

# --- reading and writing option bytes --------------------------------------------------------------------------------


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
    ("G071", {"set": "NRST_MODE:0"}, NO, "NRST would not reset the part"),
    ("G071", {"set": "NRST_MODE:2"}, NO, "NRST would not reset the part"),
    ("C011", {"raw": "0x1FFF7803:36", "fields": "NRST_MODE"}, NO, "NRST would not reset the part"),
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


# --- write protection ------------------------------------------------------------------------------------------------


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
