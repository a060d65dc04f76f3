"""hawkBit's DDI, against a strict server of our own (which answers nothing that it should not be asked) and, where it is
installed, against goosebit."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import subprocess
import threading
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bridged import chips, config
from bridged.api.auth import Authority, Principal
from bridged.api.guarded import Guarded
from bridged.config.file import load
from bridged.errors import BadRequest, ConfigError, CorruptImage, FleetError, StorageFull
from bridged.fleet import ddi
from bridged.fleet.ddi import Ddi, Notes
from bridged.fleet.ddi_http import Http, Server
from bridged.jobs.model import Job, JobKind, JobState, Submission, update_of
from bridged.protocol.verbs import Scope
from tests.e2e.virtual_gateway import VirtualGateway
from tests.fleet.members import TARGET, until
from tests.support import free_port
from tests.target.bench import make_image

IMAGE = make_image(chips.find("L476"), 150_000, seed=1).segments[0].data
ROOT = "/DEFAULT/controller/v1/gw1.m1"


class Hawkbit(ThreadingHTTPServer):
    """One controller. ``action``: what is offered. ``cut``: the next download breaks off after so many bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.action = self.cancel = 0
        self.cut = 0
        self.busy = False
        self.dead = threading.Event()  # Set once somebody waits for the rest of a download, which does not come.
        self.alive = threading.Event()
        self.alive.set()
        self.data = IMAGE
        self.sha256 = hashlib.sha256(IMAGE).hexdigest()
        self.said: list[tuple[str, Any]] = []
        self.ranges: list[str] = []
        self.closed: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/DEFAULT"

    def feedback(self) -> list[tuple[str, str]]:
        return [
            (data["status"]["execution"], data["status"]["result"]["finished"])
            for path, data in self.said
            if "feedback" in path
        ]


class Handler(BaseHTTPRequestHandler):
    server: Hawkbit

    def log_message(self, *_: object) -> None: ...

    def answer(self, data: Any = None, status: int = 200, **headers: str) -> None:
        raw = json.dumps(data).encode() if data is not None else b""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **{k.replace("_", "-"): v for k, v in headers.items()}}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == "TargetToken secret":
            return True
        self.answer(status=401)
        return False

    def do_GET(self) -> None:
        one, base = self.server, f"{self.server.url.removesuffix('/DEFAULT')}{ROOT}"
        if self.path == "/elsewhere/app.bin":
            assert self.headers.get("Authorization") is None or self.headers["Host"].startswith("127.0.0.1")
            self.file()
        elif not self.allowed():
            return
        elif one.busy:
            self.answer(status=429, Retry_After="7")
        elif self.path == ROOT:
            links = {"configData": {"href": f"{base}/configData"}}
            if one.cancel:
                links = {"cancelAction": {"href": f"{base}/cancelAction/{one.cancel}"}}
            elif one.action and str(one.action) not in one.closed:
                links["deploymentBase"] = {"href": f"{base}/deploymentBase/{one.action}?c=-12345"}
            self.answer({"config": {"polling": {"sleep": "00:00:05"}}, "_links": links})
        elif self.path.startswith(f"{ROOT}/deploymentBase/{one.action}?"):
            href = f"{self.server.url.removesuffix('/DEFAULT')}/elsewhere/app.bin"
            file = {"filename": "app.bin", "size": len(one.data), "hashes": {"sha256": one.sha256, "sha1": "0" * 40}}
            chunk = {
                "part": "bApp",
                "name": "app",
                "version": "1",
                "artifacts": [{**file, "_links": {"download": {"href": href}}}],
            }
            chunk["metadata"] = [{"key": "bridged.addr", "value": "0x08000000"}, {"key": "note", "value": "x"}]
            self.answer({"id": str(one.action), "deployment": {"download": "forced", "update": "forced", "chunks": [chunk]}})
        elif self.path == f"{ROOT}/cancelAction/{one.cancel}":
            self.answer({"id": str(one.cancel), "cancelAction": {"stopId": str(one.action)}})
        else:
            self.answer(status=404)

    def file(self) -> None:
        one, found = self.server, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        begin = int(found[1]) if found else 0
        one.ranges.append(self.headers.get("Range", ""))
        rest = one.data[begin:]
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(rest)))
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{len(one.data) - 1}/{len(one.data)}")
        self.end_headers()
        cut, one.cut = one.cut, 0
        if not one.alive.is_set():
            self.wfile.write(rest[:1000])
            one.dead.set()
            one.alive.wait(20)
            return
        self.wfile.write(rest[:cut] if cut else rest)
        self.close_connection = True

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def do_PUT(self) -> None:
        if self.allowed():
            assert self.path == f"{ROOT}/configData"
            self.server.said.append((self.path, self.body()))
            self.answer()

    def do_POST(self) -> None:
        if self.allowed():
            data = self.body()
            self.server.said.append((self.path, data))
            number = re.fullmatch(rf"{ROOT}/(?:deploymentBase|cancelAction)/(\d+)/feedback", self.path)
            assert number is not None
            assert data["id"] == number[1]
            if data["status"]["execution"] == "closed":
                self.server.closed.append(number[1])
                if int(number[1]) == self.server.cancel:
                    self.server.cancel = 0
            self.answer()


@pytest.fixture
def hawkbit() -> Iterator[Hawkbit]:
    with Hawkbit() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.alive.set()
        server.shutdown()
        thread.join()


@contextlib.asynccontextmanager
async def connected(root: Path, url: str, token: str = "TargetToken secret") -> AsyncIterator[tuple[VirtualGateway, Ddi]]:
    root.mkdir(exist_ok=True)
    who = Principal("hawkbit", "hawkbit", frozenset({Scope.READ, Scope.FLASH}))
    async with VirtualGateway(root, {"m1": ("L476", {})}, settings=TARGET) as host:
        made = Ddi(
            "gw1",
            Server(url, token),
            Guarded(host.jobs, Authority(), who),
            host.store,
            Notes(root / "hawkbit"),
            1 << 20,
            ("m1",),
        )
        host.jobs.on_update.append(made.observe)
        task = asyncio.create_task(made.run())
        yield host, made
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_a_deployment_becomes_one_job(tmp_path: Path, hawkbit: Hawkbit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddi, "RETRY_S", 0.05)
    monkeypatch.setattr(ddi, "SHORTEST_S", 0.05)
    monkeypatch.setattr(ddi, "sleep_of", lambda _: 0.05)

    async def work() -> None:
        hawkbit.action, hawkbit.cut = 7, 100_000
        async with connected(tmp_path / "gw", hawkbit.url) as (host, made):
            await until(lambda: hawkbit.closed, made._controllers["m1"].trouble)
            (job,) = host.jobs.list()
            assert (job.state, job.principal, job.params) == (JobState.SUCCEEDED, "hawkbit", {})
            assert hawkbit.ranges == ["", "bytes=100000-"], "it went on where it broke off"
            assert ("proceeding", "none") in hawkbit.feedback()
            assert hawkbit.feedback()[-1] == ("closed", "success")
            attributes = next(data["data"] for path, data in hawkbit.said if path.endswith("configData"))
            assert attributes["gateway"] == "gw1"
            assert attributes["chip"].startswith("L476")
            now = made.figures()
            assert (now.connected, now.connections) == (True, 2), "the download that broke off, and on"
            assert (now.commands["taken"], now.ended, now.download_bytes) == (1, {"succeeded": 1}, len(IMAGE))
        # The server was restored from a backup and offers it again, to a gateway that was restarted.
        hawkbit.closed.clear()
        hawkbit.said.clear()
        async with connected(tmp_path / "gw", hawkbit.url) as (host, made):
            await until(lambda: hawkbit.closed)
            assert hawkbit.feedback()[-1] == ("closed", "success")
            assert len(host.jobs.list()) == 1
            # Another one is damaged on its way.
            hawkbit.action, hawkbit.data = 8, IMAGE[:-1] + b"?"
            hawkbit.sha256 = hashlib.sha256(b"something else").hexdigest()
            await until(lambda: "8" in hawkbit.closed)
            assert hawkbit.feedback()[-1] == ("closed", "failure")
            assert "DIGEST_MISMATCH" in str([data for path, data in hawkbit.said if "feedback" in path][-1])
            assert len(host.jobs.list()) == 1
            assert list(made.notes.folder.glob("*.part")) == []
            assert (made.figures().commands["refused"], made.figures().ended) == (1, {"rejected": 1})

    asyncio.run(work())


def test_a_cancellation(tmp_path: Path, hawkbit: Hawkbit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddi, "SHORTEST_S", 0.05)
    monkeypatch.setattr(ddi, "sleep_of", lambda _: 0.05)

    async def work() -> None:
        hawkbit.action = 7
        root = tmp_path / "gw"
        root.mkdir()
        who = Principal("hawkbit", "hawkbit", frozenset({Scope.READ, Scope.FLASH}))
        async with VirtualGateway(root, {"m1": ("L476", {})}, settings=waiting()) as host:
            jobs = Guarded(host.jobs, Authority(), who)
            made = Ddi("gw1", Server(hawkbit.url, "TargetToken secret"), jobs, host.store, Notes(root / "h"), 1 << 20, ("m1",))
            host.jobs.on_update.append(made.observe)
            task = asyncio.create_task(made.run())
            await until(lambda: host.jobs.list() and host.jobs.list()[0].state is JobState.WAITING, "it waits for its window")
            hawkbit.cancel = 9
            await until(lambda: "9" in hawkbit.closed)
            assert host.jobs.list()[0].state is JobState.CANCELED
            # Not the last word: the action itself, which this server offers once more, is told its end, too.
            told = [data["status"] for path, data in hawkbit.said if "cancelAction/9/feedback" in path]
            assert [(one["execution"], one["result"]["finished"]) for one in told] == [("closed", "success")]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(work())


def waiting() -> config.Target:
    """Half a day away: a job waits for it."""
    closed = time.localtime(time.time() + 43200)
    return config.Target(port="/dev/null", policy=config.Policy(window=[f"{closed.tm_hour:02}:00-{closed.tm_hour:02}:01"]))


@pytest.mark.parametrize("what", ["forgotten", "unnoted", "told too late", "canceled, and heard too late"])
def test_a_cancellation_of_what_the_gateway_has_its_own_word_on(tmp_path: Path, hawkbit: Hawkbit, what: str) -> None:
    """Whatever there is of an action, its cancellation is answered, and nothing is called canceled that was not."""

    async def work() -> None:
        (tmp_path / "gw").mkdir()
        hawkbit.action, hawkbit.cancel = 7, 9
        who = Principal("hawkbit", "hawkbit", frozenset({Scope.READ, Scope.FLASH}))
        async with VirtualGateway(tmp_path / "gw", {"m1": ("L476", {})}, settings=waiting()) as host:
            jobs, notes = Guarded(host.jobs, Authority(), who), Notes(tmp_path / "notes")
            made = Ddi("gw1", Server(hawkbit.url, "TargetToken secret"), jobs, host.store, notes, 1 << 20, ("m1",))
            note: dict[str, Any] = {"id": "7", "url": f"{hawkbit.url}/controller/v1/gw1.m1/deploymentBase/7"}
            if what == "forgotten":
                notes.put("m1", note | {"job": "gone"})
            elif what == "unnoted":
                notes.put("m1", note)
                await jobs.submit(Submission(JobKind.IDENTIFY, "m1", id="hawkbit/gw1.m1/7"))
            elif what == "told too late":
                notes.put("m1", note | {"job": "x", "closed": True, "finished": "success", "details": ["evidence full"]})
            else:
                notes.put("m1", note | {"closed": True, "finished": "failure", "details": ddi.CANCELED})
            one = made._controllers["m1"]
            await made._poll(one)
            assert not one.trouble
            said = [data["status"] for path, data in hawkbit.said if "cancelAction/9/feedback" in path]
            canceled = what in ("unnoted", "canceled, and heard too late")
            assert [status["execution"] for status in said] == ["closed" if canceled else "rejected"]
            if what == "unnoted":
                assert [job.state for job in host.jobs.list()] == [JobState.CANCELED]
            assert made.ended == ({"canceled": 1} if what == "unnoted" else {})
            if not canceled:  # The server goes back to the action, and is told what became of it.
                hawkbit.cancel = 0
                await made._poll(one)
                assert hawkbit.feedback()[-1] == ("closed", "success" if what == "told too late" else "failure")

    asyncio.run(work())


def test_a_dead_download_keeps_no_daemon_from_ending(tmp_path: Path, hawkbit: Hawkbit) -> None:
    hawkbit.action = 7
    hawkbit.alive.clear()
    ended = []

    async def work() -> None:
        async with connected(tmp_path / "gw", hawkbit.url):
            await until(hawkbit.dead.is_set)
        ended.append(time.monotonic())

    watchdog = threading.Timer(5, hawkbit.alive.set)
    watchdog.start()
    asyncio.run(work())
    watchdog.cancel()
    assert time.monotonic() - ended[0] < 3, "asyncio waited for the thread"


def test_an_end_that_comes_during_a_poll_is_told_by_another_one_at_once(tmp_path: Path) -> None:
    polls = 0

    async def work() -> None:
        jobs: Any = None
        store: Any = None
        made = Ddi("gw1", Server("http://127.0.0.1:9/"), jobs, store, Notes(tmp_path), 1 << 20, ("m1",))
        again = asyncio.Event()

        async def poll(one: ddi.Controller) -> float:
            nonlocal polls
            polls += 1
            if polls == 1:
                made._jobs_of["j1"] = one.target
                ended = Job("j1", JobKind.IDENTIFY, "m1", JobState.SUCCEEDED, 3, "", "", {}, "hawkbit", 0.0)
                made.observe(ended, update_of(ended, 0.0))
            else:
                again.set()
            return 3600.0

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Ddi, "_poll", lambda _, one: poll(one))
            task = asyncio.create_task(made.run())
            await asyncio.wait_for(again.wait(), 2)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(work())
    assert polls == 2


def test_a_full_disk_is_not_called_a_server_that_does_not_answer(hawkbit: Hawkbit) -> None:
    url = f"{hawkbit.url.removesuffix('/DEFAULT')}/elsewhere/app.bin"
    with pytest.raises(StorageFull, match="the disk is full"):
        Http(Server(hawkbit.url)).fetch(url, Path("/dev/full"), len(IMAGE))


def test_the_server_says_when(tmp_path: Path, hawkbit: Hawkbit) -> None:
    async def work() -> None:
        async with connected(tmp_path / "gw", hawkbit.url) as (_, made):
            one = made._controllers["m1"]
            assert await made._poll(one) == 5.0
            hawkbit.busy = True
            assert await made._poll(one) == 7.0
            hawkbit.busy = False
        async with connected(tmp_path / "gw", hawkbit.url, "TargetToken wrong") as (_, made):
            assert await made._poll(made._controllers["m1"]) == ddi.RETRY_S
            assert "401" in made._controllers["m1"].trouble

    asyncio.run(work())


def test_links_that_are_not_followed() -> None:
    http = Http(Server("https://updates.example.org/x", "TargetToken secret"))
    assert http._link("https://updates.example.org/x/", "/y") == "https://updates.example.org/y"
    for href in ("http://updates.example.org/", "file:///etc/passwd", ""):
        with pytest.raises(FleetError, match="is not followed"):
            http._link("https://updates.example.org/x/", href)
    assert "Authorization" in http._headers("https://updates.example.org/y", None)
    for url in ("https://cdn.example.org/y", "https://updates.example.org:444/y", "http://updates.example.org/y"):
        assert "Authorization" not in http._headers(url, None)


@pytest.mark.parametrize("said", ["", "x", "-1:00:00", "99999:00:00", None, 5])
def test_a_poll_time_that_is_none(said: Any) -> None:
    assert ddi.sleep_of({"config": {"polling": {"sleep": said}}}) == 300.0
    assert ddi.sleep_of({}) == 300.0
    assert ddi.sleep_of({"config": {"polling": {"sleep": "00:00:00"}}}) == ddi.SHORTEST_S
    assert ddi.sleep_of({"config": {"polling": {"sleep": "900:00:00"}}}) == ddi.LONGEST_S


def test_deployments_that_are_none() -> None:
    file = {"filename": "a.bin", "size": 1, "hashes": {"sha1": "ab"}, "_links": {"download": {"href": "http://x/"}}}
    good = {"id": 1, "deployment": {"chunks": [{"artifacts": [file]}]}}

    def read(data: Any) -> ddi.Deployment:
        return ddi.deployment(data, "u", lambda _, href: href)

    assert read(good).image.algorithm == "sha1"
    changes: tuple[dict[str, Any], ...] = (
        {"size": 0},
        {"size": True},
        {"size": "1"},
        {"hashes": {}},
        {"_links": {}},
        {"filename": None, "hashes": None},
    )
    for change in changes:
        with pytest.raises(BadRequest):
            read({"id": 1, "deployment": {"chunks": [{"artifacts": [{**file, **change}]}]}})
    for bad in ({}, {"id": 1}, {"id": 1, "deployment": {"chunks": [{"artifacts": [file, file]}]}}, {"id": 1, "deployment": []}):
        with pytest.raises(BadRequest):
            read(bad)


def cpio(*files: tuple[str, bytes]) -> bytes:
    """An archive as ``cpio -H newc`` makes it."""
    out = b""
    for name, data in (*files, ("TRAILER!!!", b"")):
        fields = [0, 0o100644, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0]
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + name.encode() + b"\0"
        out += head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)
    return out


DESCRIPTION = b'software = { version = "2.0"; hardware-compatibility: ["default"]; images: ({ filename = "app.bin"; }); };\n'


def test_a_swu_is_unpacked() -> None:
    whole = cpio(("sw-description", DESCRIPTION), ("sw-description.sig", b"x"), ("app.bin", b"12345"))
    assert ddi.unpack(whole) == ("app.bin", b"12345")
    for cut in range(len(whole) - 124):
        with pytest.raises(CorruptImage):
            ddi.unpack(whole[:cut])
    for bad in (b"", cpio(), cpio(("sw-description", b"x")), cpio(("a", b"1"), ("b", b"2")), b"070701" + b"z" * 200):
        with pytest.raises(CorruptImage):
            ddi.unpack(bad)


@pytest.mark.parametrize("url", ["http://updates.example.org/x", "ftp://x/", "https://", "https://a b/", "https://u:p@host/"])
def test_what_cannot_be_configured(url: str) -> None:
    with pytest.raises(ConfigError):
        load(f'[gateway]\nname = "gw1"\n[hawkbit]\nurl = "{url}"')


def test_goosebit(tmp_path: Path) -> None:
    """A real server that others wrote. ``BRIDGED_GOOSEBIT``: the Python of an environment where it is installed."""
    python = os.environ.get("BRIDGED_GOOSEBIT", "")
    if not python:
        pytest.skip(
            "goosebit is a server with 60 packages of its own: make soak, or name a Python that has it: BRIDGED_GOOSEBIT="
        )
    port = free_port()
    (tmp_path / "artifacts").mkdir()
    environment = {
        **os.environ,
        "GOOSEBIT_DB_URI": f"sqlite://{tmp_path}/db.sqlite3",
        "GOOSEBIT_ARTIFACTS_DIR": str(tmp_path / "artifacts"),
        "GOOSEBIT_POLL_TIME": "00:00:05",
    }
    start = (
        "import asyncio, uvicorn\n"
        "from aerich import Command\n"
        "from goosebit.db.config import TORTOISE_CONF\n"
        "from pathlib import Path\nimport goosebit.db\n"
        "async def migrate():\n"
        "    c = Command(tortoise_config=TORTOISE_CONF, location=str(Path(goosebit.db.__file__).parent / 'migrations'))\n"
        "    await c.init()\n    await c.upgrade(run_in_transaction=True)\n"
        "asyncio.run(migrate())\n"
        "from goosebit import app\n"
        f"uvicorn.run(app, host='127.0.0.1', port={port})\n"
    )
    software = tmp_path / "app-2.0.swu"
    image = make_image(chips.find("L476"), 20_000, seed=4)
    software.write_bytes(cpio(("sw-description", DESCRIPTION), ("app.hex", _hex(image.start, image.segments[0].data))))
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen([python, "-c", start], env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            api = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 60
            while True:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{api}/login", timeout=2):
                    break
                time.sleep(0.2)
            asyncio.run(_goosebit(tmp_path, api, software))
        finally:
            server.terminate()


async def _goosebit(root: Path, api: str, software: Path) -> None:
    from tests.fleet.goosebit import Admin

    admin = await asyncio.to_thread(Admin, api)
    async with connected(root / "gw", f"{api}/DEFAULT", "") as (host, made):
        await until(lambda: "gw1.m1" in admin.devices(), "it registers", 60)
        await asyncio.to_thread(admin.roll_out, software)
        await until(lambda: host.jobs.list() and host.jobs.list()[0].terminal, made._controllers["m1"].trouble, 60)
        (job,) = host.jobs.list()
        assert job.state is JobState.SUCCEEDED, job.error
        await until(lambda: admin.succeeded() == 1, "the server counts it", 30)


def _hex(start: int, data: bytes) -> bytes:
    """Intel HEX, so that the image says where it belongs."""
    out, high = [], -1
    for at in range(0, len(data), 16):
        address, part = start + at, data[at : at + 16]
        if address >> 16 != high:
            high = address >> 16
            out.append(_record(0, 4, high.to_bytes(2, "big")))
        out.append(_record(address & 0xFFFF, 0, part))
    return ("\n".join([*out, ":00000001FF"]) + "\n").encode()


def _record(address: int, kind: int, data: bytes) -> str:
    raw = bytes([len(data)]) + address.to_bytes(2, "big") + bytes([kind]) + data
    return f":{(raw + bytes([-sum(raw) & 0xFF])).hex().upper()}"
