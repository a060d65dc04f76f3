"""The documentation says what the code does: generated pages are fresh, links lead somewhere, codes and verbs exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bridged import doctor
from bridged.chips import CHIPS, find
from bridged.cli.exits import EXIT_TEXT
from bridged.errors import BY_CODE
from bridged.protocol.verbs import VERBS
from tests import build_docs, build_shell, build_wiring, limits

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture(params=PAGES, ids=lambda path: path.name)
def page(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


def anchors(path: Path) -> set[str]:
    """Anchors as a forge makes them from headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_generated_pages_are_fresh() -> None:
    assert build_docs.stale() == [], "run: python -m tests.build_docs"


def test_the_wiring_pictures_are_those_of_the_examples_and_their_pins_those_of_the_chips() -> None:
    assert build_wiring.stale() == [], "run: python -m tests.build_wiring"
    examples = sorted((ROOT / "config" / "examples").glob("nucleo-*.toml"))
    assert len(examples) == 3
    for example in examples:
        wires = {wire.pi: wire for wire in build_wiring.wires(example)}
        assert {wire: wires[wire].pin for wire in wires} == {
            "GND": 6, "GPIO14 TXD": 8, "GPIO15 RXD": 10, "GPIO17": 11, "GPIO27": 13,
        }  # fmt: skip
        chip = find(re.findall(r'^chip = "(\w+)"', example.read_text(), re.MULTILINE)[0])
        # TX first, as seen from the target; TX of one side leads to RX of the other.
        assert (wires["GPIO15 RXD"].there, wires["GPIO14 TXD"].there) in {tuple(pair.split("/")) for _, pair in chip.usart_pins}
        assert wires["GPIO14 TXD"].why.startswith("RX of")
        assert (wires["GPIO17"].there, wires["GPIO27"].there) == ("NRST", "BOOT0")


def test_every_limit_is_documented_with_its_reason() -> None:
    assert limits.unlisted() == [], "say in tests/limits.py what it bounds and what happens beyond it"
    assert limits.unexplained() == [], "say beside it in the code why it is what it is"


def test_every_error_code_is_explained() -> None:
    text = (ROOT / "docs" / "errors.md").read_text()
    assert [code for code in BY_CODE if f"### {code}\n" not in text] == []


def test_links_lead_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


def test_each_threat_names_tests_that_exist() -> None:
    """``file.py::test`` in the table of threats; ``::test`` alone is one more of the file before it."""
    functions: dict[str, set[str]] = {}
    for path in ROOT.glob("tests/**/test_*.py"):
        found = re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
        functions.setdefault(path.name, set()).update(found)
    table = (ROOT / "docs" / "security.md").read_text().partition("## Threats")[2]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)?::(test_\w+)`", row.split("|")[3])
        assert named, row
        assert named[0][0], row
        assert "`" not in re.sub(r"`(test_\w+\.py)?::test_\w+`", "", row.split("|")[3]), "a test is named as file::function"
        file = ""
        for name, function in named:
            file = name or file
            assert function in functions[file], f"{file}::{function}"


def test_codes_named_in_the_pages_exist(page: Path) -> None:
    named = set(re.findall(r"`([A-Z]{2,}(?:_[A-Z]+)+)`", page.read_text()))
    assert named - set(BY_CODE) - set(doctor.CATALOG) - ENVIRONMENT - WARNINGS == set()


# What a session warns of, which ends no job and is no error.
WARNINGS = {
    code for path in (ROOT / "bridged").glob("**/*.py") for code in re.findall(r'Warned\(\s*"([A-Z_]+)"', path.read_text())
}
ENVIRONMENT = set(re.findall(r"BRIDGED_[A-Z_]+", str(build_shell.ENVIRONMENT))) | {
    "ID_MM_DEVICE_IGNORE",
    "SOURCE_DATE_EPOCH",
    "MESSAGE_ID",
}


def test_verbs_used_in_examples_exist(page: Path) -> None:
    text = page.read_text()
    said = re.findall(r"printf '([A-Z]+) ", text) + re.findall(r"^([A-Z]{2,}) [^\n]*$", "".join(_blocks(text)), re.MULTILINE)
    assert [verb for verb in said if verb not in VERBS] == []


def test_readme_promises_the_families_of_the_chip_table() -> None:
    text = (ROOT / "README.md").read_text()
    own = [chip for chip in CHIPS.values() if not chip.foreign and chip.parity == "E"]
    flashed = re.search(r"^\| flashed, proven, erased \| (.*) \|$", text, re.MULTILINE)
    unsure = re.search(r"^\| only once the configuration states the layout.*?\| (.*) \|$", text, re.MULTILINE)
    assert flashed is not None
    assert unsure is not None
    sure = {chip.pid for chip in own if chip.layout_confirmed and any(layout.confirmed for layout in chip.layouts)}
    assert flashed[1].split() == sorted({chip.family for chip in own if chip.pid in sure})
    whole, _, partly = unsure[1].partition("; some sizes and bank settings of ")
    for chip in own:
        if chip.pid not in sure:
            only_family = chip.family not in flashed[1].split()
            assert (chip.family if only_family else f"0x{chip.pid:03X}") in whole
    some = {chip.family for chip in own if chip.pid in sure and not all(layout.confirmed for layout in chip.layouts)}
    assert partly.partition(" (")[0].split() == sorted(some)


def test_the_first_screen_of_the_readme_says_what_this_is() -> None:
    text = " ".join("".join((ROOT / "README.md").read_text().splitlines(keepends=True)[:40]).split())
    for words in (
        *(
            "Staged whole",
            "local session",
            "submit and poll",
            "`nc`",
            "UART",
            "NRST and BOOT0 by gpiod",
            "systemd",
            "Prometheus",
        ),
        *(
            "The M4, the M7 and the H7",
            "NUCLEO-L476RG, -F756ZG, -H743ZI",
            "second-stage loader",
            "XMODEM",
            "serial port over TCP",
        ),
    ):
        assert words in text, words


def test_files_that_are_named_exist(page: Path) -> None:
    """Paths from the top of the repository, and within ``bridged/`` where the page of its rooms says them so."""
    named = re.findall(r"`((?:[\w.*-]+/)+[\w.*-]+\.(?:py|toml|c|h|md|sh|service|yml|lock|css|js))`", page.read_text())
    gone = [name for name in named if not any([*ROOT.glob(name), *(ROOT / "bridged").glob(name), *page.parent.glob(name)])]
    assert [name for name in gone if not name.startswith("share/")] == []


def test_the_index_leads_to_every_page() -> None:
    text = (ROOT / "docs" / "README.md").read_text()
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - set(re.findall(r"\]\(([\w-]+\.md)\)", text)) == {"README.md"}


def test_exit_codes_are_those_of_the_command_line() -> None:
    text = (ROOT / "docs" / "getting-started.md").read_text()
    documented = re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE)
    assert documented == [(str(code.value), meaning) for code, meaning in EXIT_TEXT.items()]


def test_commands_used_in_the_pages_exist(page: Path) -> None:
    text = page.read_text()
    used = set(re.findall(r"^(?:sudo )?bridged ([a-z][a-z-]*)", "".join(_blocks(text)), re.MULTILINE))
    used |= set(re.findall(r"`bridged ([a-z][a-z-]*)[^`]*`", text))
    known = subprocess.run([sys.executable, "-m", "bridged", "--help"], capture_output=True, text=True, check=True).stdout
    assert {command for command in used if f"\n    {command} " not in known} == set()


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
