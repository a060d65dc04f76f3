"""A whole gateway for a test: the daemon as a process, simulated parts on ptys in this process, real sockets between them.

The parts run here so that a test can look into their flash and see what a reset interrupted; the daemon and its session
processes are as they are in the field, and are killed as they are in the field.
"""

from __future__ import annotations

import hashlib
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bridged import chips
from bridged.images.model import Image
from bridged.sim.device import Device
from bridged.sim.loader import Timing
from bridged.sim.pty import PtyDevice
from tests.support import unit_environment

# Real enough that phases last, short enough for a test.
TIMING = Timing(sector_erase_s=0.2, spread=0, startup_s=0.01)


class Client:
    """A client of the line protocol over any connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(60)
        self.file = sock.makefile("rb")
        self.greeting = self.reply()

    def reply(self) -> tuple[int, str]:
        """The last line of one reply: code and text. Lines before it are kept in ``lines``."""
        self.lines: list[str] = []
        while True:
            raw = self.file.readline()
            if not raw:
                raise EOFError(f"the daemon closed the connection after {self.lines}")
            text = raw.decode().rstrip("\r\n")
            self.lines.append(text[4:])
            if text[3:4] == " ":
                return int(text[:3]), text[4:]

    def do(self, request: str, payload: bytes = b"") -> tuple[int, str]:
        self.sock.sendall(request.encode() + b"\n" + payload)
        code, text = self.reply()
        if code == 354:
            code, text = self.reply()
        return code, text

    def put(self, data: bytes, name: str) -> str:
        digest = hashlib.sha256(data).hexdigest()
        code, text = self.do(f"PUT {len(data)} {digest} name={name}", data)
        assert code == 250, text
        return digest

    def status(self, job: str) -> dict[str, str]:
        code, _ = self.do(f"STATUS {job}")
        assert code == 250
        return pairs(" ".join(self.lines))

    def close(self) -> None:
        self.file.close()
        self.sock.close()


def pairs(text: str) -> dict[str, str]:
    """``key=value`` words of a reply."""
    return {m[1]: m[2] if m[2] is not None else m[3] for m in re.finditer(r'([\w.]+)=(?:"((?:[^"\\]|\\.)*)"|(\S*))', text)}


@dataclass
class Gateway:
    """``chips_``: name of target to name of part. ``settings``: passed to each simulated ``Device``. ``extra``: more settings,
    beginning with those of ``[api]``. ``port``: also listen there, on loopback, or ``listen``: wherever that says. ``http``:
    where HTTP listens; ``metrics`` likewise. ``application``: settings of that table."""

    root: Path
    chips_: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    paced: bool = False
    extra: str = ""
    port: int = 0
    http: str = ""
    application: str = "listen_s = 0.5"
    listen: str = ""
    metrics: str = ""
    name: str = "e2e"

    def __enter__(self) -> Gateway:
        self.stack = ExitStack()
        self.ports: dict[str, PtyDevice] = {}
        self.daemon: subprocess.Popen[bytes] | None = None
        text = [f'[gateway]\nname = "{self.name}"\nstate_dir = "{self.root}/state"']
        listen = self.listen or (f"127.0.0.1:{self.port}" if self.port else "")
        text += [
            f'[api]\nlisten = "{listen}"\nhttp = "{self.http}"\nmetrics = "{self.metrics}"',
            f'socket = "{self.root}/bridged.sock"',
            self.extra,
        ]
        for name, chip in self.chips_.items():
            settings = {"timing": TIMING, **self.settings}
            device = Device(chips.find(chip), powered=False, **settings)
            port = PtyDevice(device, link=self.root / name, lines_path=self.root / f"{name}.lines", paced=self.paced)
            self.ports[name] = self.stack.enter_context(port)
            text.append(f'[targets.{name}]\nport = "{self.root}/{name}"\nchip = "{chip}"\nstartup_s = 0.03\nbaud = 115200')
            text.append(f'[targets.{name}.lines]\nkind = "socket"\nsocket = "{self.root}/{name}.lines"')
            text.append('nrst = "nrst"\nboot0 = "boot0"')
            text.append(f"[targets.{name}.application]\n{self.application}")
        (self.root / "bridged.toml").write_text("\n".join(text) + "\n")
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for port in self.ports.values():
            assert port.device.stats.hazard_resets == [], "a reset in the middle of an erase"
        self.stack.close()

    def command(self) -> list[str]:
        return [sys.executable, "-m", "bridged", "serve", "--config", str(self.root / "bridged.toml")]

    def start(self) -> None:
        """Start the daemon and wait until it answers and has its targets."""
        self.log = (self.root / "daemon.log").open("ab")
        self.daemon = subprocess.Popen(
            self.command(),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            env=unit_environment(),
        )
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self.daemon.poll() is None, (self.root / "daemon.log").read_text()
            try:
                client = self.connect()
            except OSError:
                time.sleep(0.05)
                continue
            client.close()
            return
        raise AssertionError("the daemon does not answer: " + (self.root / "daemon.log").read_text())

    def connect(self) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.root / "bridged.sock"))
        return Client(sock)

    def connect_tcp(self) -> Client:
        return Client(socket.create_connection(("127.0.0.1", self.port), timeout=60))

    def rss_bytes(self) -> int:
        """Memory of the daemon that is really there."""
        assert self.daemon is not None
        text = Path(f"/proc/{self.daemon.pid}/status").read_text()
        found = re.search(r"^VmRSS:\s+(\d+) kB$", text, re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def stop(self, number: int = signal.SIGTERM) -> int | None:
        """Send a signal to the daemon and wait for its end."""
        if self.daemon is None:
            return None
        self.daemon.send_signal(number)
        status = self.daemon.wait(60)
        self.daemon = None
        self.log.close()
        return status

    def sessions(self) -> list[int]:
        """Session processes that have a port of this gateway open."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                command = (entry / "cmdline").read_bytes()
                if b"bridged.target.worker" not in command or not self._ttys() & self._open(entry):
                    continue
            except OSError:
                continue
            found.append(int(entry.name))
        return found

    def _ttys(self) -> set[tuple[int, int]]:
        return {_device(Path(port.path)) for port in self.ports.values()}

    @staticmethod
    def _open(entry: Path) -> set[tuple[int, int]]:
        return {_device(fd) for fd in (entry / "fd").iterdir()}

    def device(self, name: str) -> Device:
        return self.ports[name].device

    def holds(self, name: str, image: Image) -> bool:
        with self.ports[name].lock:
            memory = self.device(name).memory
            return all(memory.read(s.address, len(s.data)) == s.data for s in image.segments)


def _device(path: Path) -> tuple[int, int]:
    """Not by its name: a container beside us has a /dev/pts of its own."""
    found = path.stat()
    return found.st_dev, found.st_rdev


def wait_for(what: str, check: Any, timeout_s: float = 60.0) -> Any:
    """Poll ``check`` until it gives something; these are other processes, so there is nothing to await."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = check()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {timeout_s} s")


__all__ = ["Client", "Gateway", "pairs", "wait_for"]
