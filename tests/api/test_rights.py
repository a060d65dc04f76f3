"""Attacks on the line protocol's rights: every verb without, with a wrong and with too narrow a token, over real sockets.

The listener is on loopback with ``auth.loopback = []``, so a client there is as unknown as one from anywhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bridged.api.auth import Authority, Principal
from bridged.api.guarded import Guarded
from bridged.api.line import STRANGERS_EACH, LineServer
from bridged.api.line_link import Limits
from bridged.config import Auth
from bridged.config.values import Listen
from bridged.jobs.journal import Journal
from bridged.jobs.model import ID_CHARS, JobKind, JobState
from bridged.protocol.verbs import VERBS, Scope
from tests.api.fakes import FakeJobs, Script, WatchedStore
from tests.api.line_bench import LIMITS, Client

WRONG = "bridged_" + "x" * 43
IMAGE = b"\x00" * 64
DIGEST = hashlib.sha256(IMAGE).hexdigest()

# One well-formed line for every verb of the table; a new verb without one fails the test below.
LINES = {
    "HELP": "HELP",
    "PING": "PING",
    "QUIT": "QUIT",
    "HELLO": "HELLO proto=1",
    "TARGETS": "TARGETS",
    "INFO": "INFO motor1",
    "HAVE": f"HAVE {DIGEST}",
    "PUT": f"PUT 64 {DIGEST}",
    "GET": f"GET {DIGEST}",
    "FLASH": f"FLASH motor1 {DIGEST}",
    "ENSURE": f"ENSURE motor1 {DIGEST}",
    "VERIFY": f"VERIFY motor1 {DIGEST}",
    "READ": "READ motor1 0x08000000 16",
    "ERASE": "ERASE motor1 all",
    "RESET": "RESET motor1",
    "DOCTOR": "DOCTOR motor1",
    "ID": "ID motor1",
    "PROTECT": "PROTECT motor1",
    "UNPROTECT": "UNPROTECT motor1",
    "XMODEM": f"XMODEM motor1 {DIGEST}",
    "OPTION-BYTES": "OPTION-BYTES motor1 set=nBOOT0:1",
    "PLAN": f"PLAN motor1 {DIGEST}",
    "JOBS": "JOBS",
    "STATUS": "STATUS {job}",
    "WAIT": "WAIT {job}",
    "WATCH": "WATCH *",
    "CANCEL": "CANCEL {job}",
    "LOG": "LOG {job}",
    "TRACE": "TRACE {job}",
    "AUTH": f"AUTH {WRONG}",
    "TOKEN": "TOKEN list",
    "AUDIT": "AUDIT",
    "DRAIN": "DRAIN",
    "LOCK": "LOCK motor1",
    "UNLOCK": "UNLOCK motor1",
    "CONSOLE": "CONSOLE motor1",
}
FREE = {"HELP", "PING", "QUIT", "HELLO", "AUTH"}


def test_every_verb_is_attacked() -> None:
    assert set(LINES) == set(VERBS)
    assert {name for name, verb in VERBS.items() if verb.scope is None} == FREE


@dataclass
class Gate:
    server: LineServer
    jobs: FakeJobs
    store: WatchedStore
    authority: Authority
    port: int
    tokens: dict[str, str]
    job: str = ""

    async def connect(self, token: str = "") -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port))
        greeting = await client.reply()
        assert greeting.data["auth"] == "token"
        if token:
            assert (await client.ask(f"AUTH {token}")).code == 235
        return client


@contextlib.asynccontextmanager
async def gate(root: Path, limits: Limits) -> AsyncIterator[Gate]:
    journal = Journal.open(root / "state.db")
    store, server = WatchedStore(root / "store"), None
    jobs = FakeJobs(store)
    authority = Authority(Auth(loopback=[]), journal)
    try:
        server = LineServer(jobs, store, "gw1", limits, authority=authority)
        port = await server.listen_tcp(Listen("127.0.0.1", 0))
        tokens = {}
        for scope in Scope:
            tokens[scope.value] = (await authority.grant(scope.value, [scope]))[1]
            tokens[f"{scope.value}-2"] = (await authority.grant(f"{scope.value}-2", [scope], ["motor2"]))[1]
        yield Gate(server, jobs, store, authority, port, tokens)
    finally:
        if server is not None:
            await server.stop()
        await jobs.close()
        journal.close()
    assert not jobs.surprises
    assert not jobs.scripts, "a job that was expected has not been asked for"
    assert store.open == 0
    assert not jobs.watchers


def run(root: Path, body: Callable[[Gate], Coroutine[Any, Any, None]], limits: Limits = LIMITS) -> None:
    async def main() -> None:
        async with gate(root, limits) as g:
            await body(g)

    asyncio.run(asyncio.wait_for(main(), 60))


async def done_job(g: Gate) -> None:
    """A job of motor1 that has ended, as something to pry into."""
    g.jobs.expect(Script(JobKind.RESET, "motor1", at_once=True))
    client = await g.connect(g.tokens["flash"])
    reply = await client.ask("RESET motor1 wait=1")
    assert reply.code == 250, reply
    g.job = str(reply.data["job"])
    client.writer.close()


@pytest.mark.parametrize("verb", sorted(set(LINES) - FREE))
def test_without_a_token(tmp_path: Path, verb: str) -> None:
    async def body(g: Gate) -> None:
        await done_job(g)
        client = await g.connect()
        await client.say(LINES[verb].format(job=g.job))
        reply = await client.reply()
        assert (reply.code, reply.text) == (530, "LOGIN_FIRST")
        assert not reply.more
        if verb == "PUT":
            assert await client.rest() == b""  # Not one byte of an unknown sender is taken.
        assert g.store.have(DIGEST)[0] == 0

    run(tmp_path, body)


@pytest.mark.parametrize("verb", sorted(set(LINES) - FREE))
def test_with_a_wrong_token(tmp_path: Path, verb: str) -> None:
    async def body(g: Gate) -> None:
        await done_job(g)
        client = await g.connect()
        reply = await client.ask(f"AUTH {WRONG}")
        assert (reply.code, reply.text) == (535, "BAD_TOKEN")
        assert WRONG not in repr(reply)
        await client.say(LINES[verb].format(job=g.job))
        assert (await client.reply()).code == 530

    run(tmp_path, body)


@pytest.mark.parametrize("verb", sorted(set(LINES) - FREE))
def test_with_a_token_that_lacks_the_scope(tmp_path: Path, verb: str) -> None:
    scope = VERBS[verb].scope
    assert scope is not None
    narrow = {Scope.READ: None, Scope.FLASH: "console", Scope.CONSOLE: "flash", Scope.ADMIN: "flash"}[scope]
    if narrow is None:
        return  # There is no token that may not even read; see the one for another target.

    async def body(g: Gate) -> None:
        await done_job(g)
        client = await g.connect(g.tokens[narrow])
        await client.say(LINES[verb].format(job=g.job))
        if verb == "PUT":
            assert (await client.reply()).code == 354  # An authenticated script does not lose step.
            await client.say(IMAGE)
        reply = await client.reply()
        assert (reply.code, reply.text) == (550, "NOT_ALLOWED"), reply
        assert f"scope {scope}" in reply.data["message"]
        assert g.store.have(DIGEST)[0] == 0
        assert (await client.ask("PING")).code == 250
        entries = await g.authority.audit(1)
        assert entries[0].result == "NOT_ALLOWED"
        assert entries[0].who == f"token-{narrow}"

    run(tmp_path, body)


ANOTHERS_TARGET = {
    "INFO": (550, "NOT_ALLOWED"),
    "FLASH": (550, "NOT_ALLOWED"),
    "ENSURE": (550, "NOT_ALLOWED"),
    "VERIFY": (550, "NOT_ALLOWED"),
    "READ": (550, "NOT_ALLOWED"),
    "ERASE": (550, "NOT_ALLOWED"),
    "RESET": (550, "NOT_ALLOWED"),
    "DOCTOR": (550, "NOT_ALLOWED"),
    "ID": (550, "NOT_ALLOWED"),
    "PROTECT": (550, "NOT_ALLOWED"),
    "UNPROTECT": (550, "NOT_ALLOWED"),
    "XMODEM": (550, "NOT_ALLOWED"),
    "OPTION-BYTES": (550, "NOT_ALLOWED"),
    "PLAN": (550, "NOT_ALLOWED"),
    # Who administers some targets must not give himself, or see, the others.
    "TOKEN": (550, "NOT_ALLOWED"),
    "AUDIT": (550, "NOT_ALLOWED"),
    "DRAIN": (550, "NOT_ALLOWED"),
    # What one may not see does not exist.
    "STATUS": (404, "UNKNOWN_JOB"),
    "WAIT": (404, "UNKNOWN_JOB"),
    "CANCEL": (404, "UNKNOWN_JOB"),
    "LOG": (404, "UNKNOWN_JOB"),
    "TRACE": (404, "UNKNOWN_JOB"),
}


@pytest.mark.parametrize("verb", sorted(ANOTHERS_TARGET))
def test_with_a_token_for_another_target(tmp_path: Path, verb: str) -> None:
    async def body(g: Gate) -> None:
        await done_job(g)
        client = await g.connect(g.tokens["admin-2"])
        reply = await client.ask(LINES[verb].format(job=g.job))
        assert (reply.code, reply.text) == ANOTHERS_TARGET[verb], reply

    run(tmp_path, body)


def test_who_resets_anothers_target_needs_a_right_to_that_one(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        client = await g.connect(g.tokens["admin-2"])
        reply = await client.ask("ID motor2 resets=motor1")
        assert (reply.code, reply.text) == (550, "NOT_ALLOWED"), reply

    run(tmp_path, body)


def test_lists_show_only_what_one_may_see(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        await done_job(g)
        client = await g.connect(g.tokens["read-2"])
        await client.say("TARGETS")
        assert [reply.data.get("target") for reply in (await client.replies())[:-1]] == ["motor2"]
        assert (await client.ask("JOBS")).data["jobs"] == "0"
        assert (await client.ask("JOBS target=motor1")).code == 550
        assert (await client.ask("WATCH motor1")).code == 404  # Neither a target nor a job that this one knows.
        everything = await g.connect(g.tokens["read"])
        assert (await everything.ask("JOBS")).data["jobs"] == "1"

    run(tmp_path, body)


def test_watching_everything_shows_only_what_one_may_see(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        narrow = await g.connect(g.tokens["read-2"])
        await narrow.say("WATCH *")
        assert (await narrow.reply()).text == "WATCHING"
        g.jobs.expect(Script(JobKind.RESET, "motor1"), Script(JobKind.RESET, "motor2"))
        sender = await g.connect(g.tokens["flash"])
        assert (await sender.ask("RESET motor1 wait=1")).code == 250
        assert (await sender.ask("RESET motor2 wait=1")).code == 250
        while (reply := await narrow.reply()).data.get("state") != "succeeded":
            assert reply.data["target"] == "motor2"

    run(tmp_path, body)


def test_an_image_is_not_for_who_has_a_right_to_some_targets_only(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        sender = await g.connect(g.tokens["flash"])
        await sender.say(f"PUT 64 {DIGEST}")
        assert (await sender.reply()).code == 354
        await sender.say(IMAGE)
        assert (await sender.reply()).code == 250
        narrow = await g.connect(g.tokens["flash-2"])
        assert (await narrow.ask(f"GET {DIGEST}")).code == 404
        await sender.say(f"GET {DIGEST}")
        assert (await sender.reply()).data["size"] == "64"

    run(tmp_path, body)


async def put(client: Client, data: bytes, name: str) -> str:
    digest = hashlib.sha256(data).hexdigest()
    await client.say(f"PUT {len(data)} {digest} name={name}")
    assert (await client.reply()).code == 354
    await client.say(data)
    reply = await client.reply()
    assert (reply.code, reply.data["name"]) == (250, name)
    return digest


def test_who_has_a_right_to_some_targets_puts_nothing_under_a_name_that_others_use(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        everything, narrow = await g.connect(g.tokens["flash"]), await g.connect(g.tokens["flash-2"])
        good = await put(everything, IMAGE, "app.bin")
        evil = await put(narrow, IMAGE[::-1] + b"!", "app.bin")
        g.jobs.expect(
            Script(JobKind.FLASH, "motor1", good),
            Script(JobKind.FLASH, "motor2", evil, {}),
            Script(JobKind.FLASH, "motor2", f"{evil}@0x08004000"),
        )
        assert (await everything.ask("FLASH motor1 app.bin wait=1")).code == 250
        assert (await narrow.ask("FLASH motor2 app.bin wait=1")).code == 250
        assert (await narrow.ask("FLASH motor2 app.bin@0x08004000 wait=1")).code == 250
        # Nor does he find by its beginning what he may not fetch: flashed, it could be read back.
        for verb in ("FLASH", "VERIFY"):
            assert (await narrow.ask(f"{verb} motor2 {good[:12]}")).text == "UNKNOWN_IMAGE"
        await narrow.say(f"PLAN motor2 {good[:12]}")
        assert (await narrow.replies())[-1].data["image"] == f"token-flash-2/{good[:12]}"

    run(tmp_path, body)


def test_ids_of_who_has_a_right_to_some_targets_are_his_own(tmp_path: Path) -> None:
    """An id that was taken is answered with the request that took it: image, target, and bytes of one unit."""

    async def body(g: Gate) -> None:
        everything, narrow = await g.connect(g.tokens["flash"]), await g.connect(g.tokens["flash-2"])
        g.jobs.expect(Script(JobKind.RESET, "motor1"), Script(JobKind.RESET, "motor2"), Script(JobKind.RESET, "motor2"))
        first = (await everything.ask("RESET motor1 id=build-7")).data["job"]
        for said in ("build-7", "x" * 64):
            mine = (await narrow.ask(f"RESET motor2 id={said}")).data["job"]
            assert mine != first
            assert (await narrow.ask(f"RESET motor2 id={said}")).data["job"] == mine
        assert (await everything.ask("RESET motor1 id=build-7")).data["job"] == first
        # Over HTTP they may be longer, and stay apart within what is kept.
        own = Guarded(g.jobs, g.authority, Principal("token-" + "n" * 32, "x", targets=frozenset({"motor2"})))
        kept = {own.job_id("x" * 127 + last) for last in "ab"}
        assert len(kept) == 2
        assert all(len(one) <= ID_CHARS for one in kept)

    run(tmp_path, body)


def test_three_wrong_tokens_close_the_connection_and_cost_nobody_else(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        client = await g.connect()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        for n in range(3):
            await client.say(f"AUTH {WRONG}")
            assert (await client.reply()).code == 535, n
        assert await client.rest() == b""
        assert loop.time() - begun >= 0.25 + 0.5 + 1.0 - 0.1

    run(tmp_path, body)


def test_a_revoked_token_ends_what_is_open(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        talking, watching = await g.connect(g.tokens["flash"]), await g.connect(g.tokens["flash"])
        await watching.say("WATCH *")
        assert (await watching.reply()).text == "WATCHING"
        admin = await g.connect(g.tokens["admin"])
        assert (await admin.ask("TOKEN revoke flash")).data["revoked"] == "flash"
        assert (await talking.ask("TARGETS")).code == 535
        assert await talking.rest() == b""
        g.jobs.expect(Script(JobKind.RESET, "motor1"))
        assert (await admin.ask("RESET motor1 wait=1")).code == 250
        found = await watching.rest()
        assert b"535 BAD_TOKEN" in found
        assert b"motor1" not in found

    run(tmp_path, body)


def test_tokens_are_made_listed_and_revoked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def body(g: Gate) -> None:
        admin = await g.connect(g.tokens["admin"])
        made = await admin.ask("TOKEN add ci scope=flash targets=motor1 expires=60")
        assert made.code == 250
        token = str(made.data["token"])
        client = await g.connect(token)
        g.jobs.expect(Script(JobKind.RESET, "motor1"))
        assert (await client.ask("RESET motor1 wait=1")).code == 250
        assert g.jobs.submissions[-1].principal == "token-ci"
        assert g.jobs.submissions[-1].source.startswith("127.0.0.1:")
        assert (await client.ask("RESET motor2")).code == 550
        await admin.say("TOKEN list")
        listed = await admin.replies()
        assert "ci" in [reply.data.get("name") for reply in listed]
        assert token not in repr(listed)
        assert hashlib.sha256(token.encode()).hexdigest() not in repr(listed)
        assert (await admin.ask("TOKEN add x scope=flash targets=nowhere")).code == 404
        assert (await admin.ask("TOKEN add ci scope=read")).code == 501
        assert (await admin.ask("TOKEN add y")).code == 501
        assert (await admin.ask("TOKEN add")).code == 501
        assert (await admin.ask("TOKEN revoke nobody")).code == 404
        await admin.say("AUDIT limit=10")
        noted = [(r.data.get("who"), r.data.get("what"), r.data.get("result")) for r in (await admin.replies())[:-1]]
        assert ("token-admin", "token add", "ok") in noted
        assert ("token-ci", "reset", "queued") in noted
        assert ("token-ci", "reset", "NOT_ALLOWED") in noted

    run(tmp_path, body)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"token-ci" in written
    for text in (caplog.text.encode(), written):
        assert b"bridged_" not in text, "a token, or part of one, was written down"
    assert "token-ci" in caplog.text


def test_strangers_get_few_connections_and_lock_nobody_out(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        inside = await g.connect(g.tokens["flash"])
        crowd = [await g.connect() for _ in range(STRANGERS_EACH)]
        refused = Client(*await asyncio.open_connection("127.0.0.1", g.port))
        assert (await refused.reply()).code == 429
        assert (await inside.ask("PING")).code == 250
        crowd[0].writer.close()
        async with asyncio.timeout(10):
            while g.server.connections > STRANGERS_EACH:
                await asyncio.sleep(0.01)
        await g.connect(g.tokens["read"])

    run(tmp_path, body)


def test_a_stranger_who_says_nothing_is_closed_soon(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        client = await g.connect()
        assert b"421 IDLE" in await client.rest()
        inside = await g.connect(g.tokens["read"])
        await asyncio.sleep(1.2)
        assert (await inside.ask("PING")).code == 250

    run(tmp_path, body, Limits(login_timeout_s=1.0, linger_s=0.1))


def test_a_stranger_cannot_fill_the_audit_log(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        client = await g.connect()
        for _ in range(40):
            assert (await client.ask("TARGETS")).code == 530
        assert await g.authority.audit(10) == []

    run(tmp_path, body)


def test_who_makes_mistakes_without_end_is_closed(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        client = await g.connect()
        await client.say("TARGETS\n" * 60)
        assert b"429 TOO_MANY" in await client.rest()

    run(tmp_path, body)


def test_a_token_in_front_of_everything_else_in_one_pipe(tmp_path: Path) -> None:
    """As ``nc -N`` with a script: AUTH, PUT, FLASH, QUIT in one go."""

    async def body(g: Gate) -> None:
        g.jobs.expect(Script(JobKind.FLASH, "motor1", f"{DIGEST}@0x08000000", end=JobState.SUCCEEDED))
        client = await g.connect()
        lines = f"AUTH {g.tokens['flash']}\nPUT 64 {DIGEST} name=a.bin\n".encode() + IMAGE
        await client.say(lines + b"FLASH motor1 a.bin addr=0x08000000 wait=1\nQUIT\n")
        client.writer.write_eof()
        codes = [int(line[:3]) for line in (await client.rest()).splitlines() if line[3:4] == b" "]
        assert codes == [235, 354, 250, 250, 221]

    run(tmp_path, body)


def test_the_socket_says_who_it_is(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        g.authority._admins.add(os.getuid())  # As root, whoever runs the tests.
        await g.server.listen_unix(tmp_path / "s")
        reader, writer = await asyncio.open_unix_connection(tmp_path / "s")
        client = Client(reader, writer)
        assert (await client.reply()).data["auth"] == "none"
        assert (await client.ask("TOKEN list")).code == 250
        g.jobs.expect(Script(JobKind.RESET, "motor1"))
        assert (await client.ask("RESET motor1 wait=1")).code == 250
        assert g.jobs.submissions[-1].source == f"unix:uid={os.getuid()}"

    run(tmp_path, body)


def test_drain_tells_that_it_waits_and_answers_when_nothing_runs(tmp_path: Path) -> None:
    async def body(g: Gate) -> None:
        c = await g.connect(g.tokens["admin"])
        assert (await c.ask("DRAIN")).code == 550, "nobody offered to end this daemon"
        asked, free = [], asyncio.Event()

        async def drain() -> None:
            asked.append(1)
            await free.wait()

        g.server.shared.on_drain = drain
        leaver = await g.connect(g.tokens["admin"])
        await leaver.say("DRAIN")
        assert (await leaver.reply()).code == 150
        leaver.writer.close()
        await c.say("DRAIN")
        assert (await c.reply()).code == 150
        free.set()
        while (reply := await c.reply()).code == 150:
            pass
        assert (reply.code, reply.data["drained"]) == (250, "1")
        assert len(asked) == 2, "who leaves does not take it back"

    run(tmp_path, body, replace(LIMITS, heartbeat_s=0.02))
