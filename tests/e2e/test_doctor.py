"""DOCTOR as a job of the real daemon: the findings come as lines, and the flash is as it was."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.gateway import Gateway, pairs


def test_the_findings_of_a_target_are_lines_of_the_reply(tmp_path: Path) -> None:
    with Gateway(tmp_path, {"f7": "F756"}, {"options": {"BOOT_ADD0": 0x0040}}) as gateway:
        client = gateway.connect()
        code, text = client.do("DOCTOR f7 wait=1")
        assert (code, pairs(text)["problems"]) == (250, "1")
        found = {pairs(line)["code"]: pairs(line) for line in client.lines if line.startswith("level=")}
        assert found["APPLICATION_UNREACHABLE"]["level"] == "problem"
        assert found["APPLICATION_UNREACHABLE"]["remedy"]
        assert found["IDENTIFIED"]["level"] == "ok"
        client.close()
        assert not gateway.device("f7").stats.erases
