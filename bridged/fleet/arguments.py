"""What can be said to ``bridged fleet``: arguments, exit codes, and which broker is meant by them or the environment."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from bridged.errors import BadRequest
from bridged.fleet import select
from bridged.fleet.link import Access

DONE, FAILED, UNREACHABLE, USAGE, DRIFTED = 0, 1, 3, 2, 4
EXIT_TEXT = (
    (DONE, "done; a roll-out: every target has succeeded, or it goes on and none has failed so far"),
    (FAILED, "a roll-out: a target failed, was canceled or stayed silent, or the roll-out is paused or canceled"),
    (USAGE, "the command, or the request, is wrong"),
    (UNREACHABLE, "no broker answers"),
    (DRIFTED, "drift: some target runs something else than it should"),
)
EXAMPLES = """\
examples:
  bridged fleet permissions gw1 gw2 --operator ops        users for the broker's configuration
  bridged fleet init --replicas 3 --gateway gw1 --gateway gw2
  bridged fleet inventory --where site=berlin --where 'chip=F7*'
  bridged fleet artifact put app-2.1.elf --sig app-2.1.elf.minisig
  bridged fleet plan app-2.1.elf --where site=berlin --canary 'gateway=lab*' --waves 10%,50%
  bridged fleet start app-2.1.elf --where site=berlin --canary 'gateway=lab*' --waves 10%,50% --max-failures 3
  bridged fleet pause ROLLOUT;  bridged fleet resume ROLLOUT;  bridged fleet cancel ROLLOUT
  bridged fleet run ROLLOUT                               carry it on from this machine
  bridged fleet status ROLLOUT --follow                   watch it, with progress
  bridged fleet drift
  bridged fleet retire gw1;  bridged fleet tidy           show what would go; --yes removes it
"""
ENVIRONMENT = {
    "server": "BRIDGED_FLEET",
    "user": "BRIDGED_FLEET_USER",
    "password_file": "BRIDGED_FLEET_PASSWORD_FILE",
    "credentials": "BRIDGED_FLEET_CREDENTIALS",
    "ca": "BRIDGED_FLEET_CA",
    "certificate": "BRIDGED_FLEET_CERTIFICATE",
    "key": "BRIDGED_FLEET_KEY",
}
LONGEST_S = 400 * 86400.0


def parser() -> argparse.ArgumentParser:
    text = "exit codes:\n" + "\n".join(f"  {code:3}  {words}" for code, words in EXIT_TEXT)
    made = argparse.ArgumentParser(
        prog="bridged fleet",
        description="Roll-outs over many gateways, through NATS JetStream. docs/fleet.md",
        epilog=f"{EXAMPLES}\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        group = sub.add_argument_group("broker")
        for option, words in (
            ("--server", "tls://HOST:PORT, several by comma"),
            ("--user", "user there; also names our inbox"),
            ("--password-file", "the file with the password"),
            ("--credentials", "instead: a .creds file of NATS"),
            ("--ca", "who signs the broker's certificate (default: this system's CAs)"),
            ("--certificate", "mutual TLS: our certificate"),
            ("--key", "its private key"),
        ):
            variable = ENVIRONMENT[option[2:].replace("-", "_")]
            group.add_argument(option, default=os.environ.get(variable, ""), metavar="VALUE", help=f"{words} (${variable})")
        return sub

    def listing(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="one JSON object a line")

    def where(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--where",
            action="append",
            default=[],
            metavar="TERM",
            help="KEY=PATTERN, KEY!=PATTERN, version<1.2 (repeatable; all must hold). Keys: labels, and "
            + ", ".join(select.FIELDS),
        )

    def limits(sub: argparse.ArgumentParser, changing: bool) -> None:
        most = None if changing else 0
        sub.add_argument(
            "--max-failures",
            type=_count,
            default=most,
            metavar="N",
            help="pause with more failures" + (" (default 0)" if most == 0 else ""),
        )
        sub.add_argument("--max-share", type=_share, metavar="PERCENT", help="pause with a larger share of failures")

    def planned(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("artifact", metavar="ARTIFACT", help="its name, or its SHA-256 or the first digits of it")
        where(sub)
        sub.add_argument(
            "--canary", action="append", default=[], metavar="TERM", help="a first wave: of the selected, those where"
        )
        sub.add_argument(
            "--waves", default="", metavar="SIZES", help="5,10%%,50%%: the rest is the last one (default: one wave)"
        )
        sub.add_argument("--id", default="", metavar="NAME", help="name of the roll-out (default: made of artifact and date)")

    sub = command("init", "make streams, buckets and the consumers of gateways; may be repeated")
    sub.add_argument(
        "--replicas",
        type=int,
        choices=(1, 3, 5),
        help="copies of everything; of 3 servers: 3 (default: what is there keeps its own, 1 where there is nothing yet)",
    )
    sub.add_argument("--gateway", action="append", default=[], metavar="NAME", help="admit this gateway (repeatable)")
    sub.add_argument("--gateways-from", type=Path, metavar="FILE", help="admit those in a file, one a line")
    sub = command("permissions", "print users with their rights for nats-server; asks no broker")
    sub.add_argument("gateway", nargs="*", metavar="GATEWAY")
    sub.add_argument("--operator", action="append", default=[], metavar="NAME", help="a user for an operator (repeatable)")
    sub.add_argument("--certificates", action="store_true", help="mutual TLS: users by their certificates, without passwords")

    sub = command("artifact", "put a file into the object store, list what is there, or remove one")
    sub.add_argument("action", choices=("put", "list", "remove"))
    sub.add_argument("file", nargs="?", metavar="FILE", help="to remove: its name, or its SHA-256 or the first digits of it")
    sub.add_argument("--name", default="", help="default: the file's")
    sub.add_argument("--type", default="auto", help="format of the file (default: gateways look at it)")
    sub.add_argument("--sig", type=Path, metavar="FILE", help="its .minisig, which goes with each job")
    listing(sub)

    planned(command("plan", "show which targets a roll-out would reach in which wave; changes nothing"))
    sub = command("start", "begin a roll-out and carry it on")
    planned(sub)
    limits(sub, changing=False)
    sub.add_argument(
        "--share-after", type=_count, default=10, metavar="N", help="--max-share counts from N ends on (default 10)"
    )
    sub.add_argument(
        "--wave-timeout",
        type=_seconds,
        default=86400.0,
        metavar="TIME",
        help="who is silent for so long holds nothing up (default 1d)",
    )
    sub.add_argument("--soak", type=_seconds, default=0.0, metavar="TIME", help="between waves (default none)")
    sub.add_argument(
        "--expires", type=_seconds, default=30 * 86400.0, metavar="TIME", help="not begun any more after that (default 30d)"
    )
    sub.add_argument("--kind", choices=("ensure", "flash", "verify"), default="ensure", help="default: ensure")
    sub.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the job, as in FLASH (addr=0x08000000)"
    )
    sub.add_argument("--detach", action="store_true", help="release the first wave, then leave it to `run`")
    sub = command("run", "carry a roll-out on from this machine")
    sub.add_argument("id", metavar="ROLLOUT")
    sub.add_argument("--once", action="store_true", help="one look and what follows from it")
    sub = command("status", "how a roll-out is, and every target that did not succeed")
    sub.add_argument("id", metavar="ROLLOUT")
    sub.add_argument("--all", action="store_true", help="every target")
    sub.add_argument(
        "--follow", action="store_true", help="go on showing what changes, progress too, until it is over or paused"
    )
    listing(sub)
    listing(command("rollouts", "list them"))
    sub = command("pause", "release no further wave; what was released goes on")
    sub.add_argument("id", metavar="ROLLOUT")
    sub = command("resume", "go on, with other thresholds if you say so; then carry it on with `run`")
    sub.add_argument("id", metavar="ROLLOUT")
    limits(sub, changing=True)
    sub = command("cancel", "end it, and take back what has not begun; of one that is done, what the silent have not begun")
    sub.add_argument("id", metavar="ROLLOUT")
    for name, words in (
        ("inventory", "what runs where, as last told"),
        ("drift", "targets that run something else than the last roll-out wanted"),
    ):
        sub = command(name, words)
        where(sub)
        listing(sub)
    sub = command("tidy", "show what nothing needs any more: roll-outs with their reports, artifacts; --yes removes it")
    sub.add_argument(
        "--older-than",
        type=_seconds,
        default=90 * 86400.0,
        metavar="TIME",
        help="only what was last of use before that (default 90d)",
    )
    sub.add_argument("--yes", action="store_true", help="remove it")
    sub = command("retire", "show what leaves with a gateway that is taken out of service; --yes does it")
    sub.add_argument("gateway", metavar="GATEWAY")
    sub.add_argument("--yes", action="store_true", help="do it")
    return made


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", text):
        raise argparse.ArgumentTypeError("expected a number")
    return int(text)


def _share(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)%?", text)
    if not found or float(found[1]) > 100:
        raise argparse.ArgumentTypeError("expected a percentage, as 5 or 5%")
    return float(found[1]) / 100


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    value = int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else -1
    if not 0 <= value <= LONGEST_S:
        raise argparse.ArgumentTypeError("expected a time as 90, 15m, 12h or 30d, at most 400d")
    return float(value)


def access(options: argparse.Namespace) -> Access:
    servers = tuple(word.strip() for word in options.server.split(",") if word.strip())
    if not servers:
        raise BadRequest(f"which broker? --server tls://HOST:PORT, or ${ENVIRONMENT['server']}")
    for server in servers:
        if not re.fullmatch(r"(tls|nats)://[^\s/]+:\d+", server):
            raise BadRequest(f"{server[:80]!r} is not tls://HOST:PORT")

    def file(name: str) -> Path | None:
        said = getattr(options, name)
        return Path(said) if said else None

    password, credentials, ca, certificate, key = map(file, ("password_file", "credentials", "ca", "certificate", "key"))
    return Access(servers, options.user, password, credentials, ca, certificate, key)
