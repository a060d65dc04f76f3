"""PLAN: numbers for a target that nobody touches, and what had to be assumed for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bridged.config import Target
from bridged.errors import BridgedError, ImageDoesNotFit, UnknownChip, UnknownTarget
from bridged.images.dry_run import Seen, dry_run
from bridged.images.model import Image
from tests.jobs.bench import FIRMWARE, Bench, run

WHOLE_SECTORS = Image.of([(0x08000000, bytes(65536))])


@pytest.mark.parametrize(
    ("image", "known", "actions", "assumed"),
    [
        (WHOLE_SECTORS, {"chip": "F756", "flash_bytes": 1 << 20}, [(0, "erase"), (1, "erase")], 0),
        (FIRMWARE, {"chip": "F756", "flash_bytes": 1 << 20}, [(0, "keep")], 0),
        (FIRMWARE, {"seen": Seen(0x449)}, [(0, "keep")], 1),
        (FIRMWARE, {"chip": "L476"}, [(0, "keep")], 1),
        (FIRMWARE, {"chip": "L476", "seen": Seen(0x449, 1 << 19, "single")}, [(0, "keep")], 1),
    ],
)
def test_sectors_and_assumptions(image: Image, known: dict[str, Any], actions: list[tuple[int, str]], assumed: int) -> None:
    plan = dry_run(image, **known)
    assert [(s["code"], s["action"]) for s in plan["sectors"]] == actions
    assert plan["erase_bytes"] == sum(s["size"] for s in plan["sectors"])
    assert plan["write_bytes"] + plan["keep_bytes"] == plan["erase_bytes"]
    assert plan["seconds"] > 0
    assert len(plan["assumed"]) == assumed


@pytest.mark.parametrize(
    ("image", "known", "error"),
    [
        (FIRMWARE, {}, UnknownChip),
        (FIRMWARE, {"chip": "Z80"}, UnknownChip),
        (Image.of([(0x20000000, b"ram")]), {"chip": "F756"}, ImageDoesNotFit),
        (Image.of([(0x08000000 + (1 << 19), b"x")]), {"chip": "F756", "flash_bytes": 1 << 19}, BridgedError),
    ],
)
def test_what_cannot_be_planned(image: Image, known: dict[str, Any], error: type[BridgedError]) -> None:
    with pytest.raises(error):
        dry_run(image, **known)


def test_the_service_plans_from_configuration_or_identification(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            with pytest.raises(UnknownChip):
                await bench.jobs.plan("m1", "firmware.elf", {})
            with pytest.raises(UnknownTarget):
                await bench.jobs.plan("m2", "firmware.elf", {})
            await bench.flash()
            runs = len(bench["m1"].runs)
            found = await bench.jobs.plan("m1", "firmware.elf", {"addr": 0x08000000})
            assert (found["pid"], found["flash_bytes"], found["assumed"]) == (0x449, 1 << 20, [])
            bench.config.targets["m1"] = Target(chip="L476", flash_kib=512)
            found = await bench.jobs.plan("m1", "firmware.elf")
            assert (found["pid"], found["flash_bytes"]) == (0x415, 512 * 1024)
            assert len(bench["m1"].runs) == runs, "nobody touched the target"

    run(work)
