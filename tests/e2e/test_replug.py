"""An adapter that is unplugged in the middle of a job and plugged in again: the job goes on where it was and succeeds.

The simulated part keeps its power and its flash; its pty hangs up and its line box closes, as an adapter with both on one cable
does. Then a new pty appears under the same name.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bridged import chips
from bridged.sim.pty import PtyDevice
from tests.e2e.gateway import Client, Gateway, pairs, wait_for
from tests.e2e.test_kill import in_phase, terminal_once
from tests.target.bench import make_image

SIZE = 24_000


def unplug(gateway: Gateway, name: str) -> PtyDevice:
    port = gateway.ports[name]
    port.stop()
    return port


def plug_in(gateway: Gateway, name: str) -> None:
    """The same part behind another pty, under the name of the one before."""
    old = gateway.ports[name]
    port = PtyDevice(old.device, link=old.link, lines_path=old.lines_path, paced=gateway.paced)
    gateway.ports[name] = gateway.stack.enter_context(port)


def status_is(client: Client, job: str, state: str) -> dict[str, str]:
    found: dict[str, str] = wait_for(f"state {state}", lambda: (s := client.status(job))["state"] == state and s)
    return found


@pytest.mark.parametrize("phase", ["sync", "identify", "write", "verify"])
def test_unplugged_in_the_middle_and_plugged_in_again(tmp_path: Path, phase: str) -> None:
    image = make_image(chips.find("L476"), SIZE)
    with Gateway(tmp_path, {"l4": "L476"}, paced=phase == "write") as gateway:
        client = gateway.connect()
        client.put(image.segments[0].data, "app.bin")
        code, text = client.do("FLASH l4 app.bin addr=0x08000000")
        assert code == 250, text
        job = pairs(text)["job"]
        in_phase(gateway, job, phase)
        unplug(gateway, "l4")
        told = status_is(client, job, "interrupted")
        assert (told["reason"], told["error"]) == ("target_absent", "PORT_GONE")
        client.do("INFO l4")
        assert "state=absent" in " ".join(client.lines)
        assert not gateway.sessions()
        assert client.status(job)["state"] == "interrupted"
        assert not gateway.holds("l4", image), "the block with the vectors is written last"
        plug_in(gateway, "l4")
        code, text = client.do(f"WAIT {job} timeout=90")
        assert code == 250, text
        assert (pairs(text)["state"], pairs(text)["evidence"]) == ("succeeded", "full")
        assert client.status(job)["attempts"] == "2"
        assert gateway.holds("l4", image)
        assert not gateway.device("l4").lines["boot0"]
        assert gateway.device("l4").lines["nrst"]
        code, text = client.do("ENSURE l4 app.bin addr=0x08000000 wait=1")
        assert (code, pairs(text)["changed"]) == (251, "0"), text
        client.close()
        gateway.stop()
        terminal_once(tmp_path, job)
