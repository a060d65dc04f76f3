"""The conventions of the HTTP interface over real sockets: resources, errors, idempotency, preconditions, paging."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from bridged.api import http_problem, http_schemas
from bridged.api.requests import VERB_OF, values_of
from bridged.errors import (
    BY_CODE,
    BadRequest,
    JournalError,
    NoSync,
    NotCancellable,
    QueueFull,
    Stopped,
    StorageFull,
)
from bridged.jobs.model import JobKind, JobState
from bridged.protocol.verbs import VERBS
from tests.api.fakes import PLANNED, Script
from tests.api.http_bench import Bench, run

DATA = bytes(range(256)) * 300
SHA = hashlib.sha256(DATA).hexdigest()


def flash(**more: Any) -> Script:
    return Script(JobKind.FLASH, "motor1", SHA, **more)


# --- errors


def test_every_code_has_a_number_that_fits_what_it_says() -> None:
    numbers = {code: http_problem.status_of(code) for code in BY_CODE}
    assert set(http_problem.STATUS) <= set(BY_CODE)
    assert all(400 <= number < 600 for number in numbers.values())
    assert numbers["UNKNOWN_JOB"] == numbers["UNKNOWN_PATH"] == 404
    assert numbers["IMAGE_CORRUPT"] == 422
    assert numbers["NO_SYNC"] == 502
    assert numbers["INTERNAL"] == 500
    # What may go away by itself is never told as the fault of the request.
    assert {code for code, cls in BY_CODE.items() if cls.retryable and numbers[code] == 400} == set()


def test_problems(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        assert await bench.problem("GET", "/nothing") == (404, "UNKNOWN_PATH")
        assert await bench.problem("GET", "/v1/targets/motor9") == (404, "UNKNOWN_TARGET")
        assert await bench.problem("GET", "/v1/jobs/deadbeef") == (404, "UNKNOWN_JOB")
        assert await bench.problem("GET", "/v1/images/nothing") == (404, "UNKNOWN_IMAGE")
        assert await bench.problem("GET", "/v1/jobs?limit=0") == (400, "BAD_REQUEST")
        assert await bench.problem("GET", "/v1/jobs?limit=1&limit=2") == (400, "BAD_REQUEST")
        assert await bench.problem("GET", "/v1/jobs?colour=red") == (400, "BAD_REQUEST")
        assert await bench.problem("GET", "/v1/jobs?state=odd") == (400, "BAD_REQUEST")
        assert await bench.problem("GET", "/v1/jobs?cursor=deadbeef") == (410, "BAD_REQUEST")
        assert await bench.problem("GET", "/v1/images?cursor=a-b") == (410, "BAD_REQUEST")
        status, headers, _ = await bench.ask("DELETE", "/v1/jobs")
        assert (status, headers["Allow"]) == (405, "GET")
        status, headers, _ = await bench.ask("GET", "/v1/targets", headers={"Authorization": "Basic eDp5"})
        assert (status, headers["WWW-Authenticate"]) == (401, 'Bearer realm="bridged"')

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QueueFull("full"), 429),
        (Stopped("stopping"), 503),
        (StorageFull("full"), 507),
        (JournalError("gone"), 500),
    ],
)
def test_who_is_told_to_come_back_is_told_when(tmp_path: Path, error: Any, status: int) -> None:
    async def body(bench: Bench) -> None:
        bench.store.add(DATA, "app.bin")
        bench.jobs.refuse = error
        found, headers, told = await bench.ask("POST", "/v1/targets/motor1/jobs", json={"kind": "flash", "image": "app.bin"})
        assert (found, told["code"], told["detail"]) == (status, error.code, error.message)
        assert ("Retry-After" in headers) == (status in (429, 503))

    run(tmp_path, body)


# --- what is said of the service


def test_live_and_ready(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        assert (await bench.ask("GET", "/livez"))[::2] == (200, b"ok\n")
        assert (await bench.ask("HEAD", "/livez"))[::2] == (200, b"")
        assert (await bench.ask("GET", "/readyz"))[::2] == (200, {"ready": True, "reason": ""})
        bench.jobs.refuse = StorageFull("no room")
        status, headers, told = await bench.ask("GET", "/readyz")
        assert (status, told) == (503, {"ready": False, "reason": "no room"})
        assert headers["Retry-After"]
        status, _, told = await bench.ask("GET", "/v1")
        assert told["principal"] == "local"
        assert set(told["scopes"]) == {"read", "flash", "console"}

    run(tmp_path, body)


def test_every_answer_says_what_a_browser_may_do_with_it(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.store.add(DATA, "app.bin")
        for path in ("/livez", "/v1/targets", "/nothing", "/v1/images/app.bin/data"):
            _, headers, _ = await bench.ask("GET", path)
            assert headers["X-Content-Type-Options"] == "nosniff", path
            assert headers["Cache-Control"] == "no-store", path
            assert "aiohttp" not in headers["Server"], path
            assert "Access-Control-Allow-Origin" not in headers, path
        assert headers["Content-Disposition"].startswith("attachment")

    run(tmp_path, body)


# --- targets


def test_a_target_has_a_tag_that_follows_it(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        status, headers, target = await bench.ask("GET", "/v1/targets/motor1")
        assert (status, target["target"], target["state"]) == (200, "motor1", "idle")
        tag = headers["ETag"]
        assert (await bench.ask("GET", "/v1/targets/motor1", headers={"If-None-Match": tag}))[::2] == (304, b"")
        bench.store.add(DATA, "app.bin")
        bench.jobs.expect(flash(), flash())
        ask = {"kind": "flash", "image": "app.bin"}
        status, _, _ = await bench.ask("POST", "/v1/targets/motor1/jobs", json=ask, headers={"If-Match": tag})
        assert status == 202
        bench.jobs.states["motor1"] = "busy"
        assert await bench.problem("POST", "/v1/targets/motor1/jobs", json=ask, headers={"If-Match": tag}) == (412, "CHANGED")
        assert (await bench.ask("GET", "/v1/targets/motor1", headers={"If-None-Match": tag}))[0] == 200
        both = {"If-Match": f'"other", {(await bench.ask("GET", "/v1/targets/motor1"))[1]["ETag"]}'}
        assert (await bench.ask("POST", "/v1/targets/motor1/jobs", json=ask, headers=both))[0] == 202

    run(tmp_path, body)


def test_a_plan_touches_nothing(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        status, _, plan = await bench.ask("POST", "/v1/targets/motor1/plan", json={"image": "app.bin", "outside": "discard"})
        assert status == 200
        assert plan["range"] == PLANNED["range"]
        assert plan["params"] == {"outside": "discard"}
        assert bench.jobs.submissions == []

    run(tmp_path, body)


# --- jobs


def test_a_job_from_its_submission_to_its_end(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.store.add(DATA, "app.bin")
        gate = asyncio.Event()
        bench.jobs.expect(flash(params={"force": "vectors", "trace": True}, gate=gate, result={"evidence": "full"}))
        ask = {"kind": "flash", "image": f"sha256:{SHA}", "force": ["vectors"], "trace": True}
        status, headers, job = await bench.ask("POST", "/v1/targets/motor1/jobs", json=ask)
        assert (status, headers["Location"]) == (202, "/v1/jobs/j1")
        assert (job["job"], job["state"], job["target"], job["problem"]) == ("j1", "queued", "motor1", None)
        waiting = asyncio.ensure_future(bench.ask("GET", "/v1/jobs/j1?wait=60"))
        assert (await bench.ask("GET", "/v1/jobs/j1"))[2]["state"] == "queued"
        gate.set()
        status, _, job = await waiting
        assert (status, job["state"], job["result"]) == (200, "succeeded", {"evidence": "full"})
        status, _, log = await bench.ask("GET", "/v1/jobs/j1/log")
        assert [entry["state"] for entry in log["entries"]] == ["queued", "succeeded"]
        assert log["next"] is None
        status, _, log = await bench.ask("GET", "/v1/jobs/j1/log?from=1&limit=1")
        assert (len(log["entries"]), log["next"]) == (1, log["entries"][0]["seq"] + 1)

    run(tmp_path, body)


def test_a_wait_ends_with_its_time_and_the_job_goes_on(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.store.add(DATA, "app.bin")
        bench.jobs.expect(flash(gate=asyncio.Event()))
        await bench.ask("POST", "/v1/targets/motor1/jobs", json={"kind": "flash", "image": "app.bin"})
        status, _, job = await bench.ask("GET", "/v1/jobs/j1?wait=1")
        assert (status, job["state"]) == (200, "queued")
        assert not bench.jobs.watchers

    run(tmp_path, body)


def test_a_failed_job_shows_cause_evidence_and_remedy(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.store.add(DATA, "app.bin")
        bench.jobs.expect(flash(end=JobState.FAILED, error=NoSync("silence", port="/dev/ttyS0"), at_once=True))
        await bench.ask("POST", "/v1/targets/motor1/jobs", json={"kind": "flash", "image": "app.bin"})
        _, _, job = await bench.ask("GET", "/v1/jobs/j1")
        assert job["error"] == "NO_SYNC"
        assert job["problem"]["message"] == "silence"
        assert job["problem"]["facts"] == {"port": "/dev/ttyS0"}
        assert job["problem"]["cause"]
        assert job["problem"]["remedy"]

    run(tmp_path, body)


@pytest.mark.parametrize(
    ("asked", "kind", "params"),
    [
        ({"kind": "read", "addr": 0x08000000, "len": "4K"}, JobKind.READ, {"address": 0x08000000, "length": 4096}),
        ({"kind": "erase", "range": "0x08000000+16K"}, JobKind.ERASE, {"address": 0x08000000, "length": 16384}),
        (
            {"kind": "erase", "range": "all", "entry": "one-shot"},
            JobKind.ERASE,
            {"address": 0, "length": 0, "entry": "one-shot"},
        ),
        ({"kind": "reset", "mode": "boot"}, JobKind.RESET, {"mode": "boot"}),
        ({"kind": "identify"}, JobKind.IDENTIFY, {}),
        ({"kind": "doctor", "trace": False}, JobKind.DOCTOR, {"trace": False}),
    ],
)
def test_kinds_without_an_image(tmp_path: Path, asked: dict[str, Any], kind: JobKind, params: dict[str, Any]) -> None:
    async def body(bench: Bench) -> None:
        bench.jobs.expect(Script(kind, "motor2", "", params))
        assert (await bench.ask("POST", "/v1/targets/motor2/jobs", json=asked))[0] == 202
        assert bench.jobs.submissions[0].principal == "local"
        assert bench.jobs.submissions[0].source.startswith("127.0.0.1:")

    run(tmp_path, body)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"kind": "odd"},
        {"kind": ["flash"]},
        {"kind": "flash"},
        {"kind": "flash", "image": ""},
        {"kind": "flash", "image": 7},
        {"kind": "flash", "image": "app.bin", "colour": "red"},
        {"kind": "flash", "image": "app.bin", "wait": True},
        {"kind": "flash", "image": "app.bin", "id": "x"},
        {"kind": "flash", "image": "app.bin", "target": "motor2"},
        {"kind": "flash", "image": "app.bin", "mode": "diff"},
        {"kind": "flash", "image": "app.bin", "trace": "yes"},
        {"kind": "flash", "image": "app.bin", "addr": -1},
        {"kind": "flash", "image": "app.bin", "addr": 1 << 32},
        {"kind": "flash", "image": "app.bin", "force": ["vectors", "all"]},
        {"kind": "flash", "image": ["a.bin,b.bin"]},
        {"kind": "flash", "image": "app.bin", "patch": {"a": 1}},
        {"kind": "read", "addr": 0x08000000},
        {"kind": "read", "addr": True, "len": 4},
        {"kind": "identify", "image": "app.bin"},
    ],
)
def test_requests_that_are_refused(tmp_path: Path, asked: dict[str, Any]) -> None:
    async def body(bench: Bench) -> None:
        bench.store.add(DATA, "app.bin")
        assert await bench.problem("POST", "/v1/targets/motor1/jobs", json=asked) == (400, "BAD_REQUEST")
        assert bench.jobs.submissions == []

    run(tmp_path, body)


def test_the_same_key_finds_the_same_job(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.store.add(DATA, "app.bin")
        bench.jobs.expect(flash(), Script(JobKind.RESET, "motor1"))
        ask = {"kind": "flash", "image": "app.bin"}
        path = "/v1/targets/motor1/jobs"
        first = await bench.ask("POST", path, json=ask, headers={"Idempotency-Key": '"build-7"'})
        again = await bench.ask("POST", path, json=ask, headers={"Idempotency-Key": "build-7"})
        assert first[0] == again[0] == 202
        assert first[1]["Location"] == again[1]["Location"]
        other = {"kind": "reset"}
        assert await bench.problem("POST", path, json=other, headers={"Idempotency-Key": "build-7"}) == (422, "ID_CONFLICT")
        assert await bench.problem("POST", path, json=other, headers={"Idempotency-Key": "x" * 129}) == (400, "BAD_REQUEST")
        assert (await bench.ask("POST", path, json=other))[0] == 202

    run(tmp_path, body)


def test_pages_of_jobs(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.jobs.expect(*(Script(JobKind.RESET, f"motor{1 + n % 2}", at_once=True) for n in range(5)))
        for n in range(5):
            await bench.ask("POST", f"/v1/targets/motor{1 + n % 2}/jobs", json={"kind": "reset"})
        seen, cursor = [], ""
        for _ in range(4):
            _, _, page = await bench.ask("GET", f"/v1/jobs?limit=2{cursor}")
            seen += [job["job"] for job in page["jobs"]]
            if page["next"] is None:
                break
            cursor = f"&cursor={page['next']}"
        assert seen == ["j5", "j4", "j3", "j2", "j1"]
        _, _, page = await bench.ask("GET", "/v1/jobs?target=motor2&state=succeeded")
        assert [job["job"] for job in page["jobs"]] == ["j4", "j2"]
        assert await bench.problem("GET", "/v1/jobs?target=..%2Fx") == (400, "BAD_REQUEST")

    run(tmp_path, body)


def test_cancel(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.jobs.expect(Script(JobKind.RESET, "motor1", gate=asyncio.Event()))
        bench.jobs.expect(Script(JobKind.RESET, "motor1", steps=[("erase", 0, 0)], gate=asyncio.Event()))
        for _ in range(2):
            await bench.ask("POST", "/v1/targets/motor1/jobs", json={"kind": "reset"})
        async with asyncio.timeout(5):
            while bench.jobs.jobs["j2"].phase != "erase":
                await asyncio.sleep(0)
        status, _, job = await bench.ask("POST", "/v1/jobs/j1/cancel")
        assert (status, job["state"]) == (202, "canceled")
        assert await bench.problem("POST", "/v1/jobs/j2/cancel", json={}) == (409, NotCancellable.code)
        assert await bench.problem("POST", "/v1/jobs/j2/cancel", json={"force": "yes"}) == (400, "BAD_REQUEST")
        assert (await bench.ask("POST", "/v1/jobs/j2/cancel", json={"force": True}))[0] == 202

    run(tmp_path, body)


def test_what_a_read_job_has_read(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bench.jobs.expect(Script(JobKind.READ, "motor1", "", {"address": 0, "length": 4}, at_once=True))
        await bench.ask("POST", "/v1/targets/motor1/jobs", json={"kind": "read", "addr": 0, "len": 4})
        bench.jobs.results["j1"] = tmp_path / "read"
        bench.jobs.results["j1"].write_bytes(DATA)
        assert (await bench.ask("GET", "/v1/jobs/j1/data"))[::2] == (200, DATA)
        bench.jobs.results["j1"].unlink()
        assert await bench.problem("GET", "/v1/jobs/j1/data") == (400, "BAD_REQUEST")

    run(tmp_path, body)


def test_a_recording_raw_and_in_words(tmp_path: Path) -> None:
    text = "0.0 # format 115200 8E1\n0.0 > 7F\n0.001 < 79\n0.01 > 02 FD\n0.012 < 79 01 04 49 79\n"

    async def body(bench: Bench) -> None:
        bench.jobs.expect(Script(JobKind.IDENTIFY, "motor1", at_once=True))
        await bench.ask("POST", "/v1/targets/motor1/jobs", json={"kind": "identify"})
        assert await bench.problem("GET", "/v1/jobs/j1/trace") == (404, "UNKNOWN_TRACE")
        bench.jobs.traces.save("j1", text)
        assert (await bench.ask("GET", "/v1/jobs/j1/trace"))[2].decode() == text
        _, headers, told = await bench.ask("GET", "/v1/jobs/j1/trace?decoded=1")
        assert headers["Content-Type"] == "text/plain; charset=utf-8"
        assert b"product id 0x0449" in told
        assert (await bench.ask("GET", "/v1/jobs/j1"))[2]["trace"] is True
        assert (await bench.ask("GET", "/v1/jobs"))[2]["jobs"][0]["trace"] is True

    run(tmp_path, body)


# --- images


def test_a_file_by_plain_put(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        path = f"/v1/images/sha256:{SHA}?name=app.bin&type=bin"
        status, headers, image = await bench.ask("PUT", path, data=DATA)
        assert (status, headers["Location"]) == (201, f"/v1/images/sha256:{SHA}")
        assert (image["image"], image["name"], image["size"], image["type"]) == (f"sha256:{SHA}", "app.bin", len(DATA), "bin")
        assert (await bench.ask("PUT", path, data=DATA))[0] == 200
        assert (await bench.ask("GET", "/v1/images/app.bin"))[2] | {"used": 0} == image | {"used": 0}
        status, headers, data = await bench.ask("GET", f"/v1/images/{SHA[:12]}/data")
        assert (status, data, headers["ETag"]) == (200, DATA, f'"{SHA}"')
        assert (await bench.ask("HEAD", f"/v1/images/{SHA}/data"))[1]["Content-Length"] == str(len(DATA))
        assert bench.uploads == [(len(DATA), False)] * 2

    run(tmp_path, body)


def test_what_a_plain_put_refuses(tmp_path: Path) -> None:
    async def chunks() -> Any:
        yield DATA

    async def body(bench: Bench) -> None:
        path = f"/v1/images/sha256:{SHA}"
        assert await bench.problem("PUT", path, data=DATA[:-1] + b"!") == (422, "DIGEST_MISMATCH")
        assert await bench.problem("PUT", path, data=chunks()) == (411, "BAD_REQUEST")
        assert await bench.problem("PUT", path, data=b"") == (422, "IMAGE_EMPTY")
        assert await bench.problem("PUT", path, data=DATA, headers={"Content-Range": "bytes 0-9/10"}) == (400, "BAD_REQUEST")
        assert await bench.problem("PUT", path, data=DATA, headers={"Content-Encoding": "gzip"}) == (415, "BAD_REQUEST")
        assert await bench.problem("PUT", path + "?name=a,b", data=DATA) == (400, "BAD_REQUEST")
        assert await bench.problem("PUT", path + "?type=odd", data=DATA) == (400, "BAD_REQUEST")
        assert await bench.problem("PUT", "/v1/images/app.bin", data=DATA) == (400, "BAD_REQUEST")
        assert await bench.problem("PUT", path, data=bytes((2 << 20) + 1)) == (413, "IMAGE_TOO_LARGE")
        bench.store.refuse = StorageFull("no room")
        assert await bench.problem("PUT", path, data=DATA) == (507, "STORAGE_FULL")
        assert bench.store.images() == []

    run(tmp_path, body)


def test_a_body_that_is_not_wanted_is_refused_before_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """curl sends ``Expect: 100-continue`` with a large file, and waits."""
    monkeypatch.setattr("bridged.api.http.LINGER_S", 0.2)

    def head(size: int, path: str = f"/v1/images/sha256:{SHA}") -> bytes:
        return f"PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\nExpect: 100-continue\r\n\r\n".encode()

    async def body(bench: Bench) -> None:
        assert (await bench.raw(head(3 << 20))).startswith(b"HTTP/1.1 413 ")
        assert (await bench.raw(head(100, "/v1/nothing"))).startswith(b"HTTP/1.1 404 ")
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(head(len(DATA)))
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        assert await reader.readline() == b"\r\n"
        writer.write(DATA)
        assert (await reader.readline()).startswith(b"HTTP/1.1 201 ")
        writer.close()

    run(tmp_path, body)


def test_pages_of_images(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        for n in range(5):
            bench.store.add(DATA + bytes([n]), f"app{n}.bin")
        seen, cursor = [], ""
        for _ in range(4):
            _, _, page = await bench.ask("GET", f"/v1/images?limit=2{cursor}")
            seen += [image["name"] for image in page["images"]]
            if page["next"] is None:
                break
            cursor = f"&cursor={page['next']}"
        assert sorted(seen) == [f"app{n}.bin" for n in range(5)]

    run(tmp_path, body)


# --- one table


def test_what_json_says_is_what_the_line_says() -> None:
    """Every option of every kind of job can be said in JSON, and becomes the same value."""
    samples: dict[str, tuple[Any, str]] = {
        "images": (["a.bin", "b.bin"], "a.bin,b.bin"),
        "patches": (["0x08000000:00"], "0x08000000:00"),
        "address": (0x08000000, "134217728"),
        "length": (4096, "4096"),
        "range": ("0x08000000+4K", "0x08000000+4K"),
        "flag": (True, "1"),
        "signatures": (["A" * 120], "A" * 120),
        "fields": ("IWDG_SW:1,nBOOT1:0x1", "IWDG_SW:1,nBOOT1:0x1"),
        "sectors": ("0,2-5", "0,2-5"),
    }
    from bridged.protocol.line import Request, bind

    for verb in (*VERB_OF.values(), "PLAN"):
        row = VERBS[verb]
        said: dict[str, Any] = {}
        words: dict[str, str] = {}
        for param in (*row.args, *row.options):
            plain = param.choices[0] if param.choices else "motor1"
            said[param.name], words[param.name] = samples.get(param.kind, (plain, plain))
        args = tuple(words.pop(param.name) for param in row.args)
        assert values_of(verb, said) == bind(Request(verb, args, words)), verb
        with pytest.raises(BadRequest):
            values_of(verb, said | {"odd": 1})


def test_rights_are_those_of_the_line_protocol(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        scopes = {operation.name: operation.scope for operation in bench.server.operations}
        same = {
            "listTargets": "TARGETS",
            "getTarget": "INFO",
            "planFlash": "PLAN",
            "submitJob": "FLASH",
            "listJobs": "JOBS",
            "getJob": "STATUS",
            "cancelJob": "CANCEL",
            "getLog": "LOG",
            "getTrace": "TRACE",
            "getData": "GET",
            "putImage": "PUT",
            "headUpload": "HAVE",
            "allEvents": "WATCH",
            "jobEvents": "WATCH",
            "targetEvents": "WATCH",
        }
        for name, verb in same.items():
            assert scopes[name] == VERBS[verb].scope, name
        everybody = {name for name, scope in scopes.items() if scope is None}
        assert everybody == {
            *("livez", "readyz", "openapi", "whoAmI", "uploadOptions", "uploadOptionsOfOne", "page", "pageFile", "favicon")
        }

    run(tmp_path, body)


def test_schemas_name_all_fields_that_are_sent(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        shapes = http_schemas.components()
        bench.store.add(DATA, "app.bin")
        bench.jobs.expect(flash(at_once=True))
        _, _, job = await bench.ask("POST", "/v1/targets/motor1/jobs", json={"kind": "flash", "image": "app.bin"})
        assert set(job) == set(shapes["Job"]["properties"])
        _, _, log = await bench.ask("GET", "/v1/jobs/j1/log")
        assert set(log["entries"][0]) == set(shapes["Update"]["required"])
        assert set(PLANNED) == set(shapes["Plan"]["properties"])
        assert set(PLANNED["range"][0]) == set(shapes["Plan"]["properties"]["range"]["items"]["properties"])
        _, _, image = await bench.ask("GET", "/v1/images/app.bin")
        assert set(image) == set(shapes["Image"]["properties"])
        _, _, problem = await bench.ask("GET", "/v1/jobs/nope")
        assert set(problem) == set(shapes["Problem"]["properties"])

    run(tmp_path, body)


def test_nothing_is_loaded_for_http_that_is_off() -> None:
    """The modules of HTTP import aiohttp; what is always loaded must not import them."""
    import subprocess
    import sys

    program = (
        "import sys, bridged.app, bridged.api.line, bridged.api.guarded, bridged.api.metrics\n"
        "print([m for m in sys.modules if 'http' in m])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "bridged.api.http" not in out
    assert "aiohttp" not in out


def test_the_client_half_of_aiohttp_is_loaded_only_for_who_asks() -> None:
    import subprocess
    import sys

    program = (
        "import sys, bridged.api.http\n"
        "print(sorted({'aiohttp.client', 'aiohttp.connector', 'aiohttp.web'} & set(sys.modules)))\n"
        "import aiohttp\nfrom aiohttp import web, hdrs\n"
        "print(aiohttp.ClientSession.__name__, web.Application.__name__, aiohttp.__version__ > '3')\n"
        "from bridged.api import web as ours\nprint(ours.Response is web.Response)\n"
        "try:\n    aiohttp.nothing\nexcept AttributeError:\n    print('no such thing')\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["[]", "ClientSession Application True", "True", "no such thing"]
