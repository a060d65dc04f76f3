"""The command line as a process, against the real line server with strict jobs behind it, and a link that breaks.

Every command is asked of the same gateway, so they are one file.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from bridged import cli
from bridged.api.line import LineServer
from bridged.api.line_link import Limits
from bridged.cli import whole_parser
from bridged.cli.exits import EXIT_TEXT, Exit, exit_code
from bridged.cli.screen import Screen
from bridged.cli.texts import outcome, plan_text, size_text, table
from bridged.client import LocalFile
from bridged.client.gateway import Address
from bridged.config.values import Listen
from bridged.errors import (
    BY_CODE,
    BadRequest,
    BridgedError,
    ImageDoesNotFit,
    Nack,
    NoSync,
    NotAllowed,
    PortBusy,
    QueueFull,
    VerifyError,
    WrongChip,
)
from bridged.jobs.model import JobKind, JobState
from bridged.protocol.reply import Reply, error_reply
from bridged.protocol.verbs import VERBS
from tests.api.fakes import PLANNED, FakeJobs, Script, WatchedStore
from tests.support import unread_pipe

STEPS = [("sync", 0, 0), ("write", 2048, 4096), ("write", 4096, 4096), ("verify", 4096, 4096)]
RESULT = {
    "changed": True,
    "evidence": "full",
    "bytes_written": 4096,
    "sectors_erased": 1,
    "seconds": 1.5,
    "banner": "hello 1.0\r\n",
}

PLAN = """\
motor1: STM32F74x/F75x, 1 MiB flash, layout single

  app.bin  0x08000000..0x080083ff  33 KiB

  erase, write        0x08000000..0x08007fff  1 sector (0)      32 KiB  32 KiB written
  erase, write, keep  0x08008000..0x0800ffff  1 sector (1)      32 KiB  1 KiB written, 31 KiB kept
  stays as it is      0x08010000..0x0801ffff  2 sectors (2..3)  64 KiB

erases 2 sectors, 64 KiB; writes 33 KiB; reads 31 KiB outside the image and puts them back; 960 KiB stay untouched
takes about 9.2 s at 115200 baud, 0.5 s of it erasing; up to 15 s if none of the kept bytes is blank
assumed, not known: flash of 1024 KiB, the largest of this chip; `bridged id motor1` asks the chip
"""


class Gateway:
    """The line server in a thread of its own; ``link`` is a way to it that can be made to break."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loop = asyncio.new_event_loop()
        self.store = WatchedStore(root)
        self.jobs = FakeJobs(self.store)
        self.port = self.link = 0
        self.cuts: list[int] = []  # After so many bytes from the client the connection is cut, one entry each connection.
        self.connections = 0
        self.gate = asyncio.Event()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._start())

    def run(self, what: object) -> object:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(20)  # type: ignore[arg-type]

    async def _start(self) -> None:
        self.server = LineServer(self.jobs, self.store, "gw1", Limits(linger_s=0.1, heartbeat_s=0.2))
        self.port = await self.server.listen_tcp(Listen("127.0.0.1", 0))
        await self.server.listen_unix(self.root / "gw.sock")
        proxy = await asyncio.start_server(self._proxy, "127.0.0.1", 0)
        self.link = proxy.sockets[0].getsockname()[1]

    async def _proxy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        budget = self.cuts.pop(0) if self.cuts else 1 << 40
        to_server = await asyncio.open_connection("127.0.0.1", self.port)

        async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter, limit: int) -> None:
            with contextlib.suppress(ConnectionError):
                while limit > 0 and (data := await source.read(min(65536, limit))):
                    limit -= len(data)
                    sink.write(data)
                    await sink.drain()
            for end in (writer, to_server[1]):
                end.transport.abort()

        await asyncio.gather(forward(reader, to_server[1], budget), forward(to_server[0], writer, 1 << 40))

    def open_gate(self) -> None:
        self.loop.call_soon_threadsafe(self.gate.set)

    def stop(self) -> None:
        self.run(self.server.stop())
        self.run(self.jobs.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Gateway]:
    (tmp_path / "store").mkdir()
    found = Gateway(tmp_path / "store")
    yield found
    found.stop()
    assert not found.jobs.surprises
    assert not found.jobs.scripts, "a job that was expected has not been asked for"


def command(*args: str, where: str) -> list[str]:
    return [sys.executable, "-m", "bridged", "--gateway", where, *args]


def bridged(
    gateway: Gateway | None, *args: str, link: bool = False, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    where = f"127.0.0.1:{(gateway.link if link else gateway.port) if gateway else 1}"
    return subprocess.run(
        command(*args, where=where), capture_output=True, text=True, timeout=30, check=False, cwd=cwd, env=environment()
    )


def start(gateway: Gateway, *args: str, link: bool = False) -> subprocess.Popen[str]:
    where = f"127.0.0.1:{gateway.link if link else gateway.port}"
    return subprocess.Popen(
        command(*args, where=where), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )


def environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parent.parent)
    return {**os.environ, "PYTHONPATH": root, "TERM": "xterm"}


def app_file(tmp_path: Path, data: bytes) -> tuple[Path, str]:
    path = tmp_path / "app.elf"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


# --- the whole way ------------------------------------------------------------------------------------------------


def test_flash_uploads_waits_and_says_what_was_proven(gateway: Gateway, tmp_path: Path) -> None:
    path, digest = app_file(tmp_path, b"firmware" * 512)
    gateway.jobs.expect(Script(JobKind.FLASH, "motor1", digest, {}, STEPS, result=RESULT, gate=gateway.gate))
    process = start(gateway, "flash", "motor1", str(path))
    assert process.stderr is not None
    said = [process.stderr.readline()]
    while "verify" not in said[-1]:  # How many of the phases before it are seen is a matter of timing.
        said.append(process.stderr.readline())
    gateway.open_gate()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert out.splitlines() == [
        "motor1: done in 1.5 s: 4.0 KiB written, 1 sector erased; every byte read back and compared",
        "  it says: hello 1.0",
    ]
    assert said[0] == "app.elf: upload, 100 %, 4.0 KiB of 4.0 KiB\n"
    assert said[-1] == "motor1: verify, 100 %, 4.0 KiB of 4.0 KiB, 10.5 kB/s\n"
    assert gateway.store.get("app.elf").sha256 == digest
    # It is there already, so nothing is sent again; and the flash options reach the job.
    params = {"type": "bin", "outside": "discard", "entry": "one-shot", "force": "vectors"}
    gateway.jobs.expect(
        Script(JobKind.ENSURE, "motor1", f"{digest}@0x08000000", params, result=RESULT | {"changed": False, "evidence": "full"})
    )
    params["evidence"] = "sample"
    options = ["--addr", "0x08000000", "--type", "bin", "--discard-outside", "--one-shot", "--force", "vectors"]
    options += ["--evidence", "sample"]
    done = bridged(gateway, "ensure", "motor1", str(path), *options)
    assert (done.returncode, done.stdout.splitlines()[0]) == (
        0,
        "motor1: nothing to do: the image is there already (evidence: full)",
    )
    assert "upload" not in done.stderr
    gateway.jobs.expect(Script(JobKind.VERIFY, "motor2", digest, {}, STEPS, result={"bytes_compared": 4096}))
    done = bridged(gateway, "verify", "motor2", f"sha256:{digest}")
    assert done.stdout == "motor2: equal: 4.0 KiB compared\n"


# Options of the protocol that have another name on the command line, or stand for what the command line does by itself.
SAID = {
    "outside": "--discard-outside",
    "entry": "--one-shot",
    "wait": "--no-wait",
    "mode": {"FLASH": "--full", "RESET": "--boot"},
    "fields": "--field",
    "what": {"PROTECT": "--sectors", "UNPROTECT": "--write"},
    "from": "--from",
    "offset": None,  # an upload goes on by itself
    "verify": None,  # it has one value only
    "timeout": None,
}
COMMANDS = {"ID": "id", "DOCTOR": "examine", "INFO": "status", "WAIT": "watch", "GET": "read", "HAVE": "put"}
TALK = {"HELP", "PING", "QUIT", "HELLO", "AUTH", "TOKEN"}  # TOKEN has commands below it


def test_whatever_the_protocol_offers_the_command_line_offers() -> None:
    top = next(action for action in whole_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for verb in VERBS.values():
        if verb.name in TALK:
            continue
        command = top.choices[COMMANDS.get(verb.name, verb.name.lower())]
        flags = {flag: action for action in command._actions for flag in action.option_strings}
        for param in verb.options:
            said: Any = SAID.get(param.name, f"--{param.name}")
            flag = said.get(verb.name) if isinstance(said, dict) else said
            if flag is None:
                continue
            assert flag in flags, f"{verb.name} {param.name}=: `bridged {command.prog}` has no {flag}"
            offered = flags[flag].choices
            if param.kind == "list" and param.choices:
                assert set(offered or ()) == set(param.choices), f"{verb.name} {param.name}="


def test_several_files_and_patches_are_one_job(gateway: Gateway, tmp_path: Path) -> None:
    """Each file is sent; a name that the protocol could not say becomes one that it can; a file wins over an address."""
    files = {"boot.bin": b"boot", "app,v2.hex": b"app", "data@0x08000000": b"data"}
    digests = {}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()
    staged = gateway.store.add(b"settings")
    wanted = f"{digests['boot.bin']}@0x08000000,{digests['app,v2.hex']},{digests['data@0x08000000']},{staged}@0x0801f000"
    params = {"patch": "0x0801fff0:00aa,0x0801fff8:bb"}
    gateway.jobs.expect(Script(JobKind.FLASH, "motor1", wanted, params, result=RESULT))
    named = [f"{tmp_path}/boot.bin@0x08000000", f"{tmp_path}/app,v2.hex", f"{tmp_path}/data@0x08000000"]
    patches = ["--patch", "0x0801fff8:BB", "--patch", "0x0801fff0:00aa"]
    done = bridged(gateway, "flash", "motor1", *named, f"sha256:{staged}@0x801f000", *patches)
    assert (done.returncode, done.stdout.splitlines()[0][:12]) == (0, "motor1: done"), done.stderr
    assert gateway.store.get("app_v2.hex").sha256 == digests["app,v2.hex"]
    assert gateway.store.get("data_0x08000000").sha256 == digests["data@0x08000000"]
    missing = bridged(gateway, "flash", "motor1", f"{tmp_path}/none.bin@0x08000000")
    assert (missing.returncode, f"{tmp_path}/none.bin failed" in missing.stderr) == (Exit.USAGE, True)
    long = bridged(gateway, "flash", "motor1", named[0], "--patch", f"0x08000000:{'00' * 1000}")
    assert (long.returncode, "at most 1024" in long.stderr) == (Exit.USAGE, True)


def plan_of(**changes: Any) -> str:
    data = {**PLANNED, **changes}
    return plan_text(data, data["part"], data["range"])


def test_a_plan_that_loses_bytes_says_so_loudly() -> None:
    lose = {**PLANNED["range"][1], "action": "lose", "keep_bytes": 0, "lose_bytes": 31744}
    text = plan_of(range=[lose], keep_bytes=0, lose_bytes=31744, seconds_most=9.25, assumed=[], proven=True)
    assert "erase, write, LOSE  0x08008000..0x0800ffff  1 sector (1)  32 KiB  1 KiB written, 31 KiB LOST" in text
    assert "; LOSES 31 KiB outside the image; 960 KiB stay untouched" in text
    assert "up to" not in text
    assert "assumed" not in text
    assert text.endswith("this very content was proven in the target last: `bridged ensure` would only compare it")


def test_a_plan_joins_what_stays_whatever_the_sizes_of_its_sectors() -> None:
    stay = PLANNED["range"][2]
    large = {**stay, "address": stay["end"], "end": 0x08080000, "sectors": 3, "first": 4, "last": 6, "sector_bytes": 131072}
    text = plan_of(range=[*PLANNED["range"], large])
    assert "  stays as it is      0x08010000..0x0807ffff  5 sectors (2..6)  448 KiB\n" in text


def test_a_plan_is_exact_to_the_byte() -> None:
    parts = [
        {"name": "app.hex", "start": 0x08000000, "end": 0x08000401},
        {"name": "patch", "start": 0x0801FFF0, "end": 0x0801FFF8},
    ]
    lines = plan_of(part=parts, stay_bytes=0, seconds=150.0, seconds_most=200.0).splitlines()
    assert lines[2:4] == ["  app.hex  0x08000000..0x08000400  1025 B", "  patch    0x0801fff0..0x0801fff7     8 B"]
    assert "untouched" not in lines[-3]
    assert lines[-2].startswith("takes about 2.5 min at 115200 baud, 0.5 s of it erasing; up to 3.3 min if none of")


@pytest.mark.parametrize(
    ("end", "error", "code"),
    [
        (JobState.FAILED, Nack("Write Memory at 0x08004000, data frame: NACK"), Exit.FAILED),
        (JobState.FAILED, VerifyError("0x08000010: expected 12, found FF", address=0x08000010), Exit.MISMATCH),
        (JobState.FAILED, NoSync("0x7F sent 3 times: no byte came"), Exit.NO_TARGET),
        (JobState.FAILED, PortBusy("/dev/ttyUSB0 is held by process 7"), Exit.BUSY),
        (JobState.FAILED, WrongChip("F407 answered, F756 was configured"), Exit.REJECTED),
        (JobState.ROLLED_BACK, VerifyError("the new image differed"), Exit.ROLLED_BACK),
        (JobState.REJECTED, ImageDoesNotFit("0x08100000 lies beyond the flash"), Exit.REJECTED),
        (JobState.CANCELED, None, Exit.CANCELED),
        (JobState.TIMED_OUT, None, Exit.TIMED_OUT),
    ],
)
def test_exit_codes_of_jobs(gateway: Gateway, end: JobState, error: BridgedError | None, code: Exit) -> None:
    gateway.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, STEPS, end=end, error=error))
    done = bridged(gateway, "id", "motor1")
    assert done.returncode == code
    assert done.stdout == ""
    told = [line for line in done.stderr.splitlines() if not line.startswith("motor1: ")]
    assert told[0].startswith("bridged: motor1: ")
    assert [line.split(":")[0] for line in told[1:3]] == ["  cause", "  remedy"]
    assert f"j1 {end}" in told[3]
    if error is not None:
        assert error.message in told[0]
        assert error.code in told[0]


def test_a_pipe_that_is_closed_changes_no_exit_code(gateway: Gateway) -> None:
    """`bridged flash ... 2>&1 | head -1` of a script with `pipefail`: the job goes on, and how it ends is what counts."""
    error = VerifyError("0x08000010: expected 12, found FF", address=0x08000010)
    gateway.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, STEPS, end=JobState.FAILED, error=error, gate=gateway.gate))

    def unread(*args: str, lines: int) -> subprocess.Popen[str]:
        where = f"127.0.0.1:{gateway.port}"
        made = subprocess.Popen(
            command(*args, where=where), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
        )
        assert made.stdout is not None
        for _ in range(lines):
            assert made.stdout.readline()
        made.stdout.close()
        return made

    following = [unread("id", "motor1", lines=1), unread("--json", "watch", "j1", lines=1)]
    everything = unread("watch", lines=0)
    gateway.open_gate()
    assert [process.wait(20) for process in following] == [Exit.MISMATCH, Exit.MISMATCH]
    # What only looks has said what it can, and what is refused is refused.
    assert unread("jobs", lines=0).wait(20) == Exit.DONE
    assert unread("id", "motor9", lines=0).wait(20) == Exit.NO_TARGET
    gateway.jobs.expect(Script(JobKind.RESET, "motor1", "", {}, STEPS))
    assert bridged(gateway, "reset", "motor1").returncode == 0
    assert everything.wait(20) == Exit.DONE, "it would watch for nobody"
    # A full disk is no reader who has enough.
    gateway.jobs.expect(Script(JobKind.RESET, "motor1", "", {}, STEPS), Script(JobKind.RESET, "motor1", "", {}, STEPS))
    for words, code in [
        (["jobs"], Exit.USAGE),
        (["reset", "motor1"], Exit.DONE),
        (["reset", "motor1", "--no-wait"], Exit.USAGE),
    ]:
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                command(*words, where=f"127.0.0.1:{gateway.port}"),
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
                env=environment(),
            )
        assert (done.returncode, "No space left" in done.stderr) == (code, True), words


def test_commands_of_other_rooms_end_as_they_end_whoever_reads(tmp_path: Path) -> None:
    """They print by themselves. A roll-out whose lines go to `| head -3` is not to be left in its middle."""
    (tmp_path / "bad.toml").write_text("[targets.m]\nport = 5\n")
    for words, code in [
        (["init", "--config", str(tmp_path / "made.toml"), "--print", "--defaults", "--port", "/dev/ttyS0"], 0),
        (["init", "--config", str(tmp_path / "bad.toml"), "--print", "--defaults", "--port", "/dev/ttyS0"], 1),
        (["doctor", "--config", str(tmp_path / "none.toml"), "--all"], 1),
        (["fleet", "permissions", "gw1"], 0),
        (["check-config", str(tmp_path / "bad.toml")], 78),
        (["check-config", str(tmp_path / "bad.toml"), "--json"], 78),
    ]:
        with open("/dev/full", "w") as full, unread_pipe() as nobody:
            ends = {name: run_by(words, stdout) for name, stdout in (("", subprocess.PIPE), ("pipe", nobody), ("disk", full))}
            both = run_by(words, nobody, nobody)  # As `2>&1 | head -1`.
        assert ends[""].returncode == code, ends[""].stderr
        assert ends["pipe"].returncode == code, ends["pipe"].stderr
        printed = bool(ends[""].stdout)
        assert ("No space left" in ends["disk"].stderr) is printed, words
        assert ends["disk"].returncode == (code or (Exit.USAGE if printed else 0))
        assert not any("Traceback" in done.stderr or "Exception ignored" in done.stderr for done in ends.values())
        assert both.returncode == code


def run_by(words: list[str], stdout: int | IO[str], stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "bridged", *words]
    return subprocess.run(
        line, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True, check=False, env=environment(), timeout=60
    )


def test_exit_codes_of_refusals(gateway: Gateway, tmp_path: Path) -> None:
    path, _ = app_file(tmp_path, b"x")
    for args, code, text in [
        (["id", "motor9"], Exit.NO_TARGET, "UNKNOWN_TARGET"),
        (["flash", "motor1", "nothing.elf"], Exit.USAGE, "No such file"),
        (["flash", "motor1", "sha256:" + "0" * 64], Exit.USAGE, "UNKNOWN_IMAGE"),
        (["erase", "motor1", "0x08000000"], Exit.USAGE, "ADDR+LEN"),
        (["read", "motor1", "0", "16", "-o", str(tmp_path)], Exit.USAGE, "name of a file"),
        (["read", "motor1", "0", "16", "-o", "/dev/stdout"], Exit.USAGE, "among the bytes"),
        (["cancel", "j9"], Exit.USAGE, "UNKNOWN_JOB"),
        (["trace", str(path)], Exit.USAGE, "no line of a recording"),
        (["jobs", "--state", "done"], Exit.USAGE, "succeeded"),
        (["frobnicate"], Exit.USAGE, "invalid choice"),
        (["flash", "motor1"], Exit.USAGE, "required"),
        (["put", str(path), "--name", "ü"], Exit.USAGE, "printable ASCII"),
        (["--retry-for", "x", "jobs"], Exit.USAGE, "invalid"),
    ]:
        done = bridged(gateway, *args)
        assert (done.returncode, text in done.stderr) == (code, True), (args, done.stderr)
        assert "Traceback" not in done.stderr
    gateway.jobs.refuse = QueueFull("100 jobs wait")
    assert bridged(gateway, "id", "motor1").returncode == Exit.BUSY
    gateway.jobs.refuse = NotAllowed("not now")
    assert bridged(gateway, "id", "motor1").returncode == Exit.NOT_ALLOWED


def test_what_this_machine_refuses_is_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    for name in ("a..b", "plaintext:" + "a" * 64):
        assert cli.main(["-g", name, "targets"]) == Exit.USAGE
        assert "no name that a host can have" in capsys.readouterr().err
    closed = tmp_path / "closed"
    closed.mkdir(0)
    (tmp_path / "closed-file").touch(0)
    somebody = os.geteuid()
    if somebody == 0:
        tmp_path.chmod(0o755)
        os.seteuid(65534)
    try:
        for args, text in (
            (["read", "motor1", "0", "16", "-o", str(closed / "x")], "cannot be written"),
            (["read", "motor1", "0", "16", "-o", str(closed)], "cannot be written"),
            (["trace", str(closed / "x")], "you may not read it"),
            (["trace", str(tmp_path / "closed-file")], "you may not read it" if somebody == 0 else "Permission denied"),
        ):
            code = cli.main(["-g", "127.0.0.1:1", *args])
            said = capsys.readouterr().err
            assert (code, text in said) == (Exit.USAGE, True), said
    finally:
        os.seteuid(somebody)


def test_a_gateway_that_is_not_there() -> None:
    done = bridged(None, "targets")
    assert done.returncode == Exit.UNREACHABLE
    assert "remedy: Start it" in done.stderr
    done = bridged(None, "--json", "targets")
    shape = json.loads(done.stdout)
    assert (done.returncode, shape["text"], done.stderr) == (Exit.UNREACHABLE, "DAEMON_UNREACHABLE", "")


def test_something_else_answers_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            peer, _ = server.accept()
            peer.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")
            peer.close()

        thread = threading.Thread(target=answer)
        thread.start()
        where = f"127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            command("jobs", where=where), capture_output=True, text=True, timeout=20, check=False, env=environment()
        )
        thread.join()
    assert done.returncode == Exit.UNREACHABLE
    assert "not as bridged does" in done.stderr


# --- a link that breaks -------------------------------------------------------------------------------------------


def test_an_upload_goes_on_where_the_gateway_has_it(gateway: Gateway, tmp_path: Path) -> None:
    data = os.urandom(700_000)
    path, digest = app_file(tmp_path, data)
    gateway.cuts = [300_000, 200_000, 0]
    gateway.jobs.expect(Script(JobKind.FLASH, "motor1", digest, {}, STEPS, result=RESULT))
    done = bridged(gateway, "flash", "motor1", str(path), link=True)
    assert done.returncode == 0, done.stderr
    assert "connection lost" in done.stderr
    assert "connected again" in done.stderr
    assert gateway.connections >= 4
    # Not everything was sent again: the offsets of the uploads grow.
    offsets = [upload._announced.offset for upload in gateway.store.uploads]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0 < offsets[-1]
    assert len(gateway.jobs.submissions) == 1


@pytest.mark.parametrize("cut", range(30, 160, 13))
def test_a_submission_whose_answer_is_lost_starts_one_job_only(gateway: Gateway, cut: int) -> None:
    """Wherever the bytes of the client end: before, within or after the line of the job."""
    gateway.cuts = [cut, cut]
    gateway.jobs.expect(Script(JobKind.RESET, "motor1", "", {}, STEPS, result={"seconds": 0.5}))
    done = bridged(gateway, "reset", "motor1", link=True)
    assert (done.returncode, done.stdout) == (0, "motor1: reset done in 0.5 s\n"), done.stderr
    assert len(gateway.jobs.jobs) == 1


def test_waiting_goes_on_after_a_lost_link_and_gives_up_in_time(gateway: Gateway) -> None:
    gateway.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, STEPS, gate=gateway.gate))
    process = start(gateway, "id", "motor1", link=True)
    assert process.stderr is not None
    _until(lambda: bool(gateway.jobs.watchers))
    gateway.run(_drop_all(gateway))
    assert any("connection lost" in line for line in iter(process.stderr.readline, ""))
    _until(lambda: bool(gateway.jobs.watchers))
    gateway.open_gate()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "motor1" in out
    # The gateway goes away for good while a job runs.
    gateway.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, STEPS, gate=asyncio.Event()))
    process = start(gateway, "id", "motor1", "--retry-for", "0.3")
    _until(lambda: bool(gateway.jobs.watchers))
    gateway.run(gateway.server.stop())
    _, err = process.communicate(timeout=20)
    assert process.returncode == Exit.UNREACHABLE
    assert "bridged watch j2" in err


def test_watching_goes_on_after_a_lost_link(gateway: Gateway) -> None:
    process = start(gateway, "watch", link=True)
    assert process.stdout is not None
    assert process.stderr is not None
    before: set[object] = set()
    for job in ("j1", "j2"):
        _until(lambda before=before: bool(gateway.jobs.watchers - before))  # type: ignore[misc]
        gateway.jobs.expect(Script(JobKind.RESET, "motor1", "", {}, STEPS))
        assert bridged(gateway, "reset", "motor1").returncode == 0
        while job not in (line := process.stdout.readline()) or "succeeded" not in line:
            assert line, process.stderr.read()
        before = set(gateway.jobs.watchers)
        gateway.run(_drop_all(gateway))
        assert any("connection lost" in text for text in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == Exit.INTERRUPTED


async def _drop_all(gateway: Gateway) -> None:
    for connection in gateway.server._connections.values():
        connection.writer.transport.abort()


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_control_c_leaves_the_job_running(gateway: Gateway) -> None:
    gateway.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, STEPS, gate=asyncio.Event()))
    process = start(gateway, "id", "motor1")
    assert process.stderr is not None
    assert "motor1" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == Exit.INTERRUPTED
    assert "job j1 goes on; follow it: bridged watch j1, stop it: bridged cancel j1" in err
    assert "Traceback" not in err
    assert gateway.jobs.get("j1").state is JobState.RUNNING


def test_a_file_that_shrinks_while_it_is_sent_is_never_staged(gateway: Gateway, tmp_path: Path) -> None:
    path, digest = app_file(tmp_path, b"x" * 15_000_000)  # More than all socket buffers on the way can hold.

    def shrink(_offset: int) -> None:
        os.truncate(path, 200_000)

    gateway.store.on_write = shrink
    done = bridged(gateway, "put", str(path))
    assert (done.returncode, "DIGEST_MISMATCH" in done.stderr) == (Exit.FAILED, True)
    assert gateway.store.have(digest) == (0, None, False)


# --- looking, and other commands ----------------------------------------------------------------------------------


def test_read_writes_the_file_whole_or_not_at_all(gateway: Gateway, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    gateway.jobs.results["j1"] = tmp_path / "result"
    gateway.jobs.results["j1"].write_bytes(data)
    result = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    script = Script(JobKind.READ, "motor1", "", {"address": 0x08000000, "length": 300_000}, STEPS, result=result)
    gateway.jobs.expect(script)
    out = tmp_path / "dump.bin"
    done = bridged(gateway, "read", "motor1", "0x08000000", "300000", "-o", str(out))
    assert (done.returncode, out.read_bytes()) == (0, data), done.stderr
    assert list(tmp_path.glob(".*")) == []
    failed = Script(JobKind.READ, "motor1", "", script.params, STEPS, end=JobState.FAILED, error=NoSync("silence"))
    gateway.jobs.expect(failed)
    other = tmp_path / "other.bin"
    assert bridged(gateway, "read", "motor1", "0x08000000", "300000", "-o", str(other)).returncode == Exit.NO_TARGET
    assert not other.exists()


def test_looking_at_jobs_and_targets(gateway: Gateway, tmp_path: Path) -> None:
    path, digest = app_file(tmp_path, b"firmware")
    gateway.jobs.expect(Script(JobKind.FLASH, "motor1", digest, {}, [("write", 5, 10)], gate=asyncio.Event()))
    done = bridged(gateway, "flash", "motor1", str(path), "--no-wait", "--id", "release-42")
    assert (done.returncode, done.stdout) == (0, "j1\n")
    assert bridged(gateway, "flash", "motor1", str(path), "--no-wait", "--id", "release-42").stdout == "j1\n"
    targets = bridged(gateway, "targets").stdout.splitlines()
    assert targets[0].split() == ["TARGET", "STATE", "CHIP", "PROVEN", "QUEUED"]
    assert targets[1].split() == ["motor1", "idle", "F756", "2023-11-14T22:13:20.000Z", "0"]
    jobs = bridged(gateway, "jobs", "--target", "motor1").stdout.splitlines()
    assert jobs[1].split()[:5] == ["j1", "flash", "motor1", "running", "write"]
    assert bridged(gateway, "jobs", "--target", "motor2").stdout == "no jobs\n"
    assert re.search(r"^state +running$", bridged(gateway, "status", "j1").stdout, re.MULTILINE)
    assert re.search(r"^chip +F756$", bridged(gateway, "status", "motor1").stdout, re.MULTILINE)
    assert bridged(gateway, "status", "motor9").returncode == Exit.USAGE
    assert bridged(gateway, "status").stdout.startswith("TARGET")
    assert bridged(gateway, "plan", "motor1", str(path)).stdout == PLAN
    assert "running write 5/10 B" in bridged(gateway, "log", "j1").stdout
    refused = bridged(gateway, "cancel", "j1")
    assert (refused.returncode, "NOT_CANCELLABLE" in refused.stderr) == (Exit.BUSY, True)
    assert bridged(gateway, "cancel", "j1", "--force").stdout == "job j1: canceled\n"
    assert bridged(gateway, "watch", "j1").returncode == Exit.CANCELED


def test_the_recording_of_a_failed_job_is_named_and_explained(gateway: Gateway, tmp_path: Path) -> None:
    text = (Path(__file__).parent / "protocol" / "recordings" / "nack.txt").read_text()
    gateway.jobs.traces.save("j1", text)
    gateway.jobs.expect(Script(JobKind.IDENTIFY, "motor1", end=JobState.FAILED, error=Nack("Write Memory: NACK")))
    failed = bridged(gateway, "id", "motor1")
    assert failed.returncode == Exit.FAILED
    assert "what was sent and answered: bridged trace j1\n" in failed.stderr

    shown = bridged(gateway, "trace", "j1")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout == (Path(__file__).parent / "protocol" / "recordings" / "nack.table").read_text()
    everything = bridged(gateway, "trace", "j1", "--all").stdout
    assert everything.count("Write Memory ") > shown.stdout.count("Write Memory ")

    raw = bridged(gateway, "trace", "j1", "--raw")
    assert (raw.returncode, raw.stdout) == (0, text)
    (tmp_path / "sent-to-us.txt").write_text(raw.stdout)
    assert bridged(None, "trace", str(tmp_path / "sent-to-us.txt")).stdout == shown.stdout, "no gateway is needed for a file"

    objects = [json.loads(line) for line in bridged(gateway, "trace", "j1", "--json").stdout.splitlines()]
    refused = [o for o in objects if o.get("answer") == "NACK"]
    assert [(o["command"], o["address"], o["length"], o["flags"]) for o in refused] == [
        ("Write Memory", "0x08000400", 256, ["NACK (data)"])
    ]
    assert objects[-1]["event"] == "summary"

    missing = bridged(gateway, "trace", "j9")
    assert (missing.returncode, "UNKNOWN_JOB" in missing.stderr) == (Exit.USAGE, True)
    assert bridged(gateway, "trace", "j1", "--raw", "--all").returncode == Exit.USAGE


def test_json_is_the_gateways_replies(gateway: Gateway, tmp_path: Path) -> None:
    path, digest = app_file(tmp_path, b"firmware")
    gateway.jobs.expect(Script(JobKind.FLASH, "motor1", digest, {}, STEPS, result=RESULT, gate=gateway.gate))
    process = start(gateway, "--json", "flash", "motor1", str(path))
    assert process.stdout is not None
    said = ""
    while '"phase":"verify"' not in said:
        said += process.stdout.readline()
    gateway.open_gate()
    out, err = process.communicate(timeout=20)
    shapes = [json.loads(line) for line in (said + out).splitlines()]
    assert err == ""
    assert shapes[-1]["data"]["evidence"] == "full"
    assert {150, 250} == {shape["code"] for shape in shapes}
    missing = json.loads(bridged(gateway, "status", "j7", "--json").stdout)
    assert missing["text"] == "UNKNOWN_JOB"


def test_unix_socket_and_environment(gateway: Gateway) -> None:
    env = {**environment(), "BRIDGED_GATEWAY": f"unix:{gateway.root / 'gw.sock'}"}
    done = subprocess.run(
        [sys.executable, "-m", "bridged", "targets"], capture_output=True, text=True, timeout=20, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "motor2" in done.stdout


def test_on_a_terminal_progress_is_one_line_that_is_rewritten(gateway: Gateway) -> None:
    gateway.jobs.expect(Script(JobKind.IDENTIFY, "motor1", "", {}, STEPS, result={"names": "STM32F756"}, gate=gateway.gate))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        command("id", "motor1", where=f"127.0.0.1:{gateway.port}"), stdout=subprocess.PIPE, stderr=slave, env=environment()
    )
    os.close(slave)
    shown = os.read(master, 65536)
    gateway.open_gate()
    out, _ = process.communicate(timeout=20)
    with contextlib.suppress(OSError):
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    assert b"STM32F756" in out
    assert b"\n" not in shown
    assert shown.count(b"\r") >= 2
    assert shown.endswith(b"\r")


def test_help_is_quick_and_complete() -> None:
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "bridged", "--help"], capture_output=True, text=True, timeout=20, check=True)
    seconds = time.monotonic() - started
    for text in ("serve", "demo", "check-config", "ensure", "exit codes:", "69", "BRIDGED_GATEWAY"):
        assert text in done.stdout
    assert all(str(code.value) in done.stdout for code in EXIT_TEXT)
    assert seconds < 5  # A machine under load; what counts is below.
    loaded = subprocess.run(
        [sys.executable, "-c", "import bridged.cli, sys; print(' '.join(sys.modules))"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    ).stdout.split()
    heavy = {"asyncio", "aiohttp", "prometheus_client", "rich", "serial", "gpiod", "ssl", "bridged.app", "bridged.api"}
    assert not heavy & set(loaded)


def test_json_is_understood_by_what_needs_no_gateway_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--json", "-g", "bad gateway", "targets"]) == 2
    assert json.loads(capsys.readouterr().out)["text"] == "BAD_REQUEST"
    (tmp_path / "b.toml").write_text("x = 1")
    assert cli.main(["--json", "check-config", str(tmp_path / "b.toml")]) == 78
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ok"] is False
    cli.main(["--json", "doctor", "--config", str(tmp_path / "none.toml")])
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", ["put", "flash", "read", "jobs", "watch", "check-config"])
def test_every_command_has_help(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bridged", name, "--help"], capture_output=True, text=True, timeout=20, check=True
    )
    assert "example:" in done.stdout


# --- small parts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("127.0.0.1:7100", "127.0.0.1:7100"),
        ("gw", "gw:7100"),
        ("[::1]:9", "::1:9"),
        ("[::1]", "::1:7100"),
        ("::1", "::1:7100"),
        ("unix:/run/b.sock", "unix:/run/b.sock"),
    ],
)
def test_addresses(text: str, shown: str) -> None:
    assert str(Address.parse(text)) == shown


@pytest.mark.parametrize("text", ["", ":7100", "gw:", "gw:x", "gw:0", "gw:70000", "gw:²"])
def test_bad_addresses(text: str) -> None:
    with pytest.raises(BadRequest):
        Address.parse(text)


def test_every_error_has_an_exit_code_above_zero() -> None:
    for code, cls in BY_CODE.items():
        assert exit_code(error_reply(cls("x"))) is not Exit.DONE, code


def test_sentences_and_sizes(tmp_path: Path) -> None:
    assert [size_text(n) for n in (0, 1023, 1024, 1536, 5 << 20, 5 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 KiB",
        "5.0 MiB",
        "5120.0 MiB",
    ]
    record = Reply(251, "", {"target": "m", "kind": "ensure", "evidence": "record", "age_s": 7.2})
    assert (
        outcome(record) == "m: nothing to do: the image is there already (evidence: record, 7 s old; the target was not asked)"
    )
    assert table([{"a": 1, "b": None}, {"a": 22}], ["a", "b"]) == "A\n1\n22"
    odd = tmp_path / "größe\n.elf"
    odd.write_bytes(b"x")
    assert LocalFile.of(odd).plain_name == "gr__e_.elf"
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(BridgedError, match="no bytes"):
        LocalFile.of(empty)


def test_progress_without_a_terminal_is_said_for_each_phase(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen()
    for done in range(0, 4096, 256):
        screen.progress("motor1", "write", done, 4096, 10500.0)
    screen.progress("motor1", "verify", 4096, 4096, 0)
    assert capsys.readouterr().err.splitlines() == [
        "motor1: write, 0 %, 0 B of 4.0 KiB, 10.5 kB/s",
        "motor1: verify, 100 %, 4.0 KiB of 4.0 KiB",
    ]
