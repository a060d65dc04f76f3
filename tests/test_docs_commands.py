"""Every command in the documentation: run against a gateway with simulated targets, or checked word by word where it cannot be.

What is meant by which block is said in ``tests/doc_commands.py``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from bridged import app, cli
from bridged.api.requests import KINDS, VERB_OF, values_of
from bridged.cli.arguments import EXAMPLES
from bridged.images.formats import parse
from bridged.jobs.model import JobKind
from bridged.protocol import line
from bridged.protocol.verbs import VERBS
from tests.doc_commands import LANGUAGES, PAGES, ROOT, Block, blocks, check, commands, inline
from tests.e2e.gateway import TIMING, Gateway, wait_for
from tests.images.builders import hex_text
from tests.support import free_port, require_tool

BY_PAGE = {
    str(page.relative_to(ROOT)): [block for block in blocks(page) if block.language == "sh" and not block.not_run]
    for page in PAGES
}
ELF = ROOT / "bridged" / "sim" / "firmware" / "f756.elf"
# Of what its readers do on machines of their own: shown, checked, and not run here.
REASONS = {
    "looks at or changes this machine",
    "needs a broker",
    "needs a target of yours",
    "asks for a password",
    "takes long",
    "needs systemd",
    "needs certificates of yours",
}


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request: pytest.FixtureRequest) -> Path:
    path = request.param
    assert isinstance(path, Path)
    return path


# --- what is only looked at


def test_each_block_says_what_it_is(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, block
        assert not block.not_run or block.language == "sh", block
        assert not block.not_run or block.not_run in REASONS, block
        if not block.language:
            said = re.search(r"^(\$ )?(bridged|sudo|make|nc|curl|printf|systemctl|python3?|pip) ", block.text, re.MULTILINE)
            assert said is None or said[0] == "$ nc ", f"a command in a block that is not called sh: {said}"
    assert page.read_text().count("```") == 2 * len(blocks(page)), "a block that was not found"


def test_each_command_can_be_typed(page: Path) -> None:
    for block in blocks(page):
        if block.language == "sh":
            for words in commands(block.text):
                check(words)
    for text in inline(page):
        if re.match(r"(bridged|sudo|make|systemctl|journalctl) [^…=]*$|(bridged|sudo|journalctl) [^…]*$", text):
            for words in commands(text):
                check(words)


def test_examples_of_the_help_can_be_typed() -> None:
    """Those at the end of ``--help``, of all and of each command."""
    choices = next(action for action in cli.whole_parser()._actions if isinstance(action, argparse._SubParsersAction)).choices
    said = [EXAMPLES, *(parser.epilog or "" for parser in choices.values())]
    typed = [re.sub(r"  +.*", "", row.strip()) for text in said for row in text.splitlines() if row.startswith("  bridged ")]
    assert len(typed) > 25
    for row in typed:
        check(row.split())


def test_each_request_is_understood(page: Path) -> None:
    """Of the line protocol, where one is spoken of: a verb, an option or a value that does not exist is found."""
    for text in inline(page):
        verb = VERBS.get(text.partition(" ")[0])
        if verb is None or " " not in text or re.search(r"[…<\[]| /", text):
            continue
        request = line.parse(text.encode())
        assert len(request.args) <= len(verb.args), text
        options = {option.name: option for option in verb.options}
        for name, value in request.options.items():
            assert name in options, f"{text}: {verb.name} has no {name}="
            if value and not re.search(r"[A-Z]{3}", value):  # Else it stands for a value.
                line.convert(verb.name, options[name], value)


def test_each_piece_of_data_is_what_it_says(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "json":
            for row in block.text.splitlines():
                json.loads(row)
        elif block.language == "python":
            ast.parse(block.text)
        elif block.language == "toml" and "[gateways." not in block.text:
            file, text = tmp_path / "bridged.toml", block.text
            if "[targets.motor1." in text and "[targets.motor1]" not in text:
                text += '[targets.motor1]\nport = "/dev/ttyAMA0"\n'
            if "[hawkbit]" in text or "[fleet]" in text or "[signing]" in text or "[tls]" in text:
                text = text.replace("/etc/bridged/", f"{tmp_path}/")
            file.write_text(text)
            app.read_config(file)


def test_metrics_page_has_configurations_that_prometheus_takes(tmp_path: Path) -> None:
    promtool = require_tool("promtool", "prometheus")
    (tmp_path / "bridged.rules.yml").write_text((ROOT / "config" / "prometheus" / "bridged.rules.yml").read_text())
    found = [block for block in blocks(ROOT / "docs" / "metrics.md") if block.language == "yaml"]
    assert len(found) == 2
    for block in found:
        for secret in re.findall(r"/etc/prometheus/([\w.-]+)", block.text):
            (tmp_path / secret).touch()
        (tmp_path / "prometheus.yml").write_text(block.text.replace("/etc/prometheus", str(tmp_path)))
        ran = subprocess.run(
            [promtool, "check", "config", "--syntax-only", str(tmp_path / "prometheus.yml")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr


def test_every_kind_of_job_is_explained_and_said_in_three_ways() -> None:
    text = (ROOT / "docs" / "jobs.md").read_text()
    rows = re.findall(r"^\| \[([\w-]+)\]\((#[\w-]+)\) \| `([^`]+)` \| `([^`]+)` \| `([^`]+)` \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == [str(kind) for kind in JobKind]
    for kind, anchor, typed, said, sent in rows:
        assert f"\n## {anchor[1:].replace('-and-', ' and ')}\n" in text
        assert typed.startswith("bridged ")
        assert KINDS[said.partition(" ")[0]] == kind
        body = json.loads(sent)
        assert body.pop("kind") == kind
        # Both mean the same.
        assert values_of(VERB_OF[JobKind(kind)], body | {"target": "motor1"}) == line.bind(line.parse(said.encode()))


def test_the_example_of_a_chip_is_a_row_of_the_table() -> None:
    (block,) = [block for block in blocks(ROOT / "docs" / "extending.md") if block.language == "python"]
    table = (ROOT / "bridged" / "chips" / "table_f2_f4_f7.py").read_text()
    assert " ".join(block.text.split()).rstrip(",") in " ".join(table.split())


# --- what is run


@dataclass
class Desk:
    """A gateway with simulated targets, and a directory with the files that the pages speak of."""

    gateway: Gateway
    folder: Path
    ports: dict[str, int]

    def run(self, block: Block, program: str = "") -> str:
        text = block.text
        for number, port in self.ports.items():
            text = re.sub(rf"\b{number}\b", str(port), text)
        if block.page == "docs/protection.md":
            text = re.sub(r"\bmotor1\b", "motor2", text)  # What is protected there would be in the way elsewhere.
        environment = {
            **os.environ,
            "PATH": f"{self.folder}/bin:{os.environ['PATH']}",
            "BRIDGED_GATEWAY": f"unix:{self.gateway.root}/bridged.sock",
            "BRIDGED_CLIENT_CONFIG": f"{self.folder}/client.toml",
        }
        command = [program, "-c", text] if program else ["bash", "-euo", "pipefail", "-c", text]
        ran = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert ran.returncode == 0, f"{block.page}:\n{text}\n--- ended with {ran.returncode}\n{ran.stdout}\n{ran.stderr}"
        return ran.stdout


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    for tool, package in (("bash", "bash"), ("nc", "netcat-openbsd"), ("curl", "curl")):
        require_tool(tool, package)
    root, folder = tmp_path_factory.mktemp("gw"), tmp_path_factory.mktemp("desk")
    (folder / "bin").mkdir()
    for name, words in (("bridged", f'"{sys.executable}" -m bridged "$@"'), ("sudo", '"$@"')):
        (folder / "bin" / name).write_text(f"#!/bin/sh\nexec {words}\n")
        (folder / "bin" / name).chmod(0o755)
    image = parse(ELF.read_bytes(), "elf", None)
    (start, code), *_ = [(segment.address, segment.data) for segment in image.segments]
    assert start == 0x08000000
    noise = bytes(1 + i % 251 for i in range(300_000))
    (folder / "app.elf").write_bytes(ELF.read_bytes())
    (folder / "boot.bin").write_bytes((code + noise)[:20_000])
    (folder / "app.bin.gz").write_bytes(gzip.compress(noise))
    (folder / "app.hex").write_text(hex_text([(0x08020000, noise[:5000])]))
    (folder / "client.toml").write_text(f'[gateways.lab]\naddress = "unix:{root}/bridged.sock"\n')
    ports = {"7100": free_port(), "7101": free_port(), "7102": free_port()}
    made = Gateway(
        root,
        {"motor1": "F756", "motor2": "F756", "nucleo-f756zg": "F756"},
        port=ports["7100"],
        http=f"127.0.0.1:{ports['7101']}",
        metrics=f"127.0.0.1:{ports['7102']}",
        extra=f'[auth]\nadmins = ["{os.getuid()}"]\n',
        application="listen_s = 0.05",
        settings={"timing": replace(TIMING, mass_erase_s=0.2)},
    )
    with made as gateway:
        yield Desk(gateway, folder, ports)


@pytest.mark.parametrize(
    "name", [name for name, found in BY_PAGE.items() if found and name not in ("docs/getting-started.md", "docs/images.md")]
)
def test_the_commands_of_a_page_work(desk: Desk, name: str) -> None:
    for block in BY_PAGE[name]:
        desk.run(block)


def test_what_images_md_shows_is_what_comes(desk: Desk) -> None:
    said = [desk.run(block) for block in BY_PAGE["docs/images.md"]]
    shown = [block.text for block in blocks(ROOT / "docs" / "images.md") if not block.language]
    assert said[-1] == shown[-1]


def test_the_python_example_works(desk: Desk) -> None:
    (block,) = [block for block in blocks(ROOT / "docs" / "client.md") if block.language == "python"]
    assert "full\n" in desk.run(block, sys.executable)


def test_getting_started_word_for_word(desk: Desk, tmp_path: Path) -> None:
    """Three terminals; other ports, another directory than /tmp, and a wire that takes no time: the rest as it stands."""
    page = ROOT / "docs" / "getting-started.md"
    _, simulated, served, you, by_command = (block.text for block in BY_PAGE["docs/getting-started.md"])
    simulated = simulated.rstrip() + " --baud-unpaced\n"
    settings = next(block.text for block in blocks(page) if block.language == "toml")
    ports = {"7100": free_port(), "7101": free_port(), "7102": free_port()}
    listen = f'[api]\nlisten = "127.0.0.1:{ports["7100"]}"\nhttp = ""\nmetrics = "127.0.0.1:{ports["7102"]}"\n'
    (tmp_path / "demo.toml").write_text(settings.replace("/tmp/", f"{tmp_path}/").replace("[api]\n", listen))
    (tmp_path / "bridged" / "sim" / "firmware").mkdir(parents=True)
    (tmp_path / "bridged" / "sim" / "firmware" / "f756.elf").write_bytes(ELF.read_bytes())
    (tmp_path / "bin").symlink_to(desk.folder / "bin")
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}

    def start(stack: contextlib.ExitStack, text: str) -> None:
        script = "".join(f"{row}\n" for row in text.replace("/tmp/", f"{tmp_path}/").splitlines()[:-1])
        last = text.replace("/tmp/", f"{tmp_path}/").splitlines()[-1]
        process = subprocess.Popen(
            ["bash", "-ec", f"{script}exec {last}"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
        )
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)

    with contextlib.ExitStack() as stack:
        start(stack, simulated)
        wait_for("the simulated part", (tmp_path / "f756.tty").exists)
        start(stack, served)
        wait_for("the daemon", (tmp_path / "bridged.sock").exists)
        for number, port in ports.items():
            you = re.sub(rf"\b{number}\b", str(port), you)
        ran = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"{you}\n{by_command}"],
            cwd=tmp_path,
            env={**environment, "BRIDGED_GATEWAY": f"127.0.0.1:{ports['7100']}"},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"^250 .*state=succeeded", ran.stdout, re.MULTILINE), ran.stdout
    assert re.search(r"^251 ", ran.stdout, re.MULTILINE), ran.stdout
    assert 'bridged_jobs_total{kind="flash",result="succeeded",target="motor1"} 1.0' in ran.stdout
