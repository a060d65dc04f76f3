"""The gateway's power is cut at a random moment of a flash: QEMU is killed, and what Linux had not written is gone.

``pair`` dies with the gateway, ``out`` has a supply of its own and goes on with what it was told (an erase, for one); its pins
fall back to their pulls. After the power is back each job comes to its one end, without anybody's help: the image is proven
in the target, or the job has failed with a code. ``BRIDGED_CUTS`` (3) says how many, ``BRIDGED_CUTS_SEED`` which moments: a
phase of one of both jobs, so that the short ones get their share on a fast machine and a slow one alike, and a while in it.
"""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace

import pytest

from bridged.events import Phase
from bridged.images.model import Image
from tests.vm.bench import Bench, image_for
from tests.vm.record import Tried, record
from tests.vm.test_accidents import check_released

KIB = 1024
CUTS = int(os.environ.get("BRIDGED_CUTS", "3"))
SEED = int(os.environ.get("BRIDGED_CUTS_SEED", "1"))
SIZES = {"pair": 4 * KIB, "out": 12 * KIB}
PHASES = [phase.value for phase in Phase]
MOMENTS = ("stage", "activate", "backup", "erase", "erase", "write", "write", "verify", "boot")
ENDED = ("succeeded", "failed")


def holds(bench: Bench, target: str, image: Image) -> bool:
    return bench.pair_holds(image) if target == "pair" else bench.out_holds(image)


def whole_or_not_bootable(bench: Bench, target: str, image: Image) -> bool:
    """At no moment can a half-written image boot: the block with the vectors is there only if all others are."""
    (segment,) = image.segments
    first = Image.of([(segment.address, bytes(segment.data[:256]))])
    return not holds(bench, target, first) or holds(bench, target, image)


def wait_for(bench: Bench, job: str, phase: str) -> None:
    """Until it is in that phase or past it: some are over before anybody can look."""
    while True:
        found = bench.job(job)
        if found["state"] in ENDED or PHASES.index(found.get("phase") or PHASES[0]) >= PHASES.index(phase):
            return
        time.sleep(0.05)


@pytest.mark.parametrize("number", range(CUTS))
def test_a_power_cut_in_the_middle_of_two_flashes(bench: Bench, number: int) -> None:
    drawn = random.Random(SEED * 1000 + number)
    images, jobs = {}, {}
    # An erase of that size may take a second; the part outside goes on with it while the gateway has no power.
    bench.out.device.timing = replace(bench.out.device.timing, sector_erase_s=1.0)
    for target, size in SIZES.items():
        images[target] = image_for(target, size, seed=drawn.randrange(1 << 30))
        bench.put(images[target], f"cut-{target}-{number}")
    for target in SIZES:
        jobs[target] = bench.flash(target, f"cut-{target}-{number}", "addr=0x08000000", f"id=cut-{SEED}-{number}-{target}")
    wait_for(bench, jobs[drawn.choice(sorted(SIZES))], drawn.choice(MOMENTS))
    time.sleep(drawn.uniform(0, drawn.choice((0.1, 1.0, 3.0))))
    phases = {target: bench.job(job) for target, job in jobs.items()}
    bench.vm.cut()
    for target, image in images.items():
        assert whole_or_not_bootable(bench, target, image)
    bench.vm.boot()
    bench.wait_idle(timeout_s=240)
    for target, job in jobs.items():
        end = bench.wait_state(job, *ENDED, timeout_s=240)
        before = phases[target]
        if before["state"] == "succeeded":
            assert end["state"] == "succeeded", "a terminal state never changes"
        if end["state"] == "succeeded":
            assert holds(bench, target, images[target]), (target, end)
        else:
            assert end.get("error"), end
        check_released(bench, target)
        # Asking again with the same id starts nothing: it is the same job, at the same end.
        again = bench.flash(target, f"cut-{target}-{number}", "addr=0x08000000", f"id=cut-{SEED}-{number}-{target}")
        assert again == job
        assert bench.job(again)["state"] == end["state"]
        moment = f"during {before['phase']}" if before["state"] == "running" else "after the job had ended"
        if before["state"] in ("queued", "waiting"):
            moment = "before the job began"
        supply = "the target's too" if target == "pair" else "the target has its own"
        record(Tried(f"power cut {moment} ({supply})", end["state"], end.get("error", "")))
