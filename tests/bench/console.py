"""What a byte of the console costs: processor time of our daemon beside ser2net, in one run, on the same pty at the same rate.

    python -m tests.bench.console [--seconds 10] [--rounds 3]

Each server gets 300,000 bytes a second (3 Mbaud) from a pty and passes them to its readers; the servers take turns, round after
round, and each round starts them anew. Reported is user and system time of the server's process for a megabyte, the median of
the rounds with their range, and how late the talker was at most: it is late when the machine has no time, or when the server
does not take its bytes. Readers are threads of this process, whose own time is not counted.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.rig import cpu_s
from tests.console.test_throughput import Far, Reader
from tests.support import free_port, require_tool


@dataclass(frozen=True, slots=True)
class Case:
    """``readers`` at once, over raw TCP or telnet."""

    readers: int
    telnet: bool

    def __str__(self) -> str:
        return f"{self.readers} reader{'s' if self.readers > 1 else ''}, {'telnet' if self.telnet else 'raw'}"


CASES = (Case(1, False), Case(20, False), Case(1, True), Case(20, True))


def ours(root: Path, device: str, port: int, case: Case) -> list[str]:
    (root / "bridged.toml").write_text(
        f'[gateway]\nstate_dir = "{root}/state"\n[api]\nlisten = ""\nhttp = ""\nmetrics = ""\n[targets.m]\nport = "{device}"\n'
        f'[targets.m.application]\nbaud = 3000000\n[targets.m.console]\nlisten = "127.0.0.1:{port}"\nreplay_kib = 0\n'
        f'protocol = "{"rfc2217" if case.telnet else "raw"}"\nclients = 40\n'
    )
    return [sys.executable, "-m", "bridged", "serve", "--config", str(root / "bridged.toml")]


def theirs(root: Path, device: str, port: int, case: Case) -> list[str]:
    (root / "ser2net.yaml").write_text(
        f"connection: &one\n  accepter: {'telnet(rfc2217),' if case.telnet else ''}tcp,127.0.0.1,{port}\n"
        f"  connector: serialdev,{device},3000000n81,local\n  options:\n    max-connections: 40\n"
    )
    return ["ser2net", "-n", "-c", str(root / "ser2net.yaml"), "-P", str(root / "pid")]


SERVERS = {"bridged": ours, "ser2net": theirs}


@contextmanager
def running(name: str, case: Case) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """The server, its port, and the target's end of the wire."""
    master, slave = os.openpty()
    tty.setraw(slave)
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        command = SERVERS[name](Path(folder), os.ttyname(slave), port, case)
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError as error:
                    if time.monotonic() > deadline or server.poll() is not None:
                        raise SystemExit(f"{name} does not listen: {error}") from error
                    time.sleep(0.05)
            time.sleep(1.5)  # Until ours has found its device, and both have forgotten the first connection.
            yield server, port, master
        finally:
            server.terminate()
            server.wait(20)
            os.close(master)
            os.close(slave)


def measure(name: str, case: Case, seconds: float) -> tuple[float, float]:
    """Milliseconds of processor for a megabyte, and how late the talker was."""
    with running(name, case) as (server, port, master):
        readers = [Reader(port) for _ in range(case.readers)]
        time.sleep(0.5)
        far = Far(master, seconds)
        negotiated = [reader.count for reader in readers]
        before = cpu_s(server.pid)
        talker = threading.Thread(target=far.talk)
        talker.start()
        talker.join()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and any(
            reader.count - first < far.count_said for reader, first in zip(readers, negotiated, strict=True)
        ):
            time.sleep(0.01)
        used = cpu_s(server.pid) - before
        got = [reader.count - first for reader, first in zip(readers, negotiated, strict=True)]
        if min(got) < far.count_said:
            raise SystemExit(f"{name}, {case}: a reader got {min(got)} of {far.count_said} bytes")
        return used * 1000 / (far.count_said / 1e6), far.late_s


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    require_tool("ser2net", "ser2net")
    found: dict[tuple[str, Case], list[tuple[float, float]]] = {(name, case): [] for case in CASES for name in SERVERS}
    for _ in range(options.rounds):
        for case in CASES:
            for name in SERVERS:
                found[name, case].append(measure(name, case, options.seconds))
    print(f"ms of processor for a megabyte at 3 Mbaud, median (range) of {options.rounds} rounds of {options.seconds:g} s")
    print(f"load now {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors; late: how much the talker was at most")
    print("| | bridged | ser2net | ratio |\n|---|---|---|---|")
    for case in CASES:
        cells, medians = [], []
        for name in SERVERS:
            values = [value for value, _ in found[name, case]]
            late = max(late for _, late in found[name, case])
            medians.append(statistics.median(values))
            cells.append(f"{medians[-1]:.1f} ({min(values):.1f} to {max(values):.1f}), late {late:.2f} s")
        print(f"| {case} | {cells[0]} | {cells[1]} | {medians[0] / medians[1]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
