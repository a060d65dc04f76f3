"""The client for programs: which gateway it means, TLS and certificates, and a link that is as bad as links get.

All of them speak with the same gateway, so they are one file.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import os
import random
import select
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridged import config
from bridged.api.auth import Authority
from bridged.api.handshakes import PENDING, PENDING_EACH, Handshakes
from bridged.api.line import LineServer
from bridged.api.line_link import Limits
from bridged.api.tls import Tls, ending
from bridged.client import Client, Gateway, LinkLost, LocalFile, Refused, files
from bridged.client import gateway as gateways
from bridged.client import link as link_module
from bridged.client.files import upload
from bridged.client.gateway import Address
from bridged.client.link import CHUNK_BYTES, Session
from bridged.config import Auth
from bridged.config.values import Listen
from bridged.errors import BadRequest, ConfigError, DaemonUnreachable, LoginFirst, NotAllowed, WrongToken
from bridged.images.parts import SYNC_BYTES
from bridged.jobs.journal import Journal
from bridged.jobs.model import JobKind, JobState
from bridged.protocol.reply import Reply
from bridged.protocol.verbs import Scope
from tests.api.fakes import FakeJobs, Script, WatchedStore

# --- which gateway ------------------------------------------------------------------------------------------------


def test_arguments_beat_the_environment_and_that_the_file(tmp_path: Path) -> None:
    for name in ("lab", "shop", "env", "flag"):
        (tmp_path / name).write_text(f"bridged_{name}\n")
    settings = tmp_path / "client.toml"
    settings.write_text(
        f'default = "lab"\n[gateways.lab]\naddress = "lab.example:7200"\ntoken_file = "{tmp_path}/lab"\nca = "/lab.pem"\n'
        f'[gateways.shop]\naddress = "shop.example"\ntoken_file = "{tmp_path}/shop"\nname = "gw-4"\n'
    )
    env = {"BRIDGED_CLIENT_CONFIG": str(settings)}
    lab = Gateway.find(environment=env)
    assert (str(lab.address), lab.token, lab.ca) == ("lab.example:7200", "bridged_lab", "/lab.pem")
    shop = Gateway.find("shop", env)
    assert (str(shop.address), shop.token, shop.name, shop.ca) == ("shop.example:7100", "bridged_shop", "gw-4", "")
    env |= {"BRIDGED_GATEWAY": "other.example", "BRIDGED_TOKEN_FILE": str(tmp_path / "env"), "BRIDGED_CA": "/env.pem"}
    other = Gateway.find(environment=env)
    assert (str(other.address), other.token, other.ca) == ("other.example:7100", "bridged_env", "/env.pem")
    # What the environment says of one gateway is not said to one that is named in the file.
    assert Gateway.find("shop", env).token == "bridged_shop"
    flags = Gateway.find("shop", env, token_file=str(tmp_path / "flag"), ca="/flag.pem")
    assert (str(flags.address), flags.token, flags.ca) == ("shop.example:7100", "bridged_flag", "/flag.pem")
    assert Gateway.find("x.example", {"BRIDGED_TOKEN": " t \n", "BRIDGED_CLIENT_CONFIG": str(settings)}).token == "t"
    assert str(Gateway.find(environment={}, settings=_empty(tmp_path)).address) == "127.0.0.1:7100"


def test_on_the_gateway_itself_the_socket_is_meant_where_it_may_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There root is root; by loopback it could not make the first token."""
    path = tmp_path / "bridged.sock"
    monkeypatch.setattr(gateways, "DEFAULT_SOCKET", str(path))
    settings = _empty(tmp_path)
    assert str(Gateway.find(environment={}, settings=settings).address) == "127.0.0.1:7100"
    path.touch()
    assert str(Gateway.find(environment={}, settings=settings).address) == f"unix:{path}"
    assert str(Gateway.find(environment={"BRIDGED_GATEWAY": "gw"}, settings=settings).address) == "gw:7100"


def _empty(root: Path) -> Path:
    path = root / "empty.toml"
    path.write_text("")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "[",
        'default = "x"',
        "[gateways.x]\nport = 1",
        "[gateways]\nx = 1",
        "gateway = 1",
        '[gateways.x]\naddress = "a"\ntoken = "secret"',
    ],
)
def test_a_file_that_says_something_else(tmp_path: Path, text: str) -> None:
    path = tmp_path / "client.toml"
    path.write_text(text)
    with pytest.raises(BadRequest) as found:
        Gateway.find(environment={}, settings=path)
    assert "secret" not in str(found.value)


def test_a_token_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("bridged_geheim\n")
    found = Gateway.find("gw", {}, settings=_empty(tmp_path), token_file=str(tmp_path / "t"))
    assert found.token == "bridged_geheim"
    assert "geheim" not in repr(found)
    (tmp_path / "bad").write_text("two words\n")
    for name in ("bad", "absent"):
        with pytest.raises(BadRequest) as error:
            Gateway.find("gw", {}, settings=_empty(tmp_path), token_file=str(tmp_path / name))
        assert "two words" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "secure"),
    [
        ("127.0.0.1", False),
        ("localhost:7100", False),
        ("[::1]:7100", False),
        ("unix:/run/s", False),
        ("/run/s", False),
        ("gw.example", True),
        ("192.168.1.5:7100", True),
        ("127.0.0.1.evil.example", True),
        ("tls:127.0.0.1", True),
        ("plaintext:gw.example", False),
    ],
)
def test_who_is_spoken_to_in_tls(text: str, secure: bool) -> None:
    assert Address.parse(text).secure is secure


# --- TLS ----------------------------------------------------------------------------------------------------------


KEY_USAGES = (
    *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
    *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
)


class Certificates:
    """A small authority of our own, and what it signs: as RFC 5280 has it, for Python 3.13 and later believe nothing else."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ca = self._make("ca", None, ca=True)

    def make(self, name: str, **more: Any) -> tuple[Path, Path]:
        self._make(name, self.ca, **more)
        return self.root / f"{name}.pem", self.root / f"{name}.key"

    def _make(self, name: str, issuer: Any, *, ca: bool = False, days: int = 1, san: bool = True) -> Any:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = ec.generate_private_key(ec.SECP256R1())
        signer = issuer[1] if issuer else key
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer[0] if issuer else subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=5))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
        if ca:
            usage = {name: name in ("key_cert_sign", "crl_sign") for name in KEY_USAGES}
            builder = builder.add_extension(x509.KeyUsage(**usage), critical=True)
        if san and not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        certificate = builder.sign(signer, hashes.SHA256())
        (self.root / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        path = self.root / f"{name}.key"
        path.touch(0o600)
        path.write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return subject, key


class Served:
    """The line server in a thread of its own, on loopback, in TLS, where nobody may anything without a token."""

    def __init__(self, root: Path, certificates: Certificates, **tls: Any) -> None:
        self.root, self.certificates = root, certificates
        certificate, key = certificates.make("gw.example")
        settings = config.Tls(str(certificate), str(key), **tls)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        (root / "store").mkdir()
        self.store = WatchedStore(root / "store")
        self.jobs = FakeJobs(self.store)
        self.journal = Journal.open(root / "state.db")
        self.authority = Authority(Auth(loopback=[]), self.journal)
        self.tls = Tls(settings)
        self.server = LineServer(
            self.jobs, self.store, "gw1", Limits(linger_s=0.1, login_timeout_s=5), authority=self.authority, tls=self.tls
        )
        self.port: int = self.run(self.server.listen_tcp(Listen("127.0.0.1", 0, "tls")))

    def run(self, what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, self.loop).result(20)

    def token(self, name: str = "ci", **more: Any) -> str:
        _, token = self.run(self.authority.grant(name, [Scope.FLASH], **more))
        path = self.root / f"{name}.token"
        path.write_text(token)
        return str(path)

    def client(self, token_file: str = "", **more: str) -> Client:
        options: dict[str, Any] = {"ca": str(self.certificates.root / "ca.pem"), "name": "gw.example"} | more
        return Client(f"tls:127.0.0.1:{self.port}", retry_s=1, token_file=token_file, **options)

    def stop(self) -> None:
        self.run(self.server.stop())
        self.run(self.jobs.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.journal.close()
        assert not self.jobs.surprises


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    for name in [name for name in os.environ if name.startswith("BRIDGED_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = Served(tmp_path, Certificates(tmp_path), client_ca=str(tmp_path / "ca.pem"))
    yield found
    found.stop()


def test_a_job_over_tls_with_a_token(served: Served, tmp_path: Path) -> None:
    image = tmp_path / "app.elf"
    image.write_bytes(b"firmware" * 100_000)
    digest = hashlib.sha256(image.read_bytes()).hexdigest()
    served.jobs.expect(Script(JobKind.FLASH, "motor1", digest, {}, [("write", 1, 2)], result={"changed": True}))
    with served.client(served.token()) as gateway:
        assert gateway.put(image) == f"sha256:{digest}"
        job = gateway.submit("FLASH", "motor1", f"sha256:{digest}")
        assert gateway.wait(job).code == 250
        assert gateway.status(job)["principal"] == "token-ci"
        assert [row["target"] for row in gateway.targets()] == ["motor1", "motor2"]
        assert gateway.get(digest, tmp_path / "back") == 800_000
        (tmp_path / "link").symlink_to("beyond")
        assert gateway.get(digest, tmp_path / "link") == 800_000
    assert (tmp_path / "link").is_symlink(), "what is no plain file is written to and not replaced, /dev/null above all"
    assert (tmp_path / "beyond").read_bytes() == image.read_bytes()
    assert (tmp_path / "back").read_bytes() == image.read_bytes()
    assert served.jobs.jobs[job].state is JobState.SUCCEEDED


def test_the_command_line_over_tls(served: Served, tmp_path: Path) -> None:
    (tmp_path / "client.toml").write_text(
        f'default = "lab"\n[gateways.lab]\naddress = "tls:127.0.0.1:{served.port}"\nname = "gw.example"\n'
        f'ca = "{tmp_path}/ca.pem"\ntoken_file = "{served.token()}"\n'
    )
    env = {
        **os.environ,
        "BRIDGED_CLIENT_CONFIG": str(tmp_path / "client.toml"),
        "PYTHONPATH": str(Path(__file__).parent.parent),
    }

    def bridged(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "bridged", *args], capture_output=True, text=True, env=env, timeout=30, check=False
        )

    assert "motor1" in bridged("targets").stdout
    refused = bridged("token", "list")
    assert refused.returncode == 77
    assert "needs scope admin" in refused.stderr
    (tmp_path / "ci.token").write_text("bridged_" + "x" * 43)
    wrong = bridged("targets")
    assert wrong.returncode == 77
    assert "BAD_TOKEN" in wrong.stderr
    assert "xxxx" not in wrong.stderr + wrong.stdout
    stranger = bridged("--server-name", "other.example", "targets")
    assert stranger.returncode == 69
    assert "is not believed" in stranger.stderr


def test_refusals_are_typed(served: Served) -> None:
    with served.client() as nobody, pytest.raises(Refused) as found:
        nobody.targets()
    assert isinstance(found.value.error, LoginFirst)
    token = served.token("narrow", targets=["motor2"])
    with served.client(token) as narrow, pytest.raises(Refused) as refused:
        narrow.submit("RESET", "motor1")
    assert isinstance(refused.value.error, NotAllowed)
    served.run(served.authority.revoke("narrow"))
    with served.client(token) as gone, pytest.raises(Refused) as revoked:
        gone.targets()
    assert isinstance(revoked.value.error, WrongToken)


def test_a_false_gateway_gets_no_token(served: Served, tmp_path: Path) -> None:
    """Another authority, another name, no TLS at all: nothing is said before the certificate is believed."""
    token = served.token()
    (tmp_path / "evil").mkdir()
    Certificates(tmp_path / "evil")
    for more in ({"ca": str(tmp_path / "evil" / "ca.pem")}, {"name": "other.example"}, {"ca": ""}):
        with served.client(token, **more) as client, pytest.raises(DaemonUnreachable, match="is not believed"):
            client.targets()
    with socket.create_server(("127.0.0.1", 0)) as plain:
        heard: list[bytes] = []

        def listen() -> None:
            connection, _ = plain.accept()
            with connection:
                connection.sendall(b"220 bridged 1 gw=x proto=1 auth=token\n")
                connection.settimeout(5)
                heard.append(connection.recv(65536))

        thread = threading.Thread(target=listen)
        thread.start()
        served.port = plain.getsockname()[1]
        with served.client(token) as client, pytest.raises(DaemonUnreachable, match="does not speak TLS"):
            client.targets()
        thread.join(10)
    assert b"bridged_" not in heard[0]


def test_old_versions_of_tls_are_not_spoken(served: Served) -> None:
    import ssl

    context = ssl.create_default_context(cafile=str(served.root / "ca.pem"))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", served.port), 5) as sock, pytest.raises(ssl.SSLError):
        context.wrap_socket(sock, server_hostname="gw.example")


def test_plain_text_to_a_tls_port_gets_nothing(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), 5) as sock:
        sock.sendall(b"TARGETS\n")
        assert b"motor" not in sock.recv(1000)


def taken_at(port: int) -> int:
    """How many TCP connections accepted at this IPv4 port this process holds open: whatever else it opens and closes."""
    ours = set()
    for fd in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # Closed meanwhile.
            ours.add(os.readlink(fd))
    rows = (line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:])
    accepted = ("01", "08")  # ESTABLISHED, or CLOSE_WAIT: still ours to close. Who waits in the backlog has no inode.
    return sum(
        row[3] in accepted and int(row[1].partition(":")[2], 16) == port and f"socket:[{row[9]}]" in ours for row in rows
    )


def test_who_begins_tls_and_says_nothing_takes_few_descriptors(served: Served) -> None:
    """Before the handshake nobody is refused in words, and thousands of silent connections would be all that may be open."""
    silent = [socket.create_connection(("127.0.0.1", served.port), 5) for _ in range(300)]
    deadline = time.monotonic() + 10
    taken = turned_away = 0
    while taken + turned_away != len(silent) and time.monotonic() < deadline:
        time.sleep(0.02)
        turned_away = len(select.select(silent, [], [], 0)[0])
        taken = taken_at(served.port)
    assert taken + turned_away == len(silent)
    assert 0 < taken <= 4 * PENDING_EACH
    for sock in silent:
        sock.close()
    with served.client(served.token()) as client:
        assert client.targets()


def test_handshakes_of_one_address_keep_no_other_out() -> None:
    handshakes = Handshakes()
    mine = [handshakes.admit(1000 + n, "192.0.2.1") for n in range(100)]
    assert mine.count(True) == PENDING_EACH
    crowd = [handshakes.admit(2000 + n, f"198.51.100.{n % 100}") for n in range(1000)]
    assert crowd.count(True) + mine.count(True) == PENDING
    assert handshakes.admit(1, "127.0.0.1")
    for fd in range(4000):
        handshakes.taken(fd)
    assert len(handshakes) == 0
    assert handshakes.admit(1, "192.0.2.1")


def test_a_client_certificate_is_a_principal(served: Served) -> None:
    certificate, key = served.certificates.make("robot.example")
    with served.client(certificate=str(certificate), key=str(key)) as stranger, pytest.raises(Refused) as found:
        stranger.targets()  # Signed by the right authority, and still nobody: no rights were given to this name.
    assert isinstance(found.value.error, LoginFirst)
    served.run(served.authority.grant("robot", [Scope.FLASH], ["motor2"], certificate="robot.example"))
    served.jobs.expect(Script(JobKind.RESET, "motor2"))
    with served.client(certificate=str(certificate), key=str(key)) as robot:
        robot.wait(robot.submit("RESET", "motor2"))
        with pytest.raises(Refused):
            robot.submit("RESET", "motor1")
    assert served.jobs.submissions[-1].principal == "cert-robot"


def test_a_certificate_of_another_authority_or_an_expired_one(served: Served, tmp_path: Path) -> None:
    served.run(served.authority.grant("robot", [Scope.FLASH], certificate="robot.example"))
    (tmp_path / "evil").mkdir()
    evil = Certificates(tmp_path / "evil").make("robot.example")
    expired = served.certificates.make("robot.example", days=-1)
    for certificate, key in (evil, expired):
        with served.client(certificate=str(certificate), key=str(key)) as client, pytest.raises((DaemonUnreachable, LinkLost)):
            client.targets()


def test_a_renewed_certificate_needs_no_restart(served: Served, tmp_path: Path) -> None:
    token = served.token()
    before = (tmp_path / "gw.example.pem").read_bytes()
    served.certificates.make("gw.example")
    assert before != (tmp_path / "gw.example.pem").read_bytes()
    served.tls.reload()
    with served.client(token) as client:
        assert client.targets()
        sock: Any = client.session._link and client.session._link._sock
        import ssl

        assert ssl.DER_cert_to_PEM_cert(sock.getpeercert(True)).encode() == (tmp_path / "gw.example.pem").read_bytes()
    (tmp_path / "gw.example.key").write_text("nonsense")
    with pytest.raises(ConfigError):
        served.tls.reload()
    with served.client(token) as client:
        assert client.targets(), "what was read before stays in force"


def test_a_certificate_that_ends_is_told_before(tmp_path: Path) -> None:
    certificate, key = Certificates(tmp_path).make("gw.example", days=1)
    ends = Tls(config.Tls(str(certificate), str(key))).ending
    day = 86400.0
    assert abs(ends.expires - time.time() - day) < 120
    assert ends.warning(ends.expires - 22 * day) == ""
    assert "expires in 20 days (20" in ends.warning(ends.expires - 20 * day)
    assert "has expired, and clients refuse it" in ends.warning(ends.expires + 1)
    fleet = ending("fleet.certificate", str(certificate))
    assert fleet.expires == ends.expires
    assert "has expired, and the broker refuses it" in fleet.warning(ends.expires + 1)


def test_an_authority_that_was_taken_out_is_believed_no_longer(served: Served, tmp_path: Path) -> None:
    """Neither for a new connection nor for one that resumes a session of before."""
    import ssl

    shown = served.certificates.make("robot.example")
    served.run(served.authority.grant("robot", [Scope.FLASH], certificate="robot.example"))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    context.load_cert_chain(*shown)

    def greeting(session: ssl.SSLSession | None = None) -> tuple[str, ssl.SSLSession | None, bool]:
        with (
            socket.create_connection(("127.0.0.1", served.port), 10) as plain,
            context.wrap_socket(plain, server_hostname="gw.example", session=session) as sock,
        ):
            said = sock.recv(4096).decode()
            return said, sock.session, bool(sock.session_reused)

    versions = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
    sessions = []
    for version in versions:
        context.minimum_version = context.maximum_version = version
        said, session, _ = greeting()
        assert "auth=none" in said
        sessions.append(session)
    assert not greeting(sessions[1])[2], "in TLS 1.3 a session would be good for two hours"
    (tmp_path / "other").mkdir()
    Certificates(tmp_path / "other")
    ca = tmp_path / "ca.pem"
    ours = ca.read_bytes()
    ca.write_bytes((tmp_path / "other" / "ca.pem").read_bytes())
    served.tls.reload()
    ca.write_bytes(ours)
    for version, session in zip(versions, sessions, strict=True):
        context.minimum_version = context.maximum_version = version
        for resumed in (session, None):
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                assert greeting(resumed)[0] == "", "closed without a word"


def test_a_key_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    certificate, key = Certificates(tmp_path).make("gw.example")
    key.chmod(0o644)
    with pytest.raises(ConfigError, match="everybody may read the key"):
        Tls(config.Tls(str(certificate), str(key)))
    key.chmod(0o640)
    Tls(config.Tls(str(certificate), str(key)))
    key.rename(tmp_path / "tls-key")
    Tls(config.Tls(str(certificate), "credential:tls-key"), {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    with pytest.raises(ConfigError, match="LoadCredential"):
        Tls(config.Tls(str(certificate), "credential:tls-key"), {})


# --- a bad link ---------------------------------------------------------------------------------------------------

# 1: the times of a bad radio link (2 s of delay, a cut every 30 s): minutes. Else the same shape, 25 times faster.
SCALE = float(os.environ.get("BRIDGED_LINK_SCALE", "0.04"))
DELAY_S, CUT_S, STALL_S = 2.0 * SCALE, 30.0 * SCALE, 5.0 * SCALE
RATE = 12_000 / SCALE  # Bytes a second: an upload of 1 MiB takes about three cuts.


@dataclass
class FaultProxy:
    """A TCP proxy to ``port`` that delays, limits the rate, stalls, and cuts every connection after a while."""

    port: int
    cuts: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._listener = socket.socket()
        # Like a modem and not like a machine with memory for everything that is under way.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen()
        self.where = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.port))
            dead = threading.Event()
            carriers = [
                threading.Thread(target=self._carry, args=(a, b, dead), daemon=True) for a, b in ((near, far), (far, near))
            ]
            for carrier in carriers:
                carrier.start()
            if not dead.wait(CUT_S):
                self.cuts += 1
                dead.set()
            for sock in (near, far):
                # A link that breaks: nothing that was under way arrives.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
            for carrier in carriers:
                carrier.join(10)

    def _carry(self, source: socket.socket, sink: socket.socket, dead: threading.Event) -> None:
        """What is read is under way for ``DELAY_S``; no more is read than the rate allows."""
        under_way: list[tuple[float, bytes]] = []
        source.settimeout(0.005)
        free_at, stall = time.monotonic(), random.Random(self.cuts)
        while not dead.is_set():
            now = time.monotonic()
            try:
                if now >= free_at:
                    data = source.recv(4096)
                    if not data:
                        break
                    if stall.random() < 0.01:
                        free_at = now + STALL_S
                    free_at = max(free_at, now) + len(data) / RATE
                    under_way.append((free_at + DELAY_S, data))
                else:
                    dead.wait(min(0.005, free_at - now))
            except TimeoutError:
                pass
            except OSError:
                break
            while under_way and under_way[0][0] <= time.monotonic():
                try:
                    sink.sendall(under_way.pop(0)[1])
                except OSError:
                    dead.set()
                    return
        if not dead.is_set():
            for at, data in under_way:
                dead.wait(max(0.0, at - time.monotonic()))
                if dead.is_set():
                    return
                try:
                    sink.sendall(data)
                except OSError:
                    break
        dead.set()

    def stop(self) -> None:
        self._stop.set()
        self._listener.close()


class Swallower:
    """A link in virtual time that takes two chunks, ``chunk_s`` each, and breaks; of every second one the gateway keeps one."""

    now, chunk_s, kept, links, size = 0.0, 0.0, False, 0, 0

    def __init__(self, _gateway: Gateway) -> None:
        Swallower.links += 1
        self._room = 2
        self._held = (Swallower.links - 1) // 2 * CHUNK_BYTES if Swallower.kept else 0
        self._reply = Reply(250, "", {})

    @classmethod
    def sleep(cls, seconds: float) -> None:
        cls.now += seconds
        assert cls.now < 100_000, "for ever"

    def send(self, data: bytes) -> None:
        if data.startswith(b"HAVE"):
            self._reply = Reply(250, "", {"offset": self._held, "size": self.size})
        elif data.startswith(b"PUT"):
            self._reply = Reply(354, "", {})
        elif not self._room:
            raise LinkLost("reset")
        else:
            self._room -= 1
            Swallower.sleep(self.chunk_s)
            self._reply = Reply(250, "STORED", {})

    def reply(self) -> Reply:
        return self._reply

    def close(self) -> None:
        pass


def test_an_upload_that_gets_nowhere_is_given_up_and_one_that_is_slow_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "app.bin"
    image.write_bytes(bytes(6 * CHUNK_BYTES))
    clock = SimpleNamespace(monotonic=lambda: Swallower.now, sleep=Swallower.sleep)
    for module, name, value in ((link_module, "time", clock), (files, "time", clock), (link_module, "Link", Swallower)):
        monkeypatch.setattr(module, name, value)

    def send(chunk_s: float, kept: bool) -> float:
        Swallower.now, Swallower.chunk_s, Swallower.kept, Swallower.links, Swallower.size = (
            0.0,
            chunk_s,
            kept,
            0,
            6 * CHUNK_BYTES,
        )
        reply = upload(Session(Gateway(Address.parse("127.0.0.1")), 60), LocalFile.of(image), "", None, lambda *_: None)
        assert reply.text == "STORED"
        return Swallower.now

    with pytest.raises(DaemonUnreachable, match="within 60 s"):
        send(0.0, kept=False)
    assert 50 < Swallower.now <= 61
    with pytest.raises(DaemonUnreachable):
        send(100.0, kept=False)
    assert send(100.0, kept=True) > 1000, "a link may take longer than the patience"
    # What vanishes between its digest and its bytes.
    local = LocalFile.of(image)
    image.unlink()
    with pytest.raises(BadRequest, match="No such file"):
        upload(Session(Gateway(Address.parse("127.0.0.1")), 60), local, "", None, lambda *_: None)


def test_a_name_that_no_certificate_has(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = socket.socketpair()
    monkeypatch.setattr(Address, "connect", lambda _self: near)
    with far, pytest.raises(BadRequest, match="no name that a certificate can have"):
        Gateway(Address.parse("gw.example"), name="a..b").connect()
    assert near.fileno() == -1


@pytest.mark.timeout(120 if SCALE <= 0.2 else 900)
def test_a_mebibyte_over_a_bad_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It arrives, and of each cut at most one chunk is sent again, by the count of both ends."""
    monkeypatch.setenv("HOME", str(tmp_path))
    came: list[int] = []
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    store = WatchedStore(tmp_path / "store")
    jobs = FakeJobs(store)
    server = LineServer(jobs, store, "gw1", Limits(linger_s=0.1), lambda count, _resumed: came.append(count))

    def run(what: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(what, loop).result(20)

    port = run(server.listen_tcp(Listen("127.0.0.1", 0)))
    proxy = FaultProxy(port)
    image = tmp_path / "app.bin"
    image.write_bytes(random.Random(1).randbytes(1 << 20))
    sent, seen = 0, []
    try:
        session = Session(Gateway(Address.parse(f"127.0.0.1:{proxy.where}")), 60 * max(SCALE, 0.2))
        begun = time.monotonic()

        links: list[Any] = []
        make = link_module.Link

        def noted(gateway: Gateway) -> Any:
            links.append(make(gateway))
            return links[-1]

        monkeypatch.setattr(link_module, "Link", noted)
        reply = upload(session, LocalFile.of(image), "", None, lambda done, total, _rate: seen.append((done, total)))
        took = time.monotonic() - begun
        session.close()
        sent = sum(link.sent_bytes for link in links)
        assert reply.code == 250
    finally:
        proxy.stop()
        run(server.stop())
        run(jobs.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
    cuts = proxy.cuts
    print(f"{took:.1f} s, {cuts} cuts; the gateway got {sum(came) - (1 << 20)} bytes twice, the client sent {sent - (1 << 20)}")
    assert cuts >= 2, "a link that was not cut shows nothing"
    assert store.get("app.bin").sha256 == hashlib.sha256(image.read_bytes()).hexdigest()
    assert sum(came) - (1 << 20) <= cuts * SYNC_BYTES
    assert sent - (1 << 20) <= cuts * (SYNC_BYTES + 4096) + 4096
    assert seen[-1] == (1 << 20, 1 << 20)
