"""The serial port of a target: whether it is there, may be opened, is let alone by others, and does what the loader needs."""

from __future__ import annotations

import os
import re

from bridged.doctor.boards import MINI_UART
from bridged.doctor.examination import Examination, Findings, unit_allows
from bridged.doctor.machine import Machine, Port
from bridged.findings import found

BRLTTY_TAKES = {"0403:6001", "10c4:ea60", "1a86:7523"}  # FT232, CP210x, CH340: in its udev rules for years.
GETTYS = ("agetty", "getty", "mgetty")
MM_IGNORE = ("ID_MM_DEVICE_IGNORE", "ID_MM_PORT_IGNORE")


def port(e: Examination, name: str) -> Findings:
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
    if e.unit is not None and kinds and not unit_allows(e.unit, port.device, kinds):
        kind = sorted(kinds)[-1]
        remedy = f"`sudo systemctl edit bridged`: [Service], DeviceAllow={kind} rw"
        yield found(
            "DOCTOR_UNIT_DEVICE", name, f"{e.unit.path} does not allow {kind}, which {port.device} is", remedy, kind=kind
        )


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
        yield found(
            "DOCTOR_MODEMMANAGER", name, text, f"/etc/udev/rules.d/61-bridged-local.rules: {rule}; or remove ModemManager"
        )
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


def others_on_port(e: Examination, name: str) -> Findings:
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
