"""A job that fails, and its recording fetched by the real ``nc`` and explained by the real command line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from bridged import chips
from bridged.protocol.an3155 import Command
from bridged.protocol.trace import decode
from bridged.protocol.trace_event import Kind
from bridged.protocol.trace_text import table
from tests.e2e.gateway import Gateway, pairs
from tests.support import require_tool
from tests.target.bench import make_image


def test_the_recording_of_a_failed_flash_by_nc(tmp_path: Path) -> None:
    nc = require_tool("nc", "netcat-openbsd")

    def say(*lines: str) -> bytes:
        text = "".join(f"{line}\n" for line in lines).encode()
        path = str(tmp_path / "bridged.sock")
        return subprocess.run([nc, "-N", "-U", path], input=text, capture_output=True, timeout=60, check=True).stdout

    data = make_image(chips.find("F756"), 3000).segments[0].data
    with Gateway(tmp_path, {"f7": "F756"}, settings={"faults": ["nack:0x31:0:address:*"]}) as gateway:
        client = gateway.connect()
        client.put(data, "app.bin")
        failed = say("FLASH f7 app.bin addr=0x08000000 outside=discard wait=1").decode().splitlines()[-1]
        assert failed.startswith("400 NACK "), failed
        job = pairs(failed)["trace"]
        assert job == pairs(failed)["job"]
        assert client.status(job)["trace"] == job

        answer = say(f"TRACE {job}", "PING", "QUIT")
        greeting, head, rest = answer.split(b"\n", 2)
        told = pairs(head.decode())
        assert (greeting[:4], head[:4], told["job"]) == (b"220 ", b"250 ", job)
        recording, after = rest[: int(told["size"])].decode(), rest[int(told["size"]) :]
        assert after.decode().splitlines()[0] == "250 PONG", "exactly as many bytes as were announced"

        found = decode(recording)
        assert found.whole
        assert found.events[-1].kind is Kind.END
        refused = [e for e in found.flagged if e.opcode == Command.WRITE_MEMORY]
        assert refused
        assert {e.flags for e in refused} == {("NACK (address)",)}
        noted = [e.kind for e in found.events]
        for kind in (Kind.LINES, Kind.FORMAT, Kind.PHASE, Kind.HAZARD, Kind.BARRIER, Kind.RETRY):
            assert kind in noted, f"nothing of {kind} is on the recorder"
        assert not [
            e for e in found.events if e.kind in (Kind.UNREADABLE, Kind.NOTE) or (e.kind is Kind.BYTES and e.sent_bytes)
        ]

        command = [sys.executable, "-m", "bridged", "-g", f"unix:{tmp_path}/bridged.sock", "trace", job]
        shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert shown.stdout == table(found)
        assert re.search(r"! Write Memory +0x[0-9a-f]{8} +NACK in ", shown.stdout)

        # Of what goes well nothing is kept, unless it was asked for.
        assert say("ID f7 wait=1").decode().splitlines()[-1].startswith("250 ")
        quiet = pairs(say("ID f7 wait=1").decode().splitlines()[-1])
        assert "trace" not in quiet
        assert say(f"TRACE {quiet['job']}").decode().splitlines()[1].startswith("404 UNKNOWN_TRACE ")
        asked = pairs(say("ID f7 trace=1 wait=1").decode().splitlines()[-1])
        assert asked["trace"] == asked["job"]
