"""The arguments of every command, and the help that is printed. Completion and the manual page are made from it.

It is one table, read from top to bottom, so it is one file.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from typing import Any

from bridged import __version__
from bridged.cli.exits import EXIT_TEXT
from bridged.client.gateway import DEFAULT_GATEWAY, DEFAULT_SOCKET
from bridged.client.link import RETRY_S
from bridged.protocol.verbs import TYPES, Scope

DESCRIPTION = """\
Updates STM32 microcontrollers behind a Linux gateway through their ROM loader, and proves what is in their flash.

The gateway runs `bridged serve`; every other command talks to it. An image is sent whole before the target is touched,
so a bad link, a closed lid or Ctrl-C cannot disturb an update that has begun.
"""

EXAMPLES = """\
examples:
  bridged demo                                  try everything, without hardware
  bridged doctor                                what on this machine would keep a job from working
  bridged examine motor1                        what is wrong between this gateway and that chip
  bridged targets                               what is connected
  bridged flash motor1 app.elf                  write and prove
  bridged flash motor1 app.bin --addr 0x08000000
  bridged flash motor1 boot.bin@0x08000000 app.hex --patch 0x0801fff0:00112233
  bridged ensure motor1 app.elf                 write only if it is not there already
  bridged plan motor1 app.elf                   what would be erased, kept and written
  bridged read motor1 0x08000000 64K -o dump.bin
  bridged -g unix:/run/bridged/bridged.sock jobs --state failed
"""


def parser(handed_over: Mapping[str, str]) -> argparse.ArgumentParser:
    """``handed_over``: commands that parse their own arguments, with their texts."""

    def shared(top: bool) -> argparse.ArgumentParser:
        """Options that may stand before or after the command."""
        parent = argparse.ArgumentParser(add_help=False)
        group = parent.add_argument_group("gateway")

        def add(*names: str, default: Any, help: str, **more: Any) -> None:
            group.add_argument(*names, default=default if top else argparse.SUPPRESS, help=help, **more)

        add(
            "-g",
            "--gateway",
            default="",
            metavar="WHERE",
            help="HOST[:PORT], unix:PATH, or a name in the configuration file (default: $BRIDGED_GATEWAY, what the file says, "
            f"{DEFAULT_SOCKET} where it may be opened, or {DEFAULT_GATEWAY})",
        )
        add("--token-file", default="", metavar="FILE", help="the token, where the gateway wants one ($BRIDGED_TOKEN_FILE)")
        add("--ca", default="", metavar="FILE", help="certificates by which the gateway's is believed ($BRIDGED_CA)")
        add("--server-name", default="", metavar="NAME", help="name in the gateway's certificate, if not the host")
        add("--client-cert", default="", metavar="FILE", help="our own certificate ($BRIDGED_CERTIFICATE)")
        add("--client-key", default="", metavar="FILE", help="and its key ($BRIDGED_KEY)")
        add("--json", default=False, action="store_true", help="print the gateway's replies, one JSON object a line")
        text = "how long to try to reconnect after the link broke (default: 60)"
        add("--retry-for", default=RETRY_S, type=_seconds, metavar="SECONDS", help=text)
        return parent

    whole = argparse.ArgumentParser(
        prog="bridged",
        description=DESCRIPTION,
        epilog=f"{EXAMPLES}\n{_exit_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[shared(True)],
    )
    whole.add_argument("--version", action="version", version=f"bridged {__version__}")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True)
    below = shared(False)

    def command(name: str, text: str, example: str = "") -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example:\n  {example}" if example else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[below],
        )

    def target(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("target", metavar="TARGET", help="name of the target, as in `bridged targets`")

    def image(sub: argparse.ArgumentParser) -> None:
        text = (
            "ELF, Intel HEX, S-record, DfuSe or BIN, also in gzip, or sha256:HEX of a staged image; @ADDR: where a BIN belongs"
        )
        sub.add_argument("files", metavar="FILE[@ADDR]", nargs="+", help=text)
        sub.add_argument("--addr", "--address", metavar="ADDR", dest="addr", help="where a single BIN belongs, e.g. 0x08000000")
        sub.add_argument("--type", choices=TYPES, help="format of the files (default: look at them)")
        text = "bytes of this one unit (serial number, MAC), laid over the images or beside them; may be repeated"
        sub.add_argument("--patch", metavar="ADDR:HEX", action="append", help=text)

    def job(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--id", metavar="TEXT", help="your own id: the same command with the same id starts nothing twice")
        text = "another target that this resets as well, because they share NRST or power; has to be said for each"
        sub.add_argument("--resets", metavar="TARGET", action="append", help=text)
        sub.add_argument("--trace", action="store_true", help="keep the flight recording also when all goes well")
        sub.add_argument("--no-wait", action="store_true", help="print the job's id and return at once")

    def unasked(sub: argparse.ArgumentParser) -> None:
        text = "interlock: reset without asking the application"
        sub.add_argument("--force", action="append", choices=("interlock",), help=text)

    def writing(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--discard-outside",
            action="store_true",
            help="bytes of touched sectors outside the image may be lost (default: kept)",
        )
        sub.add_argument(
            "--one-shot", action="store_true", help="go on although the loader cannot be entered again by itself afterwards"
        )
        sub.add_argument(
            "--unprotect",
            action="store_true",
            help="remove readout protection first if it is on; erases the whole flash, and needs --force erase-everything",
        )
        sub.add_argument("--protect", action="store_true", help="set readout protection (level 1) last, when all is proven")
        sub.add_argument(
            "--force",
            action="append",
            choices=("vectors", "interlock", "erase-everything"),
            help="vectors: skip the check of the image; interlock: reset without asking the application; erase-everything: the "
            "consent that --unprotect needs",
        )
        text = "the image's signature by minisign; of several images one each, in their order"
        sub.add_argument("--sig", metavar="FILE.minisig", action="append", help=text)

    for name, text in handed_over.items():
        commands.add_parser(name, help=text, add_help=False)
    sub = command("check-config", "check a configuration file and name every mistake", "bridged check-config bridged.toml")
    sub.add_argument("file", metavar="FILE")

    sub = command("put", "send an image to the gateway without using it yet", "bridged put app.elf --name release-42")
    sub.add_argument("file", metavar="FILE")
    sub.add_argument("--name", help="a name for it (default: the file's)")
    sub.add_argument("--type", choices=TYPES, help="format of the file (default: look at it)")
    for name, text in (
        ("flash", "write an image to a target and prove it"),
        ("ensure", "write an image unless it is proven to be there already"),
    ):
        sub = command(name, text, f"bridged {name} motor1 app.elf")
        target(sub)
        image(sub)
        if name == "flash":
            sub.add_argument("--full", action="store_true", help="erase and write also the sectors that hold it already")
        else:
            enough = "what is enough where it was proven before: the record (touches nothing), samples, or all (default)"
            sub.add_argument("--evidence", choices=("record", "sample", "full"), help=enough)
        writing(sub)
        job(sub)
    sub = command("verify", "compare the flash with an image; changes nothing", "bridged verify motor1 app.elf")
    target(sub)
    image(sub)
    job(sub)
    text = "send an image by XMODEM to the bootloader in the target's own flash"
    sub = command("xmodem", text, "bridged xmodem motor1 update.bin")
    target(sub)
    image(sub)
    sub.add_argument("--sig", metavar="FILE.minisig", action="append", help="the image's signature by minisign")
    unasked(sub)
    job(sub)
    sub = command("plan", "show what flash would erase, keep and write; touches nothing", "bridged plan motor1 app.elf")
    target(sub)
    image(sub)
    writing(sub)
    sub = command("read", "read memory into a file", "bridged read motor1 0x08000000 64K -o dump.bin")
    target(sub)
    sub.add_argument("address", metavar="ADDR")
    sub.add_argument("length", metavar="LEN", help="bytes: 4096, 0x1000, 4K, 1M")
    sub.add_argument("-o", "--output", required=True, metavar="FILE", help="appears whole or not at all")
    job(sub)
    sub = command("erase", "erase sectors; a range is never widened", "bridged erase motor1 0x08020000+128K")
    target(sub)
    sub.add_argument("range", metavar="RANGE", help="ADDR+LEN on sector bounds, or all")
    sub.add_argument("--one-shot", action="store_true", help="go on although the loader cannot be entered again by itself")
    job(sub)
    sub = command("reset", "reset a target into its application", "bridged reset motor1")
    target(sub)
    sub.add_argument("--boot", action="store_true", help="into the ROM loader instead")
    job(sub)
    sub = command("id", "ask a chip who it is", "bridged id motor1")
    target(sub)
    job(sub)

    sub = command("examine", "examine the wiring and the chip; resets it, changes no flash", "bridged examine motor1")
    target(sub)
    job(sub)

    text = "show the option bytes, decoded; write fields that are named"
    sub = command("option-bytes", text, "bridged option-bytes motor1 --set IWDG_SW=1")
    target(sub)
    sub.add_argument("--set", metavar="NAME=VALUE", action="append", help="write this field; may be repeated")
    sub.add_argument("--raw", metavar="ADDR:HEX", action="append", help="lay bytes over the block; needs --field")
    sub.add_argument("--field", metavar="NAME", action="append", help="a field that the bytes of --raw may change")
    unasked(sub)
    job(sub)
    sub = command(
        "protect", "set readout protection (level 1), or protect sectors from being written", "bridged protect motor1"
    )
    target(sub)
    sub.add_argument("--sectors", metavar="N,N-N", help="write protection of these, besides those that have it")
    unasked(sub)
    job(sub)
    sub = command(
        "unprotect",
        "remove readout protection: ERASES THE WHOLE FLASH",
        "bridged unprotect motor1 --force erase-everything",
    )
    target(sub)
    sub.add_argument("--write", action="store_true", help="remove write protection instead, which erases nothing")
    sub.add_argument(
        "--force",
        action="append",
        choices=("erase-everything", "interlock"),
        help="erase-everything: yes, the whole flash; interlock: reset without asking the application",
    )
    job(sub)

    sub = command("targets", "list the targets", "bridged targets --long")
    sub.add_argument("--long", action="store_true", help="everything that is known")
    sub = command("status", "show a job, a target, or all targets", "bridged status motor1")
    sub.add_argument("what", metavar="JOB|TARGET", nargs="?", default="")
    sub.set_defaults(long=False)
    sub = command("watch", "follow a job to its end, or a target or everything until Ctrl-C", "bridged watch motor1")
    sub.add_argument("what", metavar="JOB|TARGET", nargs="?", default="*", help="default: everything")
    sub = command("jobs", "list jobs, the newest first", "bridged jobs --target motor1 --state failed")
    sub.add_argument("--target")
    sub.add_argument("--state")
    sub.add_argument("--limit", type=int, default=20)
    sub.add_argument("--before", metavar="JOB", help="only older ones than this")
    sub = command("log", "the history of a job", "bridged log JOB")
    sub.add_argument("job", metavar="JOB")
    sub.add_argument("--from", dest="since", type=int, metavar="SEQ", help="only from this entry on")
    sub = command("trace", "explain the recording of a job: what was sent and answered, and who was slow", "bridged trace JOB")
    sub.add_argument("job", metavar="JOB|FILE", help="a job that failed or ran with --trace, or a recording from --raw")
    shown = sub.add_mutually_exclusive_group()
    shown.add_argument("--all", action="store_true", help="a row for every command (default: what went well is folded)")
    shown.add_argument("--raw", action="store_true", help="the recording itself")
    sub = command("cancel", "cancel a job", "bridged cancel JOB")
    sub.add_argument("job", metavar="JOB")
    sub.add_argument("--force", action="store_true", help="also between erase and proof: the target is left without firmware")
    command("drain", "let the jobs that run finish, start no other, then end the daemon", "bridged drain")
    sub = command("console", "the target's serial port on this terminal; Ctrl-] leaves", "bridged console motor1")
    target(sub)
    sub.add_argument("--read-only", action="store_true", help="only look on")
    sub.add_argument("--replay", type=int, metavar="BYTES", help="so much of what was said before (default: as configured)")
    sub.add_argument("--force", action="store_true", help="take over from who writes, if you may")
    sub.add_argument("--until", type=_pattern, metavar="REGEX", help="end when the target has said this")
    sub.add_argument("--within", type=_seconds, metavar="SECONDS", help="end after this time; with --until: exit code 8 then")
    sub = command("lock", "reserve a target: the jobs and the typing of others wait", "bridged lock motor1 --ttl 900")
    target(sub)
    sub.add_argument("--ttl", type=int, metavar="SECONDS", help="it ends by itself after this (default 3600)")
    sub.add_argument("--note", metavar="TEXT", help="why, for those who meet the lock")
    sub.add_argument("--force", action="store_true", help="take it over from another one, if you may")
    sub = command("unlock", "give a reserved target back", "bridged unlock motor1")
    target(sub)
    sub.add_argument("--force", action="store_true", help="also the lock of another one, if you may")
    sub = command("token", "give and take rights: tokens and client certificates", "bridged token add ci --scope flash")
    actions = sub.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = actions.add_parser("add", help="make a token, and print it this one time", parents=[below])
    one.add_argument("name", metavar="NAME")
    text = "what it may do; may be repeated. flash and console include read, admin includes all"
    one.add_argument("--scope", action="append", required=True, choices=tuple(Scope), help=text)
    one.add_argument("--target", action="append", default=[], metavar="TARGET", help="only this target; may be repeated")
    one.add_argument("--expires", type=_lifetime, metavar="TIME", help="it ends by itself: 90d, 12h, 30m, 45s")
    one.add_argument("--certificate", metavar="NAME", help="no token: whoever shows a client certificate with this name")
    actions.add_parser("list", help="which there are; never the secrets", parents=[below])
    one = actions.add_parser("revoke", help="take the rights back, at once", parents=[below])
    one.add_argument("name", metavar="NAME")
    sub = command("audit", "who did what, from where, and what came of it", "bridged audit --limit 200")
    sub.add_argument("--limit", type=int, default=50)
    return whole


def _exit_text() -> str:
    return "exit codes:\n" + "\n".join(f"  {code.value:3}  {text}" for code, text in EXIT_TEXT.items())


def _lifetime(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,6})([dhms])", text)
    if match is None:
        raise argparse.ArgumentTypeError("expected a time such as 90d, 12h, 30m or 45s")
    return int(match[1]) * {"d": 86400, "h": 3600, "m": 60, "s": 1}[match[2]]


def _pattern(text: str) -> str:
    try:
        re.compile(text.encode())
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {error}") from error
    return text


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 86400:
        raise argparse.ArgumentTypeError("expected 0 to 86400 seconds")
    return value
