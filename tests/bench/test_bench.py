"""The benchmark must not rot: its device, its figures, its rule for rejecting runs, one short round of everything.

No figure of the wall clock is judged here. What is held are counts in virtual time, which are exact.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import serial  # type: ignore[import-untyped]

from bridged.images import formats
from tests.bench import cost, figures, load, report, rig, run
from tests.bench.figures import Run
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
    if host == "stm32flash-rt" and not run.may_realtime():
        missing("real-time priority", "run the tests as root, or allow it (LimitRTPRIO=, /etc/security/limits.d)")
    done = run.one_run(host, 921600, loaded=host == "daemon", data=SMALL, options=FAST, busy=True)
    assert done.rejected == ""
    assert done.overruns == 0
    assert done.wire_bytes >= 2 * 16 * 268
    assert done.dialogue_s <= done.wall_s
    if host == "daemon":
        assert done.requests > 0


def test_what_it_costs_is_measured_and_the_page_is_written() -> None:
    found = run.image_of(16384)
    results: dict[str, Any] = {
        "size_bytes": len(found),
        "asked_runs": 1,
        "machine": {"processor": "any"},
        "virtual": cost.virtual(found, [921600]),
        "runs": [],
    }
    text = report.page(results, run.HOSTS)
    assert "not measured" in text
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


# --- figures -------------------------------------------------------------------------------------------------------


def result(host: str = "session", dialogue_s: float = 1.0, **changes: Any) -> Run:
    numbers = {
        "baud": 921600,
        "loaded": False,
        "wall_s": dialogue_s,
        "limit_s": 0.9,
        "wire_bytes": 1,
        "answers": 1,
        "overruns": 0,
        "late_s": 0.0,
        "late_max_s": 0.0,
        "late_p50_us": 1.0,
        "late_p99_us": 1.0,
        "gap_p50_us": 1.0,
        "gap_p99_us": 1.0,
        "gap_s": 0.0,
        "cpu_s": 0.1,
    }
    return Run(host=host, dialogue_s=dialogue_s, **{**numbers, **changes})


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


def test_a_run_on_a_busy_machine_does_not_count() -> None:
    told = device_report()
    assert figures.why_rejected(told, exit_status=0, content_right=True, others_cores=figures.OTHERS_CORES) == ""
    assert "0.31 cores" in figures.why_rejected(told, exit_status=0, content_right=True, others_cores=0.31)
    busy = [result("session", others_cores=0.9), result("stm32flash")]
    text = report.page({"runs": [vars_of(r) for r in busy], "size_bytes": 1024, "machine": {}}, run.HOSTS)
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
    text = report.page({"runs": [vars_of(r) for r in runs], "size_bytes": 1024, "machine": {}}, run.HOSTS)
    assert "| session, 921600, idle: rate against stm32flash | ≥ 1 | 0.909 (0.909 to 0.909) | **missed** (a look) |" in text
    assert "a look, not a measurement" in text


def test_enough_runs_on_a_quiet_machine_are_judged() -> None:
    runs = [result(host, seconds) for host, seconds in (("session", 1.0), ("stm32flash", 1.1)) for _ in range(7)]
    text = report.page({"runs": [vars_of(r) for r in runs], "size_bytes": 1024, "machine": {}}, run.HOSTS)
    assert "| ≥ 1 | 1.100 (1.100 to 1.100) | met |" in text
    assert "a look" not in text


def test_rejected_runs_are_told_and_not_counted() -> None:
    runs = [result("session", 1.0), result("session", 9.0, rejected="the device was late"), result("stm32flash", 1.0)]
    text = report.page({"runs": [vars_of(r) for r in runs], "size_bytes": 1024, "machine": {}}, run.HOSTS)
    assert "Rejected: 1 of 3 runs." in text
    assert "- session, 921600, idle, 9.00 s: the device was late" in text
    assert "| ≥ 1 | 1.000 (1.000 to 1.000) | met (a look) |" in text


def test_loss_under_load_is_counted_beyond_the_spread() -> None:
    idle = [result(dialogue_s=s) for s in (1.00, 1.01, 1.02, 1.03, 1.04)]
    loaded = [result(dialogue_s=s, loaded=True) for s in (1.05, 1.05, 1.06)]
    found = [v for v in report.verdicts({}, [*idle, *loaded]) if v.text.startswith("session, 921600: lost")]
    assert [v.met for v in found] == [True]  # 3 % slower, of which 2 % is the spread
    slow = [result(dialogue_s=1.2, loaded=True)]
    found = [v for v in report.verdicts({}, [*idle, *slow]) if v.text.startswith("session, 921600: lost")]
    assert [v.met for v in found] == [False]


def test_every_host_comes_first_equally_often() -> None:
    hosts = list(run.HOSTS)
    cells = list(run.rounds(len(hosts), hosts, (115200,)))
    assert sorted(cell[0][0] for cell in cells) == sorted(hosts * 2)
    assert all(sorted(host for host, _, _ in cell) == sorted(hosts) for cell in cells)
    assert len({one for cell in cells for one in cell}) == len(hosts) * 2


def test_quick_writes_no_page_of_the_documents() -> None:
    args = run.parse(["--quick"])
    assert args.page.parent == rig.BUILT
    assert (args.runs, args.kib, args.baud) == (2, 64, [921600])


def vars_of(done: Run) -> dict[str, Any]:
    return dataclasses.asdict(done)
