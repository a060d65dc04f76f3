"""The machine half of ``doctor``: what can be known about a gateway without its daemon, without a target, and without
touching a port or a line.

Each check is a generator of findings over an ``Examination``: the machine, the configuration, and who runs the daemon. A check
says what is right as well (level ok), so that a report shows what was looked at. What a finding means and what to do is in
``findings``; what may be looked at is in ``machine``. What the target itself answers is not asked here: that takes a job.

Permissions are those of whoever runs the daemon: the user of the unit where one is installed, with the groups of the unit,
and the caller otherwise. Where both differ the caller's lack is a note only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from bridged import __version__, chips, config
from bridged.chips.model import Quirk
from bridged.doctor.boards import MINI_UART, USUAL_VIRTUAL_PORTS, board_of, is_stlink
from bridged.doctor.machine import Account, Machine, Port, Unit
from bridged.errors import BadRequest, BridgedError, ConfigError, LineUnavailable, UnknownTarget
from bridged.findings import MACHINE, Finding, Level, found
from bridged.protocol.line import parse_reply
from bridged.target import gpio

Findings = Iterator[Finding]

SERVICE = "bridged.service"
SOCKET = "bridged.socket"
RUNTIME_SOCKET = "/run/bridged/bridged.sock"
FREE_BYTES = 8 << 20  # Below this jobs/service.py starts no job.
CLOCK_SLACK_S = 86400.0  # Files may come with the time of another zone.
HEADER_UART = {"ttyAMA0", "ttyS0"}  # On GPIO14 and GPIO15 of a Raspberry Pi.
HEADER_UART_LINES = (14, 15)
BRLTTY_TAKES = {"0403:6001", "10c4:ea60", "1a86:7523"}  # FT232, CP210x, CH340: in its udev rules for years.
GETTYS = ("agetty", "getty", "mgetty")
MM_IGNORE = ("ID_MM_DEVICE_IGNORE", "ID_MM_PORT_IGNORE")


@dataclass(frozen=True)
class Examination:
    """What every check needs."""

    machine: Machine
    config: config.Config

    @cached_property
    def unit(self) -> Unit | None:
        return self.machine.unit(SERVICE)

    @cached_property
    def service(self) -> Account | None:
        """The user of the unit, if there are both."""
        if self.unit is None:
            return None
        groups = [*self.unit.words("SupplementaryGroups"), self.unit.last("Group")]
        return self.machine.account(self.unit.last("User") or "root", groups)

    @cached_property
    def runner(self) -> Account:
        """Who runs the daemon, as far as can be known."""
        return self.service or self.machine.caller

    @cached_property
    def states(self) -> dict[str, str]:
        """What systemd says of the unit; empty where it does not run here."""
        return self.show(SERVICE)

    def show(self, unit: str) -> dict[str, str]:
        wanted = "--property=LoadState,ActiveState,SubState,UnitFileState,Result"
        return self.machine.properties("systemctl", "show", wanted, unit)

    @property
    def state_dir(self) -> str:
        return self.config.gateway.state_dir or str(config.DEFAULT_STATE)

    @cached_property
    def ports(self) -> dict[str, Port | None]:
        return {name: self.machine.port(target.port) for name, target in self.config.targets.items()}

    @cached_property
    def seen_lines(self) -> dict[str, dict[str, gpio.Seen | BridgedError] | LineUnavailable]:
        """The GPIO lines of each target that has any, by pin; or why none could be looked at."""
        seen: dict[str, dict[str, gpio.Seen | BridgedError] | LineUnavailable] = {}
        for name, target in self.config.targets.items():
            if target.lines.kind == "gpio":
                try:
                    looked = gpio.look(target.lines, dev=str(self.machine.at("/dev")))
                    seen[name] = {line.pin: what for line, what in looked.items()}
                except LineUnavailable as error:
                    seen[name] = error
        return seen


# --- the whole ----------------------------------------------------------------------------------------------------------


def examine(machine: Machine, file: Path | None = None, names: Sequence[str] = ()) -> list[Finding]:
    """All findings, the worst first. ``file``: the configuration, None for the usual one; ``names``: only these targets.

    Raises ``UnknownTarget`` for a name that is not configured.
    """
    loaded, findings = _configuration(machine, file)
    examination = Examination(machine, loaded or config.Config())
    if loaded is not None or all(finding.code == "DOCTOR_CONFIG_MISSING" for finding in findings):
        for name in names:
            if name not in examination.config.targets:
                known = ", ".join(examination.config.targets) or "none"
                raise UnknownTarget(f"no target is called {name!r}; configured: {known}", target=name)
    for check in MACHINE_CHECKS:
        findings += check(examination)
    for name in names or examination.config.targets:
        for target_check in TARGET_CHECKS if loaded else ():
            findings += target_check(examination, name)
    order = list(Level)
    return sorted(findings, key=lambda finding: order.index(finding.level))


def _configuration(machine: Machine, file: Path | None) -> tuple[config.Config | None, list[Finding]]:
    path = file or machine.at(str(config.DEFAULT_FILE))
    if file is None and not os.path.lexists(path):
        return None, [found("DOCTOR_CONFIG_MISSING", MACHINE, f"there is no configuration {config.DEFAULT_FILE}")]
    try:
        loaded = config.load(path, check_chip=chips.wrong_choice)
    except config.InvalidConfig as error:
        return None, [found("DOCTOR_CONFIG_MISTAKE", MACHINE, str(mistake), line=mistake.line) for mistake in error.errors]
    except ConfigError as error:
        return None, [found("DOCTOR_CONFIG_UNREADABLE", MACHINE, error.message, file=str(path))]
    count = len(loaded.targets)
    findings = [found("DOCTOR_CONFIG", MACHINE, f"{path}: {count} target{'' if count == 1 else 's'}")]
    # Names of ports are looked at below, where the better name can be told.
    doubts = [text for text in config.warnings(loaded) if not re.match(r"targets\.[^.]+\.port:", text)]
    return loaded, findings + [found("DOCTOR_CONFIG_DOUBTFUL", MACHINE, text) for text in doubts]


# --- the machine --------------------------------------------------------------------------------------------------------


def _machine(e: Examination) -> Findings:
    machine = e.machine
    yield found("DOCTOR_MACHINE", MACHINE, f"{machine.model or 'no device tree'}, {machine.system}", model=machine.model)
    if machine.caller.uid != 0:
        yield found(
            "DOCTOR_NOT_ROOT", MACHINE, f"user {machine.caller.name} may not see which programs of others have a port open"
        )
    for name in machine.names("/sys/class/hwmon"):
        monitor = f"/sys/class/hwmon/{name}"
        if machine.read(f"{monitor}/name") == "rpi_volt" and machine.read(f"{monitor}/in0_lcrit_alarm") == "1":
            yield found("DOCTOR_UNDERVOLTAGE", MACHINE, "the supply of this Raspberry Pi is too low")
    boot_id = machine.read("/proc/sys/kernel/random/boot_id") or ""
    if not re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", boot_id):
        yield found("DOCTOR_BOOT_ID", MACHINE, "the kernel tells no boot id in /proc/sys/kernel/random/boot_id")


def _clock(e: Examination) -> Findings:
    machine = e.machine
    if machine.now() < machine.installed_at() - CLOCK_SLACK_S:
        yield found("DOCTOR_CLOCK_WRONG", MACHINE, "the clock is earlier than the files of this program")
    elif machine.properties("timedatectl", "show", "--property=NTPSynchronized").get("NTPSynchronized") == "no":
        yield found("DOCTOR_CLOCK_UNSYNCED", MACHINE, "the clock is not synchronised")


def _state_dir(e: Examination) -> Findings:
    machine, path = e.machine, e.state_dir
    disk = machine.disk(path)
    limit_mib = e.config.store.limit_mib
    if not machine.exists(path):
        yield found("DOCTOR_STATE_DIR_MISSING", MACHINE, f"{path} does not exist yet")
    elif not machine.may(e.runner, path, os.R_OK | os.W_OK | os.X_OK):
        yield found("DOCTOR_STATE_DIR_FORBIDDEN", MACHINE, f"{path} cannot be written by {e.runner.name}", user=e.runner.name)
    if disk is None:
        return
    free_mib = disk.free_bytes >> 20
    if disk.read_only:
        yield found("DOCTOR_STATE_DIR_READ_ONLY", MACHINE, f"the file system of {path} is read-only")
    elif disk.free_bytes < FREE_BYTES:
        yield found(
            "DOCTOR_STATE_DIR_FULL", MACHINE, f"{free_mib} MiB are free for {path}; below {FREE_BYTES >> 20} no job starts"
        )
    elif free_mib < limit_mib:
        text = f"{free_mib} MiB are free for {path}; staged images may take {limit_mib} (store.limit_mib)"
        yield found("DOCTOR_STATE_DIR_SMALL", MACHINE, text, free_mib=free_mib)
    else:
        yield found("DOCTOR_STATE_DIR", MACHINE, f"{path}: {free_mib} MiB free", free_mib=free_mib)


# --- the service --------------------------------------------------------------------------------------------------------


def _unit(e: Examination) -> Findings:
    machine, unit = e.machine, e.unit
    if unit is None:
        yield found("DOCTOR_UNIT_MISSING", MACHINE, f"{SERVICE} is not installed")
        return
    user = unit.last("User") or "root"
    if e.service is None:
        yield found("DOCTOR_UNIT_USER_MISSING", MACHINE, f"{unit.path} runs as user {user}, who does not exist", user=user)
    for group in dict.fromkeys([*unit.words("Group"), *unit.words("SupplementaryGroups")]):
        if not machine.has_group(group):
            text = f"{unit.path} wants group {group}, which does not exist"
            yield found("DOCTOR_UNIT_GROUP_MISSING", MACHINE, text, group=group)
    yield from _unit_paths(e, unit)
    state = e.states
    if not state:
        return  # No systemd here, as in a container.
    enabled, active = state.get("UnitFileState", ""), state.get("ActiveState", "")
    on_demand = e.show(SOCKET).get("ActiveState") == "active"
    if enabled not in ("enabled", "enabled-runtime", "static", "alias") and not on_demand:
        yield found("DOCTOR_UNIT_DISABLED", MACHINE, f"{SERVICE} is {enabled or 'not enabled'}: it will not start at boot")
    if active == "failed":
        yield found("DOCTOR_UNIT_FAILED", MACHINE, f"{SERVICE} failed ({state.get('Result', '')})")
    elif active not in ("active", "activating", "reloading") and not on_demand:
        yield found("DOCTOR_UNIT_STOPPED", MACHINE, f"{SERVICE} is {active or 'not running'}")
    else:
        yield found("DOCTOR_UNIT", MACHINE, f"{SERVICE}: {enabled}, {active}, as user {user}")


def _unit_paths(e: Examination, unit: Unit) -> Findings:
    """Paths that the daemon must write, or see, although the unit is in a sandbox."""
    state = [f"/var/lib/{name}" for name in unit.words("StateDirectory")]
    runtime = [f"/run/{name}" for name in unit.words("RuntimeDirectory")]
    writable = [*state, *runtime, *(path.lstrip("-+") for path in unit.words("ReadWritePaths"))]
    hidden = ["/tmp", "/var/tmp"] if unit.says_yes("PrivateTmp") else []
    hidden += ["/home", "/root", "/run/user"] if unit.says_yes("ProtectHome") else []
    written = {"gateway.state_dir": e.config.gateway.state_dir, "api.socket": e.config.api.socket}
    seen = {f"targets.{name}.lines.socket": target.lines.socket for name, target in e.config.targets.items()}
    for key, path in {**written, **seen}.items():
        if path and _below(path, hidden):
            text = f"{key}: the service does not see {path} (PrivateTmp=, ProtectHome=)"
            yield found("DOCTOR_UNIT_PATH", MACHINE, text, "Use a path under /run or /var/lib/bridged.", key=key)
        elif path and key in written and unit.last("ProtectSystem") == "strict" and not _below(path, writable):
            text = f"{key}: the service may not write {path} (ProtectSystem=)"
            yield found("DOCTOR_UNIT_PATH", MACHINE, text, key=key)


def _below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def _daemon(e: Examination) -> Findings:
    """Whether it answers; a greeting is all that is asked for."""
    api, machine = e.config.api, e.machine
    addresses: list[tuple[str, str | tuple[str, int]]] = []
    for listen in config.listeners(api.listen):
        # Beyond loopback it speaks TLS, with a certificate that is not ours to judge; the socket answers for it.
        if listen.port and listen.loopback and listen.scheme != "tls":
            addresses.append((str(listen), (listen.host, listen.port)))
    sock = api.socket or RUNTIME_SOCKET
    if machine.exists(sock):
        addresses.append((sock, str(machine.at(sock))))
    expected = e.states.get("ActiveState") == "active"
    answered = False
    for name, address in addresses:
        said = machine.greeting(address)
        if said is None:
            continue
        answered = True
        version = _version(said)
        if not version:
            yield found("DOCTOR_LISTEN_TAKEN", MACHINE, f"{name}: another program listens there, and says {said[:60]!r}")
        elif version != __version__:
            text = f"the daemon at {name} is version {version}, this command line {__version__}"
            yield found("DOCTOR_DAEMON_VERSION", MACHINE, text, version=version)
        else:
            yield found("DOCTOR_DAEMON", MACHINE, f"version {version} answers at {name}", version=version)
        return
    if not answered and addresses:
        where = " or ".join(name for name, _ in addresses)
        if expected:
            yield found("DOCTOR_DAEMON_SILENT", MACHINE, f"{SERVICE} runs, but nobody answers at {where}")
        else:
            yield found("DOCTOR_DAEMON_STOPPED", MACHINE, f"nobody answers at {where}")


def _version(greeting: bytes) -> str:
    """Empty where it is not bridged that speaks, or not as it does (too many connections, shutting down: still ours)."""
    try:
        reply = parse_reply(greeting + b"\n")
    except BadRequest:
        return ""
    words = reply.text.split()
    if reply.code == 220 and words[:1] == ["bridged"] and len(words) > 1:
        return words[1]
    return __version__ if reply.code in (421, 429) else ""


# --- the serial port ----------------------------------------------------------------------------------------------------


def _port(e: Examination, name: str) -> Findings:
    machine, path = e.machine, e.config.targets[name].port
    port = e.ports[name]
    if not machine.exists(path):
        there = ", ".join(machine.ports()) or "none"
        text = f"{path} does not exist; serial ports here: {there}"
        yield found("DOCTOR_PORT_MISSING", name, text, _missing_remedy(machine, path), port=path)
        return
    if machine.resolve(path).startswith("/dev/pts/"):
        yield found("DOCTOR_PORT_PTY", name, f"{path} is a pseudo terminal", port=path)
        return
    if port is None:
        there = ", ".join(machine.ports()) or "none"
        yield found("DOCTOR_PORT_NOT_SERIAL", name, f"{path} is no serial port; serial ports here: {there}", port=path)
        return
    if not port.has_uart:
        yield found("DOCTOR_PORT_EMPTY", name, f"{path} exists, but the kernel found no UART behind it", port=path)
        return
    what = f"{path} is {port.device}" if path != port.device else path
    usb = f", {port.usb.title or 'USB'} ({port.usb.vendor}:{port.usb.product})" if port.usb else ""
    facts = {"port": path, "device": port.device, "driver": port.driver}
    yield found("DOCTOR_PORT", name, f"{what}: driver {port.driver or 'not told'}{usb}", **facts)
    yield from _sharing(e, name, port)
    yield from _access(e, name, port)
    yield from _pi(machine, name, port)
    yield from _usb(e, name, port)


def _missing_remedy(machine: Machine, path: str) -> str:
    """What makes this very device appear; empty: the table's remedy will do."""
    device = os.path.basename(path)
    if machine.is_pi and device in ("ttyAMA0", "serial0"):
        if "Raspberry Pi 5" in machine.model:
            return "/boot/firmware/config.txt: dtparam=uart0=on; reboot"
        return "/boot/firmware/config.txt: enable_uart=1 and dtoverlay=disable-bt; reboot"
    if re.fullmatch(r"ttyUSB\d+", device) and any(process.name == "brltty" for process in machine.processes):
        return "Plug it in. If it is: brltty runs here and takes such adapters; `sudo apt remove brltty`"
    return ""


def _sharing(e: Examination, name: str, port: Port) -> Findings:
    target = e.config.targets[name]
    for other, its_port in e.ports.items():
        if other != name and its_port is not None and its_port.name == port.name and other not in target.shares:
            text = f"{target.port} and {e.config.targets[other].port} of {other} are the same {port.device}"
            yield found("DOCTOR_PORT_SHARED", name, text, other=other)


def _access(e: Examination, name: str, port: Port) -> Findings:
    machine, runner = e.machine, e.runner
    if not machine.may(runner, port.device):
        node = machine.node(port.device)
        group = machine.group_name(node.gid) if node else "dialout"
        text = f"user {runner.name} may not open {port.device} (group {group})"
        # The remedy with real names; a group that a unit lends needs no membership, but does no harm either.
        remedy = f"`sudo usermod -aG {group} {runner.name}`, and log in anew or restart the unit"
        if group == "root":
            remedy = (
                'A udev rule with GROUP="dialout", MODE="0660"; a login prompt or console on the port takes it to root, too'
            )
        yield found("DOCTOR_PORT_FORBIDDEN", name, text, remedy, user=runner.name, group=group)
    elif runner != machine.caller and not machine.may(machine.caller, port.device):
        yield found(
            "DOCTOR_CALLER_FORBIDDEN", name, f"you ({machine.caller.name}) may not open {port.device}; {runner.name} may"
        )
    kinds = machine.device_kinds(port.major)
    if e.unit is not None and kinds and not _unit_allows(e.unit, port.device, kinds):
        kind = sorted(kinds)[-1]
        remedy = f"`sudo systemctl edit bridged`: [Service], DeviceAllow={kind} rw"
        yield found(
            "DOCTOR_UNIT_DEVICE", name, f"{e.unit.path} does not allow {kind}, which {port.device} is", remedy, kind=kind
        )


def _unit_allows(unit: Unit, device: str, kinds: set[str]) -> bool:
    if not unit.words("DeviceAllow") and unit.last("DevicePolicy") in ("", "auto"):
        return True
    allowed = {line.split()[0] for line in unit.settings.get("DeviceAllow", [])}
    return device in allowed or any(fnmatchcase(kind, pattern) for kind in kinds for pattern in allowed)


def _pi(machine: Machine, name: str, port: Port) -> Findings:
    if port.driver == MINI_UART or any(text.endswith(MINI_UART) for text in port.compatible):
        yield found("DOCTOR_MINI_UART", name, f"{port.device} is the mini UART, which has no parity; the loader needs 8E1")
    if not machine.is_pi:
        return
    # The firmware names the header's port serial0 and that of the Bluetooth chip serial1.
    bluetooth, header = (machine.resolve(f"/dev/{link}") == port.device for link in ("serial1", "serial0"))
    if bluetooth and not header and port.name == "ttyAMA0":
        yield found("DOCTOR_PI_BLUETOOTH", name, f"{port.device} leads to the Bluetooth chip, not to the header")
    if port.name == "ttyAMA10" and "Raspberry Pi 5" in machine.model:
        yield found("DOCTOR_PI_DEBUG_PORT", name, f"{port.device} is on the debug connector of a Raspberry Pi 5")


def _usb(e: Examination, name: str, port: Port) -> Findings:
    machine, usb, path = e.machine, port.usb, e.config.targets[name].port
    if usb is None:
        return
    by_id, by_path = (machine.links_to(port, f"/dev/serial/{kind}") for kind in ("by-id", "by-path"))
    if re.fullmatch(r"/dev/tty(USB|ACM)\d+", path):
        better = (by_id or by_path or [""])[0] if usb.serial else (by_path or by_id or [""])[0]
        remedy = f'port = "{better}"' if better else ""
        yield found("DOCTOR_UNSTABLE_NAME", name, f"{path} is numbered in the order of plugging in", remedy, better=better)
    elif not usb.serial and path.startswith("/dev/serial/by-id/"):
        remedy = f'With several of them: port = "{by_path[0]}"' if by_path else ""
        yield found("DOCTOR_NO_SERIAL_NUMBER", name, f"{usb.title or path} has no serial number", remedy)
    timer = machine.read(f"/sys/class/tty/{port.name}/device/latency_timer") or ""
    if timer.isdigit() and int(timer) > 1:
        text = f"{port.device} passes on a short answer only after {timer} ms (latency_timer)"
        remedy = f"Install systemd/60-bridged.rules, or: echo 1 | sudo tee /sys/class/tty/{port.name}/device/latency_timer"
        yield found("DOCTOR_FTDI_LATENCY", name, text, remedy, latency_ms=int(timer))
    running = {process.name for process in machine.processes}
    if "ModemManager" in running and not _modem_manager_ignores(machine, port):
        rule = (
            f'SUBSYSTEM=="usb", ATTR{{idVendor}}=="{usb.vendor}", ATTR{{idProduct}}=="{usb.product}",'
            ' ENV{ID_MM_DEVICE_IGNORE}="1"'
        )
        text = f"ModemManager runs and may send AT commands to {port.device}"
        yield found("DOCTOR_MODEMMANAGER", name, text, f"/etc/udev/rules.d/60-bridged.rules: {rule}; or remove ModemManager")
    if "brltty" in running and f"{usb.vendor}:{usb.product}" in BRLTTY_TAKES:
        yield found("DOCTOR_BRLTTY", name, f"brltty runs and takes adapters such as {port.device} ({usb.vendor}:{usb.product})")


def _modem_manager_ignores(machine: Machine, port: Port) -> bool:
    """By a property of the port or of the USB device: ModemManager looks at both."""
    paths = [f"/sys/class/tty/{port.name}", *([port.usb.path] if port.usb else [])]
    for path in paths:
        properties = machine.properties("udevadm", "info", "--query=property", f"--path={path}")
        if any(properties.get(key) == "1" for key in MM_IGNORE):
            return True
    return False


def _others_on_port(e: Examination, name: str) -> Findings:
    """Who else talks or listens on this wire: login prompts, the kernel, any program."""
    machine, port = e.machine, e.ports[name]
    if port is None or machine.resolve(e.config.targets[name].port).startswith("/dev/pts/"):
        return
    unit = f"serial-getty@{port.name}.service"
    state = e.show(unit)
    holder = machine.holder(port)
    prompt = any(process.name in GETTYS and port.name in process.arguments for process in machine.processes)
    prompt = prompt or (holder is not None and holder.command in GETTYS)
    if prompt or state.get("ActiveState") in ("active", "activating"):
        remedy = f"`sudo systemctl mask --now {unit}`"
        yield found("DOCTOR_GETTY", name, f"a login prompt ({unit}) runs on {port.device}", remedy)
    elif state.get("UnitFileState") in ("enabled", "enabled-runtime"):
        text = f"{unit} is enabled: a login prompt comes with the next boot"
        yield found("DOCTOR_GETTY_ENABLED", name, text, f"`sudo systemctl mask {unit}`")
    consoles = {line.split()[0] for line in (machine.read("/proc/consoles") or "").splitlines() if line.split()}
    asked = set(re.findall(r"\b(?:console|kgdboc)=([A-Za-z]\w*)", machine.read("/proc/cmdline") or ""))
    if port.name in consoles | asked:
        how = "is a console of the kernel" if port.name in consoles else "is asked for as console on the kernel's command line"
        remedy = f"Remove console={port.name} (on a Raspberry Pi also console=serial0) from the kernel's command line"
        remedy += (
            " (/boot/firmware/cmdline.txt) and reboot" if machine.is_pi else " (the boot loader's configuration) and reboot"
        )
        yield found("DOCTOR_KERNEL_CONSOLE", name, f"{port.device} {how}", remedy)
    if holder is not None and holder.command not in GETTYS and not _is_bridged(machine, holder.pid):
        text = f"process {holder.pid} ({holder.command or 'unknown'}) has {port.device} open"
        yield found("DOCTOR_PORT_HELD", name, text, pid=holder.pid, command=holder.command)


def _is_bridged(machine: Machine, pid: int) -> bool:
    """Whether a process is the daemon or one of its sessions."""
    arguments = next((process.arguments for process in machine.processes if process.pid == pid), ())
    return any(re.search(r"(^|/|from )bridged($|\.)", argument) for argument in arguments[:4])


# --- NRST, BOOT0, power -------------------------------------------------------------------------------------------------


def _library(e: Examination) -> Findings:
    """Once for all targets: without any GPIO line nobody needs it."""
    if not e.seen_lines:
        return
    try:
        version = gpio.library_version()
    except LineUnavailable as error:
        code = "DOCTOR_GPIOD_OLD" if "version" in error.facts else "DOCTOR_GPIOD_MISSING"
        yield found(code, MACHINE, error.message)
        return
    titles = []
    with suppress(LineUnavailable):  # None, or none that we may open: told below, or for the target.
        titles = gpio.chip_titles(str(e.machine.at("/dev")))
    yield found("DOCTOR_GPIOD", MACHINE, f"gpiod {version}; chips: {', '.join(titles) or 'none to be seen'}", version=version)
    chips_here = [name for name in e.machine.names("/dev") if re.fullmatch(r"gpiochip\d+", name)]
    if not chips_here:
        yield found("DOCTOR_GPIO_NONE", MACHINE, "/dev has no gpiochip")
        return
    if e.runner != e.machine.caller and not any(e.machine.may(e.runner, f"/dev/{name}") for name in chips_here):
        text = f"user {e.runner.name} may open none of {', '.join(f'/dev/{name}' for name in chips_here)}"
        yield found("DOCTOR_GPIO_FORBIDDEN", MACHINE, text, user=e.runner.name)


def _lines(e: Examination, name: str) -> Findings:
    lines = e.config.targets[name].lines
    match lines.kind:
        case "gpio":
            yield from _gpio_lines(e, name)
        case "modem":
            yield from _modem_lines(e, name)
        case "socket":
            yield from _line_box(e.machine, name, lines.socket)
        case _:
            if not e.config.targets[name].application.enter:
                yield found(
                    "DOCTOR_LINES_NONE", name, "neither NRST nor BOOT0 is wired: every job needs a person at the target"
                )


def _gpio_lines(e: Examination, name: str) -> Findings:
    looked = e.seen_lines[name]
    if isinstance(looked, LineUnavailable):
        if not looked.facts.get("errno"):
            return  # No library, no chip: that is said once, for the machine.
        code = "DOCTOR_GPIO_FORBIDDEN" if e.runner == e.machine.caller else "DOCTOR_CALLER_FORBIDDEN"
        yield found(code, name, f"you ({e.machine.caller.name}) may not look at its lines: {looked.message}")
        return
    good = []
    taken: dict[tuple[str, int], str] = {}
    for pin, seen in looked.items():
        if isinstance(seen, BridgedError):
            yield found("DOCTOR_LINE_MISSING", name, seen.message, pin=pin)
            continue
        place = (seen.chip, seen.offset)
        if place in taken:
            yield found(
                "DOCTOR_LINE_SHARED", name, f"lines.{taken[place]} and lines.{pin} are the same line, {seen.place}", pin=pin
            )
        taken.setdefault(place, pin)
        yield from _line_of_others(e, name, pin, seen)
        if seen.consumer is not None and not seen.consumer.startswith("bridged:"):
            text = f"{pin} ({seen.place}) is in use by {seen.consumer or 'the kernel or an unnamed program'}"
            yield found("DOCTOR_LINE_BUSY", name, text, pin=pin, consumer=seen.consumer)
        elif seen.label in gpio.HEADER_CHIPS and seen.offset in HEADER_UART_LINES and _header_uart_used(e):
            which = "TXD" if seen.offset == HEADER_UART_LINES[0] else "RXD"
            yield found("DOCTOR_LINE_ON_UART", name, f"{pin} ({seen.place}) is {which} of the header's UART", pin=pin)
        else:
            good.append(f"{pin} = {seen.place}")
    if good:
        yield found("DOCTOR_LINES", name, ", ".join(good))
    if e.unit is not None and not _unit_allows(e.unit, "", {"char-gpiochip"}):
        remedy = "`sudo systemctl edit bridged`: [Service], DeviceAllow=char-gpiochip rw"
        yield found("DOCTOR_UNIT_DEVICE", name, f"{e.unit.path} does not allow char-gpiochip", remedy, kind="char-gpiochip")


def _line_of_others(e: Examination, name: str, pin: str, seen: gpio.Seen) -> Findings:
    """The configuration compares names; here the same line is found under another name."""
    for other, looked in e.seen_lines.items():
        if other == name or other in e.config.targets[name].shares or isinstance(looked, LineUnavailable):
            continue
        for its_pin, its in looked.items():
            if isinstance(its, gpio.Seen) and (its.chip, its.offset) == (seen.chip, seen.offset):
                text = f"{pin} ({seen.place}) is {its_pin} of {other} as well"
                yield found("DOCTOR_LINE_SHARED", name, text, pin=pin, other=other)


def _header_uart_used(e: Examination) -> bool:
    return any(port is not None and port.name in HEADER_UART and port.usb is None for port in e.ports.values())


def _modem_lines(e: Examination, name: str) -> Findings:
    port = e.ports[name]
    if port is None:
        if e.machine.resolve(e.config.targets[name].port).startswith("/dev/pts/"):
            yield found("DOCTOR_MODEM_LINES", name, "a pseudo terminal has no DTR and RTS")
        return
    if port.usb is None and e.machine.is_pi:
        yield found("DOCTOR_MODEM_LINES", name, f"{port.device}: DTR is on no pin of the header, RTS only by an overlay")
    elif port.usb is not None and is_stlink(port.usb.vendor, port.usb.product):
        yield found("DOCTOR_MODEM_LINES", name, f"{port.device}: an ST-LINK does not bring DTR and RTS to pins")
    else:
        yield found("DOCTOR_MODEM_PULSE", name, f"opening {port.device} raises DTR and RTS, so the target may be reset once")


def _line_box(machine: Machine, name: str, path: str) -> Findings:
    node = machine.node(path)
    if node is None or not node.is_socket:
        what = "does not exist" if node is None else "is no socket"
        yield found("DOCTOR_LINE_BOX_MISSING", name, f"the line box {path} {what}", socket=path)
    elif not machine.listening(path):
        yield found("DOCTOR_LINE_BOX_DEAD", name, f"nobody listens at the line box {path}", socket=path)
    else:
        yield found("DOCTOR_LINES", name, f"line box {path}", socket=path)


# --- chip and board -----------------------------------------------------------------------------------------------------


def _chip(e: Examination, name: str) -> Findings:
    target = e.config.targets[name]
    if not target.chip:
        yield found("DOCTOR_CHIP_UNSET", name, "any chip is taken: the configuration does not say which one to expect")
        return
    chip = chips.find(target.chip)
    if chip.foreign:
        yield found("DOCTOR_CHIP_FOREIGN", name, f"{chip.title}: {chip.foreign}")
        return
    confirmed = {layout.name: layout.confirmed for layout in chip.layouts}
    if not chip.layout_confirmed and not target.layout:
        text = f"{chip.title}: its layout is not sure enough to erase; known: {', '.join(confirmed) or 'none'}"
        yield found("DOCTOR_LAYOUT_UNSURE", name, text)
    if not chip.boot0_pin_obeyed and target.lines.boot0:
        yield found("DOCTOR_BOOT0_IGNORED", name, f"{chip.title} does not obey its BOOT0 pin from the factory")
    if 0 < target.startup_s < min(chip.startup_s):
        text = f"startup_s = {target.startup_s:g}, and {chip.title} needs {min(chip.startup_s):g} s from reset to its loader"
        yield found("DOCTOR_STARTUP_SHORT", name, text)
    if target.baud > chip.first_baud and any(row.quirk is Quirk.RATE_JITTER for row in chip.quirks):
        text = f"baud = {target.baud}: {chip.title} measures the rate wrong now and then; {chip.first_baud} is safe"
        yield found("DOCTOR_RATE_JITTER", name, text)
    pins = dict.fromkeys(pair for _, pair in chip.usart_pins if pair)
    if pins:
        yield found("DOCTOR_LOADER_PINS", name, f"the loader of {chip.title} hears only {', '.join(pins)} (TX/RX)")
    board = board_of(chip.pid)
    if board is not None:
        yield found("DOCTOR_BOARD", name, f"if this is a {board.name}: {board.traps}", board=board.name)
    port = e.ports[name]
    if port is None or port.usb is None or not is_stlink(port.usb.vendor, port.usb.product) or not pins:
        return
    if board is not None and board.virtual_port:
        if board.virtual_port not in pins:
            text = f"{port.device} is the virtual port of an ST-LINK: {board.virtual_port} on a {board.name}"
            yield found("DOCTOR_STLINK_DEAF", name, f"{text}; the loader hears only {', '.join(pins)}")
        return
    heard = [f"{pair} ({boards})" for pair, boards in USUAL_VIRTUAL_PORTS.items() if pair in pins]
    if heard:
        text = f"{port.device} is the virtual port of an ST-LINK; the loader hears it only where it leads to {', '.join(heard)}"
        yield found("DOCTOR_STLINK_PORT", name, text)
    else:
        text = f"{port.device} is the virtual port of an ST-LINK, usually {' or '.join(USUAL_VIRTUAL_PORTS)}"
        yield found("DOCTOR_STLINK_DEAF", name, f"{text}; the loader hears only {', '.join(pins)}")


MACHINE_CHECKS: tuple[Callable[[Examination], Findings], ...] = (_machine, _clock, _unit, _daemon, _state_dir, _library)
TARGET_CHECKS: tuple[Callable[[Examination, str], Findings], ...] = (_port, _others_on_port, _lines, _chip)
