"""Hostile, broken and merely unlucky clients against the real daemon, while a session runs and a bystander asks on.

Each case ends in a clear error (its code and text are compared), bounded memory (of the daemon, from /proc), answers for the
bystander within ``ANSWER_S``, and a recording of the session that is byte for byte that of an undisturbed one. The simulated
part is paced: its session takes real time, in which the attack happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from bridged import chips
from tests.e2e.gateway import Client, Gateway, pairs, wait_for
from tests.e2e.test_bad_link import dialogue
from tests.support import free_port
from tests.target.bench import make_image

pytestmark = pytest.mark.alone

MIB = 1 << 20
CONNECTIONS = 1000
ANSWER_S = 2.0  # For the bystander. An idle machine needs a millisecond; this one also runs the attack and the part.
GROWTH_BYTES = 48 * MIB  # Of the daemon over all cases. A connection takes 9.5 KiB, a slow reader its 256 KiB more.
LIMITS = f"""connections = {CONNECTIONS}
[store]
limit_mib = 8
image_limit_mib = 2
[jobs]
queue_limit = 4
"""
DATA = make_image(chips.find("F756"), 9_472).segments[0].data
SETTINGS = {"rate_error": 0.0}  # What F7 measures differs from reset to reset; here two recordings are compared.


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def flash(client: Client, phases: tuple[str, ...] = ("erase", "write", "verify")) -> str:
    """Begin a session; its job once it is in one of ``phases``."""
    code, text = client.do("FLASH f7 app.bin addr=0x08000000 outside=discard mode=full trace=1")
    assert code == 250, text
    job = pairs(text)["job"]

    def begun() -> bool:
        status = client.status(job)
        assert status["state"] in ("queued", "waiting", "running"), status
        return status.get("phase") in phases

    wait_for("the dialogue", begun)
    return job


def finish(gateway: Gateway, job: str) -> list[str]:
    client = gateway.connect()
    code, text = client.do(f"WAIT {job} timeout=60")
    assert code == 250, text
    client.close()
    return dialogue(gateway.root, job)


@dataclass
class Bystander:
    """Another client, who only wants to know how things are. ``slowest_s``: the longest that it had to wait."""

    gateway: Gateway
    slowest_s: float = 0.0
    asked: int = 0
    problem: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Bystander:
        self._client = self.gateway.connect()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()
        return self

    def _ask(self) -> None:
        try:
            while not self._stop.wait(0.02):
                begun = time.monotonic()
                code, text = self._client.do("TARGETS")
                self.slowest_s = max(self.slowest_s, time.monotonic() - begun)
                self.asked += 1
                if code != 250:
                    self.problem = text
        except (OSError, EOFError) as error:
            self.problem = repr(error)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)
        self._client.close()


@dataclass
class World:
    gateway: Gateway
    undisturbed: list[str]
    rss_bytes: int

    def tcp(self) -> Client:
        return self.gateway.connect_tcp()

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """What happens inside happens during a session, and must not be noticed by anybody else."""
        client = self.gateway.connect()
        job = flash(client)
        with Bystander(self.gateway) as bystander:
            yield
            recording = finish(self.gateway, job)
        client.close()
        assert recording == self.undisturbed
        assert bystander.problem == ""
        assert bystander.asked > 10
        assert bystander.slowest_s < ANSWER_S
        assert self.gateway.rss_bytes() - self.rss_bytes < GROWTH_BYTES


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Gateway(
        tmp_path_factory.mktemp("bounds"), {"f7": "F756"}, SETTINGS, paced=True, extra=LIMITS, port=free_port()
    ) as gateway:
        client = gateway.connect()
        client.put(DATA, "app.bin")
        finish(gateway, flash(client))  # The first one finds another flash than all that follow.
        undisturbed = finish(gateway, flash(client))
        client.close()
        yield World(gateway, undisturbed, gateway.rss_bytes())


@contextlib.contextmanager
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < CONNECTIONS + 200:
        pytest.skip(f"only {hard} files may be open here; raise the limit: ulimit -Hn {CONNECTIONS + 1000}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, CONNECTIONS + 200), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def accepted(world: World) -> bool:
    with socket.create_connection(("127.0.0.1", world.gateway.port), timeout=60) as sock, sock.makefile("rb") as file:
        return file.readline().startswith(b"220 ")


def ended(client: Client) -> bool:
    """Whether the daemon has closed the connection."""
    try:
        return client.file.read(1) == b""
    except ConnectionResetError:
        return True


def test_a_thousand_connections_and_one_more(world: World) -> None:
    """Also with descriptors beyond 1023, which the session process of the next job inherits."""
    with many_descriptors(), contextlib.ExitStack() as stack:
        clients = []
        for _ in range(CONNECTIONS):
            clients.append(world.tcp())
            stack.callback(clients[-1].close)
        with world.session():
            assert [client.do("PING") for client in clients] == [(250, "PONG")] * CONNECTIONS
            with socket.create_connection(("127.0.0.1", world.gateway.port), timeout=60) as sock, sock.makefile("rb") as file:
                refused = file.read().decode()
            assert refused.startswith("429 TOO_MANY message=")
            assert "connections are open, which is the limit" in refused
    wait_for("room for the next one", lambda: accepted(world))


def test_readers_that_do_not_read(world: World) -> None:
    with contextlib.ExitStack() as stack:
        clients: list[tuple[socket.socket, memoryview]] = []
        flood = memoryview(b"HELP\nTARGETS\nJOBS\n" * 1_000_000)
        for request in [memoryview(b"WATCH *\n")] * 20 + [flood] * 10:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", world.gateway.port))
            stack.callback(sock.close)
            sock.setblocking(False)
            clients.append((sock, request))
        with world.session():
            for _ in range(20):
                for number, (sock, rest) in enumerate(clients):
                    with contextlib.suppress(BlockingIOError):
                        clients[number] = (sock, rest[sock.send(rest) :] if rest else rest)
                time.sleep(0.01)
            left = [len(rest) for _, rest in clients[20:]]
            assert min(left) > len(flood) // 2, "the daemon takes requests without end from one that does not read"


def test_half_a_put(world: World) -> None:
    data = random.Random(1).randbytes(600_000)
    with world.session():
        client = world.tcp()
        client.sock.sendall(f"PUT {len(data)} {sha(data)}\n".encode() + data[:300_000])
        client.sock.shutdown(socket.SHUT_WR)
        assert client.reply()[0] == 354
        code, text = client.reply()
        assert (code, text.split()[0]) == (501, "BAD_REQUEST")
        assert "announced 600000 bytes and the connection ended after 300000" in text
        assert ended(client)
        client = world.tcp()
        code, text = client.do(f"HAVE {sha(data)}")
        assert (code, pairs(text)["offset"]) == (250, "300000")
        client.sock.sendall(f"PUT {len(data)} {sha(data)} offset=300000\n".encode() + data[300_000:500_000])
        # This time it is a reset, in the middle of everything.
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        client = world.gateway.connect_tcp()
        have = wait_for("the end of the upload", lambda: int(pairs(client.do(f"HAVE {sha(data)}")[1])["offset"]) >= 300_000)
        assert have
        code, text = client.do(f"PUT {len(data)} {sha(data)}", data)
        if code == 429:  # The reset was not seen yet.
            assert float(pairs(text)["fact.retry_after_s"]) <= 5.0
        else:
            assert code == 250, text
        client.close()


def test_a_client_that_died_without_a_word_comes_back(world: World) -> None:
    """Nothing on the old connection says that it is dead. Before 5 s of silence the next one is told when to come back."""
    data = random.Random(2).randbytes(600_000)
    dead = world.tcp()
    dead.sock.sendall(f"PUT {len(data)} {sha(data)} name=back\n".encode() + data[:350_000])
    assert dead.reply()[0] == 354
    client = world.tcp()
    wait_for("the first sync", lambda: "offset" in pairs(client.do(f"HAVE {sha(data)}")[1]))
    code, text = client.do(f"PUT {len(data)} {sha(data)}", data)
    assert (code, text.split()[0]) == (429, "TOO_MANY")
    retry_s = float(pairs(text)["fact.retry_after_s"])
    assert 1.0 <= retry_s <= 5.0
    with world.session():
        time.sleep(retry_s)
        code, text = client.do(f"HAVE {sha(data)}")
        assert (code, pairs(text)["offset"]) == (250, "350000")
        code, text = client.do(f"PUT {len(data)} {sha(data)} offset=350000 name=back", data[350_000:])
        assert code == 250, text
    code, text = dead.reply()
    assert (code, text.split()[0]) == (421, "IDLE")
    assert ended(dead)
    client.close()


def test_wrong_digest(world: World) -> None:
    data = random.Random(3).randbytes(100_000)
    with world.session():
        client = world.tcp()
        code, text = client.do(f"PUT {len(data)} {sha(b'other')}", data)
        assert (code, text.split()[0]) == (554, "DIGEST_MISMATCH")
        assert sha(data)[:16] in text
        assert client.do(f"HAVE {sha(b'other')}")[0] == 404
        assert client.do("PING") == (250, "PONG")
        client.close()


def test_binary_rubbish(world: World) -> None:
    with world.session():
        for seed in range(20):
            client = world.tcp()
            with contextlib.suppress(OSError):  # It may be closed before all of it is sent.
                client.sock.sendall(b"\x80" + random.Random(seed).randbytes(65536).replace(b"\r", b"\n") + b"\n" * 100)
                client.sock.shutdown(socket.SHUT_WR)
            replies = [client.reply()]
            with contextlib.suppress(EOFError, ConnectionResetError):
                while True:
                    replies.append(client.reply())
            assert all(code in (429, 500, 501) for code, _ in replies)
            assert replies[0][1].startswith("BAD_REQUEST")
            assert "printable ASCII" in replies[0][1] or "has more" in replies[0][1]
            client.close()


def test_a_line_without_end(world: World) -> None:
    with world.session():
        client = world.tcp()
        with contextlib.suppress(OSError):
            for _ in range(64):
                client.sock.sendall(b"A" * 65536)
        code, text = client.reply()
        assert (code, text.split()[0]) == (500, "BAD_REQUEST")
        assert "a line may have 1024 bytes and this one has more" in text
        assert ended(client)


def hello() -> bytes:
    """The first bytes of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="gateway")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


STRANGERS = (
    ("HTTP", b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n"),
    ("HTTP", b"POST / HTTP/1.1\r\nContent-Length: 30\r\n\r\nRESET f7\r\nERASE f7 all\r\n"),
    ("TLS", hello()),
)


def jobs(world: World) -> int:
    client = world.gateway.connect()
    client.do("JOBS limit=1000")
    client.close()
    return len(client.lines) - 1


def test_other_protocols(world: World) -> None:
    before = jobs(world)
    with world.session():
        for name, first in STRANGERS:
            client = world.tcp()
            client.sock.sendall(first)
            code, text = client.reply()
            assert (code, text.split()[0]) == (500, "FOREIGN_PROTOCOL")
            assert f"not {name}; nothing was done and the connection is closed" in text
            assert ended(client)
    assert jobs(world) == before + 1, "only the session of the test"


def test_unknown_verbs(world: World) -> None:
    with world.session():
        client = world.tcp()
        code, text = client.do("FLAHS f7 app.bin")
        assert (code, text.split()[0]) == (500, "UNKNOWN_VERB")
        assert "did you mean FLASH?" in text
        for _ in range(48):
            assert client.do("MAKE coffee")[0] == 500
        assert client.do("MAKE coffee")[0] == 500
        code, text = client.reply()
        assert (code, text.split()[0]) == (429, "TOO_MANY")
        assert ended(client)


def test_quotas(world: World) -> None:
    with world.session():
        client = world.tcp()
        code, text = client.do(f"PUT {3 * MIB} {sha(b'x')}")
        assert (code, text.split()[0]) == (552, "IMAGE_TOO_LARGE")
        assert ended(client)
        client = world.tcp()
        answers = []
        for number in range(5):
            data = random.Random(100 + number).randbytes(2 * MIB)
            answers.append(client.do(f"PUT {len(data)} {sha(data)}", data))
        assert answers[0][0] == 250
        code, text = answers[-1]
        assert (code, text.split()[0]) == (452, "STORAGE_FULL")
        assert "more bytes do not fit: images and uploads have" in text
        jobs = []
        while (answer := client.do("RESET f7"))[0] == 250:
            jobs.append(pairs(answer[1])["job"])
        assert (answer[0], answer[1].split()[0]) == (429, "QUEUE_FULL")
        assert len(jobs) == 4
        assert [client.do(f"CANCEL {job}")[0] for job in jobs] == [250] * 4
        client.close()


def small_disk(at: Path, size: str) -> Callable[[], object]:
    """Mount a disk of ``size``; what undoes it."""
    at.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a small disk can be mounted by root only; run the tests as root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here ({done.stderr.strip()}); a container needs CAP_SYS_ADMIN")
    return lambda: subprocess.run(["umount", "--lazy", str(at)], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    """The running session goes on and is recorded; nothing new begins; when there is room again all is as before."""
    with contextlib.ExitStack() as stack:
        stack.callback(small_disk(tmp_path / "state", "24m"))
        gateway = stack.enter_context(Gateway(tmp_path, {"f7": "F756"}, SETTINGS, paced=True, extra=LIMITS, port=free_port()))
        client = gateway.connect()
        data = make_image(chips.find("F756"), 20_000).segments[0].data
        client.put(data, "app.bin")
        finish(gateway, flash(client))
        undisturbed = finish(gateway, flash(client))
        # Once it erases; a moment earlier the journal could not take that it will, and it would be refused.
        job = flash(client, ("write", "verify"))
        filler = tmp_path / "state" / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        other = random.Random(9).randbytes(50_000)
        code, text = client.do(f"PUT {len(other)} {sha(other)}", other)
        assert (code, text.split()[0]) == (452, "STORAGE_FULL")
        assert client.status(job)["state"] == "running"
        assert client.do("PING") == (250, "PONG")
        filler.write_bytes(bytes(17 * MIB))  # Room for the journal, not for a job that erases.
        assert finish(gateway, job) == undisturbed
        code, text = client.do("FLASH f7 app.bin addr=0x08000000 wait=1")
        assert (code, text.split()[0]) == (452, "STORAGE_FULL")
        assert "a job that erases needs 8192 KiB" in text
        filler.unlink()
        assert client.do(f"PUT {len(other)} {sha(other)}", other)[0] == 250
        client.close()


def test_memory_at_the_end(world: World) -> None:
    """After all of the above, and with everybody gone."""
    assert world.gateway.rss_bytes() - world.rss_bytes < GROWTH_BYTES
    assert world.gateway.connect().do("PING") == (250, "PONG")
