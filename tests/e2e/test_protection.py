"""A field-protected target, by the command line, the real daemon and a real session process on a simulated part."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from bridged import chips
from bridged.sim.loader import Timing
from tests.e2e.gateway import Gateway, pairs, wait_for
from tests.target.bench import make_image

CHIP = chips.find("L431")  # Its worst mass erase is short, and so is twice that.
FAST = {"timing": Timing(sector_erase_s=0.02, mass_erase_s=0.5, spread=0, startup_s=0.01), "flash_bytes": 256 * 1024, "rdp": 1}


def test_unprotect_flash_prove_protect_and_ensure_by_record(tmp_path: Path) -> None:
    image = tmp_path / "app.bin"
    image.write_bytes(make_image(CHIP, 4096).segments[0].data)
    with Gateway(tmp_path, {"t": "L431"}, FAST) as gateway:

        def bridged(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "bridged", "--gateway", f"unix:{gateway.root}/bridged.sock", *words]
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)

        app = (str(image), "--addr", "0x08000000")
        assert bridged("flash", "t", *app).returncode == 6, "refused: readout protection"
        refused = bridged("flash", "t", *app, "--unprotect", "--protect")
        assert refused.returncode == 6
        assert "erases the whole flash" in refused.stderr
        done = bridged("flash", "t", *app, "--unprotect", "--protect", "--force", "erase-everything")
        assert done.returncode == 0, done.stderr
        assert "every byte read back and compared" in done.stdout
        assert "readout protection is on" in done.stdout
        device = gateway.device("t")
        assert device.memory.rdp == 1
        assert gateway.holds("t", make_image(CHIP, 4096))
        same = bridged("--json", "ensure", "t", *app)
        last = json.loads(same.stdout.splitlines()[-1])
        assert (last["code"], last["data"]["evidence"]) == (251, "record")
        assert "evidence: record" in bridged("ensure", "t", *app).stdout
        # Without the word nothing is removed; with it everything is.
        assert bridged("unprotect", "t").returncode == 6
        assert device.memory.rdp == 1
        open_ = bridged("unprotect", "t", "--force", "erase-everything")
        assert open_.returncode == 0, open_.stderr
        assert "the whole flash was erased" in open_.stdout
        assert device.memory.rdp == 0
        assert device.memory.blank(device.memory.base, device.memory.end)


def test_option_bytes_on_the_line_and_on_the_command_line(tmp_path: Path) -> None:
    with Gateway(tmp_path, {"t": "F407"}, {"flash_bytes": 512 * 1024}) as gateway:
        client = gateway.connect()
        code, text = client.do("OPTION-BYTES t wait=1")
        found = pairs(text)
        assert (code, found["options.before.fields.BOR_LEV"], found["options.before.readout_protection"]) == (250, "3", "0")
        code, text = client.do("OPTION-BYTES t set=RDP:2 wait=1")
        assert (code, text.split()[0]) == (550, "NOT_ALLOWED")
        code, text = client.do("OPTION-BYTES t raw=0x1FFFC001:CC fields=RDP wait=1")
        assert (code, text.split()[0]) == (550, "NOT_ALLOWED")
        client.close()
        command = [sys.executable, "-m", "bridged", "--gateway", f"unix:{gateway.root}/bridged.sock"]
        done = subprocess.run(
            [*command, "option-bytes", "t", "--set", "BOR_LEV=1"], capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if "BOR_LEV" in line]
        assert line.split()[1:] == ["3", "->", "1"]
        assert "RM0090" in done.stdout
        assert gateway.device("t").memory.rdp == 0


def test_a_daemon_that_is_killed_in_the_middle_of_an_unprotect_goes_on_with_it(tmp_path: Path) -> None:
    slow = {**FAST, "timing": Timing(sector_erase_s=0.02, mass_erase_s=3.0, spread=0, startup_s=0.01)}
    with Gateway(tmp_path, {"t": "L431"}, slow) as gateway:
        client = gateway.connect()
        _, text = client.do("UNPROTECT t force=erase-everything")
        job = pairs(text)["job"]
        device = gateway.device("t")
        wait_for("the mass erase", lambda: device.hazard == "erase")
        gateway.stop(signal.SIGKILL)
        gateway.start()
        client = gateway.connect()
        code, text = client.do(f"WAIT {job}")
        assert code == 250, text
        assert device.memory.rdp == 0
        assert device.memory.blank(device.memory.base, device.memory.end)
        client.close()
        # Gateway's end looks for resets in the middle of an erase.
