"""Proof by a checksum that the target computes (0xA1), where its loader has that command, and only where it can be believed."""

from __future__ import annotations

import random

import pytest

from bridged import chips
from bridged.events import Event, Phase, SectorProven, Warned
from bridged.images.model import Image
from bridged.protocol import an3155
from bridged.protocol.flow import Barrier
from bridged.sim.loader import crc32_mpeg
from bridged.sim.virtual import PowerCut
from tests.target.bench import Bench, make_image

SIZE = 64 * 1024


@pytest.mark.parametrize("size", [4, 8, 256, 4096, 100_000])
def test_the_checksum_is_the_one_of_the_crc_unit(size: int) -> None:
    data = random.Random(size).randbytes(size)
    assert an3155.checksum_of(data) == crc32_mpeg(data)


@pytest.mark.parametrize("chip", ["F407", "L476", "H743"])
def test_it_proves_in_a_fraction_of_the_time(chip: str) -> None:
    image = make_image(chips.find(chip), SIZE)
    slow, fast = Bench(chip), Bench(chip, settings={"checksum": True})
    read = slow.run("flash", image)
    summed = fast.run("flash", image)
    assert (read.bytes_checksummed, summed.evidence) == (0, "full")
    assert summed.bytes_checksummed >= summed.bytes_compared * 0.9
    assert summed.bytes_compared == read.bytes_compared
    verify = Phase.VERIFY
    assert fast.account.phases[verify].total_ns < slow.account.phases[verify].total_ns / 10
    assert {p.address for p in fast.events(SectorProven)} == {p.address for p in slow.events(SectorProven)}
    assert fast.holds(image)
    assert fast.boots()


def test_a_wrong_word_is_found_and_written_again() -> None:
    image = make_image(chips.find("F407"), SIZE)
    bench = Bench("F407", settings={"checksum": True, "faults": ["misprogram:0x08005432"]})
    result = bench.run("flash", image)
    assert result.evidence == "full"
    assert bench.holds(image)


@pytest.mark.parametrize("fault", ["nack:0xA1:0:opcode:*", "lose:0xA1:1:done", "hang:0xA1:2:words", "flip:0xA1:1:poly"])
def test_a_command_that_fails_leaves_the_reading(fault: str) -> None:
    image = make_image(chips.find("F407"), SIZE)
    bench = Bench("F407", settings={"checksum": True, "faults": [fault]})
    result = bench.run("flash", image)
    assert result.evidence == "full"
    assert result.bytes_compared >= image.size_bytes - 2048
    assert bench.holds(image)


def test_a_checksum_that_does_not_agree_with_what_is_read_is_not_believed() -> None:
    image = make_image(chips.find("F407"), SIZE)
    # The first reading is false, so the two cannot agree: everything is read back.
    bench = Bench("F407", settings={"checksum": True, "faults": ["misread:0x08000102"]})
    result = bench.run("flash", image)
    assert (result.evidence, result.bytes_compared >= SIZE - 2048) == ("full", True)
    assert bench.holds(image)
    assert result.bytes_checksummed <= 256  # the block with the vectors, which is proven last
    assert "CHECKSUM_USELESS" in [w.code for w in bench.events(Warned)]


def test_a_false_checksum_never_passes_for_a_proof() -> None:
    """Whatever 0xA1 answers, wrong flash is not called right: a sum that is right for other bytes is one chance in 2^32."""
    image = make_image(chips.find("F407"), SIZE)
    bench = Bench("F407", settings={"checksum": True})
    bench.run("flash", image)
    bench.device.memory.flash[0x3000] ^= 0xFF
    result = bench.run("ensure", image)
    assert result.changed
    assert bench.holds(image)


def test_a_sector_counts_as_proven_when_no_reading_of_it_is_outstanding() -> None:
    """Two pieces of the image in one sector, the first wrong and the second right: a kill while it is written anew (P5)."""
    bench = Bench("F407", settings={"checksum": True, "faults": ["misprogram:0x08008010:0x40"]})
    pieces = [(0x08008000, random.Random(6).randbytes(4096)), (0x0800A000, random.Random(7).randbytes(4096))]
    image = make_image(bench.chip, 4096).merged_with(Image.of(pieces))
    kept, erased, proven = b"", 0, list[SectorProven]()

    def barrier(step: Barrier) -> None:
        nonlocal kept, erased
        kept = step.kept or kept
        erased += step.state == "erased"
        if erased == 2:
            raise PowerCut("in the middle of the repair")

    def report(event: Event) -> None:
        if isinstance(event, SectorProven):
            proven.append(event)

    with pytest.raises(PowerCut):
        bench.run("flash", image, barrier=barrier, report=report)
    bench.uart = type(bench.uart)(bench.device)
    bench.uart.pause(60)
    assert not bench.holds(image)
    result = bench.run("flash", image, kept, proven=tuple(proven))
    assert result.evidence == "full"
    assert bench.holds(image)
