"""What goes to a terminal and to the journal. The journal itself is asked in tests/vm; here a socket stands for it."""

from __future__ import annotations

import array
import ast
import json
import logging
import mmap
import os
import re
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bridged import logs
from bridged.logs import JournalHandler, Notice, note


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "journal"))
        sock.settimeout(10)
        yield sock


def entry(journal: socket.socket) -> dict[str, str]:
    """One entry, decoded as journald does."""
    size = array.array("i").itemsize
    data, ancillary, _, _ = journal.recvmsg(1 << 20, socket.CMSG_SPACE(size))
    if ancillary:
        fd = int.from_bytes(ancillary[0][2], "little")
        with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as view:
            data = bytes(view)
        os.close(fd)
    fields = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            length = int.from_bytes(data[:8], "little")
            value, data = data[8 : 8 + length], data[9 + length :]
        fields[name.decode()] = value.decode()
    return fields


def say(journal: socket.socket, level: int, text: str, **extra: object) -> dict[str, str]:
    handler = JournalHandler(str(journal.getsockname()))
    log = logging.Logger("bridged.test")
    log.addHandler(handler)
    try:
        log.log(level, text, **extra)  # type: ignore[arg-type]
        return entry(journal)
    finally:
        handler.close()


@pytest.mark.parametrize(
    ("level", "priority"),
    [(logging.DEBUG, "7"), (logging.INFO, "6"), (logging.WARNING, "4"), (logging.ERROR, "3"), (logging.CRITICAL, "2")],
)
def test_an_entry_says_who_where_and_how_bad(journal: socket.socket, level: int, priority: str) -> None:
    fields = say(journal, level, "hello")
    assert (fields["MESSAGE"], fields["PRIORITY"], fields["SYSLOG_IDENTIFIER"]) == ("hello", priority, "bridged")
    assert fields["CODE_FILE"] == __file__
    assert fields["CODE_FUNC"] == "say"


def test_a_notice_has_its_id_and_fields(journal: socket.socket) -> None:
    extra = note(Notice.JOB_FAILED, job="j-17", target="motor1", code="NO_SYNC", image="")
    fields = say(journal, logging.ERROR, "job j-17 failed\n  cause\n  remedy", extra=extra)
    assert fields["MESSAGE_ID"] == Notice.JOB_FAILED.message_id
    assert (fields["BRIDGED_JOB"], fields["BRIDGED_TARGET"], fields["BRIDGED_CODE"]) == ("j-17", "motor1", "NO_SYNC")
    assert "BRIDGED_IMAGE" not in fields
    assert fields["MESSAGE"] == "job j-17 failed\n  cause\n  remedy"


def test_a_text_cannot_forge_a_field(journal: socket.socket) -> None:
    fields = say(journal, logging.INFO, "one\nPRIORITY=0\nBRIDGED_JOB=j-1", extra=note(target="a\nMESSAGE_ID=x"))
    assert fields["PRIORITY"] == "6"
    assert "BRIDGED_JOB" not in fields
    assert "MESSAGE_ID" not in fields


def test_what_is_too_large_for_a_datagram_goes_as_a_file(journal: socket.socket) -> None:
    text = "x" * (1 << 20)
    assert say(journal, logging.ERROR, text)["MESSAGE"] == text


def test_a_journal_that_stands_still_costs_its_messages_only(journal: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "SEND_LIMIT_S", 0.01)
    handler = JournalHandler(str(journal.getsockname()))
    record = logging.LogRecord("bridged", logging.INFO, "x", 1, "hello", (), None)
    lost: list[logging.LogRecord] = []
    monkeypatch.setattr(handler, "handleError", lost.append)
    began = time.monotonic()
    while len(lost) < 1000:
        handler.emit(record)  # Comes back, though nobody reads.
    assert time.monotonic() - began < 5, "each message waited"
    assert entry(journal)["MESSAGE"] == "hello"
    handler.emit(record)  # It reads again, and nothing is lost any more.
    assert len(lost) == 1000
    assert handler._sock.gettimeout() == 0.01
    handler.close()


def test_lines_for_people() -> None:
    record = logging.LogRecord("bridged", logging.ERROR, "x", 1, "first\n  second", (), None)
    assert re.fullmatch(r"\d\d:\d\d:\d\d error: first\n  second", logs.TextFormat().format(record))
    quiet = logging.LogRecord("bridged", logging.INFO, "x", 1, "hello", (), None)
    assert re.fullmatch(r"\d\d:\d\d:\d\d hello", logs.TextFormat().format(quiet))


def said_as_json(level: int, text: str, *args: object, **extra: Any) -> dict[str, str]:
    record = logging.getLogger("bridged.test").makeRecord("bridged.test", level, __file__, 1, text, args, **extra)
    line = logs.JsonFormat().format(record)
    assert "\n" not in line
    found: dict[str, str] = json.loads(line)
    return found


def test_one_json_object_a_line() -> None:
    extra = note(Notice.JOB_FAILED, job="j-17", target="motor1", kind="flash", state="failed", code="NO_SYNC", image="")
    found = said_as_json(logging.ERROR, "job %s failed\n  cause \u2028 \x00 remedy", "j-17", exc_info=None, extra=extra)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", found.pop("time"))
    assert found == {
        "level": "error",
        "logger": "bridged.test",
        "message": "job j-17 failed\n  cause \u2028 \x00 remedy",
        "event": "job_failed",
        "message_id": Notice.JOB_FAILED.message_id,
        "job": "j-17",
        "target": "motor1",
        "kind": "flash",
        "state": "failed",
        "code": "NO_SYNC",
    }
    assert "event" not in said_as_json(logging.INFO, "hello", exc_info=None)
    try:
        raise ValueError("a\nb")
    except ValueError:
        found = said_as_json(logging.CRITICAL, "ended by a defect", exc_info=sys.exc_info(), extra=note(Notice.DEFECT))
    assert found["traceback"].endswith("ValueError: a\nb")


def test_every_field_that_is_logged_is_documented() -> None:
    """Fields come from calls of ``note``; a collector is set up by what docs/logs.md says."""
    page = (Path(__file__).parents[1] / "docs" / "logs.md").read_text()
    documented = set(re.findall(r"^\| `(\w+)` \|", page.partition("## Events")[0], re.MULTILINE))
    named = {"time", "level", "logger", "message", "event", "message_id", "traceback"}
    sources = [path.read_text() for path in Path(logs.__file__).parent.rglob("*.py")]
    for source in sources:
        if re.search(r"(from bridged\.logs import .*|^def )\bnote\b", source, re.MULTILINE):
            calls = [call for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call)]
            noted = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("note", "log_error")]
            named |= {word.arg for call in noted for word in call.keywords if word.arg}
    assert len(named) > 12
    assert named <= documented
    assert documented - named == {"kind", "state"}, "those are in a dict that is passed on"


def test_json_goes_to_stdout_and_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        logs.set_up({}, "json")
        logging.getLogger("bridged").warning("hello", extra=note(target="motor1"))
        out, err = capsys.readouterr()
        assert json.loads(out)["target"] == "motor1"
        assert err == ""
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_only_the_journal_gets_entries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        with (tmp_path / "stderr").open("w") as file:
            monkeypatch.setattr("sys.stderr", file)
            stat = os.fstat(file.fileno())
            logs.set_up({"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"})
            assert isinstance(root.handlers[0], JournalHandler)
            logs.set_up({"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino + 1}"})
            assert not isinstance(root.handlers[0], JournalHandler)
    finally:
        root.handlers[:] = before
        root.setLevel(level)


def test_the_catalogue_explains_every_notice() -> None:
    text = logs.catalog()
    ids = [notice.message_id for notice in Notice]
    assert len(set(ids)) == len(ids)
    for notice in Notice:
        assert re.fullmatch(r"[0-9a-f]{32}", notice.message_id)
        assert f"-- {notice.message_id}\nSubject: {notice.subject}\nDefined-By: bridged\n" in text
    assert not [line for line in text.splitlines() if line.startswith("--") and not re.fullmatch(r"-- [0-9a-f]{32}", line)]
