"""What ``doctor`` may look at: files, links, permissions and a few programs of one machine. It judges nothing.

Every look goes through ``Machine``, whose root can be a directory with a /proc, /sys, /dev and /etc made by a test. What
such a tree cannot hold (owners of device nodes, answers of programs, sockets, the clock) are methods of their own.

Invariants:

- Nothing is changed and no port is opened: Linux raises DTR and RTS at open, which resets targets. What a port is, is read
  from sysfs. Programs that are run only report (``systemctl show``, ``udevadm info``, ``timedatectl show``).
- What cannot be read is "not told" (None or empty), never an error: doctor runs on any machine, as any user.
- No look takes long: files are read up to a limit, programs and sockets have a time-out.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import stat
import subprocess
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from bridged import errors
from bridged.target.holder import Holder, find_holder

READ_LIMIT_BYTES = 1 << 20  # /proc/net/unix of a desktop has a hundred KiB.
RUN_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 2.0
# Between a tty and its hardware: since Linux 6.5 two devices of the bus serial-base, as in target/uart.py.
NOT_THE_DRIVER = ("port", "ctrl")
NO_PORTS = ("console", "ptmx")  # In sysfs among the ttys, as are the virtual consoles tty0 to tty63.
CLIMB_LIMIT = 12  # A USB adapter behind four hubs has its device some ten directories above the tty.


@dataclass(frozen=True, slots=True)
class Account:
    """A user with all groups that count."""

    name: str
    uid: int
    gids: frozenset[int]


@dataclass(frozen=True, slots=True)
class Node:
    """What ``stat`` says of a file or device."""

    mode: int
    uid: int
    gid: int

    @property
    def is_socket(self) -> bool:
        return stat.S_ISSOCK(self.mode)

    def allows(self, who: Account, want: int) -> bool:
        """``want``: bits of ``os.R_OK``, ``os.W_OK``, ``os.X_OK``. Mode bits only: access lists are for desktop users."""
        if who.uid == 0:
            return True
        shift = 6 if who.uid == self.uid else 3 if self.gid in who.gids else 0
        return (self.mode >> shift) & want == want


@dataclass(frozen=True, slots=True)
class Disk:
    free_bytes: int
    read_only: bool


@dataclass(frozen=True, slots=True)
class Process:
    pid: int
    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Usb:
    """The USB device behind a port; ``path``: its directory in sysfs."""

    path: str
    vendor: str
    product: str
    serial: str
    title: str


@dataclass(frozen=True, slots=True)
class Port:
    """A serial device as sysfs knows it. ``name`` is the kernel's (``ttyUSB0``), whatever link led there."""

    name: str
    driver: str = ""
    usb: Usb | None = None
    compatible: tuple[str, ...] = ()
    major: int = -1
    has_uart: bool = True

    @property
    def device(self) -> str:
        return f"/dev/{self.name}"


@dataclass(frozen=True, slots=True)
class Unit:
    """A systemd unit with its drop-ins: settings of all sections by name, in order."""

    path: str
    settings: dict[str, list[str]] = field(default_factory=dict)

    def last(self, name: str) -> str:
        return (self.settings.get(name) or [""])[-1]

    def words(self, name: str) -> list[str]:
        """Of a setting that is a list, over all its lines."""
        return [word for line in self.settings.get(name, []) for word in line.split()]

    def says_yes(self, name: str) -> bool:
        return self.last(name).lower() in ("yes", "true", "on", "1")


class Machine:
    """One machine, read-only."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = Path(os.path.realpath(root))

    # --- files -------------------------------------------------------------------------------------------------------

    def at(self, path: str) -> Path:
        """Where ``path`` of that machine is on this one."""
        return self.root / path.lstrip("/")

    def read(self, path: str) -> str | None:
        """Text without the white space and zero bytes around it; None: not there, or not for us."""
        try:
            with self.at(path).open("rb") as file:
                return file.read(READ_LIMIT_BYTES).decode(errors="replace").strip("\0 \t\r\n")
        except OSError:
            return None

    def names(self, folder: str) -> list[str]:
        try:
            return sorted(os.listdir(self.at(folder)))
        except OSError:
            return []

    def exists(self, path: str) -> bool:
        return os.path.exists(self.at(path))

    def resolve(self, path: str) -> str:
        """The path behind all links."""
        real = os.path.realpath(self.at(path))
        inside = os.path.relpath(real, self.root)
        return real if inside.startswith("..") else f"/{inside}"

    def node(self, path: str) -> Node | None:
        try:
            found = os.stat(self.at(path))
        except OSError:
            return None
        return Node(found.st_mode, found.st_uid, found.st_gid)

    def disk(self, path: str) -> Disk | None:
        """The file system of ``path``, or of its nearest parent that exists."""
        for folder in (Path(path), *Path(path).parents):
            try:
                found = os.statvfs(self.at(str(folder)))
            except OSError:
                continue
            return Disk(found.f_bavail * found.f_frsize, bool(found.f_flag & os.ST_RDONLY))
        return None

    # --- people ------------------------------------------------------------------------------------------------------

    @cached_property
    def caller(self) -> Account:
        uid = os.geteuid()
        names = [row[0] for row in self._rows("/etc/passwd") if len(row) > 2 and row[2] == str(uid)]
        return Account(names[0] if names else str(uid), uid, frozenset({os.getegid(), *os.getgroups()}))

    def account(self, name: str, groups: list[str]) -> Account | None:
        """A user of /etc/passwd with the groups of /etc/group and those in ``groups`` (of a unit)."""
        row = next((row for row in self._rows("/etc/passwd") if row[0] == name and len(row) > 3 and row[2].isdigit()), None)
        if row is None:
            return None
        gids = {int(row[3])} if row[3].isdigit() else set()
        for group in self._rows("/etc/group"):
            if len(group) > 3 and group[2].isdigit() and (group[0] in groups or name in group[3].split(",")):
                gids.add(int(group[2]))
        return Account(name, int(row[2]), frozenset(gids))

    def group_name(self, gid: int) -> str:
        return next((row[0] for row in self._rows("/etc/group") if len(row) > 2 and row[2] == str(gid)), str(gid))

    def has_group(self, name: str) -> bool:
        return any(row[0] == name for row in self._rows("/etc/group"))

    def _rows(self, path: str) -> list[list[str]]:
        return [line.split(":") for line in (self.read(path) or "").splitlines()]

    def may(self, who: Account, path: str, want: int = os.R_OK | os.W_OK) -> bool:
        """Whether ``who`` may use an existing file or device."""
        if self.root == Path("/") and who == self.caller:
            return os.access(path, want, effective_ids=True)
        node = self.node(path)
        return node is not None and node.allows(who, want)

    # --- programs ----------------------------------------------------------------------------------------------------

    def run(self, *command: str) -> str | None:
        """Standard output of a program that reports; None where it is missing, fails or takes too long."""
        program = shutil.which(command[0])
        if self.root != Path("/") or program is None:
            return None
        try:
            done = subprocess.run(
                [program, *command[1:]],
                capture_output=True,
                timeout=RUN_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "LC_ALL": "C", "SYSTEMD_COLORS": "0"},
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.decode(errors="replace") if done.returncode == 0 else None

    def properties(self, *command: str) -> dict[str, str]:
        """Of a program that prints ``NAME=value`` lines."""
        lines = (self.run(*command) or "").splitlines()
        return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}

    @cached_property
    def processes(self) -> list[Process]:
        found = []
        for pid in sorted(int(name) for name in self.names("/proc") if name.isdigit()):
            name = self.read(f"/proc/{pid}/comm")
            if name:
                arguments = (self.read(f"/proc/{pid}/cmdline") or "").split("\0")
                found.append(Process(pid, name, tuple(arguments)))
        return found

    def holder(self, port: Port) -> Holder | None:
        """A process that has the port open, as far as the caller may see."""
        try:
            return find_holder(os.stat(self.at(port.device)).st_rdev)
        except OSError:
            return None

    def greeting(self, address: str | tuple[str, int]) -> bytes | None:
        """The first line that a listener says; empty: it says nothing; None: nobody listens. ``address``: a path, or host and
        port."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        with socket.socket(family) as sock:
            sock.settimeout(CONNECT_TIMEOUT_S)
            try:
                sock.connect(address)
            except OSError:
                return None
            said = b""
            deadline = time.monotonic() + CONNECT_TIMEOUT_S
            try:
                while b"\n" not in said and len(said) < 4096 and time.monotonic() < deadline:
                    chunk = sock.recv(4096)
                    if not chunk:
                        break
                    said += chunk
            except OSError:
                pass
            return said.partition(b"\n")[0]

    def listening(self, path: str) -> bool:
        """Whether somebody listens on a Unix socket, by the kernel's list: connecting could disturb a box for one client."""
        for line in (self.read("/proc/net/unix") or "").splitlines():
            words = line.split(maxsplit=7)
            # Num RefCount Protocol Flags Type St Inode Path; __SO_ACCEPTCON is set in Flags while it listens.
            if len(words) == 8 and words[7] == path and int(words[3], 16) & 0x10000:
                return True
        return False

    # --- time --------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return time.time()

    def installed_at(self) -> float:
        """When the files of this program were written: no clock that is right can be before it."""
        return os.path.getmtime(errors.__file__)

    # --- what it is --------------------------------------------------------------------------------------------------

    @cached_property
    def model(self) -> str:
        """Such as ``Raspberry Pi 4 Model B Rev 1.4``; empty where there is no device tree."""
        return self.read("/proc/device-tree/model") or ""

    @property
    def is_pi(self) -> bool:
        return self.model.startswith("Raspberry Pi")

    @property
    def system(self) -> str:
        return f"{platform.system()} {platform.release()}, Python {platform.python_version()}"

    def ports(self) -> list[str]:
        """Names of the serial devices that have hardware behind them."""
        names = [name for name in self.names("/sys/class/tty") if self.exists(f"/sys/class/tty/{name}/device")]
        return [f"/dev/{name}" for name in names if (port := self.port(f"/dev/{name}")) is not None and port.has_uart]

    def port(self, path: str) -> Port | None:
        """The serial device behind ``path``; None where sysfs knows none of this name."""
        folder, name = os.path.split(self.resolve(path))
        tty = f"/sys/class/tty/{name}"
        if folder != "/dev" or name in NO_PORTS or re.fullmatch(r"tty\d*", name) or not self.exists(tty):
            return None
        number = (self.read(f"{tty}/dev") or "").partition(":")[0]
        hardware = self.resolve(f"{tty}/device")
        return Port(
            name,
            self._driver(hardware),
            self._usb(hardware),
            self._compatible(hardware),
            int(number) if number.isdigit() else -1,
            # PORT_UNKNOWN of the 8250 driver, which makes names for UARTs that may be added later.
            self.read(f"{tty}/type") != "0",
        )

    def _driver(self, hardware: str) -> str:
        for folder in self._upwards(hardware):
            if self.exists(f"{folder}/driver"):
                name = os.path.basename(self.resolve(f"{folder}/driver"))
                if name not in NOT_THE_DRIVER:
                    return name
        return ""

    def _usb(self, hardware: str) -> Usb | None:
        for folder in self._upwards(hardware):
            vendor = self.read(f"{folder}/idVendor")
            if vendor:
                words = [self.read(f"{folder}/{name}") or "" for name in ("manufacturer", "product")]
                product, serial = self.read(f"{folder}/idProduct") or "", self.read(f"{folder}/serial") or ""
                return Usb(folder, vendor, product, serial, " ".join(word for word in words if word))
        return None

    def _compatible(self, hardware: str) -> tuple[str, ...]:
        for folder in self._upwards(hardware):
            text = self.read(f"{folder}/of_node/compatible")
            if text:
                return tuple(text.split("\0"))
        return ()

    @staticmethod
    def _upwards(folder: str) -> list[str]:
        """The directory and its parents within /sys/devices."""
        parents = [folder, *(str(parent) for parent in Path(folder).parents)]
        return [parent for parent in parents if parent.startswith("/sys/devices/")][:CLIMB_LIMIT]

    def links_to(self, port: Port, folder: str) -> list[str]:
        """The stable names of a port in one directory of /dev/serial."""
        links = [f"{folder}/{name}" for name in self.names(folder)]
        return [link for link in links if self.resolve(link) == port.device]

    def device_kinds(self, major: int) -> set[str]:
        """What the kernel calls the character devices of a major number, as DeviceAllow= of a unit does: ``char-ttyAMA``."""
        section = (self.read("/proc/devices") or "").partition("Block devices:")[0]
        rows = [line.split() for line in section.splitlines()]
        return {f"char-{row[1].removeprefix('/dev/')}" for row in rows if len(row) == 2 and row[0] == str(major)}

    def unit(self, name: str) -> Unit | None:
        """A unit as systemd would find it; drop-ins count."""
        folders = [f"{top}/systemd/system" for top in ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")]
        path = next((f"{folder}/{name}" for folder in folders if self.exists(f"{folder}/{name}")), None)
        if path is None:
            return None
        drop_ins = {
            file: f"{folder}/{name}.d/{file}"
            for folder in reversed(folders)
            for file in self.names(f"{folder}/{name}.d")
            if file.endswith(".conf")
        }
        settings: dict[str, list[str]] = {}
        for file in (path, *(drop_ins[key] for key in sorted(drop_ins))):
            for line in (self.read(file) or "").replace("\\\n", " ").splitlines():
                key, equals, value = (part.strip() for part in line.partition("="))
                if not equals or key.startswith(("#", ";", "[")):
                    continue
                # An empty assignment takes back what was said before.
                settings[key] = [*settings.get(key, []), value] if value else []
        return Unit(path, settings)
