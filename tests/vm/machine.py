"""One virtual machine: booting it, talking to the agent in it, cutting its power.

Always QEMU's own emulation (TCG), never KVM: some hosts offer a /dev/kvm on which Debian's kernel hangs. Hence everything in
there is some twenty times slower than outside, and no test may ask for a time below some 50 ms.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import queue
import shlex
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.vm.build import Guest

BOOT_LIMIT_S = 150.0
ANSWER_LIMIT_S = 120.0
CMDLINE = (
    "console=ttyS0 quiet panic=-1 mitigations=off audit=0 selinux=0 apparmor=0 random.trust_cpu=on "
    "systemd.show_status=0 systemd.journald.forward_to_console=0"
)


@dataclass(frozen=True)
class Answer:
    """Of one command in the guest."""

    status: int
    out: str
    err: str


class Agent:
    """The connection to the agent of a guest; commands may run at once, from several threads."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._lock = threading.Lock()
        self._last = 0
        self._waiting: dict[int, queue.Queue[dict[str, Any]]] = {0: queue.Queue()}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self, timeout_s: float) -> None:
        """Until the agent has said that it is there."""
        try:
            self._waiting[0].get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"the guest did not come up within {timeout_s:.0f} s") from None

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        answers: queue.Queue[dict[str, Any]] = queue.Queue()
        with self._lock:
            self._last += 1
            number = self._last
            self._waiting[number] = answers
            self._sock.sendall(json.dumps({"id": number, **request}).encode() + b"\n")
        try:
            return answers.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"no answer to {str(request)[:300]} within {timeout_s:.0f} s") from None
        finally:
            del self._waiting[number]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._sock.makefile("rb") as file:
            for line in file:
                # Before the agent there may be noise of a guest that went down.
                with contextlib.suppress(json.JSONDecodeError):
                    answer = json.loads(line)
                    if waiting := self._waiting.get(answer["id"]):
                        waiting.put(answer)


class Inside:
    """A guest with an agent in it, whatever it runs on: running commands, reading and writing files."""

    _agent: Agent | None = None

    def try_(self, command: str, *, stdin: bytes = b"", timeout_s: float = ANSWER_LIMIT_S) -> Answer:
        """Run a line of shell; its end may be any."""
        assert self._agent is not None
        request = {"run": command, "stdin": base64.b64encode(stdin).decode(), "timeout_s": timeout_s}
        answer = self._agent.ask(request, timeout_s + 20)
        return Answer(int(answer["status"]), str(answer["out"]), str(answer["err"]))

    def run(self, command: str, *, stdin: bytes = b"", timeout_s: float = ANSWER_LIMIT_S) -> str:
        """Run a line of shell that has to succeed; what it said."""
        answer = self.try_(command, stdin=stdin, timeout_s=timeout_s)
        assert answer.status == 0, f"{command!r} ended with {answer.status}:\n{answer.out[-3000:]}{answer.err[-3000:]}"
        return answer.out

    def try_say(self, data: bytes, port: int = 7100, timeout_s: float = ANSWER_LIMIT_S) -> Answer:
        """Send ``data`` to a listener on loopback, and all that came back. Its status is not 0 where nobody listens."""
        assert self._agent is not None
        request = {"say": base64.b64encode(data).decode(), "port": port, "timeout_s": timeout_s}
        answer = self._agent.ask(request, timeout_s + 20)
        return Answer(int(answer["status"]), str(answer["out"]), str(answer["err"]))

    def write(self, path: str, data: bytes | str, mode: int = 0o644) -> None:
        assert self._agent is not None
        raw = data.encode() if isinstance(data, str) else data
        answer = self._agent.ask({"write": path, "data": base64.b64encode(raw).decode(), "mode": mode}, ANSWER_LIMIT_S)
        assert answer["status"] == 0, answer

    def read(self, path: str) -> bytes:
        assert self._agent is not None
        answer = self._agent.ask({"read": path}, ANSWER_LIMIT_S)
        assert answer["status"] == 0, answer
        return base64.b64decode(answer["data"])

    def wait_for(self, what: str, command: str, timeout_s: float = 60.0) -> str:
        """Until a line of shell succeeds; what it said then."""
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self.try_(command)
            if answer.status == 0:
                return answer.out
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{what} did not happen within {timeout_s:.0f} s: {answer.out[-2000:]}{answer.err[-2000:]}"
                )
            time.sleep(0.1)


class Machine(Inside):
    """``with Machine(...) as vm: vm.boot(); vm.run("true")``. The disk lives as long as the object: a boot after a power cut
    finds what the cut left."""

    def __init__(self, guest: Guest, folder: Path, devices: Sequence[str] = (), cpus: int = 2) -> None:
        self._guest, self._folder, self._devices, self._cpus = guest, folder, tuple(devices), cpus
        self._process: subprocess.Popen[bytes] | None = None
        self.boots = 0
        self.console = folder / "console.log"

    def __enter__(self) -> Machine:
        self._folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--sparse=always", self._guest.disk, self._disk], check=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.cut()
        self._disk.unlink(missing_ok=True)

    @property
    def _disk(self) -> Path:
        return self._folder / "disk.img"

    def boot(self) -> None:
        """Switch the power on and wait for the agent."""
        assert self._process is None
        qemu = shutil.which("qemu-system-x86_64")
        assert qemu is not None
        agent = self._folder / "agent.sock"
        agent.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(agent))
            server.listen(1)
            server.settimeout(30)
            log = (self._folder / "qemu.log").open("ab")
            command = [
                *("nice", "-n", os.environ.get("BRIDGED_VM_NICE", "10"), qemu),
                *("-M", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(self._cpus), "-m", "1024"),
                *("-nodefaults", "-no-user-config", "-display", "none"),
                *("-kernel", str(self._guest.kernel), "-initrd", str(self._guest.initrd), "-append", CMDLINE),
                *("-drive", f"file={self._disk},format=raw,if=none,id=root,cache=writeback"),
                *("-device", "virtio-blk-pci,drive=root"),
                *("-chardev", f"file,id=console,path={self.console},append=on", "-serial", "chardev:console"),
                *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={agent}"),
                *("-device", "virtserialport,chardev=agent,name=agent"),
                *self._devices,
            ]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            log.close()
            try:
                sock, _ = server.accept()
            except TimeoutError:
                raise RuntimeError(f"QEMU did not start: {(self._folder / 'qemu.log').read_text()[-2000:]}") from None
        self._agent = Agent(sock)
        self._come_up()

    def _come_up(self) -> None:
        assert self._agent is not None
        try:
            self._agent.wait(BOOT_LIMIT_S)
        except TimeoutError as error:
            raise RuntimeError(f"{error}; its console:\n{self.console.read_text(errors='replace')[-3000:]}") from None
        self.boots += 1

    def reboot(self) -> None:
        """In order: ``systemctl reboot``."""
        assert self._agent is not None
        self.run("systemctl --no-block reboot")
        self._come_up()

    def cut(self) -> None:
        """Pull the plug: what the guest had not written to its disk is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._agent is not None:
            self._agent.close()
            self._agent = None


def quote(*words: str) -> str:
    return shlex.join(words)
