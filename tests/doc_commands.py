"""What the documentation tells people to type: found in the pages, and checked word by word without running it.

A block of a page says what it is by its language:

- ``sh``: commands. ``tests/test_docs_commands.py`` runs them against a gateway with simulated targets, unless the line above
  says ``<!-- not run: WHY -->``; then, and in the text between backquotes, each command is only checked: by the real parser of
  the command line, the targets of the Makefile, the units in ``systemd/``, modules that exist.
- ``nc``: lines of the line protocol. ``toml``, ``yaml``, ``json``, ``python``: as they say.
- none: what a program says, or a picture. No command begins a line there.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from bridged import cli
from bridged.fleet.arguments import parser as operator
from bridged.sim.main import parser as simulator

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LANGUAGES = {"sh", "nc", "toml", "yaml", "json", "python", ""}
_BLOCK = re.compile(r"^(?:<!-- not run: ([^>]+) -->\n)?( *)```(\w*)\n(.*?)^\2```$", re.MULTILINE | re.DOTALL)
# Programs of others, whose words are theirs. A word that is neither here nor below is no command that we know of.
OTHERS = {
    *("apt", "cat", "curl", "cut", "echo", "grep", "jq", "minisign", "nc", "pip", "pipx", "printf", "python3", "reboot", "sed"),
    *("sha256sum", "socat", "stat", "systemd-sysusers", "tail", "telnet", "usermod", "chown", "groupadd", "ssh", "readelf"),
    *(".", "raspi-config", "timedatectl", "git", "cd", "man", "openssl"),
}
PUNCTUATION = re.compile(r"[();<>|&{}!]+")


@dataclass(frozen=True, slots=True)
class Block:
    page: str
    language: str
    text: str
    not_run: str


def blocks(page: Path) -> list[Block]:
    found = []
    for why, indent, language, body in _BLOCK.findall(page.read_text()):
        text = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        found.append(Block(str(page.relative_to(ROOT)), language, text, why))
    return found


def inline(page: Path) -> list[str]:
    """What stands between backquotes in the text, as one line each."""
    text = _BLOCK.sub("", page.read_text())
    return [" ".join(words.split()) for words in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]


def commands(script: str) -> Iterator[list[str]]:
    """The simple commands of a piece of shell, without assignments, redirections and what controls them."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        skip = False
        for token in [*lexer, ";"]:
            if PUNCTUATION.fullmatch(token):
                skip = "<" in token or ">" in token
                if not skip and words:
                    yield words
                    words = []
            elif skip:
                skip = False
            elif words or not re.match(r"\w+=|while$|do$|done$|if$|then$|fi$", token):
                words.append(token)


def check(words: list[str]) -> None:
    """Raises ``AssertionError`` where this command could not be typed like that."""
    name, rest = words[0], words[1:]
    if name == "sudo":
        check(rest)
    elif name in _CHECKS:
        _CHECKS[name](rest)
    elif name.endswith("/bin/bridged"):
        _bridged(rest)
    elif name.endswith("/bin/pip"):
        return
    elif name.startswith("/opt/bridged/share/bridged/"):
        assert (ROOT / "systemd" / Path(name).name).exists(), f"{name} is not what the wheel brings along"
    elif name.startswith("./"):
        assert (ROOT / name).exists(), f"{name} is no file of this project"
    else:
        assert name in OTHERS, f"{name} is no command that is known here"


OWN_PARSERS = {"sim": simulator, "fleet": operator}


class _Parsed(Exception):
    """The arguments are in order; nothing was done."""


def _bridged(words: list[str]) -> None:
    """By the parsers of the program itself, whichever command it is; what comes after the parser does not run."""
    if _only_named(words):
        return
    parse = argparse.ArgumentParser.parse_args

    def only(self: argparse.ArgumentParser, *args: Any, **more: Any) -> None:
        parse(self, *args, **more)
        raise _Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", only):
        try:
            cli.main(words)
        except _Parsed:
            return
        except SystemExit as end:
            if end.code == 0:
                return
            raise AssertionError(f"bridged {shlex.join(words)}: the command line does not take this") from end
    raise AssertionError(f"bridged {shlex.join(words)} was not parsed")


def _only_named(words: list[str]) -> bool:
    """``bridged token add``, ``bridged sim --lines``: a command or its option is spoken of, without what it takes."""
    parser: argparse.ArgumentParser | None = cli.whole_parser()
    for word in words:
        actions = parser._actions if parser is not None else []
        below = next((action.choices for action in actions if isinstance(action, argparse._SubParsersAction)), {})
        if word in below:
            parser = OWN_PARSERS[word]() if word in OWN_PARSERS else below[word]
        elif word != words[-1] or not any(word in action.option_strings for action in actions):
            return False
    return True


def _make(words: list[str]) -> None:
    known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    variables = [*re.findall(r"^([A-Z_]+)\s*[:?]?=", (ROOT / "Makefile").read_text(), re.MULTILINE), "ARGS"]
    for word in words:
        name, given, _ = word.partition("=")
        assert name in (variables if given else known), f"make {word}: the Makefile does not have it"


def _systemctl(words: list[str]) -> None:
    unit = words[-1]
    ours = [path.name for path in (ROOT / "systemd").iterdir()]
    foreign = unit.startswith("serial-getty@") or unit in ("hciuart", "ModemManager")
    assert foreign or any(name.startswith(f"{unit}.") or name == unit for name in ours), f"systemctl … {unit}: no unit of ours"


def _journalctl(words: list[str]) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "logs.md").read_text(), re.MULTILINE))
    for field in (word.partition("=")[0] for word in words if word.startswith("BRIDGED_")):
        assert field.removeprefix("BRIDGED_").lower() in documented, f"journalctl {field}: no such field"


def _python(words: list[str]) -> None:
    if words[:1] == ["-m"]:
        assert words[1] in ("pytest", "pip") or importlib.util.find_spec(words[1]) is not None, f"python -m {words[1]}"
        files = [word for word in words[2:] if word.startswith("tests/")] if words[1] == "pytest" else []
        assert [file for file in files if not (ROOT / file).exists()] == []


_CHECKS: dict[str, Callable[[list[str]], None]] = {
    "bridged": _bridged,
    "make": _make,
    "systemctl": _systemctl,
    "journalctl": _journalctl,
    ".venv/bin/python": _python,
    "python": _python,
}
