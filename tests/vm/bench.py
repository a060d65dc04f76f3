"""The whole rig of the VM tests: the gateway in a virtual machine, one target in it and one outside.

- ``pair``: an F103 simulated in the guest, at ``/dev/ttyNM1`` of uartpair: real parity, framing and rates. It loses its power
  with the gateway, and keeps its flash, which is memory that the host shares with the guest.
- ``out``: an F407 simulated in this process. Its UART is the guest's second 16550, whose other end is our pty; its NRST and
  BOOT0 are the guest's GPIO lines, told over a virtio port. It goes on living when the gateway's power is cut, as a board of
  its own supply does, and tests can look into its flash.

NRST and BOOT0 of both hang on one gpio-sim chip, ``board``, line 2 to 5. ``moves`` tells what the kernel saw on them.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bridged import chips
from bridged.images.model import Image
from bridged.sim.device import Device
from bridged.sim.pty import PtyDevice
from tests.e2e.gateway import pairs
from tests.target.bench import make_image
from tests.vm.build import Guest
from tests.vm.guest.follow import Event, Level, parse
from tests.vm.machine import Machine, quote

HERE = Path(__file__).parent
LIB = "/usr/local/lib/bridged-vm"
SHARED_BYTES = 1 << 20
CHIPS = {"pair": "0x410", "out": "F407"}
OFFSETS = {"pair": {"nrst": 2, "boot0": 3}, "out": {"nrst": 4, "boot0": 5}}
PORTS = {"pair": "/dev/ttyNM0", "out": "/dev/ttyS1"}

CONFIG = """[gateway]
name = "vm"
{extra}
[targets.pair]
port = "/dev/ttyNM0"
chip = "0x410"
[targets.pair.lines]
kind = "gpio"
nrst = "NRST"
boot0 = "BOOT0"
{pair_lines}

[targets.out]
port = "/dev/ttyS1"
chip = "F407"
baud = 115200
[targets.out.lines]
kind = "gpio"
nrst = "board:4"
boot0 = "BOOT0_OUT"
"""

UNITS = {
    "vm-hardware.service": f"""[Unit]
Description=GPIO chip and serial ports
Before=bridged.service bridged.socket
After=systemd-modules-load.service sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={LIB}/hardware.sh all
[Install]
WantedBy=multi-user.target
""",
    "vm-follow-out.service": f"""[Unit]
Description=NRST and BOOT0 of the target outside
Requires=vm-hardware.service
After=vm-hardware.service
Before=bridged.service
[Service]
ExecStart=/usr/bin/python3 {LIB}/follow.py board 4 5 /dev/virtio-ports/lines
[Install]
WantedBy=multi-user.target
""",
    "vm-target.service": f"""[Unit]
Description=The target in the guest
Requires=vm-hardware.service
After=vm-hardware.service
[Service]
Type=exec
Environment=TARGET_OPTIONS=
ExecStart=/opt/bridged/bin/python3 {LIB}/target.py 0x410 /run/target.box /run/target.state $TARGET_OPTIONS
ExecStartPost=/bin/sh -c 'until test -S /run/target.box; do sleep 0.05; done'
SuccessExitStatus=0
[Install]
WantedBy=multi-user.target
""",
    "vm-follow-pair.service": f"""[Unit]
Description=NRST and BOOT0 of the target in the guest
Requires=vm-target.service
After=vm-target.service
PartOf=vm-target.service
[Service]
ExecStart=/usr/bin/python3 {LIB}/follow.py board 2 3 /run/target.box
[Install]
WantedBy=multi-user.target
""",
}


@dataclass(frozen=True)
class Move:
    """One change of a pin: ``nrst`` or ``boot0``, and its level from then on."""

    at_s: float
    pin: str
    high: int


class Bench:
    """``with Bench(guest, package, folder) as bench``: booted, installed, both targets there."""

    def __init__(self, guest: Guest, package: Path, folder: Path) -> None:
        self._package, self._folder = package, folder
        self._pair_flash = folder / "pair.flash"
        self._stack = ExitStack()
        self.out = PtyDevice(Device(chips.find(CHIPS["out"]), powered=False, seed=7), lines_path=folder / "out.lines")
        devices = (
            *("-chardev", f"serial,id=out,path={self.out.path}", "-serial", "chardev:out"),
            *("-chardev", f"socket,id=lines,path={folder / 'out.lines'}"),
            *("-device", "virtserialport,chardev=lines,name=lines"),
            *("-object", f"memory-backend-file,id=flash,share=on,mem-path={self._pair_flash},size={SHARED_BYTES}"),
            *("-device", "ivshmem-plain,memdev=flash"),
        )
        self.vm = Machine(guest, folder, devices)

    def __enter__(self) -> Bench:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._pair_flash.write_bytes(b"\xff" * SHARED_BYTES)
        self._stack.enter_context(self.out)
        self._stack.enter_context(self.vm)
        try:
            self.vm.boot()
            self._install()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _install(self) -> None:
        for name in ("hardware.sh", "follow.py", "target.py"):
            self.vm.write(f"{LIB}/{name}", (HERE / "guest" / name).read_bytes(), 0o755)
        for name, text in UNITS.items():
            self.vm.write(f"/etc/systemd/system/{name}", text)
        self.vm.run("systemctl daemon-reload && systemctl enable --now vm-hardware vm-follow-out")
        self.vm.write("/etc/systemd/system/bridged.service.d/tests.conf", "[Unit]\nStartLimitIntervalSec=0\n")
        self.vm.write("/root/bridged.deb", self._package.read_bytes())
        # Without its own syncs: what is tested is not dpkg's patience with a disk.
        self.vm.run("dpkg --force-unsafe-io -i /root/bridged.deb", timeout_s=240)
        self.vm.run("systemctl enable --now vm-target vm-follow-pair")
        self.configure()

    def configure(self, *, pair_lines: str = "", extra: str = "") -> None:
        """Write the configuration anew and restart the daemon."""
        self.vm.write("/etc/bridged/bridged.toml", CONFIG.format(pair_lines=pair_lines, extra=extra))
        self.vm.run("systemctl restart bridged")
        self.wait_idle()

    def recover(self) -> None:
        """Devices plugged in, the daemon running, nothing to do."""
        plugs = "/sys/bus/platform/drivers/uartpair"
        self.vm.run(
            f"test -e {plugs}/uartpair.0 || echo uartpair.0 > {plugs}/bind; "
            f"test -e /dev/gpiochip0 || {LIB}/hardware.sh plug; "
            "systemctl is-active --quiet bridged || { systemctl reset-failed bridged; systemctl start bridged; }"
        )
        self.wait_idle()

    # --- the daemon -------------------------------------------------------------------------------------------------

    def say(self, *requests: str, payload: bytes = b"", timeout_s: float = 120.0) -> str:
        """Lines of the protocol, with what may follow the first one; all that came back."""
        answer = self.vm.try_say(request(*requests, payload=payload), timeout_s=timeout_s)
        assert answer.status == 0, f"{requests}: {answer}\n{self.journal()}"
        return answer.out

    def nc(self, *requests: str, payload: bytes = b"") -> str:
        """The same through ``nc``, as people do it."""
        return self.vm.run("nc -N 127.0.0.1 7100", stdin=request(*requests, payload=payload))

    def put(self, image: Image, name: str) -> str:
        data = raw(image)
        answer = self.say(f"PUT {len(data)} {hashlib.sha256(data).hexdigest()} name={name}", payload=data)
        assert re.search(r"^250 ", answer, re.MULTILINE), answer
        return name

    def flash(self, target: str, name: str, *options: str) -> str:
        """Start a flash; its job."""
        answer = self.say(quote("FLASH", target, name, *options))
        found = re.search(r"^250 .*\bjob=(\S+)", answer, re.MULTILINE)
        assert found, answer
        return found[1]

    def job(self, job: str) -> dict[str, str]:
        return pairs(" ".join(line[4:] for line in self.say(f"STATUS {job}").splitlines()[1:]))

    def wait_state(self, job: str, *states: str, timeout_s: float = 120.0) -> dict[str, str]:
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.job(job)
            if found.get("state") in states:
                return found
            assert time.monotonic() < deadline, f"{job} is {found}, and not {states} after {timeout_s:.0f} s"
            time.sleep(0.2)

    def wait_phase(self, job: str, phase: str, timeout_s: float = 120.0) -> dict[str, str]:
        deadline = time.monotonic() + timeout_s
        while True:
            found = self.job(job)
            if found.get("phase") == phase:
                return found
            assert found.get("state") in ("queued", "waiting", "running", "interrupted"), found
            assert time.monotonic() < deadline, f"{job} is {found}, and not in {phase} after {timeout_s:.0f} s"
            time.sleep(0.1)

    def wait_idle(self, *targets: str, timeout_s: float = 90.0) -> None:
        """Until the daemon has its targets and nothing runs."""
        names = targets or tuple(CHIPS)
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self.vm.try_say(b"TARGETS\nQUIT\n")
            if all(re.search(rf"\btarget={name}\b.*\bstate=idle\b", answer.out) for name in names):
                return
            assert time.monotonic() < deadline, f"not idle after {timeout_s:.0f} s: {answer}\n{self.journal()}"
            time.sleep(0.2)

    def wait_absent(self, target: str, reason: str = "", timeout_s: float = 60.0) -> str:
        """Until it is absent, for this reason; the line of TARGETS that says why."""
        deadline = time.monotonic() + timeout_s
        while True:
            said = self.vm.try_say(b"TARGETS\nQUIT\n").out
            found = re.search(rf"^.*\btarget={target}\b.*\bstate=absent\b.*$", said, re.MULTILINE)
            if found and reason in found[0]:
                return found[0]
            assert time.monotonic() < deadline, f"{target} is not absent ({reason}) after {timeout_s:.0f} s: {said}"
            time.sleep(0.2)

    def started(self) -> float:
        """When the running daemon was started, in seconds of the guest's clock."""
        return int(self.vm.run("systemctl show -P ActiveEnterTimestampMonotonic bridged")) / 1e6

    def wait_started(self, *, after: float, timeout_s: float = 120.0) -> None:
        """Until a daemon that was started later than ``after`` has its targets."""
        deadline = time.monotonic() + timeout_s
        while self.started() <= after:
            assert time.monotonic() < deadline, f"not started again after {timeout_s:.0f} s\n{self.journal()}"
            time.sleep(0.3)
        self.wait_idle()

    def journal(self, *options: str) -> str:
        return self.vm.run(
            quote("journalctl", "--no-pager", "-b", "-u", "bridged", "-o", "short-monotonic", "-n", "60", *options)
        )

    # --- the lines --------------------------------------------------------------------------------------------------

    def forget_moves(self) -> None:
        self.vm.run("echo > /sys/kernel/tracing/instances/judge/trace")

    def _events(self, target: str) -> list[tuple[str, Event]]:
        """What the kernel recorded on the pins of ``target`` since ``forget_moves``."""
        base = "sed -n 's/^gpiochip.*: GPIOs \\([0-9]*\\)-.*board.*/BASE \\1/p' /sys/kernel/debug/gpio"
        text = self.vm.run(f"cat /sys/kernel/tracing/instances/judge/trace; {base}")
        found = re.search(r"^BASE (\d+)$", text, re.MULTILINE)
        assert found, text[-500:]
        first = int(found[1])
        pins = {first + offset: pin for pin, offset in OFFSETS[target].items()}
        return [(pins[event.number], event) for event in parse(text) if event.number in pins]

    def moves(self, target: str) -> list[Move]:
        """Changes of the pins since ``forget_moves``. Idle before the first one."""
        levels = {"nrst": Level(pull=1), "boot0": Level(pull=0)}
        moves: list[Move] = []
        for pin, event in self._events(target):
            level = levels[pin]
            before = level.high
            level.take(event.what, event.word, event.value)
            if level.high != before:
                moves.append(Move(event.at_s, pin, level.high))
        return moves

    def pushed_high(self, target: str) -> list[float]:
        """When NRST was driven high instead of being let go: told to be 1, and not made an input as the next thing."""
        events = [event for pin, event in self._events(target) if pin == "nrst"]
        after = [*events[1:], None]
        return [
            event.at_s
            for event, following in zip(events, after, strict=True)
            if (event.word, event.value) == ("set", 1) and (following is None or following.word != "in")
        ]

    def levels(self, target: str) -> dict[str, int]:
        """The pins now, as gpio-sim has them."""
        answer = self.vm.run(
            "cd /sys/devices/platform/$(cat /sys/kernel/config/gpio-sim/board/dev_name)/"
            "$(cat /sys/kernel/config/gpio-sim/board/bank/chip_name)/ && "
            + "; ".join(f"cat sim_gpio{offset}/value" for offset in OFFSETS[target].values())
        )
        return dict(zip(OFFSETS[target], map(int, answer.split()), strict=True))

    # --- the targets ------------------------------------------------------------------------------------------------

    def pair_state(self) -> dict[str, Any]:
        """What the target in the guest says about itself."""
        found: dict[str, Any] = json.loads(self.vm.read("/run/target.state"))
        return found

    def pair_target(self, *faults: str) -> None:
        """Start the target in the guest anew, its flash kept, with these faults."""
        self.vm.write(
            "/etc/systemd/system/vm-target.service.d/faults.conf",
            f'[Service]\nEnvironment="TARGET_OPTIONS={" ".join(faults)}"\n',
        )
        self.vm.run("systemctl daemon-reload && systemctl restart vm-target && systemctl restart vm-follow-pair")

    def pair_holds(self, image: Image) -> bool:
        data = self._pair_flash.read_bytes()
        return all(data[s.address - 0x08000000 :][: len(s.data)] == s.data for s in image.segments)

    def out_holds(self, image: Image) -> bool:
        with self.out.lock:
            memory = self.out.device.memory
            return all(memory.read(s.address, len(s.data)) == s.data for s in image.segments)


def request(*lines: str, payload: bytes = b"") -> bytes:
    """As a client sends it: the first line, its payload, the other lines, and good-bye."""
    first, *others = lines
    return first.encode() + b"\n" + payload + "\n".join([*others, "QUIT\n"]).encode()


def raw(image: Image) -> bytes:
    (segment,) = image.segments
    return bytes(segment.data)


def image_for(target: str, size_bytes: int, seed: int = 1) -> Image:
    return make_image(chips.find(CHIPS[target]), size_bytes, seed=seed)


def hold_ms(moves: Sequence[Move], pin: str, level: int) -> list[float]:
    """How long ``pin`` was at ``level`` each time, as far as both ends were seen."""
    found, since = [], None
    for move in moves:
        if move.pin != pin:
            continue
        if move.high == level:
            since = move.at_s
        elif since is not None:
            found.append((move.at_s - since) * 1000)
            since = None
    return found


__all__ = ["Bench", "Move", "hold_ms", "image_for", "raw"]
