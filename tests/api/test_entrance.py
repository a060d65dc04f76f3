"""Where a server may listen: also where this machine is not yet, for after a power cut its network may be late."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bridged.api.entrance import Entrance
from bridged.config.values import Listen
from bridged.errors import ConfigError

LATER = "192.0.2.77"  # TEST-NET-1 (RFC 5737): no interface has it


async def _serve(**where: Any) -> asyncio.Server:
    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"here")
        writer.close()

    return await asyncio.start_server(greet, **where)


IPV6 = pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="this kernel was started without IPv6")


@pytest.mark.parametrize("host", [LATER, pytest.param("2001:db8::77", marks=IPV6)])
def test_an_address_that_no_interface_has_yet_is_listened_on_and_said(host: str, caplog: pytest.LogCaptureFixture) -> None:
    async def body() -> None:
        (server,) = await Entrance("HTTP").open(Listen(host, 0, "plaintext"), _serve)
        assert server.sockets[0].getsockname()[0] == host
        server.close()
        (server,) = await Entrance("HTTP").open(Listen("0.0.0.0", 0, "plaintext"), _serve)
        server.close()

    caplog.set_level(logging.WARNING)
    asyncio.run(body())
    assert [record.message.split(", ")[0] for record in caplog.records] == [f"HTTP listens on {Listen(host, 0)}"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives an address to an interface: run as root")
def test_it_answers_there_as_soon_as_one_has() -> None:
    async def body() -> bytes:
        (server,) = await Entrance("HTTP").open(Listen(LATER, 0, "plaintext"), _serve)
        port = server.sockets[0].getsockname()[1]
        subprocess.run(["ip", "address", "add", f"{LATER}/32", "dev", "lo"], check=True)
        try:
            reader, writer = await asyncio.open_connection(LATER, port)
            said = await reader.read()
            writer.close()
        finally:
            subprocess.run(["ip", "address", "del", f"{LATER}/32", "dev", "lo"], check=True)
            server.close()
        return said

    assert asyncio.run(body()) == b"here"


def test_a_port_that_is_taken_is_refused_there_too() -> None:
    async def body() -> None:
        (server,) = await Entrance("HTTP").open(Listen(LATER, 0, "plaintext"), _serve)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(ConfigError, match=f"listening on {LATER}:{port} failed: Address already in use"):
            await Entrance("HTTP").open(Listen(LATER, port, "plaintext"), _serve)
        server.close()

    asyncio.run(body())
