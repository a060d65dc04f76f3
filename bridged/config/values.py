"""What one value of the configuration may be: each check says in words what is wrong, or nothing.

Values that mean more than their text (addresses to listen on, ranges, windows of time) are read here, too.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_ITEMS = 64  # Of a list: steps of a sequence, targets that share.
MAX_CHARS = 4096  # Of a string that has no limit of its own; the longest path of Linux.
SCOPES = ("read", "flash", "console", "admin")  # As ``protocol.verbs.Scope``, which this module must not know.
HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63}){0,8}")
LABEL = re.compile(r"[A-Za-z0-9_.-]{1,32}=[A-Za-z0-9_.-]{1,64}")
FLEET_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
BY_HAND = "by-hand"
LINE_NAMES = ("nrst", "boot0", "power")
INPUT_NAMES = ("safe", "alive")
_MODEM_INPUTS = ("cts", "dsr", "ri", "cd", "!cts", "!dsr", "!ri", "!cd")
_MODEM_LINES = ("dtr", "rts", "!dtr", "!rts")
_NUMBER = r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}"
_SERVER = re.compile(r"(tls|nats)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]{1,253}):([0-9]{1,5})")
_URL = re.compile(r"(https?)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]{1,253})(:[0-9]{1,5})?(/[A-Za-z0-9._~%/-]*)?")
_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_LOOPBACK_ONLY = (
    "only loopback can be bound (127.0.0.1, [::1], localhost): this page asks nobody for a token; for a remote client forward"
    " the port with ssh -L"
)
CERTIFICATES_ONLY = (
    "a console knows who connects by a client certificate only, so beyond loopback it needs TLS and that: set tls.certificate,"
    " tls.key and tls.client_ca, and give names rights (bridged token add NAME --certificate WHO --scope console). Or stay on"
    " 127.0.0.1: CONSOLE of the line protocol takes a token, and ssh -L needs neither"
)


def wrong_value(kind: Any, meta: Mapping[str, Any], value: Any) -> str:
    """What is wrong with a scalar, or an empty string. In TOML true is not 1, so neither here."""
    choices, low, high = meta["choices"], meta["low"], meta["high"]
    right = (
        isinstance(value, kind)
        if kind in (bool, str)
        else isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    )
    if choices:
        if right and value in choices:
            return ""
        guess = did_you_mean(value, choices) if isinstance(value, str) else ""
        return f"{shown(value)} is not one of {', '.join(map(json.dumps, choices))}{guess}"
    if not right:
        return f"must be {_wanted(kind, meta)}, not {shown(value)}"
    if kind is str:
        most = MAX_CHARS if high is None else high
        if len(value) > most:
            return f"is longer than {most:g} characters"
        return _STRINGS.get(meta["kind"], _wrong_text)(value)
    if kind is bool or (meta["zero"] and value == 0):
        return ""
    if (
        (isinstance(value, float) and not math.isfinite(value))
        or (low is not None and value < low)
        or (high is not None and value > high)
    ):
        return f"must be {_wanted(kind, meta)}, not {shown(value)}"
    return ""


def _wanted(kind: Any, meta: Mapping[str, Any]) -> str:
    word = {bool: "true or false", str: "a string", int: "a whole number", float: "a number"}[kind]
    low, high = meta["low"], meta["high"]
    if kind not in (int, float) or low is None or high is None:
        return word
    return f"{'0 or ' if meta['zero'] else ''}{word} from {low:.15g} to {high:.15g}"


def wrong_item(item: Any, meta: Mapping[str, Any]) -> str:
    if not isinstance(item, str):
        return f"must be a string, not {shown(item)}"
    if len(item) > MAX_CHARS:
        return f"is longer than {MAX_CHARS} characters"
    if meta["kind"] == "range":
        return _wrong_range(item)
    if meta["kind"] == "window":
        return _wrong_window(item)
    if meta["kind"] == "key":
        return (
            ""
            if item.startswith("/") or re.fullmatch(r"RW[A-Za-z0-9+/]{54}", item)
            else f"{shown(item)} is no public key, nor a path"
        )
    if meta["kind"] == "label":
        return "" if LABEL.fullmatch(item) else f"{shown(item)} is not KEY=VALUE, as site=berlin (A-Z a-z 0-9 . _ - in both)"
    if meta["kind"] == "network":
        return _wrong_network(item)
    if meta["kind"] == "host":
        return (
            ""
            if HOST_NAME.fullmatch(item)
            else f"{shown(item)} is no name of a host; without a scheme and a port, as gw.example.org"
        )
    if meta["kind"] == "scope":
        guess = did_you_mean(item, SCOPES)
        return "" if item in SCOPES else f"{shown(item)} is not one of {', '.join(SCOPES)}{guess}"
    if meta["kind"] != "sequence":
        return _wrong_text(item)
    name, equals, value = (part.strip() for part in item.partition("="))
    if equals and name in LINE_NAMES and value in ("0", "1"):
        return ""
    if equals and name == "wait":
        if re.fullmatch(r"\d{1,2}(\.\d{1,6})?", value) and float(value) <= 10:
            return ""
        return f"{shown(item)}: wait takes 0 to 10 seconds, as wait=0.05"
    guess = did_you_mean(name, (*LINE_NAMES, "wait"))
    return f"{shown(item)} is not a step{guess}; steps are boot0=0|1, nrst=0|1, power=0|1 and wait=SECONDS"


def _wrong_text(value: str) -> str:
    return "" if value.isprintable() else "has characters that cannot be printed"


def _wrong_path(value: str) -> str:
    if value and not value.startswith("/"):
        return f"{shown(value)} is not an absolute path; what it means would depend on where the daemon was started"
    return _wrong_text(value)


def _wrong_socket(value: str) -> str:
    # sun_path of unix(7) has 108 bytes with its final NUL.
    return (
        "is longer than the 107 bytes that the path of a Unix socket may have"
        if len(value.encode()) > 107
        else _wrong_path(value)
    )


@dataclass(frozen=True, slots=True)
class Listen:
    """One address to listen on. ``scheme``: ``tls``, ``plaintext``, or empty: plain text on loopback and TLS elsewhere."""

    host: str
    port: int
    scheme: str = ""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        return loopback_host(self.host)


def listeners(text: str) -> tuple[Listen, ...]:
    """The addresses in a value that was checked."""
    return tuple(_listen(word) for word in text.split())


def _listen(word: str) -> Listen:
    scheme = next((name for name in ("tls", "plaintext") if word.startswith(f"{name}:")), "")
    host, _, port = word.removeprefix("tls:").removeprefix("plaintext:").rpartition(":")
    return Listen(host.removeprefix("[").removesuffix("]"), int(port), scheme)


def _wrong_listeners(value: str) -> str:
    for word in value.split():
        bare = word.removeprefix("tls:").removeprefix("plaintext:")
        if text := _wrong_listen(bare):
            return text
    return "" if value == " ".join(value.split()) else "separate several addresses by one space"


def wrong_loopback(value: str) -> str:
    """Why nobody may listen there who asks nobody for a token (P7), or why it is no address; empty: it is allowed."""
    text = _wrong_listen(value)
    if text or not value or _listen(value).loopback:
        return text
    return f"{_listen(value).host}: {_LOOPBACK_ONLY}"


def _wrong_secret(value: str) -> str:
    name = value.removeprefix("credential:")
    if name != value:
        return "" if re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", name) else f"{shown(name)} is not a name of a credential"
    return _wrong_path(value)


def _wrong_listen(value: str) -> str:
    if not value:
        return ""
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        return (
            f"{shown(value)} is not HOST:PORT with a port from 0 (any that is free) to 65535, as 127.0.0.1:7100 or [::1]:7100"
        )
    if host == "localhost":
        return ""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return f"{host!r} is not an address; names other than localhost are not looked up"
    if address.version == 6 and bare == host:
        return f"write the IPv6 address in brackets: [{host}]:{port}"
    return ""


def wrong_server(value: str) -> str:
    """P7 for connections that go out: who reads along could read firmware and send jobs."""
    bare = value.removeprefix("plaintext:")
    found = _SERVER.fullmatch(bare)
    if found is None or int(found[3]) > 65535:
        return f"{shown(value)} is not tls://HOST:PORT, as tls://broker.example.org:4222"
    host = found[2].strip("[]")
    if found[1] == "nats" and bare == value and not loopback_host(host):
        return f"{shown(value)} is plain text: say tls://, or plaintext:{value} where everybody on the way may read and write"
    return ""


def _wrong_url(value: str) -> str:
    bare = value.removeprefix("plaintext:")
    found = _URL.fullmatch(bare)
    if value and not found:
        return f"{shown(value)} is not https://HOST[:PORT]/PATH"
    if found and found[1] == "http" and bare == value and not loopback_host(found[2].strip("[]")):
        return f"{shown(value)} is plain text: say https://, or plaintext:{value} where everybody on the way may read and write"
    return ""


def loopback_host(host: str) -> bool:
    """Of an address or a name; of names ``localhost`` only, for none is looked up."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _wrong_network(value: str) -> str:
    try:
        everybody = not ipaddress.ip_network(value).prefixlen
    except ValueError:
        return f"{shown(value)} is neither an address nor a network, as 192.168.1.2 or 10.0.0.0/8"
    return f"{shown(value)} are all addresses: then everybody says himself where he comes from" if everybody else ""


def _wrong_bytes(value: str) -> str:
    return "" if all(ord(c) < 256 for c in value) else "has characters beyond \\u00FF, which are no single bytes"


def _wrong_regex(value: str) -> str:
    try:
        re.compile(value.encode())
    except re.error as error:
        return f"is no regular expression: {error}"
    return ""


def wrong_line(kind: str, name: str, value: str) -> str:
    if name == "boot0" and value == BY_HAND:
        return ""
    match kind:
        case "none":
            return 'names a line, but kind is "none"; say kind = "gpio", "modem" or "socket"'
        case "modem":
            known = _MODEM_INPUTS if name in INPUT_NAMES else _MODEM_LINES
            if value in known:
                return ""
            return f"{shown(value)} is not one of {', '.join(map(json.dumps, known))}{did_you_mean(value, known)}"
        case "socket":
            # The line box knows its lines by these names; the setting only says that this one is wired.
            return (
                "" if value == name else f'{shown(value)}: a line box calls this line "{name}"; write that, or "" if not wired'
            )
    pin = re.fullmatch(r"pin:(\d+)", value)
    if pin:
        return "" if 1 <= int(pin[1]) <= 40 else f"the header has pins 1 to 40, not {pin[1]}"
    if re.fullmatch(r"[^\s:]+:\d{1,4}|[^\s:]+", value):
        return ""
    return f"{shown(value)} is not a line: GPIO17 (its name), pin:11 (of the header), or LABEL:OFFSET"


def parse_range(text: str) -> tuple[int, int]:
    """``ADDR+LEN`` as start and end (exclusive). Raises ``ValueError`` for anything else."""
    found = re.fullmatch(rf"({_NUMBER})\+({_NUMBER})", text)
    if found is None:
        raise ValueError(f"{shown(text)} is not ADDR+LEN, as 0x08000000+0x4000")
    start, length = (int(word, 16 if word[:2].lower() == "0x" else 10) for word in found.groups())
    if not length or start + length > 1 << 32:
        raise ValueError(f"{shown(text)} is empty, or ends beyond the 32-bit address space")
    return start, start + length


def _wrong_range(value: str) -> str:
    try:
        parse_range(value)
    except ValueError as error:
        return str(error)
    return ""


def parse_window(text: str) -> list[tuple[int, int]]:
    """``[Mon-Fri|Sat,Sun] HH:MM-HH:MM`` as minutes of the week, Monday 00:00 first; one over midnight ends beyond its day, and
    may end beyond the week. Raises ``ValueError``."""
    days, _, times = text.strip().rpartition(" ")
    found = re.fullmatch(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)", times)
    numbers: list[int] = []
    for part in days.lower().split(",") if days else ["mon-sun"]:
        first, dash, last = part.strip().partition("-")
        if first not in _DAYS or (dash and last not in _DAYS):
            raise ValueError(f"{shown(text)} is no window, as Mon-Fri 22:00-05:00")
        begin, count = _DAYS.index(first), (_DAYS.index(last) - _DAYS.index(first)) % 7 if dash else 0
        numbers += [(begin + n) % 7 for n in range(count + 1)]
    if found is None:
        raise ValueError(f"{shown(text)} is no window, as 22:00-05:00 or Mon-Fri 22:00-05:00")
    start, end = int(found[1]) * 60 + int(found[2]), int(found[3]) * 60 + int(found[4])
    if end > 1440 or start == end:
        raise ValueError(f"{shown(text)}: a window ends at 24:00 at the latest, and not when it begins")
    return [(day * 1440 + start, day * 1440 + (end if end > start else end + 1440)) for day in sorted(set(numbers))]


def _wrong_window(value: str) -> str:
    try:
        parse_window(value)
    except ValueError as error:
        return str(error)
    return ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a table" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and value.bit_length() > 4096:
        return f"a number of {value.bit_length()} bits"  # Python refuses to write so many digits.
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


_STRINGS: dict[str, Callable[[str], str]] = {
    "path": _wrong_path,
    "socket": _wrong_socket,
    "listen": _wrong_listeners,
    "loopback": wrong_loopback,
    "secret": _wrong_secret,
    "url": _wrong_url,
    "bytes": _wrong_bytes,
    "regex": _wrong_regex,
}
