"""What goes wrong at a gateway: processes that are killed, devices that vanish, somebody else on a line or a port.

After each of them: both pins idle, the target in its application, the job at a defined end, and no reset in the middle of an
erase. The ends are collected for docs/reliability-vm.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from bridged.images.model import Image
from tests.vm.bench import Bench, image_for
from tests.vm.record import Tried, record

KIB = 1024
IDLE = {"nrst": 1, "boot0": 0}


def start_flash(bench: Bench, target: str, size_bytes: int, seed: int) -> tuple[str, Image]:
    image = image_for(target, size_bytes, seed=seed)
    bench.put(image, f"image{seed}")
    return bench.flash(target, f"image{seed}", "addr=0x08000000"), image


def check_released(bench: Bench, target: str) -> None:
    assert bench.levels(target) == IDLE
    if target == "pair":
        assert bench.pair_state()["hazard_resets"] == 0
    else:
        assert bench.out.device.stats.hazard_resets == []


# --- killed ------------------------------------------------------------------------------------------------------------


def session_pid(bench: Bench) -> str:
    return bench.vm.wait_for("a session process", "pgrep -f bridged.target.worker").split()[0]


def kill_session(bench: Bench) -> None:
    bench.vm.run(f"kill -KILL {session_pid(bench)}")


def kill_daemon(bench: Bench) -> None:
    bench.vm.run("systemctl kill -s KILL --kill-whom=main bridged")


def kill_both(bench: Bench) -> None:
    bench.vm.run("systemctl kill -s KILL --kill-whom=all bridged")


@pytest.mark.parametrize(
    ("victim", "kill", "phase"),
    [("daemon", kill_daemon, "write"), ("session", kill_session, "erase"), ("both", kill_both, "erase")],
)
def test_a_kill_in_the_middle_leaves_idle_lines_and_the_job_goes_on(
    bench: Bench, victim: str, kill: Callable[[Bench], None], phase: str
) -> None:
    job, image = start_flash(bench, "out", 20 * KIB, 100 + len(victim))
    bench.wait_phase(job, phase)
    began = bench.started()
    kill(bench)
    if victim != "session":
        bench.wait_started(after=began)
    end = bench.wait_state(job, "succeeded", "failed")
    assert end["state"] == "succeeded", end
    assert int(end["attempts"]) == 2
    assert bench.out_holds(image)
    check_released(bench, "out")
    record(Tried(f"SIGKILL of {victim} during {phase}", end["state"]))


# --- ended in order ----------------------------------------------------------------------------------------------------


def test_a_stop_parks_the_job_and_the_next_start_finishes_it(bench: Bench) -> None:
    job, image = start_flash(bench, "pair", 8 * KIB, 140)
    bench.wait_phase(job, "write")
    bench.vm.run("systemctl stop bridged")
    assert bench.levels("pair") == IDLE
    moved = len(bench.moves("pair"))
    # Parked, and left alone until somebody starts the daemon.
    assert sorted(bench.vm.run("systemctl show -P SubState -P Result bridged").split()) == ["dead", "success"]
    assert len(bench.moves("pair")) == moved
    bench.vm.run("systemctl start bridged")
    end = bench.wait_state(job, "succeeded", "failed")
    assert end["state"] == "succeeded", end
    assert bench.pair_holds(image)
    check_released(bench, "pair")
    record(Tried("systemctl stop during write", end["state"], end.get("error", "")))


def test_a_stop_during_an_erase_and_during_the_proof(bench: Bench) -> None:
    """The command is finished first: the part outside knows of every reset, and of what it was doing then."""
    timing = bench.out.device.timing
    bench.out.device.timing = replace(timing, sector_erase_s=1.5)
    seen = 0
    try:
        job, image = start_flash(bench, "out", 24 * KIB, 143)
        for phase in ("erase", "verify"):
            bench.wait_phase(job, phase)
            bench.vm.run("systemctl stop bridged")
            assert bench.levels("out") == IDLE
            bench.vm.run("systemctl start bridged")
            phases = re.findall(r"\bphase=(\w+)", bench.say(f"LOG {job} from={seen}"))
            assert phases[phases.index("release") - 1] == phase, phases
            seen = int(bench.job(job)["seq"]) + 1
    finally:
        bench.out.device.timing = timing
    end = bench.wait_state(job, "succeeded", "failed")
    assert (end["state"], end["attempts"]) == ("succeeded", "1"), end
    assert bench.out_holds(image)
    check_released(bench, "out")
    for phase in ("erase", "verify"):
        record(Tried(f"systemctl stop during {phase}", end["state"]))


def test_a_reboot_in_the_middle_of_a_flash(bench: Bench) -> None:
    job, image = start_flash(bench, "out", 24 * KIB, 142)
    bench.wait_phase(job, "write")
    bench.vm.reboot()
    bench.wait_idle(timeout_s=180)
    end = bench.wait_state(job, "succeeded", "failed")
    assert end["state"] == "succeeded", end
    assert bench.out_holds(image)
    check_released(bench, "out")
    record(Tried("reboot during write", end["state"], end.get("error", "")))


# --- somebody else ----------------------------------------------------------------------------------------------------

HOLD_LINE = """
import gpiod, time
from gpiod.line import Direction
as_input = gpiod.LineSettings(direction=Direction.INPUT)
request = gpiod.request_lines("/dev/gpiochip0", consumer="somebody", config={"NRST": as_input})
print("held", flush=True)
time.sleep(1000)
"""


def hold(bench: Bench, unit: str, command: str) -> None:
    """Run something beside the daemon until ``let_go``."""
    bench.vm.run(f"systemd-run --quiet --collect --unit={unit} {command}")


def let_go(bench: Bench, unit: str) -> None:
    bench.vm.try_(f"systemctl stop {unit}")


def test_a_line_that_somebody_else_has(bench: Bench) -> None:
    bench.vm.write("/root/hold.py", HOLD_LINE)
    # While the daemon has it, nobody else gets it.
    answer = bench.vm.try_("/opt/bridged/bin/python3 /root/hold.py", timeout_s=30)
    assert "Device or resource busy" in answer.err, answer
    bench.vm.run("systemctl stop bridged")
    try:
        hold(bench, "holder", "/opt/bridged/bin/python3 /root/hold.py")
        bench.vm.wait_for("the line is held", "grep -q somebody /sys/kernel/debug/gpio")
        bench.vm.run("systemctl start bridged")
        assert "NRST" in bench.wait_absent("pair", "in use by somebody")
    finally:
        let_go(bench, "holder")
    bench.wait_idle()
    check_released(bench, "pair")
    record(Tried("NRST held by another process", "absent until it let go"))


def test_a_port_that_somebody_else_has(bench: Bench) -> None:
    # While the daemon has it, nobody else gets it (root could, as everywhere).
    answer = bench.vm.try_("setpriv --reuid=nobody --regid=dialout --clear-groups cat /dev/ttyNM0", timeout_s=20)
    assert "Device or resource busy" in answer.err, answer
    bench.vm.run("systemctl stop bridged")
    try:
        # Locked, as by picocom, minicom and pyserial.
        hold(bench, "reader", "flock -n /dev/ttyNM0 sleep 1000")
        # Just opened, as by cat and a getty: a daemon that is not root may not see whose files are open. Root may.
        hold(bench, "cat", "sh -c 'exec sleep 1001 <>/dev/ttyNM0'")
        bench.vm.wait_for("the port is held", "! flock -n /dev/ttyNM0 true")
        bench.vm.run("systemctl start bridged")
        bench.wait_absent("pair", "has it locked")
        let_go(bench, "reader")
        bench.wait_idle()
        said = bench.vm.try_("bridged doctor pair").out
        assert "DOCTOR_PORT_HELD" in said, said
        assert "sleep" in said
    finally:
        let_go(bench, "reader")
        let_go(bench, "cat")
    record(Tried("port locked by another process", "absent until it let go"))


# --- pulled out and plugged in ----------------------------------------------------------------------------------------


def plug(bench: Bench, state: str) -> None:
    bench.vm.run(f"echo uartpair.0 > /sys/bus/platform/drivers/uartpair/{state}")


def chip(bench: Bench, state: str) -> None:
    bench.vm.run(f"/usr/local/lib/bridged-vm/hardware.sh {state}")


@pytest.mark.parametrize(
    ("what", "act", "out", "back"), [("port", plug, "unbind", "bind"), ("GPIO chip", chip, "pull", "plug")]
)
def test_an_idle_device_vanishes_and_comes_back(
    bench: Bench, what: str, act: Callable[[Bench, str], None], out: str, back: str
) -> None:
    act(bench, out)
    try:
        assert bench.wait_absent("pair")
    finally:
        act(bench, back)
    bench.wait_idle()
    answer = bench.say("ID pair wait=1")
    assert "state=succeeded" in answer, answer
    check_released(bench, "pair")
    record(Tried(f"{what} pulled out while idle", "absent, then there again"))


@pytest.mark.parametrize(
    ("what", "act", "out", "back"), [("port", plug, "unbind", "bind"), ("GPIO chip", chip, "pull", "plug")]
)
def test_a_device_vanishes_in_the_middle_of_a_flash_and_comes_back(
    bench: Bench, what: str, act: Callable[[Bench, str], None], out: str, back: str
) -> None:
    job, image = start_flash(bench, "pair", 8 * KIB, 150 + len(what))
    bench.wait_phase(job, "write")
    act(bench, out)
    try:
        bench.wait_state(job, "interrupted", "waiting", "failed", "succeeded")
        assert bench.wait_absent("pair")
    finally:
        act(bench, back)
    bench.wait_idle()
    end = bench.wait_state(job, "succeeded", "failed")
    check_released(bench, "pair")
    if end["state"] == "succeeded":
        assert bench.pair_holds(image)
    else:
        # A defined end; and the next job finds everything in order.
        again = bench.say("FLASH pair image" + str(150 + len(what)) + " addr=0x08000000 wait=1")
        assert "state=succeeded" in again, again
    record(Tried(f"{what} pulled out during write", end["state"], end.get("error", "")))
