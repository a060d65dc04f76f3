"""What the daemon says: to a person at a terminal, and to systemd's journal with fields that a program can ask for.

``set_up`` looks at $JOURNAL_STREAM: where stderr is the journal, records go to its socket as they are, in its native
protocol, and ``journalctl BRIDGED_JOB=j-17``, ``BRIDGED_TARGET=motor1 -p warning`` or ``MESSAGE_ID=...`` find them. Elsewhere
they are lines of text on stderr, or, where ``serve --log-format json`` asks for it, JSON objects on stdout for whoever collects
logs of containers: the same fields under the names of docs/logs.md.

What happens again and again is a ``Notice``: it has a MESSAGE_ID that never changes and an entry in the catalogue
(``systemd/bridged.catalog``, made from here), which ``journalctl -x`` shows: what it means, and what to do. Everything else is
a message without one.

Our own lines and not systemd-python: its sendv waits for a journal that stands still, for as long as that stands, and so would
the daemon (``SEND_LIMIT_S``). This module knows nothing of jobs and targets but the names of their fields.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum
from typing import Any

from bridged.config.file import InvalidConfig
from bridged.errors import BridgedError

log = logging.getLogger("bridged")

JOURNAL_SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "bridged"
SEND_LIMIT_S = 0.5  # A journal that stands still costs its messages, and not the watchdog.

FORMATS = ("auto", "text", "json")  # Of ``serve --log-format``.

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))


class Notice(Enum):
    """``(message id, subject, explanation)``. Words such as @BRIDGED_TARGET@ are replaced by journalctl."""

    STARTED = (
        "7ae43857857344e787306868d636777c",
        "bridged is ready",
        "The daemon answers clients. Targets whose device is missing are picked up when it appears. Interrupted jobs of the "
        "last run go on by themselves; no other target was reset.",
    )
    STOPPING = (
        "831a709ee0364c1f939b0186e8cac878",
        "bridged is stopping",
        "Running jobs finish the command they are in, bring their targets back to the application, and go on at the next "
        "start. During an erase this can take two minutes: a reset in the middle of it can leave flash half written.",
    )
    JOB_ENDED = (
        "7e8d48bbab27451980ad517ba539d587",
        "Job @BRIDGED_JOB@ of target @BRIDGED_TARGET@ ended: @BRIDGED_STATE@",
        "The job came to the end that its client asked for.",
    )
    JOB_FAILED = (
        "b923eb9737a74465b7b17ede1795e8ed",
        "Job @BRIDGED_JOB@ of target @BRIDGED_TARGET@ ended: @BRIDGED_STATE@, @BRIDGED_CODE@",
        "The message has what was attempted, what came instead, the likely cause and the remedy; the code is explained in "
        "/usr/share/doc/bridged/errors.md. The lines of the target are idle. Where the recording of the dialogue was kept, "
        "`bridged trace @BRIDGED_JOB@` shows it.",
    )
    TARGET_ABSENT = (
        "73c0913d293a44c9bd019f2a373fac1b",
        "Target @BRIDGED_TARGET@ is absent",
        "Its serial port or its GPIO lines are missing, taken by somebody else, or may not be opened; the message says which. "
        "It is looked for once a second and picked up by itself. `bridged doctor` tells who holds a port.",
    )
    TARGET_THERE = (
        "1913f6bb7d4146cc853f71c5735ec4c4",
        "Target @BRIDGED_TARGET@ is there",
        "Its port and its lines are ours, and idle. This resets nothing.",
    )
    TARGET_BROKEN = (
        "46584efda46a47d1a51fcfe79d43a2a7",
        "Target @BRIDGED_TARGET@ is broken",
        "NRST or BOOT0 could not be brought back to idle, so the target may be held in reset or in its loader. Look at the "
        "wiring and at who else drives the lines; then `systemctl reload bridged` tries it again.",
    )
    TARGET_RELEASED = (
        "32b87387842d4b13a426ee2d80526d36",
        "Target @BRIDGED_TARGET@ is back in its application",
        "A session had left it in its loader (killed, or cut off by a power loss). Its job, if it was not done, goes on.",
    )
    CONFIG_REJECTED = (
        "8724557c19f141dab97d5bdbdc672d93",
        "The configuration has mistakes",
        "Each is named with its line. At a reload the old configuration stays in force; at a start the daemon ends with 78 and "
        "is not started again until somebody does. `bridged check-config /etc/bridged/bridged.toml` says the same.",
    )
    STARVED = (
        "90cb114da5eb41b3a7115df16c333957",
        "A part of bridged makes no progress",
        "The watchdog is not fed any more; if it goes on, systemd ends the daemon and starts it again. Running jobs go on "
        "then. A disk that does not answer is the usual reason.",
    )
    DEFECT = (
        "eb3f19d0752248d7802b77b0cbb51fc4",
        "bridged ended by a defect of its own",
        "The message has the place. Please report it. systemd starts the daemon again; interrupted jobs go on.",
    )

    @property
    def message_id(self) -> str:
        return self.value[0]

    @property
    def subject(self) -> str:
        return self.value[1]

    @property
    def explanation(self) -> str:
        return self.value[2]


def note(notice: Notice | None = None, **fields: object) -> dict[str, Any]:
    """For ``extra=`` of a log call: what kind of message it is, and fields (``job``, ``target``, ``kind``, ``code``, ...)."""
    named = {f"BRIDGED_{name.upper()}": str(value) for name, value in fields.items() if value not in ("", None)}
    return {"bridged": named | ({"MESSAGE_ID": notice.message_id} if notice is not None else {})}


def catalog() -> str:
    """``systemd/bridged.catalog``."""
    parts = ["# Made from bridged/logs.py by: python -m tests.build_docs\n"]
    for notice in Notice:
        lines = [f"-- {notice.message_id}", f"Subject: {notice.subject}", "Defined-By: bridged"]
        lines += ["Documentation: file:/usr/share/doc/bridged/troubleshooting.md", "", notice.explanation, ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


class TextFormat(logging.Formatter):
    """For a person: time, level where it is more than a note, text."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno > logging.INFO:
            at, _, message = text.partition(" ")
            return f"{at} {record.levelname.lower()}: {message}"
        return text


class JsonFormat(logging.Formatter):
    """For programs: one object a line, whatever the message holds. Keys are added in later versions, never renamed."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        said: dict[str, str] = dict(getattr(record, "bridged", {}))
        if message_id := said.pop("MESSAGE_ID", ""):
            fields["event"], fields["message_id"] = _EVENTS[message_id], message_id
        fields |= {name.removeprefix("BRIDGED_").lower(): value for name, value in said.items()}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


_EVENTS = {notice.message_id: notice.name.lower() for notice in Notice}


class JournalHandler(logging.Handler):
    """One record, one entry of the journal (https://systemd.io/JOURNAL_NATIVE_PROTOCOL)."""

    def __init__(self, address: str = JOURNAL_SOCKET) -> None:
        super().__init__()
        self._address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(SEND_LIMIT_S)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._send(encode(self.fields(record)))
            self._sock.settimeout(SEND_LIMIT_S)
        except Exception as error:
            if isinstance(error, TimeoutError | BlockingIOError):
                self._sock.settimeout(0)  # It was waited for once: until it reads again nobody waits for it.
            self.handleError(record)

    def fields(self, record: logging.LogRecord) -> dict[str, str]:
        return {
            "MESSAGE": self.format(record),
            "PRIORITY": str(next(number for level, number in _PRIORITIES if record.levelno >= level)),
            "SYSLOG_IDENTIFIER": IDENTIFIER,
            "LOGGER": record.name,
            "CODE_FILE": record.pathname,
            "CODE_LINE": str(record.lineno),
            "CODE_FUNC": record.funcName or "",
            **getattr(record, "bridged", {}),
        }

    def _send(self, entry: bytes) -> None:
        try:
            self._sock.sendto(entry, self._address)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            # Too large for a datagram: the journal takes a sealed file instead.
            self._send_file(entry)

    def _send_file(self, entry: bytes) -> None:
        fd = os.memfd_create("bridged-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            view = memoryview(entry)
            while view:
                view = view[os.write(fd, view) :]
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
            # Not socket.send_fds: it ignores the address.
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, sys.byteorder))
            self._sock.sendmsg([b""], [rights], 0, self._address)
        finally:
            os.close(fd)

    def close(self) -> None:
        self._sock.close()
        super().close()


def encode(fields: Mapping[str, str]) -> bytes:
    """One entry: ``NAME=value``, or for a value of several lines the name, its length and the value."""
    parts = []
    for name, text in fields.items():
        value = text.encode("utf-8", "surrogateescape")
        if b"\n" in value:
            parts.append(name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n")
        else:
            parts.append(name.encode() + b"=" + value + b"\n")
    return b"".join(parts)


def set_up(environment: Mapping[str, str] = os.environ, style: str = "auto") -> None:
    """To the journal where $JOURNAL_STREAM says that stderr is the journal, else to stderr; ``style``: one of ``FORMATS``."""
    try:
        stat = os.fstat(sys.stderr.fileno())
        journal = environment.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
    except (OSError, ValueError):
        journal = False
    handler: logging.Handler
    if style == "json":
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(JsonFormat())
    elif style == "auto" and journal:
        handler = JournalHandler()
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(TextFormat())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def log_error(error: BridgedError, doing: str = "", notice: Notice | None = None, **fields: object) -> None:
    """One record for one error: what happened, the likely cause, the remedy; for a bad configuration one for each mistake."""
    if isinstance(error, InvalidConfig):
        where = f"{doing}: " if doing else ""
        for mistake in error.errors:
            log.error("%s%s", where, mistake, extra=note(Notice.CONFIG_REJECTED, code=error.code, **fields))
        return
    log.error("%s", error_text(error, doing), extra=note(notice, code=error.code, **fields))


def error_text(error: BridgedError, doing: str = "") -> str:
    """What happened, the likely cause, the remedy."""
    where = f"{doing}: " if doing else ""
    return f"{where}{error.message} [{error.code}]\n  {error.hint.cause}\n  {error.hint.remedy}"
