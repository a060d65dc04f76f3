"""What an idle gateway costs, and what a job writes to the disk: SD cards die of writing. Counted by the kernel.

``BRIDGED_IDLE_S`` says for how long (15; an hour in ``make soak``). The gates are counts, not times.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass

from tests.vm.bench import Bench, image_for
from tests.vm.record import measured

IDLE_S = float(os.environ.get("BRIDGED_IDLE_S", "15"))
DAY_S = 86400
KIB = 1024
SECTOR = 512


@dataclass(frozen=True)
class Counts:
    """``cpu_us`` of the unit with its children, ``switches`` of all threads of the daemon, ``wrote``: bytes of the daemon,
    ``disk``: bytes that reached the disk from anybody."""

    at_s: float
    cpu_us: int
    switches: int
    wrote: int
    disk: int


def counts(bench: Bench, *, sync: bool = False) -> Counts:
    text = bench.vm.run(
        ("sync; " if sync else "") + "pid=$(systemctl show -P MainPID bridged); cut -d' ' -f1 /proc/uptime; "
        "sed -n 's/^usage_usec //p' /sys/fs/cgroup/system.slice/bridged.service/cpu.stat; "
        "cat /proc/$pid/task/*/status | awk '/ctxt_switches/ { n += $2 } END { print n }'; "
        "sed -n 's/^write_bytes: //p' /proc/$pid/io; awk '{ print $7 }' /sys/block/vda/stat"
    )
    up, cpu, switches, wrote, sectors = text.split()
    return Counts(float(up), int(cpu), int(switches), int(wrote), int(sectors) * SECTOR)


def test_an_idle_gateway_sleeps_and_writes_nothing(bench: Bench) -> None:
    time.sleep(2)  # What the tests before asked for is over.
    before = counts(bench, sync=True)
    time.sleep(IDLE_S)
    after = counts(bench)
    span_s = after.at_s - before.at_s
    wakeups = (after.switches - before.switches) / span_s
    cpu = (after.cpu_us - before.cpu_us) / 1e6 / span_s
    wrote = after.wrote - before.wrote
    synced = counts(bench, sync=True)
    disk = synced.disk - before.disk
    measured(f"measured for {span_s:.0f} s: CPU time of the unit", f"{cpu * 1000:.2f} ms a second")
    measured("context switches of the daemon, all threads", f"{wakeups:.1f} a second")
    measured("bytes that the daemon wrote", f"{wrote}")
    # A day from a few seconds would be that of this measurement, which touches files itself.
    a_day = f" ({disk / span_s * DAY_S / 2**20:.1f} MiB a day)" if span_s >= 600 else ""
    measured("bytes that reached the disk, whole machine, this measurement included", f"{disk / 1024:.0f} KiB{a_day}")
    assert wrote == 0, "SD cards die of writing"
    assert wakeups < 30, "a thread polls"


def test_what_a_job_writes(bench: Bench) -> None:
    """Not the image, which is as large as it is: the journal, the log, the file system."""
    image = image_for("out", 8 * KIB, seed=77)
    bench.put(image, "worn")
    assert "state=succeeded" in bench.say("FLASH out worn addr=0x08000000 wait=1")
    time.sleep(1)
    before = counts(bench, sync=True)
    rounds = 2
    for _ in range(rounds):
        answer = bench.say("FLASH out worn addr=0x08000000 mode=full wait=1")
        assert "state=succeeded" in answer, answer
    after = counts(bench, sync=True)
    mine, disk = (after.wrote - before.wrote) / rounds, (after.disk - before.disk) / rounds
    measured("a flash of 8 KiB, staged before: the daemon writes", f"{mine / KIB:.0f} KiB")
    measured("and what reaches the disk, system journal and file system included", f"{disk / KIB:.0f} KiB")
    measured("so a hundred such jobs a day are", f"{disk * 100 / 2**20:.1f} MiB a day")
    assert mine < 512 * KIB
    assert disk < 2048 * KIB, "more than two MiB for a job"


def test_the_system_journal_gets_two_lines_a_job(bench: Bench) -> None:
    """The log rotates by itself (systemd-journald), so what matters is how much there is of it."""
    assert "state=succeeded" in bench.say("ID out wait=1")
    first = bench.vm.run("journalctl --sync; journalctl -b -u bridged -o cat --no-pager | wc -l").strip()
    assert "state=succeeded" in bench.say("ID out wait=1")
    then = bench.vm.run("journalctl --sync; journalctl -b -u bridged -o cat --no-pager | wc -l").strip()
    assert re.fullmatch(r"\d+", first)
    assert int(then) - int(first) <= 2
