"""Completion and the manual page: as the parser is, and understood by those who read them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests import build_settings, build_shell
from tests.support import require_tool


def test_they_are_as_the_code_says() -> None:
    assert build_shell.stale() == [], "run `python -m tests.build_shell`"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["bridged", "fla"], {"flash"}),
        (["bridged", "tok"], {"token"}),
        (["bridged", "flash", "--si"], {"--sig"}),
        (["bridged", "flash", "--type", "el"], {"elf"}),
        (["bridged", "token", "add", "x", "--scope", "con"], {"console"}),
        (["bridged", "token", "re"], {"revoke"}),
        (["bridged", "fleet", "roll"], {"rollouts"}),
        (["bridged", "fleet", "start", "--can"], {"--canary"}),
        (["bridged", "fleet", "artifact", "rem"], {"remove"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    bash = require_tool("bash", "bash")
    script = (
        f'source "{build_shell.FOLDER / "bridged.bash"}"\n'
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        "complete -p bridged >/dev/null || exit 1\n"
        'function=$(complete -p bridged | sed "s/.*-F //; s/ .*//"); $function bridged "${!#}" "" 2>/dev/null\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run([bash, "-c", script, "bash", *words], capture_output=True, text=True, timeout=20, check=True)
    assert set(done.stdout.split()) == expected


def test_zsh_understands_it() -> None:
    zsh = require_tool("zsh", "zsh")
    subprocess.run([zsh, "-n", str(build_shell.FOLDER / "_bridged")], check=True, timeout=20)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("bridged.1", ("bridged flash TARGET", "--sig FILE.minisig", "BRIDGED_TOKEN_FILE", "bridged fleet start ARTIFACT")),
        ("bridged.toml.5", ("[targets.NAME.lines]", "port (required)", 'listen = "127.0.0.1:7100"', 'boot0 = "GPIO27"')),
    ],
)
def test_a_manual_page_has_no_warnings(page: str, words: tuple[str, ...], tmp_path: Path) -> None:
    groff = require_tool("groff", "groff")
    command = [groff, "-man", "-Tutf8", "-ww", str(build_shell.FOLDER / page)]
    done = subprocess.run(command, capture_output=True, timeout=20, check=True, cwd=tmp_path)
    assert done.stderr == b""
    text = re.sub(".\b", "", done.stdout.decode())  # Bold is a letter, a backspace and the letter again.
    for word in words:
        assert word in text.replace("\u2010", "-").replace("\u2212", "-"), word


def test_every_setting_is_in_the_manual_page() -> None:
    text = (build_shell.FOLDER / "bridged.toml.5").read_text().replace("\\-", "-")
    for table in build_settings.tables():
        assert f'.SH "[{table.name}]"' in text
        for one in table.settings:
            assert f"\\fB{one.name}\\fR" in text
