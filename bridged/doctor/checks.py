"""The machine half of ``doctor``: what can be known about a gateway without its daemon, without a target, and without
touching a port or a line.

Each check is a generator of findings over an ``Examination``: the machine, the configuration, and who runs the daemon. A check
says what is right as well (level ok), so that a report shows what was looked at. What a finding means and what to do is in
``findings``; what may be looked at is in ``machine``. What the target itself answers is not asked here: that takes a job.

The serial port has its checks in ``ports``, the lines theirs in ``pins``; all others are here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from bridged import __version__, chips, config
from bridged.chips.model import Quirk
from bridged.config.file import InvalidConfig, load, warnings_of
from bridged.config.values import listeners, loopback_host
from bridged.doctor import pins, ports
from bridged.doctor.boards import USUAL_VIRTUAL_PORTS, board_of, is_stlink
from bridged.doctor.examination import SERVICE, Examination, Findings
from bridged.doctor.machine import Machine, Unit
from bridged.errors import BadRequest, ConfigError, UnknownTarget
from bridged.findings import MACHINE, Finding, Level, found
from bridged.protocol.reply import parse_reply

SOCKET = "bridged.socket"
RUNTIME_SOCKET = "/run/bridged/bridged.sock"
FREE_BYTES = 8 << 20  # Below this jobs/admission.py lets none start.
CLOCK_SLACK_S = 86400.0  # Files may come with the time of another zone.


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
        loaded = load(path, check_chip=chips.wrong_choice)
    except InvalidConfig as error:
        return None, [found("DOCTOR_CONFIG_MISTAKE", MACHINE, str(mistake), line=mistake.line) for mistake in error.errors]
    except ConfigError as error:
        return None, [found("DOCTOR_CONFIG_UNREADABLE", MACHINE, error.message, file=str(path))]
    count = len(loaded.targets)
    findings = [found("DOCTOR_CONFIG", MACHINE, f"{path}: {count} target{'' if count == 1 else 's'}")]
    # Names of ports are looked at below, where the better name can be told.
    doubts = [text for text in warnings_of(loaded) if not re.match(r"targets\.[^.]+\.port:", text)]
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
            "DOCTOR_STATE_DIR_FULL",
            MACHINE,
            f"{free_mib} MiB are free for {path}; below {FREE_BYTES >> 20} none that erases or writes starts",
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
    yield from _unit_network(e, unit)
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


def _unit_network(e: Examination, unit: Unit) -> Findings:
    """What the unit's filter of addresses keeps from the network: nobody is told there, for packets just vanish."""
    allowed = set(unit.words("IPAddressAllow")) - {"localhost", "127.0.0.0/8", "127.0.0.1", "::1/128", "::1"}
    if allowed or "any" not in unit.words("IPAddressDeny"):
        return
    api, fleet, hawkbit = e.config.api, e.config.fleet, e.config.hawkbit
    listen = {"api.listen": api.listen, "api.http": api.http}
    listen |= {f"targets.{name}.console.listen": target.console.listen for name, target in e.config.targets.items()}
    keys = [key for key, text in listen.items() if not all(one.loopback for one in listeners(text))]
    keys += ["fleet.servers"] if any(map(_elsewhere, fleet.servers)) else []
    keys += ["hawkbit.url"] if hawkbit.url and _elsewhere(hawkbit.url) else []
    for key in keys:
        text = f"{key}: the service may not talk to anybody beyond loopback (IPAddressDeny=any)"
        yield found("DOCTOR_UNIT_NETWORK", MACHINE, text, key=key)


def _elsewhere(url: str) -> bool:
    return not loopback_host(urlsplit(url.removeprefix("plaintext:")).hostname or "")


def _below(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in folders)


def _daemon(e: Examination) -> Findings:
    """Whether it answers; a greeting is all that is asked for."""
    api, machine = e.config.api, e.machine
    addresses: list[tuple[str, str | tuple[str, int]]] = []
    for listen in listeners(api.listen):
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


MACHINE_CHECKS: tuple[Callable[[Examination], Findings], ...] = (_machine, _clock, _unit, _daemon, _state_dir, pins.library)
TARGET_CHECKS: tuple[Callable[[Examination, str], Findings], ...] = (ports.port, ports.others_on_port, pins.lines, _chip)
