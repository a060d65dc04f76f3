"""Which gateway is meant, and how it is reached and believed.

It is said by an argument, else the environment, else a configuration file; ``Gateway.find`` is the one place that knows the
order. As the gateway does, so the client: plain text to loopback, TLS to anybody else unless ``plaintext:`` is asked for, so
that no token goes out in the clear by a slip. A token is read from a file and is in no argument, message or ``repr``.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridged.errors import BadRequest, DaemonUnreachable
from bridged.protocol.verbs import TCP_PORT

if TYPE_CHECKING:
    import ssl

SEND_BUFFER_BYTES = 32 * 1024  # What is under way when a link breaks is sent again: the kernel would take megabytes of it.
CONNECT_TIMEOUT_S = 10.0
TOKEN_CHARS = 256  # Of a token file; a token has 51.
DEFAULT_GATEWAY = f"127.0.0.1:{TCP_PORT}"
DEFAULT_SOCKET = "/run/bridged/bridged.sock"  # On the gateway itself, for those who may open it: it says who they are.
SETTINGS = "~/.config/bridged/client.toml"
_OPTIONS = ("token_file", "ca", "certificate", "key", "name")


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
            host, port = where, str(TCP_PORT)
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
        """Raises ``OSError``, ``BadRequest``."""
        if self.path:
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.settimeout(CONNECT_TIMEOUT_S)
                sock.connect(self.path)
            except OSError:
                sock.close()
                raise
            return sock
        try:
            sock = socket.create_connection((self.host, self.port), CONNECT_TIMEOUT_S)
        except UnicodeError as error:
            raise BadRequest(f"gateway {self.host!r} is no name that a host can have: {error}") from error
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
        """Raises ``OSError``; ``BadRequest`` and, where no certificate is believed, ``DaemonUnreachable``: for good."""
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
        except ValueError as error:
            sock.close()
            name = self.name or self.address.host
            raise BadRequest(f"{name!r} is no name that a certificate can have: {error}") from error
        except BaseException:
            sock.close()
            raise


def _here() -> str:
    """The gateway on this machine. Root and its like have more rights on the socket than loopback gives."""
    return f"unix:{DEFAULT_SOCKET}" if os.access(DEFAULT_SOCKET, os.R_OK | os.W_OK) else DEFAULT_GATEWAY


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
