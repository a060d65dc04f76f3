"""PLAN: numbers for a target that nobody touches, and what had to be assumed for them."""

from __future__ import annotations

import asyncio
import json
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bridged.config import Lines, Target
from bridged.errors import (
    BridgedError,
    ImageDoesNotFit,
    ImageNotBootable,
    NotAllowed,
    TooMany,
    UnknownChip,
    UnknownTarget,
    Unsupported,
)
from bridged.images.dry_run import Seen, dry_run
from bridged.images.model import Image
from bridged.jobs.past import past_of
from bridged.jobs.plans import PLANS_WAITING
from bridged.jobs.records import TargetRecord
from bridged.target.configured import likely_baud_of
from tests.api.fakes import PLANNED
from tests.jobs.bench import FIRMWARE, Bench, run

WHOLE_SECTORS = Image.of([(0x08000000, bytes(65536))])
TWO_PLACES = Image.of([(0x08000000, bytes(1024)), (0x08010000, bytes(65536))])
F756: dict[str, Any] = {"chip": "F756", "flash_bytes": 1 << 20}
FORCED = frozenset({"vectors"})
GOOD, BAD = (5.0, 0.0), (0.0, 5.0)  # When a rate was last good, and last bad.
WIRED = Lines(kind="socket", socket="/nowhere", nrst="nrst", boot0="boot0")
Row = tuple[str, int, int, int, int, int]  # action, first and last sector, bytes written, kept, lost


@pytest.mark.parametrize(
    ("image", "known", "rows", "assumed"),
    [
        (WHOLE_SECTORS, F756, [("write", 0, 1, 65536, 0, 0), ("stay", 2, 3, 0, 0, 0), ("stay", 4, 4, 0, 0, 0)], 0),
        (FIRMWARE, F756, [("keep", 0, 0, 512, 32256, 0), ("stay", 1, 3, 0, 0, 0)], 0),
        (FIRMWARE, {**F756, "discard_outside": True}, [("lose", 0, 0, 512, 0, 32256), ("stay", 1, 3, 0, 0, 0)], 0),
        (TWO_PLACES, F756, [("keep", 0, 0, 1024, 31744, 0), ("stay", 1, 1, 0, 0, 0), ("write", 2, 3, 65536, 0, 0)], 0),
        (FIRMWARE, {"seen": Seen(0x449)}, [("keep", 0, 0, 512, 32256, 0)], 1),
        (FIRMWARE, {"chip": "L476"}, [("keep", 0, 0, 512, 1536, 0), ("stay", 1, 511, 0, 0, 0)], 1),
        (FIRMWARE, {"chip": "L476", "seen": Seen(0x449, 1 << 19, "single")}, [("keep", 0, 0, 512, 1536, 0)], 1),
    ],
)
def test_ranges_and_assumptions(image: Image, known: dict[str, Any], rows: list[Row], assumed: int) -> None:
    plan = dry_run(image, force=FORCED, **known)
    names = ("action", "first", "last", "write_bytes", "keep_bytes", "lose_bytes")
    assert [tuple(row[name] for name in names) for row in plan["range"]][: len(rows)] == rows
    assert len(plan["assumed"]) == assumed


def test_where_the_second_stage_will_be_tried_the_estimate_is_its_own() -> None:
    """And says what it would be without; a chip that is not in its table has only the one."""
    without = dry_run(WHOLE_SECTORS, force=FORCED, **F756)
    plan = dry_run(WHOLE_SECTORS, force=FORCED, second_stage_baud=921600, supply_v=3.3, **F756)
    assert plan["seconds"] < without["seconds"] / 3
    assert plan["assumed"] == [f"second-stage loader at 921600 baud; {without['seconds']:.0f} s without it"]
    bytewise = dry_run(WHOLE_SECTORS, force=FORCED, second_stage_baud=921600, **F756)
    assert bytewise["seconds"] > plan["seconds"], "x8, where nobody stated the supply"
    other = dry_run(FIRMWARE, force=FORCED, chip="F429", second_stage_baud=921600)
    assert other["seconds"] == dry_run(FIRMWARE, force=FORCED, chip="F429")["seconds"]


@pytest.mark.parametrize(
    "known", [F756, {**F756, "discard_outside": True}, {"chip": "L476"}, {"chip": "H743"}, {"chip": "L053"}, {"chip": "F429"}]
)
@pytest.mark.parametrize("image", [FIRMWARE, WHOLE_SECTORS.merged_with(Image.of([(0x08010001, b"tail")])), TWO_PLACES])
def test_the_ranges_are_the_whole_flash_and_the_sums_are_theirs(image: Image, known: dict[str, Any]) -> None:
    if known["chip"] == "L053" and image is not FIRMWARE:
        image = Image.of([(0x08000000, bytes(3000))])
    plan = dry_run(image, force=FORCED, **known)
    rows = plan["range"]
    assert rows[0]["address"] == 0x08000000
    assert all(row["end"] == following["address"] for row, following in pairwise(rows))
    assert rows[-1]["end"] == 0x08000000 + plan["flash_bytes"]
    assert all(row["end"] - row["address"] == row["sectors"] * row["sector_bytes"] for row in rows)
    assert all(row["last"] - row["first"] + 1 == row["sectors"] for row in rows)
    touched = [row for row in rows if row["action"] != "stay"]
    assert plan["erase_sectors"] == sum(row["sectors"] for row in touched)
    assert plan["erase_bytes"] == sum(row["sectors"] * row["sector_bytes"] for row in touched)
    assert plan["stay_bytes"] == plan["flash_bytes"] - plan["erase_bytes"]
    for name in ("write_bytes", "keep_bytes", "lose_bytes"):
        assert plan[name] == sum(row[name] for row in rows)
    assert plan["keep_bytes"] + plan["lose_bytes"] == plan["erase_bytes"] - image.size_bytes
    assert 0 < plan["erase_seconds"] < plan["seconds"] <= plan["seconds_most"]
    assert (plan["seconds"] < plan["seconds_most"]) is bool(plan["keep_bytes"])


@pytest.mark.parametrize(
    ("image", "known", "error"),
    [
        (FIRMWARE, {}, UnknownChip),
        (FIRMWARE, {"chip": "Z80"}, UnknownChip),
        (FIRMWARE, {"chip": "0x641", "layout": "uniform", "flash_bytes": 1 << 16}, Unsupported),
        (Image.of([(0x20000000, b"ram")]), {"chip": "F756"}, ImageDoesNotFit),
        (Image.of([(0x08000000 + (1 << 19), b"x")]), {"chip": "F756", "flash_bytes": 1 << 19}, BridgedError),
    ],
)
def test_what_cannot_be_planned(image: Image, known: dict[str, Any], error: type[BridgedError]) -> None:
    with pytest.raises(error):
        dry_run(image, force=FORCED, **known)


@pytest.mark.parametrize(
    ("settings", "rates", "pid", "expected"),
    [
        ({"chip": "H743"}, {}, 0, 115200),
        ({"chip": "H743"}, {921600: GOOD}, 0, 921600),
        ({"chip": "H743"}, {921600: BAD, 460800: GOOD}, 0, 460800),
        ({"chip": "H743"}, {921600: (5.0, 3.0), 460800: GOOD}, 0, 921600),
        ({"chip": "H743", "lines": Lines()}, {921600: GOOD}, 0, 115200),  # Nothing can reset it: no ladder.
        ({"chip": "H743", "bauds": [], "baud": 460800}, {460800: BAD, 115200: GOOD}, 0, 230400),
        ({}, {}, 0x449, 57600),
        ({"chip": "H743", "bauds": [], "baud": 9600}, {}, 0, 9600),
    ],
)
def test_the_estimate_is_for_the_rate_that_the_target_has_shown(
    settings: dict[str, Any], rates: dict[int, tuple[float, float]], pid: int, expected: int
) -> None:
    target = Target(**{"port": "/dev/ttyS0", "bauds": [921600, 460800], "lines": WIRED, **settings})
    record = TargetRecord("m1", rates=json.dumps({str(baud): at for baud, at in rates.items()}))
    assert likely_baud_of(target, past_of(record, (), 10.0), pid) == expected


def test_a_vector_table_that_flash_would_refuse_is_refused_here() -> None:
    with pytest.raises(ImageNotBootable, match="stack pointer"):
        dry_run(FIRMWARE, **F756)


def test_the_service_plans_from_configuration_or_identification(tmp_path: Path) -> None:
    async def work() -> None:
        async with Bench(tmp_path) as bench:
            with pytest.raises(UnknownChip):
                await bench.jobs.plan("m1", "firmware.elf", {})
            with pytest.raises(UnknownTarget):
                await bench.jobs.plan("m2", "firmware.elf", {})
            await bench.flash()
            runs = len(bench["m1"].runs)
            found = await bench.jobs.plan("m1", "firmware.elf", {"addr": 0x08000000, "force": "vectors"})
            assert found["proven"] is True
            assert (found["pid"], found["flash_bytes"], found["assumed"]) == (0x449, 1 << 20, [])
            bench.jobs._lanes["m1"].settings = Target(chip="L476", flash_kib=512)
            options = {"patch": "0x08000200:aabb", "force": "vectors", "outside": "discard"}
            found = await bench.jobs.plan("m1", "firmware.elf", options)
            assert found["proven"] is False
            assert (found["keep_bytes"], found["lose_bytes"]) == (0, 2048 - 514)
            assert found["part"] == [
                {"name": "firmware.elf", "start": 0x08000000, "end": 0x08000200},
                {"name": "patch", "start": 0x08000200, "end": 0x08000202},
            ]
            assert set(found) == set(PLANNED), "what the tests of the clients are given"
            assert set(found["range"][0]) == set(PLANNED["range"][0])
            assert (found["pid"], found["flash_bytes"]) == (0x415, 512 * 1024)
            bench.jobs._lanes["m1"].settings = Target(chip="L476", flash_kib=512, protect=["0x08000600+1"])
            with pytest.raises(NotAllowed, match=r"0x08000000\.\.0x080007ff.*0x08000600\.\.0x08000600"):
                await bench.jobs.plan("m1", "firmware.elf", options)
            assert len(bench["m1"].runs) == runs, "nobody touched the target"

    run(work)


def test_plans_are_made_one_at_a_time_whoever_goes_away(tmp_path: Path) -> None:
    """Each runs a parser for up to two minutes, and whoever may look may ask for one."""

    async def work() -> None:
        async with Bench(tmp_path) as bench:
            bench.jobs._lanes["m1"].settings = Target(chip="L476", flash_kib=512)
            running, most, go_on = 0, 0, threading.Event()
            load = bench.store.load

            def slow(*args: Any, **more: Any) -> Image:
                nonlocal running, most
                running += 1
                most = max(most, running)
                go_on.wait(10)
                running -= 1
                return load(*args, **more)

            bench.store.load = slow  # type: ignore[method-assign]
            asked = {"addr": 0x08000000, "force": "vectors"}
            plans = [asyncio.ensure_future(bench.jobs.plan("m1", "firmware.elf", asked)) for _ in range(PLANS_WAITING)]
            await asyncio.sleep(0)
            plans[0].cancel()
            with pytest.raises(TooMany):
                await bench.jobs.plan("m1", "firmware.elf", asked)
            while not running:
                await asyncio.sleep(0.001)
            go_on.set()
            made = await asyncio.gather(*plans[1:])
            assert (most, {plan["pid"] for plan in made}) == (1, {0x415})

    run(work)
