"""Replies of the line protocol: their codes, and a ``Reply`` as one line of text or JSON and back.

Whatever values go out, a reply is exactly one line of printable ASCII. Values are quoted so that a shell would leave them
alone; a control or non-ASCII character becomes ``\\n``, ``\\xNN`` or ``\\uNNNN``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bridged.errors import BadRequest, BridgedError
from bridged.protocol.words import BARE, KEY, tokens

MAX_VALUE_CHARS = 4096  # Of one value in a text reply; what is longer ends in "..." (use format=json for whole traces).


CODE_TEXT: dict[int, str] = {
    101: "from here on raw bytes of the console",
    150: "progress, more follows",
    214: "help",
    220: "greeting",
    221: "good-bye",
    235: "the token is right",
    250: "done",
    251: "nothing to do: it is so already",
    354: "send the data",
    400: "the job failed",
    404: "unknown target, image, job or credential",
    408: "the time to wait is over; the job goes on",
    409: "not in this state",
    421: "the connection is closed: shutting down, or idle for too long",
    423: "somebody else holds it",
    429: "too many at once, try later",
    450: "the target is absent or does not answer",
    451: "a fault of the gateway itself",
    452: "no room on the gateway",
    500: "not understood: unknown verb, line too long, another protocol",
    501: "bad argument",
    502: "known, but not in this version",
    530: "a token is needed first",
    535: "wrong token",
    550: "refused: policy, or the image does not suit the target",
    552: "too big",
    553: "no signature, or not a right one",
    554: "the bytes differ from what they must be",
}

REPLY_CODES: dict[str, int] = {
    "INTERNAL": 451,
    "CONFIG": 451,
    "IMAGE": 550,
    "IMAGE_FORMAT": 550,
    "IMAGE_CORRUPT": 550,
    "IMAGE_OVERLAP": 550,
    "IMAGE_EMPTY": 550,
    "IMAGE_DOES_NOT_FIT": 550,
    "IMAGE_NOT_BOOTABLE": 550,
    "IMAGE_TOO_LARGE": 552,
    "IMAGE_ADDRESS_MISSING": 501,
    "UNKNOWN_IMAGE": 404,
    "DIGEST_MISMATCH": 554,
    "TARGET": 400,
    "LINK": 450,
    "PORT_BUSY": 423,
    "PORT_GONE": 450,
    "PORT_FORBIDDEN": 450,
    "PARITY_UNAVAILABLE": 450,
    "BAUD_UNAVAILABLE": 450,
    "LINE_UNAVAILABLE": 450,
    "TARGET_BROKEN": 409,
    "LOADER": 400,
    "NO_SYNC": 450,
    "SYNC_NOISE": 450,
    "APPLICATION_RUNNING": 450,
    "LOOPBACK": 450,
    "WRONG_PARITY": 450,
    "NACK": 400,
    "NO_REPLY": 400,
    "GARBLED": 400,
    "ERASE_TIMEOUT": 400,
    "UNSTABLE_LINK": 400,
    "XMODEM_FAILED": 400,
    "XMODEM_UNCONFIRMED": 400,
    "NOT_ERASED": 400,
    "WRONG_SECTOR": 400,
    "SECOND_STAGE_FAILED": 400,
    "NOT_SAFE_TO_STOP": 409,
    "UNHEALTHY": 400,
    "SESSION_DIED": 400,
    "DEADLINE_EXCEEDED": 400,
    "CHIP": 400,
    "UNKNOWN_CHIP": 550,
    "WRONG_CHIP": 550,
    "READ_PROTECTED": 550,
    "UNSUPPORTED": 550,
    "LAYOUT_UNKNOWN": 550,
    "ENTRY_WOULD_BE_LOST": 550,
    "OUTSIDE_UNREADABLE": 550,
    "PROTECTION_UNCHANGED": 400,
    "OPTION_BYTES_DIFFER": 400,
    "OPTION_BYTES_LOST": 400,
    "VERIFY_MISMATCH": 554,
    "JOB": 400,
    "UNKNOWN_JOB": 404,
    "UNKNOWN_TRACE": 404,
    "UNKNOWN_TARGET": 404,
    "TARGET_BUSY": 423,
    "NOT_CANCELLABLE": 409,
    "CANCELED": 400,
    "STOPPED": 421,
    "QUEUE_FULL": 429,
    "STORAGE": 451,
    "STORAGE_FULL": 452,
    "STORAGE_FAILED": 451,
    "JOURNAL": 451,
    "ID_CONFLICT": 409,
    "REQUEST": 501,
    "BAD_REQUEST": 501,
    "UNKNOWN_VERB": 500,
    "FOREIGN_PROTOCOL": 500,
    "NOT_ALLOWED": 550,
    "SIGNATURE": 553,
    "POLICY": 550,
    "CONSENT_MISSING": 550,
    "LOGIN_FIRST": 530,
    "BAD_TOKEN": 535,
    "UNKNOWN_CREDENTIAL": 404,
    "UNKNOWN_PATH": 404,
    "CHANGED": 409,
    "FOREIGN_ORIGIN": 550,
    "TOO_LARGE": 552,
    "TOO_MANY": 429,
    "DAEMON_UNREACHABLE": 421,
}


def reply_code(error_code: str) -> int:
    """The three digits for a ``BridgedError.code``; a code that is not in the table is a failed job."""
    return REPLY_CODES.get(error_code, 400)


# --- replies ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply line. ``more``: others follow before the reply is whole. ``text``: bare words, for an error its code.

    ``data`` keeps its types in JSON; in text every value is a string, nested names are joined by dots, flags are 0 or 1,
    addresses hexadecimal and what is ``None`` is left out.
    """

    code: int
    text: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    more: bool = False


def error_reply(error: BridgedError, **context: Any) -> Reply:
    """The one line for a failure: code, stable error code, what happened, likely cause, remedy, then the facts."""
    return failure_reply(error.as_dict(), context)


def failure_reply(error: Mapping[str, Any], context: Mapping[str, Any]) -> Reply:
    """As ``error_reply``, for an error that comes as the dictionary of ``as_dict``. ``context`` comes before the rest."""
    code = str(error.get("code") or "INTERNAL")
    data: dict[str, Any] = dict(context)
    data |= {"message": error.get("message") or "", "cause": error.get("cause"), "remedy": error.get("remedy")}
    data |= {"retryable": bool(error.get("retryable"))}
    data |= {f"fact.{key}": value for key, value in (error.get("facts") or {}).items()}
    return Reply(reply_code(code), code, data)


def format_reply(reply: Reply, as_json: bool = False) -> bytes:
    """The bytes of one reply line, with its end. Never raises for JSON-like data."""
    if as_json:
        shape = {"code": reply.code, "more": reply.more, "text": reply.text, "data": _jsonable(reply.data)}
        return json.dumps(shape, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
    words = []
    if reply.code == 214:
        words.append(_escape(reply.text))  # Free text: it is read by people, and is full of "key=value" that means nothing.
    else:
        words += [_escape(word).replace("=", "_") if BARE.match(word) else _quote(word) for word in reply.text.split()]
        words += [f"{key}={_quote_if_needed(value)}" for key, value in flatten(reply.data)]
    return f"{reply.code:03d}{'-' if reply.more else ' '}{' '.join(words) or 'OK'}\n".encode("ascii")


def parse_reply(line: bytes) -> Reply:
    """Inverse of ``format_reply``, either format. Raises ``BadRequest`` for anything else."""
    try:
        text = line.removesuffix(b"\n").removesuffix(b"\r").decode("ascii")
        if text.startswith("{"):
            shape = json.loads(text)
            return Reply(int(shape["code"]), str(shape["text"]), dict(shape["data"]), bool(shape["more"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadRequest(f"not a reply of the line protocol: {line[:80]!r}") from error
    if not re.match(r"[1-9][0-9]{2}[ -]", text):
        raise BadRequest(f"not a reply of the line protocol: {line[:80]!r}")
    code, more, rest = int(text[:3]), text[3] == "-", text[4:]
    if code == 214:
        return Reply(code, rest, {}, more)
    words, data = [], {}
    for token, equals in tokens(rest, escapes=True):
        if equals and KEY.match(token[:equals]):
            data[token[:equals]] = token[equals + 1 :]
        else:
            words.append(token)
    return Reply(code, " ".join(words), data, more)


def flatten(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """``key``, ``text`` pairs of nested data, as a text reply shows them."""
    pairs: list[tuple[str, str]] = []
    for key, value in data.items():
        name = prefix + (re.sub(r"[^A-Za-z0-9_.-]", "_", str(key)) or "_")
        if not name[0].isalpha():
            name = "x" + name
        if isinstance(value, Mapping):
            pairs += flatten(value, name + ".")
        elif value is not None:
            pairs.append((name, _text(name, value)))
    return pairs


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, int) and re.search(r"(?:^|[._])(?:address|addr|start|end)$", name) and 0 <= value < 1 << 32:
        return f"0x{value:08x}"
    if isinstance(value, int) and re.search(r"(?:^|[._])(?:pid|loader_id)$", name):
        return f"0x{value:03x}" if name.endswith("pid") else f"0x{value:02x}"  # As ST's documents write them.
    if isinstance(value, float):
        return f"{round(value, 6):.15g}"
    if isinstance(value, list | tuple | set | frozenset):
        if all(isinstance(item, str | int | float) for item in value):
            return ",".join(_text("", item) for item in value)
        return json.dumps(_jsonable(value), separators=(",", ":"))
    return str(value)


def _quote_if_needed(text: str) -> str:
    if len(text) > MAX_VALUE_CHARS:
        text = text[: MAX_VALUE_CHARS - 3] + "..."
    return text if BARE.match(text) else _quote(text)


def _quote(text: str) -> str:
    if any(c in text for c in '"$`') and "'" not in text and text.isascii() and text.isprintable():
        return f"'{text}'"  # Inert in a shell as it stands, and easier on the eye than backslashes.
    return '"' + _escape(re.sub(r'(["\\$`])', r"\\\1", text)) + '"'


def _escape(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if " " <= c <= "~" else _escaped(c) for c in text)


def _escaped(c: str) -> str:
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(c)
    if short:
        return short
    return f"\\x{ord(c):02x}" if ord(c) < 0x100 else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float):
        return value
    return str(value)
