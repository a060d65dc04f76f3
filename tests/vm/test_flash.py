"""Flashing on real ground: nc, systemd, a GPIO chip, 8E1. Lines are judged by the kernel's records, errors by its counters."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator

import pytest

from tests.vm.bench import Bench, Move, hold_ms, image_for, raw
from tests.vm.record import Tried, record

KIB = 1024


def order(moves: list[Move]) -> list[str]:
    return [f"{move.pin}={move.high}" for move in moves]


ENTER = ["boot0=1", "nrst=0", "nrst=1"]
LEAVE = ["boot0=0", "nrst=0", "nrst=1"]


def test_a_flash_by_nc_over_real_8e1(bench: Bench) -> None:
    before = bench.pair_state()
    image = image_for("pair", 6 * KIB, seed=1)
    data = raw(image)
    digest = hashlib.sha256(data).hexdigest()
    answer = bench.nc(f"PUT {len(data)} {digest} name=first", "FLASH pair first addr=0x08000000 wait=1", payload=data)
    assert "state=succeeded" in answer, answer + bench.journal()
    assert bench.pair_holds(image)
    # Both ends check the parity of every byte: neither saw an error.
    assert "uart_errors.parity=0" in answer
    assert "uart_errors.frame=0" in answer
    state = bench.pair_state()
    for count in ("parity_errors", "overruns", "hazard_resets"):
        assert state[count] == before[count], count
    assert state["mode"] == "application"


def test_the_lines_move_as_configured_and_nrst_is_never_pushed_high(bench: Bench) -> None:
    """The defaults: BOOT0 before NRST, NRST low for 20 ms at least, BOOT0 held until the loader runs; back likewise."""
    job = bench.say("ID pair wait=1")
    assert "state=succeeded" in job, job
    moves = bench.moves("pair")
    assert order(moves) == ENTER + LEAVE
    assert all(ms >= 20 for ms in hold_ms(moves, "nrst", 0)), moves
    assert bench.levels("pair") == {"nrst": 1, "boot0": 0}
    assert bench.pushed_high("pair") == []


def test_an_own_sequence_is_kept_to_the_letter(bench: Bench) -> None:
    enter = ["nrst=0", "wait=0.06", "boot0=1", "wait=0.09", "nrst=1", "wait=0.05"]
    leave = ["boot0=0", "wait=0.07", "nrst=0", "wait=0.12", "nrst=1"]
    text = "\n".join(f"{name} = {steps}".replace("'", '"') for name, steps in (("enter", enter), ("leave", leave)))
    try:
        bench.configure(pair_lines=text)
        bench.forget_moves()
        answer = bench.say("ID pair wait=1")
        assert "state=succeeded" in answer, answer
        moves = bench.moves("pair")
        steps = [step for step in enter + leave if not step.startswith("wait")]
        assert order(moves) == steps
        low = hold_ms(moves, "nrst", 0)
        assert low[0] >= 150
        assert low[1] >= 120
        assert (moves[1].at_s - moves[0].at_s) >= 0.06
        assert (moves[4].at_s - moves[3].at_s) >= 0.07
        assert bench.pushed_high("pair") == []
    finally:
        bench.configure()


def test_starting_stopping_and_reloading_moves_no_line(bench: Bench) -> None:
    """P4: a target without an interrupted job is not touched, whatever happens to the daemon."""
    resets = bench.out.device.stats.resets
    for command in ("reload", "restart", "kill -s KILL"):
        began = bench.started()
        bench.vm.run(f"systemctl {command} bridged")
        if command != "reload":
            bench.wait_started(after=began)
    for target in ("pair", "out"):
        assert bench.moves(target) == []
        assert bench.levels(target) == {"nrst": 1, "boot0": 0}
    assert bench.out.device.stats.resets == resets


def test_the_clock_jumps_in_the_middle_of_a_flash(bench: Bench) -> None:
    """A Pi has no clock battery: it starts with the time of its last shutdown, and jumps at the first answer of NTP."""
    image = image_for("pair", 6 * KIB, seed=8)
    bench.put(image, "clock")
    restarts = bench.vm.run("systemctl show -P NRestarts bridged")
    try:
        job = bench.flash("pair", "clock", "addr=0x08000000")
        bench.wait_phase(job, "write")
        bench.vm.run("date -s '2033-03-03 03:03' && sleep 0.5 && date -s '1999-09-09 09:09'")
        end = bench.wait_state(job, "succeeded", "failed")
        assert (end["state"], end["attempts"]) == ("succeeded", "1"), end
        later = re.findall(r"^250 .*\bjob=(\S+)", bench.say("ID pair wait=1"), re.MULTILINE)[0]
        # Whatever the clock said, lists are in the order of submission.
        assert re.findall(r"\bjob=(\S+)", bench.say("JOBS target=pair limit=2")) == [later, job]
        assert bench.vm.run("systemctl show -P NRestarts bridged") == restarts, "the watchdog goes by another clock"
        record(Tried("the clock jumps by years during write, forwards and back", end["state"]))
    finally:
        bench.vm.run(f"date -s @{time.time():.0f}")
    assert bench.pair_holds(image)


def test_only_the_session_has_real_time_priority(bench: Bench) -> None:
    bench.put(image_for("pair", 3 * KIB, seed=9), "priority")
    job = bench.flash("pair", "priority", "addr=0x08000000")
    bench.wait_phase(job, "write")
    session, daemon = bench.vm.run(
        "chrt -p $(pgrep -f [b]ridged.target.worker); chrt -a -p $(systemctl show -P MainPID bridged)"
    ).split("\n", 1)
    assert "SCHED_FIFO|SCHED_RESET_ON_FORK" in session, session
    assert "SCHED_FIFO" not in daemon, daemon
    assert bench.wait_state(job, "succeeded", "failed")["state"] == "succeeded"


def test_a_driver_that_comes_after_the_daemon_is_forbidden_until_a_restart(bench: Bench) -> None:
    """Why usbserial and cdc_acm are loaded at boot (systemd/bridged.modules): DeviceAllow= names are looked up at the start."""
    bench.vm.run("systemctl stop bridged vm-target vm-follow-pair && rmmod uartpair && systemctl start bridged")
    try:
        bench.wait_idle("out")
        bench.vm.run("modprobe uartpair && udevadm settle")
        said = bench.wait_absent("pair", "not permitted")
        assert "PORT_FORBIDDEN" in said or "Operation not permitted" in said, said
    finally:
        bench.vm.run("modprobe uartpair; udevadm settle; systemctl start vm-target vm-follow-pair; systemctl restart bridged")
    bench.wait_idle()


# --- a wrong format, seen by the kernel --------------------------------------------------------------------------------


@pytest.fixture
def strange_part(bench: Bench) -> Iterator[Bench]:
    """A test may exchange the part in the guest; afterwards the usual one is there."""
    yield bench
    bench.vm.write("/sys/class/tty/ttyNM0/mini", "0")
    bench.vm.write("/sys/module/uartpair/parameters/corrupt_every", "0")
    bench.pair_target()


def facts(answer: str) -> dict[str, str]:
    return dict(re.findall(r"\bfact\.(\w+)=(\S+)", answer))


def test_another_parity_is_found_by_the_kernels_counter(strange_part: Bench) -> None:
    strange_part.pair_target("parity=O")
    answer = strange_part.say("ID pair wait=1")
    assert "state=failed" in answer, answer
    found = facts(answer)
    assert int(found["uart_parity_errors"]) >= 1
    assert "uart_frame_errors" not in found
    assert f"the kernel counted {found['uart_parity_errors']} parity errors" in answer


def test_another_rate_is_found_by_the_kernels_counter(strange_part: Bench) -> None:
    strange_part.pair_target("rate=0.8")
    answer = strange_part.say("ID pair wait=1")
    assert "state=failed" in answer, answer
    found = facts(answer)
    assert int(found["uart_frame_errors"]) >= 1
    assert f"the kernel counted {found['uart_frame_errors']} frame errors" in answer


def test_a_driver_that_drops_parity_in_silence_is_not_trusted(strange_part: Bench) -> None:
    """The mini UART of a Raspberry Pi. Nothing may be sent: an 8N1 sync is answered, and everything after it refused."""
    syncs = strange_part.pair_state()["syncs"]
    strange_part.vm.write("/sys/class/tty/ttyNM0/mini", "1")
    answer = strange_part.say("ID pair wait=1")
    assert "PARITY_UNAVAILABLE" in answer, answer
    assert strange_part.pair_state()["syncs"] == syncs
    assert strange_part.levels("pair") == {"nrst": 1, "boot0": 0}


def test_bytes_damaged_on_the_wire_are_counted_and_overcome(strange_part: Bench) -> None:
    bench = strange_part
    before = errors_in_metrics(bench)
    image = image_for("pair", 3 * KIB, seed=5)
    bench.put(image, "damaged")
    bench.vm.write("/sys/module/uartpair/parameters/corrupt_every", "997")
    answer = bench.say("FLASH pair damaged addr=0x08000000 wait=1")
    assert "state=succeeded" in answer, answer + bench.journal()
    assert bench.pair_holds(image)
    counted = int(re.findall(r"uart_errors\.parity=(\d+)", answer)[-1])
    assert counted >= 1
    assert errors_in_metrics(bench) == before + counted


def errors_in_metrics(bench: Bench) -> float:
    text = bench.vm.run("exec 3<>/dev/tcp/127.0.0.1/7102; printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3")
    found = re.search(r'^bridged_uart_errors_total\{target="pair",type="parity"\} (\S+)$', text, re.MULTILINE)
    assert found, text[-2000:]
    return float(found[1])


# --- a bad network ------------------------------------------------------------------------------------------------------


def test_packet_loss_reaches_the_upload_and_not_the_target(bench: Bench) -> None:
    image = image_for("out", 24 * KIB, seed=6)
    bench.vm.run("modprobe sch_netem && tc qdisc add dev lo root netem delay 30ms 10ms loss 15%")
    try:
        bench.put(image, "lossy")
        answer = bench.say("FLASH out lossy addr=0x08000000 wait=1")
        lost = bench.vm.run("tc -s qdisc show dev lo")
    finally:
        bench.vm.run("tc qdisc del dev lo root")
    assert "state=succeeded" in answer, answer + bench.journal()
    assert bench.out_holds(image)
    dropped = re.search(r"dropped (\d+)", lost)
    assert dropped is not None
    assert int(dropped[1]) > 0, lost
    assert re.findall(r"uart_errors\.\w+=(\d+)", answer) == ["0"] * 4
