"""The operator's command line against a real broker, with gateways that are the real connector over jobs in virtual time."""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridged.errors import BadRequest, FleetError, FleetUnreachable, RolloutChanged
from bridged.fleet import control, rollout, select, wire
from bridged.fleet import link as link_module
from bridged.fleet import operator as operator_module
from bridged.fleet.link import Access, Link
from bridged.fleet.operator import _init, main
from tests.e2e.virtual_gateway import VirtualGateway
from tests.fleet.broker import Broker
from tests.fleet.members import TARGET, connector, operator, running, until
from tests.fleet.test_connector import IMAGE
from tests.support import unread_pipe


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
                assert await cli(broker, "run", "r2", "--once") == 1, "one has failed, as allowed now"
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


async def inventory_of(link: Link, *names: str) -> None:
    """As if these gateways had told of a target each."""
    for name in names:
        state = {"gateway": name, "target": "m1", "labels": {}, "state": "present", "image": ""}
        await link.publish(wire.target_subject(name, "m1"), wire.encode_state(state))


async def say(link: Link, rollout: str, state: str, *names: str) -> None:
    """As if these gateways had reported."""
    for name in names:
        report = wire.Report(name, rollout, "m1", 0, state, evidence="full" if state == "succeeded" else "")
        await link.publish(report.subject, report.encode())


def test_who_looks_on_sees_progress(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "TURN_S", 0.05)
    (tmp_path / "app.bin").write_bytes(IMAGE[:2000])

    async def work() -> None:
        link = await operator(broker)
        assert await cli(broker, "init", "--gateway", "gw1") == 0
        await inventory_of(link, "gw1", "gw2")
        assert await cli(broker, "artifact", "put", str(tmp_path / "app.bin")) == 0
        assert await cli(broker, "start", "app.bin", "--id", "r1", "--detach") == 0
        await say(link, "r1", "running", "gw1")
        capsys.readouterr()
        looking, seen = asyncio.create_task(cli(broker, "status", "r1", "--follow")), ""
        progress = wire.Progress("gw1", "r1", "m1", "write", 768, 1024, 10240)
        for _ in range(400):
            await link.tell(progress.subject, progress.encode())
            await link.tell(wire.Progress("gw2", "r1", "m1", "lie").subject, progress.encode())  # in another one's name
            await asyncio.sleep(0.05)
            seen += capsys.readouterr().out
            if "write" in seen:
                break
        assert "r1: running, wave 0, 2 of 2 told: 0 succeeded, 0 failed, 2 under way" in seen, seen
        assert "gw1.m1: running write 75 % 10.0 KiB/s\n" in seen, seen
        words = ("-m", "bridged", "fleet", "status", "r1", "--follow", "--server", broker.servers[0])
        with unread_pipe() as nobody:
            followed = await asyncio.create_subprocess_exec(sys.executable, *words, stdout=nobody)
            assert await asyncio.wait_for(followed.wait(), 30) == 0, "it would follow for nobody, until the roll-out ends"
        await say(link, "r1", "succeeded", "gw1")
        assert await cli(broker, "cancel", "r1") == 0
        assert await asyncio.wait_for(looking, 30) == 1
        seen += capsys.readouterr().out
        assert "gw1.m1: succeeded full\n" in seen, seen
        assert "r1: canceled (by an operator), wave 0, 2 of 2 told: 1 succeeded, 0 failed, 1 under way\n" in seen, seen
        assert "gw2.m1" not in seen, "it has told nothing"
        await link.close()

    with Broker(tmp_path / "nats") as broker:
        asyncio.run(work())


def test_what_nothing_needs_goes_and_what_something_needs_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "TURN_S", 0.05)
    for name, size in (("old", 2000), ("new", 3000)):
        (tmp_path / f"{name}.bin").write_bytes(IMAGE[:size])

    async def left(link: Link, id: str) -> tuple[int, int]:
        pages = [1 async for _ in link.snapshot(f"KV_{wire.ROLLOUTS}", control._subject(f"plan.{id}.*"))]
        return len(pages), len(await control.reports(link, id))

    async def said(*words: str, expect: int = 0) -> str:
        assert await cli(broker, *words) == expect
        found = capsys.readouterr()
        return found.out + found.err

    async def work() -> None:
        link = await operator(broker)
        await said("init", "--gateway", "gw1", "--gateway", "gw2")
        await inventory_of(link, "gw1", "gw2")
        for number, name in enumerate(("old", "new", "new"), 1):
            await said("artifact", "put", str(tmp_path / f"{name}.bin"))
            await said("start", f"{name}.bin", "--id", f"r{number}", "--detach", "--expires", "1s")
            if number < 3:
                await say(link, f"r{number}", "succeeded", "gw1", "gw2")
                assert "done" in await said("run", f"r{number}")
        assert "r3: running" in await said("run", "r3", "--once")
        await asyncio.sleep(1.1)  # Until nobody may begin what the first has told.

        # r3 says what is wanted, so r2 is of no use any more; but its artifact is.
        assert await said("tidy") == "nothing\n", "nothing is 90 days old"
        shown = await said("tidy", "--older-than", "0")
        assert "roll-out r1: done, 2 targets" in shown, shown
        assert "roll-out r2: done" in shown, shown
        assert "artifact old.bin" in shown, shown
        assert "3 could go; nothing was changed" in shown, shown
        assert "new.bin" not in shown, shown
        assert "r1: done" in await said("status", "r1")
        assert "a gateway may still be told to take it by r3" in await said("artifact", "remove", "new.bin", expect=2)

        # Broken off in the middle, and done again.
        with monkeypatch.context() as patch:

            async def broken(_link: Link, _id: str) -> None:
                raise RuntimeError("killed")

            patch.setattr(control, "finish_removal", broken)
            with pytest.raises(RuntimeError):
                await control.remove_rollout(link, await control.load(link, "r2"))
        assert await left(link, "r2") == (1, 2)
        assert "roll-out r2: what was left" in await said("tidy", "--older-than", "0")
        assert "3 removed" in await said("tidy", "--older-than", "0", "--yes")
        assert await left(link, "r1") == await left(link, "r2") == (0, 0)
        assert await left(link, "r3") == (1, 0)
        assert await said("tidy", "--older-than", "0") == "nothing\n"
        assert "r1 was removed" in await said("status", "r1", expect=2)
        assert "there is a roll-out r1 already" in await said("start", "new.bin", "--id", "r1", expect=2), (
            "gateways remember it"
        )
        listed = [json.loads(line)["name"] for line in (await said("artifact", "list", "--json")).splitlines()]
        assert listed == ["new.bin"]
        assert [json.loads(line)["rollout"] for line in (await said("rollouts", "--json")).splitlines()] == ["r3"]

        # A gateway that is taken out of service: nothing waits for it.
        shown = await said("retire", "gw1")
        assert "gw1: 3 commands that it has not taken, inventory of 1 targets" in shown, shown
        assert "roll-out r3 goes on without its 1 targets" in shown, shown
        assert "nothing was changed" in shown, shown
        assert "2 of 2 told" in await said("status", "r3")
        for _ in range(2):
            assert "gw1 is retired" in await said("retire", "gw1", "--yes")
        assert "1 of 1 told" in await said("status", "r3")
        assert "there is no gateway gw9" in await said("retire", "gw9", "--yes", expect=2)
        assert [row["gateway"] for row in await control.inventory(link)] == ["gw2"]
        assert await control.waiting_of(link, "gw1") is None
        assert await control.waiting_of(link, "gw2") == 3
        assert {gateway for gateway, _ in await control.desired(link)} == {"gw2"}
        await say(link, "r3", "succeeded", "gw2")
        assert "r3: done, wave 0, 1 of 1 told" in await said("run", "r3")
        assert "1 of 1 gateways are new" in await said("init", "--gateway", "gw1")
        assert await control.waiting_of(link, "gw1") == 0
        assert await control.retired(link) == set()
        await link.close()

    with Broker(tmp_path / "nats", "debian") as broker:
        asyncio.run(work())


def test_silence_is_no_success_and_is_taken_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "TURN_S", 0.05)
    for name, size in (("good", 2000), ("bad", 3000)):
        (tmp_path / f"{name}.bin").write_bytes(IMAGE[:size])

    async def said(*words: str, expect: int = 0) -> str:
        assert await cli(broker, *words) == expect, words
        found = capsys.readouterr()
        return found.out + found.err

    async def work() -> None:
        link = await operator(broker)
        await said("init", "--gateway", "gw1", "--gateway", "gw2", "--gateway", "gw3")
        await inventory_of(link, "gw1", "gw2", "gw3")
        for name in ("good", "bad"):
            await said("artifact", "put", str(tmp_path / f"{name}.bin"))
        await said("start", "good.bin", "--id", "r1", "--detach")
        await say(link, "r1", "succeeded", "gw1", "gw2", "gw3")
        assert "r1: done" in await said("run", "r1")
        assert "every target has ended: nothing is left" in await said("cancel", "r1", expect=2)

        # Everybody is off, and the time of the only wave is over.
        shown = await said("start", "bad.bin", "--id", "r2", "--wave-timeout", "0", expect=1)
        assert "r2: done, wave 0, 3 of 3 told: 0 succeeded, 0 failed, 3 silent" in shown, shown
        assert "3 targets have not ended. Until 2" in shown, shown
        assert "bridged fleet cancel r2" in shown, shown
        await say(link, "r2", "succeeded", "gw1")
        await say(link, "r2", "canceled", "gw2")  # by a person there
        for words in (("run", "r2"), ("status", "r2"), ("status", "r2", "--follow")):
            shown = await said(*words, expect=1)
            assert "1 succeeded, 0 failed, 1 silent, 1 canceled" in shown, shown
        assert "first: bridged fleet cancel r2" in await said("artifact", "remove", "bad.bin", expect=2)
        assert [one.rollout for one in await drift_of(link)] == ["r2"] * 3

        assert await control.waiting_of(link, "gw3") == 2
        for _ in range(2):  # Another operator, who does not know of the first.
            shown = await said("cancel", "r2")
            assert "r2: done (what had not begun is taken back, by an operator), wave 0, 3 of 3 told: 1 succeeded" in shown, (
                shown
            )
        assert await control.waiting_of(link, "gw1") == 2, "it has ended there"
        assert await control.waiting_of(link, "gw3") == 3
        for words in (("run", "r2"), ("status", "r2")):
            shown = await said(*words, expect=1)
            assert "1 silent" in shown, shown
            assert "have not ended" not in shown, shown
        assert [(one.gateway, one.rollout) for one in await drift_of(link)] == [("gw1", "r2"), ("gw2", "r1"), ("gw3", "r1")]
        assert "removed" in await said("artifact", "remove", "bad.bin")
        assert "removed" in await said("artifact", "remove", "good.bin"), "whom r1 has told has it"

        # Paused, and canceled.
        await said("artifact", "put", str(tmp_path / "good.bin"))
        await said("start", "good.bin", "--id", "r3", "--detach")
        assert "r3: running" in await said("status", "r3")
        for word in ("pause", "cancel"):
            await said(word, "r3")
            await said("status", "r3", expect=1)
        await link.close()

    async def drift_of(link: Link) -> list[select.Drift]:
        return select.drift(await control.desired(link), await control.inventory(link))

    with Broker(tmp_path / "nats") as broker:
        asyncio.run(work())


def test_a_link_that_breaks_while_commands_are_said_is_one_that_is_made_anew() -> None:
    """`bridged fleet run` goes on after ``FleetUnreachable``, and after nothing else."""

    async def unreachable(*_: Any, **__: Any) -> bool:
        raise FleetUnreachable("publishing: no answer in time")

    async def work() -> None:
        over = asyncio.Event()
        over.set()
        link: Any = SimpleNamespace(publish=unreachable, over=over)
        said = [wire.Cancel("gw1", "r1", "m1"), wire.Cancel("gw2", "r1", "m1")]
        with pytest.raises(FleetUnreachable, match="no answer"):
            await control.Drive(link, "r1")._say(said)

    asyncio.run(work())


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"code": 503, "err_code": 10008, "description": "JetStream system temporarily unavailable"}, FleetUnreachable),
        ({"code": 500, "err_code": 10009, "description": "JetStream cluster can not handle request"}, FleetUnreachable),
        (None, FleetUnreachable),
        ({"code": 503, "err_code": 10039, "description": "JetStream not enabled for account"}, FleetError),
        ({"code": 404}, FleetError),
        ({"code": 400, "err_code": 10003, "description": "bad request"}, FleetError),
    ],
)
def test_a_broker_without_a_leader_is_one_that_does_not_answer(
    answer: dict[str, Any] | None, expected: type[FleetError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is the real one, down to the answer's bytes, for which no node has to die. ``run`` tries again then."""
    nats = link_module._import_nats()
    client = nats.aio.client.Client()

    async def request(subject: str, *_: Any, **__: Any) -> Any:
        if answer is None:
            raise nats.errors.NoRespondersError
        return nats.aio.msg.Msg(client, subject=subject, data=json.dumps({"error": answer}).encode())

    async def work() -> None:
        monkeypatch.setattr(client, "request", request)
        link = Link(nats, client, "nats://x", asyncio.Event())
        with pytest.raises(FleetError) as reading:
            await control.load(link, "r1")
        with pytest.raises(FleetError) as listing:
            await control.rollouts(link)
        with pytest.raises(FleetError) as saying:
            await link.publish("bridged.v1.gw1.cmd.job.r1.m1.0", b"{}", only_first=True)
        assert {type(found.value) for found in (reading, listing, saying)} == {expected}

    asyncio.run(work())


def test_a_cluster_without_a_leader_is_asked_ever_less_often(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lets us connect each time, and says the same each time."""
    pauses: list[float] = []

    async def nothing() -> None:
        pass

    async def connect(*_: Any) -> Any:
        return SimpleNamespace(close=nothing)

    async def run(*_: Any) -> int:
        if len(pauses) < 9:
            raise FleetUnreachable("temporarily unavailable")
        return 0

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(operator_module, "connect", connect)
    monkeypatch.setitem(operator_module.COMMANDS, "run", run)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert main(["run", "r1", "--server", "nats://127.0.0.1:9"]) == 0
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30, 30]
    assert capsys.readouterr().err == "bridged fleet: temporarily unavailable; trying again\n"


def test_what_is_told_of_a_roll_out_is_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else changed it in the moment in which it came to its end: that end is decided, and stored, once more."""
    state = rollout.State(wave=0, released=(0.0,))
    there = control.Rollout(rollout.Spec("r1", None, wave_timeout_s=1.0), state, 1, 0.0, "ops", revision=1)
    stored: list[control.Rollout] = []

    async def load(*_: Any) -> control.Rollout:
        return there

    async def store(_: Any, one: control.Rollout) -> control.Rollout:
        nonlocal there
        if there.revision == 1:
            there = replace(there, revision=2)
            raise RolloutChanged("changed")
        stored.append(one)
        return one

    monkeypatch.setattr(control, "load", load)
    monkeypatch.setattr(control, "store", store)
    nobody: Any = None
    drive = control.Drive(nobody, "r1", now=lambda: 9.0)
    drive._units = [rollout.Unit("gw1", "m1")]
    one, made = asyncio.run(drive.turn())
    assert (one.state.phase, made.state.phase) == (rollout.Phase.DONE, rollout.Phase.DONE)
    assert [(found.revision, found.state.phase) for found in stored] == [(2, rollout.Phase.DONE)]


def test_a_list_of_gateways_that_cannot_be_read(tmp_path: Path) -> None:
    options: Any = SimpleNamespace(gateway=[], gateways_from=tmp_path / "none")
    nobody: Any = None
    with pytest.raises(BadRequest, match="No such file"):
        asyncio.run(_init(nobody, options))


def test_no_broker_and_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollouts", "--server", "nats://127.0.0.1:9"]) == 3
    assert main(["rollouts"]) == 2
    assert main(["permissions", "a.b"]) == 2
    assert "1 to 64 of A-Z" in capsys.readouterr().err
    assert main(["permissions", "gw1", "--operator", "ops"]) == 0
    assert f"$JS.API.CONSUMER.MSG.NEXT.{wire.COMMANDS}.gw1" in capsys.readouterr().out
