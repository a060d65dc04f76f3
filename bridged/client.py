"""A client of the line protocol for Python programs, and for our own command line: standard library only, no event loop.

    from bridged.client import Client
    with Client("gw.example:7100", token_file="~/gw.token") as gateway:
        image = gateway.put("app.elf")
        job = gateway.submit("FLASH", "motor1", image)
        print(gateway.wait(job, lambda update: print(update)))

What it adds to the protocol is that nothing is lost when the link is. An upload goes on where the gateway has synced it; a job
is submitted under an id of our own, so that saying it again finds the same job; waiting and watching are simply begun anew.
After ``retry_s`` without a word it gives up. Document: docs/client.md.

Which gateway: an argument, else the environment, else a configuration file; ``Gateway.find`` is the one place that knows the
order. As the gateway does, so the client: plain text to loopback, TLS to anybody else unless ``plaintext:`` is asked for, so
that no token goes out in the clear by a slip. A token is read from a file and is in no argument, message or ``repr``.

It knows nothing of images, chips or wires: the gateway checks, plans and explains.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from bridged.errors import BadRequest, BridgedError, DaemonUnreachable, DigestMismatch, EmptyImage, from_dict
from bridged.protocol import line as codec
from bridged.protocol.line import Reply, format_request

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

CHUNK_BYTES = 64 * 1024
SEND_BUFFER_BYTES = 32 * 1024  # What is under way when a link breaks is sent again: the kernel would take megabytes of it.
CONNECT_TIMEOUT_S = 10.0
SILENCE_S = 60.0  # The gateway says something at least every 15 s while it works for us; four times that is a dead link.
BACKOFF_S = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
RETRY_S = 60.0
TOKEN_CHARS = 256  # Of a token file; a token has 51.
DEFAULT_GATEWAY = f"127.0.0.1:{codec.TCP_PORT}"
DEFAULT_SOCKET = "/run/bridged/bridged.sock"  # On the gateway itself, for those who may open it: it says who they are.
SETTINGS = "~/.config/bridged/client.toml"


class Refused(Exception):
    """The gateway answered with an error; it is the result of the request. ``error``: the same, typed."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(f"{reply.data.get('message') or ''} [{reply.text}]".strip())
        self.reply = reply

    @property
    def error(self) -> BridgedError:
        facts = {key[5:]: value for key, value in self.reply.data.items() if key.startswith("fact.")}
        return from_dict({"code": self.reply.text, "message": self.reply.data.get("message", ""), "facts": facts})


class LinkLost(Exception):
    """The connection broke, or nobody spoke for too long."""


# --- which gateway ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Address:
    """Where the gateway is: ``[tls:|plaintext:]HOST[:PORT]``, ``[v6]:PORT``, ``unix:PATH`` or an absolute path."""

    host: str = ""
    port: int = 0
    path: str = ""
    scheme: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises ``BadRequest``."""
        if text.startswith("unix:") and len(text) > 5:
            return cls(path=text[5:])
        if text.startswith("/"):  # What else could it be?
            return cls(path=text)
        scheme = next((name for name in ("tls", "plaintext") if text.startswith(f"{name}:")), "")
        where = text.removeprefix(f"{scheme}:") if scheme else text
        host, colon, port = where.rpartition(":")
        if not colon or (where.count(":") > 1 and not where.startswith("[")) or where.endswith("]"):
            host, port = where, str(codec.TCP_PORT)
        if (
            not re.fullmatch(r"[\w.:%\[\]-]{1,253}", host, re.ASCII)
            or not port.isascii()
            or not port.isdigit()
            or not 0 < int(port) < 65536
        ):
            raise BadRequest(f"gateway {text!r}: expected [tls:|plaintext:]HOST[:PORT], or unix:PATH")
        return cls(host=host.strip("[]"), port=int(port), scheme=scheme)

    @property
    def secure(self) -> bool:
        """Whether TLS is spoken there; names are not looked up."""
        if self.path or self.scheme == "plaintext":
            return False
        local = self.host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", self.host) is not None
        return self.scheme == "tls" or not local

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"

    def connect(self) -> socket.socket:
        if self.path:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(CONNECT_TIMEOUT_S)
                sock.connect(self.path)
            except OSError:
                sock.close()
                raise
            return sock
        sock = socket.create_connection((self.host, self.port), CONNECT_TIMEOUT_S)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        return sock


@dataclass(frozen=True, slots=True)
class Gateway:
    """How to reach one gateway. ``ca``: whose certificates are believed (PEM), empty: those that the system believes.

    ``certificate``, ``key``: our own, where the gateway wants to see one. ``name``: in its certificate, if it is not the host.
    """

    address: Address
    token: str = field(default="", repr=False)
    ca: str = ""
    certificate: str = ""
    key: str = ""
    name: str = ""

    @classmethod
    def find(
        cls, where: str = "", environment: Mapping[str, str] = os.environ, *, settings: str | Path = "", **options: str
    ) -> Gateway:
        """``where`` (an address, or a name in the configuration file) and ``options`` (``token_file``, ``ca``, ``certificate``,
        ``key``, ``name``) beat the environment (``BRIDGED_GATEWAY``, ``BRIDGED_TOKEN_FILE``, ``BRIDGED_TOKEN``,
        ``BRIDGED_CA`` and so on), and that beats the file (``BRIDGED_CLIENT_CONFIG``). Raises ``BadRequest``."""
        path = Path(settings or environment.get("BRIDGED_CLIENT_CONFIG") or SETTINGS).expanduser()
        known, default = _settings(path, required=bool(settings or environment.get("BRIDGED_CLIENT_CONFIG")))
        where = where or environment.get("BRIDGED_GATEWAY", "") or default or _here()
        entry = known.get(where, {})
        values = {name: str(entry.get(name, "")) for name in _OPTIONS}
        # What belongs to one gateway in the file is not mixed with the environment, which speaks of another one perhaps.
        if not entry:
            values = {name: environment.get(f"BRIDGED_{name.upper()}", "") for name in _OPTIONS}
        values |= {name: value for name, value in options.items() if value}
        token = _token(values.pop("token_file"))
        if not token and not entry:
            token = environment.get("BRIDGED_TOKEN", "").strip()
        files = {name: str(Path(values[name]).expanduser()) if values[name] else "" for name in ("ca", "certificate", "key")}
        return cls(Address.parse(str(entry.get("address", where))), token, name=values["name"], **files)

    def context(self) -> ssl.SSLContext:
        """Raises ``BadRequest``. Late import: `ssl` costs as much as the rest of a command, and loopback needs none."""
        import ssl

        try:
            found = ssl.create_default_context(cafile=self.ca or None)
            found.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.certificate:
                found.load_cert_chain(self.certificate, self.key or None)
        except OSError as error:
            raise BadRequest(f"reading the certificates for {self.address}: {error.strerror or error}") from error
        return found

    def connect(self) -> socket.socket:
        """Raises ``OSError``, and ``DaemonUnreachable`` where the certificate is not to be believed: again is no use then."""
        sock = self.address.connect()
        if not self.address.secure:
            return sock
        import ssl

        try:
            return self.context().wrap_socket(sock, server_hostname=self.name or self.address.host)
        except ssl.SSLCertVerificationError as error:
            sock.close()
            text = f"the certificate of {self.address} is not believed: {error.verify_message}; see --ca and --server-name"
            raise DaemonUnreachable(text, gateway=str(self.address)) from error
        except ssl.SSLError as error:
            sock.close()
            reason = error.reason or error
            raise DaemonUnreachable(
                f"{self.address} does not speak TLS as we do ({reason})", gateway=str(self.address)
            ) from error
        except BaseException:
            sock.close()
            raise


def _here() -> str:
    """The gateway on this machine. Root and its like have more rights on the socket than loopback gives."""
    return f"unix:{DEFAULT_SOCKET}" if os.access(DEFAULT_SOCKET, os.R_OK | os.W_OK) else DEFAULT_GATEWAY


_OPTIONS = ("token_file", "ca", "certificate", "key", "name")


def _settings(path: Path, required: bool) -> tuple[dict[str, dict[str, Any]], str]:
    """The gateways in the configuration file by name, and which of them is meant where none is named."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        if required:
            raise BadRequest(f"reading {path}: {error.strerror}", path=str(path)) from error
        return {}, ""
    except OSError as error:
        raise BadRequest(f"reading {path}: {error.strerror or error}", path=str(path)) from error
    import tomllib

    try:
        data = tomllib.loads(raw.decode())
        known = data.pop("gateways", {})
        default = data.pop("default", "")
        wrong = [
            *data,
            *(f"{name}.{key}" for name, entry in known.items() for key in entry if key not in ("address", *_OPTIONS)),
        ]
        wrong += [f"{name}: no address" for name, entry in known.items() if not isinstance(entry.get("address"), str)]
        if default and default not in known:
            wrong.append(f"default = {default!r}, which is in no table")
    except (ValueError, AttributeError, TypeError) as error:
        raise BadRequest(f"{path}: {error}", path=str(path)) from error
    if wrong:
        expected = f"default = NAME and tables [gateways.NAME] with address, {', '.join(_OPTIONS)}"
        raise BadRequest(f"{path}: {', '.join(wrong)}: expected {expected}", path=str(path))
    return known, str(default)


def _token(file: str) -> str:
    if not file:
        return ""
    path = Path(file).expanduser()
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            token = stream.read(TOKEN_CHARS).strip()
    except OSError as error:
        raise BadRequest(f"reading the token in {path}: {error.strerror or error}", path=str(path)) from error
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise BadRequest(f"{path} holds no token: one line of printable characters is expected", path=str(path))
    return token


# --- the connection -----------------------------------------------------------------------------------------------


class Link:
    """One connection that has said hello. Every failure is ``LinkLost``, except a peer that is not bridged."""

    def __init__(self, gateway: Gateway) -> None:
        self._buffer = bytearray()
        self.sent_bytes = 0
        try:
            self._sock = gateway.connect()
        except OSError as error:
            raise LinkLost(f"{error.strerror or error}") from error
        try:
            self._sock.settimeout(SILENCE_S)
            greeting = self.reply()
            if greeting.code != 220:
                raise Refused(greeting)
            self._expect(b"HELLO proto=1 format=json\n", 250)
            if gateway.token:
                self._expect(format_request("AUTH", gateway.token), 235)
        except BadRequest as error:
            self.close()
            text = f"{gateway.address} answers, but not as bridged does: {error.message}"
            raise DaemonUnreachable(text) from error
        except BaseException:
            self.close()
            raise

    def _expect(self, request: bytes, code: int) -> None:
        self.send(request)
        if (reply := self.reply()).code != code:
            raise Refused(reply)

    def close(self) -> None:
        self._sock.close()

    def send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise LinkLost(f"sending failed: {error.strerror or error}") from error
        self.sent_bytes += len(data)

    def _fill(self) -> None:
        try:
            chunk = self._sock.recv(CHUNK_BYTES)
        except OSError as error:
            raise LinkLost(f"receiving failed: {error.strerror or error}") from error
        if not chunk:
            raise LinkLost("the gateway closed the connection")
        self._buffer += chunk

    def reply(self) -> Reply:
        """One reply line. A gateway that is closing down counts as a lost link: it, or the next one, will be back."""
        searched = 0
        while (at := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > 1 << 20:
                raise BadRequest(f"a reply without end: {bytes(self._buffer[:80])!r}")
            self._fill()
        found = bytes(self._buffer[: at + 1])
        del self._buffer[: at + 1]
        reply = codec.parse_reply(found)
        if reply.code == 421:
            raise LinkLost(str(reply.data.get("message") or "the gateway is shutting down"))
        return reply

    def bytes_from_now_on(self) -> tuple[socket.socket, bytes]:
        """The connection after its last reply line, and what has come behind that already."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return self._sock, rest

    def raw(self, count: int) -> Iterator[bytes]:
        """Exactly ``count`` raw bytes, in pieces."""
        while count:
            if not self._buffer:
                self._fill()
            piece = bytes(self._buffer[:count])
            del self._buffer[: len(piece)]
            count -= len(piece)
            yield piece


class Console:
    """A target's serial port: its bytes, both ways, until the connection ends. ``fileno`` is for ``select``."""

    def __init__(self, link: Link) -> None:
        self._sock, self._before = link.bytes_from_now_on()
        # Nobody has to say anything here for hours, so a gateway that vanished is found by probes.
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if self._sock.family != socket.AF_UNIX:
            for option, value in ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 6)):
                self._sock.setsockopt(socket.IPPROTO_TCP, option, value)

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self) -> bytes:
        """What has come, without waiting; empty where that was nothing, or part of a TLS record. Raises ``LinkLost``."""
        found, self._before = self._before, b""
        self._sock.settimeout(0)
        while True:
            try:
                piece = self._sock.recv(CHUNK_BYTES)
            except OSError as error:
                # ssl.SSLWantReadError, named by what it says, so that a plain connection need not import ssl.
                if isinstance(error, BlockingIOError) or type(error).__name__ == "SSLWantReadError":
                    return found
                raise LinkLost(f"receiving failed: {error.strerror or error}") from error
            if not piece:
                if found:
                    return found  # The end comes again.
                raise LinkLost("the gateway closed the connection")
            found += piece
            if len(found) > CHUNK_BYTES and not getattr(self._sock, "pending", int)():
                return found

    def write(self, data: bytes) -> None:
        """Raises ``LinkLost``, also when the gateway takes nothing for ``SILENCE_S``."""
        self._sock.settimeout(SILENCE_S)
        try:
            self._sock.sendall(data)
        except OSError as error:
            raise LinkLost(f"sending failed: {error.strerror or error}") from error

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Console:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


class Session:
    """The conversation with a gateway across as many connections as it takes.

    ``call`` repeats its action on a new connection after a lost one, so every action must be one that may be said twice.
    """

    def __init__(self, gateway: Gateway, retry_s: float, note: Callable[[str], None] = lambda _text: None) -> None:
        self.gateway, self.retry_s, self._note = gateway, retry_s, note
        self._link: Link | None = None
        self._ever = False
        self._deadline = 0.0
        self._failures = 0

    def close(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None

    def alive(self) -> None:
        """Something went forward: the patience for the next breakdown starts anew."""
        if self._failures:
            self._note("connected again")
        self._failures = 0

    def call(self, action: Callable[[Link], T]) -> T:
        """Raises ``DaemonUnreachable`` when the gateway was never there, or did not come back in time."""
        while True:
            try:
                if self._link is None:
                    self._link = Link(self.gateway)
                    self._ever = True
                result = action(self._link)
            except LinkLost as lost:
                self.close()
                self._wait_after(lost)
            except BaseException:
                self.close()  # In the middle of a conversation nobody knows what comes next.
                raise
            else:
                self.alive()
                return result

    def _wait_after(self, lost: LinkLost) -> None:
        now, where = time.monotonic(), self.gateway.address
        if not self._failures:
            self._deadline = now + self.retry_s
        if not self._ever:
            raise DaemonUnreachable(f"connecting to {where} failed: {lost}", gateway=str(where)) from lost
        pause = BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
        if now + pause > self._deadline:
            text = f"the connection to {where} was lost and did not come back within {self.retry_s:g} s: {lost}"
            raise DaemonUnreachable(text, gateway=str(where)) from lost
        if not self._failures:
            self._note(f"connection lost ({lost}); trying again")
        self._failures += 1
        time.sleep(pause)

    def take(self, action: Callable[[Link], T]) -> T:
        """As ``call``, and from then on the connection belongs to what ``action`` gave back."""
        result = self.call(action)
        self._link = None
        return result

    def ask(self, request: bytes, each: Callable[[Reply], None] = lambda _reply: None) -> Reply:
        """Says one line; ``each`` gets every line of the answer but the last, which is returned."""

        def action(link: Link) -> Reply:
            link.send(request)
            while True:
                reply = link.reply()
                if not reply.more:
                    return reply
                self.alive()
                each(reply)

        return self.call(action)


# --- images -------------------------------------------------------------------------------------------------------

Progress = Callable[[int, int, float], None]
"""Bytes done, bytes in all, bytes a second (0 where not known yet)."""


def split_address(text: str) -> tuple[str, str]:
    """``FILE@0x08000000`` as file and ``@0x08000000``. A file of that very name is taken as it is."""
    match = re.fullmatch(r"(.+)(@0[xX][0-9A-Fa-f]{1,8})", text)
    return (match[1], match[2]) if match and not os.path.exists(text) else (text, "")


def signature_text(path: Path) -> str:
    """A ``.minisig`` file as ``sig=`` takes it. The untrusted comment proves nothing, and a request line is short."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise BadRequest(f"reading the signature {path} failed: {error}", path=str(path)) from error
    return base64.b64encode("\n".join(["untrusted comment:", *lines[1:]]).encode()).decode()


@dataclass(frozen=True, slots=True)
class LocalFile:
    path: Path
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> LocalFile:
        """Raises ``BadRequest`` (no such file), ``EmptyImage``."""
        digest, size = hashlib.sha256(), 0
        try:
            with path.open("rb", buffering=0) as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise BadRequest(f"reading {path} failed: {error.strerror or error}", path=str(path)) from error
        if not size:
            raise EmptyImage(f"{path} has no bytes", path=str(path))
        return cls(path, size, digest.hexdigest())

    @property
    def plain_name(self) -> str:
        """A name that the protocol can say."""
        text = "".join(c if " " <= c <= "~" and c != "," else "_" for c in self.path.name)[:128]
        return re.sub(r"@(0[xX][0-9A-Fa-f]+)$", r"_\1", text)  # which would be an address


def upload(session: Session, local: LocalFile, name: str, type_hint: str | None, progress: Progress) -> Reply:
    """Stages a file, going on where the gateway has it; the last reply. Raises ``Refused``, ``DaemonUnreachable``."""
    have_request = format_request("HAVE", local.sha256)
    rounds = 0

    def action(link: Link) -> Reply:
        nonlocal rounds
        link.send(have_request)
        have = link.reply()
        if have.code not in (250, 404):
            raise Refused(have)
        if have.code == 250 and have.data.get("complete"):
            return have
        offset = int(have.data.get("offset") or 0) if have.data.get("size") == local.size_bytes else 0
        link.send(
            format_request(
                "PUT", str(local.size_bytes), local.sha256, offset=offset or None, name=name or local.plain_name, type=type_hint
            )
        )
        if (ready := link.reply()).code != 354:
            raise Refused(ready)
        _send_file(session, link, local, offset, progress)
        staged = link.reply()
        rounds += 1
        if staged.code == 429 or (staged.code == 501 and "fact.offset" in staged.data):
            # The gateway still holds the upload of our lost connection, or its end moved: look again.
            if rounds > 20:
                raise Refused(staged)
            raise LinkLost(str(staged.data.get("message") or staged.text))
        if staged.code >= 400:
            raise Refused(staged)
        return staged

    return session.call(action)


def _send_file(session: Session, link: Link, local: LocalFile, offset: int, progress: Progress) -> None:
    """The bytes from ``offset`` on: exactly as many as were announced, also if the file has changed meanwhile."""
    started, first = time.monotonic(), offset
    with local.path.open("rb", buffering=0) as file:
        file.seek(offset)
        while offset < local.size_bytes:
            chunk = file.read(min(CHUNK_BYTES, local.size_bytes - offset))
            # A file that became shorter is filled up; its digest cannot be right then, and the gateway will say so.
            chunk = chunk or bytes(min(CHUNK_BYTES, local.size_bytes - offset))
            link.send(chunk)
            offset += len(chunk)
            session.alive()
            seconds = time.monotonic() - started
            # What the socket buffers swallow in the first moment says nothing about the link.
            progress(offset, local.size_bytes, (offset - first) / seconds if seconds > 0.5 else 0.0)


def fetch(session: Session, ref: str, path: Path) -> int:
    """GET into a file that appears whole or not at all; the number of bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")

    def action(link: Link) -> int:
        link.send(format_request("GET", ref))
        if (head := link.reply()).code != 250:
            raise Refused(head)
        digest = hashlib.sha256()
        with temporary.open("wb") as file:
            for piece in link.raw(int(head.data["size"])):
                digest.update(piece)
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != head.data["sha256"]:
            raise DigestMismatch(f"{ref} arrived with SHA-256 {digest.hexdigest()}, announced was {head.data['sha256']}")
        return int(head.data["size"])

    try:
        size = session.call(action)
        temporary.replace(path)
    except OSError as error:
        raise BadRequest(f"writing {path} failed: {error.strerror or error}", path=str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return size


# --- what one asks a gateway --------------------------------------------------------------------------------------

Each = Callable[[Reply], None]


def _nothing(_reply: Reply) -> None:
    pass


class Client:
    """One gateway. Every method may raise ``Refused`` (it said no, and why), ``DaemonUnreachable`` and ``BadRequest``.

    ``note`` gets sentences about the link; ``each`` of a method the lines of an answer as they come.
    """

    def __init__(
        self,
        where: str | Gateway = "",
        *,
        retry_s: float = RETRY_S,
        note: Callable[[str], None] = lambda _text: None,
        **options: str,
    ) -> None:
        gateway = where if isinstance(where, Gateway) else Gateway.find(where, os.environ, **options)
        self.session = Session(gateway, retry_s, note)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self.session.close()

    def ask(self, verb: str, *words: str, each: Each = _nothing, **options: str | int | None) -> Reply:
        """One request that may be said twice; its last line. Options that are ``None`` are left out."""
        reply = self.session.ask(format_request(verb, *words, **options), each)
        if reply.code >= 400:
            raise Refused(reply)
        return reply

    def rows(self, verb: str, *words: str, **options: Any) -> list[dict[str, Any]]:
        """What the lines of a list say, without the last one, which counts them."""
        found: list[dict[str, Any]] = []
        options["each"] = lambda reply: found.append(dict(reply.data))
        self.ask(verb, *words, **options)
        return found

    # images

    def put(self, path: str | Path, name: str = "", type: str | None = None, progress: Progress = lambda *_: None) -> str:
        """Stages a file, resuming wherever it can; as ``submit`` names it (``sha256:HEX``)."""
        return self.stage(LocalFile.of(Path(path)), name, type, progress)[0]

    def stage(self, local: LocalFile, name: str, type: str | None, progress: Progress) -> tuple[str, Reply]:
        """As ``put``, with the reply."""
        return f"sha256:{local.sha256}", upload(self.session, local, name, type, progress)

    def get(self, ref: str, path: str | Path) -> int:
        """An image, or what a READ job has read, into a file that appears whole or not at all; the number of bytes."""
        return fetch(self.session, ref, Path(path))

    # jobs

    def submit(self, verb: str, target: str, *words: str, id: str = "", **options: Any) -> str:
        """FLASH, ENSURE, VERIFY, READ, ERASE, RESET, ID, DOCTOR; the id of the job, which runs on without us."""
        return str(self.submitted(verb, target, *words, id=id, **options).data["job"])

    def submitted(self, verb: str, target: str, *words: str, id: str = "", **options: Any) -> Reply:
        """As ``submit``, with the whole reply: 251 for an ensure that was true already."""
        # Our own id makes it a request that may be said twice: after a lost link we cannot know whether it was heard.
        return self.ask(verb, target, *words, id=id or f"cli-{os.urandom(8).hex()}", **options)

    def wait(self, job: str, each: Each = _nothing) -> Reply:
        """Until the job has ended, however often the link breaks; its final line. ``Refused`` when it did not end well."""
        return self.ask("WAIT", job, each=each)

    def watch(self, what: str, each: Each) -> Reply:
        """Updates of a target or of everything (``*``), however often the link breaks; comes back only with an error."""
        return self.ask("WATCH", what, each=each)

    def status(self, job: str) -> dict[str, Any]:
        return dict(self.ask("STATUS", job).data)

    def jobs(self, target: str | None = None, state: str | None = None, limit: int | None = None) -> list[dict[str, Any]]:
        return self.rows("JOBS", target=target, state=state, limit=limit)

    def cancel(self, job: str, force: bool = False) -> dict[str, Any]:
        return dict(self.ask("CANCEL", job, force=1 if force else None).data)

    def log(self, job: str, since: int | None = None) -> list[dict[str, Any]]:
        options: dict[str, Any] = {"from": since}
        return self.rows("LOG", job, **options)

    def trace(self, job: str) -> bytes:
        """The flight recording of a job; ``protocol.trace`` reads it."""

        def action(link: Link) -> bytes:
            link.send(format_request("TRACE", job))
            if (head := link.reply()).code != 250:
                raise Refused(head)
            return b"".join(link.raw(int(head.data["size"])))

        return self.session.call(action)

    # targets

    def targets(self) -> list[dict[str, Any]]:
        return self.rows("TARGETS")

    def console(self, target: str, *, write: bool = True, replay: int | None = None, force: bool = False) -> Console:
        """The target's serial port on a connection of its own. ``replay``: so many bytes of what was said before come first.

        A connection that breaks later is ``LinkLost``; what the target says until the next one is in its history (``replay``).
        """
        request = format_request("CONSOLE", target, "rw" if write else "ro", replay=replay, force=1 if force else None)

        def action(link: Link) -> Console:
            link.send(request)
            if (reply := link.reply()).code != 101:
                raise Refused(reply)
            return Console(link)

        return self.session.take(action)

    def lock(self, target: str, ttl_s: int | None = None, note: str | None = None, force: bool = False) -> dict[str, Any]:
        """Reserves a target: the jobs and the typing of others wait until it runs out, or ``unlock``."""
        return dict(self.ask("LOCK", target, ttl=ttl_s, note=note, force=1 if force else None).data)

    def unlock(self, target: str, force: bool = False) -> None:
        self.ask("UNLOCK", target, force=1 if force else None)

    def info(self, target: str) -> dict[str, Any]:
        return {key: value for row in self.rows("INFO", target) for key, value in row.items()}
