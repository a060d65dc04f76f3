"""DOCTOR as a job of the real daemon: the findings come as lines, and the flash is as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.gateway import Gateway, pairs


def test_the_findings_of_a_target_are_lines_of_the_reply(tmp_path: Path) -> None:
    with Gateway(tmp_path, {"f7": "F756"}, {"options": {"BOOT_ADD0": 0x0040}}) as gateway:
        client = gateway.connect()
        code, text = client.do("DOCTOR f7 wait=1")
        assert (code, pairs(text)["problems"]) == (250, "1")
        found = {pairs(line)["code"]: pairs(line) for line in client.lines if line.startswith("level=")}
        assert found["DOCTOR_APPLICATION_UNREACHABLE"]["level"] == "problem"
        assert found["DOCTOR_APPLICATION_UNREACHABLE"]["remedy"]
        assert found["DOCTOR_IDENTIFIED"]["level"] == "ok"
        client.close()
        assert not gateway.device("f7").stats.erases


def test_the_command_says_what_is_wrong_and_ends_with_1(tmp_path: Path) -> None:
    with Gateway(tmp_path, {"f7": "F756"}, {"options": {"BOOT_ADD0": 0x0040}}) as gateway:
        command = [sys.executable, "-m", "bridged", "--gateway", f"unix:{gateway.root}/bridged.sock", "examine", "f7"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert done.stdout.splitlines()[0].startswith("problem  DOCTOR_APPLICATION_UNREACHABLE: BOOT_ADD0 = 0x0040")
        assert done.stdout.splitlines()[-1] == "f7: 1 problem, 0 warnings"
