"""Writes what a shell and `man` want to know of the command line: ``python -m tests.build_shell [--check]``.

All of it is made from the argument parser and the settings, so that none can drift (a test runs the check), and is committed,
so that neither installing nor running needs the maker: ``shell/bridged.bash`` and ``shell/_bridged`` (completion, by shtab),
``shell/bridged.1`` and ``shell/bridged.toml.5`` (manual pages, by the lines here). The wheel and the Debian package put them
where shells and `man` look.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from unittest import mock

import shtab

from bridged import cli, config
from bridged.cli.arguments import EXAMPLES
from bridged.cli.exits import EXIT_TEXT
from bridged.fleet import arguments
from tests import build_settings

FOLDER = Path(__file__).parent.parent / "shell"
ENVIRONMENT = (
    ("BRIDGED_GATEWAY", "Which gateway: HOST[:PORT], unix:PATH, or a name in the configuration file."),
    ("BRIDGED_TOKEN_FILE", "The file that holds the token. BRIDGED_TOKEN holds the token itself, where nobody else sees it."),
    ("BRIDGED_CA, BRIDGED_CERTIFICATE, BRIDGED_KEY, BRIDGED_NAME", "As --ca, --client-cert, --client-key, --server-name."),
    (", ".join(arguments.ENVIRONMENT.values()), "As the options of bridged fleet that its help names them at."),
    ("BRIDGED_CLIENT_CONFIG", "The configuration file; else ~/.config/bridged/client.toml."),
)

EXAMPLE = """\
[targets.motor1]
port = "/dev/ttyAMA0"
chip = "F756"

[targets.motor1.lines]
kind = "gpio"
nrst = "GPIO17"
boot0 = "GPIO27"
"""


def parser() -> argparse.ArgumentParser:
    """As the command line makes it, on any machine; with the commands below `fleet`, which parses its own arguments."""
    made = cli.whole_parser()
    commands = _subparsers(made)
    assert commands is not None
    with mock.patch.dict("os.environ", clear=True):
        commands.choices["fleet"] = arguments.parser()
    return made


def completion(shell: str) -> str:
    text = shtab.complete(parser(), shell=shell)
    # The version of the tool and trailing blanks say nothing.
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def manual() -> str:
    """The manual page, in the macros of man(7)."""
    made = parser()
    out = ['.TH BRIDGED 1 "" "bridged" "User commands"', ".SH NAME", _text("bridged - updates STM32s behind a gateway")]
    out += [".SH SYNOPSIS", ".B bridged", _text("[OPTIONS] COMMAND ..."), ".SH DESCRIPTION", _text(made.description or "")]
    out += [".SH OPTIONS", *_options(made), ".SH COMMANDS"]
    commands = _subparsers(made)
    assert commands is not None
    for choice in commands._choices_actions:
        sub = commands.choices[choice.dest]
        out += [".TP", rf"\fB{_text(_usage(choice.dest, sub))}\fR", _text(choice.help or "")]
        inner = _subparsers(sub)
        out += _more(sub)
        common = _common(inner) if inner else set()
        if inner and common:
            out += [
                ".RS",
                _text("With each of its commands:"),
                *_options(next(iter(inner.choices.values())), keep=common),
                ".RE",
            ]
        for action in inner._choices_actions if inner else ():
            below = inner.choices[action.dest] if inner else sub
            out += [".RS", ".TP", rf"\fB{_text(_usage(f'{choice.dest} {action.dest}', below))}\fR", _text(action.help or "")]
            out += [*_more(below, common), ".RE"]
    out += [".SH EXIT STATUS"]
    for code, text in EXIT_TEXT.items():
        out += [".TP", str(code.value), _text(text)]
    out += [
        ".PP",
        _text("Of serve and check-config: 78, the configuration has mistakes. doctor and fleet have codes of their own."),
    ]
    out += [".SH ENVIRONMENT"]
    for name, text in ENVIRONMENT:
        out += [".TP", name, _text(text)]
    out += [".SH FILES", ".TP", _text("~/.config/bridged/client.toml"), _text("Gateways by name: see docs/client.md.")]
    out += [".TP", _text("/etc/bridged/bridged.toml"), _text("Configuration of the daemon: see bridged.toml(5).")]
    out += [".SH EXAMPLES", ".nf", *(_text(line.strip()) for line in EXAMPLES.splitlines()[1:]), ".fi"]
    out += [".SH SEE ALSO", _text("bridged.toml(5), systemctl(1), journalctl(1)")]
    return "\n".join(out) + "\n"


def settings_manual() -> str:
    """Of the configuration file, in the macros of man(7)."""
    about = (
        "One TOML file. Every setting has a default but the port of a target; a target is nothing but a table [targets.NAME]. "
    )
    about += "`bridged check-config FILE` names every mistake, `bridged init` writes a file by looking at the machine."
    out = [
        '.TH BRIDGED.TOML 5 "" "bridged" "File formats"',
        ".SH NAME",
        _text("bridged.toml - configuration of the bridged daemon"),
    ]
    out += [".SH SYNOPSIS", _text(str(config.DEFAULT_FILE)), ".SH DESCRIPTION", _text(about)]
    for table in build_settings.tables():
        out += [f'.SH "{_text(f"[{table.name}]")}"', _text(table.text)]
        for one in table.settings:
            value = f"= {one.default}" if one.default else "(required)"
            text = f"{one.text} {one.allowed}." if one.allowed else one.text
            out += [".TP", rf"\fB{_text(one.name)}\fR {_text(value)}", _text(text)]
    out += [".SH EXAMPLES", ".nf", *(_text(line) for line in EXAMPLE.splitlines()), ".fi"]
    out += [".SH SEE ALSO", _text("bridged(1)")]
    return "\n".join(out) + "\n"


def _subparsers(found: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser] | None:
    return next((action for action in found._actions if isinstance(action, argparse._SubParsersAction)), None)


def _usage(name: str, found: argparse.ArgumentParser) -> str:
    words = [
        str(action.metavar or "|".join(map(str, action.choices or ())) or action.dest)
        for action in found._actions
        if not action.option_strings
    ]
    return " ".join(["bridged", name, *words])


SHARED = {
    *("--gateway", "--json", "--retry-for", "--token-file", "--ca", "--server-name", "--client-cert", "--client-key", "--help")
}


def _common(found: argparse._SubParsersAction[argparse.ArgumentParser]) -> set[str]:
    """Options that every command below has, and not every command at all."""
    each = [{action.option_strings[-1] for action in one._actions if action.option_strings} for one in found.choices.values()]
    common = set.intersection(*each) - {"--help"}
    return common if common - SHARED else set()


def _more(found: argparse.ArgumentParser, common: set[str] | None = None) -> list[str]:
    """Options of one command, without those that all have."""
    lines = _options(found, common or SHARED)
    return [".RS", *lines, ".RE"] if lines else []


def _options(found: argparse.ArgumentParser, without: set[str] | None = None, keep: set[str] | None = None) -> list[str]:
    out: list[str] = []
    for action in found._actions:
        if not action.option_strings or action.help == argparse.SUPPRESS:
            continue
        name = action.option_strings[-1]
        if name in (without or ()) or (keep is not None and name not in keep) or (without and name == "--help"):
            continue
        value = ""
        if action.nargs != 0:
            value = " " + str(action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "VALUE"))
        text = (action.help or "") % {"prog": "bridged", "default": action.default}
        out += [".TP", rf"\fB{_text(', '.join(action.option_strings) + value)}\fR", _text(text)]
    return out


def _text(text: str) -> str:
    """Nothing of it is a command of roff."""
    escaped = text.strip().replace("\\", "\\e").replace("-", "\\-")
    return "\n".join(("\\&" + line if line.startswith((".", "'")) else line) for line in escaped.splitlines())


def pages() -> dict[str, str]:
    made = {"bridged.bash": completion("bash"), "_bridged": completion("zsh")}
    return {**made, "bridged.1": manual(), "bridged.toml.5": settings_manual()}


def stale() -> list[str]:
    return [name for name, text in pages().items() if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text]


def write() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text)


def main() -> int:
    arguments = argparse.ArgumentParser(prog="python -m tests.build_shell", description="Completion and manual pages.")
    arguments.add_argument("--check", action="store_true", help="compare only, write nothing")
    if arguments.parse_args().check:
        names = stale()
        print("\n".join(f"shell/{name} is stale" for name in names) or "shell: as the code says")
        return 1 if names else 0
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
