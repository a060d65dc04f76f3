"""The page of limits, from the code: ``docs/limits.md``, written by ``python -m tests.build_docs``.

``ROWS`` says of each limit what it bounds and what happens beyond it; the number and the reason come from the code: the value
of the constant, and the comment beside it. A constant whose name says that it is a limit and that is not in ``ROWS`` fails a
test, and so does one without a reason.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import tokenize
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bridged.protocol import line

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Row:
    """``name``: ``module:CONSTANT`` or ``module:Class.field``, below ``bridged``. ``unit``: as in the name where empty."""

    name: str
    what: str
    beyond: str
    unit: str = ""


HEAD = """\
# Limits

<!-- Made from the code by: python -m tests.build_docs -->

Whatever comes in, whatever is kept and whatever goes out has a bound. Beyond it there is a clear error or something old gives
way; never a slow death. The numbers are those of the code, the reasons are its comments.

Who is who: a *principal* is a token, the name in a client certificate, the user id at the other end of the Unix socket, or
`local` for everybody on loopback. Who is none of these is counted by address (docs/security.md).
"""

ROWS: dict[str, tuple[Row, ...]] = {
    "Connections": (
        Row("api.line_link:Limits.connections", "Connections of one principal (`api.connections`)", "429 `TOO_MANY`, closed"),
        Row("api.line:RESERVED_CONNECTIONS", "More connections, for other principals", "429 `TOO_MANY`, closed", "connections"),
        Row("api.line:REFUSED_CONNECTIONS", "Refused clients that are waited for", "closed at once", "connections"),
        Row(
            "api.unix:BACKLOG",
            "Connections that wait to be accepted, each listener",
            "the kernel lets them wait",
            "connections",
        ),
        Row("api.handshakes:PENDING_EACH", "TLS handshakes of one address at once", "closed", "connections"),
        Row("api.handshakes:PENDING", "TLS handshakes of all addresses elsewhere", "closed", "connections"),
        Row("api.line_link:Limits.idle_timeout_s", "Silence of a client (`api.idle_timeout_s`)", "421 `IDLE`, closed"),
        Row("api.line_link:Limits.drain_timeout_s", "Time in which a client fetches nothing of an answer", "closed"),
        Row("api.line_link:Limits.heartbeat_s", "Time without a line in WATCH and WAIT", "a sign of life is sent"),
        Row("api.line_link:Limits.linger_s", "Time for the last line to be fetched", "closed"),
        Row("api.entrance:KEEPALIVE_IDLE_S", "Silence on TCP before the kernel asks whether the client lives", "probes"),
        Row("api.line_link:Limits.mistakes", "Mistakes in a row", "429 `TOO_MANY`, closed", "lines"),
        Row("app:OTHER_DESCRIPTORS", "Files open besides connections", "fewer connections than configured; a warning", "files"),
    ),
    "Requests and answers": (
        Row("protocol.line:MAX_LINE_BYTES", "A line of a client", "500 `BAD_REQUEST`, closed"),
        Row("protocol.reply:MAX_VALUE_CHARS", "A value in a text answer", "cut, ends in `...`"),
        Row("api.line_link:CHUNK_BYTES", "Raw bytes of one client in memory", "the client waits"),
        Row("api.line_link:Limits.write_buffer_bytes", "Answers that a client has not fetched", "its next command waits"),
        Row(
            "api.line_jobs:LOG_PAGE",
            "Entries of LOG in memory at once",
            "the next ones follow when these are fetched",
            "entries",
        ),
        Row("jobs.contents:PARSERS", "Images that are parsed at once", "the next ones wait", "images"),
        Row("jobs.plans:PLANS_WAITING", "Plans that are asked for and not made", "429 `TOO_MANY`", "plans"),
        Row("jobs.service:LIST_LIMIT", "Jobs that JOBS lists", "the newest ones", "jobs"),
        Row(
            "jobs.watch:QUEUE_LIMIT",
            "Updates that wait for one watcher",
            "read from the log later; progress is skipped",
            "updates",
        ),
    ),
    "Fleets": (
        Row("fleet.wire:MESSAGE_BYTES", "A message", "refused; `FLEET_COMMAND`"),
        Row("fleet.ledger:LIMIT", "Commands that a gateway remembers", "older ones are refused; `FLEET_STALE`", "commands"),
        Row("fleet.download:CHUNK_LIMIT_BYTES", "A chunk of an artifact", "refused; `FLEET`"),
        Row("fleet.download:CHUNK_S", "Time for one chunk", "asked for again"),
        Row("fleet.connector:LONGEST_PAUSE_S", "Time between two tries to reach the broker", "the next try"),
        Row("fleet.connector:MESSAGE_CHARS", "The message of an error in a report", "cut"),
        Row("fleet.control:LIMIT_BYTES", "An artifact, where an operator puts it", "`BAD_REQUEST`"),
        Row("fleet.control:MAX_UNITS", "Targets of one roll-out", "`BAD_REQUEST`", "targets"),
        Row("fleet.rollout:MAX_WAVES", "Waves of one roll-out", "`BAD_REQUEST`", "waves"),
    ),
    "Signatures": (
        Row("images.minisign:COMMENT_CHARS", "A trusted comment", "553 `SIGNATURE`"),
        Row("images.minisign:FILE_BYTES", "A signature or a public key", "553 `SIGNATURE`"),
        Row("jobs.policy:VERSION_CHARS", "A version in a trusted comment", "550 `POLICY`"),
        Row("jobs.turns:WINDOW_S", "Time after which an open window is noticed", "the job starts"),
    ),
    "HTTP": (
        Row("api.http_call:Limits.connections", "Connections (`api.http_connections`)", "503 `TOO_MANY`, closed"),
        Row("api.http:RESERVED_CONNECTIONS", "More connections, from this machine", "503 `TOO_MANY`, closed", "connections"),
        Row("api.http:REMOTE_EACH", "Connections of one address elsewhere", "503 `TOO_MANY`, closed", "connections"),
        Row("api.http:BACKLOG", "Connections that wait to be accepted", "the kernel lets them wait", "connections"),
        Row("api.http_call:Limits.head_timeout_s", "Time for a header, and silence between requests", "closed"),
        Row("api.http:LINE_BYTES", "The request line, and each field", "400 `BAD_REQUEST`, closed"),
        Row("api.http:MAX_FIELDS", "Fields of a header", "400 `BAD_REQUEST`, closed", "fields"),
        Row("api.http:HEAD_BYTES", "A whole header", "431 `BAD_REQUEST`, closed"),
        Row("api.http_call:JSON_BYTES", "A body in JSON", "413 `TOO_LARGE`"),
        Row("api.http_call:JSON_DEPTH", "Levels of a body in JSON", "400 `BAD_REQUEST`", "levels"),
        Row("api.http_call:Limits.body_timeout_s", "Time for a body in JSON", "408 `BAD_REQUEST`"),
        Row("api.http_call:Limits.image_bytes", "A file (`store.image_limit_mib`)", "413 `IMAGE_TOO_LARGE`"),
        Row("api.http_call:Limits.idle_timeout_s", "Silence of an upload (`api.idle_timeout_s`)", "408 `BAD_REQUEST`"),
        Row("api.http_call:CHUNK_BYTES", "Bytes of one upload or download in memory", "the client waits"),
        Row("api.http_call:Limits.drain_timeout_s", "Time in which a client takes nothing of an answer", "closed"),
        Row("api.http:LINGER_S", "Time for a body that was refused", "closed"),
        Row("api.http_call:Limits.heartbeat_s", "Time without an event in a stream", "a comment is sent"),
        Row("api.http_call:Limits.streams", "Streams of events", "429 `TOO_MANY`"),
        Row("api.http_call:Limits.streams_each", "Streams of events of one principal", "429 `TOO_MANY`", "streams"),
        Row("api.http_events:RECENT_LIMIT", "Updates that a stream of everything can replay", "`reset`", "updates"),
        Row("api.http_call:Limits.wait_s", "Time that a request waits for the end of a job", "answered as it is"),
        Row("api.http_jobs:PAGE_LIMIT", "Jobs or images of one answer", "the next page", "entries"),
        Row("api.http_jobs:LOG_LIMIT", "Entries of a log in one answer", "the next page", "entries"),
        Row("api.http_jobs:TRACE_BYTES", "A recording that is decoded", "413 `BAD_REQUEST`; it can be fetched raw"),
        Row("api.http_console:MESSAGE_LIMIT_BYTES", "One message to a console", "closed"),
        Row("api.http_console:REPLAY_LIMIT_BYTES", "History of a console that may be asked for", "400 `BAD_REQUEST`"),
        Row("api.http_console:TOLD_LIMIT", "Notices that the client of a WebSocket has not fetched", "closed", "notices"),
        Row("api.http_console:NOTE_LIMIT", "The note of a lock", "400 `BAD_REQUEST`", "characters"),
        Row("api.http_console:HEARTBEAT_S", "Silence of a WebSocket", "asked whether it lives, then closed"),
        Row("api.http_tus:METADATA_CHARS", "`Upload-Metadata`", "400 `BAD_REQUEST`"),
        Row("api.http_tus:KNOWN_LIMIT", "Uploads of images that are here already", "the oldest is complete", "uploads"),
    ),
    "Metrics": (
        Row("api.metrics:CONNECTIONS", "Connections", "closed", "connections"),
        Row("api.metrics:HEAD_BYTES", "A request", "closed"),
        Row("api.metrics:TIMEOUT_S", "Time for a request and its answer", "closed"),
    ),
    "Rights": (
        Row("api.line:STRANGERS_EACH", "Connections of one address without a token", "429 `TOO_MANY`, closed", "connections"),
        Row("api.line_link:Limits.login_timeout_s", "Silence of a client without a token", "421 `IDLE`, closed"),
        Row("api.line_talk:WRONG_TOKENS", "Wrong tokens on one connection", "535 `BAD_TOKEN`, closed", "tokens"),
        Row("api.line_talk:AUDIT_PAGE", "Entries of one AUDIT", "the newest ones", "entries"),
        Row("api.tls:HANDSHAKE_S", "A TLS handshake", "closed"),
        Row("api.auth:FIRST_DELAY_S", "Delay after a wrong token of one address; doubled with each", "the address waits"),
        Row("api.auth:LONGEST_DELAY_S", "Longest such delay", "no longer"),
        Row("api.auth:FORGET_S", "Time without a wrong token until an address starts anew", "forgotten"),
        Row("api.auth:SEEN_S", "Between two notes of a login by one credential at one address", "not noted"),
        Row("api.auth:WAITING_LIMIT", "Logins of one address that are delayed at once", "429 `TOO_MANY`", "logins"),
        Row("api.auth:ADDRESSES_LIMIT", "Addresses with wrong tokens behind them", "the oldest is forgotten", "addresses"),
        Row("api.auth:CREDENTIALS_LIMIT", "Tokens and certificates", "429 `TOO_MANY`", "credentials"),
        Row("api.auth:LIFETIME_LIMIT_S", "Lifetime of a credential; without one it does not expire", "501 `BAD_REQUEST`"),
        Row(
            "jobs.journal:AUDIT_LIMIT",
            "The audit log; failed logins, and who comes and goes, are apart",
            "the oldest entry goes",
            "entries",
        ),
    ),
    "Images and uploads": (
        Row("api.line_link:Limits.image_bytes", "A file (`store.image_limit_mib`)", "552 `IMAGE_TOO_LARGE`, closed"),
        Row(
            "api.line_link:Limits.takeover_s",
            "Silence of an upload before its sender may go on elsewhere",
            "429 `TOO_MANY` until then",
        ),
        Row("images.parts:SYNC_BYTES", "Bytes that a lost connection loses", "synced"),
        Row("images.store:MAX_IMAGES", "Staged images", "452 `STORAGE_FULL`; unused ones are removed", "files"),
        Row("images.parts:MAX_PARTS", "Unfinished uploads", "429 `TOO_MANY`; long paused ones give way", "uploads"),
        Row(
            "images.parts:MAX_PARTS_EACH",
            "Unfinished uploads of one principal",
            "429 `TOO_MANY`; its long paused ones give way",
            "uploads",
        ),
        Row(
            "images.parts:PARTS_SHARE",
            "Bytes of unfinished uploads, as announced",
            "452 `STORAGE_FULL`; long paused ones give way",
            "share",
        ),
        Row("images.parts:GIVE_WAY_S", "Pause of an upload that has a right to its room", "given up when another one needs it"),
        Row("images.parts:STALE_S", "Pause of an upload", "given up"),
        Row("images.store:GRACE_S", "Age of an image that is never removed", "may be removed when nothing needs it"),
        Row("images.store:MAX_NAMES", "Names of images", "the oldest name goes, its image stays", "names"),
        Row("images.staged:NAME_CHARS", "A name", "501 `BAD_REQUEST`"),
        Row("images.store:PREFIX_CHARS", "Digits of a shortened SHA-256, at least", "404 `UNKNOWN_IMAGE`", "digits"),
        Row("images.store:MAX_CONTENTS", "Notes of how a file was read", "the oldest note goes", "notes"),
        Row("images.model:MAX_SEGMENTS", "Separate pieces of an image", "552 `IMAGE_TOO_LARGE`", "pieces"),
        Row("images.content:MAX_PARTS", "Images of one job", "501 `BAD_REQUEST`", "images"),
        Row("images.content:MAX_PATCHES", "Patches of one job", "501 `BAD_REQUEST`", "patches"),
        Row("images.content:MAX_PATCH_BYTES", "A patch", "501 `BAD_REQUEST`"),
        Row("images.content:COMBINED_BYTES", "Several images together", "552 `IMAGE_TOO_LARGE`"),
        Row("images.content:NAME_CHARS", "The name of several images together", "cut"),
    ),
    "The parser process": (
        Row("images.parser:Limits.unpacked_bytes", "What a gzip holds (`store.image_limit_mib`)", "552 `IMAGE_TOO_LARGE`"),
        Row("images.parser:Limits.memory_bytes", "Address space", "552 `IMAGE_TOO_LARGE`"),
        Row("images.parser:Limits.memory_factor", "More of it for each byte of the file", "552 `IMAGE_TOO_LARGE`", "bytes"),
        Row("images.parser:Limits.cpu_s", "Processor time", "552 `IMAGE_TOO_LARGE`"),
        Row("images.parser:Limits.timeout_s", "Time by the clock", "552 `IMAGE_TOO_LARGE`"),
        Row("images.parser:STATUS_LIMIT_BYTES", "What it may say besides the image", "550 `IMAGE_CORRUPT`"),
        Row("images.parser:MAX_DESCRIPTORS", "Its open files", "550 `IMAGE_CORRUPT`", "files"),
    ),
    "Consoles": (
        Row("console.room:STALL_S", "Time in which a client with a full buffer fetches nothing", "thrown out"),
        Row("console.room:TELL_EVERY_S", "Time between two words to who writes without being allowed to", "dropped unsaid"),
        Row("console.history:PENDING_BYTES", "Text of a console log that waits for the disk", "dropped and counted"),
        Row("console.history:LINE_BYTES", "A line of a console log", "continued on the next line"),
        Row("target.port:WRITE_HIGH_BYTES", "What a writer sent and the port has not taken", "the writer is held"),
        Row("target.lease:LOCK_LIMIT_S", "Time of a lock", "shortened to this; over HTTP 400 `BAD_REQUEST`"),
        Row("protocol.telnet:SUB_BYTES", "A telnet subnegotiation", "skipped"),
        Row("protocol.rfc2217:SIGNATURE_CHARS", "A signature of an RFC 2217 client", "cut"),
        Row("console.server:SEND_BUFFER_BYTES", "What the kernel holds for one client on TCP", "waits in `console.buffer_kib`"),
        Row("console.server:REPLIES_BYTES", "Answers of telnet that a client has not fetched", "closed"),
        Row(
            "console.room:RESERVED_SEATS",
            "Clients beyond `console.clients` whose principal has no other",
            "429 `TOO_MANY`",
            "clients",
        ),
        Row("console.server:EOF_LINGER_S", "Time for an answer after a client closed its sending side", "closed"),
        Row(
            "console.server:BACKLOG",
            "Connections that wait to be accepted, each listener",
            "the kernel lets them wait",
            "connections",
        ),
    ),
    "Jobs, results and the journal": (
        Row("jobs.admission:REQUEST_BYTES", "Options of a job", "501 `BAD_REQUEST`"),
        Row(
            "jobs.model:ID_CHARS",
            "An id of a client; there are as many as remembered jobs",
            "501 `BAD_REQUEST`; as `id=` of a line 64",
        ),
        Row("jobs.run:LOG_LIMIT", "Notable events in the log of a job", "not logged; changes of state always are", "events"),
        Row("jobs.book:REMEMBERED", "Ended jobs in memory", "read from the journal", "jobs"),
        Row(
            "jobs.admission:FREE_BYTES",
            "Free space on the disk for a job that erases, at least",
            "452 `STORAGE_FULL`; the job fails",
        ),
        Row("jobs.results:JOB_LIMIT_BYTES", "Bytes that one READ reads", "552 `TOO_LARGE`"),
        Row("jobs.results:LIMIT_BYTES", "Bytes that all READ jobs keep", "the oldest go"),
        Row("jobs.journal:LIMIT_BYTES", "The journal", "452 `STORAGE_FULL`"),
        Row("jobs.journal:GROUP_LIMIT", "Changes of one commit", "the next commit", "changes"),
    ),
    "Sessions": (
        Row("target.process:ENTER_LIMIT_S", "From the start of a session to its plan", "400 `DEADLINE_EXCEEDED`"),
        Row(
            "target.worker:BARRIER_LIMIT_S",
            "Waiting for the journal before the first erase",
            "the job is interrupted (`STOPPED`) and tried again; nothing was erased",
        ),
        Row(
            "target.worker:WRITE_LIMIT_S",
            "One frame into the serial port",
            "interrupted (`PORT_GONE`); the job goes on when the port is back",
        ),
        Row("protocol.flow:DRAIN_BYTES", "Noise that is listened to at once", "the rest is looked at later"),
        Row(
            "target.worker:RT_LIMIT_US",
            "Processor time without a pause at real-time priority",
            "the kernel ends the session",
            "µs",
        ),
        Row("target.transfer:LIMIT_BYTES", "An image that goes by XMODEM", "552 `IMAGE_TOO_LARGE`"),
        Row("target.board:RESULT_BYTES", "A result", "the job fails; it is a defect"),
        Row("target.board:HALF_BYTES", "The flight recorder of a session, half of it", "the older half is given up"),
        Row("target.board:MAX_HAZARD_S", "A hazard that a dead session left", "taken to be over"),
        Row("target.lines:ANSWER_LIMIT_BYTES", "An answer of a line box", "450 `LINE_UNAVAILABLE`"),
        Row("target.lines:ANSWER_TIMEOUT_S", "Waiting for it", "450 `LINE_UNAVAILABLE`"),
        Row(
            "target.lines:STALE_READS",
            "What it says without being asked, in pieces of 4 KiB",
            "450 `LINE_UNAVAILABLE`",
            "pieces",
        ),
        Row("target.lines:WAIT_LIMIT_S", "One wait in a sequence of lines", "a mistake of the configuration"),
        Row("protocol.recording:MAX_NOTE_CHARS", "A note in a recording", "cut"),
    ),
    "The configuration file": (
        Row("config.file:LIMIT_BYTES", "The file", "not read"),
        Row("config.file:MAX_TARGETS", "Targets", "a mistake", "targets"),
        Row("config.values:MAX_ITEMS", "Items of a list", "a mistake", "items"),
        Row("config.values:MAX_CHARS", "A text without a limit of its own", "a mistake"),
    ),
}

# Names that look like limits and bound nothing that comes in: sizes of pieces of work, and times of the silicon.
NO_LIMITS = frozenset({"target.gpio:CONSUMER_LIMIT"})
_SAYS_LIMIT = re.compile(r"(?:^|_)(?:MAX|LIMIT)(?:_|$)")
_ROOMS = (
    "api",
    "jobs",
    "images",
    "target",
    "config",
    "app.py",
    "protocol/line.py",
    "protocol/reply.py",
    "protocol/recording.py",
)


def page() -> str:
    """The whole page."""
    out = [HEAD]
    for title, rows in ROWS.items():
        out += [f"## {title}\n", "| what | limit | beyond it | why |", "|---|---|---|---|"]
        for row in rows:
            why = reason(row.name)
            out.append(f"| {row.what} | {_shown(row)} | {row.beyond} | {why.replace('|', chr(92) + '|')} |")
        out.append("")
    out += ["## Values in a request\n", "| kind | allowed |", "|---|---|", *_values(), ""]
    out += ["What each setting may be is in [configuration](configuration.md).", ""]
    return "\n".join(out)


def _shown(row: Row) -> str:
    found = value(row.name)
    if row.unit == "share":
        return f"1/{found} of `store.limit_mib`"
    constant = row.name.rpartition(":")[2].rpartition(".")[2].upper()
    unit = row.unit or {"S": "s", "BYTES": "bytes", "CHARS": "characters"}.get(constant.rpartition("_")[2], "")
    if unit == "bytes" and found >= 1024:
        power = "MiB" if found % (1 << 20) == 0 else "KiB"
        return f"{found / (1 << 20 if power == 'MiB' else 1 << 10):g} {power}"
    if unit == "s" and found >= 3600:
        return f"{found / 3600:g} h"
    return f"{found:,} {unit}".rstrip() if isinstance(found, int) else f"{found:g} {unit}".rstrip()


def value(name: str) -> Any:
    """Of the constant, or the default of the field."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(f"bridged.{module}")
    cls, _, field = path.rpartition(".")
    if cls:
        return next(f.default for f in dataclasses.fields(getattr(found, cls)) if f.name == field)
    return getattr(found, path)


@cache
def _comments(module: str) -> dict[str, str]:
    """``CONSTANT`` or ``Class.field`` to the comment that stands beside it, or in the lines above it."""
    path = ROOT / "bridged" / f"{module.replace('.', '/')}.py"
    text = path.read_text()
    comments: dict[int, tuple[int, str]] = {}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                comments[token.start[0]] = (token.start[1], token.string.lstrip("# ").strip())
    lines = text.splitlines()
    found: dict[str, str] = {}

    def note(prefix: str, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef):
                note(f"{node.name}.", node.body)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names = [n for t in targets for n in (t.elts if isinstance(t, ast.Tuple) else [t])]
                beside = comments.get(node.end_lineno or 0, (0, ""))[1]
                above: list[str] = []
                at = node.lineno - 1
                while at in comments and lines[at - 1].lstrip().startswith("#"):
                    above.insert(0, comments[at][1])
                    at -= 1
                found.update({f"{prefix}{n.id}": beside or " ".join(above) for n in names if isinstance(n, ast.Name)})

    note("", ast.parse(text).body)
    return found


def reason(name: str) -> str:
    module, _, path = name.partition(":")
    return _comments(module).get(path, "").replace("``", "`")


def unlisted() -> list[str]:
    """Constants that say by their names that they are limits, and are not on the page."""
    listed = {row.name for rows in ROWS.values() for row in rows} | NO_LIMITS
    found = []
    for room in _ROOMS:
        path = ROOT / "bridged" / room
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            module = ".".join(file.relative_to(ROOT / "bridged").with_suffix("").parts)
            names = [f"{module}:{name}" for name in _comments(module) if name.isupper() and _SAYS_LIMIT.search(name)]
            found += [name for name in names if name not in listed]
    return found


def unexplained() -> list[str]:
    return [row.name for rows in ROWS.values() for row in rows if not reason(row.name)]


def _values() -> list[str]:
    """What each kind of argument says when something much too long comes."""
    out = []
    for kind, check in line._CONVERT.items():
        try:
            check("\x7f" * 4000)
        except ValueError as error:
            out.append(f"| {kind} | {str(error).removeprefix('expected ').replace('|', chr(92) + '|')} |")
    return out
