"""The benchmark must not rot: its device, its figures, its rule for rejecting runs, one short round of everything.

No figure of the wall clock is judged here. What is held are counts in virtual time, which are exact.
One benchmark, so one file.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import serial  # type: ignore[import-untyped]

from bridged.images import formats
from tests.bench import cost, figures, load, plan, plot, report, rig, run, store
from tests.bench.figures import Cell, Run
from tests.support import missing, require_tool

SMALL = run.image_of(4096)
FAST = ("--unpaced", "--program-us", "0")


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    if shutil.which(rig.COMPILER) is None:
        missing(rig.COMPILER, f"apt install {rig.COMPILER} libc6-dev")
    rig.build()


@pytest.fixture
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("b")


# --- the device ---------------------------------------------------------------------------------------------------


class Wire:
    """A host that is a few lines: sends, and reads exactly what it expects."""

    def __init__(self, device: rig.Device) -> None:
        self.port: Any = serial.Serial(device.port, 115200, timeout=5)

    def say(self, sent: str, expected: str) -> None:
        self.port.write(bytes.fromhex(sent))
        wanted = bytes.fromhex(expected)
        assert self.port.read(len(wanted)).hex() == wanted.hex()

    def close(self) -> None:
        self.port.close()


def test_the_device_speaks_an3155(work: Path) -> None:
    with rig.Device(work, "d", *FAST, flash_bytes=16) as device:
        wire = Wire(device)
        wire.say("7f", "79")
        wire.say("7f 7f", "1f")  # synchronised already: no command
        wire.say("00 ff", "79 0b 31 00 01 02 11 21 31 44 63 73 82 92 79")
        wire.say("01 fe", "79 31 00 00 79")
        wire.say("02 fd", "79 01 04 13 79")
        wire.say("11 ee", "79")
        wire.say("1f ff 7a 22 b8", "79")
        wire.say("01 fe", "79 00 04")  # 1024 KiB
        wire.say("31 ce", "79")
        wire.say("08 00 00 00 08", "79")
        wire.say("03 11 22 33 44 47", "79")
        wire.say("31 ce", "79")
        wire.say("08 00 00 00 08", "79")
        wire.say("03 11 22 33 44 48", "1f")  # wrong checksum
        wire.say("11 ee", "79")
        wire.say("09 00 00 00 09", "1f")  # nothing is there
        wire.say("31 ce", "79")
        wire.say("08 00 00 00 08", "79")
        wire.say("03 0f 0f 0f 0f 03", "79")  # programming only clears bits
        wire.say("44 bb", "79")
        wire.say("00 00 00 01 01", "79")  # sector 1: the first one stays
        wire.close()
    assert device.flash == bytes.fromhex("01020304") + b"\xff" * 12
    assert device.report["nacks"] == 3
    assert device.report["overruns"] == 0


def test_the_device_loses_what_comes_while_it_programs(work: Path) -> None:
    with rig.Device(work, "d", "--unpaced", "--program-us", "20000") as device:
        wire = Wire(device)
        wire.say("7f", "79")
        wire.say("31 ce", "79")
        wire.say("08 00 00 00 08", "79")
        wire.say("03 11 22 33 44 47 00 ff 55", "79")  # three bytes too early: one is kept
        wire.say("ff", "79")  # 00, which was kept, and its complement: Get
        wire.close()
    assert device.report["overruns"] == 2


def test_the_device_paces_bytes_and_never_sends_one_early(work: Path) -> None:
    with rig.Device(work, "d", "--baud", "9600") as device:
        wire = Wire(device)
        wire.say("7f", "79")
        began = time.monotonic()
        wire.say("00 ff", "79 0b 31 00 01 02 11 21 31 44 63 73 82 92 79")
        assert time.monotonic() - began >= 17 * 11 / 9600
        wire.close()
    assert device.report["wire_s"] == pytest.approx(19 * 11 / 9600, rel=1e-3)
    assert device.report["dialogue_s"] >= device.report["wire_s"]
    assert device.report["late_last"]["count"] == device.report["answers"] == 2


def test_the_device_obeys_its_lines(work: Path) -> None:
    with rig.Device(work, "d", *FAST, "--startup-ms", "0") as device:
        box = socket.socket(socket.AF_UNIX)
        box.connect(str(device.lines))

        def move(line: str) -> None:
            box.sendall(line.encode() + b"\n")
            assert box.recv(100) == b"ok\n"

        wire = Wire(device)
        wire.say("7f", "79")
        for line in ("boot0 1", "nrst 0", "nrst 1"):
            move(line)
        wire.say("7f", "79")  # fresh again
        assert device.snapshot()["syncs"] == 2
        for line in ("boot0 0", "nrst 0", "nrst 1"):
            move(line)
        wire.port.timeout = 0.05
        wire.port.write(b"\x7f")
        assert wire.port.read(1) == b""  # the application runs
        box.sendall(b"nonsense\n")
        assert box.recv(100).startswith(b"error")
        wire.close()
        box.close()
    assert device.report["syncs"] == 0
    assert device.report["ignored"] == 1


@pytest.mark.parametrize("part", ["F103", "F407", "F756", "L476"])
def test_our_session_flashes_every_part_of_the_device(work: Path, part: str) -> None:
    image = work / "image.bin"
    image.write_bytes(SMALL)
    with rig.Device(work, "d", *FAST, "--part", part, flash_bytes=len(SMALL)) as device:
        chip = "0x410" if part == "F103" else part
        options = ["--port", device.port, "--lines", str(device.lines), "--baud", "115200", "--chip", chip, str(image)]
        status, _, _, output = rig.run([sys.executable, "-m", "tests.bench.ours", *options])
    assert status == 0, output
    assert json.loads(output)["evidence"] == "full"
    assert device.flash == SMALL
    assert device.report["overruns"] == 0


# --- one round of everything ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", run.HOSTS)
def test_one_run_of_each_host(host: str) -> None:
    if host.startswith("stm32flash"):
        require_tool("stm32flash", "stm32flash")
    if host in ("stm32flash-rt", "session-plain") and not run.may_realtime():
        missing("real-time priority", "run the tests as root, or allow it (LimitRTPRIO=, /etc/security/limits.d)")
    condition = {"daemon": "api", "stm32flash-rt": "hogs", "session-plain": "hogs"}.get(host, "idle")
    done = run.one_run(Cell(host, 921600, condition, 4), FAST, busy=True)
    assert done.rejected == ""
    assert done.cell == Cell(host, 921600, condition, 4)
    assert done.overruns == 0
    assert done.wire_bytes >= 2 * 16 * 268
    assert done.dialogue_s <= min(done.wall_s, done.slowest_s)
    assert (done.requests > 0) is (condition == "api")


def test_two_targets_at_once_are_two_sessions_of_one_daemon_and_leave_no_second_unexplained() -> None:
    done = run.one_run(Cell("daemon", 115200, "idle", 4, targets=2), busy=True)
    assert done.rejected == ""
    assert done.wall_s < 2 * done.dialogue_s  # at once, not one after the other
    assert done.dialogue_s <= done.slowest_s <= done.wall_s
    found = figures.parts(done)
    assert sum(found.values()) == pytest.approx(done.dialogue_s)
    assert found["payload"] == pytest.approx(2 * 4096 * 11 / 115200)
    # The device accounts for everything. A few bytes that came before it listened are on the wire, not in the dialogue.
    assert abs(found["unexplained"]) < 0.002 * done.dialogue_s


def test_the_device_tells_stalls_pieces_and_resets_apart(work: Path) -> None:
    with rig.Device(work, "d", *FAST, "--startup-ms", "0") as device:
        box = socket.socket(socket.AF_UNIX)
        box.connect(str(device.lines))
        wire = Wire(device)
        wire.say("7f", "79")
        time.sleep(0.05)
        wire.port.write(b"\x00")
        time.sleep(0.03)
        wire.say("ff", "79 0b 31 00 01 02 11 21 31 44 63 73 82 92 79")
        time.sleep(0.02)
        for line in (b"boot0 1", b"nrst 0", b"nrst 1"):
            box.sendall(line + b"\n")
            assert box.recv(100) == b"ok\n"
        wire.say("7f", "79")
        wire.close()
        box.close()
    told = device.report
    assert told["gaps_over_s"] == pytest.approx(told["gaps"]["sum_s"] - 0.001, abs=1e-5)
    assert told["gaps"]["sum_s"] >= 0.045
    assert told["in_frames_s"] >= 0.02  # from when the device saw the first byte
    assert told["resets_s"] >= 0.015
    accounted = (
        sum(told[name] for name in ("in_frames_s", "resets_s", "wire_s")) + told["gaps"]["sum_s"] + told["late_last"]["sum_s"]
    )
    assert accounted == pytest.approx(told["dialogue_s"], abs=0.001)


def test_the_page_is_written_from_what_there_is(tmp_path: Path) -> None:
    results = store.Results(tmp_path / "r.jsonl")
    results.put(machine={"processor": "any"}, virtual=cost.virtual_account(quick=True))
    text = report.page(results, run.HOSTS)
    assert "not measured" in text
    assert "| sampled re-check of an unchanged image, 115200 (exact) | ≤ 2 s |" in text
    assert "**missed**" not in text


def test_a_missing_compiler_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
    monkeypatch.setattr(rig, "BUILT", work)
    monkeypatch.setattr(rig, "COMPILER", "no-such-compiler")
    with pytest.raises(rig.Missing, match="apt install no-such-compiler"):
        rig.build()


def test_the_help_of_the_device_names_every_option() -> None:
    told = subprocess.run([str(rig.build()), "--wrong"], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "--program-us" in told.stderr


def test_the_load_s_hex_file_is_a_hex_file() -> None:
    text = load.intel_hex(1, 200_000)
    assert abs(len(text) - 200_000) < 2000
    image = formats.parse(text, "hex", None)
    assert image.start == 0x08000000
    assert image.size_bytes > 60_000


# --- counts that CI holds ------------------------------------------------------------------------------------------


def test_a_flash_of_256_kib_costs_exactly_this() -> None:
    """Every Write and Read Memory is 268 bytes and 3 turnarounds; the rest is entering, asking who it is, and the erase.

    Whoever changes a number here has changed what the product costs on a wire, and says so in the commit.
    """
    account = cost.virtual(run.image_of(256 * 1024), [921600])["921600"]
    blocks = 1024
    assert account["overruns"] == account["violations"] == 0
    assert account["host_s"] == 0
    assert account["bytes_out"] - blocks * (265 + 9) <= 250
    assert account["bytes_in"] - blocks * (3 + 259) <= 1600
    assert account["turnarounds"] - blocks * 6 <= 70
    assert account["total_s"] <= 7.8


def test_a_first_flash_moves_what_its_blocks_need_what_is_kept_and_hardly_more() -> None:
    for row in cost.first_flash():
        assert row["bytes"] - row["image_bytes"] - row["kept_bytes"] <= 2500, row


def test_a_sampled_recheck_of_an_unchanged_image_takes_less_than_two_seconds() -> None:
    account = cost.recheck()
    assert account["total_s"] < 2
    assert account["bytes"] <= 6000


# --- figures -------------------------------------------------------------------------------------------------------


def result(host: str = "session", dialogue_s: float = 1.0, **changes: Any) -> Run:
    numbers = {
        "baud": 921600,
        "condition": "idle",
        "kib": 1,
        "wall_s": dialogue_s,
        "limit_s": 0.9,
        "program_s": 0.1,
        "wire_bytes": 3000,
        "answers": 1,
        "overruns": 0,
        "late_s": 0.0,
        "late_max_s": 0.0,
        "late_p50_us": 1.0,
        "late_p99_us": 1.0,
        "gap_p50_us": 1.0,
        "gap_p99_us": 1.0,
        "gap_s": 0.0,
        "gap_over_s": 0.0,
        "in_frames_s": 0.0,
        "resets_s": 0.0,
        "cpu_s": 0.1,
        "slowest_s": dialogue_s,
        "took_s": dialogue_s + 1,
    }
    return Run(host=host, dialogue_s=dialogue_s, **{**numbers, **changes})


def page_of(runs: Sequence[Run]) -> str:
    return report.page(results_of(runs), run.HOSTS)


def results_of(runs: Sequence[Run], **facts: Any) -> store.Results:
    """Results that are on no disk."""
    results = store.Results(Path("/nowhere/r.jsonl"))
    results.runs.extend(runs)
    results.facts |= facts
    return results


def verdict(runs: Sequence[Run], beginning: str, **facts: Any) -> figures.Verdict:
    (found,) = (v for v in report.verdicts(results_of(runs, **facts)) if v.text.startswith(beginning))
    return found


def device_report(late_s: float = 0.0, late_max_us: float = 0.0, **changes: Any) -> dict[str, Any]:
    late = {"sum_s": late_s, "max_us": late_max_us}
    return {"late_last": late, "wire_s": 9.0, "program_s": 1.0, "erase_s": 0.0, "paced": True, **changes}


@pytest.mark.parametrize(
    ("told", "status", "right", "reason"),
    [
        (device_report(), 0, True, ""),
        (device_report(late_s=0.29), 0, True, ""),
        (device_report(late_s=0.31), 0, True, "late by 0.310 s in all"),
        (device_report(late_max_us=99_000), 0, True, ""),
        (device_report(late_max_us=101_000), 0, True, "late by 101.0 ms once"),
        (device_report(late_s=5.0, paced=False), 0, True, ""),
        (device_report(), 1, True, "status 1"),
        (device_report(), 0, False, "does not hold the image"),
    ],
)
def test_which_runs_count(told: dict[str, Any], status: int, right: bool, reason: str) -> None:
    found = figures.why_rejected(told, exit_status=status, content_right=right)
    assert (found == "") is (reason == "")
    assert reason in found


def test_a_run_beside_a_load_that_was_refused_does_not_count() -> None:
    assert "3 of its requests" in figures.why_rejected(device_report(), exit_status=0, content_right=True, load_failed=3)


def test_a_run_on_a_busy_machine_does_not_count() -> None:
    told = device_report()
    assert figures.why_rejected(told, exit_status=0, content_right=True, others_cores=figures.OTHERS_CORES) == ""
    assert "0.31 cores" in figures.why_rejected(told, exit_status=0, content_right=True, others_cores=0.31)
    busy = [result("session", others_cores=0.9), result("stm32flash")]
    text = page_of(busy)
    assert "the conditions called idle were not" in text


def test_what_others_do_on_the_machine_is_seen() -> None:
    busy, own = rig.machine_busy_s(), rig.own_cpu_s()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    spent = rig.own_cpu_s() - own
    assert spent > 0.05
    assert rig.machine_busy_s() - busy >= spent - 2 / rig.TICKS


def test_spread_of_few_and_many() -> None:
    assert figures.spread([3.0]) == figures.Spread(1, 3.0, 3.0, 3.0, 3.0, 3.0)
    seven = figures.spread([7, 1, 2, 6, 4, 3, 5])
    assert (seven.median, seven.least, seven.most, seven.middle) == (4, 1, 7, 3)
    with pytest.raises(ValueError, match="no run"):
        figures.spread([])


def test_the_interval_of_a_ratio_holds_it_and_narrows_with_the_spread() -> None:
    wide = figures.ratio([1.9, 2.0, 2.1, 2.0, 2.2, 1.8, 2.0], [0.9, 1.0, 1.1, 1.0, 1.2, 0.8, 1.0])
    narrow = figures.ratio([2.0] * 7, [1.0] * 7)
    assert wide.value == narrow.value == narrow.low == narrow.high == 2.0
    assert wide.low < 2.0 < wide.high
    assert figures.ratio([1.9, 2.0, 2.1], [1.0]) == figures.ratio([1.9, 2.0, 2.1], [1.0])


def test_a_miss_is_printed_as_a_miss() -> None:
    runs = [result("session", 1.1), result("stm32flash", 1.0)]
    text = page_of(runs)
    assert "| session, 921600, idle: rate against stm32flash | ≥ 1 | 0.909 (0.909 to 0.909) | **missed** (1 run) |" in text
    assert "a look, not a measurement" in text


def test_enough_runs_on_a_quiet_machine_are_judged() -> None:
    runs = [result(host, seconds) for host, seconds in (("session", 1.0), ("stm32flash", 1.1)) for _ in range(7)]
    text = page_of(runs)
    assert "| ≥ 1 | 1.100 (1.100 to 1.100) | met |" in text
    assert "a look" not in text


def test_rejected_runs_are_told_and_not_counted() -> None:
    runs = [result("session", 1.0), result("session", 9.0, rejected="the device was late"), result("stm32flash", 1.0)]
    text = page_of(runs)
    assert "Rejected: 1 of 3 runs." in text
    assert "- session, 921600, idle, 1 KiB, 9.00 s: the device was late" in text
    assert "| ≥ 1 | 1.000 (1.000 to 1.000) | met (1 run) |" in text


def test_loss_under_load_is_counted_beyond_the_spread() -> None:
    idle = [result(dialogue_s=s) for s in (1.00, 1.01, 1.02, 1.03, 1.04)]
    loaded = [result(dialogue_s=s, condition="api") for s in (1.05, 1.05, 1.06)]
    assert verdict([*idle, *loaded], "session, 921600: lost under API").met  # 3 % slower, of which 2 % is the spread
    slow = [result(dialogue_s=1.2, condition="api")]
    assert verdict([*idle, *slow], "session, 921600: lost under API").met is False
    assert verdict(idle, "session, 921600: lost under API").met is None


@pytest.mark.parametrize(
    ("ours", "theirs", "met"),
    [(1.09, 1.20, True), (1.11, 1.20, False), (0.99, 1.20, True), (1.10, 0.99, False), (1.00, 1.00, True)],
)
def test_what_hogs_cost_is_compared_with_what_they_cost_stm32flash(ours: float, theirs: float, met: bool) -> None:
    runs = [result("session", 1.0), result("stm32flash", 1.0)]
    runs += [result("session", ours, condition="hogs"), result("stm32flash", theirs, condition="hogs")]
    assert verdict(runs, "session, 921600: lost under CPU load").met is met


def test_of_several_targets_the_slowest_is_judged_against_one_alone_with_the_same_image() -> None:
    alone = [result("daemon", s, baud=115200, kib=64) for s in (10.0, 10.1, 10.2)]
    other = [result("daemon", 40.0, baud=115200, kib=256)]
    runs = [*alone, *other, result("daemon", 10.1, baud=115200, kib=64, targets=8, slowest_s=10.4)]
    assert verdict(runs, "8 targets at once").found.startswith("1.98")
    late = result("daemon", 10.1, baud=115200, kib=64, targets=8, slowest_s=10.6)
    assert verdict([*alone, *other, late], "8 targets at once").met is False


def test_the_parts_of_a_dialogue_add_up_and_what_is_left_is_named() -> None:
    done = result(
        dialogue_s=1.0,
        baud=115200,
        kib=4,
        wire_bytes=8600,
        program_s=0.02,
        late_s=0.01,
        gap_s=0.1,
        gap_over_s=0.06,
        in_frames_s=0.002,
    )
    found = figures.parts(done)
    assert tuple(found) == figures.PARTS
    assert sum(found.values()) == pytest.approx(1.0)
    assert (found["host"], found["stalls"]) == pytest.approx((0.04, 0.06))
    assert found["framing"] == pytest.approx((8600 - 8192) * 11 / 115200)
    left = 1.0 - 8600 * 11 / 115200 - 0.02 - 0.01 - 0.1 - 0.002
    assert found["unexplained"] == pytest.approx(left)
    assert f"{100 * left:.2f} |" in page_of([done])


# --- what is measured, in which order -----------------------------------------------------------------------------


def simulated(
    budget_s: float, runs: list[Run] | None = None, cost_done: bool = False, rejects: str = ""
) -> tuple[list[Run], float]:
    """A measurement in which each run takes what is expected; all runs, and the seconds that are left."""
    runs = [] if runs is None else runs
    while (following := plan.next_round(runs, budget_s, cost_done=cost_done)) is not None:
        cost_done = cost_done or following.group == plan.COST
        budget_s -= following.seconds
        for cell in following.cells:
            took = plan.expected_s(cell, {})
            why = "late" if cell.host == rejects else ""
            runs.append(
                result(
                    cell.host,
                    1.0,
                    baud=cell.baud,
                    condition=cell.condition,
                    kib=cell.kib,
                    targets=cell.targets,
                    took_s=took,
                    rejected=why,
                )
            )
        assert len(runs) < 5000, "it never ends"
    return runs, budget_s


def counted(runs: Sequence[Run]) -> dict[str, int]:
    """Runs that count of each group: the fewest of any of its cells."""
    have = Counter(r.cell for r in runs if not r.rejected)
    return {name: min(have[cell] for cell in group.cells) for name, group in plan.GROUPS.items()}


def test_everything_is_measured_seven_times_when_there_is_time() -> None:
    runs, _ = simulated(float("inf"))
    have = counted(runs)
    assert set(have.values()) == {plan.ENOUGH_RUNS}
    assert len(runs) == plan.ENOUGH_RUNS * len({cell for group in plan.GROUPS.values() for cell in group.cells})


def test_three_quarters_of_an_hour_hold_seven_runs_of_every_host_at_the_high_rate_and_some_of_all_else() -> None:
    runs, left_s = simulated(45 * 60)
    assert left_s >= 0
    have = counted(runs)
    assert have["fast"] == have["hogs"] == plan.ENOUGH_RUNS
    assert have["slow"] >= 2
    assert have["parallel"] >= 2


def test_a_short_measurement_is_the_beginning_of_a_long_one_and_slices_add_up() -> None:
    one, _ = simulated(20 * 60)
    assert counted(one)["fast"] >= 3
    before = len(one)
    more, _ = simulated(25 * 60, one, cost_done=True)
    assert len(more) > before
    assert counted(more)["fast"] == plan.ENOUGH_RUNS


def test_nothing_begins_that_does_not_fit() -> None:
    assert plan.next_round([], 20.0, cost_done=False) is None
    assert plan.next_round([], 300.0, cost_done=False, groups=("slow",)) is None
    assert plan.next_round([], 10.0, cost_done=False, groups=(plan.COST,)) is None


def test_a_host_that_is_always_rejected_does_not_keep_the_others() -> None:
    runs, _ = simulated(float("inf"), rejects="stm32loader")
    have = Counter(r.cell for r in runs if not r.rejected)
    assert {have[cell] for group in plan.GROUPS.values() for cell in group.cells} == {0, plan.ENOUGH_RUNS}
    tried = Counter(r.cell for r in runs if r.rejected)
    assert set(tried.values()) == {plan.ATTEMPTS * plan.ENOUGH_RUNS}


def test_what_a_run_took_before_is_what_it_is_expected_to_take() -> None:
    cell = Cell("session", 921600, "idle", 256)
    assert plan.wire_s(cell) == pytest.approx(1024 * 2 * 268 * 11 / 921600 + 1.0486, rel=1e-4)
    assert plan.expected_s(cell, {}) > plan.wire_s(cell)
    assert plan.expected_s(cell, {cell: [10.0, 12.0]}) == 11.0


def test_every_host_comes_first_equally_often() -> None:
    cells = plan.GROUPS["fast"].cells
    rounds = [list(plan.turned(cells, number)) for number in range(len(plan.ALL))]
    for taken in rounds:
        assert sorted(taken) == sorted(cells)
        scenes = [plan.scene_of(cell) for cell in taken]
        assert len([1 for a, b in itertools.pairwise(scenes) if a != b]) == len(set(scenes)) - 1
    assert sorted(taken[0].host for taken in rounds) == sorted(plan.ALL)


# --- slices, history and pictures ---------------------------------------------------------------------------------


def test_runs_are_read_again_and_a_line_that_was_cut_off_is_made_again(tmp_path: Path) -> None:
    results = store.Results(tmp_path / "x" / "r.jsonl")
    results.put(machine={"processor": "a"}, date="1")
    results.add_run(result())
    results.put(date="2")
    with results.path.open("a") as file:
        file.write('{"run": {"host": "ses')
    again = store.Results(results.path)
    assert (again.runs, again.facts) == ([result()], {"machine": {"processor": "a"}, "date": "2"})
    again.add_run(result("daemon"))
    assert [r.host for r in store.Results(results.path).runs] == ["session", "daemon"]
    again.begin_anew()
    assert store.Results(results.path).runs == []
    assert len(list(results.path.parent.iterdir())) == 1


def test_results_of_other_code_or_another_machine_are_in_another_file(tmp_path: Path) -> None:
    for name in ("bridged/a.py", *(f"tests/bench/{name}" for name in store.MEASURED)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1")
    known = {store.code_digest(tmp_path)}
    for name in ("bridged/a.py", "tests/bench/device.c", "tests/bench/naive.py"):
        (tmp_path / name).write_text("2")
        known.add(store.code_digest(tmp_path))
    assert len(known) == 4
    same = store.code_digest(tmp_path)
    (tmp_path / "tests/bench/report.py").write_text("words")
    assert store.code_digest(tmp_path) == same
    assert store.setting_id("a", {"x": "1"}) != store.setting_id("b", {"x": "1"}) != store.setting_id("b", {"x": "2"})


def test_the_history_has_one_line_for_each_setting(tmp_path: Path) -> None:
    path = tmp_path / "h.jsonl"
    results = results_of([result(dialogue_s=s) for s in (1.0, 1.2, 1.1)], commit="c1", cost={"idle_rss_kib": 5, "ready_s": [1]})
    line = store.history_line(results, report.verdicts(results), "one", look=True)
    assert line["cells"]["session, 921600, idle, 1 KiB"]["dialogue_s"] == 1.1
    assert line["cost"] == {"idle_rss_kib": 5}
    for name in ("one", "two", "one"):
        store.write_history(path, {**line, "id": name})
    assert [one["id"] for one in store.read_history(path)] == ["two", "one"]


def test_page_pictures_and_history_are_written(tmp_path: Path) -> None:
    runs = [
        result(host, 1.0 + n / 10, condition=condition, baud=baud)
        for n, host in enumerate(("session", "stm32flash"))
        for condition in ("idle", "api")
        for baud in (57600, 115200, 921600)
    ]
    runs += [result("daemon", targets=n, slowest_s=1.0) for n in (1, 2)]
    written = report.write(results_of(runs, virtual=cost.virtual_account(quick=True)), run.HOSTS, tmp_path, "one")
    assert [path.name for path in written] == [
        "benchmarks.md",
        "benchmarks-history.jsonl",
        "bench-speed.svg",
        "bench-growth.svg",
    ]
    page = written[0].read_text()
    for picture in re.findall(r"\((pictures/[^)]*)\)", page):
        root = ElementTree.fromstring((tmp_path / picture).read_text())
        circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
        assert len(circles) > 2
        _, _, width, height = (float(x) for x in root.attrib["viewBox"].split())
        assert all(0 <= float(c.attrib["cx"]) <= width and 0 <= float(c.attrib["cy"]) <= height for c in circles)
    assert "### Several targets at once" in page
    assert "### Rate by rate, idle" in page


@pytest.mark.parametrize(
    ("least", "most", "wanted"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (91.2, 99.6, [90, 92, 94, 96, 98, 100]),
        (0, 0.7, [0, 0.2, 0.4, 0.6, 0.8]),
        (5, 5, [5, 6]),
    ],
)
def test_ticks_are_round_and_cover_the_range(least: float, most: float, wanted: list[float]) -> None:
    assert plot.ticks(least, most) == pytest.approx(wanted)


def test_quick_writes_no_page_of_the_documents() -> None:
    assert run.parse(["--quick"]).docs.is_relative_to(rig.BUILT)
