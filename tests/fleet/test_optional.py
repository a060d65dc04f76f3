"""Who has no fleet has nothing of it: no package, no module, no memory; and who asks for one without the package is told."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from bridged.config.file import load
from bridged.errors import BridgedError, ConfigError

ROOT = Path(__file__).parents[2]

# A daemon that is built whole, where the package cannot be imported; then what was loaded.
DAEMON = """
import asyncio, contextlib, sys
from pathlib import Path
{block}
from bridged import app, systemd
from bridged.config.file import load
async def main():
    loaded = load('''[gateway]
name = "gw1"
[api]
listen = ""
metrics = ""
http = "127.0.0.1:0"
{fleet}''')
    daemon = app.Daemon(loaded, app.Places(Path("x"), Path(sys.argv[1]), None), systemd.Notifier({{}}))
    async with contextlib.AsyncExitStack() as parts:
        await daemon._build(parts)
        if daemon.fleet is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    while not daemon.fleet.trouble:
                        task = asyncio.ensure_future(daemon.fleet.run())
                        await asyncio.sleep(0.3)
                        task.cancel()
            print(daemon.fleet.trouble)
asyncio.run(main())
names = ("nats", "nkeys")
print([m for m, x in sys.modules.items() if x and (m.startswith("bridged.fleet") or m.split(".")[0] in names)])
print([m for m in ("aiohttp.client", "aiohttp.connector") if m in sys.modules])
"""


def daemon(tmp_path: Path, fleet: str = "", block: str = "") -> list[str]:
    code = DAEMON.format(fleet=fleet, block=block)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


BLOCKED = 'sys.modules["nats"] = None'
FLEET = '[fleet]\nservers = ["nats://127.0.0.1:9"]'


def test_without_a_fleet_nothing_is_loaded(tmp_path: Path) -> None:
    assert daemon(tmp_path, block=BLOCKED) == ["[]", "[]"]


def test_without_the_package_the_daemon_runs_and_says_what_is_missing(tmp_path: Path) -> None:
    trouble, *_ = daemon(tmp_path, FLEET, BLOCKED)
    assert "the extra `fleet` is not installed" in trouble


def test_with_a_fleet_the_http_client_is_not_loaded(tmp_path: Path) -> None:
    trouble, modules, client = daemon(tmp_path, FLEET)
    assert "Connect call failed" in trouble
    assert "'nats.aio.client'" in modules
    assert client == "[]"


def test_the_package_is_an_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [line for line in project["dependencies"] if "nats" in line]
    assert [line for line in project["optional-dependencies"]["fleet"] if line.startswith("nats-py")]
    assert "nats" not in (ROOT / "requirements.lock").read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('servers = ["nats://broker.example.org:4222"]', "is plain text: say tls://"),
        ('servers = ["broker:4222"]', "is not tls://HOST:PORT"),
        ('servers = ["tls://broker:99999"]', "is not tls://HOST:PORT"),
        ('servers = ["wss://broker:443"]', "is not tls://HOST:PORT"),
        ('labels = ["site berlin"]', "is not KEY=VALUE"),
        ('targets = ["m1"]', "no such target"),
        ('certificate = "/x.pem"', "is required with fleet.certificate"),
    ],
)
def test_what_cannot_be_configured(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(f'[gateway]\nname = "gw1"\n[fleet]\n{text}\n')


def test_a_member_needs_a_name() -> None:
    with pytest.raises(BridgedError, match="needs a name of its own"):
        load('[fleet]\nservers = ["tls://broker:4222"]')
    with pytest.raises(BridgedError, match="needs a name of its own"):
        load('[gateway]\nname = "gw.1"\n[fleet]\nservers = ["tls://broker:4222"]')
    servers = ["tls://broker:4222", "nats://[::1]:4222", "plaintext:nats://10.0.0.1:4222"]
    assert load(f'[gateway]\nname = "gw1"\n[fleet]\nservers = {servers}').fleet.servers == servers
