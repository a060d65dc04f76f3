"""Requests of the line protocol: what ``nc`` and scripts say to the daemon, as bytes to meaning and back. No I/O.

Requests are ASCII lines of at most 1024 bytes, LF or CRLF: a verb in any case, arguments by space, options ``key=value``,
quoting as in a shell. Replies (``reply``) are as in SMTP, ``code-text`` for a line that is not the last and ``code text`` for
the last, where the text is a few bare words and then ``key=value`` pairs; or, after ``HELLO proto=1 format=json``, one JSON
object each. ``verbs`` is the one table against which arguments are checked.

Invariants:

- Whatever bytes come in, ``parse`` returns a ``Request`` or raises a ``RequestError``; it never returns half of a line.
- A peer that speaks another protocol (HTTP from a browser, TLS, SSH) is recognised by its first line and is never obeyed:
  a web page must not be able to send a job (cross-protocol request forgery).

This module knows no job, no image and no socket; it must import in a few milliseconds because the command line uses it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bridged.errors import BadRequest, ForeignProtocol, UnknownVerb
from bridged.protocol.verbs import VERBS, Param
from bridged.protocol.words import KEY, shell_quote, suggest, tokens

MAX_LINE_BYTES = 1024  # With its line end. Memcached allows 2048, Redis' inline commands 64 KiB, SMTP 512.


@dataclass(frozen=True, slots=True)
class Request:
    """One line as it was said: verb in upper case, arguments in order, options by lower-case name."""

    verb: str
    args: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)


_HTTP = re.compile(
    rb"^(?:GET|HEAD|POST|PUT|DELETE|OPTIONS|PATCH|TRACE|CONNECT|PRI)[ \t]+(?:/|\*|https?:)"
    rb"|[ \t](?:HTTP|RTSP|SIP)/\d(?:\.\d)?[ \t]*\r?\n?$"
    rb"|^POST(?:[ \t\r\n]|$)"
    rb"|^(?:Host|Origin|Referer|Content-Length|Content-Type|User-Agent)[ \t]*:",
    re.IGNORECASE,
)


def foreign(start: bytes) -> str:
    """Which other protocol these first bytes of a connection, or of a line, belong to; empty: ours, or unknown."""
    if start[:2] == b"\x16\x03":  # TLS record: handshake, version 3.x
        return "TLS"
    if start[:4] == b"SSH-":
        return "SSH"
    return "HTTP" if _HTTP.search(start) else ""


def foreign_error(name: str) -> ForeignProtocol:
    """What a peer of another protocol is told before its connection is closed."""
    return ForeignProtocol(f"this is the line protocol of bridged, not {name}; nothing was done and the connection is closed")


def parse(line: bytes) -> Request:
    """One line, with or without its end. Raises ``BadRequest``, ``UnknownVerb`` or ``ForeignProtocol``."""
    if name := foreign(line):
        raise foreign_error(name)
    if len(line) > MAX_LINE_BYTES:
        raise BadRequest(f"line of {len(line)} bytes: at most {MAX_LINE_BYTES} are allowed", limit=MAX_LINE_BYTES)
    body = line.removesuffix(b"\n").removesuffix(b"\r")
    for column, byte in enumerate(body, 1):
        if not (0x20 <= byte < 0x7F or byte == 0x09):
            raise BadRequest(f"byte 0x{byte:02X} in column {column}: lines are printable ASCII", column=column)
    words: list[str] = []
    options: dict[str, str] = {}
    for text, equals in tokens(body.decode("ascii"), escapes=False):
        if words and equals and KEY.match(text[:equals]):
            key = text[:equals].lower()
            if key in options:
                raise BadRequest(f"option {key}= is given twice", option=key)
            options[key] = text[equals + 1 :]
        else:
            words.append(text)
    if not words:
        raise BadRequest("the line has no verb")
    verb = words[0].upper()
    if verb not in VERBS:
        raise UnknownVerb(f"unknown verb {words[0][:32]}{suggest(verb, VERBS)}", verb=words[0][:32])
    return Request(verb, tuple(words[1:]), options)


def format_request(verb: str, *args: str, **options: str | int | None) -> bytes:
    """One request line, quoted where needed. Options that are ``None`` are left out. Raises ``BadRequest`` when the line
    cannot be said: too long, or not ASCII."""
    parts = [verb, *(shell_quote(a, argument=True) for a in args)]
    parts += [f"{key}={shell_quote(str(value))}" for key, value in options.items() if value is not None]
    text = " ".join(parts)
    if not text.isascii() or not text.isprintable():
        raise BadRequest(f"cannot be said in a line of printable ASCII: {text!a}")
    line = text.encode("ascii") + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise BadRequest(f"line of {len(line)} bytes: at most {MAX_LINE_BYTES} are allowed", limit=MAX_LINE_BYTES)
    return line


def bind(request: Request) -> dict[str, Any]:
    """Arguments and options by name, converted and checked against the table; what was not given is absent.

    Names are as in the table, for ``image|job`` and its like the whole of it. Raises ``BadRequest``.
    """
    verb = VERBS[request.verb]
    if not verb.needed <= len(request.args) <= len(verb.args):
        fault = "is missing" if len(request.args) < verb.needed else "is one too many"
        which = f"<{verb.args[len(request.args)].name}>" if len(request.args) < verb.needed else request.args[len(verb.args)]
        raise BadRequest(f"{verb.name}: {which} {fault}; expected: {verb.synopsis}", verb=verb.name)
    options = {option.name: option for option in verb.options}
    for key in request.options:
        if key not in options:
            expected = ", ".join(f"{name}=" for name in options) or "no options"
            raise BadRequest(
                f"{verb.name}: unknown option {key}={suggest(key, options)}; it takes {expected}", verb=verb.name, option=key
            )
    values = {param.name: convert(verb.name, param, text) for param, text in zip(verb.args, request.args, strict=False)}
    return values | {key: convert(verb.name, options[key], text) for key, text in request.options.items()}


def put_extent(request: Request) -> tuple[int, int]:
    """Size and offset of a PUT: needed even where the rest of its line is wrong, because the bytes come anyway.

    Raises ``BadRequest`` where the number of bytes that follow cannot be known; then only closing helps.
    """
    size_param, offset_param = VERBS["PUT"].args[0], VERBS["PUT"].options[0]
    if not request.args:
        raise BadRequest(f"PUT: <size> is missing; expected: {VERBS['PUT'].synopsis}", verb="PUT")
    size = convert("PUT", size_param, request.args[0])
    offset = convert("PUT", offset_param, request.options.get("offset", "0"))
    if offset > size:
        raise BadRequest(f"PUT: offset={offset} lies beyond the size of {size} bytes", verb="PUT", option="offset")
    return size, offset


def convert(verb: str, param: Param, text: str) -> Any:
    """The value of one argument or option. Raises ``BadRequest`` naming what is allowed."""
    try:
        if param.choices:
            chosen = text.lower().split(",") if param.kind == "list" else [text.lower()]
            for one in chosen:
                if one not in param.choices:
                    raise ValueError(f"expected {' or '.join(param.choices)}{suggest(one, param.choices)}")
            text = ",".join(dict.fromkeys(chosen))
        return _CONVERT[param.kind](text)
    except ValueError as error:
        raise BadRequest(f"{verb}: {param.name} {text[:80]!a}: {error}", verb=verb, option=param.name) from None


def _pattern(pattern: str, expected: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(f"expected {expected}")
        return text

    return check


_SHA256 = _pattern(r"[0-9a-f]{64}", "64 hexadecimal digits")
_UNITS = {"": 1, "K": 1024, "KIB": 1024, "M": 1 << 20, "MIB": 1 << 20}


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError("expected a decimal number")
    return int(text)


def _size(text: str) -> int:
    if (value := _number(text)) < 1:
        raise ValueError("expected at least 1 byte")
    return value


def _address(text: str) -> int:
    if not re.fullmatch(r"0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10}", text) or (value := _any_base(text)) > 0xFFFFFFFF:
        raise ValueError("expected an address such as 0x08000000")
    return value


def _any_base(text: str) -> int:
    return int(text, 16 if text[:2].lower() == "0x" else 10)


def _length(text: str) -> int:
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]{1,8}|[0-9]{1,10})([KkMm](?:[Ii][Bb])?)?", text)
    value = _any_base(match[1]) * _UNITS[(match[2] or "").upper()] if match else 0
    if not 0 < value <= 1 << 32:
        raise ValueError("expected a number of bytes such as 4096, 0x1000 or 4K")
    return value


def _range(text: str) -> tuple[int, int] | None:
    """(address, length), or ``None`` for ``all``."""
    if text.lower() == "all":
        return None
    address, plus, length = text.partition("+")
    if not plus:
        raise ValueError("expected ADDR+LEN such as 0x08000000+16K, or all")
    found = _address(address), _length(length)
    if sum(found) > 1 << 32:
        raise ValueError("the range ends beyond the 32-bit address space")
    return found


def _secret(text: str) -> str:
    """Whether it is one is for somebody else to say."""
    return text


def _seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise ValueError("expected seconds, such as 30 or 2.5")
    return float(text)


# Kinds of text: what is allowed, and how that is said.
PATTERNS: dict[str, tuple[str, str]] = {
    "text": (r"[ -~]{1,200}", "1 to 200 printable characters"),
    "images": (r"[ -~]{1,900}", "IMAGE[@ADDR], several by comma, in printable characters"),
    "patches": (r"[0-9A-Za-z]+:[0-9A-Za-z]+(,[0-9A-Za-z]+:[0-9A-Za-z]+)*", "ADDR:HEX, several by comma"),
    "fields": (
        r"[A-Za-z]\w{0,39}[:=](0[xX][0-9A-Fa-f]{1,8}|\d{1,10})(,[A-Za-z]\w{0,39}[:=](0[xX][0-9A-Fa-f]{1,8}|\d{1,10}))*",
        "NAME:VALUE, several by comma",
    ),
    "sectors": (r"\d{1,4}(-\d{1,4})?(,\d{1,4}(-\d{1,4})?)*", "numbers and ranges of sectors such as 0,2-5"),
    # What FLASH would read as two images, or as an image with an address, must not become the name of one.
    "name": (
        r"(?!.*@0[xX][0-9A-Fa-f]+$)[ -+\--~]{1,128}",
        "1 to 128 printable characters without a comma or an @0x... at the end",
    ),
    "note": (r"[ -~]{1,80}", "1 to 80 printable characters"),
    "token": (r"[A-Za-z0-9_.:@+-]{1,64}", "1 to 64 letters, digits or _.:@+-"),
    "target": (r"[A-Za-z0-9_.-]{1,64}", "the name of a target: letters, digits, _ . -"),
    "targets": (r"[A-Za-z0-9_.-]{1,64}(,[A-Za-z0-9_.-]{1,64}){0,15}", "up to 16 names of targets by comma"),
    "signatures": (
        r"[A-Za-z0-9+/]{100,900}={0,2}(,[A-Za-z0-9+/]{100,900}={0,2}){0,7}",
        "base64 of a .minisig file",
    ),
}
_CONVERT: dict[str, Callable[[str], Any]] = {
    **{kind: _pattern(*said) for kind, said in PATTERNS.items()},
    "secret": _secret,
    "sha256": lambda text: _SHA256(text.lower().removeprefix("sha256:")),
    "size": _size,
    "number": _number,
    "address": _address,
    "length": _length,
    "range": _range,
    "seconds": _seconds,
    "flag": lambda text: text == "1",
    "choice": str,
    "list": str,
}
