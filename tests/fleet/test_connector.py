"""One gateway and a real broker, of both versions: a message becomes one job, whatever happens in between."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridged import chips, config
from bridged.errors import StorageFull
from bridged.fleet import connector as connector_module
from bridged.fleet import control, download, setup, wire
from bridged.fleet import link as link_module
from bridged.fleet.connector import Clock, Connector
from bridged.fleet.ledger import Entry
from bridged.fleet.link import Access, Link, connect
from bridged.fleet.wire import Artifact, Cancel
from bridged.jobs.model import JobState
from tests.e2e.virtual_gateway import VirtualGateway
from tests.fleet.broker import SERVERS, Broker
from tests.fleet.members import TARGET, artifact, command, connector, operator, running, until
from tests.target.bench import make_image

L476 = chips.find("L476")
IMAGE = make_image(L476, 300_000, seed=1).segments[0].data  # Five chunks.
SLEEPLESS = Clock(sleep=lambda seconds: asyncio.sleep(min(seconds, 0.05)))


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


def gateway(root: Path, *names: str) -> VirtualGateway:
    root.mkdir(exist_ok=True)
    return VirtualGateway(root, {name: ("L476", {}) for name in names or ("m1",)}, settings=TARGET)


async def prepared(broker: Broker, name: str = "gw1") -> Link:
    link = await operator(broker)
    await setup.prepare(link)
    await setup.admit(link, name)
    return link


async def staged(link: Link, root: Path, data: bytes = IMAGE) -> Artifact:
    made = artifact(root / "app.bin", data)
    return (await control.put(link, root / "app.bin", type="bin"))[0].artifact if made else made


async def report(link: Link, rollout: str, target: str = "m1") -> wire.Report | None:
    return (await control.reports(link, rollout)).get(("gw1", target))


async def ended(link: Link, rollout: str, target: str = "m1") -> wire.Report:
    for _ in range(600):
        found = await report(link, rollout, target)
        if found and found.ended:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"{rollout} did not end: {found}")


@pytest.mark.parametrize("which", SERVERS)
def test_a_command_becomes_one_job_and_its_end_is_told(tmp_path: Path, which: str) -> None:
    async def work() -> None:
        link = await prepared(broker)
        image = await staged(link, tmp_path)
        one = command("gw1", "r1", image)
        assert await link.publish(one.subject, one.encode(), only_first=True)
        assert not await link.publish(one.subject, one.encode(), only_first=True), "a command is stored once"
        async with gateway(tmp_path / "gw") as host, running(connector(host, "gw1", Access(broker.servers))) as made:
            found = await ended(link, "r1")
            assert (found.state, found.evidence, found.round) == ("succeeded", "full", 0), found
            assert made.chunk_bytes == len(IMAGE)
            (job,) = host.jobs.list()
            assert (job.id, job.principal, job.image) == (found.job, "fleet", f"{image.sha256}@0x08000000")
            await until(lambda: not made._ledger.untold(), "everything is told")
            (row,) = await control.inventory(link)
            assert (row["gateway"], row["target"], row["labels"], row["state"]) == ("gw1", "m1", {"site": "berlin"}, "present")
            assert image.sha256 in row["image"]
            # The same message again, past every window in which a broker finds duplicates: its consumer is made anew.
            await link.js.delete_consumer(wire.COMMANDS, "gw1")
            await setup.admit(link, "gw1")
        async with gateway(tmp_path / "gw") as host, running(connector(host, "gw1", Access(broker.servers))) as made:
            other = command("gw1", "r2", None, kind="identify")
            await link.publish(other.subject, other.encode())
            assert (await ended(link, "r2")).state == "succeeded"
            assert len(host.jobs.list()) == 2, "the repeated one is no second job"
            assert made.chunk_bytes == 0
        await link.close()

    with Broker(tmp_path / "nats", which) as broker:
        run(work())


def test_refusals_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "LAG_S", 0.01)

    async def work() -> None:
        link = await prepared(broker)
        gone = Artifact("ab" * 32, 5, "gone.bin", "bin")
        for one in (
            command("gw1", "r1", None, "nobody", kind="identify"),
            command("gw1", "r2", gone),
            command("gw1", "r3", None, kind="no-such-kind"),
            wire.Command("gw1", "r4", "m1", kind="identify", options={"wait": True}),
            wire.Command("gw1", "r5", "m1", kind="identify", expires=1000.0),
        ):
            await link.publish(one.subject, one.encode())
        # Malformed, of the future, and for another gateway: not carried out, and in nobody's way.
        for raw in (b"{", b'{"v":99}', command("gw2", "r6", None, kind="identify").encode()):
            await link.publish("bridged.v1.gw1.cmd.job.r6.m1.0", raw)
        # Its own clock stands in 1970; what the broker has shown of the time counts all the same.
        waking = Clock(utc=lambda: 0.0)
        async with gateway(tmp_path / "gw") as host, running(connector(host, "gw1", Access(broker.servers), waking)):
            codes = {}
            for name, target in (("r1", "nobody"), ("r2", "m1"), ("r3", "m1"), ("r4", "m1"), ("r5", "m1")):
                found = await ended(link, name, target)
                codes[name] = (found.state, found.code)
            assert codes == {
                "r1": ("rejected", "UNKNOWN_TARGET"),
                "r2": ("rejected", "UNKNOWN_ARTIFACT"),
                "r3": ("rejected", "BAD_REQUEST"),
                "r4": ("rejected", "BAD_REQUEST"),
                "r5": ("expired", "FLEET_EXPIRED"),
            }
            assert await report(link, "r6") is None
            assert host.jobs.list() == []
        await link.close()

    with Broker(tmp_path / "nats") as broker:
        run(work())


def test_a_fleet_is_held_to_what_holds_for_everybody(tmp_path: Path) -> None:
    """Signatures that are required, and the window in which a target may be stopped."""
    closed = time.localtime(time.time() + 43200)
    policy = config.Policy(signature=True, window=[f"{closed.tm_hour:02}:00-{closed.tm_hour:02}:01"])

    async def work() -> None:
        link = await prepared(broker)
        for one in (command("gw1", "r1", await staged(link, tmp_path)), command("gw1", "r2", None, kind="identify")):
            await link.publish(one.subject, one.encode())
        (tmp_path / "gw").mkdir()
        settings = replace(TARGET, policy=policy)
        host = VirtualGateway(tmp_path / "gw", {"m1": ("L476", {})}, settings=settings)
        async with host, running(connector(host, "gw1", Access(broker.servers))):
            refused = await ended(link, "r1")
            assert (refused.state, refused.code) in {("failed", "SIGNATURE"), ("rejected", "SIGNATURE")}
            await until(lambda: any(job.state is JobState.WAITING for job in host.jobs.list()), "it waits for its window")
            for _ in range(200):
                waiting = await report(link, "r2")
                if waiting and waiting.state == "waiting":
                    break
                await asyncio.sleep(0.05)
            assert waiting, "an operator sees that it waits"
            assert waiting.state == "waiting"
            taken_back = Cancel("gw1", "r2", "m1")
            await link.publish(taken_back.subject, taken_back.encode())
            assert (await ended(link, "r2")).state == "canceled"
        await link.close()

    with Broker(tmp_path / "nats") as broker:
        run(work())


def test_a_month_offline_and_the_jobs_that_were_taken_back_meanwhile(tmp_path: Path) -> None:
    """What waits is read to its end before anything begins; a later round says again what was taken back, and nothing else."""

    async def work() -> None:
        link = await prepared(broker)
        image = await staged(link, tmp_path, IMAGE[:1000])
        for message in (
            command("gw1", "r1", image),
            Cancel("gw1", "r1", "m1"),
            command("gw1", "r2", image),
            Cancel("gw1", "r2", "m1"),
            command("gw1", "r2", image, turn=1),
            command("gw1", "r3", None, kind="identify"),
            command("gw1", "r3", None, turn=1, kind="identify"),
            Cancel("gw1", "r4", "m1"),  # overtaken by its cancellation
            command("gw1", "r4", None, kind="identify"),
        ):
            await link.publish(message.subject, message.encode())
        async with gateway(tmp_path / "gw") as host, running(connector(host, "gw1", Access(broker.servers))) as made:
            assert (await ended(link, "r3")).state == "succeeded"
            first, second, third = [await ended(link, name) for name in ("r1", "r2", "r3")]
            assert (first.state, first.round) == ("canceled", 0)
            assert (second.state, second.round) == ("succeeded", 1)
            assert (await ended(link, "r4")).state == "canceled"
            assert third.round == 0, "it was not taken back, so a later round changes nothing"
            assert sorted(job.kind for job in host.jobs.list()) == ["ensure", "identify"]
            await until(lambda: not made._ledger.untold(), "everything is told")
        await link.close()

    with Broker(tmp_path / "nats") as broker:
        run(work())


def test_the_broker_goes_away_in_the_middle_and_restarts(tmp_path: Path) -> None:
    """A local job minds nothing; what ended meanwhile is told afterwards, and once."""

    async def work() -> None:
        link = await prepared(broker)
        one = command("gw1", "r1", None, kind="identify")
        async with gateway(tmp_path / "gw") as host, running(connector(host, "gw1", Access(broker.servers))) as made:
            await until(lambda: made.connected)
            await link.publish(one.subject, one.encode())
            assert (await ended(link, "r1")).state == "succeeded"
            two = command("gw1", "r2", None, kind="identify")
            await link.publish(two.subject, two.encode())
            await link.close()
            await until(lambda: len(host.jobs.list()) == 2, "r2 is taken")
            broker.kill(0)
            await until(lambda: all(job.state is JobState.SUCCEEDED for job in host.jobs.list()), "jobs go on")
            await until(lambda: not made.connected, "the end of the connection is noticed")
            broker.start(0)
            broker.wait()
            link2 = await operator(broker)
            await until(lambda: made.connected and not made._ledger.untold(), "all is told after the restart")
            assert (await ended(link2, "r2")).state == "succeeded"
            assert len(host.jobs.list()) == 2
            await link2.close()

    with Broker(tmp_path / "nats", "debian") as broker:
        run(work())


def test_the_link_breaks_while_a_job_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is there, and the link ends before the ledger has it: its end is told all the same, by the next link."""
    links: list[Link] = []

    async def kept(*words: Any) -> Link:
        links.append(await connect(*words))
        return links[-1]

    monkeypatch.setattr(connector_module, "connect", kept)

    async def work() -> None:
        link = await prepared(broker)
        one = command("gw1", "r1", None, kind="identify")
        loop = asyncio.get_running_loop()
        async with gateway(tmp_path / "gw") as host, running(connector(host, "gw1", Access(broker.servers))) as made:
            await until(lambda: made.connected)
            submitted = made._ledger.submitted

            def cut(entry: Entry, job: str) -> Entry:
                if broker.processes:
                    broker.kill(0)
                    asyncio.run_coroutine_threadsafe(links[0].over.wait(), loop).result(10)
                    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.05), loop).result(10)  # Everything is cancelled now.
                return submitted(entry, job)

            made._ledger.submitted = cut  # type: ignore[method-assign]
            await link.publish(one.subject, one.encode())
            await link.close()
            await until(lambda: not made.connected and not broker.processes, "the end of the connection is noticed")
            (entry,) = made._ledger._entries("1", ())
            assert entry.job, "it was written down to its end"
            broker.start(0)
            broker.wait()
            link = await operator(broker)
            assert (await ended(link, "r1")).state == "succeeded"
            assert len(host.jobs.list()) == 1
            await until(lambda: not made._entries, "nothing is left of it")
            await link.close()

    with Broker(tmp_path / "nats") as broker:
        run(work())


NO_LINK: Any = None  # What has no artifact needs none.
IDENTIFY = command("gw1", "r1", None, kind="identify")


@contextlib.asynccontextmanager
async def offline(root: Path) -> AsyncIterator[tuple[VirtualGateway, Connector]]:
    """A connector that hears of its jobs, without a broker; jobs wait for their window."""
    root.mkdir(exist_ok=True)
    async with VirtualGateway(root, {"m1": ("L476", {})}, settings=_waiting()) as host:
        made = connector(host, "gw1", Access(("nats://nowhere:1",)))
        news = asyncio.create_task(made._take_news())
        yield host, made
        news.cancel()
        await asyncio.gather(news, return_exceptions=True)
        made._ledger.close()


def _waiting() -> config.Target:
    far = time.localtime(time.time() + 43200)
    return replace(TARGET, policy=config.Policy(window=[f"{far.tm_hour:02}:00-{far.tm_hour:02}:01"]))


async def one_end(host: VirtualGateway, made: Connector, said: Any) -> None:
    """The one job of the gateway was canceled, and that is what is told of the command."""
    await until(lambda: made.ended and not made._entries, "it ends")
    (job,) = host.jobs.list()
    ((_, _, found),) = made._ledger.untold()
    assert (job.state, found.state, found.job) == (JobState.CANCELED, "canceled", job.id), said
    assert made.ended == {"canceled": 1}


def test_a_cancellation_in_the_middle_of_a_submission_takes_back_the_job(tmp_path: Path) -> None:
    async def work() -> None:
        async with offline(tmp_path / "gw") as (host, made):
            begun, may = asyncio.Event(), asyncio.Event()
            submit = made._jobs.submit

            async def slow(sub: Any) -> Any:
                begun.set()
                await may.wait()
                return await submit(sub)

            made._jobs.submit = slow  # type: ignore[method-assign]
            await made._take(IDENTIFY.subject, IDENTIFY.encode(), 100.0)
            (entry,) = made._ledger.waiting()
            working = asyncio.create_task(made._carry_out(NO_LINK, entry))
            await begun.wait()
            back = Cancel("gw1", "r1", "m1")
            taking = asyncio.create_task(made._take(back.subject, back.encode(), 101.0))
            await asyncio.wait({taking}, timeout=0.05)
            may.set()
            await asyncio.gather(working, taking)
            await one_end(host, made, "nothing was said before the job was there")

    run(work())


@pytest.mark.parametrize("what", ["canceled", "expired", "canceled before"])
def test_a_job_that_the_ledger_did_not_get_to_know_is_found_before_its_command_ends(tmp_path: Path, what: str) -> None:
    """The power was cut between the journal and the ledger, or while a cancellation waited for a checkpoint."""

    async def work() -> None:
        back = Cancel("gw1", "r1", "m1")
        async with offline(tmp_path / "gw") as (host, made):
            one = replace(IDENTIFY, expires=1000.0)
            await made._take(one.subject, one.encode(), 100.0)
            (entry,) = made._ledger.waiting()
            job = await made._jobs.submit(connector_module._submission(one))
            assert made._jobs.find(one.id).id == job.id
            if what == "canceled before":
                made._ledger.submitted(entry, job.id)
                assert made._ledger.take_back(back, 101.0)
        async with offline(tmp_path / "gw") as (host, made):
            if what == "expired":
                (entry,) = made._ledger.waiting()
                await made._carry_out(NO_LINK, entry)
                (entry,) = made._ledger.running()
                assert entry.job == job.id
                await until(lambda: made._ledger.untold()[0][2].state == "waiting", "how it is, is told")
            if what != "canceled before":
                await made._take(back.subject, back.encode(), 101.0)
            await one_end(host, made, what)

    run(work())


def test_a_cancellation_that_a_message_swallowed_is_found_again() -> None:
    async def work() -> None:
        client = SimpleNamespace(jetstream=lambda timeout: None)  # noqa: ARG005
        link = Link(link_module._import_nats(), client, "nats://nowhere:1", asyncio.Event())

        async def stubborn() -> None:
            with link.doing("waiting"), contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(60)

        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task}, timeout=5)
        assert task.cancelled()

    run(work())


def test_a_full_disk_ends_nothing_and_loses_no_end(tmp_path: Path) -> None:
    async def work() -> None:
        link = await prepared(broker)
        one = command("gw1", "r1", None, kind="identify")
        async with gateway(tmp_path / "gw") as host, running(connector(host, "gw1", Access(broker.servers), SLEEPLESS)) as made:
            note, full = made._ledger.note, list[str]()

            def failing(entry: Entry, now: wire.Report) -> bool:
                if now.ended and len(full) < 3:
                    full.append(now.state)
                    raise StorageFull("writing the ledger of the fleet: database or disk is full")
                return note(entry, now)

            made._ledger.note = failing  # type: ignore[method-assign]
            await link.publish(one.subject, one.encode())
            assert (await ended(link, "r1")).state == "succeeded"
            assert full == ["succeeded"] * 3
        await link.close()

    with Broker(tmp_path / "nats") as broker:
        run(work())


def test_who_listens_hears_of_progress(tmp_path: Path) -> None:
    heard: list[wire.Progress] = []

    async def work() -> None:
        link = await prepared(broker)
        image = await staged(link, tmp_path)
        one = command("gw1", "r1", image)
        await link.listen(wire.progress_of("r1"), lambda said: heard.append(wire.progress(said.data, said.subject)))
        await link.flush()
        async with gateway(tmp_path / "gw") as host, running(connector(host, "gw1", Access(broker.servers), progress_s=0.02)):
            await link.publish(one.subject, one.encode())
            assert (await ended(link, "r1")).state == "succeeded"
        await link.close()

    with Broker(tmp_path / "nats") as broker:
        run(work())
    assert {(said.gateway, said.rollout, said.target) for said in heard} == {("gw1", "r1", "m1")}
    assert {said.phase for said in heard} - {""}, "phases; how far each is the sessions of this gateway do not say"
