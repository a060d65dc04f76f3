"""The line protocol: what ``nc`` and scripts say to the daemon, as bytes to meaning and back. No I/O.

Requests are ASCII lines of at most 1024 bytes, LF or CRLF: a verb in any case, arguments by space, options ``key=value``,
quoting as in a shell. Replies are as in SMTP, ``code-text`` for a line that is not the last and ``code text`` for the last,
where the text is a few bare words and then ``key=value`` pairs; or, after ``HELLO proto=1 format=json``, one JSON object each.
``VERBS`` is the one table from which ``HELP``, the reference in the docs, the checks of arguments and the suggestions for
misspelt names are made.

Invariants:

- Whatever bytes come in, ``parse`` returns a ``Request`` or raises a ``RequestError``; it never returns half of a line.
- Whatever values go out, a reply is exactly one line of printable ASCII. Values are quoted so that a shell would leave them
  alone; a control or non-ASCII character becomes ``\\n``, ``\\xNN`` or ``\\uNNNN``.
- A peer that speaks another protocol (HTTP from a browser, TLS, SSH) is recognised by its first line and is never obeyed:
  a web page must not be able to send a job (cross-protocol request forgery).

This module knows no job, no image and no socket; it must import in a few milliseconds because the command line uses it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from bridged.errors import BadRequest, BridgedError, ForeignProtocol, UnknownVerb

VERSION = 1
MAX_LINE_BYTES = 1024  # With its line end. Memcached allows 2048, Redis' inline commands 64 KiB, SMTP 512.
MAX_VALUE_CHARS = 4096  # Of one value in a text reply; what is longer ends in "..." (use format=json for whole traces).
TCP_PORT = 7100


class Scope(StrEnum):
    """What a principal may do. ``flash`` and ``console`` include ``read``, ``admin`` includes all."""

    READ = "read"  # Looks on: lists, states, histories, recordings.
    FLASH = "flash"  # Sends images and starts jobs; also those that only read, because they stop the machine.
    CONSOLE = "console"  # Types on the target's serial port, and reserves it.
    ADMIN = "admin"  # Gives and takes these rights.


# --- requests -----------------------------------------------------------------------------------------------------


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
_KEY = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*\Z")


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
    for text, equals in _tokens(body.decode("ascii"), escapes=False):
        if words and equals and _KEY.match(text[:equals]):
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
        raise UnknownVerb(f"unknown verb {words[0][:32]}{_suggest(verb, VERBS)}", verb=words[0][:32])
    return Request(verb, tuple(words[1:]), options)


_C_ESCAPES = {"n": "\n", "r": "\r", "t": "\t"}
_HEX_ESCAPES = {"x": 2, "u": 4, "U": 8}


def _tokens(text: str, escapes: bool) -> list[tuple[str, int]]:
    """Split like a shell does. Each token comes with the index of its first unquoted ``=``, 0 where it has none.

    ``escapes``: replies only; inside double quotes ``\\n``, ``\\xNN`` and their like stand for characters.
    """
    tokens: list[tuple[str, int]] = []
    out: list[str] = []
    started, equals, quote, at = False, 0, "", 0
    while at < len(text):
        c = text[at]
        at += 1
        if quote == "'" and c != "'":
            out.append(c)
        elif c == "\\":
            if at == len(text):
                raise BadRequest("the line ends in a backslash")
            c = text[at]
            at += 1
            if escapes and quote and c in _C_ESCAPES:
                out.append(_C_ESCAPES[c])
            elif escapes and quote and c in _HEX_ESCAPES:
                digits = text[at : at + _HEX_ESCAPES[c]]
                at += len(digits)
                try:
                    out.append(chr(int(digits, 16)))
                except (ValueError, OverflowError) as error:
                    raise BadRequest(f"bad escape \\{c}{digits}") from error
            else:
                # Inside double quotes a shell keeps the backslash unless the character is special there.
                out.append(c if not quote or c in '"\\$`' else "\\" + c)
            started = True
        elif c in "'\"" and quote in ("", c):
            quote = "" if quote else c
            started = True
        elif c in " \t" and not quote:
            if started:
                tokens.append(("".join(out), equals))
            out, started, equals = [], False, 0
        else:
            if c == "=" and not quote and not equals:
                equals = len("".join(out))
            out.append(c)
            started = True
    if quote:
        raise BadRequest(f"a quote ({quote}) is not closed")
    if started:
        tokens.append(("".join(out), equals))
    return tokens


_BARE = re.compile(r"[A-Za-z0-9_.,:;/@%+^~=-]+\Z")


def format_request(verb: str, *args: str, **options: str | int | None) -> bytes:
    """One request line, quoted where needed. Options that are ``None`` are left out. Raises ``BadRequest`` when the line
    cannot be said: too long, or not ASCII."""
    parts = [verb, *(_shell_quote(a, argument=True) for a in args)]
    parts += [f"{key}={_shell_quote(str(value))}" for key, value in options.items() if value is not None]
    text = " ".join(parts)
    if not text.isascii() or not text.isprintable():
        raise BadRequest(f"cannot be said in a line of printable ASCII: {text!a}")
    line = text.encode("ascii") + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise BadRequest(f"line of {len(line)} bytes: at most {MAX_LINE_BYTES} are allowed", limit=MAX_LINE_BYTES)
    return line


def _shell_quote(text: str, argument: bool = False) -> str:
    if _BARE.match(text) and not (argument and "=" in text):
        return text
    return "'" + text.replace("'", "'\\''") + "'"


# --- the table of verbs -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Param:
    """One argument or option. ``kind`` names its converter in ``_CONVERT``; ``choices`` bounds it where not empty."""

    name: str
    kind: str
    text: str
    choices: tuple[str, ...] = ()

    @property
    def values(self) -> str:
        return "|".join(self.choices) if self.choices else _KIND_TEXT.get(self.kind, "")


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb. ``required`` of ``args`` must be given, the rest may. ``available`` False: named, but not in this version.

    ``scope``: what is needed to say it, ``None``: nothing, also before a token was shown.
    """

    name: str
    text: str
    reply: str
    args: tuple[Param, ...] = ()
    options: tuple[Param, ...] = ()
    required: int = -1
    available: bool = True
    scope: Scope | None = None

    @property
    def needed(self) -> int:
        return len(self.args) if self.required < 0 else self.required

    @property
    def synopsis(self) -> str:
        parts = [self.name]
        parts += [f"<{a.name}>" if i < self.needed else f"[{a.name}]" for i, a in enumerate(self.args)]
        parts += [f"[{o.name}={o.values}]" for o in self.options]
        return " ".join(parts)


TYPES = ("auto", "bin", "hex", "elf", "srec", "dfuse")

_TARGET = Param("target", "target", "name of a target, as in TARGETS")
_IMAGE = Param(
    "image",
    "images",
    "a staged image: its SHA-256, the start of it (8 digits or more), or its name=; @ADDR says where a raw binary belongs; "
    "up to 8 of them by comma, such as boot.bin@0x08000000,app.hex",
)
_JOB = Param("job", "text", "id of a job, as FLASH and its like answer it")
_ADDR = Param("addr", "address", "where a raw binary belongs; of several images each says it by @ADDR")
_PATCH = Param(
    "patch", "patches", "bytes of this one unit (serial number, MAC), laid over the images or beside them; up to 64 by comma"
)
_TYPE = Param(
    "type", "choice", "format of the file, also in gzip; auto looks at its content; bin: the bytes as they are", TYPES
)
_ID = Param("id", "token", "your own id: the same id and request again find the same job and start nothing")
_WAIT = Param("wait", "flag", "1: report progress (150 lines) and answer when the job has ended", ("0", "1"))
_OUTSIDE = Param(
    "outside", "choice", "bytes of a touched sector outside the image: kept unless you say discard", ("keep", "discard")
)
_ENTRY = Param("entry", "choice", "one-shot: accept that the loader cannot be entered again afterwards", ("one-shot",))
_FORCE = Param(
    "force",
    "list",
    "vectors: accept a vector table that looks wrong; interlock: reset without asking; erase-everything: the consent that "
    "unprotect=1 takes",
    ("vectors", "interlock", "erase-everything"),
)
_INTERLOCK = Param("force", "list", "interlock: reset without asking", ("interlock",))
_UNPROTECT = Param(
    "unprotect",
    "flag",
    "1: if readout protection is on remove it, which erases the whole flash; takes force=erase-everything",
    ("0", "1"),
)
_PROTECT = Param("protect", "flag", "1: readout protection of level 1, last of all, when everything is proven", ("0", "1"))
_WHAT = Param("what", "choice", "readout (the default) or write protection", ("readout", "write"))
_VERIFY = Param("verify", "choice", "full, always: everything is read back", ("full",))
_EVIDENCE = Param(
    "evidence",
    "choice",
    "what is enough where the image was proven before: record (the target is not touched), sample, full (the default; only this"
    " says proven)",
    ("record", "sample", "full"),
)
_FULL = Param("mode", "choice", "full: every sector of the image is erased and written", ("full",))
_TRACE = Param("trace", "flag", "1: keep the recording of the dialogue also when the job succeeds", ("0", "1"))
_RESETS = Param("resets", "targets", "other targets that this resets as well: those that share its NRST or power must be named")
_SIG = Param("sig", "signatures", "base64 of the image's .minisig file; of several images each, by comma")
_WRITING = (_ADDR, _TYPE, _PATCH, _SIG, _VERIFY, _OUTSIDE, _ENTRY, _UNPROTECT, _PROTECT, _FORCE, _RESETS, _TRACE, _ID, _WAIT)
_SUBMITTED = "250 job=ID state=queued (wait=1: 150 lines, then 250 done, 251 nothing to do, 400 and others failed)"

_TABLE = (
    Verb("HELP", "Lists the verbs, or explains one.", "214", (Param("verb", "text", "the verb to explain"),), required=0),
    Verb("PING", "Answers PONG.", "250 PONG"),
    Verb("QUIT", "Ends the connection after everything before it is answered.", "221"),
    Verb(
        "HELLO",
        "Agrees on the protocol and the format of replies.",
        "250 proto=1 format=text|json",
        (),
        (
            Param("proto", "number", "version of this protocol, always needed", ("1",)),
            Param("format", "choice", "json: each reply line is one JSON object", ("text", "json")),
        ),
    ),
    Verb(
        "TARGETS",
        "Lists the targets: state, chip, running image.",
        "250- one line a target, then 250 targets=N",
        scope=Scope.READ,
    ),
    Verb("INFO", "Everything that is known about one target.", "250- one line a fact, then 250", (_TARGET,), scope=Scope.READ),
    Verb(
        "HAVE",
        "Says how much of an image is staged: the point from which PUT may go on.",
        "250 offset=N size=N complete=0|1, or 404",
        (Param("sha256", "sha256", "SHA-256 of the whole file, 64 hexadecimal digits"),),
        scope=Scope.FLASH,
    ),
    Verb(
        "PUT",
        "Stages a file: the line, then exactly size-offset raw bytes. They are always consumed, even when the image is here.",
        "354, then 250 image=sha256:HEX, 552 too big (and close), 554 the bytes do not have this SHA-256",
        (
            Param("size", "size", "size of the whole file in bytes"),
            Param("sha256", "sha256", "SHA-256 of the whole file, 64 hexadecimal digits"),
        ),
        (
            Param("offset", "number", "where this piece starts, as HAVE said"),
            Param("name", "name", "a name for the image, for FLASH and for people"),
            _TYPE,
        ),
        scope=Scope.FLASH,
    ),
    Verb(
        "GET",
        "Sends back a staged image, or what a READ job has read.",
        "250 size=N sha256=HEX, then exactly N raw bytes",
        (Param("image|job", "text", "SHA-256 or name of an image, or id of a READ job"),),
        scope=Scope.READ,
    ),
    Verb("FLASH", "Writes an image and proves it.", _SUBMITTED, (_TARGET, _IMAGE), (_FULL, *_WRITING), scope=Scope.FLASH),
    Verb(
        "ENSURE",
        "Writes an image unless it is proven to be in the target already.",
        "as FLASH; 251 already there, with the evidence",
        (_TARGET, _IMAGE),
        (_EVIDENCE, *_WRITING),
        scope=Scope.FLASH,
    ),
    Verb(
        "VERIFY",
        "Compares the flash with an image; changes nothing.",
        _SUBMITTED,
        (_TARGET, _IMAGE),
        (_ADDR, _TYPE, _PATCH, _RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "READ",
        "Reads memory; fetch the bytes with GET <job>.",
        _SUBMITTED,
        (_TARGET, Param("addr", "address", "first address"), Param("len", "length", "number of bytes")),
        (_RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "ERASE",
        "Erases the sectors of a range, which must begin and end on sector bounds: an erase is never widened.",
        _SUBMITTED,
        (_TARGET, Param("range", "range", "ADDR+LEN, or all")),
        (_ENTRY, _RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "RESET",
        "Resets the target into its application, or into the loader.",
        _SUBMITTED,
        (_TARGET,),
        (Param("mode", "choice", "app: the application, boot: the ROM loader", ("app", "boot")), _RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "DOCTOR",
        "Examines the wiring and the chip without changing its flash; resets it several times. The findings are in the result.",
        _SUBMITTED,
        (_TARGET,),
        (_RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb(
        "OPTION-BYTES",
        "Shows the option bytes, decoded where the layout is known; writes those that set= or raw= names: the whole block is "
        "read, merged, written and read again. What shuts people out for ever is never written.",
        _SUBMITTED + "; the result has options.before and options.after",
        (_TARGET,),
        (
            Param("set", "fields", "fields to write, by their names in options.before: IWDG_SW:1,nBOOT1:1"),
            Param("raw", "patches", "bytes to lay over the block, complements computed; takes fields="),
            Param("fields", "text", "the fields that the bytes of raw= may change, by comma"),
            _INTERLOCK,
            _RESETS,
            _TRACE,
            _ID,
            _WAIT,
        ),
        scope=Scope.FLASH,
    ),
    Verb(
        "PROTECT",
        "Sets readout protection of level 1, or write protection of sectors besides those that have it.",
        _SUBMITTED,
        (_TARGET,),
        (
            _WHAT,
            Param("sectors", "sectors", "with what=write: numbers as PLAN shows them, 0,2-5"),
            _INTERLOCK,
            _RESETS,
            _TRACE,
            _ID,
            _WAIT,
        ),
        scope=Scope.FLASH,
    ),
    Verb(
        "UNPROTECT",
        "Removes readout protection, which ERASES THE WHOLE FLASH and takes force=erase-everything; or write protection, which "
        "erases nothing.",
        _SUBMITTED,
        (_TARGET,),
        (
            _WHAT,
            Param(
                "force",
                "list",
                "erase-everything: yes, the whole flash; interlock: reset without asking",
                ("erase-everything", "interlock"),
            ),
            _RESETS,
            _TRACE,
            _ID,
            _WAIT,
        ),
        scope=Scope.FLASH,
    ),
    Verb(
        "XMODEM",
        "Sends an image by XMODEM to a bootloader in the target's own flash (`[targets.NAME.xmodem]`), and waits for the words "
        "that say that it is there. The file as it is, unless type= says another format. evidence=receiver: the target said "
        "so; nothing was read back.",
        _SUBMITTED,
        (_TARGET, _IMAGE),
        (_ADDR, _TYPE, _PATCH, _SIG, _INTERLOCK, _RESETS, _TRACE, _ID, _WAIT),
        scope=Scope.FLASH,
    ),
    Verb("ID", "Asks the chip who it is.", _SUBMITTED, (_TARGET,), (_RESETS, _TRACE, _ID, _WAIT), scope=Scope.FLASH),
    Verb(
        "PLAN",
        "Shows what FLASH would erase, keep and write; touches nothing.",
        "250-part for each image and patch, 250-range for each run of sectors (action=stay|write|keep|lose), 250 with the sums",
        (_TARGET, _IMAGE),
        (_ADDR, _TYPE, _PATCH, _OUTSIDE, _UNPROTECT, _PROTECT, _FORCE),
        scope=Scope.READ,
    ),
    Verb(
        "JOBS",
        "Lists jobs, the newest first.",
        "250- one line a job, then 250 jobs=N",
        (),
        (
            Param("target", "target", "only of this target"),
            Param("state", "token", "only in this state"),
            Param("limit", "number", "at most so many (default 50)"),
            Param("before", "text", "only those older than this job: the last one of the answer before"),
        ),
        scope=Scope.READ,
    ),
    Verb(
        "STATUS",
        "The state of one job.",
        "250 job=ID state=.. phase=.. done=.. total=.. [trace=ID, see TRACE]",
        (_JOB,),
        scope=Scope.READ,
    ),
    Verb(
        "WAIT",
        "Reports progress until the job has ended.",
        "150- lines, then 250, 251, 400 and others as FLASH wait=1; 408 when the time is over",
        (_JOB,),
        (Param("timeout", "seconds", "give up waiting after so many seconds; the job goes on"),),
        scope=Scope.READ,
    ),
    Verb(
        "WATCH",
        "Follows a job until its end, a target or everything (*) until you close the connection.",
        "150- lines; for a job then its final line",
        (Param("job|target|*", "text", "what to follow"),),
        scope=Scope.READ,
    ),
    Verb(
        "CANCEL",
        "Cancels a job. Between the first erase and the proof only with force, for the target is left without firmware.",
        "250, or 409 not now",
        (_JOB,),
        (Param("force", "flag", "1: even though the target is left without firmware", ("0", "1")),),
        scope=Scope.FLASH,
    ),
    Verb(
        "LOG",
        "The history of a job.",
        "250- one line an entry, then 250 next=SEQ",
        (_JOB,),
        (Param("from", "number", "only entries from this sequence number on"),),
        scope=Scope.READ,
    ),
    Verb(
        "TRACE",
        "Sends the flight recording of a job: every byte of its dialogue, with times. `bridged trace` explains it.",
        "250 job=ID size=N, then exactly N raw bytes (text); 404 where none is kept",
        (_JOB,),
        scope=Scope.READ,
    ),
    Verb(
        "AUTH",
        "Says who you are, by a token; beyond loopback and the Unix socket nothing else but HELP, HELLO, PING and QUIT is "
        "answered before. Three wrong ones end the connection, and each makes your address wait longer.",
        "235 name=.. scopes=.. [targets=..] [expires=..], or 535",
        (Param("token", "secret", "as `bridged token add` printed it"),),
    ),
    Verb(
        "TOKEN",
        "Gives and takes rights: makes a token or names a client certificate, lists them, revokes one. At once in force.",
        "add: 250 token=.. (shown this once); list: 250- one line each, then 250 tokens=N; revoke: 250",
        (Param("action", "choice", "what to do", ("add", "list", "revoke")), Param("name", "token", "name of the token")),
        (
            Param("scope", "list", "rights, by comma (add)", tuple(Scope)),
            Param("targets", "targets", "only these targets (add)"),
            Param("expires", "seconds", "seconds until it ends by itself (add)"),
            Param("certificate", "text", "no token, but whoever shows a client certificate with this name (add)"),
        ),
        required=1,
        scope=Scope.ADMIN,
    ),
    Verb(
        "AUDIT",
        "Who did what, from where, and what came of it; the newest first.",
        "250- one line an entry, then 250 entries=N",
        (),
        (Param("limit", "number", "at most so many (default 50)"),),
        scope=Scope.ADMIN,
    ),
    Verb(
        "DRAIN",
        "Starts no further job, waits for those that run, and then ends the daemon. What waits goes on at its next start.",
        "150- lines while jobs run, then 250 drained=1",
        (),
        scope=Scope.ADMIN,
    ),
    Verb(
        "LOCK",
        "Reserves a target: new jobs of others wait, and only you write on its console. It runs out by itself.",
        "250 owner=YOU ttl=SECONDS, or 423 with the owner",
        (_TARGET,),
        (
            Param("ttl", "seconds", "for so long (default 3600, at most 86400)"),
            Param("note", "note", "why, for those who meet the lock"),
            Param("force", "flag", "1: take it over from another one, if you may", ("0", "1")),
        ),
        scope=Scope.CONSOLE,
    ),
    Verb(
        "UNLOCK",
        "Gives a reserved target back.",
        "250, 251 it was not locked, or 423 with the owner",
        (_TARGET,),
        (Param("force", "flag", "1: also the lock of another one, if you may", ("0", "1")),),
        scope=Scope.CONSOLE,
    ),
    Verb(
        "CONSOLE",
        "Connects to the target's serial port: from 101 on the connection is its bytes, to the end.",
        "101 target=.. mode=ro|rw, then raw bytes; 423 somebody else writes",
        (_TARGET, Param("mode", "choice", "ro: only look on, rw: write, too (the default)", ("ro", "rw"))),
        (
            Param("replay", "number", "so many bytes of what was said before come first (default: as configured)"),
            Param("force", "flag", "1: take over from who writes, if you may", ("0", "1")),
        ),
        required=1,
        scope=Scope.READ,
    ),
)

VERBS: dict[str, Verb] = {verb.name: verb for verb in _TABLE}


# --- checking the arguments of a request --------------------------------------------------------------------------


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
                f"{verb.name}: unknown option {key}={_suggest(key, options)}; it takes {expected}", verb=verb.name, option=key
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
                    raise ValueError(f"expected {' or '.join(param.choices)}{_suggest(one, param.choices)}")
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
_KIND_TEXT = {
    "address": "ADDR",
    "length": "BYTES",
    "number": "N",
    "seconds": "SECONDS",
    "note": "TEXT",
    "token": "TEXT",
    "name": "TEXT",
    "target": "TARGET",
    "targets": "TARGET,...",
    "signatures": "BASE64,...",
    "patches": "ADDR:HEX,...",
    "fields": "NAME:VALUE,...",
    "sectors": "N,N-N,...",
    "text": "TEXT",
}


def _suggest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)``, or nothing. Late import: difflib costs milliseconds and only mistakes need it."""
    from difflib import get_close_matches

    close = get_close_matches(word[:64], list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


# --- HELP and the reference ---------------------------------------------------------------------------------------


def help_lines(name: str = "") -> list[str]:
    """The text of HELP, or of HELP VERB. Raises ``UnknownVerb``."""
    if not name:
        width = max(len(verb.name) for verb in _TABLE)
        lines = [f"{verb.name:{width}} {verb.text}" for verb in _TABLE if verb.available]
        return [*lines, "HELP <verb> explains one. Options are key=value; quote as in a shell."]
    verb = VERBS.get(name.upper())
    if verb is None:
        raise UnknownVerb(f"unknown verb {name[:32]}{_suggest(name.upper(), VERBS)}", verb=name[:32])
    lines = [verb.synopsis, verb.text]
    lines += [f"  <{a.name}> {a.text}" for a in verb.args]
    lines += [f"  {o.name}={o.values}  {o.text}" for o in verb.options]
    return [*lines, f"Reply: {verb.reply}", f"Scope: {verb.scope or 'none needed'}"]


def reference() -> str:
    """The reference of verbs, codes and errors for the docs (Markdown)."""
    out = ["## Verbs", ""]
    for verb in _TABLE:
        out += [f"### {verb.name}", "", f"`{verb.synopsis}`", "", verb.text, ""]
        out += [f"- `{a.name}`: {a.text}" for a in verb.args]
        out += [f"- `{o.name}={o.values}`: {o.text}" for o in verb.options]
        out += ["", f"Reply: {verb.reply}", "", f"Scope: {verb.scope or 'none needed'}", ""]
    out += ["## Reply codes", "", "| code | meaning | error codes |", "|---|---|---|"]
    for code, text in CODE_TEXT.items():
        errors = ", ".join(f"`{name}`" for name, number in REPLY_CODES.items() if number == code)
        out.append(f"| {code} | {text} | {errors} |")
    return "\n".join([*out, ""])


# --- reply codes --------------------------------------------------------------------------------------------------

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
        words += [_escape(word).replace("=", "_") if _BARE.match(word) else _quote(word) for word in reply.text.split()]
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
    for token, equals in _tokens(rest, escapes=True):
        if equals and _KEY.match(token[:equals]):
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
    return text if _BARE.match(text) else _quote(text)


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
