"""The operator's command line against a real broker, with gateways that are the real connector over jobs in virtual time."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bridged.fleet import control, wire
from bridged.fleet.link import Access, Link
from bridged.fleet.operator import main
from tests.e2e.virtual_gateway import VirtualGateway
from tests.fleet.broker import Broker
from tests.fleet.members import TARGET, connector, operator, running, until
from tests.fleet.test_connector import IMAGE


async def cli(broker: Broker, *words: str) -> int:
    command, *rest = words
    return await asyncio.to_thread(main, [command, "--server", broker.servers[0], *rest])


async def all_told(link: Link, count: int) -> None:
    for _ in range(400):
        if len(await control.inventory(link)) == count:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("no inventory")


def test_a_fleet_from_init_to_drift(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "app.bin").write_bytes(IMAGE[:2000])
    (tmp_path / "new.bin").write_bytes(IMAGE[:3000])

    async def work() -> None:
        assert await cli(broker, "init", "--gateway", "gw1", "--gateway", "gw2") == 0
        assert await cli(broker, "init", "--gateway", "gw1") == 0
        assert "2 of 2 gateways are new\n0 of 1 gateways are new" in capsys.readouterr().out
        hosts = [VirtualGateway(tmp_path / name, {"m1": ("L476", {}), "m2": ("L476", {})}, settings=TARGET) for name in names]
        async with hosts[0], hosts[1]:
            first = connector(hosts[0], "gw1", Access(broker.servers))
            second = connector(hosts[1], "gw2", Access(broker.servers))
            async with running(first), running(second):
                link = await operator(broker)
                await all_told(link, 4)
                assert await cli(broker, "artifact", "put", str(tmp_path / "app.bin"), "--type", "bin") == 0
                assert await cli(broker, "artifact", "put", str(tmp_path / "app.bin"), "--type", "bin") == 0
                said = capsys.readouterr()
                assert said.err == "put\nthere already\n"
                words = ["app.bin", "--where", "site=berlin", "--waves", "1", "--canary", "target=m2"]
                assert await cli(broker, "plan", *words) == 0
                assert "wave 0: 2 targets\n  gw1.m2\n  gw2.m2\nwave 1: 1 targets" in capsys.readouterr().out
                assert await cli(broker, "start", *words, "--id", "r1", "--option", "addr=0x08000000") == 0
                said = capsys.readouterr()
                assert "r1: done, wave 2, 4 of 4 told: 4 succeeded, 0 failed" in said.out, said
                assert await cli(broker, "start", *words, "--id", "r1") == 2
                assert await cli(broker, "status", "r1", "--all", "--json") == 0
                rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
                assert rows[0]["succeeded"] == 4
                assert {(row["state"], row["evidence"]) for row in rows[1:]} == {("succeeded", "full")}
                assert await cli(broker, "drift") == 0
                # What somebody flashes by hand is seen, and by which roll-out it should be otherwise.
                sha = hosts[0].stage("other.bin", IMAGE[:4000])
                from bridged.jobs.model import JobKind

                job = await hosts[0].job(JobKind.FLASH, "m1", f"{sha}@0x08000000")
                assert str(job.state) == "succeeded"
                for _ in range(200):
                    if await cli(broker, "drift", "--json") == 4:
                        break
                    capsys.readouterr()
                    await asyncio.sleep(0.05)
                (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
                assert (row["gateway"], row["target"], row["what"], row["rollout"]) == ("gw1", "m1", "drifted", "r1")
                # A roll-out that fails stops; and is canceled, which is an end.
                await cli(broker, "artifact", "put", str(tmp_path / "new.bin"), "--type", "bin")
                assert await cli(broker, "start", "new.bin", "--waves", "1", "--id", "r2") == 1
                said = capsys.readouterr()
                assert "r2: paused (threshold: 1 failed, at most 0 may), wave 0, 1 of 4 told" in said.out, said
                assert await cli(broker, "resume", "r2") == 2
                assert await cli(broker, "resume", "r2", "--max-failures", "9") == 0
                assert await cli(broker, "run", "r2", "--once") == 0
                assert await cli(broker, "cancel", "r2") == 0
                assert await cli(broker, "status", "r2") == 1
                said = capsys.readouterr()
                assert "IMAGE_ADDRESS_MISSING" in said.out, said
                assert await cli(broker, "rollouts", "--json") == 0
                phases = [json.loads(line)["phase"] for line in capsys.readouterr().out.splitlines()]
                assert phases == ["done", "canceled"]
                assert await cli(broker, "inventory", "--where", "chip=L4*", "--where", "target!=m2") == 0
                assert len(capsys.readouterr().out.splitlines()) == 3
                await until(lambda: not first._ledger.untold())
                await link.close()

    names = ("gw1", "gw2")
    for name in names:
        (tmp_path / name).mkdir()
    with Broker(tmp_path / "nats") as broker:
        asyncio.run(work())


def test_no_broker_and_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "--server", "nats://127.0.0.1:9"]) == 3
    assert main(["rollouts"]) == 2
    assert main(["permissions", "a.b"]) == 2
    assert "1 to 64 of A-Z" in capsys.readouterr().err
    assert main(["permissions", "gw1", "--operator", "ops"]) == 0
    assert f"$JS.API.CONSUMER.MSG.NEXT.{wire.COMMANDS}.gw1" in capsys.readouterr().out
