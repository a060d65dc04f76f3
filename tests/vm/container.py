"""The fast tier: the same Debian with systemd as its first process, in a container on this machine's own kernel.

No GPIO chip, no serial ports, no kernel of its own; in return native speed: it is up in a second. What concerns systemd only is
tested here: the unit, the package, the journal. Nothing is left behind: changes go to a file system in memory.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path
from types import TracebackType

from tests.vm.build import Guest
from tests.vm.machine import Agent, Inside

START_LIMIT_S = 60.0
DISK_MIB = 40


def lacking() -> str:
    """Why there can be no container here, with the remedy; empty: there can."""
    if os.geteuid() != 0:
        return "root is needed for a container (sudo make vm-test)"
    if shutil.which("systemd-nspawn") is None:
        return "apt install systemd-container"
    return ""


class Container(Inside):
    """``with Container(guest, folder) as inside: inside.run("systemctl status")``. ``/dev/disk`` is an ext4 of its own
    where this machine has loop devices (``has_disk``)."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self._guest, self._folder = guest, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._disk = ""

    def __enter__(self) -> Container:
        self._folder.mkdir(parents=True, exist_ok=True)
        if Path("/dev/loop-control").exists():
            image = self._folder / "disk.img"
            subprocess.run(["mke2fs", "-q", "-t", "ext4", image, f"{DISK_MIB}M"], check=True)
            losetup = ["losetup", "--find", "--show", str(image)]
            self._disk = subprocess.run(losetup, check=True, capture_output=True, text=True).stdout.strip()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(self._folder / "agent.sock"))
            server.listen(1)
            server.settimeout(START_LIMIT_S)
            log = (self._folder / "console.log").open("wb")
            command = [
                *("systemd-nspawn", "--quiet", f"--directory={self._guest.root}", "--volatile=overlay", "--register=no"),
                *("--keep-unit", "--private-network", f"--bind={self._folder}:/agent", "--link-journal=no"),
                *([f"--bind={self._disk}:/dev/disk"] if self._disk else []),
                *(f"--machine=bridged-{os.getpid()}", "--boot", "systemd.show_status=0"),
            ]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            log.close()
            try:
                sock, _ = server.accept()
            except TimeoutError:
                self._end()
                text = (self._folder / "console.log").read_text(errors="replace")
                raise RuntimeError(f"no agent in the container within {START_LIMIT_S:.0f} s:\n{text[-3000:]}") from None
        self._agent = Agent(sock)
        self._agent.wait(START_LIMIT_S)
        return self

    @property
    def has_disk(self) -> bool:
        return bool(self._disk)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()  # systemd-nspawn takes its container along.
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._disk:
            subprocess.run(["losetup", "--detach", self._disk], check=False)  # Of itself once nothing has it mounted.
            self._disk = ""
        if self._agent is not None:
            self._agent.close()
            self._agent = None
