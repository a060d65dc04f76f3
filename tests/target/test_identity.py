"""What answers, and what is done to it: flash sizes that cannot be, layouts that are unsure, parts of another protocol."""

from __future__ import annotations

from typing import Any

import pytest

from bridged import errors
from bridged.events import Warned
from bridged.target.wishes import Wishes
from tests.target.bench import Bench, make_image


@pytest.mark.parametrize("kib", [384, 256])
def test_where_the_size_register_holds_a_code_everything_is_erased(kib: int) -> None:
    bench = Bench("0x436", {"flash_bytes": kib * 1024})
    bench.device.memory.load_flash(b"\xa5" * kib * 1024)
    result = bench.run("erase")
    assert (result.flash_bytes, result.bytes_compared, result.evidence) == (kib * 1024, kib * 1024, "full")
    assert not bench.events(Warned)  # Pages of 4 ms at most are not slow flash because a command takes some as well.
    assert bench.device.memory.flash.count(0) == kib * 1024


def test_where_only_the_low_byte_of_the_register_is_the_size() -> None:
    assert Bench("0x429", {"flash_bytes": 64 * 1024}).run("identify").flash_bytes == 64 * 1024


@pytest.mark.parametrize("value", [1, 0xFFFF, 0])
def test_a_size_that_cannot_be_is_not_believed(value: int) -> None:
    """Neither for a smaller flash, of which everything would be erased and proven, nor for the configured one in silence."""
    bench = Bench("0x437")
    memory = bench.device.memory
    assert bench.chip.flash_size_register is not None
    memory._rom.update((bench.chip.flash_size_register + n, byte) for n, byte in enumerate(value.to_bytes(2, "little")))
    memory.load_flash(b"\xa5" * 4096)
    with pytest.raises(errors.LayoutUnknown, match=f"register holds {value:04x}.*`flash_kib`"):
        bench.run("erase")
    assert not bench.device.stats.erases
    result = bench.run("erase", flash_bytes=512 * 1024)
    assert result.bytes_compared == 512 * 1024
    assert "FLASH_SIZE" in [warned.code for warned in bench.events(Warned)]


@pytest.mark.parametrize(
    ("part", "device"),
    [
        ("0x484", {}),
        ("0x467", {"flash_bytes": 512 * 1024, "options": {"nBOOT_SEL": 0}}),
        ("0x480", {}),
        ("0x496", {}),
        ("0x641", {}),
    ],
)
def test_a_part_of_an_unsure_layout_is_read_all_the_same(part: str, device: dict[str, Any]) -> None:
    bench = Bench(part, device)
    base = bench.chip.flash_base
    bench.device.memory.load_flash(bytes(range(256)) * 4)
    with pytest.raises((errors.LayoutUnknown, errors.Unsupported)):
        bench.run("erase", address=base, length=bench.device.memory.map.sectors[0].size_bytes)
    assert bench.run("read", address=base + 8, length=700).data == bench.flash(base + 8, 700)
    end = base + bench.chip.flash_max_bytes
    with pytest.raises(errors.ImageDoesNotFit, match=f"the flash ends at {end - 1:#010x}"):
        bench.run("read", address=end - 4, length=8)


@pytest.mark.parametrize(
    ("kind", "rdp", "more"),
    [
        ("flash", 0, {}),
        ("ensure", 0, {}),
        ("erase", 0, {}),
        ("protect", 0, {"wishes": Wishes(what="readout")}),
        ("protect", 0, {"wishes": Wishes(what="write", sectors=(0,))}),
        ("option-bytes", 0, {"wishes": Wishes(patches=((0x1FFFF800, b"\xa5"),))}),
        ("unprotect", 1, {"wishes": Wishes(what="readout")}),
        ("flash", 1, {"wishes": Wishes(unprotect=True)}),
    ],
)
def test_a_foreign_part_is_never_written_whatever_layout_is_stated(kind: str, rdp: int, more: dict[str, Any]) -> None:
    bench = Bench("0x641", {"flash_bytes": 64 * 1024, "rdp": rdp}, {"layout": "uniform", "flash_bytes": 64 * 1024})
    bench.device.memory.load_flash(bytes(2048))
    image = make_image(bench.chip, 3000) if kind in ("flash", "ensure") else None
    with pytest.raises(errors.Unsupported, match="a clone or custom part") as caught:
        bench.run(kind, image, force=frozenset({"erase-everything", "vectors"}), **more)
    assert "layout" not in caught.value.hint.remedy
    assert not bench.device.stats.erases
    assert not bench.account.barriers
    assert bench.device.memory.rdp == rdp
