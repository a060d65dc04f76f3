"""The machine half of doctor: machines made of files in a directory, healthy ones and sick ones.

Each finding has a row in ``CASES``: a healthy machine that does not have it, and what makes it sick. A test compares the rows
with the table of findings, so that a new finding comes with both; one table, so one file. What files cannot show (owners of
devices, other programs, sockets) is told by ``Fake``; the real ways of looking at these are tried on this machine, at the end.
"""

from __future__ import annotations

import ast
import json
import os
import pty
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest

from bridged import __version__, chips, doctor
from bridged.doctor import CATALOG, Finding, Level, boards, checks, examine
from bridged.doctor.machine import Account, Disk, Machine, Node, Port
from bridged.errors import UnknownTarget
from bridged.findings import MACHINE_GROUPS, codes
from bridged.jobs.admission import FREE_BYTES
from bridged.target.holder import Holder
from bridged.target.process import WORKER, WORKER_ROOT
from tests.target.test_gpio import Chip as GpioChip
from tests.target.test_gpio import Machine as GpioMachine
from tests.target.test_gpio import header

ROOT = Path(__file__).resolve().parent.parent
NOW = 1_800_000_000.0
FT232 = {"manufacturer": "FTDI", "product": "FT232R USB UART", "idVendor": "0403", "idProduct": "6001", "serial": "A50285BI"}
STLINK = {
    "manufacturer": "STMicroelectronics",
    "product": "STM32 STLink",
    "idVendor": "0483",
    "idProduct": "374b",
    "serial": "066",
}
BY_ID = "/dev/serial/by-id/usb-FTDI_FT232R_USB_UART_A50285BI-if00-port0"
BY_PATH = "/dev/serial/by-path/pci-0000:00:14.0-usb-0:1:1.0-port0"
SHOW = ("systemctl", "show", "--property=LoadState,ActiveState,SubState,UnitFileState,Result")


class Fake(Machine):
    """A machine below ``root``. Nodes are what devices belong to: (mode, owner, group) by path."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.nodes: dict[str, Node] = {}
        self.answers: dict[tuple[str, ...], str] = {}
        self.holders: dict[str, Holder] = {}
        self.greetings: dict[str, bytes] = {}
        self.space = Disk(8 << 30, False)
        self.time = NOW
        self.who = Account("root", 0, frozenset({0}))
        self.configuration = ""

    # --- what files cannot tell

    @property
    def caller(self) -> Account:
        return self.who

    def node(self, path: str) -> Node | None:
        return self.nodes.get(self.resolve(path)) or super().node(path)

    def disk(self, path: str) -> Disk | None:
        assert path.startswith("/")
        return self.space

    def run(self, *command: str) -> str | None:
        return self.answers.get(command)

    def holder(self, port: Port) -> Holder | None:
        return self.holders.get(port.name)

    def greeting(self, address: str | tuple[str, int]) -> bytes | None:
        return self.greetings.get(address if isinstance(address, str) else address[0])

    def now(self) -> float:
        return self.time

    def installed_at(self) -> float:
        return NOW - 1000

    # --- building

    def write(self, path: str, text: str = "") -> None:
        self.at(path).parent.mkdir(parents=True, exist_ok=True)
        self.at(path).write_text(text)

    def link(self, path: str, target: str) -> None:
        """A relative link, as udev and the kernel make them."""
        at = self.at(path)
        at.parent.mkdir(parents=True, exist_ok=True)
        at.unlink(missing_ok=True)
        at.symlink_to(os.path.relpath(self.at(target), at.parent))

    def edit(self, old: str, new: str) -> None:
        assert self.configuration.count(old) == 1, f"{old!r} is not once in the configuration"
        self.configuration = self.configuration.replace(old, new)

    def tty(self, name: str, hardware: str, driver: str, major: int, compatible: str = "", kind: str = "") -> None:
        self.write(f"/dev/{name}")
        self.nodes[f"/dev/{name}"] = Node(stat.S_IFCHR | 0o660, 0, 20)
        self.write(f"/sys/class/tty/{name}/dev", f"{major}:0\n")
        if kind:
            self.write(f"/sys/class/tty/{name}/type", f"{kind}\n")
        self.at(hardware).mkdir(parents=True, exist_ok=True)
        self.link(f"/sys/class/tty/{name}/device", hardware)
        driver_folder = f"/sys/bus/any/drivers/{driver}"
        self.at(driver_folder).mkdir(parents=True, exist_ok=True)
        self.link(f"{hardware}/driver", driver_folder)
        if compatible:
            self.write(f"{hardware}/of_node/compatible", f"{compatible}\0")

    def usb(self, name: str, about: dict[str, str], driver: str = "ftdi_sio", socket_name: str = "1-1") -> None:
        device = f"/sys/devices/pci0000:00/0000:00:14.0/usb1/{socket_name}"
        for key, value in about.items():
            self.write(f"{device}/{key}", f"{value}\n")
        interface = f"{device}/{socket_name}:1.0"
        hardware = f"{interface}/{name}" if driver == "ftdi_sio" else interface
        self.tty(name, hardware, driver, 188 if name.startswith("ttyUSB") else 166)
        if driver == "ftdi_sio":
            # Behind the link "device" of the tty, as in the kernel's own tree.
            self.write(f"/sys/class/tty/{name}/device/latency_timer", "1\n")

    def process(self, pid: int, name: str, *arguments: str) -> None:
        self.write(f"/proc/{pid}/comm", f"{name}\n")
        self.write(f"/proc/{pid}/cmdline", "\0".join(arguments or (name,)) + "\0")

    def state(self, unit: str, active: str, enabled: str, result: str = "success") -> None:
        self.answers[(*SHOW, unit)] = f"LoadState=loaded\nActiveState={active}\nUnitFileState={enabled}\nResult={result}\n"

    # --- asking

    def examine(self, *names: str) -> list[Finding]:
        self.__dict__.pop("processes", None)  # What was looked at once is remembered.
        file = self.root / "bridged.toml"
        file.write_text(self.configuration)
        return examine(self, file, names)

    def codes(self) -> set[str]:
        return {finding.code for finding in self.examine()}


# --- healthy machines ---------------------------------------------------------------------------------------------------


def basics(m: Fake) -> None:
    """What every machine has; the daemon is not installed."""
    m.write("/proc/sys/kernel/random/boot_id", "7a4c6c1e-9d3a-4f0c-8a3b-2f3a0f6f1d11\n")
    m.write("/proc/cmdline", "root=PARTUUID=1 console=tty1 rootwait\n")
    m.write("/proc/consoles", "tty1                 -WU (EC  p  )    4:1\n")
    m.write(
        "/proc/devices",
        "Character devices:\n  4 ttyS\n166 ttyACM\n188 ttyUSB\n204 ttyAMA\n254 gpiochip\n\nBlock devices:\n  8 sd\n",
    )
    m.write("/etc/passwd", "root:x:0:0::/root:/bin/sh\npi:x:1000:1000::/home/pi:/bin/sh\nbridged:x:990:990::/:/bin/false\n")
    m.write("/etc/group", "root:x:0:\ndialout:x:20:pi\ngpio:x:986:pi\npi:x:1000:\nbridged:x:990:\n")
    m.at("/var/lib/bridged").mkdir(parents=True)
    m.nodes["/var/lib/bridged"] = Node(stat.S_IFDIR | 0o700, 990, 990)
    m.process(1, "systemd")


def installed(m: Fake) -> None:
    """The unit of this repository, running."""
    m.write("/etc/systemd/system/bridged.service", (ROOT / "systemd" / "bridged.service").read_text())
    m.state("bridged.service", "active", "enabled")
    m.greetings["127.0.0.1"] = f"220 bridged {__version__} gw=pi proto=1 auth=none".encode()


def pi(m: Fake, model: str) -> None:
    basics(m)
    installed(m)
    m.write("/proc/device-tree/model", f"{model}\0")
    m.gpio = GpioMachine(m.at("/dev"))  # type: ignore[attr-defined]


def add_gpio(m: Fake, label: str) -> GpioChip:
    m.nodes["/dev/gpiochip0"] = Node(stat.S_IFCHR | 0o660, 0, 986)
    chip: GpioChip = m.gpio.add("gpiochip0", GpioChip(label, header()))  # type: ignore[attr-defined]
    m.chip = chip  # type: ignore[attr-defined]
    return chip


GPIO_TARGET = """\
[targets.motor1]
port = "/dev/ttyAMA0"
chip = "F756"
[targets.motor1.lines]
kind = "gpio"
nrst = "GPIO17"
boot0 = "GPIO27"
"""


def pi3(m: Fake) -> None:
    """With disable-bt: the PL011 is on the header."""
    pi(m, "Raspberry Pi 3 Model B Plus Rev 1.3")
    m.tty("ttyAMA0", "/sys/devices/platform/soc/3f201000.serial", "uart-pl011", 204, "arm,pl011", "32")
    m.link("/dev/serial0", "/dev/ttyAMA0")
    add_gpio(m, "pinctrl-bcm2835")
    m.configuration = GPIO_TARGET


def pi4(m: Fake) -> None:
    """Kernel 6.6: two devices of serial-base between tty and UART."""
    pi(m, "Raspberry Pi 4 Model B Rev 1.4")
    uart = "/sys/devices/platform/soc/fe201000.serial"
    m.tty("ttyAMA0", f"{uart}/fe201000.serial:0/fe201000.serial:0.0", "port", 204, kind="32")
    m.at("/sys/bus/any/drivers/uart-pl011").mkdir()
    m.link(f"{uart}/driver", "/sys/bus/any/drivers/uart-pl011")
    m.write(f"{uart}/of_node/compatible", "arm,pl011\0arm,primecell\0")
    m.link("/dev/serial0", "/dev/ttyAMA0")
    add_gpio(m, "pinctrl-bcm2711")
    m.configuration = GPIO_TARGET


def pi5(m: Fake) -> None:
    """With dtparam=uart0=on; the debug connector is there as ever."""
    pi(m, "Raspberry Pi 5 Model B Rev 1.0")
    m.tty("ttyAMA0", "/sys/devices/platform/axi/1f00030000.serial", "uart-pl011", 204, "arm,pl011-axi", "32")
    m.tty("ttyAMA10", "/sys/devices/platform/soc/107d001000.serial", "uart-pl011", 204, "arm,pl011", "32")
    m.link("/dev/serial0", "/dev/ttyAMA10")
    add_gpio(m, "pinctrl-rp1")
    m.configuration = GPIO_TARGET


def pc(m: Fake) -> None:
    """A PC with an FTDI adapter, whose DTR and RTS drive the target; the daemon is started by hand, as pi."""
    basics(m)
    m.who = Account("pi", 1000, frozenset({1000, 20, 986}))
    m.nodes["/var/lib/bridged"] = Node(stat.S_IFDIR | 0o755, 1000, 1000)
    m.usb("ttyUSB0", FT232)
    m.link(BY_ID, "/dev/ttyUSB0")
    m.link(BY_PATH, "/dev/ttyUSB0")
    m.tty("ttyS0", "/sys/devices/pnp0/00:04", "serial", 4, kind="4")
    m.tty("ttyS1", "/sys/devices/platform/serial8250", "serial8250", 4, kind="0")
    m.configuration = f"""\
[targets.motor1]
port = "{BY_ID}"
chip = "F407"
[targets.motor1.lines]
kind = "modem"
nrst = "dtr"
boot0 = "rts"
"""


def bench(m: Fake) -> None:
    """A PC with an ST-LINK and a line box."""
    basics(m)
    m.usb("ttyACM0", STLINK, "cdc_acm")
    m.link("/dev/serial/by-id/usb-STLINK", "/dev/ttyACM0")
    m.nodes["/run/box.sock"] = Node(stat.S_IFSOCK | 0o666, 0, 0)
    m.write("/run/box.sock")
    m.write(
        "/proc/net/unix",
        "Num RefCount Protocol Flags Type St Inode Path\n0: 00000002 00000000 00010000 0001 01 15 /run/box.sock\n",
    )
    m.configuration = """\
[targets.motor1]
port = "/dev/serial/by-id/usb-STLINK"
chip = "L476"
[targets.motor1.lines]
kind = "socket"
socket = "/run/box.sock"
nrst = "nrst"
boot0 = "boot0"
"""


HEALTHY: dict[str, Callable[[Fake], None]] = {"pi3": pi3, "pi4": pi4, "pi5": pi5, "pc": pc, "bench": bench}
Make = Callable[[str], Fake]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    def made(name: str) -> Fake:
        root = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        machine = Fake(root)
        HEALTHY[name](machine)
        gpio: GpioMachine | None = getattr(machine, "gpio", None)
        monkeypatch.setitem(sys.modules, "gpiod", gpio.module() if gpio else None)
        return machine

    return made


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_machines_have_no_problem(make: Make, name: str) -> None:
    bad = [f for f in make(name).examine() if f.level in (Level.PROBLEM, Level.WARNING)]
    assert bad == []


# --- sick machines: one change, one finding -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """``healthy``: a machine without the finding; ``sicken``: what makes it appear; ``said``: what must be in its sentence or
    remedy."""

    healthy: str
    sicken: Callable[[Fake], object]
    said: str
    without: Callable[[Fake], object] = field(default=lambda _m: None)  # Changes the healthy machine first.


def port(m: Fake, name: str) -> None:
    old = m.configuration.split('port = "')[1].split('"')[0]
    m.edit(f'port = "{old}"', f'port = "{name}"')


def both(*steps: Callable[[Fake], object]) -> Callable[[Fake], None]:
    def done(m: Fake) -> None:
        for step in steps:
            step(m)

    return done


def mini_uart(m: Fake) -> None:
    m.tty("ttyS0", "/sys/devices/platform/soc/fe215040.serial", "bcm2835-aux-uart", 4, "brcm,bcm2835-aux-uart")
    port(m, "/dev/ttyS0")


def mini_uart_behind_serial_base(m: Fake) -> None:
    """A driver whose name was not told: the device tree is enough."""
    uart = "/sys/devices/platform/soc/fe215040.serial"
    m.tty("ttyS0", f"{uart}/fe215040.serial:0", "ctrl", 4)
    m.write(f"{uart}/of_node/compatible", "brcm,bcm2835-aux-uart\0")
    port(m, "/dev/ttyS0")


def second_target(port_name: str, lines: str) -> Callable[[Fake], None]:
    def done(m: Fake) -> None:
        m.configuration += f'[targets.motor2]\nport = "{port_name}"\nchip = "F756"\n[targets.motor2.lines]\n{lines}\n'

    return done


def consumer(m: Fake, name: str) -> None:
    m.chip.used[17] = name  # type: ignore[attr-defined]


def no_gpiod(_m: Fake) -> None:
    sys.modules["gpiod"] = None  # type: ignore[assignment]


def old_gpiod(_m: Fake) -> None:
    library = ModuleType("gpiod")
    library.__file__ = "/usr/lib/python3/dist-packages/gpiod.so"
    library.version_string = lambda: "1.6.3"  # type: ignore[attr-defined]
    sys.modules["gpiod"] = library


def no_gpiochip(m: Fake) -> None:
    m.at("/dev/gpiochip0").unlink()
    m.gpio.chips.clear()  # type: ignore[attr-defined]


def unit(m: Fake, old: str, new: str) -> None:
    path = m.at("/etc/systemd/system/bridged.service")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def mode(m: Fake, path: str, mode_bits: int, uid: int, gid: int) -> None:
    m.nodes[path] = Node(m.nodes[path].mode & ~0o777 | mode_bits, uid, gid)


def adapter_without_serial(m: Fake) -> None:
    m.at("/sys/devices/pci0000:00/0000:00:14.0/usb1/1-1/serial").unlink()


def pty_port(m: Fake) -> None:
    m.write("/dev/pts/4")
    m.link("/run/f756", "/dev/pts/4")
    port(m, "/run/f756")


def bluetooth(m: Fake) -> None:
    m.link("/dev/serial1", "/dev/ttyAMA0")
    m.link("/dev/serial0", "/dev/ttyS0")


def chip_of(name: str) -> Callable[[Fake], None]:
    return lambda m: m.edit(m.configuration.split("\n")[2], f'chip = "{name}"')


DROP_IN = "/etc/systemd/system/bridged.service.d/network.conf"


def no_drop_in(m: Fake) -> None:
    m.at(DROP_IN).unlink()


def gateway(line: str) -> Callable[[Fake], None]:
    def done(m: Fake) -> None:
        m.configuration = f"{line}\n{m.configuration}"

    return done


def stranger_listens(m: Fake) -> None:
    m.greetings["127.0.0.1"] = b"HTTP/1.0 400 Bad request"


def silent(m: Fake) -> None:
    m.greetings.clear()


def modem_manager(m: Fake) -> None:
    m.process(400, "ModemManager")


def ignored(m: Fake) -> None:
    modem_manager(m)
    device = "/sys/devices/pci0000:00/0000:00:14.0/usb1/1-1"
    m.answers[("udevadm", "info", "--query=property", f"--path={device}")] = "ID_VENDOR=FTDI\nID_MM_DEVICE_IGNORE=1\n"


def undervoltage(m: Fake, alarm: str) -> None:
    m.write("/sys/class/hwmon/hwmon1/name", "rpi_volt\n")
    m.write("/sys/class/hwmon/hwmon1/in0_lcrit_alarm", f"{alarm}\n")


MODEM = '"modem"\nnrst = "dtr"\nboot0 = "rts"'
GPIO = '"gpio"\nnrst = "GPIO17"\nboot0 = "GPIO27"'
BOX = '"socket"\nsocket = "/run/box.sock"\nnrst = "nrst"\nboot0 = "boot0"'

CASES: dict[str, list[Case]] = {
    # the machine
    "DOCTOR_NOT_ROOT": [
        Case("pi4", lambda m: setattr(m, "who", Account("pi", 1000, frozenset({1000, 20, 986}))), "user pi may not see")
    ],
    "DOCTOR_UNDERVOLTAGE": [Case("pi4", lambda m: undervoltage(m, "1"), "too low", lambda m: undervoltage(m, "0"))],
    "DOCTOR_CLOCK_WRONG": [Case("pi4", lambda m: setattr(m, "time", 0.0), "earlier than the files")],
    "DOCTOR_CLOCK_UNSYNCED": [
        Case(
            "pi4",
            lambda m: m.answers.update({("timedatectl", "show", "--property=NTPSynchronized"): "NTPSynchronized=no\n"}),
            "not synchronised",
            lambda m: m.answers.update({("timedatectl", "show", "--property=NTPSynchronized"): "NTPSynchronized=yes\n"}),
        )
    ],
    "DOCTOR_BOOT_ID": [
        Case("pi4", lambda m: m.at("/proc/sys/kernel/random/boot_id").unlink(), "tells no boot id"),
        Case("pi4", lambda m: m.write("/proc/sys/kernel/random/boot_id", "none\n"), "tells no boot id"),
    ],
    # configuration
    "DOCTOR_CONFIG_MISTAKE": [
        Case("pi4", lambda m: m.edit("port =", "prot ="), "did you mean port"),
        Case("pi4", chip_of("F999"), "F999"),
    ],
    "DOCTOR_CONFIG_DOUBTFUL": [Case("pi4", lambda m: m.edit('nrst = "GPIO17"\n', ""), "neither nrst nor power")],
    # the service
    "DOCTOR_UNIT_MISSING": [Case("pi4", lambda m: m.at("/etc/systemd/system/bridged.service").unlink(), "not installed")],
    "DOCTOR_UNIT_DISABLED": [Case("pi4", lambda m: m.state("bridged.service", "active", "disabled"), "disabled")],
    "DOCTOR_UNIT_STOPPED": [Case("pi4", lambda m: m.state("bridged.service", "inactive", "enabled"), "inactive")],
    "DOCTOR_UNIT_FAILED": [
        Case("pi4", lambda m: m.state("bridged.service", "failed", "enabled", "exit-code"), "failed (exit-code)")
    ],
    "DOCTOR_UNIT_USER_MISSING": [
        Case("pi4", lambda m: m.write("/etc/passwd", "root:x:0:0::/root:/bin/sh\n"), "user bridged, who does not exist")
    ],
    "DOCTOR_UNIT_GROUP_MISSING": [
        Case("pi4", lambda m: m.write("/etc/group", "root:x:0:\ndialout:x:20:\nbridged:x:990:\n"), "group gpio, which does not")
    ],
    "DOCTOR_UNIT_DEVICE": [
        Case("pi4", lambda m: unit(m, "DeviceAllow=char-tty[A-Z]* rw\n", ""), "DeviceAllow=char-ttyAMA rw"),
        Case("pi4", lambda m: unit(m, "DeviceAllow=char-gpiochip rw\n", ""), "DeviceAllow=char-gpiochip rw"),
        Case(
            "pi4",
            lambda m: m.write(
                "/etc/systemd/system/bridged.service.d/a.conf", "[Service]\nDeviceAllow=\nDeviceAllow=/dev/null rw\n"
            ),
            "DeviceAllow=char-ttyAMA rw",
            lambda m: m.write(
                "/etc/systemd/system/bridged.service.d/a.conf", "[Service]\nDeviceAllow=\nDeviceAllow=char-* rw\n"
            ),
        ),
    ],
    "DOCTOR_UNIT_NETWORK": [
        Case(
            "pi4",
            no_drop_in,
            "api.listen: the service may not talk",
            both(
                gateway('[api]\nlisten = "127.0.0.1:7100 plaintext:192.168.1.5:7100"'),
                lambda m: m.write(DROP_IN, "[Service]\nIPAddressAllow=192.168.1.0/24\n"),
            ),
        ),
        Case("pi4", gateway('[api]\nhttp = "plaintext:0.0.0.0:7101"'), "api.http"),
        Case(
            "pi4",
            lambda m: m.edit("localhost:4222", "a.example.org:4222"),
            "fleet.servers",
            gateway('[gateway]\nname = "gw1"\n[fleet]\nservers = ["tls://127.0.0.1:4222", "tls://localhost:4222"]'),
        ),
        Case(
            "pi4",
            no_drop_in,
            "hawkbit.url",
            both(
                gateway('[gateway]\nname = "gw1"\n[hawkbit]\nurl = "plaintext:http://10.0.0.1/D"\ntoken = "credential:t"'),
                lambda m: m.write(DROP_IN, "[Service]\nIPAddressDeny=\n"),
            ),
        ),
    ],
    "DOCTOR_UNIT_PATH": [
        Case("pi4", gateway('[gateway]\nstate_dir = "/srv/state"'), "gateway.state_dir: the service may not write /srv/state"),
        Case("pi4", gateway('[gateway]\nstate_dir = "/home/pi/state"'), "does not see /home/pi/state"),
        Case("pi4", gateway('[api]\nsocket = "/tmp/bridged.sock"'), "api.socket: the service does not see /tmp"),
        Case(
            "pi4",
            gateway('[gateway]\nstate_dir = "/srv/state"'),
            "/srv/state",
            both(
                gateway('[api]\nsocket = "/run/bridged/other.sock"'),
                lambda m: m.write(
                    "/run/systemd/system/bridged.service.d/x.conf", "[Service]\nReadWritePaths=/srv/other \\\n /opt\n"
                ),
            ),
        ),
    ],
    "DOCTOR_DAEMON_STOPPED": [Case("pi4", both(silent, lambda m: m.state("bridged.service", "inactive", "enabled")), "7100")],
    "DOCTOR_DAEMON_SILENT": [Case("pi4", silent, "nobody answers at 127.0.0.1:7100")],
    "DOCTOR_DAEMON_VERSION": [
        Case("pi4", lambda m: m.greetings.update({"127.0.0.1": b"220 bridged 0.0.1 gw=pi"}), "version 0.0.1, this command line")
    ],
    "DOCTOR_LISTEN_TAKEN": [Case("pi4", stranger_listens, "HTTP/1.0 400")],
    # state directory
    "DOCTOR_STATE_DIR_MISSING": [Case("pi4", lambda m: m.at("/var/lib/bridged").rmdir(), "does not exist yet")],
    "DOCTOR_STATE_DIR_FORBIDDEN": [
        Case("pi4", lambda m: mode(m, "/var/lib/bridged", 0o700, 0, 0), "cannot be written by bridged")
    ],
    "DOCTOR_STATE_DIR_READ_ONLY": [Case("pi4", lambda m: setattr(m, "space", Disk(8 << 30, True)), "read-only")],
    "DOCTOR_STATE_DIR_FULL": [Case("pi4", lambda m: setattr(m, "space", Disk(FREE_BYTES - 1, False)), "7 MiB are free")],
    "DOCTOR_STATE_DIR_SMALL": [
        Case(
            "pi4",
            lambda m: setattr(m, "space", Disk(511 << 20, False)),
            "511 MiB are free",
            lambda m: setattr(m, "space", Disk(512 << 20, False)),
        )
    ],
    # the serial port
    "DOCTOR_PORT_MISSING": [
        Case("pi4", lambda m: m.at("/dev/ttyAMA0").unlink(), "dtoverlay=disable-bt"),
        Case("pi5", lambda m: m.at("/dev/ttyAMA0").unlink(), "dtparam=uart0=on"),
        Case("pc", lambda m: m.at("/dev/ttyUSB0").unlink(), "serial ports here: /dev/ttyS0"),
        Case("pc", both(lambda m: port(m, "/dev/ttyUSB7"), lambda m: m.process(9, "brltty")), "apt remove brltty"),
    ],
    "DOCTOR_PORT_NOT_SERIAL": [
        Case("pc", both(lambda m: m.write("/dev/sda"), lambda m: port(m, "/dev/sda")), "/dev/sda is no serial port"),
        Case(
            "pc", both(lambda m: m.write("/home/pi/ttyUSB0"), lambda m: port(m, "/home/pi/ttyUSB0")), "ports here: /dev/ttyS0"
        ),
        Case(
            "pc",
            both(lambda m: m.tty("tty1", "/sys/devices/virtual/tty/tty1", "none", 4), lambda m: port(m, "/dev/tty1")),
            "tty1",
        ),
    ],
    "DOCTOR_PORT_EMPTY": [Case("pc", lambda m: port(m, "/dev/ttyS1"), "no UART behind it", lambda m: port(m, "/dev/ttyS0"))],
    "DOCTOR_PORT_PTY": [Case("pc", pty_port, "pseudo terminal")],
    "DOCTOR_PORT_SHARED": [
        Case(
            "pi4",
            second_target("/dev/serial0", 'kind = "none"'),
            "/dev/serial0 of motor2 are the same /dev/ttyAMA0",
            lambda m: m.tty("ttyAMA1", "/sys/devices/platform/soc/fe201600.serial", "uart-pl011", 204, kind="32"),
        )
    ],
    "DOCTOR_PORT_FORBIDDEN": [
        # A service has the groups of its unit, member or not.
        Case(
            "pi4",
            lambda m: unit(m, "SupplementaryGroups=dialout gpio", "SupplementaryGroups=gpio"),
            "usermod -aG dialout bridged",
        ),
        Case("pi4", lambda m: mode(m, "/dev/ttyAMA0", 0o600, 0, 0), 'GROUP="dialout"'),
        # Without a unit it is the caller who would run it.
        Case("pc", lambda m: setattr(m, "who", Account("pi", 1000, frozenset({1000}))), "usermod -aG dialout pi"),
    ],
    "DOCTOR_CALLER_FORBIDDEN": [
        Case(
            "pi4",
            lambda m: setattr(m, "who", Account("eve", 1001, frozenset({1001}))),
            "you (eve) may not open /dev/ttyAMA0; bridged may",
            lambda m: setattr(m, "who", Account("pi", 1000, frozenset({20, 986}))),
        )
    ],
    "DOCTOR_PORT_HELD": [
        Case(
            "pc",
            lambda m: m.holders.update(ttyUSB0=Holder(77, "minicom")),
            "process 77 (minicom) has /dev/ttyUSB0 open",
            both(
                lambda m: m.holders.update(ttyUSB0=Holder(70, "python3")),
                lambda m: m.process(70, "python3", "/opt/bridged/bin/python", "/opt/bridged/bin/bridged", "serve"),
            ),
        ),
        Case(
            "pc",
            lambda m: m.holders.update(ttyUSB0=Holder(77, "python3")),
            "process 77 (python3)",
            both(
                lambda m: m.holders.update(ttyUSB0=Holder(70, "python3")),
                lambda m: m.process(70, "python3", "python3", "-IS", "-c", WORKER, WORKER_ROOT, "3"),
                lambda m: m.process(77, "python3", "python3", "/home/pi/not-bridged/term.py"),
            ),
        ),
    ],
    "DOCTOR_GETTY": [
        Case(
            "pi4",
            lambda m: m.state("serial-getty@ttyAMA0.service", "active", "enabled"),
            "mask --now serial-getty@ttyAMA0.service",
        ),
        Case("pi4", lambda m: m.process(9, "agetty", "/sbin/agetty", "ttyAMA0", "vt220"), "login prompt"),
        Case("pi4", lambda m: m.holders.update(ttyAMA0=Holder(9, "agetty")), "login prompt"),
        Case(
            "pi4",
            lambda m: m.process(9, "agetty", "/sbin/agetty", "ttyAMA0", "vt220"),
            "login prompt",
            lambda m: m.process(8, "agetty", "/sbin/agetty", "ttyAMA10", "vt220"),
        ),
    ],
    "DOCTOR_GETTY_ENABLED": [
        Case(
            "pi4",
            lambda m: m.state("serial-getty@ttyAMA0.service", "inactive", "enabled"),
            "comes with the next boot",
            lambda m: m.state("serial-getty@ttyAMA0.service", "inactive", "masked"),
        )
    ],
    "DOCTOR_KERNEL_CONSOLE": [
        Case("pi4", lambda m: m.write("/proc/consoles", "ttyAMA0 -W- (EC p a) 204:64\n"), "is a console of the kernel"),
        Case("pi4", lambda m: m.write("/proc/cmdline", "console=ttyAMA0,115200 console=tty1\n"), "/boot/firmware/cmdline.txt"),
        Case(
            "pc",
            lambda m: m.write("/proc/cmdline", "quiet console=ttyUSB0,9600n8\n"),
            "the boot loader's configuration",
            lambda m: m.write("/proc/cmdline", "quiet console=ttyUSB01 netconsole=ttyUSB0\n"),
        ),
    ],
    "DOCTOR_MODEMMANAGER": [
        Case("pc", modem_manager, 'ATTR{idVendor}=="0403", ATTR{idProduct}=="6001"'),
        Case("pc", lambda m: m.answers.clear(), "/etc/udev/rules.d/61-bridged-local.rules: SUBSYSTEM", ignored),
    ],
    "DOCTOR_BRLTTY": [Case("pc", lambda m: m.process(9, "brltty"), "0403:6001")],
    "DOCTOR_MINI_UART": [Case("pi4", mini_uart, "no parity"), Case("pi3", mini_uart_behind_serial_base, "disable-bt")],
    "DOCTOR_PI_BLUETOOTH": [Case("pi3", bluetooth, "Bluetooth", lambda m: m.link("/dev/serial1", "/dev/ttyS0"))],
    "DOCTOR_PI_DEBUG_PORT": [Case("pi5", lambda m: port(m, "/dev/serial0"), "debug connector")],
    "DOCTOR_FTDI_LATENCY": [
        Case("pc", lambda m: m.write("/sys/class/tty/ttyUSB0/device/latency_timer", "16\n"), "after 16 ms"),
    ],
    "DOCTOR_UNSTABLE_NAME": [
        Case("pc", lambda m: port(m, "/dev/ttyUSB0"), f'port = "{BY_ID}"'),
        Case("pc", both(lambda m: port(m, "/dev/ttyUSB0"), adapter_without_serial), f'port = "{BY_PATH}"'),
    ],
    "DOCTOR_NO_SERIAL_NUMBER": [Case("pc", adapter_without_serial, f'port = "{BY_PATH}"')],
    # lines
    "DOCTOR_LINES_NONE": [
        Case("pc", lambda m: m.edit(MODEM, '"none"'), "needs a person"),
        Case(
            "pc",
            lambda m: m.edit('enter = "boot"', ""),
            "needs a person",
            lambda m: m.edit(f"lines]\nkind = {MODEM}", 'application]\nenter = "boot"'),
        ),
    ],
    "DOCTOR_GPIOD_MISSING": [Case("pi4", no_gpiod, "pip install 'gpiod>=2.2'")],
    "DOCTOR_GPIOD_OLD": [Case("pi4", old_gpiod, "1.6.3")],
    "DOCTOR_GPIO_NONE": [Case("pi4", no_gpiochip, "no gpiochip")],
    "DOCTOR_GPIO_FORBIDDEN": [
        Case("pi4", lambda m: mode(m, "/dev/gpiochip0", 0o600, 0, 0), "bridged may open none of /dev/gpiochip0"),
        Case(
            "pi4",
            both(
                lambda m: m.at("/etc/systemd/system/bridged.service").unlink(),
                lambda m: setattr(m.chip, "closed_to_us", 13),  # type: ignore[attr-defined]
            ),
            "Permission denied",
        ),
    ],
    "DOCTOR_LINE_MISSING": [Case("pi4", lambda m: m.edit("GPIO17", "GPI017"), "did you mean GPIO17")],
    "DOCTOR_LINE_BUSY": [
        Case("pi4", lambda m: consumer(m, "spi0 CS1"), "nrst (pinctrl-bcm2711:17 GPIO17) is in use by spi0 CS1"),
        Case("pi4", lambda m: consumer(m, ""), "unnamed", lambda m: consumer(m, "bridged:motor1")),
    ],
    "DOCTOR_LINE_SHARED": [
        Case("pi4", lambda m: m.edit("GPIO27", "pin:11"), "lines.nrst and lines.boot0 are the same line"),
        Case("pi4", second_target("/dev/ttyAMA1", 'kind = "gpio"\nnrst = "pin:11"'), "nrst of motor2 as well"),
    ],
    "DOCTOR_LINE_ON_UART": [
        Case("pi4", lambda m: m.edit("GPIO27", "GPIO15"), "RXD of the header's UART"),
        Case(
            "pi4",
            lambda m: port(m, "/dev/ttyAMA0"),
            "TXD",
            # With the UART on USB the pins are free.
            both(lambda m: m.usb("ttyUSB0", FT232), lambda m: port(m, "/dev/ttyUSB0"), lambda m: m.edit("GPIO27", "GPIO14")),
        ),
    ],
    "DOCTOR_LINE_BOX_MISSING": [
        Case("bench", lambda m: m.edit('socket = "/run/box.sock"', 'socket = "/run/no.sock"'), "/run/no.sock does not exist"),
        Case("bench", lambda m: m.nodes.pop("/run/box.sock"), "is no socket"),
    ],
    "DOCTOR_LINE_BOX_DEAD": [
        Case(
            "bench",
            lambda m: m.write("/proc/net/unix", "Num ...\n0: 2 0 00000000 0001 03 15 /run/box.sock\n"),
            "nobody listens",
        )
    ],
    "DOCTOR_MODEM_PULSE": [
        Case("pc", lambda m: m.edit('"none"', MODEM), "raises DTR and RTS", lambda m: m.edit(MODEM, '"none"')),
    ],
    "DOCTOR_MODEM_LINES": [
        Case("bench", lambda m: m.edit(BOX, MODEM), "ST-LINK"),
        Case("pi4", lambda m: m.edit(GPIO, MODEM), "no pin of the header"),
        Case("pc", pty_port, "pseudo terminal"),
    ],
    # chip and board
    "DOCTOR_CHIP_UNSET": [Case("pi4", lambda m: m.edit('chip = "F756"\n', ""), "which one to expect")],
    "DOCTOR_CHIP_FOREIGN": [Case("pi4", chip_of("WB09"), "another protocol")],
    "DOCTOR_LAYOUT_UNSURE": [
        Case(
            "pi4",
            lambda m: m.edit('\nlayout = "uniform"', ""),
            "known: uniform",
            lambda m: m.edit('chip = "F756"', 'chip = "0x496"\nlayout = "uniform"'),
        )
    ],
    "DOCTOR_BOOT0_IGNORED": [Case("pi4", chip_of("G071"), "does not obey its BOOT0 pin")],
    "DOCTOR_STARTUP_SHORT": [
        Case(
            "pi4",
            lambda m: m.edit("startup_s = 0.545", "startup_s = 0.5"),
            "needs 0.545 s",
            lambda m: m.edit('chip = "F756"', 'chip = "H7A3"\nstartup_s = 0.545'),
        )
    ],
    "DOCTOR_RATE_JITTER": [
        Case(
            "pi4",
            lambda m: m.edit("baud = 57600", "baud = 115200"),
            "57600 is safe",
            lambda m: m.edit('chip = "F756"', 'chip = "F756"\nbaud = 57600'),
        )
    ],
    "DOCTOR_STLINK_DEAF": [
        Case("bench", chip_of("F756"), "PD8/PD9 on a NUCLEO-F756ZG"),
        Case("bench", chip_of("F446"), "usually PA2/PA3 or PD8/PD9; the loader hears only PA9/PA10"),
    ],
    "DOCTOR_STLINK_PORT": [Case("bench", chip_of("H7A3"), "PD8/PD9 (NUCLEO-144)")],
    "DOCTOR_LOADER_PINS": [
        Case("pi4", chip_of("F756"), "PC10/PC11", chip_of("L552")),  # Its pins are not in the table.
    ],
    "DOCTOR_BOARD": [Case("pi4", chip_of("F756"), "NUCLEO-F756ZG", chip_of("F411"))],
}

# What is right is said too; and what makes it wrong.
RIGHT: dict[str, Callable[[Fake], object]] = {
    "DOCTOR_CONFIG": lambda m: m.edit("port =", "prot ="),
    "DOCTOR_UNIT": lambda m: m.state("bridged.service", "failed", "enabled"),
    "DOCTOR_DAEMON": silent,
    "DOCTOR_STATE_DIR": lambda m: setattr(m, "space", Disk(0, False)),
    "DOCTOR_PORT": lambda m: m.at("/dev/ttyAMA0").unlink(),
    "DOCTOR_LINES": lambda m: m.edit(GPIO, '"none"'),
    "DOCTOR_GPIOD": no_gpiod,
}
ELSEWHERE = {"DOCTOR_MACHINE", "DOCTOR_CONFIG_MISSING", "DOCTOR_CONFIG_UNREADABLE"}


@pytest.mark.parametrize(
    ("code", "case"),
    [pytest.param(code, case, id=f"{code}-{n}") for code, cases in CASES.items() for n, case in enumerate(cases)],
)
def test_a_sick_machine_is_found_and_a_healthy_one_is_not(make: Make, code: str, case: Case) -> None:
    machine = make(case.healthy)
    case.without(machine)
    assert code not in machine.codes()
    case.sicken(machine)
    found = [finding for finding in machine.examine() if finding.code == code]
    assert found, sorted(machine.codes())
    assert any(case.said in f"{finding.text} {finding.remedy}" for finding in found), found
    assert {finding.level for finding in found} == {CATALOG[code].level}
    assert all(finding.remedy for finding in found)


@pytest.mark.parametrize("code", RIGHT)
def test_what_is_right_is_said(make: Make, code: str) -> None:
    machine = make("pi4")
    assert code in machine.codes()
    RIGHT[code](machine)
    assert code not in machine.codes()


def test_each_finding_has_its_test_and_its_row() -> None:
    ours = codes(MACHINE_GROUPS)
    assert set(CASES) | set(RIGHT) | ELSEWHERE == ours
    sources = [ast.parse(path.read_text()) for path in Path(checks.__file__).parent.glob("*.py") if path.name != "__init__.py"]
    words = {node.value for source in sources for node in ast.walk(source) if isinstance(node, ast.Constant)}
    used = {word for word in words if str(word).startswith("DOCTOR_")}
    assert used == ours
    assert all(entry.remedy for entry in CATALOG.values() if entry.level is not Level.OK)
    assert [code for code, cases in CASES.items() if CATALOG[code].level is Level.OK or not cases] == []


# --- the configuration itself -------------------------------------------------------------------------------------------


def test_without_a_configuration_the_machine_is_looked_at(make: Make) -> None:
    machine = make("pi4")
    codes = {finding.code for finding in examine(machine)}
    assert {"DOCTOR_CONFIG_MISSING", "DOCTOR_MACHINE", "DOCTOR_UNIT"} <= codes
    assert not {"DOCTOR_PORT", "DOCTOR_GPIOD"} & codes
    machine.write("/etc/bridged/bridged.toml", machine.configuration)
    found = examine(machine)
    assert {finding.code for finding in found} >= {"DOCTOR_CONFIG", "DOCTOR_PORT"}
    assert "DOCTOR_CONFIG_MISSING" not in {finding.code for finding in found}
    assert next(finding for finding in found if finding.code == "DOCTOR_MACHINE").text.startswith(
        "Raspberry Pi 4 Model B Rev 1.4,"
    )


def test_a_configuration_that_cannot_be_read(make: Make, tmp_path: Path) -> None:
    codes = {finding.code for finding in examine(make("pi4"), tmp_path / "none.toml")}
    assert "DOCTOR_CONFIG_UNREADABLE" in codes
    assert "DOCTOR_CONFIG_MISSING" not in codes


def test_every_mistake_is_a_finding(make: Make) -> None:
    machine = make("pi4")
    machine.edit("port =", "prot =")
    machine.edit("nrst =", "nrts =")
    mistakes = [finding.text for finding in machine.examine() if finding.code == "DOCTOR_CONFIG_MISTAKE"]
    assert any("did you mean nrst" in text for text in mistakes)
    assert any("did you mean port" in text for text in mistakes)


def test_only_the_named_targets(make: Make) -> None:
    machine = make("pi4")
    second_target("/dev/ttyAMA7", 'kind = "none"')(machine)
    assert {finding.target for finding in machine.examine("motor1")} == {"", "motor1"}
    assert {finding.target for finding in machine.examine()} == {"", "motor1", "motor2"}
    with pytest.raises(UnknownTarget, match="configured: motor1, motor2"):
        machine.examine("motor3")
    with pytest.raises(UnknownTarget):
        examine(machine, None, ["motor1"])  # No configuration at all.


def test_targets_that_declare_what_they_share_are_left_alone(make: Make) -> None:
    machine = make("pi4")
    machine.edit('chip = "F756"\n', 'chip = "F756"\nshares = ["motor2"]\n')
    second_target("/dev/serial0", 'kind = "gpio"\nnrst = "pin:11"')(machine)
    machine.edit('port = "/dev/serial0"\n', 'port = "/dev/serial0"\nshares = ["motor1"]\n')
    assert not {"DOCTOR_PORT_SHARED", "DOCTOR_LINE_SHARED"} & machine.codes()


# --- what must not be said --------------------------------------------------------------------------------------------------


def test_a_machine_that_tells_nothing(tmp_path: Path) -> None:
    """A container without /proc, /sys and /etc."""
    machine = Fake(tmp_path)
    machine.write("/dev/null")
    machine.configuration = GPIO_TARGET + '[targets.b]\nport = "/dev/ttyUSB0"\n'
    codes = machine.codes()
    assert {"DOCTOR_PORT_MISSING", "DOCTOR_BOOT_ID", "DOCTOR_UNIT_MISSING"} <= codes
    machine.write("/dev/ttyUSB0")
    machine.write("/sys/class/tty/ttyUSB0/uevent")
    assert "DOCTOR_PORT" in machine.codes()


def test_a_login_prompt_that_holds_the_port_is_said_once(make: Make) -> None:
    machine = make("pi4")
    machine.holders["ttyAMA0"] = Holder(9, "agetty")
    assert "DOCTOR_PORT_HELD" not in machine.codes()
    machine.holders.clear()
    machine.process(9, "stty", "stty", "-F", "ttyAMA0")  # Names the port and is no login prompt.
    assert "DOCTOR_GETTY" not in machine.codes()


def test_a_service_that_its_socket_starts_may_rest(make: Make) -> None:
    machine = make("pi4")
    machine.state("bridged.service", "inactive", "disabled")
    machine.state("bridged.socket", "active", "enabled")
    assert not {"DOCTOR_UNIT_STOPPED", "DOCTOR_UNIT_DISABLED"} & machine.codes()


def test_the_configured_state_directory_is_the_one(make: Make) -> None:
    machine = make("pi4")
    gateway('[gateway]\nstate_dir = "/var/lib/bridged/here"')(machine)
    texts = {finding.code: finding.text for finding in machine.examine()}
    assert texts["DOCTOR_STATE_DIR_MISSING"].startswith("/var/lib/bridged/here ")


def test_a_unit_may_allow_one_device_and_leave_the_file_system_open(make: Make) -> None:
    machine = make("pi4")
    unit(machine, "DeviceAllow=char-tty[A-Z]* rw\n", "DeviceAllow=/dev/ttyAMA0 rw\n")
    unit(machine, "ProtectSystem=strict", "ProtectSystem=full")
    gateway('[gateway]\nstate_dir = "/srv/state"')(machine)
    assert not {"DOCTOR_UNIT_DEVICE", "DOCTOR_UNIT_PATH"} & machine.codes()


@pytest.mark.parametrize("said", [b"220 bridged", b"220 mail.example ESMTP", b"", b"\xff\xfe"])
def test_a_greeting_that_is_not_ours(make: Make, said: bytes) -> None:
    machine = make("pi4")
    machine.greetings["127.0.0.1"] = said
    assert "DOCTOR_LISTEN_TAKEN" in machine.codes()


def test_a_daemon_that_is_too_busy_to_greet_is_ours(make: Make) -> None:
    machine = make("pi4")
    machine.greetings["127.0.0.1"] = b"429 TOO_MANY message=later"
    assert "DOCTOR_LISTEN_TAKEN" not in machine.codes()


def test_the_unix_socket_is_asked_where_there_is_no_address(make: Make) -> None:
    machine = make("pi4")
    gateway('[api]\nlisten = ""')(machine)
    machine.greetings.clear()
    assert not {"DOCTOR_DAEMON", "DOCTOR_DAEMON_SILENT"} & machine.codes()  # Nothing to ask.
    machine.write("/run/bridged/bridged.sock")
    assert "DOCTOR_DAEMON_SILENT" in machine.codes()
    machine.greetings[str(machine.at("/run/bridged/bridged.sock"))] = f"220 bridged {__version__} gw=x".encode()
    assert "DOCTOR_DAEMON" in machine.codes()


# --- the facts it relies on -----------------------------------------------------------------------------------------------


def test_what_ports_are(make: Make) -> None:
    four, personal = make("pi4"), make("pc")
    port = four.port("/dev/serial0")
    assert port is not None
    assert (port.device, port.driver, port.compatible, port.usb) == (
        "/dev/ttyAMA0", "uart-pl011", ("arm,pl011", "arm,primecell"), None,
    )  # fmt: skip
    adapter = personal.port(BY_ID)
    assert adapter is not None
    assert adapter.usb is not None
    assert (adapter.device, adapter.driver, adapter.major) == ("/dev/ttyUSB0", "ftdi_sio", 188)
    assert (adapter.usb.vendor, adapter.usb.product, adapter.usb.serial) == ("0403", "6001", "A50285BI")
    assert adapter.usb.title == "FTDI FT232R USB UART"
    assert personal.ports() == ["/dev/ttyS0", "/dev/ttyUSB0"]
    assert personal.links_to(adapter, "/dev/serial/by-id") == [BY_ID]


def test_chips_and_lines_are_named(make: Make) -> None:
    texts = {finding.code: finding.text for finding in make("pi4").examine()}
    assert texts["DOCTOR_GPIOD"] == "gpiod 2.2.0; chips: pinctrl-bcm2711 (54 lines)"
    assert texts["DOCTOR_LINES"] == "nrst = pinctrl-bcm2711:17 GPIO17, boot0 = pinctrl-bcm2711:27 GPIO27"


def test_a_unit_as_systemd_reads_it(make: Make) -> None:
    machine = make("pi4")
    machine.write(
        "/etc/systemd/system/bridged.service.d/override.conf",
        "# words\n[Service]\nUser=pi\nSupplementaryGroups=\nSupplementaryGroups=dialout \\\n  video\nPrivateTmp=no\n",
    )
    machine.write("/usr/lib/systemd/system/bridged.service.d/override.conf", "[Service]\nUser=nobody\n")
    unit = machine.unit("bridged.service")
    assert unit is not None
    assert unit.last("User") == "pi"
    assert unit.words("SupplementaryGroups") == ["dialout", "video"]
    assert not unit.says_yes("PrivateTmp")
    assert "char-tty[A-Z]*" in unit.words("DeviceAllow")
    assert machine.unit("other.service") is None


def test_boards_agree_with_chips_and_the_wiring_page() -> None:
    page = (ROOT / "docs" / "wiring.md").read_text()
    for board in boards.BOARDS:
        chip = chips.by_pid(board.pid)
        assert board.name in page
        pins = {pair for _, pair in chip.usart_pins}
        heard = "virtual port" in board.traps and "not heard" not in board.traps.replace("is not\n", "is not ")
        assert board.virtual_port == "" or heard == (board.virtual_port in pins)


def test_numbers_agree_with_the_rooms_that_use_them() -> None:
    assert checks.FREE_BYTES == FREE_BYTES


# --- what is printed ------------------------------------------------------------------------------------------------------


def test_problems_come_first_and_carry_what_to_do(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    machine = make("pi4")
    mini_uart(machine)
    machine.state("bridged.service", "active", "disabled")
    (machine.root / "my.toml").write_text(machine.configuration)
    assert doctor.main(["--config", str(machine.root / "my.toml")], machine) == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("problem  motor1   /dev/ttyS0 is the mini UART")
    assert lines[0].endswith("[DOCTOR_MINI_UART]")
    assert lines[1].lstrip().startswith("-> /boot/firmware/config.txt")
    assert lines[2].startswith("warning  machine")
    levels = [line.split()[0] for line in lines if line[:1].strip() and "DOCTOR_" in line]
    assert levels == sorted(levels, key=["problem", "warning", "note"].index)
    assert "DOCTOR_PORT]" not in out
    assert lines[-1].startswith("1 problem, 1 warning, ")
    assert doctor.main(["--all", "--config", str(machine.root / "my.toml")], machine) == 1
    assert "[DOCTOR_PORT]" in capsys.readouterr().out


def test_the_list_for_programs(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    machine = make("pc")
    (machine.root / "my.toml").write_text(machine.configuration)
    assert doctor.main(["--json", "--config", str(machine.root / "my.toml"), "motor1"], machine) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(set(row) == {"level", "code", "target", "text", "remedy", "facts"} for row in rows)
    port = next(row for row in rows if row["code"] == "DOCTOR_PORT")
    assert (port["level"], port["target"]) == ("ok", "motor1")
    assert port["facts"] == {"port": BY_ID, "device": "/dev/ttyUSB0", "driver": "ftdi_sio"}
    assert {row["target"] for row in rows} == {None, "motor1"}


def test_a_narrow_terminal_cuts_no_command(make: Make) -> None:
    machine = make("pc")
    port(machine, "/dev/ttyUSB0")
    text = doctor.report(machine.examine(), width=72)
    assert f'port = "{BY_ID}"'.split()[-1] in text
    assert all(len(line) <= 72 or BY_ID in line for line in text.splitlines())


def test_wrong_arguments(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    machine = make("pi4")
    (machine.root / "my.toml").write_text(machine.configuration)
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--config", str(machine.root / "my.toml"), "nobody"], machine)
    assert ended.value.code == 2
    assert "no target is called 'nobody'; configured: motor1" in capsys.readouterr().err


# --- this machine -----------------------------------------------------------------------------------------------------------


def test_on_this_machine_as_a_command(tmp_path: Path) -> None:
    file = tmp_path / "my.toml"
    master, slave = pty.openpty()
    ports = {"a": os.ttyname(slave), "b": "/dev/null", "c": "/dev/ttyS0", "d": "/dev/nothing"}
    file.write_text("".join(f'[targets.{name}]\nport = "{path}"\n' for name, path in ports.items()))
    done = subprocess.run(
        [sys.executable, "-m", "bridged", "doctor", "--json", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(master)
    os.close(slave)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    found = {(row["target"], row["code"]) for row in json.loads(done.stdout)}
    assert {("a", "DOCTOR_PORT_PTY"), ("b", "DOCTOR_PORT_NOT_SERIAL"), ("d", "DOCTOR_PORT_MISSING")} <= found
    assert {code for _, code in found} <= set(CATALOG)


def test_it_starts_light() -> None:
    code = "import bridged.doctor, sys; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=True).stdout.split()
    assert not {"asyncio", "aiohttp", "gpiod", "bridged.app", "bridged.jobs", "sqlite3"} & set(loaded)


def test_no_port_is_opened(tmp_path: Path) -> None:
    """Every way to open a file goes through the interpreter's audit hook ``open``: none may name a device."""
    opened: list[str] = []
    watching = [True]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching[0] and event == "open":
            opened.append(str(arguments[0]))

    file = tmp_path / "my.toml"
    master, slave = pty.openpty()
    file.write_text(f'[targets.a]\nport = "{os.ttyname(slave)}"\n[targets.b]\nport = "/dev/ttyS0"\n')
    sys.addaudithook(hook)
    try:
        examine(Machine(), file)
    finally:
        watching[0] = False
        os.close(master)
        os.close(slave)
    assert str(file) in opened  # The hook works.
    assert [name for name in opened if name.startswith("/dev/") and name != "/dev/null"] == []


def test_who_holds_a_port_here() -> None:
    master, slave = pty.openpty()
    name = os.ttyname(slave)
    os.close(slave)
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys; os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY); print('x', flush=True); input()",
            name,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"x\n"
        holder = Machine().holder(Port(name.removeprefix("/dev/")))
        assert holder is not None
        assert holder.pid == child.pid
    finally:
        child.communicate(b"\n", timeout=20)
        os.close(master)
    assert Machine().holder(Port("nothing")) is None


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        yield sock


def test_listeners_here(listener: socket.socket) -> None:
    path = listener.getsockname()
    machine = Machine()
    assert not machine.listening(path)
    assert machine.greeting(path) is None
    listener.listen()
    assert machine.listening(path)
    node = machine.node(path)
    assert node is not None
    assert node.is_socket


def test_a_greeting_here() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet() -> None:
            client, _ = server.accept()
            with client:
                client.sendall(b"220 bridged 9 gw=x\nmore")

        thread = threading.Thread(target=greet)
        thread.start()
        assert Machine().greeting(server.getsockname()[:2]) == b"220 bridged 9 gw=x"
        thread.join(20)
        assert not thread.is_alive()


def test_who_and_how_much_here(tmp_path: Path) -> None:
    machine = Machine()
    assert machine.caller.uid == os.geteuid()
    assert machine.may(machine.caller, str(tmp_path), os.R_OK | os.W_OK | os.X_OK)
    disk = machine.disk(str(tmp_path / "not" / "yet"))
    assert disk is not None
    assert disk.free_bytes > 0
    assert not disk.read_only
    assert machine.run("true") == ""
    assert machine.run("false") is None
    assert machine.run("no-such-program-here") is None
    assert machine.now() > machine.installed_at() - 86400


@pytest.mark.parametrize(
    ("who", "bits", "allowed"),
    [
        (Account("a", 1000, frozenset({20})), 0o660, True),
        (Account("a", 1000, frozenset({21})), 0o660, False),
        (Account("a", 1000, frozenset({21})), 0o666, True),
        (Account("a", 5, frozenset()), 0o660, True),
        (Account("a", 5, frozenset({20})), 0o066, False),  # The owner's bits rule for the owner.
        (Account("root", 0, frozenset()), 0o000, True),
        (Account("a", 1000, frozenset({20})), 0o640, False),
    ],
)
def test_permissions_by_mode(who: Account, bits: int, allowed: bool) -> None:
    assert Node(stat.S_IFCHR | bits, 5, 20).allows(who, os.R_OK | os.W_OK) is allowed
