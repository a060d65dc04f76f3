"""The command line: arguments, and what people see of the answers. What it asks, it asks ``bridged.client``.

It must answer in a fraction of a second on the smallest gateway, so nothing is imported that the command at hand does not need;
``serve``, ``sim``, ``demo``, ``doctor`` and their like hand over to their modules by a late import.

- Ctrl-C ends this program and not the job.
- Results go to stdout, progress and errors to stderr; ``--json`` prints every reply of the gateway as one JSON object a line.

In ``arguments`` is what can be said, in ``commands`` what is asked for it, in ``texts`` and ``screen`` what people see, and in
``exits`` what scripts are told. It knows nothing of images, chips or wires: the gateway checks, plans and explains; nor of
sockets: that is ``client``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridged.cli.arguments import parser
from bridged.cli.commands import Command
from bridged.cli.exits import Exit
from bridged.cli.screen import lenient, missing, say
from bridged.errors import BridgedError
from bridged.protocol.reply import error_reply, format_reply


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A command that another module carries out; it parses its own arguments. ``prints``: its results, not a daemon's log."""

    module: str
    function: str
    text: str
    prints: bool = True


HANDED_OVER = {
    "serve": HandedOver("bridged.app", "serve", "run the gateway (the daemon)", prints=False),
    "sim": HandedOver("bridged.sim.main", "main", "run simulated targets on pseudo terminals"),
    "init": HandedOver(
        "bridged.init", "main", "make a configuration by looking at this machine, asking little; ends with doctor"
    ),
    "doctor": HandedOver("bridged.doctor", "main", "why would a job fail on this machine? looks only, opens no port"),
    "fleet": HandedOver("bridged.fleet.operator", "main", "roll-outs over many gateways, inventory, drift (docs/fleet.md)"),
    "demo": HandedOver("bridged.demo", "main", "gateway and simulated targets: stage, flash, prove; without hardware"),
}


def whole_parser() -> argparse.ArgumentParser:
    return parser({name: handed.text for name, handed in HANDED_OVER.items()})


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:2] == ["--json", "doctor"]:
        argv = [*argv[1:], "--json"]  # It knows the word, though no other option of the client.
    if argv and argv[0] in HANDED_OVER:
        return _hand_over(HANDED_OVER[argv[0]], argv[1:])
    args = whole_parser().parse_args(argv)
    try:
        if args.command in HANDED_OVER:
            # Options of the client stood before it; they mean nothing to a daemon.
            say(f"bridged: say `bridged {args.command} ...` without options before it", sys.stderr)
            return Exit.USAGE
        if args.command == "check-config":
            return _check_config(Path(args.file), as_json=args.json)
        return Command(args).run()
    except BridgedError as error:
        if args.json:
            say(format_reply(error_reply(error), as_json=True).decode(), sys.stdout, end="")
        else:
            say(f"bridged: {error.message}", sys.stderr)
        return Exit.USAGE


def _hand_over(handed: HandedOver, argv: Sequence[str]) -> int:
    from importlib import import_module

    command = getattr(import_module(handed.module), handed.function)
    return _printing(command, list(argv)) if handed.prints else int(command(list(argv)) or 0)


def _check_config(path: Path, *, as_json: bool) -> int:
    from bridged import app

    return _printing(app.check_config, path, as_json=as_json)


def _printing(command: Callable[..., int | None], *args: Any, **named: Any) -> int:
    """The exit code of a command that prints by itself. Nobody who reads it ends it; a full disk is told when it has ended."""
    with lenient() as out:
        code = int(command(*args, **named) or 0)
        out.flush()
        if told := missing(out.lost):
            say(f"bridged: {told}", sys.stderr)
            code = code or Exit.USAGE
    return code
