"""``bridged init``: a configuration by looking at the machine and asking little; then ``doctor`` has a look at it.

It adds one target to the configuration file, or begins the file. What can be seen is not asked: which ports there are and which
of them lead to a loader at all (not the mini UART, not the Bluetooth chip, not one that another target has), a port's stable
name, lines of a GPIO chip that are called NRST and BOOT0, the header of a Raspberry Pi. What cannot be seen is asked once, with
a default where there is a sensible one; every question has a flag, and ``--defaults`` asks nothing.

Invariants:

- Nothing is touched but the one file: no port is opened and no line requested, as in ``doctor``, whose ``Machine`` it uses.
- The file is replaced only by one that loads without a mistake, and whole (written beside it, synced, renamed). What stood in
  it stays, comments too; a target that exists is never changed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bridged import chips, config, doctor
from bridged.config.file import load
from bridged.doctor import boards
from bridged.doctor.examination import Examination
from bridged.doctor.machine import Machine, Port
from bridged.errors import BridgedError, ConfigError, UnknownChip
from bridged.target import gpio

EXAMPLES = """\
examples:
  sudo bridged init                                   looks, asks, writes /etc/bridged/bridged.toml, runs doctor
  bridged init --config my.toml                       into a file of your own
  bridged init --print                                shows the target's table and writes nothing
  sudo bridged init motor1 --chip F407 --defaults     asks nothing; what has no default must be named

exit codes:
    0  written, and doctor found no problem
    1  written, and doctor found a problem; or the result would have been no valid configuration, and nothing was written
    2  wrong arguments, or an answer is missing that has no default
   77  the file may not be written (sudo?)
"""

HEADER_PAIRS = (("GPIO17", "GPIO27"), ("GPIO22", "GPIO23"), ("GPIO24", "GPIO25"), ("GPIO5", "GPIO6"))
LINE_KINDS = ("gpio", "modem", "none")
BEGINNING = "# Configuration of bridged. Every option is explained in the reference configuration, config/bridged.toml.\n"


class Missing(Exception):
    """No answer, and no default."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A port that may be taken: its best name, what it is in words. ``why_not``: it leads to no loader, and what to do."""

    path: str
    about: str
    rank: int
    why_not: str = ""
    usb: bool = False
    stlink: bool = False


@dataclass(frozen=True, slots=True)
class Answers:
    """All that a target's table needs. ``nrst`` and ``boot0`` empty: not wired."""

    name: str
    port: str
    chip: str
    board: boards.Board | None
    kind: str
    nrst: str
    boot0: str


# --- looking ------------------------------------------------------------------------------------------------------------


def candidates(machine: Machine, taken: dict[str, str]) -> list[Candidate]:
    """All ports of the machine, the likeliest first. ``taken``: device to target, of the configuration that is there."""
    found = [_candidate(machine, port, taken) for path in machine.ports() if (port := machine.port(path)) is not None]
    return sorted(found, key=lambda candidate: (bool(candidate.why_not), candidate.rank, candidate.path))


def _candidate(machine: Machine, port: Port, taken: dict[str, str]) -> Candidate:
    header, bluetooth = (machine.resolve(f"/dev/{link}") == port.device for link in ("serial0", "serial1"))
    stlink = port.usb is not None and boards.is_stlink(port.usb.vendor, port.usb.product)
    why_not = ""
    if port.device in taken:
        why_not = f"target {taken[port.device]} has it"
    elif port.driver == boards.MINI_UART or any(text.endswith(boards.MINI_UART) for text in port.compatible):
        why_not = "the mini UART: it has no parity, which the loader needs"
    elif machine.is_pi and bluetooth and not header:
        why_not = "leads to the Bluetooth chip"
    elif "Raspberry Pi 5" in machine.model and port.name == "ttyAMA10":
        why_not = "on the debug connector, not on the header"
    if port.usb is not None:
        by_id, by_path = (machine.links_to(port, f"/dev/serial/{kind}") for kind in ("by-id", "by-path"))
        names = [*by_id, *by_path] if port.usb.serial else [*by_path, *by_id]
        about = f"USB: {port.usb.title or 'adapter'}" + (", virtual port of an ST-LINK" if stlink else "")
        return Candidate((names or [port.device])[0], about, 2 if stlink else 1, why_not, True, stlink)
    about = "UART on the header, GPIO14 and GPIO15" if machine.is_pi and port.name in ("ttyAMA0", "ttyS0") else "UART"
    return Candidate(port.device, f"{about} ({port.driver or 'no driver'})", 0 if machine.is_pi else 3, why_not)


def named_lines(machine: Machine) -> tuple[str, str] | None:
    """Where a device tree or a driver calls lines NRST and BOOT0, they are meant for this."""
    lines = config.Lines(kind="gpio", nrst="NRST", boot0="BOOT0")
    with contextlib.suppress(BridgedError):
        seen = gpio.look(lines, dev=str(machine.at("/dev")))
        if all(isinstance(what, gpio.Seen) and what.consumer is None for what in seen.values()):
            return "NRST", "BOOT0"
    return None


def header_lines(machine: Machine, there: config.Config) -> tuple[str, str] | None:
    """The first pair of the header that nobody has, neither in the configuration nor in the kernel."""
    taken = {pin for target in there.targets.values() for pin in (target.lines.nrst, target.lines.boot0)}
    for nrst, boot0 in HEADER_PAIRS:
        if {nrst, boot0} & taken:
            continue
        with contextlib.suppress(BridgedError):
            seen = gpio.look(config.Lines(kind="gpio", nrst=nrst, boot0=boot0), dev=str(machine.at("/dev")))
            if all(isinstance(what, gpio.Seen) and what.consumer is None for what in seen.values()):
                return nrst, boot0
    return None


# --- asking -------------------------------------------------------------------------------------------------------------


class Dialogue:
    """Questions on a terminal. ``ask`` None: nobody is there, and defaults are taken."""

    def __init__(self, ask: Callable[[str], str] | None) -> None:
        self._ask = ask

    def say(self, text: str = "") -> None:
        if self._ask is not None:
            print(text)

    def answer(self, question: str, default: str | None, flag: str, wrong: Callable[[str], str] = lambda _text: "") -> str:
        """``wrong``: why an answer cannot be; empty: it can. Raises ``Missing``."""
        if self._ask is None:
            if default is None:
                raise Missing(f"{question.lower()}? There is no default; say {flag}")
            return default
        while True:
            try:
                text = self._ask(f"{question} [{default}]: " if default else f"{question}: ").strip() or (default or "")
            except EOFError:
                raise Missing(f"no answer to: {question}. {flag} answers it") from None
            why = wrong(text) if text or default is None else ""
            if not why:
                return text
            print(f"  {why}")


def _wrong_chip(text: str) -> str:
    if not text or _board(text) is not None:
        return ""
    try:
        chips.find(text)
    except UnknownChip as error:
        return error.message
    return ""


def _board(text: str) -> boards.Board | None:
    wanted = text.strip().lower().replace(" ", "-")
    return next((board for board in boards.BOARDS if wanted and board.name.lower().replace(" ", "-") == wanted), None)


def _name_for(chip: str, board: boards.Board | None, there: config.Config) -> str:
    base = re.sub(r"[^a-z0-9-]+", "-", (board.name if board else chip).lower()).strip("-") or "target"
    names = [base, *(f"{base}-{number}" for number in range(2, 1000))]
    return next(name for name in names if name not in there.targets)


def _choose_port(args: argparse.Namespace, machine: Machine, there: config.Config, dialogue: Dialogue) -> str:
    if args.port:
        return str(args.port)
    taken = {machine.resolve(target.port): name for name, target in there.targets.items()}
    found = candidates(machine, taken)
    good = [candidate for candidate in found if not candidate.why_not]
    dialogue.say(f"{machine.model or 'This machine'} has these serial ports:")
    for number, candidate in enumerate(found, 1):
        mark = f"{number}" if not candidate.why_not else "-"
        dialogue.say(
            f"  {mark:>2}  {candidate.path}  {candidate.about}" + (f": {candidate.why_not}" if candidate.why_not else "")
        )
    if not found:
        dialogue.say("  none")
    model = boards.pi_of(machine.model)
    if model is not None and not any(not candidate.usb for candidate in good):
        dialogue.say(f"For the UART on the header of a {model.name}, in /boot/firmware/config.txt, and a reboot:")
        for line in model.config_lines:
            dialogue.say(f"      {line}")

    def wrong(text: str) -> str:
        if text.isdigit():
            return "" if 1 <= int(text) <= len(good) else f"a number from 1 to {len(good)}, or a path such as /dev/ttyAMA0"
        return "" if text.startswith("/") else "a number of the list, or a path such as /dev/ttyAMA0"

    if not good:
        why = "; ".join(f"{candidate.path}: {candidate.why_not}" for candidate in found) or "none was found"
        text = dialogue.answer("Which port", None, f"--port ({why})", wrong)
    elif len(good) > 1 and good[0].rank == good[1].rank:
        # Nobody can tell which of two adapters leads to which target; only a person.
        text = dialogue.answer("Which port", None, f"--port (there are {', '.join(c.path for c in good)})", wrong)
    else:
        text = dialogue.answer("Which port", "1", "--port", wrong)
    return good[int(text) - 1].path if text.isdigit() else text


def _choose_lines(
    args: argparse.Namespace, machine: Machine, there: config.Config, dialogue: Dialogue, port: Port | None
) -> tuple[str, str, str]:
    named, header = named_lines(machine), header_lines(machine, there) if machine.is_pi else None
    usb = port is not None and port.usb is not None
    stlink = port is not None and port.usb is not None and boards.is_stlink(port.usb.vendor, port.usb.product)
    default = "gpio" if named or header or args.nrst or args.boot0 else "modem" if usb and not stlink else "none"
    if args.lines:
        kind = str(args.lines)
    else:
        dialogue.say("NRST and BOOT0 of the target: gpio (lines of this machine), modem (DTR and RTS of the adapter), or none:")
        kind = dialogue.answer(
            "How are they wired",
            default,
            "--lines",
            lambda text: "" if text in LINE_KINDS else f"one of {', '.join(LINE_KINDS)}",
        )
    if kind == "none":
        return kind, "", ""
    guess = {"gpio": named or header, "modem": ("dtr", "rts")}[kind]
    pins = []
    for number, pin in enumerate(("nrst", "boot0")):
        given = getattr(args, pin)
        hint = " (GPIO17, pin:11 or CHIPLABEL:OFFSET)" if kind == "gpio" and number == 0 else ""
        pins.append(
            str(given) if given else dialogue.answer(f"{pin.upper()}{hint}", guess[number] if guess else None, f"--{pin}")
        )
    return kind, pins[0], pins[1]


def ask_all(args: argparse.Namespace, machine: Machine, there: config.Config, dialogue: Dialogue) -> Answers:
    path = _choose_port(args, machine, there, dialogue)
    port = machine.port(path)
    if args.chip is not None:
        text = str(args.chip)
    else:
        known = ", ".join(board.name for board in boards.BOARDS)
        dialogue.say(f"The chip (F407, STM32L476RG, 0x449) or the board ({known}); empty: whatever answers.")
        text = dialogue.answer("Chip or board", "", "--chip", _wrong_chip)
    board = _board(text)
    chip = board.chip if board is not None else text
    if board is not None:
        dialogue.say(f"  {board.name}: {board.traps}.")
    kind, nrst, boot0 = _choose_lines(args, machine, there, dialogue, port)
    name = args.name or dialogue.answer(
        "Name of the target",
        _name_for(chip, board, there),
        "the name",
        lambda text: f"there is a target {text} already" if text in there.targets else "",
    )
    return Answers(name, path, chip, board, kind, nrst, boot0)


# --- writing ------------------------------------------------------------------------------------------------------------


def table(answers: Answers) -> str:
    """The target as TOML."""

    def text(value: str) -> str:
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'

    lines = []
    if answers.board is not None:
        lines.append(f"# {answers.board.name}: {answers.board.traps}.")
    lines += [f"[targets.{answers.name}]", f"port = {text(answers.port)}"]
    lines.append(
        f"chip = {text(answers.chip)}" if answers.chip else '#chip = ""   # whatever answers; `bridged id` tells what it is'
    )
    lines += ["", f"[targets.{answers.name}.lines]", f"kind = {text(answers.kind)}"]
    lines += [f"{pin} = {text(value)}" for pin, value in (("nrst", answers.nrst), ("boot0", answers.boot0)) if value]
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Whole or not at all, with the permissions that it had. Raises ``OSError``."""
    real = Path(os.path.realpath(path))
    real.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=real.parent, prefix=f".{real.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            try:
                old = os.stat(real)
                os.fchmod(file.fileno(), old.st_mode & 0o7777)
                if os.geteuid() == 0:
                    os.fchown(file.fileno(), old.st_uid, old.st_gid)
            except FileNotFoundError:
                os.fchmod(file.fileno(), 0o644)
        os.replace(part, real)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise
    folder = os.open(real.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# --- the command --------------------------------------------------------------------------------------------------------


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bridged init",
        description="Add a target to the configuration by looking at this machine and asking what cannot be seen.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the target (default: from its board or chip)")
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"default: {config.DEFAULT_FILE}")
    parser.add_argument("--port", metavar="PATH", help="serial port, such as /dev/ttyAMA0")
    text = "chip or board: F407, STM32L476RG, 0x449, NUCLEO-F756ZG; '': whatever answers"
    parser.add_argument("--chip", "--board", metavar="NAME", help=text)
    parser.add_argument("--lines", choices=LINE_KINDS, help="how NRST and BOOT0 are wired")
    parser.add_argument("--nrst", metavar="LINE", help="GPIO17, pin:11, CHIPLABEL:OFFSET; with --lines modem: dtr or rts")
    parser.add_argument("--boot0", metavar="LINE", help="likewise")
    parser.add_argument("--defaults", action="store_true", help="ask nothing (also where no terminal is there)")
    parser.add_argument("--print", dest="show", action="store_true", help="show the table and write nothing")
    return parser


def main(argv: Sequence[str] | None = None, machine: Machine | None = None, ask: Callable[[str], str] | None = None) -> int:
    """The command. ``machine`` and ``ask``: another one than this, and another person than at the terminal (for tests)."""
    parser = _arguments()
    args = parser.parse_args(argv)
    machine = machine or Machine()
    if ask is None and sys.stdin.isatty() and not args.defaults:
        ask = input
    path = args.config or machine.at(str(config.DEFAULT_FILE))

    def fail(code: int, text: str) -> NoReturn:
        print(f"bridged init: {text}", file=sys.stderr)
        raise SystemExit(code)

    try:
        old = path.read_text(encoding="utf-8") if os.path.lexists(path) else ""
        there = load(old or BEGINNING, check_chip=chips.wrong_choice)
    except (OSError, UnicodeDecodeError) as error:
        fail(77 if isinstance(error, PermissionError) else 1, f"reading {path}: {error}")
    except ConfigError as error:
        fail(1, f"{path} has mistakes, which come first (nothing was changed):\n{error.message}")
    if args.name in there.targets:
        fail(2, f"{path} has a target {args.name} already; this command changes none")
    try:
        answers = ask_all(args, machine, there, Dialogue(None if args.defaults else ask))
    except Missing as error:
        fail(2, str(error))
    made = table(answers)
    text = f"{old.rstrip()}\n\n{made}" if old.strip() else f"{BEGINNING}\n{made}"
    try:
        load(text, check_chip=chips.wrong_choice)
    except ConfigError as error:
        fail(1, f"the result would be no valid configuration, so {path} is as it was:\n{error.message}")
    if args.show:
        print(made, end="")
        return 0
    try:
        write(path, text)
    except OSError as error:
        fail(77 if isinstance(error, PermissionError) else 1, f"writing {path}: {error}")
    print(f"{path}: target {answers.name} added\n\n{made}")
    findings = doctor.examine(machine, path, [answers.name])
    print(doctor.report(findings, width=shutil.get_terminal_size().columns if sys.stdout.isatty() else 0))
    runs = Examination(machine, there).states.get("ActiveState") == "active"
    begin = "sudo systemctl restart bridged" if runs else "sudo systemctl enable --now bridged"
    print(f"\nNext:  {begin}   and then   bridged id {answers.name}")
    return 1 if any(finding.level is doctor.Level.PROBLEM for finding in findings) else 0
