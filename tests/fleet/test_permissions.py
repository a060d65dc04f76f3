"""A gateway's credential reaches its own subjects only: with the users that ``bridged fleet permissions`` prints, on real
servers of both versions, somebody who has taken a gateway over tries more."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import subprocess
from pathlib import Path

import pytest

from bridged.errors import ConfigError, FleetError, FleetRefused, FleetUnreachable
from bridged.fleet import control, credentials, link, setup, wire
from bridged.fleet.link import Access, Link, connect
from tests.e2e.virtual_gateway import VirtualGateway
from tests.fleet.accounts import ACCOUNT, Accounts, Key
from tests.fleet.broker import SERVERS, Broker
from tests.fleet.members import TARGET, command, connector, running, until
from tests.fleet.test_connector import IMAGE, ended
from tests.support import require_tool
from tests.test_client import Certificates

USERS = setup.permissions(["gw1", "gw2"], ["ops"]).replace("CHANGE-ME", "secret")


@pytest.fixture
def password(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("secret\n")
    return path


@pytest.mark.parametrize("which", SERVERS)
def test_a_gateway_reaches_its_own_subjects_only(
    tmp_path: Path, password: Path, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "ANSWER_S", 0.4)  # What is refused is not answered.

    async def refused(taken: Link, subject: str, data: bytes = b"") -> bool:
        try:
            answer = await taken.request(subject, data, 0.3)
        except FleetUnreachable:
            return True
        return b'"error"' in answer[1]

    async def work() -> None:
        operator = await connect(Access(broker.servers, "ops", password), "op", wire.inbox_of("ops"))
        with pytest.raises(FleetRefused):
            await connect(Access(broker.servers, "gw1", None), "x", wire.inbox_of("gw1"))
        await setup.prepare(operator)
        for name in ("gw1", "gw2"):
            await setup.admit(operator, name)
        (tmp_path / "app.bin").write_bytes(IMAGE[:70000])
        stored, _ = await control.put(operator, tmp_path / "app.bin", type="bin")
        one = command("gw1", "r1", stored.artifact)
        other = command("gw2", "r1", stored.artifact)
        for message in (one, other):
            await operator.publish(message.subject, message.encode())
        (tmp_path / "gw").mkdir()
        host = VirtualGateway(tmp_path / "gw", {"m1": ("L476", {})}, settings=TARGET)
        async with host, running(connector(host, "gw1", Access(broker.servers, "gw1", password))) as made:
            assert (await ended(operator, "r1")).state == "succeeded", made.trouble
            assert await control.inventory(operator) != []

        taken = await connect(Access(broker.servers, "gw1", password), "gw1", wire.inbox_of("gw1"))
        heard: list[link.Message] = []
        for subject in (
            ">",
            "bridged.v1.>",
            "bridged.v1.gw2.>",
            "_INBOX.>",
            f"{wire.inbox_of('gw2')}.>",
            "$JS.>",
            "$KV.>",
            "$O.>",
        ):
            await taken.listen(subject, heard.append)
        state = wire.encode_state({"gateway": "gw2", "target": "m1"})
        subjects = (
            wire.target_subject("gw2", "m1"),
            other.subject,
            one.subject,  # not even a command to itself
            f"$KV.{wire.ROLLOUTS}.r1",
            f"$O.{wire.ARTIFACTS}.M.x",
            f"$JS.API.STREAM.INFO.{wire.COMMANDS}",
            f"$JS.API.STREAM.DELETE.{wire.COMMANDS}",
            f"$JS.API.STREAM.PURGE.{wire.COMMANDS}",
            "$JS.API.STREAM.LIST",
            "$JS.API.STREAM.CREATE.mine",
            f"$JS.API.CONSUMER.CREATE.{wire.COMMANDS}",
            f"$JS.API.CONSUMER.DURABLE.CREATE.{wire.COMMANDS}.mine",
            f"$JS.API.CONSUMER.DELETE.{wire.COMMANDS}.gw2",
            f"$JS.API.CONSUMER.MSG.NEXT.{wire.COMMANDS}.gw2",
            f"$JS.API.DIRECT.GET.{wire.COMMANDS}",
            f"$JS.API.DIRECT.GET.KV_{wire.ROLLOUTS}",
            f"$JS.API.STREAM.MSG.GET.{wire.COMMANDS}",
            f"$JS.API.STREAM.MSG.DELETE.{wire.ARTIFACT_STREAM}",
        )
        answers = await asyncio.gather(*(refused(taken, subject, state) for subject in subjects))
        assert [subject for subject, held in zip(subjects, answers, strict=True) if not held] == []
        assert [row["gateway"] for row in await control.inventory(operator)] == ["gw1"]
        async for there in operator.snapshot(wire.COMMANDS, wire.command_filter("gw2")):
            assert there.data == other.encode()
        assert heard == []

        # What the broker lets through: its answer to a permitted question, stored at another one's subject. The worst case:
        # what may be read has the form of a command.
        (tmp_path / "evil.bin").write_bytes(command("gw1", "r2", None, kind="identify").encode())
        evil, _ = await control.put(operator, tmp_path / "evil.bin")
        chunk = [m async for m in operator.snapshot(wire.ARTIFACT_STREAM, f"$O.{wire.ARTIFACTS}.C.>")][-1]
        assert len(chunk.data) == evil.artifact.size
        ask, forged = json.dumps({"seq": chunk.sequence}).encode(), "bridged.v1.gw2.cmd.job.r2.m1.0"
        await taken._client.publish(f"$JS.API.DIRECT.GET.{wire.ARTIFACT_STREAM}", ask, reply=forged)
        await taken.flush()
        for _ in range(50):
            copied = await operator.stored(wire.COMMANDS, forged)
            if copied is not None:
                break
            await asyncio.sleep(0.02)
        assert copied is not None, "no server does this any more: then the reason in fleet/wire.py is gone"
        assert copied.data == chunk.data
        (tmp_path / "gw2").mkdir()
        host = VirtualGateway(tmp_path / "gw2", {"m1": ("L476", {})}, settings=TARGET)
        async with host, running(connector(host, "gw2", Access(broker.servers, "gw2", password))) as made:
            await until(lambda: len(host.jobs.list()) == 1 and host.jobs.list()[0].terminal, made.trouble)
            await until(lambda: not made._ledger.untold())
            assert [job.kind for job in host.jobs.list()] == ["ensure"], "only its own"
        await taken.close()
        await operator.close()

    with Broker(tmp_path / "nats", which, users=USERS) as broker:
        asyncio.run(work())


def test_tls_with_the_right_ca_only(tmp_path: Path) -> None:
    openssl = require_tool("openssl", "openssl")
    for name in ("ca", "other"):
        command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-keyout", str(tmp_path / f"{name}.key"), "-out", str(tmp_path / f"{name}.pem")]
        subprocess.run(command, check=True, capture_output=True)
    extra = f'tls {{ cert_file: "{tmp_path}/ca.pem", key_file: "{tmp_path}/ca.key" }}'

    async def work() -> None:
        made = await connect(Access(broker.servers, ca=tmp_path / "ca.pem"), "x", "_INBOX_x")
        await setup.prepare(made)
        await made.close()
        for wrong in (tmp_path / "other.pem", None):
            with pytest.raises(FleetRefused, match="certificate verify failed"):
                await connect(Access(broker.servers, ca=wrong), "x", "_INBOX_x")
        with pytest.raises(ConfigError):
            await connect(Access(broker.servers, ca=tmp_path / "missing.pem"), "x", "_INBOX_x")

    with Broker(tmp_path / "nats", extra=extra, scheme="tls") as broker:
        asyncio.run(work())
    assert ssl.HAS_TLSv1_2


async def works_and_reaches_no_other(root: Path, ops: Access, own: Access, other: Access) -> None:
    """With these accesses a gateway carries out a job, and cannot speak for another one."""
    operator = await connect(ops, "op", wire.inbox_of("ops"))
    await setup.prepare(operator)
    await setup.admit(operator, "gw1")
    one = command("gw1", "r1", None, kind="identify")
    await operator.publish(one.subject, one.encode())
    (root / "gw").mkdir()
    host = VirtualGateway(root / "gw", {"m1": ("L476", {})}, settings=TARGET)
    async with host, running(connector(host, "gw1", own)) as made:
        assert (await ended(operator, "r1")).state == "succeeded", made.trouble
    taken = await connect(other, "gw2", wire.inbox_of("gw2"))
    with pytest.raises(FleetUnreachable):
        await taken.publish(wire.target_subject("gw1", "m1"), wire.encode_state({"gateway": "gw1", "target": "m1"}))
    await taken.publish(wire.target_subject("gw2", "m1"), wire.encode_state({"gateway": "gw2", "target": "m1"}))
    assert len(await control.inventory(operator)) == 2
    await taken.close()
    await operator.close()


@pytest.mark.parametrize("which", SERVERS)
def test_certificates_instead_of_passwords(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutual TLS: the name in the certificate is the user, with the rights that ``bridged fleet permissions`` prints."""
    monkeypatch.setattr(link, "ANSWER_S", 0.6)
    (tmp_path / "other").mkdir()
    ours, others = Certificates(tmp_path), Certificates(tmp_path / "other")
    certificate, key = ours.make("localhost")
    extra = f'tls {{ cert_file: "{certificate}", key_file: "{key}", ca_file: "{tmp_path}/ca.pem", verify_and_map: true }}'

    async def work() -> None:
        servers = (f"tls://localhost:{broker.ports[0]}",)

        def access(pair: tuple[Path, Path]) -> Access:
            return Access(servers, ca=tmp_path / "ca.pem", certificate=pair[0], key=pair[1])

        await works_and_reaches_no_other(tmp_path, *(access(ours.make(name)) for name in ("ops", "gw1", "gw2")))
        for wrong in (Access(servers, ca=tmp_path / "ca.pem"), access(others.make("gw1"))):
            with pytest.raises(FleetError, match=r"certificate|unknown ca"):
                await connect(wrong, "x", wire.inbox_of("gw1"))
        with pytest.raises(FleetRefused):
            await connect(access(ours.make("stranger")), "x", wire.inbox_of("gw1"))
        nobody = Access(("tls://127.0.0.1:1",), ca=tmp_path / "ca.pem")
        with pytest.raises(FleetUnreachable) as caught:
            await connect(nobody, "x", wire.inbox_of("gw1"))
        assert "refused" in caught.value.message or "111" in caught.value.message
        assert "certificate" not in caught.value.message, "nobody listens there, so TLS had no part in it"

    users = setup.permissions(["gw1", "gw2"], ["ops"], certificates=True)
    with Broker(tmp_path / "nats", which, users=users, extra=extra) as broker:
        asyncio.run(work())


@pytest.mark.parametrize("which", SERVERS)
def test_creds_files_instead_of_passwords(tmp_path: Path, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accounts with JWTs, which somebody else's tool makes from the same lists of rights."""
    monkeypatch.setattr(link, "ANSWER_S", 0.6)
    accounts = Accounts()

    async def work() -> None:
        def access(name: str, rights: dict[str, list[str]], by: Key | None = None) -> Access:
            return Access(broker.servers, credentials=accounts.user(tmp_path / f"{name}.creds", rights, by))

        gateways = [access(name, setup.gateway_rights(name)) for name in ("gw1", "gw2")]
        await works_and_reaches_no_other(tmp_path, access("ops", setup.operator_rights("ops")), *gateways)
        with pytest.raises(FleetRefused):
            await connect(access("stranger", setup.gateway_rights("gw1"), Key(ACCOUNT)), "x", wire.inbox_of("gw1"))

    with Broker(tmp_path / "nats", which, extra=accounts.extra) as broker:
        asyncio.run(work())


def test_creds_files_that_are_none(tmp_path: Path) -> None:
    path = Accounts().user(tmp_path / "a.creds", {"publish": [], "subscribe": []})
    text = path.read_text()
    seed = text.split("SEED-----\n")[1].split("\n")[0]
    jwt, sign = credentials.read(path)
    assert jwt.decode() in text
    assert len(base64.b64decode(sign("nonce"))) == 64
    damaged = seed[:10] + ("A" if seed[10] != "A" else "B") + seed[11:]
    for wrong, said in (
        ("", "no JWT of a user"),
        (text.partition("\n\n")[0], "no seed of a user"),
        (text.replace(seed, damaged), "the seed is damaged"),
        (text.replace(seed, seed[:-3]), "the seed is damaged"),
        (text.replace(seed, Key(ACCOUNT).seed), "is not that of a user"),
    ):
        path.write_text(wrong)
        with pytest.raises(ConfigError, match=said) as failed:
            credentials.read(path)
        assert seed[4:20] not in failed.value.message
    with pytest.raises(ConfigError, match="No such file"):
        credentials.read(tmp_path / "missing.creds")


def test_without_anybody_there() -> None:
    with pytest.raises(FleetError, match="Connect call failed"):
        asyncio.run(connect(Access(("nats://127.0.0.1:9",)), "x", "_INBOX_x"))
