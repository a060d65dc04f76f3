"""``make bench``: our host beside the others on the same compiled device, and what the daemon costs. Writes docs/benchmarks.md.

Runs are interleaved: every round takes each host once in each condition, in an order that turns with the round (``plan.py``),
so that what the machine does meanwhile meets all alike. Each scene of a round, one rate in one condition, has a fresh daemon
and, where it is loaded, the load on it; each run has a fresh device. Foreign hosts run beside the same daemon, whose target is
then another device.

A measurement may be made in slices: every run is a line in a file that belongs to this very code and machine (``store.py``), a
slice goes on where the last one ended, and each ends with the page, the pictures and a line of the history for what there is.

Targets are stated in ``report.py`` and never follow the figures. Nothing of this is a gate in CI: a gate is only what is
counted in virtual time (``tests/bench/test_bench.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import random
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from bridged import __version__
from bridged.target.worker import RT_PRIORITY
from tests.bench import cost, modelled, report, store
from tests.bench.figures import Cell, Run, why_rejected
from tests.bench.plan import COST, ENOUGH_RUNS, GROUPS, Round, next_round, scene_of
from tests.bench.rig import (
    BUILT,
    ROOT,
    Daemon,
    Device,
    Hogs,
    Load,
    Missing,
    build,
    cpu_s,
    digest,
    machine_busy_s,
    own_cpu_s,
    run_at_once,
)

CONDITIONS = ("idle", "api", "hogs")
SETTLE_S = {"idle": 1.0, "api": 2.5, "hogs": 0.5}  # The load first makes its HEX file.
BASE = 0x08000000

HOSTS = {
    "session": "bridged: the session process alone",
    "daemon": "bridged: the whole daemon, FLASH wait=1",
    "session-plain": "bridged: the session process, denied its real-time priority",
    "stm32flash": "stm32flash",
    "stm32flash-rt": "stm32flash, with the real-time priority of our session",
    "stm32loader": "stm32loader",
    "streams": "an afternoon's pyserial-asyncio streams",
}


def image_of(size_bytes: int, seed: int = 20261122) -> bytes:
    """Pseudo-random, so that nobody can skip a block; begins with vectors that a part could start from."""
    data = bytearray(random.Random(seed).randbytes(size_bytes))
    data[0:8] = struct.pack("<II", 0x20000400, BASE + 0x101)
    return bytes(data)


def command(host: str, device: Device, baud: int, image: Path) -> list[str]:
    """How a host is started. A pty has no parity, so each foreign host is told so; on silicon they would use 8E1."""
    rate = str(baud)
    if host in ("session", "session-plain"):
        denied = ["setpriv", "--bounding-set", "-sys_nice", "--inh-caps", "-sys_nice"] if host == "session-plain" else []
        ours = [sys.executable, "-m", "tests.bench.ours", "--port", device.port, "--lines", str(device.lines)]
        return [*denied, *ours, "--baud", rate, str(image)]
    if host in ("stm32flash", "stm32flash-rt"):
        priority = ["chrt", "-f", str(RT_PRIORITY)] if host == "stm32flash-rt" else []
        return [*priority, "stm32flash", "-m", "8n1", "-b", rate, "-w", str(image), "-v", "-g", hex(BASE), device.port]
    if host == "stm32loader":
        helper = str(ROOT / "tests/sim/stm32loader_on_pty.py")
        fixed = ["-p", device.port, "-b", rate, "-P", "none", "-f", "F4", "-n"]
        return [sys.executable, helper, str(device.lines), *fixed, "-e", "-w", "-v", "-g", hex(BASE), str(image)]
    if host == "streams":
        return [sys.executable, "-m", "tests.bench.naive", "--baud", rate, device.port, str(image)]
    raise ValueError(host)


class Scene:
    """One condition, in which hosts take turns: a daemon with its targets, and the load. Rate and size are those of a cell."""

    def __init__(self, cell: Cell, options: Sequence[str] = ()) -> None:
        self._cell, self._options = cell, tuple(options)
        self._images = 0

    def __enter__(self) -> Scene:
        with ExitStack() as opening:
            self._work = Path(opening.enter_context(tempfile.TemporaryDirectory(prefix="bridged-bench-")))
            size = self._cell.kib * 1024
            self._wired = [
                opening.enter_context(Device(self._work, f"w{n}", *self._options, flash_bytes=size))
                for n in range(self._cell.targets)
            ]
            self._daemon = opening.enter_context(Daemon(self._work, self._wired, self._cell.baud))
            self._daemon.until_idle()
            self._load = opening.enter_context(Load(self._daemon)) if self._cell.condition == "api" else None
            self._hogs = opening.enter_context(Hogs()) if self._cell.condition == "hogs" else None
            time.sleep(SETTLE_S[self._cell.condition])
            self._opened = opening.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._opened.__exit__(kind, error, trace)

    def run(self, host: str, *, busy: bool = False) -> Run:
        """``busy``: the run counts whatever else the machine does."""
        # Another image each time: nothing in the daemon or in its target's flash is to know it.
        self._images += 1
        data = image_of(self._cell.kib * 1024, self._images)
        running = [device.process.pid for device in self._wired] + [self._daemon.pid]
        running += [self._load.process.pid] if self._load else []
        running += self._hogs.pids if self._hogs else []
        busy_s, own_s, started = machine_busy_s(), own_cpu_s(running), time.monotonic()
        before = self._load.snapshot() if self._load else {}
        if host == "daemon":
            status, wall_s, spent_s, output, told, right = self._ours(data)
        else:
            status, wall_s, spent_s, output, told, right = self._other(host, data)
        if status:
            print(f"    {host}: status {status}: {output.strip()[-500:]}", file=sys.stderr)
        took_s = time.monotonic() - started
        others = (machine_busy_s() - busy_s - (own_cpu_s(running) - own_s)) / took_s
        tally = load_between(before, self._load.snapshot()) if self._load else {}
        done = record(replace(self._cell, host=host), wall_s, spent_s, told, tally)
        why = ""
        for one in told:
            others_counted = 0.0 if busy else others
            why = why or why_rejected(
                one,
                exit_status=status,
                content_right=right,
                others_cores=others_counted,
                load_failed=tally.get("failed", 0),
            )
        return replace(done, others_cores=others, rejected=why, took_s=took_s, at=time.time())

    def _ours(self, data: bytes) -> tuple[int, float, float, str, list[dict[str, Any]], bool]:
        client = self._daemon.connect()
        client.put(data, "image.bin")
        for device in self._wired:
            device.snapshot()
        spent, began = cpu_s(self._daemon.pid), time.monotonic()
        status, output = 0, ""
        try:
            self._daemon.flash_at_once(client, digest(data), self._cell.targets)
        except RuntimeError as error:
            status, output = 1, str(error)
        wall_s = time.monotonic() - began
        spent_s = cpu_s(self._daemon.pid) - spent
        client.close()
        told = [device.snapshot() for device in self._wired]
        return status, wall_s, spent_s, output, told, all(device.flash == data for device in self._wired)

    def _other(self, host: str, data: bytes) -> tuple[int, float, float, str, list[dict[str, Any]], bool]:
        image = self._work / "image.bin"
        image.write_bytes(data)
        with ExitStack() as opened:
            devices = [
                opened.enter_context(Device(self._work, f"d{n}", *self._options, flash_bytes=len(data)))
                for n in range(self._cell.targets)
            ]
            commands = [command(host, device, self._cell.baud, image) for device in devices]
            status, wall_s, spent_s, output = run_at_once(commands)
        if host.startswith("session") and not status:
            told = json.loads(output.splitlines()[-1])
            wall_s, spent_s = told["seconds"], told["cpu_s"]
        return status, wall_s, spent_s, output, [d.report for d in devices], all(d.flash == data for d in devices)


def one_run(cell: Cell, options: Sequence[str] = (), *, busy: bool = False) -> Run:
    with Scene(cell, options) as scene:
        return scene.run(cell.host, busy=busy)


def load_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What the load did in between; how long its requests took is told for those since ``before``."""
    seconds = after["seconds"] - before["seconds"]
    return {
        "requests": after["requests"] - before["requests"],
        "uploads": after["uploads"] - before["uploads"],
        "failed": after["failed"] - before["failed"],
        "seconds": seconds,
        "p99_ms": after["p99_ms"],
    }


def record(cell: Cell, wall_s: float, spent_s: float, told: Sequence[dict[str, Any]], tally: Mapping[str, Any]) -> Run:
    """``told``: what each device reported."""

    def mean(*path: str) -> float:
        values: list[float] = []
        for report_ in told:
            at: Any = report_
            for key in path:
                at = at[key]
            values.append(at)
        return statistics.fmean(values)

    return Run(
        host=cell.host,
        baud=cell.baud,
        condition=cell.condition,
        kib=cell.kib,
        targets=cell.targets,
        wall_s=wall_s,
        dialogue_s=mean("dialogue_s"),
        slowest_s=max(report_["dialogue_s"] for report_ in told),
        limit_s=mean("wire_s") + mean("program_s") + mean("erase_s"),
        program_s=mean("program_s") + mean("erase_s"),
        wire_bytes=round(mean("bytes_in") + mean("bytes_out")),
        answers=round(mean("answers")),
        overruns=sum(report_["overruns"] for report_ in told),
        late_s=mean("late_last", "sum_s"),
        late_max_s=max(report_["late_last"]["max_us"] for report_ in told) / 1e6,
        late_p50_us=mean("late_last", "p50_us"),
        late_p99_us=mean("late_last", "p99_us"),
        gap_p50_us=mean("gaps", "p50_us"),
        gap_p99_us=mean("gaps", "p99_us"),
        gap_s=mean("gaps", "sum_s"),
        gap_over_s=mean("gaps_over_s"),
        in_frames_s=mean("in_frames_s"),
        resets_s=mean("resets_s"),
        cpu_s=spent_s,
        requests=tally.get("requests", 0),
        request_p99_ms=tally.get("p99_ms", 0.0),
        request_hz=tally["requests"] / tally["seconds"] if tally else 0.0,
        uploads=tally.get("uploads", 0),
    )


@contextlib.contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Hold ``lock`` (flock(2)), with which other work on this machine keeps out of the way of what is measured."""
    if lock is None:
        yield
        return
    # Two files, as a turnstile: who shares the machine passes the first one by one, so that we need not wait for ever.
    with open(f"{lock}.turn", "w") as turn, lock.open("w") as whole:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(whole, fcntl.LOCK_EX)
        yield


def machine() -> dict[str, str]:
    """What must be the same for two runs to be compared."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    hypervisor = "hypervisor" in Path("/proc/cpuinfo").read_text()
    return {
        "processor": f"{model}, {os.cpu_count()} cores" + (", virtual" if hypervisor else ""),
        "kernel": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "bridged": __version__,
        "stm32flash": _version(["stm32flash", "-h"], "stm32flash"),
        "stm32loader": _package("stm32loader"),
        "pyserial-asyncio": f"{_package('pyserial-asyncio')} (pyserial {_package('pyserial')})",
        "real-time priority": "allowed" if may_realtime() else "not allowed",
    }


def may_realtime() -> bool:
    probe = "import os; os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


def _version(command: Sequence[str], package: str) -> str:
    if shutil.which(command[0]) is None:
        return "not installed"
    found = ""
    with contextlib.suppress(OSError):
        asked = ["dpkg-query", "-W", "-f", "${Version}", package]
        found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found or "of unknown version"


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, results: store.Results) -> None:
    """Round after round, until all is there, or the time is over."""
    began = time.monotonic()
    while True:
        left_s = args.budget * 60 - (time.monotonic() - began) if args.budget else float("inf")
        following = next_round(
            results.runs,
            left_s,
            cost_done="cost" in results.facts,
            groups=args.groups,
            hosts=args.hosts,
            most_runs=args.runs,
        )
        if following is None:
            return
        spent = f"{(time.monotonic() - began) / 60:.1f} min"
        print(f"{spent}: {following.group}, round {following.number + 1}, about {following.seconds:.0f} s", flush=True)
        if following.group == COST:
            with alone(args.lock):
                results.put(cost=cost.measure(image_of(256 * 1024), quick=args.quick))
        else:
            one_round(following, args, results)


def one_round(following: Round, args: argparse.Namespace, results: store.Results) -> None:
    cells = list(following.cells)
    while cells:
        these = [cell for cell in cells if scene_of(cell) == scene_of(cells[0])]
        cells = cells[len(these) :]
        with alone(args.lock), Scene(these[0]) as scene:
            for cell in these:
                run = scene.run(cell.host, busy=args.busy)
                results.add_run(run)
                share = f"{100 * run.share:.1f} % of the wire limit"
                refused = f"; rejected: {run.rejected}" if run.rejected else ""
                print(f"  {cell}: {run.wall_s:.2f} s, dialogue {run.dialogue_s:.3f} s, {share}{refused}", flush=True)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Measure, and write docs/benchmarks.md with its pictures and a line of docs/benchmarks-history.jsonl.",
        epilog="A measurement may be made in slices: each goes on where the last one of this very code and machine ended.",
    )
    parser.add_argument("--budget", type=float, help="minutes; the most important part of what is wanted that fits")
    parser.add_argument("--quick", action="store_true", help="a look of a minute: few small runs, nothing is written to docs/")
    parser.add_argument("--runs", type=int, default=ENOUGH_RUNS, help=f"runs of each host in each condition ({ENOUGH_RUNS})")
    parser.add_argument(
        "--groups", nargs="+", choices=[*GROUPS, COST], default=[*GROUPS, COST], metavar="GROUP", help=groups_help()
    )
    parser.add_argument("--hosts", nargs="+", choices=list(HOSTS), default=list(HOSTS))
    parser.add_argument("--lock", type=Path, help="a file to lock for each scene, for a machine that does other work between")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from what there is")
    parser.add_argument("--results", type=Path, help="with --page: this file of results, also of another revision")
    parser.add_argument("--anew", action="store_true", help="put the results of this revision away first")
    parser.add_argument("--busy", action="store_true", help="count runs although others keep the machine busy")
    parser.add_argument("--nice", type=int, default=0, help="priority of all that is measured, such as -5, where allowed")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where page, pictures and history are written")
    args = parser.parse_args(argv)
    if args.results and not args.page:
        parser.error("--results goes with --page: a measurement knows its own file")
    if args.quick:
        args.docs = BUILT / "quick"
        args.busy = True
    return args


def groups_help() -> str:
    return "; ".join([*(f"{g.name}: {g.what}" for g in GROUPS.values()), f"{COST}: memory, wake-ups, disk, growth"])


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # An exception ends every `with` block, and with them every process that was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        build()
    except Missing as error:
        print(f"make bench: {error}", file=sys.stderr)
        return 1
    if not args.page and shutil.which("stm32flash") is None and "stm32flash" in " ".join(args.hosts):
        print("make bench: stm32flash is missing: apt install stm32flash", file=sys.stderr)
        return 1
    if not may_realtime():
        args.hosts = [host for host in args.hosts if not host.endswith(("-rt", "-plain"))]
    if args.nice:
        with contextlib.suppress(PermissionError):
            os.nice(args.nice)
    here = machine()
    identity = store.setting_id(store.code_digest(), here)
    if args.quick:
        results = store.Results(BUILT / "quick" / "results.jsonl")
        results.begin_anew()
    elif args.results:
        results = store.Results(args.results)
        identity = args.results.stem
    else:
        results = store.Results.of_setting(identity)
        if args.anew:
            results.begin_anew()
    if not args.page:
        if results.runs:
            print(f"going on with {len(results.runs)} runs of {results.path}")
        today = time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC"
        load = " ".join(f"{x:.2f}" for x in os.getloadavg())
        slices = [*results.facts.get("slices", []), {"date": today, "load": load}]
        results.put(machine=here, commit=store.commit(), date=today, slices=slices)
        if args.quick:
            quick(args, results)
        else:
            if "virtual" not in results.facts:
                results.put(virtual=cost.virtual_account())
            if "modelled" not in results.facts:
                results.put(modelled=modelled.figures())
            measure(args, results)
    elif not results.facts:
        print(f"make bench: no results in {results.path}", file=sys.stderr)
        return 1
    written = report.write(results, HOSTS, args.docs, identity)
    if args.quick:
        print(written[0].read_text())
    print("written: " + ", ".join(os.path.relpath(path) for path in written))
    return 0


def quick(args: argparse.Namespace, results: store.Results) -> None:
    """Everything once or twice, small: whether the benchmark works, and hardly more."""
    results.put(virtual=cost.virtual_account(quick=True))
    for number in range(min(args.runs, 2)):
        cells = [Cell(host, 921600, condition, 64) for condition in CONDITIONS for host in args.hosts]
        cells += [Cell("daemon", 921600, "idle", 16, targets) for targets in (1, 2)]
        one_round(Round("quick", number, tuple(cells), 0.0), args, results)
    if COST in args.groups:
        results.put(cost=cost.measure(image_of(64 * 1024), quick=True))


if __name__ == "__main__":
    sys.exit(main())
