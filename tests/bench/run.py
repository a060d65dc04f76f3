"""``make bench``: our host beside the others on the same compiled device, and what the daemon costs. Writes docs/benchmarks.md.

Runs are interleaved: every round takes each host once at each rate, idle and loaded, in an order that turns with the round, so
that what the machine does meanwhile meets all alike. Each run has a fresh device, a fresh daemon and, where it is loaded, the
load on that daemon; foreign hosts run beside the same daemon, whose target is then another device.

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
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bridged import __version__
from bridged.target.worker import RT_PRIORITY
from tests.bench import cost, report
from tests.bench.figures import Run, why_rejected
from tests.bench.rig import BUILT, ROOT, Daemon, Device, Load, Missing, build, cpu_s, digest, machine_busy_s, own_cpu_s
from tests.bench.rig import run as run_host

BAUDS = (115200, 921600)
CONDITIONS = ("idle", "loaded")
TRIES = 3  # Of one run, when it is rejected.
SETTLE_S = 1.0
OVERHEAD_S = 4.5  # Of one run beside the wire: daemon, device, load, start of the host.
BASE = 0x08000000

HOSTS = {
    "session": "bridged: the session process alone",
    "daemon": "bridged: the whole daemon, FLASH wait=1",
    "stm32flash": "stm32flash",
    "stm32flash-rt": "stm32flash, with the real-time priority of our session",
    "stm32loader": "stm32loader",
    "streams": "an afternoon's pyserial-asyncio streams",
}


def image_of(size_bytes: int) -> bytes:
    """Pseudo-random, so that nobody can skip a block; begins with vectors that a part could start from."""
    data = bytearray(random.Random(20261122).randbytes(size_bytes))
    data[0:8] = struct.pack("<II", 0x20000400, BASE + 0x101)
    return bytes(data)


def command(host: str, device: Device, baud: int, image: Path) -> list[str]:
    """How a host is started. A pty has no parity, so each foreign host is told so; on silicon they would use 8E1."""
    rate = str(baud)
    if host == "session":
        ours = [sys.executable, "-m", "tests.bench.ours", "--port", device.port, "--lines", str(device.lines)]
        return [*ours, "--baud", rate, str(image)]
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


def one_run(host: str, baud: int, loaded: bool, data: bytes, options: Sequence[str] = (), *, busy: bool = False) -> Run:
    """``busy``: the run counts whatever else the machine does."""
    busy_s, own_s, started = machine_busy_s(), own_cpu_s(), time.monotonic()
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bridged-bench-")))
        image = work / "image.bin"
        image.write_bytes(data)
        device = Device(work, "d", *options, flash_bytes=len(data))
        load: Load | None = None
        with ExitStack() as running:
            running.enter_context(device)
            wired = device if host == "daemon" else running.enter_context(Device(work, "spare"))
            daemon = running.enter_context(Daemon(work, wired.port, wired.lines, baud))
            daemon.until_idle()
            if loaded:
                load = Load(daemon)
                running.enter_context(load)
            client = daemon.connect()
            client.put(data, "image.bin")
            time.sleep(SETTLE_S)
            if host == "daemon":
                spent, began = cpu_s(daemon.pid), time.monotonic()
                status, output = 0, ""
                try:
                    daemon.flash(client, digest(data))
                except RuntimeError as error:
                    status, output = 1, str(error)
                wall_s = time.monotonic() - began
                spent_s = cpu_s(daemon.pid) - spent
            else:
                status, wall_s, spent_s, output = run_host(command(host, device, baud, image))
                if host == "session" and not status:
                    told = json.loads(output.splitlines()[-1])
                    wall_s, spent_s = told["seconds"], told["cpu_s"]
            client.close()
        if status:
            print(f"    {host}: status {status}: {output.strip()[-500:]}", file=sys.stderr)
        # By now every process of this run has ended and is accounted for.
        others = (machine_busy_s() - busy_s - (own_cpu_s() - own_s)) / (time.monotonic() - started)
        tally = load.tally if load else {}
        done = record(host, baud, loaded, wall_s, spent_s, device.report, tally)
        right = device.flash == data
        why = why_rejected(device.report, exit_status=status, content_right=right, others_cores=0.0 if busy else others)
        return replace(done, others_cores=others, rejected=why)


def record(
    host: str, baud: int, loaded: bool, wall_s: float, spent_s: float, told: dict[str, Any], tally: dict[str, Any]
) -> Run:
    late, gaps = told["late_last"], told["gaps"]
    return Run(
        host=host,
        baud=baud,
        loaded=loaded,
        wall_s=wall_s,
        dialogue_s=told["dialogue_s"],
        limit_s=told["wire_s"] + told["program_s"] + told["erase_s"],
        wire_bytes=told["bytes_in"] + told["bytes_out"],
        answers=told["answers"],
        overruns=told["overruns"],
        late_s=late["sum_s"],
        late_max_s=late["max_us"] / 1e6,
        late_p50_us=late["p50_us"],
        late_p99_us=late["p99_us"],
        gap_p50_us=gaps["p50_us"],
        gap_p99_us=gaps["p99_us"],
        gap_s=gaps["sum_s"],
        cpu_s=spent_s,
        requests=tally.get("requests", 0),
        request_p99_ms=tally.get("p99_ms", 0.0),
        request_hz=tally["requests"] / tally["seconds"] if tally else 0.0,
        uploads=tally.get("uploads", 0),
    )


def rounds(
    runs: int, hosts: Sequence[str], bauds: Sequence[int], conditions: Sequence[str] = CONDITIONS
) -> Iterator[list[tuple[str, int, bool]]]:
    """Interleaved, and every host comes first, second, … equally often. A list: each host once, in one condition."""
    for number in range(runs):
        turned = [*hosts[number % len(hosts) :], *hosts[: number % len(hosts)]]
        for baud in bauds:
            for condition in conditions:
                yield [(host, baud, condition == "loaded") for host in turned]


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


def expected_s(args: argparse.Namespace, size_bytes: int) -> float:
    blocks = -(-size_bytes // 256)
    wire = {baud: blocks * 2 * 268 * 11 / baud + size_bytes / 4 * 16e-6 for baud in args.baud}
    runs: int = args.runs * len(args.hosts) * len(args.conditions)
    seconds: float = sum(1.08 * s + OVERHEAD_S for s in wire.values())
    return runs * seconds


def measure(args: argparse.Namespace, data: bytes, before: list[dict[str, Any]]) -> None:
    found: list[Run] = []
    cells = list(rounds(args.runs, args.hosts, args.baud, args.conditions))
    for number, cell in enumerate(cells, start=1):
        with alone(args.lock):
            for host, baud, loaded in cell:
                for _ in range(TRIES):
                    run = one_run(host, baud, loaded, data, busy=args.busy)
                    found.append(run)
                    what = f"{number}/{len(cells)} {host} {baud} {'loaded' if loaded else 'idle'}"
                    share = f"{100 * run.share:.1f} % of the wire limit"
                    print(
                        f"  {what}: {run.wall_s:.2f} s, dialogue {run.dialogue_s:.3f} s, {share}"
                        + (f"; rejected: {run.rejected}" if run.rejected else ""),
                        flush=True,
                    )
                    if not run.rejected:
                        break
                save(args.results, {"runs": before + [asdict(r) for r in found]})


def save(path: Path, part: dict[str, Any]) -> None:
    """Results so far, so that the page can be written again, and an interrupted measurement is not lost."""
    known = json.loads(path.read_text()) if path.exists() else {}
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps({**known, **part}, indent=1))
    fresh.replace(path)


def machine() -> dict[str, str]:
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
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC",
        "bridged": __version__,
        "stm32flash": _version(["stm32flash", "-h"], "stm32flash"),
        "stm32loader": _package("stm32loader"),
        "pyserial-asyncio": f"{_package('pyserial-asyncio')} (pyserial {_package('pyserial')})",
        "load average at the start": " ".join(f"{x:.2f}" for x in os.getloadavg()),
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description="Measure, and write docs/benchmarks.md.")
    parser.add_argument("--quick", action="store_true", help="a look: 64 KiB, 921600 baud, 2 runs, nothing is written to docs/")
    parser.add_argument("--runs", type=int, default=7, help="runs of each host in each condition (7)")
    parser.add_argument("--kib", type=int, default=256, help="size of the image (256)")
    parser.add_argument("--baud", type=int, nargs="+", default=list(BAUDS))
    parser.add_argument("--hosts", nargs="+", choices=list(HOSTS), default=list(HOSTS))
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=list(CONDITIONS))
    parser.add_argument("--lock", type=Path, help="a file to lock for each round, for a machine that does other work between")
    parser.add_argument("--only", choices=("speed", "cost", "page"), help="a part; page: write the page from the last results")
    parser.add_argument("--more", action="store_true", help="add to the last results instead of beginning anew")
    parser.add_argument("--busy", action="store_true", help="count runs although others keep the machine busy")
    parser.add_argument("--nice", type=int, default=0, help="priority of all that is measured, such as -5, where allowed")
    parser.add_argument("--results", type=Path, default=BUILT / "results.json", help="where figures are kept")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/benchmarks.md")
    args = parser.parse_args(argv)
    if args.quick:
        args.runs, args.kib, args.baud = min(args.runs, 2), min(args.kib, 64), [921600]
        args.results = BUILT / "quick.json"
        args.page = BUILT / "quick.md"
        args.busy = True
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    # An exception ends every `with` block, and with them every process that was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        build()
    except Missing as error:
        print(f"make bench: {error}", file=sys.stderr)
        return 1
    for tool in ("stm32flash",):
        if shutil.which(tool) is None and tool in " ".join(args.hosts) and args.only not in ("cost", "page"):
            print(f"make bench: {tool} is missing: apt install {tool}", file=sys.stderr)
            return 1
    if not may_realtime():
        args.hosts = [host for host in args.hosts if not host.endswith("-rt")]
    if args.nice:
        with contextlib.suppress(PermissionError):
            os.nice(args.nice)
    if args.only != "page":
        data = image_of(args.kib * 1024)
        known = json.loads(args.results.read_text()) if args.more and args.results.exists() else {}
        before, took_s = known.get("runs", []), known.get("took_s", 0.0)
        if args.only is None and not args.more:
            args.results.unlink(missing_ok=True)
        if args.only != "cost":
            about = {
                "size_bytes": len(data),
                "asked_runs": args.runs + known.get("asked_runs", 0) * bool(before),
                "machine": machine(),
            }
            seconds = expected_s(args, len(data))
            how = " and ".join(args.conditions)
            print(f"{args.runs} runs of {len(args.hosts)} hosts, {args.kib} KiB, {how}: about {seconds / 60:.0f} min")
            account = {**known.get("virtual", {}), **cost.virtual(data, args.baud)}
            save(args.results, {**about, "virtual": dict(sorted(account.items()))})
            began = time.monotonic()
            measure(args, data, before)
            save(args.results, {"took_s": took_s + time.monotonic() - began})
        if args.only != "speed":
            print("cost and growth: about 4 minutes" if not args.quick else "cost and growth: about a minute")
            with alone(args.lock):
                save(args.results, {"machine": machine(), "cost": cost.measure(data, quick=args.quick)})
    text = report.page(json.loads(args.results.read_text()), HOSTS)
    args.page.write_text(text)
    print(text if args.quick else f"written: {args.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
