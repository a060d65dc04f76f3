"""The blocking driver of the session process over a pty: what it sends, receives and records, and in which order."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from bridged.errors import BridgedError, Canceled, LinkError
from bridged.events import Phase, PhaseStarted, Retried
from bridged.protocol.flow import Barrier, Checkpoint, Drain, Flow, Hazard, Pause, Progress, Receive, Report, Send, SetFormat
from bridged.target import lines
from bridged.target.board import NOTE, RECEIVED, REFERENCE, SENT, Board, reference
from bridged.target.process import WORKER_ROOT
from bridged.target.uart import Uart
from bridged.target.worker import RECORD_AT_MOST, RT_LIMIT_US, RT_PRIORITY, Control, Driver
from tests.support import missing, take


@dataclass
class Rig:
    driver: Driver
    board: Board
    device: int
    daemon: socket.socket

    def recorded(self) -> list[tuple[int, bytes]]:
        return [(r.kind, r.data) for r in self.board.records()]


@contextmanager
def rig() -> Iterator[Rig]:
    master, slave = os.openpty()
    tty.setraw(slave)
    daemon, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    uart = Uart.open(os.ttyname(slave))
    board = Board.create()
    out = os.memfd_create("out")
    try:
        yield Rig(Driver(uart, lines.NoLines(), board, Control(ours.fileno()), out), board, master, daemon)
    finally:
        uart.close()
        board.close()
        daemon.close()
        ours.close()
        for fd in (master, slave, out):
            os.close(fd)


def test_exchanges_are_recorded_in_order_with_silence_and_references() -> None:
    def flow() -> Flow[tuple[bytes, bytes]]:
        yield Send(b"\x31\xce")
        first = yield Receive(1, 1.0)
        yield Send(b"\x01abc", payload_address=0x08000000)
        return first, (yield Receive(1, 0.001))

    with rig() as r:
        os.write(r.device, b"\x79")
        assert r.driver.run(flow()) == (b"\x79", b"")
        assert take(r.device, 6) == b"\x31\xce\x01abc"
        # The answer that did not come is recorded too: it tells when the session stopped to wait.
        assert r.recorded() == [
            (SENT, b"\x31\xce"),
            (RECEIVED, b"\x79"),
            (REFERENCE, reference(0x08000000, 2)),
            (RECEIVED, b""),
        ]
        times = [record.at for record in r.board.records()]
        assert times == sorted(times)


def test_never_reads_beyond_what_is_expected() -> None:
    def flow() -> Flow[bytes]:
        first = yield Receive(2, 1.0)
        second = yield Receive(3, 1.0)
        return bytes(first + b"|" + second)

    with rig() as r:
        os.write(r.device, b"abcdef")
        assert r.driver.run(flow()) == b"ab|cde"


def test_an_answer_in_pieces_is_waited_for() -> None:
    def flow() -> Flow[bytes]:
        whole: bytes = yield Receive(6, 5.0)
        return whole

    with rig() as r:
        pieces = iter((b"ab", b"c", b"def"))

        def say() -> None:
            for piece in pieces:
                os.write(r.device, piece)
                time.sleep(0.005)

        speaker = threading.Thread(target=say)
        speaker.start()
        assert r.driver.run(flow()) == b"abcdef"
        speaker.join()


def test_what_is_waited_for_is_on_the_recorder_while_it_is_waited_for() -> None:
    """A session that is killed in a long wait must have recorded what it said before."""
    seen: list[list[tuple[int, bytes]]] = []

    def flow(r: Rig) -> Flow[None]:
        yield Send(b"\x44\xbb")

        def look_then_answer() -> None:
            seen.append(r.recorded())
            os.write(r.device, b"\x79")

        reader = threading.Timer(0.05, look_then_answer)
        reader.start()
        assert (yield Receive(1, 5.0)) == b"\x79"
        reader.join()

    with rig() as r:
        r.driver.run(flow(r))
        assert seen == [[(SENT, b"\x44\xbb")]]


def test_no_step_but_an_exchange_leaves_records_behind() -> None:
    def flow(r: Rig) -> Flow[None]:
        yield Send(b"1")
        yield Pause(0)
        assert r.recorded() == [(SENT, b"1")]
        yield Send(b"2")
        yield Drain(0.001, 0.001)
        assert r.recorded() == [(SENT, b"1"), (SENT, b"2"), (RECEIVED, b"")]
        for _ in range(RECORD_AT_MOST + 1):
            yield Send(b"3")
        assert len(r.recorded()) == 3 + RECORD_AT_MOST + 1
        yield Send(b"4")
        os.write(r.device, b"abc")
        yield Receive(6, 0.5)  # An answer that is not whole at once: the time is used.
        assert r.recorded()[-1] == (SENT, b"4")

    with rig() as r:
        r.driver.run(flow(r))
        assert r.recorded()[-1] == (RECEIVED, b"abc")
        assert all(kind != NOTE for kind, _ in r.recorded())


def test_a_flow_that_dies_leaves_its_last_words() -> None:
    def flow() -> Flow[None]:
        yield Send(b"\x7f")
        raise LinkError("somebody pulled the plug")

    with rig() as r:
        with pytest.raises(BridgedError, match="plug"):
            r.driver.run(flow())
        assert r.recorded() == [(SENT, b"\x7f")]


def test_a_cancel_is_heard_at_the_next_checkpoint_after_a_wait_and_once() -> None:
    def flow(r: Rig) -> Flow[int]:
        yield Checkpoint()
        r.daemon.send(b'{"do":"cancel"}')
        yield Receive(1, 0.01)
        try:
            yield Checkpoint()
        except Canceled:
            yield Checkpoint()
            return 1
        return 0

    with rig() as r:
        assert r.driver.run(flow(r)) == 1


def test_a_cancel_that_came_first_is_heard_by_the_first_checkpoint() -> None:
    def flow() -> Flow[None]:
        yield Checkpoint()

    with rig() as r:
        r.daemon.send(b'{"do":"cancel"}')
        with pytest.raises(Canceled):
            r.driver.run(flow())


def test_a_cancel_before_the_answer_to_a_barrier_is_heard_right_after_it() -> None:
    """Between this barrier and the erase nothing may be missed."""

    def flow() -> Flow[None]:
        yield Checkpoint()
        yield Barrier("erasing", 1.0)
        yield Checkpoint()

    def daemon(r: Rig) -> None:
        r.daemon.recv(1000)
        r.daemon.send(b'{"do":"cancel"}')
        r.daemon.send(b'{"ok":true}')

    with rig() as r:
        answering = threading.Thread(target=daemon, args=(r,))
        answering.start()
        with pytest.raises(Canceled):
            r.driver.run(flow())
        answering.join()


def test_progress_is_on_the_board_before_the_next_phase_and_after_every_wait() -> None:
    def flow(r: Rig) -> Flow[None]:
        yield Progress(256)
        yield Receive(1, 0.001)
        assert r.board.done == 256
        yield Progress(512)
        yield Report(PhaseStarted(Phase.VERIFY, 512))
        assert r.board.done == 0
        yield Progress(7)

    with rig() as r:
        r.driver.run(flow(r))
        assert r.board.done == 7


def test_what_is_no_exchange_is_noted_between_the_exchanges() -> None:
    def flow() -> Flow[None]:
        yield Send(b"\x44\xbb")
        yield Barrier("erasing", 1.0)
        yield Hazard(1.0)
        yield Send(b"\xff\xff\x00")
        yield Hazard(0)
        yield Report(Retried("erase", "NACK: twice\n< 79"))

    def daemon(r: Rig) -> None:
        r.daemon.recv(1000)
        r.daemon.send(b'{"ok":true}')

    with rig() as r:
        answering = threading.Thread(target=daemon, args=(r,))
        answering.start()
        r.driver.run(flow())
        answering.join()
        assert r.recorded() == [
            (SENT, b"\x44\xbb"),
            (NOTE, b"barrier erasing"),
            (NOTE, b"journaled erasing"),
            (NOTE, b"hazard 1.000 s"),
            (SENT, b"\xff\xff\x00"),
            (NOTE, b"hazard over"),
            (NOTE, b"retry erase: NACK: twice < 79"),
        ]


def test_turnarounds_of_short_frames_are_measured_and_told() -> None:
    def flow(r: Rig) -> Flow[None]:
        for _ in range(3):
            yield Send(b"\x01\xfe")
            os.write(r.device, b"\x79")
            yield Receive(1, 1.0)
        yield Send(bytes(258))  # A block: its ACK comes after programming, which is no turnaround.
        os.write(r.device, b"\x79")
        yield Receive(1, 1.0)

    with rig() as r:
        r.driver.run(flow(r))
        assert len(r.driver.turnarounds) == 3
        assert 0 <= r.driver.turnaround_us < 1_000_000
        r.daemon.settimeout(5)
        r.driver.tell_turnarounds()
        told = [json.loads(r.daemon.recv(1000)) for _ in range(3)]
        assert [(m["event"], m["step"], m["seconds"]) for m in told] == [
            ("StepDone", "ack", s) for s in sorted(r.driver.turnarounds)
        ]


def test_a_turnaround_is_what_comes_on_top_of_the_bytes() -> None:
    # At 50 baud three bytes take 600 ms on a wire; this one has none, so nothing is left.
    def flow(r: Rig) -> Flow[None]:
        yield SetFormat(50, "N")
        yield Send(b"\x01\xfe")
        os.write(r.device, b"\x79")
        yield Receive(1, 1.0)

    with rig() as r:
        r.driver.run(flow(r))
        assert list(r.driver.turnarounds) == [0.0]


def test_a_session_begins_with_nothing_that_a_plain_flash_does_not_need() -> None:
    """Each of these is a part of the 10 MiB and of the start of every session; it may be loaded late."""
    late = {"bridged.target.doctor", "bridged.target.streaming", "bridged.stub", "ctypes", "socket", "traceback", "pathlib"}
    late |= {"hashlib"} if {"_sha2", "_sha256"} & sys.stdlib_module_names else set()
    load = "import sys; sys.path.append(sys.argv[1]); import bridged.target.worker; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-IS", "-c", load, WORKER_ROOT], capture_output=True, text=True, check=True)
    assert late & set(ran.stdout.split()) == set()


PREFERRED = """
import json, os, resource, sys
from bridged.target import worker
limit, uid = json.loads(sys.argv[1])
if limit:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
if uid:
    os.setresuid(uid, uid, uid)
worker._prefer()
locked = next(line for line in open("/proc/self/status") if line.startswith("VmLck")).split()[1]
policy = os.sched_getscheduler(0)
ours = policy & ~os.SCHED_RESET_ON_FORK
if not (pid := os.fork()):
    os._exit(os.sched_getscheduler(0))
inherited = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
limited = resource.getrlimit(resource.RLIMIT_RTTIME)[0]
print(json.dumps([ours, os.sched_getparam(0).sched_priority, int(locked), "ctypes" in sys.modules, inherited, limited]))
"""


def preferred(limit_bytes: int = 0, uid: int = 0) -> list[int]:
    """How a session would run: policy, priority, KiB locked, whether ctypes was loaded; the policy of a child, and the most us
    of real time without a wait."""
    order = json.dumps([limit_bytes, uid])
    ran = subprocess.run([sys.executable, "-c", PREFERRED, order], capture_output=True, text=True, check=True)
    found: list[int] = json.loads(ran.stdout)
    return found


def test_a_session_has_real_time_priority_and_locked_memory_where_it_may() -> None:
    if os.geteuid():
        missing("root", "run the tests as root: others may have no right to real-time priority")
    policy, priority, locked_kib, _, inherited, limit_us = preferred()
    assert (policy, priority) == (os.SCHED_FIFO, RT_PRIORITY)
    assert inherited == os.SCHED_OTHER, "what it starts is not served before all others"
    assert 0 < limit_us <= RT_LIMIT_US, "one that never waits is ended by the kernel, and does not keep the machine"
    assert locked_kib > 4096


def test_a_session_that_may_do_neither_runs_all_the_same_and_loads_nothing_for_it() -> None:
    if os.geteuid():
        missing("root", "run the tests as root: only root can take rights away from itself")
    policy, priority, locked_kib, loaded, *_ = preferred(1 << 20, 65534)
    assert (policy, priority, locked_kib, loaded) == (os.SCHED_OTHER, 0, 0, False)
