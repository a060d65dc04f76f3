"""What the daemon costs, how that grows, and the exact account of one flash in virtual time.

Wall-clock figures here are medians of a few; the growth curves are single measurements, for what matters is their shape.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bridged.images.model import Image
from bridged.jobs.journal import Journal
from bridged.jobs.model import Job, JobKind, JobState, advance, note
from bridged.jobs.records import Change
from bridged.sim.loader import Timing
from bridged.target.request import Past
from tests.bench.load import intel_hex
from tests.bench.plan import FRAMED_BYTES
from tests.bench.rig import Daemon, Device, Memory, cpu_s, digest, disk, memory, target_name, wakeups
from tests.bench.rig import run as run_host
from tests.e2e.gateway import Client, pairs
from tests.target.bench import WIRED, Bench

BASE = 0x08000000
CHIP = "F407"
STARTS = 5
IDLE_S = 10.0
BAUDS = (57600, 115200, 230400, 460800, 921600)
SIZES_KIB = (16, 64, 128, 256, 512, 1024)
SLOW_BAUD = 19200  # So that a session of 4 KiB lasts long enough to be looked at.
# As the compiled device: no erase time, no time to answer, programming by the word.
TIMING = Timing(startup_s=0.01, sector_erase_s=0.0, mass_erase_s=0.0, spread=0.0, reply_s=0.0, sync_reply_s=0.0)


def virtual(data: bytes, bauds: Sequence[int], chip: str = CHIP, **request: Any) -> dict[str, Any]:
    """The same flash in virtual time, where the host costs nothing: bytes, turnarounds, overruns, seconds. Exact."""
    found: dict[str, Any] = {}
    for baud in bauds:
        bench = Bench(chip, settings={"timing": TIMING, "max_baud": 1_000_000, "rate_error": 0.0})
        image = Image.of([(BASE, data)])
        result = bench.run("flash", image, baud=baud, startup_s=0.02, listen_s=0.0, wiring=WIRED, **request)
        assert result.evidence == "full"
        assert result.baud == baud, f"the simulated part fell back to {result.baud}"
        counts = bench.account.all
        found[str(baud)] = {
            "bytes_out": counts.bytes_out,
            "bytes_in": counts.bytes_in,
            "sends": counts.sends,
            "turnarounds": counts.turnarounds,
            "overruns": bench.account.overruns,
            "violations": len(bench.account.violations),
            "timeouts": counts.timeouts,
            "host_s": counts.host_ns / 1e9,
            "wire_s": counts.wire_ns / 1e9,
            "waited_s": counts.waited_ns / 1e9,
            "paused_s": counts.paused_ns / 1e9,
            "total_s": bench.account.total_s,
        }
    return found


def firmware(kib: int) -> bytes:
    """Begins with vectors; no block of it is blank."""
    return (0x20000400).to_bytes(4, "little") + (BASE + 0x101).to_bytes(4, "little") + b"\x5a" * (kib * 1024 - 8)


def virtual_account(*, quick: bool = False) -> dict[str, Any]:
    """All that is counted in virtual time: exact, and the same on every machine."""
    return {
        "flash": virtual(firmware(256), (921600,) if quick else BAUDS),
        "first_flash": first_flash(),
        "recheck": recheck(),
        "by_size": [{"kib": kib, **virtual(firmware(kib), [921600])["921600"]} for kib in ((16, 64) if quick else SIZES_KIB)],
    }


FIRST_FLASH_KIB = 200


def first_flash() -> list[dict[str, Any]]:
    """200 KiB into an empty part of 1 MiB: what went over the wire, and what its blocks and what is kept need there.

    The last of an F407's sectors that it touches has 56 KiB more. They are kept by default, and the loader has no cheaper way
    to tell that they are blank than to read them.
    """
    blocks = FIRST_FLASH_KIB * 4
    rows = []
    for chip, outside, kept_kib in (("L476", "keep", 0), ("F407", "keep", 256 - FIRST_FLASH_KIB), ("F407", "discard", 0)):
        account = virtual(firmware(FIRST_FLASH_KIB), [115200], chip, discard_outside=outside == "discard")["115200"]
        rows.append(
            {
                "chip": chip,
                "outside": outside,
                "bytes": account["bytes_out"] + account["bytes_in"],
                "image_bytes": blocks * 2 * FRAMED_BYTES,
                "kept_bytes": kept_kib * 4 * FRAMED_BYTES,
                "total_s": account["total_s"],
            }
        )
    return rows


def recheck() -> dict[str, Any]:
    """``ensure evidence=sample`` of an image that is unchanged in its target, at 115200 baud."""
    bench = Bench(CHIP, settings={"timing": TIMING, "rate_error": 0.0})
    image = Image.of([(BASE, firmware(256))])
    first = bench.run("flash", image, baud=115200, startup_s=0.02, listen_s=0.0, wiring=WIRED)
    past = Past(uid=first.uid, content=image.digest, age_s=3600.0)
    result = bench.run("ensure", image, past=past, evidence="sample", baud=115200, startup_s=0.02, listen_s=0.0, wiring=WIRED)
    assert (result.evidence, result.changed) == ("sample", False)
    counts = bench.account.all
    return {
        "total_s": bench.account.total_s,
        "compared_bytes": result.bytes_compared,
        "bytes": counts.bytes_out + counts.bytes_in,
        "turnarounds": counts.turnarounds,
    }


def measure(data: bytes, *, quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bridged-cost-") as root:
        return {
            **_start_and_idle(Path(root), quick),
            **_job(Path(root), data),
            **_session(Path(root)),
            "growth": _growth(Path(root), quick),
        }


def _start_and_idle(root: Path, quick: bool) -> dict[str, Any]:
    ready = []
    with Device(root) as device:
        for _ in range(2 if quick else STARTS):
            with Daemon(root, [device], 115200) as daemon:
                ready.append(daemon.ready_s)
                daemon.until_idle()
        with Daemon(root, [device], 115200) as daemon:
            daemon.until_idle()
            time.sleep(2)
            before, spent, began = wakeups(daemon.pid), cpu_s(daemon.pid), time.monotonic()
            time.sleep(3 if quick else IDLE_S)
            seconds = time.monotonic() - began
            idle = memory(daemon.pid)
            print(f"  idle: {idle.rss / 1024:.1f} MiB RSS, ready in {statistics.median(ready):.2f} s", flush=True)
            return {
                "ready_s": ready,
                "idle_rss_kib": idle.rss,
                "idle_uss_kib": idle.uss,
                "idle_pss_kib": idle.pss,
                "wakeups_per_s": (wakeups(daemon.pid) - before) / seconds,
                "idle_cpu_share": (cpu_s(daemon.pid) - spent) / seconds,
                "idle_threads": len(list(Path(f"/proc/{daemon.pid}/task").iterdir())),
            }


def _job(root: Path, data: bytes) -> dict[str, Any]:
    """One job through the whole daemon: CPU, and what is written. The image is staged and parsed before."""
    with Device(root, "d", flash_bytes=len(data)) as device, Daemon(root, [device], 921600) as daemon:
        daemon.until_idle()
        client = daemon.connect()
        before_put = disk(daemon.pid)
        client.put(data, "image.bin")
        _accepted(client, f"PLAN bench {digest(data)} addr=0x08000000 type=bin")
        before, spent = disk(daemon.pid), cpu_s(daemon.pid, children=False)
        ended = cpu_s(daemon.pid)
        daemon.flash(client, digest(data))
        after = disk(daemon.pid)
        job = {
            "daemon_s": cpu_s(daemon.pid, children=False) - spent,
            "all_s": cpu_s(daemon.pid) - ended,
        }
        client.close()
    return {
        "job_cpu_daemon_s": job["daemon_s"],
        "job_cpu_session_s": job["all_s"] - job["daemon_s"],
        "job_written_bytes": after["write_bytes"] - before["write_bytes"],
        "job_wchar_bytes": after["wchar"] - before["wchar"],
        "stage_written_bytes": before["write_bytes"] - before_put["write_bytes"],
        "stage_wchar_bytes": before["wchar"] - before_put["wchar"],
    }


def _accepted(client: Client, request: str) -> dict[str, str]:
    code, text = client.do(request)
    if code // 100 != 2:
        raise RuntimeError(f"{request}: {code} {text}")
    return pairs(text)


def _session(root: Path) -> dict[str, Any]:
    """Memory of a session with a small image and with a large one, and how long one takes to start."""
    uss: dict[str, Any] = {}
    for kib, baud in ((4, SLOW_BAUD), (1024, 921600)):
        data = b"\x5a" * (kib * 1024)
        with Device(root) as device, Daemon(root, [device], baud) as daemon:
            daemon.until_idle()
            client = daemon.connect()
            client.put(data, "image.bin")
            job = _accepted(client, f"FLASH bench {digest(data)} addr=0x08000000 type=bin force=vectors")["job"]
            seen = None
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                status = client.status(job)
                if status.get("phase") == "write" and int(status.get("done", 0)) > 0 and (pids := daemon.sessions()):
                    with contextlib.suppress(OSError):
                        seen = memory(pids[0])
                        break
                time.sleep(0.05)
            client.do(f"CANCEL {job} force=1")
            client.do(f"WAIT {job}")
            client.close()
        if seen is not None:
            uss[str(kib)] = {"uss_kib": seen.uss, "rss_kib": seen.rss, "pss_kib": seen.pss}
    starts = []
    with Device(root, "d", "--unpaced", "--program-us", "0") as device:
        image = root / "small.bin"
        image.write_bytes((0x20000400).to_bytes(4, "little") + (BASE + 0x101).to_bytes(4, "little") + bytes(1016))
        for _ in range(STARTS):
            options = ("--port", device.port, "--lines", str(device.lines), "--baud", "921600", str(image))
            ended, _, _, output = run_host([sys.executable, "-m", "tests.bench.ours", *options])
            if ended:
                raise RuntimeError(output)
            starts.append(float(output.partition('"start_s": ')[2].partition(",")[0]))
    print(f"  session: {uss}, starts in {statistics.median(starts):.3f} s", flush=True)
    return {"session_memory": uss, "session_start_s": starts}


# --- growth -------------------------------------------------------------------------------------------------------


def _growth(root: Path, quick: bool) -> dict[str, Any]:
    return {
        "by_targets": _by_targets(quick),
        "memory_by_connections": _memory_by_connections(root, quick),
        "memory_by_image": _memory_by_image(root, quick),
        "by_history": _by_history(quick),
    }


def _by_targets(quick: bool) -> list[dict[str, float]]:
    """The daemon with so many targets: idle, and while all of them are flashed."""
    rows = []
    for count in (1, 2) if quick else (1, 2, 4, 8, 16):
        with tempfile.TemporaryDirectory(prefix="bridged-targets-") as place, ExitStack() as running:
            work = Path(place)
            devices = [running.enter_context(Device(work, f"d{n}")) for n in range(count)]
            with Daemon(work, devices, 9600) as daemon:
                daemon.until_idle()
                time.sleep(1)
                idle = memory(daemon.pid)
                before, began = cpu_s(daemon.pid, children=False), time.monotonic()
                time.sleep(1 if quick else 3)
                idle_cpu = (cpu_s(daemon.pid, children=False) - before) / (time.monotonic() - began)
                client = daemon.connect()
                client.put(firmware(4), "image.bin")
                found = digest(firmware(4))
                jobs = [
                    _accepted(client, f"FLASH {target_name(n)} {found} addr=0x08000000 type=bin")["job"] for n in range(count)
                ]
                sessions: list[Memory] = []
                deadline = time.monotonic() + 30
                while len(sessions) < count and time.monotonic() < deadline:
                    # A session is looked at when it has all it ever needs: while it writes.
                    if all(client.status(job).get("phase") in ("write", "verify") for job in jobs):
                        with contextlib.suppress(OSError):
                            sessions = [memory(pid) for pid in daemon.sessions()]
                    time.sleep(0.05)
                for job in jobs:
                    client.do(f"WAIT {job}")
                client.close()
                rows.append(
                    {
                        "targets": count,
                        "rss_kib": idle.rss,
                        "uss_kib": idle.uss,
                        "ready_s": daemon.ready_s,
                        "idle_cpu_share": idle_cpu,
                        "session_uss_kib": statistics.median(m.uss for m in sessions) if sessions else 0,
                        "session_pss_kib": statistics.median(m.pss for m in sessions) if sessions else 0,
                    }
                )
    return rows


def _memory_by_connections(root: Path, quick: bool) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    with Device(root) as device, Daemon(root, [device], 115200) as daemon, ExitStack() as open_:
        daemon.until_idle()
        count = 0
        for wanted in (0, 10, 100) if quick else (0, 10, 100, 500, 1000):
            while count < wanted:
                client = daemon.connect()
                open_.callback(client.close)
                client.do("PING")
                count += 1
            time.sleep(0.5)
            now = memory(daemon.pid)
            rows.append({"connections": wanted, "rss_kib": now.rss, "uss_kib": now.uss})
    return rows


def _memory_by_image(root: Path, quick: bool) -> list[dict[str, float]]:
    """After a HEX file of that size was staged and parsed: what stays in the daemon."""
    rows = []
    for mib in (1,) if quick else (1, 2, 4, 8):
        with Device(root) as device, Daemon(root, [device], 115200) as daemon:
            daemon.until_idle()
            client = daemon.connect()
            before = memory(daemon.pid)
            data = intel_hex(mib, mib << 20)
            began = time.monotonic()
            client.put(data, "growth.hex")
            put_s = time.monotonic() - began
            client.do(f"PLAN bench {digest(data)}")
            seconds = time.monotonic() - began
            now = memory(daemon.pid)
            client.close()
            rows.append(
                {"mib": mib, "rss_kib": now.rss, "more_kib": now.rss - before.rss, "put_s": put_s, "put_and_parse_s": seconds}
            )
    return rows


def _by_history(quick: bool) -> list[dict[str, float]]:
    """Memory, start and a list of jobs with so many ended jobs in the journal."""
    rows = []
    for count in (0, 1000) if quick else (0, 1000, 10000):
        with tempfile.TemporaryDirectory(prefix="bridged-history-") as place:
            work = Path(place)
            (work / "state").mkdir(mode=0o700)
            _fill(work / "state/state.db", count)
            with Device(work) as device:
                daemon = Daemon(work, [device], 115200)
                text = (work / "bridged.toml").read_text()
                (work / "bridged.toml").write_text(text + "[jobs]\nkeep = 100000\n")
                with daemon:
                    daemon.until_idle()
                    client = daemon.connect()
                    took = []
                    for _ in range(20):
                        began = time.monotonic()
                        client.do("JOBS limit=50")
                        took.append(time.monotonic() - began)
                    client.close()
                    now = memory(daemon.pid)
                    rows.append(
                        {
                            "jobs": count,
                            "rss_kib": now.rss,
                            "ready_s": daemon.ready_s,
                            "list_ms": statistics.median(took) * 1000,
                            "journal_kib": (work / "state/state.db").stat().st_size / 1024,
                        }
                    )
    return rows


def _fill(path: Path, count: int) -> None:
    """Ended jobs, each with the entries that a flash leaves."""
    journal = Journal.open(path)
    try:
        last = None
        for number in range(count):
            at = 1_700_000_000.0 + number
            job = Job(f"j{number:08d}", JobKind.FLASH, "bench", JobState.QUEUED, 1, "a" * 64, "b" * 64, {}, "uid:0", at)
            journal.admit(job, "", "")
            job = advance(job, JobState.RUNNING, started=at)
            journal.apply(Change(job))
            job = note(job, phase="write", touched=True)
            journal.apply(Change(job))
            job = advance(job, JobState.SUCCEEDED, ended=at + 30, result={"evidence": "full", "uid": "0" * 24, "seconds": 30.0})
            last = journal.apply(Change(job))
        if last is not None:
            last.result()
    finally:
        journal.close()
