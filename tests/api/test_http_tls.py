"""HTTP in TLS: who shows a client certificate is somebody, and nothing is said in plain text."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bridged import config
from bridged.api.tls import Tls
from bridged.config.values import Listen
from bridged.jobs.journal import Journal
from bridged.protocol.verbs import Scope
from tests.api.http_bench import Bench, run
from tests.api.test_http_attacks import closed
from tests.test_client import Certificates


def test_a_client_certificate_is_a_principal_over_http_too(tmp_path: Path) -> None:
    certificates = Certificates(tmp_path)
    certificate, key = certificates.make("gw.example")
    robot = certificates.make("robot.example")
    (tmp_path / "evil").mkdir()
    evil = Certificates(tmp_path / "evil").make("robot.example")
    tls = Tls(config.Tls(str(certificate), str(key), client_ca=str(tmp_path / "ca.pem")))
    (tmp_path / "book").mkdir()
    journal = Journal.open(tmp_path / "book" / "state.db")
    authority = closed(journal)

    async def body(bench: Bench) -> None:
        port = await bench.server.listen_tcp(Listen("127.0.0.1", 0, "tls"))
        await authority.grant("robot", [Scope.READ], ["motor2"], certificate="robot.example")

        async def ask(path: str, shown: tuple[Path, Path] | None) -> tuple[int, Any]:
            context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
            if shown is not None:
                context.load_cert_chain(*shown)
            connector = aiohttp.TCPConnector(ssl=context)
            async with (
                aiohttp.ClientSession(connector=connector) as client,
                client.get(f"https://127.0.0.1:{port}{path}", server_hostname="gw.example") as response,
            ):
                return response.status, await response.json()

        assert (await ask("/v1", None))[1]["scopes"] == []
        assert (await ask("/v1/targets", None))[0] == 401
        assert (await ask("/v1", robot))[1]["principal"] == "cert-robot"
        assert [row["target"] for row in (await ask("/v1/targets", robot))[1]["targets"]] == ["motor2"]
        with pytest.raises(aiohttp.ClientError):  # The right name, signed by somebody else.
            await ask("/v1", evil)
        await authority.revoke("robot")
        assert (await ask("/v1/targets", robot))[0] == 401
        with pytest.raises(aiohttp.ClientError):
            await bench.client.get(f"http://127.0.0.1:{port}/livez")
        assert len(bench.server.entrance.handshakes) == 0

    try:
        run(tmp_path, body, authority=authority, tls=tls)
    finally:
        journal.close()
