"""The daemon around its parts: systemd, signals, reloading, sockets that are passed in, and what a killed one left behind.

Most of them start the same daemon as a process, so they are one file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bridged import app, config, logs, release, systemd
from bridged.config.difference import Difference, difference
from bridged.config.file import load
from bridged.errors import ConfigError, JournalError, StorageFailed, TooMany
from bridged.jobs.journal import FILE_NAME, Journal
from bridged.jobs.model import Job, JobKind, JobState
from bridged.jobs.records import Change, OpenSession
from tests.support import missing
from tests.test_client import Certificates

SERVE = [sys.executable, "-c", "import sys; from bridged import app; sys.exit(app.serve(sys.argv[1:]))"]
ROOT = Path(__file__).parents[1]
DEBIAN_PYTHON = "/usr/bin/python3"
LIMIT_S = 30.0  # For what takes a fraction of a second on an idle machine.


@pytest.fixture(autouse=True)
def keep_logging() -> Iterator[None]:
    """``serve`` in this process takes the root logger for itself."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


# --- descriptors


def limited(soft: int, hard: int, connections: int) -> tuple[int, int]:
    """(connections that are possible, soft limit afterwards), asked in a process that has these limits."""
    program = (
        "import resource as r\nfrom bridged.app import allow_descriptors as allow\n"
        f"r.setrlimit(r.RLIMIT_NOFILE, ({soft}, {hard}))\nprint(allow({connections}, 3), r.getrlimit(r.RLIMIT_NOFILE)[0])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    return int(out[0]), int(out[1])


def test_the_soft_limit_on_files_follows_the_configuration_and_the_hard_one_bounds_the_connections() -> None:
    assert limited(1024, 4096, 1000) == (1000, 1000 + 768 + 3 * 16)
    assert limited(2048, 4096, 1000) == (1000, 2048)
    assert limited(800, 1024, 1000) == (1024 - 768 - 3 * 16, 1024)
    assert limited(100, 100, 1000) == (16, 100)


# --- a daemon as a process


@dataclass
class Running:
    process: subprocess.Popen[str]
    notify: socket.socket
    log: Path
    heard: list[str] = field(default_factory=list)

    def expect(self, wanted: str) -> None:
        """Until systemd has been told ``wanted`` (the beginning of an assignment)."""
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            try:
                lines = self.notify.recv(4096).decode().split("\n")
            except TimeoutError:
                if self.process.poll() is not None:
                    break
                continue
            self.heard += lines
            if any(line.startswith(wanted) for line in lines):
                return
        raise AssertionError(f"never told {wanted!r}, only {self.heard}; log: {self.log.read_text()}")

    def port(self) -> int:
        found = re.search(r"listening on 127\.0\.0\.1:(\d+)", self.log.read_text())
        assert found, self.log.read_text()
        return int(found[1])

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(LIMIT_S) == 0, self.log.read_text()
        return self.log.read_text()


Start = Callable[..., Running]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Start]:
    """``run(toml)`` starts a daemon and waits until it is ready; every daemon has ended when the test has."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str, *, prefix: tuple[str, ...] = (), pass_fds: tuple[int, ...] = (), **environment: str) -> Running:
        (tmp_path / "bridged.toml").write_text(text)
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.settimeout(0.5)
        address = tmp_path / f"notify{len(started)}"
        notify.bind(str(address))
        log = tmp_path / f"log{len(started)}"
        command = [*prefix, *SERVE, "--config", str(tmp_path / "bridged.toml"), "--state-dir", str(tmp_path / "state")]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                command,
                stderr=stderr,
                text=True,
                pass_fds=pass_fds,
                env={**os.environ, "NOTIFY_SOCKET": str(address), **environment},
            )
        started.append(process)
        running = Running(process, notify, log)
        running.expect("READY=1")
        return running

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait()


START = '[api]\nlisten = "127.0.0.1:0"\nhttp = "127.0.0.1:0"\nmetrics = "127.0.0.1:0"\n'
ABSENT = '[targets.m1]\nport = "/dev/does-not-exist"\nchip = "F756"\n'


def talk(port: int, text: str) -> str:
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as sock:
        sock.sendall(text.encode())
        sock.shutdown(socket.SHUT_WR)
        with sock.makefile() as replies:
            return replies.read()


def test_a_daemon_lives_and_ends_as_systemd_wants(run: Start, tmp_path: Path) -> None:
    daemon = run(START + ABSENT, WATCHDOG_USEC="600000", RUNTIME_DIRECTORY=str(tmp_path))
    daemon.expect("WATCHDOG=1")
    daemon.expect("WATCHDOG=1")
    reply = talk(daemon.port(), "TARGETS\nQUIT\n")
    assert reply.startswith("220 bridged ")
    assert "m1" in reply
    assert "absent" in reply, "the daemon runs although the device is missing"
    assert (tmp_path / "bridged.sock").is_socket()
    log = daemon.stop()
    daemon.expect("STOPPING=1")
    assert log.count("/dev/does-not-exist") == 1, "an absent device is told once"
    assert "Traceback" not in log
    assert not (tmp_path / "bridged.sock").exists()


def test_a_bad_file_leaves_the_old_configuration_in_force(run: Start, tmp_path: Path) -> None:
    daemon = run(START + ABSENT)
    file = tmp_path / "bridged.toml"
    file.write_text(START + '[targets.m1]\nbaud = 1\n[targets.m2]\nport = "/dev/x"\nchip = "F999"\n')
    daemon.process.send_signal(signal.SIGHUP)
    daemon.expect("RELOADING=1")
    daemon.expect("READY=1")
    log = daemon.log.read_text()
    for mistake in (":5:10: targets.m1.port: is required", ":6:1: targets.m1.baud: must be", ":9:1: targets.m2.chip: "):
        assert log.count(mistake) == 1, log
    assert "stays in force" in log
    assert "m2" not in talk(daemon.port(), "TARGETS\nQUIT\n")

    file.write_text(START.replace("[api]", "[api]\nconnections = 9") + '[targets.m2]\nport = "/dev/x"\n')
    daemon.process.send_signal(signal.SIGHUP)
    daemon.expect("READY=1")
    assert (
        "takes effect with `systemctl restart bridged`: targets.m2 (added), targets.m1 (removed), api.connections"
        in daemon.log.read_text()
    )
    daemon.stop()


def passing(*found: tuple[str, socket.socket]) -> dict[str, Any]:
    """As systemd passes sockets by their names. Descriptors are passed from 3 on, and only the process itself knows its id."""
    count = len(found)
    script = (
        "import fcntl, os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); "
        f"copies = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:{1 + count}]]; "
        f"[os.dup2(copy, 3 + n) for n, copy in enumerate(copies)]; os.execv(sys.argv[{1 + count}], sys.argv[{1 + count}:])"
    )
    fds = tuple(sock.fileno() for _, sock in found)
    return {
        "prefix": (sys.executable, "-c", script, *map(str, fds)),
        "pass_fds": fds,
        "LISTEN_FDS": str(count),
        "LISTEN_FDNAMES": ":".join(name for name, _ in found),
    }


def test_sockets_that_systemd_holds_are_used(run: Start, tmp_path: Path) -> None:
    tcp = socket.create_server(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "s"))
    unix.listen()
    daemon = run(START, **passing(("line", tcp), ("line", unix)))
    port = tcp.getsockname()[1]
    assert f"listening on 127.0.0.1:{port} (passed), {tmp_path}/s (passed), http://" in daemon.log.read_text()
    assert "250 PONG" in talk(port, "PING\nQUIT\n")
    daemon.stop()
    assert (tmp_path / "s").is_socket(), "it belongs to systemd, and clients wait on it for the next daemon"


def test_consoles_take_passed_sockets_in_tls_too_and_a_certificate_is_renewed_by_a_signal(run: Start, tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    certificate, key = certificates.make("gw.example")
    settings = f'[tls]\ncertificate = "{certificate}"\nkey = "{key}"\nclient_ca = "{tmp_path}/ca.pem"\n'
    tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "s"))
    unix.listen()
    line, http = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    passed = (("console-m1", unix), ("console-m1.tls", tcp), ("line-tls", line), ("http-tls", http))
    daemon = run(f"{START}{settings}{ABSENT}", **passing(*passed))
    port = tcp.getsockname()[1]
    where = f"{tmp_path}/s (console of m1, passed), 127.0.0.1:{port} (console of m1, passed), 127.0.0.1:{line.getsockname()[1]}"
    assert where in daemon.log.read_text()
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))

    def shown(at: socket.socket = tcp, asked: bytes = b"", said: bytes = b"[bridged: the target is absent") -> str:
        with (
            socket.create_connection(at.getsockname(), LIMIT_S) as plain,
            context.wrap_socket(plain, server_hostname="gw.example") as secure,
        ):
            secure.sendall(asked)
            assert said in secure.recv(4096)
            return ssl.DER_cert_to_PEM_cert(secure.getpeercert(True) or b"")

    before = shown()
    assert before == certificate.read_text()
    certificates.make("gw.example")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.expect("READY=1")
    assert before != shown() == certificate.read_text()
    said = f"warning: tls.certificate {certificate} expires in 1 day ("
    assert daemon.log.read_text().count(said) == 2, "at the start and when it is read again"
    assert shown(line, said=b"220 bridged") == certificate.read_text()
    assert shown(http, b"GET /livez HTTP/1.0\r\nHost: localhost\r\n\r\n", b"200 OK") == certificate.read_text()
    with socket.socket(socket.AF_UNIX) as here:
        here.connect(str(tmp_path / "s"))
        assert b"[bridged: the target is absent" in here.recv(4096)
    daemon.stop()


def test_a_passed_console_socket_beyond_loopback_needs_certificates(tmp_path: Path) -> None:
    (tmp_path / "bridged.toml").write_text(START + ABSENT)
    with socket.create_server(("0.0.0.0", 0)) as everywhere:
        more = passing(("console-m1", everywhere))
        prefix, pass_fds = more.pop("prefix"), more.pop("pass_fds")
        command = [*prefix, *SERVE, "--config", str(tmp_path / "bridged.toml"), "--state-dir", str(tmp_path / "state")]
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, pass_fds=pass_fds, env={**os.environ, **more}
        )
    assert ran.returncode == app.EXIT_CONFIG, "systemd does not try again what only a person can change"
    assert "A console may not listen on 0.0.0.0: " in ran.stderr
    assert "set tls.certificate, tls.key and tls.client_ca" in ran.stderr


def test_the_command_drain_ends_the_daemon(run: Start, tmp_path: Path) -> None:
    """An administrator's: over the Unix socket, from the daemon's own user."""
    daemon = run(START.replace("[api]", f'[api]\nsocket = "{tmp_path}/s"') + ABSENT)
    command = [sys.executable, "-m", "bridged", "drain", "--gateway", f"unix:{tmp_path}/s"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert (ran.returncode, ran.stdout) == (0, "drained: no job runs, and the daemon ends\n"), ran.stderr
    assert daemon.process.wait(LIMIT_S) == 0
    assert "draining" in daemon.log.read_text()


def test_draining_ends_the_daemon(run: Start) -> None:
    daemon = run(START + ABSENT)
    daemon.process.send_signal(signal.SIGUSR1)
    daemon.expect("STOPPING=1")
    assert daemon.process.wait(LIMIT_S) == 0


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("[api\n", 78, ":1:5: not valid TOML"),
        ('[api]\nlisten = "0.0.0.0:7100"\n', 78, "api.listen: 0.0.0.0:7100 needs TLS"),
        (
            '[targets.m]\nport = "/dev/x"\n[targets.m.console]\nlisten = "0.0.0.0:7201"\n',
            78,
            "targets.m.console.listen: 0.0.0.0:7201: a console knows who connects by a client certificate only",
        ),
        (None, 78, "No such file"),
    ],
)
def test_what_cannot_start_says_why(tmp_path: Path, text: str | None, code: int, said: str) -> None:
    file = tmp_path / "bridged.toml"
    if text is not None:
        file.write_text(text)
    ran = subprocess.run([*SERVE, "--config", str(file)], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert ran.returncode == code
    assert said in ran.stderr
    assert "Traceback" not in ran.stderr


def test_for_a_collector_it_says_so_in_json(tmp_path: Path) -> None:
    file = tmp_path / "bridged.toml"
    file.write_text("[gateway]\nnmae = 1\n[api]\nhttp = 7\n")
    command = [*SERVE, "--log-format", "json", "--config", str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [(one["level"], one["event"], one["code"]) for one in found] == [("error", "config_rejected", "CONFIG")] * 2
    assert ran.stderr == ""


def test_a_port_that_is_taken_is_told_and_everything_is_taken_down(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        file = tmp_path / "bridged.toml"
        file.write_text(f'[api]\nlisten = "127.0.0.1:{port}"\nhttp = ""\nmetrics = ""\n')
        ran = subprocess.run(
            [*SERVE, "--config", str(file), "--state-dir", str(tmp_path)],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
    assert ran.returncode == 78
    assert f"127.0.0.1:{port}" in ran.stderr
    Journal.open(tmp_path / FILE_NAME).close()


# --- targets: what is released, and what is left alone (P4, P9)


class Bench:
    """A target without a chip: a pty that says nothing and a line box that writes down what it is told, and when."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.told: list[str] = []
        self.first = 0.0
        self._far, self._near = os.openpty()
        tty.setraw(self._near)
        self._box = socket.socket(socket.AF_UNIX)
        self.path = directory / f"{name}.box"
        self._box.bind(str(self.path))
        self._box.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._box.accept()
                self.first = self.first or time.monotonic()
                with connection, connection.makefile("rw") as stream:
                    for line in stream:
                        self.told.append(line.strip())
                        stream.write("ok\n")
                        stream.flush()

    def table(self) -> str:
        return (
            f'[targets.{self.name}]\nport = "{os.ttyname(self._near)}"\n'
            f'lines = {{ kind = "socket", socket = "{self.path}", nrst = "nrst", boot0 = "boot0" }}\n'
        )

    def close(self) -> None:
        self._box.close()
        os.close(self._far)
        os.close(self._near)


@pytest.fixture
def benches(tmp_path: Path) -> Iterator[tuple[Bench, Bench]]:
    pair = (Bench(tmp_path, "m1"), Bench(tmp_path, "m2"))
    yield pair
    for bench in pair:
        bench.close()


def leave_in_session(state: Path, target: str, hazard_s: float) -> None:
    """What a daemon that was killed leaves in the journal."""
    state.mkdir(exist_ok=True)
    journal = Journal.open(state / FILE_NAME)
    job = Job(f"j-{target}", JobKind.FLASH, target, JobState.RUNNING, 1, "", "", {}, "test", time.time())
    journal.admit(job, "", "{}").result()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    journal.apply(Change(session=OpenSession(target, job.id, hazard_s, boot, time.time()))).result()
    journal.close()


def sessions(state: Path) -> list[str]:
    journal = Journal.open(state / FILE_NAME)
    try:
        return [session.target for session in journal.sessions()]
    finally:
        journal.close()


def test_only_what_was_left_in_a_session_is_released_and_after_its_hazard(tmp_path: Path, benches: tuple[Bench, Bench]) -> None:
    left, other = benches
    state = tmp_path / "state"
    leave_in_session(state, left.name, hazard_s=0.5)
    file = tmp_path / "bridged.toml"
    file.write_text(left.table() + other.table())
    start = time.monotonic()
    assert app.serve(["--config", str(file), "--state-dir", str(state), "--release-only"]) == 0
    assert left.first - start >= 0.5, "touched before the end of the hazard"
    assert [line for line in left.told if line.startswith("nrst")][-2:] == ["nrst 0", "nrst 1"]
    assert [line for line in left.told if line.startswith("boot0")][-1] == "boot0 0"
    assert other.told == []
    assert sessions(state) == []


def test_none_is_released_within_the_hazard_of_another_on_the_same_wires(tmp_path: Path, benches: tuple[Bench, Bench]) -> None:
    one, two = benches
    state, file = tmp_path / "state", tmp_path / "bridged.toml"
    leave_in_session(state, one.name, hazard_s=0.0)
    leave_in_session(state, two.name, hazard_s=0.5)
    second = two.table().replace(str(two.path), str(one.path))
    file.write_text(one.table() + f'shares = ["{two.name}"]\n' + second + f'shares = ["{one.name}"]\n')
    start = time.monotonic()
    assert app.serve(["--config", str(file), "--state-dir", str(state), "--release-only"]) == 0
    assert one.first - start >= 0.5, "the wires were moved within the hazard of the second"
    assert [line for line in one.told if line.startswith("nrst")][-2:] == ["nrst 0", "nrst 1"]
    assert sessions(state) == []


def test_a_target_that_cannot_be_released_stays_in_the_journal(
    tmp_path: Path, benches: tuple[Bench, Bench], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(release, "RELEASE_WAIT_S", 0.1)
    state = tmp_path / "state"
    leave_in_session(state, "m1", hazard_s=0.0)
    file = tmp_path / "bridged.toml"
    file.write_text(ABSENT + benches[1].table())
    assert app.serve(["--config", str(file), "--state-dir", str(state), "--release-only"]) == 1
    assert "releasing target m1: " in capfd.readouterr().err
    assert sessions(state) == ["m1"]
    assert benches[1].told == []


def test_a_disk_that_takes_nothing_keeps_no_target_in_its_loader(
    tmp_path: Path, benches: tuple[Bench, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card became read-only, so no daemon comes up. systemd tries five times, and the target is reset once."""

    def refuse(_path: Path) -> Journal:
        raise StorageFailed("Read-only file system")

    state, file = tmp_path / "state", tmp_path / "bridged.toml"
    leave_in_session(state, "m1", hazard_s=0.0)
    file.write_text(benches[0].table())
    monkeypatch.setenv("RUNTIME_DIRECTORY", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    before = {path: path.read_bytes() for path in state.iterdir()}
    with monkeypatch.context() as broken:
        broken.setattr(release, "_open_journal", refuse)
        for _ in range(2):
            assert app.serve(["--config", str(file), "--state-dir", str(state), "--release-only"]) == 0
    assert [line for line in benches[0].told if line.startswith("nrst")] == ["nrst 1", "nrst 0", "nrst 1"]
    assert {path: path.read_bytes() for path in state.iterdir()} == before
    assert sessions(state) == ["m1"], "the next start sees to it, as after any crash"
    with Journal.copied(state / FILE_NAME, tmp_path), pytest.raises(JournalError, match="in use by another process"):
        Journal.open(state / FILE_NAME)


def test_without_a_journal_there_is_nothing_to_release(tmp_path: Path, benches: tuple[Bench, Bench]) -> None:
    file = tmp_path / "bridged.toml"
    file.write_text(benches[0].table())
    assert app.serve(["--config", str(file), "--state-dir", str(tmp_path / "state"), "--release-only"]) == 0
    assert benches[0].told == []
    assert not (tmp_path / "state").exists()


def test_starting_and_stopping_resets_no_target(run: Start, benches: tuple[Bench, Bench]) -> None:
    for _ in range(2):
        daemon = run(START + benches[0].table())
        daemon.expect("STATUS=1 target")
        while "target m1 is there" not in daemon.log.read_text():
            assert daemon.process.poll() is None, daemon.log.read_text()
            daemon.process.send_signal(signal.SIGHUP)
            daemon.expect("READY=1")
        daemon.stop()
    assert benches[0].told.count("nrst 0") == 0
    assert "boot0 1" not in benches[0].told
    assert "boot0 0" in benches[0].told, "the lines were taken, and are idle"


# --- words for systemd


@pytest.mark.parametrize("abstract", [True, False])
def test_notifications_reach_both_kinds_of_address(tmp_path: Path, abstract: bool) -> None:
    name = f"bridged-test-{os.getpid()}" if abstract else str(tmp_path / "n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("\0" + name if abstract else name)
        heard.settimeout(LIMIT_S)
        notifier = systemd.Notifier({"NOTIFY_SOCKET": "@" + name if abstract else name, "WATCHDOG_USEC": "30000000"})
        notifier.send("READY=1", "STATUS=two targets")
        assert heard.recv(100) == b"READY=1\nSTATUS=two targets"
        assert notifier.watchdog_s == 30.0
    notifier.send("READY=1")  # Nobody listens any more: no reason to fail.


def test_the_library_of_systemd_is_used_where_it_is_installed(tmp_path: Path) -> None:
    """Debian's, with Debian's Python: there is no wheel of it. Where it is missing our lines say the same."""
    if subprocess.run([DEBIAN_PYTHON, "-c", "import systemd.daemon"], capture_output=True, check=False).returncode:
        missing("Debian's python3-systemd", "apt install python3-systemd")
    notify = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from bridged import systemd; "
        "print(systemd.library.__name__); systemd.Notifier().send('READY=1', 'STATUS=two targets'); "
        "systemd.Notifier({'NOTIFY_SOCKET': sys.argv[1]}).send('STATUS=ours')"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind(address := str(tmp_path / "n"))
        heard.settimeout(LIMIT_S)
        command = [DEBIAN_PYTHON, "-c", notify, address]
        said = subprocess.run(command, env={"NOTIFY_SOCKET": address}, capture_output=True, text=True, check=True).stdout
        assert said == "systemd.daemon\n"
        assert [heard.recv(100), heard.recv(100)] == [b"READY=1\nSTATUS=two targets", b"STATUS=ours"]


def test_without_systemd_nothing_is_sent_and_a_watchdog_for_others_is_not_ours() -> None:
    systemd.Notifier({}).send("READY=1")
    assert systemd.Notifier({}).watchdog_s == 0
    assert systemd.Notifier({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}).watchdog_s == 0
    assert systemd.passed_sockets({"LISTEN_PID": "1", "LISTEN_FDS": "3"}) == {}
    assert systemd.passed_sockets({}) == {}


class Heard(systemd.Notifier):
    """Counts what would be sent."""

    def __init__(self) -> None:
        super().__init__({"WATCHDOG_USEC": "30000"})
        self.sent: list[str] = []
        self.told = asyncio.Event()

    def send(self, *assignments: str) -> None:
        self.sent += assignments
        self.told.set()


def test_the_watchdog_is_fed_only_while_every_part_beats(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        heard, alive, turns = Heard(), asyncio.Event(), 0
        alive.set()

        async def journal() -> None:
            nonlocal turns
            turns += 1
            await alive.wait()

        async def threads() -> None:
            return

        async with asyncio.TaskGroup() as group:
            watch = group.create_task(systemd.watch_over(heard, {"journal": journal, "worker threads": threads}))
            await heard.told.wait()
            alive.clear()
            seen, before = turns, len(heard.sent)
            while turns < seen + 4:
                await asyncio.sleep(0)
            assert len(heard.sent) <= before + 1, "fed although the journal stood still"
            alive.set()
            heard.told.clear()
            await heard.told.wait()
            watch.cancel()

    with caplog.at_level(logging.WARNING, "bridged"):
        asyncio.run(check())
    stood_still = [record for record in caplog.records if "journal" in record.getMessage()]
    assert len(stood_still) == 1, "told before systemd kills us, and once"
    assert "progress again" in caplog.text


def test_a_part_that_fails_does_not_beat() -> None:
    async def fine() -> None:
        return

    async def shut_down() -> None:
        raise RuntimeError("cannot schedule new futures after shutdown")

    assert asyncio.run(systemd._missing({"a": fine, "b": shut_down}, 5)) == "b"


def test_an_error_is_logged_with_its_cause_and_remedy(caplog: pytest.LogCaptureFixture) -> None:
    logs.log_error(TooMany("64 connections are open"), "line protocol")
    assert "line protocol: 64 connections are open [TOO_MANY]" in caplog.text
    assert TooMany("").hint.remedy in caplog.text


# --- configuration and places


def test_check_config_lists_every_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "b.toml"
    file.write_text(ABSENT)
    assert app.check_config(file) == 0
    assert capsys.readouterr().out == "ok: 1 target\n"
    file.write_text('[targets.a]\nchip = "F7"\nbaud = 1\n[targets.b]\nport = "/dev/x"\nchip = "F756"\nlayout = "dual"\n')
    assert app.check_config(file) == 78
    err = capsys.readouterr().err.splitlines()
    assert [line.split(" ")[0] for line in err] == [f"{file}:1:10:", f"{file}:2:1:", f"{file}:3:1:", f"{file}:7:1:"]
    assert "'dual' is not a layout of STM32F7 F745" in err[3]
    with pytest.raises(ConfigError):
        app.read_config(file)
    assert app.check_config(file, as_json=True) == 78
    *mistakes, result = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [(one["level"], one["line"], one["column"]) for one in mistakes] == [
        ("mistake", line, column) for line, column in ((1, 10), (2, 1), (3, 1), (7, 1))
    ]
    assert result == {"level": "result", "file": str(file), "ok": False, "targets": 0}
    assert app.check_config(tmp_path / "none.toml", as_json=True) == 78
    assert "No such file" in json.loads(capsys.readouterr().out.splitlines()[0])["text"]


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.parent.glob("config/**/*.toml")), ids=lambda path: path.stem)
def test_shipped_configurations_name_chips_that_exist(path: Path) -> None:
    assert app.read_config(path).gateway is not None


def test_where_things_are() -> None:
    file, plain = Path("/etc/b.toml"), config.Config()
    named = load('gateway.state_dir = "/srv/b"\napi.socket = "/srv/b.sock"')
    systemd = {"STATE_DIRECTORY": "/var/lib/bridged:/x", "RUNTIME_DIRECTORY": "/run/bridged"}
    assert app.places(file, plain, environment={}) == app.Places(file, app.DEFAULT_STATE, None)
    assert app.places(file, plain, environment=systemd).state == Path("/var/lib/bridged")
    assert app.places(file, plain, environment=systemd).socket == Path("/run/bridged/bridged.sock")
    assert app.places(file, named, environment=systemd) == app.Places(file, Path("/srv/b"), Path("/srv/b.sock"))
    assert app.places(file, named, "/tmp/x", environment=systemd).state == Path("/tmp/x")


def test_what_a_new_configuration_changes() -> None:
    old = load('[targets.a]\nport = "/dev/a"\n[targets.b]\nport = "/dev/b"\n')
    new = load('jobs.keep = 10\n[targets.b]\nport = "/dev/b"\nbaud = 9600\n[targets.c]\nport = "/dev/c"\n')
    assert difference(old, new) == Difference(("c",), ("a",), ("b",), ("jobs.keep",))
    assert difference(old, old) == Difference()
