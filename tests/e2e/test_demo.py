"""``bridged demo`` as a user runs it: real daemon, real simulators on pseudo-terminals, real netcat, from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridged import demo
from bridged.protocol.reply import Reply
from bridged.sim.demo_images import demo_image, demo_images

COMMAND = [sys.executable, "-m", "bridged", "demo"]


def run_demo(*options: str, path: str | None = None, temporary: Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, TMPDIR=str(temporary))
    if path is not None:
        environment["PATH"] = path
    return subprocess.run([*COMMAND, *options], env=environment, capture_output=True, text=True, timeout=110, check=False)


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for the demo's own; its path must be short enough for the address of a Unix socket."""
    return tmp_path_factory.mktemp("d")


def test_three_targets_are_flashed_proven_and_booted(temporary: Path) -> None:
    done = run_demo("--fast", temporary=temporary)
    assert (done.returncode, done.stderr) == (0, "")
    for image in demo_images():
        target = image.chip.lower()
        assert f"{image.banner!r}" in done.stdout
        assert f"{target:6}251 already so" in done.stdout
    assert "3 of 3 targets flashed, proven and running" in done.stdout
    assert list(temporary.iterdir()) == []


def test_it_works_without_netcat_and_says_so_and_keep_keeps(temporary: Path) -> None:
    done = run_demo("--fast", "--keep", "--chip", "L476", path="/nowhere", temporary=temporary)
    assert (done.returncode, done.stderr) == (0, "")
    assert "in place of nc" in done.stdout
    assert [path.name for path in temporary.glob("*/*.log")] != []
    kept = Path(done.stdout.strip().splitlines()[-1].removeprefix("kept: "))
    assert "flash of l476: succeeded" in (kept / "gateway.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_in_the_middle_it_leaves_nothing_behind(number: signal.Signals, temporary: Path) -> None:
    environment = dict(os.environ, TMPDIR=str(temporary), PYTHONUNBUFFERED="1")
    with subprocess.Popen(
        [*COMMAND, "--chip", "F756"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "the job in one pipe" in line:
                break
        started = descendants(process.pid)
        assert len([pid for pid in started if alive(pid)]) >= 2
        process.send_signal(number)
        assert process.wait(40) == 130
        deadline = time.monotonic() + 10
        while any(alive(pid) for pid in started) and time.monotonic() < deadline:
            os.sched_yield()
        assert [pid for pid in started if alive(pid)] == []
    assert list(temporary.iterdir()) == []


def test_a_gateway_that_cannot_start_ends_the_demo_with_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "configuration", lambda *_: "[gateway]\nnmae = 'typo'\n")
    assert demo.main(["--fast", "--quiet", "--chip", "L476"]) == 1
    said, told = capsys.readouterr()
    assert said == ""
    assert "gateway ended with status" in told
    assert "nmae" in told


def test_every_deviation_is_a_failure() -> None:
    with pytest.raises(demo.DemoFailed, match=r"expected 251, the daemon said 250 .*changed=1"):
        demo.expect(Reply(250, "", {"changed": "1"}), 251, "a second ENSURE")
    with pytest.raises(demo.DemoFailed, match="no evidence="):
        demo.need(Reply(250, "", {"state": "succeeded"}), "evidence")
    assert demo.need(Reply(250, "", {"result.evidence": "full"}), "evidence") == "full"


def test_figures_compare_the_wire_with_the_time_spent() -> None:
    phases = {
        "erase": demo.Phase(5.6, 0, 0),
        "write": demo.Phase(10.0, 95_000, 100_000),
        "verify": demo.Phase(10.0, 100_000, 104_727),
    }
    outcome = demo.Outcome(demo_image("F756"), "f756", "1", 27.5, 115200, 5, 95_000, 0, 100_000, "hello", phases)
    assert outcome.wire_limit_s == pytest.approx(204_727 * 11 / 115200)
    head, row = demo.figures([outcome]).splitlines()
    assert head.split()[-1] == "reached"
    assert row.split()[-1:] == ["%"]
    assert row.split()[-2] == "98"


def test_only_what_a_flash_moves_counts_as_touched() -> None:
    samples = {
        'bridged_flash_bytes_total{op="write",target="f756"}': 1.0,
        'bridged_flash_bytes_total{op="read",target="f756"}': 2.0,
        'bridged_sectors_total{op="erased",target="f756"}': 3.0,
        "process_cpu_seconds_total": 4.0,
    }
    assert sorted(demo.touched(samples).values()) == [1.0, 3.0]
