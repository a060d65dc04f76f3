"""What the benchmark starts: the compiled device, the daemon, the load; and how it looks at their cost.

Everything is a process of its own, ended by its own id. Paths are short, for a Unix socket's address holds 107 bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.e2e.gateway import Client, pairs
from tests.support import unit_environment

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(__file__).with_name("device.c")
BUILT = ROOT / ".bench"
COMPILER = "gcc"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")
LIMIT_S = 30.0
PAGE = os.sysconf("SC_PAGE_SIZE")
TICKS = os.sysconf("SC_CLK_TCK")


class Missing(Exception):
    """A program that the benchmark needs is not installed; the text says how to get it."""


def build() -> Path:
    """The compiled device, made anew when its source is newer."""
    compiler = shutil.which(COMPILER)
    program = BUILT / "device"
    if program.exists() and program.stat().st_mtime > SOURCE.stat().st_mtime:
        return program
    if compiler is None:
        raise Missing(f"{COMPILER} is missing: apt install {COMPILER} libc6-dev (the device of the benchmark is compiled here)")
    BUILT.mkdir(exist_ok=True)
    fresh = BUILT / f"device.{os.getpid()}"
    made = subprocess.run(
        [compiler, *FLAGS, "-o", str(fresh), str(SOURCE), "-lutil"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise Missing(f"{COMPILER} cannot compile {SOURCE.name}: {made.stderr.strip()}")
    fresh.replace(program)
    return program


class Device:
    """One compiled device. ``report`` and ``flash`` are there after the end of the ``with`` block."""

    def __init__(self, work: Path, name: str = "d", *options: str, flash_bytes: int = 0) -> None:
        self.lines = work / f"{name}.lines"
        self.port = ""
        self.report: dict[str, Any] = {}
        self.flash = b""
        self._report_file, self._flash_file = work / f"{name}.json", work / f"{name}.flash"
        self._command = [str(build()), "--report", str(self._report_file), "--lines", str(self.lines), *options]
        if flash_bytes:
            self._command += ["--flash-out", str(self._flash_file), str(flash_bytes)]

    def __enter__(self) -> Device:
        self.process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert self.process.stdout is not None
        self.port = self.process.stdout.readline().decode().strip()
        if not self.port:
            raise RuntimeError(f"the device did not start, status {self.process.wait(LIMIT_S)}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        status = self.process.wait(LIMIT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()
        if status and error is None:
            raise RuntimeError(f"the device ended with status {status}")
        if not status:
            self.report = json.loads(self._report_file.read_text())
            if self._flash_file.exists():
                self.flash = self._flash_file.read_bytes()
                self._flash_file.unlink()

    def snapshot(self) -> dict[str, Any]:
        """The report until now; a new one begins."""
        self._report_file.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + LIMIT_S
        while not self._report_file.exists():
            if time.monotonic() > deadline:
                raise RuntimeError("the device gives no report")
            time.sleep(0.01)
        report: dict[str, Any] = json.loads(self._report_file.read_text())
        if self._flash_file.exists():
            self.flash = self._flash_file.read_bytes()
        return report


CONFIG = """\
[gateway]
name = "bench"
state_dir = "{work}/state"
[api]
listen = ""
http = ""
metrics = ""
socket = "{work}/b.sock"
connections = 2000
[store]
limit_mib = 4096
"""
TARGET = """\
[targets.{name}]
port = "{port}"
chip = "{chip}"
baud = {baud}
startup_s = 0.02
[targets.{name}.lines]
kind = "socket"
socket = "{lines}"
nrst = "nrst"
boot0 = "boot0"
reset_s = 0.001
boot0_setup_s = 0.001
[targets.{name}.application]
listen_s = 0
"""


def target_name(number: int) -> str:
    """Of the daemon's targets; the first one is meant where only one is."""
    return f"bench{number or ''}"


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, in KiB. ``uss``: what would be free again if it ended."""

    uss: int
    rss: int
    pss: int


class Daemon:
    """The daemon as a process, ready when the ``with`` block begins. ``ready_s``: from the start to READY=1."""

    def __init__(self, work: Path, devices: Sequence[Device], baud: int, chip: str = "F407") -> None:
        self.work = work
        self.socket = work / "b.sock"
        self.ready_s = 0.0
        text = CONFIG.format(work=work)
        for number, device in enumerate(devices):
            text += TARGET.format(name=target_name(number), port=device.port, lines=device.lines, baud=baud, chip=chip)
        (work / "bridged.toml").write_text(text)

    def __enter__(self) -> Daemon:
        with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as told:
            notify = self.work / "notify"
            notify.unlink(missing_ok=True)
            told.bind(str(notify))
            told.settimeout(LIMIT_S)
            self.log = (self.work / "daemon.log").open("ab")
            began = time.monotonic()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bridged", "serve", "--config", str(self.work / "bridged.toml")],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=self.log,
                env={**unit_environment(), "NOTIFY_SOCKET": str(notify)},
            )
            while b"READY=1" not in told.recv(4096):
                pass
            self.ready_s = time.monotonic() - began
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def connect(self) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.socket))
        client = Client(sock)
        sock.settimeout(600)
        return client

    def until_idle(self) -> None:
        """Until every target's port and lines are open."""
        client = self.connect()
        deadline = time.monotonic() + LIMIT_S
        while True:
            client.do("TARGETS")
            states = [state for line in client.lines if (state := pairs(line).get("state"))]
            if states and all(state == "idle" for state in states):
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"the target is not there: {client.lines}")
            time.sleep(0.05)
        client.close()

    def flash(self, client: Client, digest: str) -> dict[str, str]:
        """A flash from submission to proof; the result as the daemon says it."""
        code, text = client.do(f"FLASH bench {digest} addr=0x08000000 type=bin wait=1")
        if code != 250:
            raise RuntimeError(f"the job failed: {code} {text}")
        return pairs(text)

    def flash_at_once(self, client: Client, digest: str, targets: int) -> None:
        """A flash of the first ``targets`` targets, all submitted before any of them has ended."""
        jobs = []
        for number in range(targets):
            code, text = client.do(f"FLASH {target_name(number)} {digest} addr=0x08000000 type=bin")
            if code // 100 != 2:
                raise RuntimeError(f"the job was refused: {code} {text}")
            jobs.append(pairs(text)["job"])
        for job in jobs:
            code, text = client.do(f"WAIT {job}")
            if code != 250:
                raise RuntimeError(f"the job failed: {code} {text}")

    def sessions(self) -> list[int]:
        """The session processes that run now."""
        found = []
        for child in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if b"bridged.target.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
        return found


class Load:
    """The load on a daemon. ``tally`` is there after the end of the ``with`` block."""

    def __init__(self, daemon: Daemon, clients: int = 50, rate_hz: float = 500.0) -> None:
        self.tally: dict[str, Any] = {}
        self._command = [sys.executable, "-m", "tests.bench.load", "--socket", str(daemon.socket)]
        self._command += ["--clients", str(clients), "--rate", str(rate_hz)]

    def __enter__(self) -> Load:
        self.process = subprocess.Popen(self._command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "ready":
            raise RuntimeError(f"the load did not start, status {self.process.wait(LIMIT_S)}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.terminate()
        told, _ = self.process.communicate(timeout=LIMIT_S)
        if error is None:
            self.tally = json.loads(told)

    def snapshot(self) -> dict[str, Any]:
        """What was done until now; how long requests took is since the snapshot before."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        told: dict[str, Any] = json.loads(self.process.stdout.readline())
        return told


HOGS = 2


class Hogs:
    """Processes that never sleep, at normal priority: what a gateway has that also compresses, compiles or computes."""

    def __init__(self, count: int = HOGS) -> None:
        self._count = count
        self.pids: list[int] = []

    def __enter__(self) -> Hogs:
        self._running = [
            subprocess.Popen(["/bin/sh", "-c", "while :; do :; done"], stdin=subprocess.DEVNULL) for _ in range(self._count)
        ]
        self.pids = [process.pid for process in self._running]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._running:
            process.kill()
            process.wait()


# --- what processes cost ------------------------------------------------------------------------------------------


def memory(pid: int) -> Memory:
    kib: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        kib[name] = int(value.split()[0])
    return Memory(kib["Private_Clean"] + kib["Private_Dirty"], kib["Rss"], kib["Pss"])


def cpu_s(pid: int, *, children: bool = True) -> float:
    """User and system, with children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own, theirs = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
    return (own + (theirs if children else 0)) / TICKS


def wakeups(pid: int) -> int:
    """How often the threads of a process have gone to sleep until now."""
    count = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    count += int(line.split()[1])
    return count


def machine_busy_s() -> float:
    """CPU seconds that the whole machine was busy, or was withheld from it (steal), since it was started."""
    fields = [int(x) for x in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = fields
    return (user + nice + system + irq + softirq + steal) / TICKS


def own_cpu_s(running: Sequence[int] = ()) -> float:
    """CPU seconds of this process, of all its descendants that have ended, and of those that are ``running``."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages) + sum(cpu_s(pid) for pid in running)


def disk(pid: int) -> dict[str, int]:
    """``wchar``: given to write(2), sockets and terminals included; ``write_bytes``: sent to a block device."""
    return {
        name: int(value) for name, _, value in (x.partition(": ") for x in Path(f"/proc/{pid}/io").read_text().splitlines())
    }


def run(command: Sequence[str]) -> tuple[int, float, float, str]:
    """Run a host to its end: status, wall seconds, CPU seconds, output."""
    return run_at_once([command])


def run_at_once(commands: Sequence[Sequence[str]]) -> tuple[int, float, float, str]:
    """Run hosts beside each other until the last one ends: the worst status, wall and CPU seconds of all, their outputs."""
    began = time.monotonic()
    spent_s, status, outputs = 0.0, 0, []
    with contextlib.ExitStack() as ending:
        hosts = []
        for command in commands:
            host = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            ending.callback(_end, host)
            hosts.append(host)
        for host in hosts:
            assert host.stdout is not None
            outputs.append(host.stdout.read())
            _, ended, usage = os.wait4(host.pid, 0)
            host.returncode = os.waitstatus_to_exitcode(ended)
            status = status or host.returncode
            spent_s += usage.ru_utime + usage.ru_stime
    return status, time.monotonic() - began, spent_s, "".join(outputs)


def _end(host: subprocess.Popen[str]) -> None:
    if host.poll() is None:
        host.terminate()
        host.wait()
    assert host.stdout is not None
    host.stdout.close()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
