"""What strangers, web pages and broken clients try over HTTP: nothing happens, and nobody else notices.

The list of what was tried is one file.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from bridged.api.auth import Authority, Clock, Proxies
from bridged.api.http import HEAD_BYTES, RESERVED_CONNECTIONS, HttpServer
from bridged.api.http_call import JSON_BYTES, JSON_DEPTH, Limits
from bridged.config import Auth
from bridged.errors import ConfigError, NotAllowed, StorageFull, WrongToken
from bridged.jobs.journal import Journal
from bridged.jobs.model import JobKind
from bridged.protocol.verbs import Scope
from tests.api.fakes import Script
from tests.api.http_bench import Bench, run

DATA = bytes(range(256)) * 40
SHA = hashlib.sha256(DATA).hexdigest()
SUBMIT = "/v1/targets/motor1/jobs"
HOST = "Host: localhost\r\n"


def head(method: str, path: str, *lines: str, host: str = HOST) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", *lines, ""]).encode() + host.encode() + b"\r\n"


def status(answer: bytes) -> int:
    found = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
    assert found, answer[:200]
    return int(found[1])


async def unharmed(bench: Bench) -> None:
    """Nothing was submitted or stored, and everybody else is served."""
    assert bench.jobs.submissions == []
    assert bench.store.images() == []
    assert (await bench.ask("GET", "/livez"))[0] == 200


# --- rights: every operation without, with a wrong, with a narrow token


def path_of(template: str) -> str:
    values = {"target": "motor1", "job": "j1", "image": f"sha256:{SHA}", "upload": SHA}
    return re.sub(r"{(\w+)}", lambda m: values[m[1]], template)


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    (tmp_path / "book").mkdir()
    found = Journal.open(tmp_path / "book" / "state.db")
    yield found
    found.close()


def closed(journal: Journal) -> Authority:
    """Nobody may anything without a token, and nobody waits in a test."""

    async def at_once(_seconds: float) -> None:
        await asyncio.sleep(0)

    at = [0.0]

    def monotonic() -> float:
        at[0] += 1000.0
        return at[0]

    return Authority(Auth(loopback=[]), journal, Clock(monotonic=monotonic, sleep=at_once))


def test_every_operation_asks_for_its_right(tmp_path: Path, journal: Journal) -> None:
    authority = closed(journal)

    async def body(bench: Bench) -> None:
        narrow = {scope: (await authority.grant(f"only-{scope}", [scope]))[1] for scope in (Scope.READ, Scope.CONSOLE)}
        _, elsewhere = await authority.grant("elsewhere", [Scope.ADMIN], ["motor2"])
        refused = 0
        for operation in bench.server.operations:
            if operation.scope is None:
                continue
            method, path = operation.method, path_of(operation.path)
            tokens: dict[str, tuple[str | None, int]] = {
                "none": (None, 401),
                "wrong": ("bridged_" + "A" * 43, 401),
                "nonsense": ("x y", 401),
            }
            if operation.scope is Scope.FLASH:
                tokens["too narrow"] = (narrow[Scope.READ], 403)
                tokens["another scope"] = (narrow[Scope.CONSOLE], 403)
            if "{target}" in operation.path:
                tokens["another target"] = (elsewhere, 403)
            for what, (token, expected) in tokens.items():
                headers = {"Tus-Resumable": "1.0.0"} | ({"Authorization": f"Bearer {token}"} if token else {})
                found, answered, _ = await bench.ask(method, path, headers=headers)
                assert found == expected, (operation.name, what)
                if found == 401:
                    assert answered["WWW-Authenticate"].startswith("Bearer"), what
                refused += 1
        assert refused > 70
        await unharmed(bench)

    run(tmp_path, body, authority=authority)


def test_metrics_are_for_who_has_a_right_to_all_targets(tmp_path: Path, journal: Journal) -> None:
    authority = closed(journal)

    async def body(bench: Bench) -> None:
        _, one = await authority.grant("one", [Scope.ADMIN], ["motor1"])
        _, every = await authority.grant("prometheus", [Scope.READ])
        assert await bench.problem("GET", "/metrics", headers={"Authorization": f"Bearer {one}"}) == (403, "NOT_ALLOWED")
        ask = {"Authorization": f"Bearer {every}"}
        status, headers, page = await bench.ask("GET", "/metrics", headers=ask)
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain; version=")
        assert b'bridged_job_running{target="motor1"} 0' in page
        status, headers, page = await bench.ask("GET", "/metrics", headers=ask | {"Accept": "application/openmetrics-text"})
        assert headers["Content-Type"].startswith("application/openmetrics-text")
        assert page.endswith(b"# EOF\n")

    run(tmp_path, body, authority=authority)


def test_what_belongs_to_another_target_does_not_exist(tmp_path: Path, journal: Journal) -> None:
    authority = closed(journal)

    async def body(bench: Bench) -> None:
        _, one = await authority.grant("one", [Scope.FLASH], ["motor1"])
        _, two = await authority.grant("two", [Scope.FLASH], ["motor2"])
        first, second = ({"Authorization": f"Bearer {token}"} for token in (one, two))
        bench.store.add(DATA, "app.bin")
        bench.jobs.expect(Script(JobKind.RESET, "motor1", at_once=True))
        found, _, job = await bench.ask("POST", SUBMIT, json={"kind": "reset"}, headers=first)
        assert (found, job["principal"]) == (202, "token-one")
        for path in ("", "/log", "/events", "/data", "/trace"):
            assert await bench.problem("GET", f"/v1/jobs/j1{path}", headers=second) == (404, "UNKNOWN_JOB"), path
        assert await bench.problem("POST", "/v1/jobs/j1/cancel", headers=second) == (404, "UNKNOWN_JOB")
        assert (await bench.ask("GET", "/v1/jobs", headers=second))[2]["jobs"] == []
        assert [t["target"] for t in (await bench.ask("GET", "/v1/targets", headers=second))[2]["targets"]] == ["motor2"]
        assert (await bench.ask("GET", "/v1/images", headers=second))[2]["images"] == []
        assert await bench.problem("GET", "/v1/images/app.bin", headers=second) == (404, "UNKNOWN_IMAGE")
        assert await bench.problem("GET", f"/v1/images/{SHA}/data", headers=second) == (404, "UNKNOWN_IMAGE")
        async with bench.client.get(f"{bench.url}/v1/events", headers=second) as response:
            bench.jobs.expect(Script(JobKind.RESET, "motor1", at_once=True), Script(JobKind.RESET, "motor2", at_once=True))
            await bench.ask("POST", SUBMIT, json={"kind": "reset"}, headers=first)
            await bench.ask("POST", "/v1/targets/motor2/jobs", json={"kind": "reset"}, headers=second)
            seen = b""
            while b"j3" not in seen:
                seen += await asyncio.wait_for(response.content.readline(), 5)
            assert b"motor1" not in seen

    run(tmp_path, body, authority=authority)


def test_a_revoked_token_ends_streams_and_requests(tmp_path: Path, journal: Journal) -> None:
    authority = closed(journal)

    async def body(bench: Bench) -> None:
        _, token = await authority.grant("one", [Scope.FLASH])
        headers = {"Authorization": f"Bearer {token}"}
        async with bench.client.get(f"{bench.url}/v1/events", headers=headers) as response:
            await response.content.readline()
            await authority.revoke("one")
            await asyncio.wait_for(response.content.read(), 5)  # It ends with the next sign of life.
        assert (await bench.ask("GET", "/v1/targets", headers=headers))[0] == 401

    run(tmp_path, body, Limits(heartbeat_s=0.1), authority=authority)


def test_strangers_are_told_whether_it_is_ready_and_not_why(tmp_path: Path, journal: Journal) -> None:
    async def body(bench: Bench) -> None:
        bench.jobs.refuse = StorageFull("/var/lib/bridged has 3 bytes left")
        status, _, told = await bench.ask("GET", "/readyz")
        assert (status, told) == (503, {"ready": False, "reason": "not now"})

    run(tmp_path, body, authority=closed(journal))


def test_one_connection_logs_in_once(tmp_path: Path, journal: Journal) -> None:
    """Or an hour of a page that is open would fill the audit log."""
    authority = closed(journal)

    async def body(bench: Bench) -> None:
        _, token = await authority.grant("one", [Scope.READ])
        for _ in range(20):
            assert (await bench.ask("GET", "/v1/targets", headers={"Authorization": f"Bearer {token}"}))[0] == 200
        logins = [entry for entry in await authority.audit(100) if entry.what == "login"]
        assert len(logins) == 1

    run(tmp_path, body, authority=authority)


def test_behind_a_trusted_proxy_wrong_tokens_delay_whoever_sent_them(tmp_path: Path, journal: Journal) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    authority = Authority(Auth(loopback=["admin"]), journal, Clock(monotonic=lambda: sum(slept), sleep=sleep))

    async def body(bench: Bench) -> None:
        _, token = await authority.grant("one", [Scope.READ])

        async def ask(who: str, shown: str = "") -> int:
            headers = {"X-Forwarded-For": f"127.0.0.1, {who}"} | ({"Authorization": f"Bearer {shown}"} if shown else {})
            return (await bench.ask("GET", "/v1/targets", headers=headers))[0]

        assert await ask("198.51.100.1") == 401, "this machine's rights are not lent"
        for _ in range(3):
            assert await ask("198.51.100.1", "bridged_" + "A" * 43) == 401
        assert slept == [0.25, 0.5, 1.0]
        assert await ask("198.51.100.2", token) == 200
        assert len(slept) == 3, "somebody else by the same proxy waits for nobody"
        entry = next(entry for entry in await authority.audit(10) if entry.who)
        assert (entry.who, entry.source) == ("token-one", "198.51.100.2 by a proxy")
        assert (await bench.ask("GET", "/v1/targets"))[0] == 200, "at the gateway itself nothing has changed"
        assert await ask("nonsense") == 400

    run(tmp_path, body, authority=authority, proxies=Proxies(["127.0.0.1"]))


def test_no_token_is_ever_told_again(tmp_path: Path, journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    authority = closed(journal)

    async def body(bench: Bench) -> None:
        _, token = await authority.grant("one", [Scope.READ])
        headers = {"Authorization": f"Bearer {token}"}
        told = [
            await bench.ask("GET", path, headers=headers)
            for path in ("/v1", "/v1/targets", "/v1/nothing", f"/v1/targets/{token}", "/v1/jobs?state=odd")
        ]
        await bench.ask("GET", "/v1", headers={"Authorization": f"Bearer {token[:-1]}"})
        for _, answered, data in told[:3]:
            assert token not in str(dict(answered)) + str(data)
        assert token not in caplog.text
        assert token[:-1] not in caplog.text
        with pytest.raises(WrongToken):
            raise WrongToken("as a reminder of what is raised")

    run(tmp_path, body, authority=authority)


# --- web pages of others


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("127.0.0.1", True),
        ("127.0.0.1:7101", True),
        ("[::1]:7101", True),
        ("localhost:7101", True),
        ("LOCALHOST.", True),
        ("gw1", True),
        ("known.example.org:7101", True),
        ("192.168.1.5:7101", True),
        ("evil.example.com", False),
        ("127.0.0.1.evil.example.com", False),
        ("localhost.evil.example.com", False),
        ("evil.example.com:7101", False),
        ("", False),
        ("[::1].evil.example.com", False),
    ],
)
def test_dns_rebinding(tmp_path: Path, host: str, ours: bool) -> None:
    async def body(bench: Bench) -> None:
        found = await bench.raw(head("GET", "/v1/targets", "Connection: close", host=f"Host: {host}\r\n"))
        assert status(found) == (200 if ours else 421)
        assert (b"motor1" in found) == ours

    run(tmp_path, body, hosts=["known.example.org"])


def test_a_request_without_one_host(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        assert status(await bench.raw(head("GET", "/v1/targets", "Connection: close", host=""))) == 400
        assert status(await bench.raw(head("GET", "/v1/targets", "Connection: close", "Host: evil.example.com"))) == 400

    run(tmp_path, body)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example.com"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://127.0.0.1.evil.example.com"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    ],
)
def test_a_page_of_somebody_else(tmp_path: Path, headers: dict[str, str]) -> None:
    async def body(bench: Bench) -> None:
        asked = {"kind": "reset"}
        assert await bench.problem("POST", SUBMIT, json=asked, headers=headers) == (403, "FOREIGN_ORIGIN")
        assert await bench.problem("GET", "/v1/events", headers=headers) == (403, "FOREIGN_ORIGIN")
        put = await bench.problem("PUT", f"/v1/images/sha256:{SHA}", data=DATA, headers=headers)
        assert put == (403, "FOREIGN_ORIGIN")
        _, answered, _ = await bench.ask("OPTIONS", "/v1/uploads", headers=headers)
        assert not [name for name in answered if name.lower().startswith("access-control-")]
        await unharmed(bench)

    run(tmp_path, body)


def test_our_own_page_may(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        own = {"Origin": bench.url, "Sec-Fetch-Site": "same-origin"}
        bench.jobs.expect(Script(JobKind.RESET, "motor1"))
        assert (await bench.ask("POST", SUBMIT, json={"kind": "reset"}, headers=own))[0] == 202

    run(tmp_path, body)


@pytest.mark.parametrize("media", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_what_a_form_could_send_is_no_request(tmp_path: Path, media: str) -> None:
    """Such bodies a page may send anywhere without being asked; older browsers do not say where they come from."""

    async def body(bench: Bench) -> None:
        data = json.dumps({"kind": "reset"}).encode()
        found = await bench.problem("POST", SUBMIT, data=data, headers={"Content-Type": media})
        assert found == (415, "BAD_REQUEST")
        await unharmed(bench)

    run(tmp_path, body)


# --- names


@pytest.mark.parametrize(
    "name",
    [
        "..",
        ".",
        "%2e%2e",
        "..%2f..%2fetc%2fpasswd",
        "%00",
        "a%00b",
        "%2fetc%2fpasswd",
        "..%5c..",
        "%ff",
        "a" * 300,
        "%0d%0aX:y",
    ],
)
def test_path_traversal_in_every_name(tmp_path: Path, name: str) -> None:
    async def body(bench: Bench) -> None:
        (tmp_path / "secret.txt").write_text("secret")
        templates = {op.path: op.method for op in bench.server.operations if "{" in op.path and op.method != "OPTIONS"}
        for template, method in templates.items():
            path = re.sub(r"{\w+}", lambda _: name, template)
            found = await bench.raw(head(method, path, "Connection: close", "Tus-Resumable: 1.0.0", "Content-Length: 0"))
            assert status(found) in (400, 404, 405, 411, 415, 422), (template, found[:300])
            assert b"secret" not in found.partition(b"\r\n\r\n")[2].replace(b"secret.txt", b"")
            assert b"\r\nX:y" not in found
        await unharmed(bench)

    run(tmp_path, body)


# --- bombs


def test_bodies_that_are_too_much(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        js = {"Content-Type": "application/json"}
        huge = b'{"kind": "' + b"a" * JSON_BYTES + b'"}'
        assert await bench.problem("POST", SUBMIT, data=huge, headers=js) == (413, "TOO_LARGE")
        for deep in (
            b"[" * (JSON_BYTES - 1),
            b'{"a":' * 8000 + b"1" + b"}" * 8000,
            b'{"kind":' + b"[" * JSON_DEPTH + b"]" * JSON_DEPTH + b"}",
        ):
            assert await bench.problem("POST", SUBMIT, data=deep, headers=js) == (400, "BAD_REQUEST")
        for bad in (b"", b"{", b"[]", b"7", b'"x"', b"\xff", b'{"kind":"reset","kind":"flash"}', b'{"kind":NaN}', b"null"):
            assert await bench.problem("POST", SUBMIT, data=bad, headers=js) == (400, "BAD_REQUEST"), bad
        number = b'{"kind":"read","addr":' + b"9" * 5000 + b',"len":1}'
        assert await bench.problem("POST", SUBMIT, data=number, headers=js) == (400, "BAD_REQUEST")
        await unharmed(bench)

    run(tmp_path, body)


def test_compressed_bodies_are_not_unpacked(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        bomb = gzip.compress(bytes(50 << 20))
        for coding in ("gzip", "deflate", "br", "zstd", "gzip, identity"):
            headers = {"Content-Encoding": coding, "Content-Type": "application/json"}
            assert await bench.problem("POST", SUBMIT, data=bomb, headers=headers) == (415, "BAD_REQUEST"), coding
        await unharmed(bench)

    run(tmp_path, body)


def test_headers_that_are_too_much(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        for data in (
            b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n" + HOST.encode() + b"\r\n",
            b"GET / HTTP/1.1\r\nX: " + b"a" * 9000 + b"\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"".join(b"X%d: a\r\n" % n for n in range(80)) + b"\r\n",
        ):
            assert status(await bench.raw(data)) in (400, 431)
        # Fields within their bounds, and never an end of them.
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(b"GET / HTTP/1.1\r\n")
        sent = 0
        while sent < 4 * HEAD_BYTES and not reader.at_eof():
            line = b"X%d: " % sent + b"a" * 4000 + b"\r\n"
            sent += len(line)
            try:
                writer.write(line)
                await writer.drain()
            except ConnectionError:
                break
            await asyncio.sleep(0)
        assert sent < 4 * HEAD_BYTES, "it was listened to for ever"
        with contextlib.suppress(ConnectionError):  # Who is still sending may find the connection gone before the answer.
            assert status(await asyncio.wait_for(reader.read(), 5)) in (400, 431)
        writer.close()
        await unharmed(bench)

    run(tmp_path, body)


# --- smuggling: whatever two parsers could understand differently is refused, and the connection ends


@pytest.mark.parametrize(
    "lines",
    [
        ["Content-Length: 5", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 5"],
        ["Content-Length: 5", "Content-Length: 6"],
        ["Content-Length: 5, 6"],
        ["Content-Length: +5"],
        ["Content-Length: 0x5"],
        ["Content-Length: -1"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding:\x0bchunked"],
        ["Transfer-Encoding : chunked"],
        [" Transfer-Encoding: chunked"],
        ["Content-Length : 5"],
        ["X: a\rb"],
        ["X: a\x00b"],
    ],
)
def test_request_smuggling(tmp_path: Path, lines: list[str]) -> None:
    hidden = head("POST", SUBMIT, "Content-Type: application/json", "Content-Length: 16") + b'{"kind":"reset"}'

    async def body(bench: Bench) -> None:
        first = head("POST", "/v1/jobs/j1/cancel", *lines)
        for rest in (b"0\r\n\r\n" + hidden, b"5\r\nhello\r\n0\r\n\r\n" + hidden, hidden):
            found = await bench.raw(first + rest)
            assert len(re.findall(rb"HTTP/1\.[01] \d{3} ", found)) == 1, found
            assert status(found) in (400, 501)
        await unharmed(bench)

    run(tmp_path, body)


def test_what_follows_a_refused_body_is_not_a_request(tmp_path: Path) -> None:
    """A body that is refused before it was read is thrown away whole, or the connection ends; it is never parsed."""
    hidden = head("POST", SUBMIT, "Content-Type: application/json", "Content-Length: 16") + b'{"kind":"reset"}'

    async def body(bench: Bench) -> None:
        length = f"Content-Length: {len(hidden)}"
        found = await bench.raw(head("POST", "/v1/nothing", length, "Connection: close") + hidden)
        assert len(re.findall(rb"HTTP/1\.[01] \d{3} ", found)) == 1, found
        await unharmed(bench)

    run(tmp_path, body)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"FLASH motor1 app.bin\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n" * 5000,
        b"CONNECT evil.example.com:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://evil.example.com/v1/targets HTTP/1.1\r\nHost: evil.example.com\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    ],
)
def test_other_protocols(tmp_path: Path, data: bytes) -> None:
    async def body(bench: Bench) -> None:
        found = await bench.raw(data)
        assert not found or status(found) >= 400
        assert b'"target"' not in found
        await unharmed(bench)

    run(tmp_path, body, Limits(head_timeout_s=0.5))


# --- time


def test_slowloris(tmp_path: Path) -> None:
    """A header that comes a byte at a time has an end of its own, whatever keeps coming."""

    async def body(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        began = time.monotonic()
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ")
        for _ in range(200):
            writer.write(b"a")
            if await _ended(reader, 0.05):
                break
        assert 0.4 < time.monotonic() - began < 5
        writer.close()
        # The same on a connection that was used before.
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(head("GET", "/livez"))
        assert (await reader.readuntil(b"ok\n")).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        writer.write(b"GET /")
        for _ in range(200):
            writer.write(b"a")
            if await _ended(reader, 0.05):
                break
        assert 0.4 < time.monotonic() - began < 5
        writer.close()

    run(tmp_path, body, Limits(head_timeout_s=0.5))


async def _ended(reader: asyncio.StreamReader, seconds: float) -> bool:
    try:
        return not await asyncio.wait_for(reader.read(1), seconds)
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_a_slow_body(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port)
        writer.write(head("POST", SUBMIT, "Content-Type: application/json", "Content-Length: 1000"))
        found = b""
        for _ in range(200):
            writer.write(b" ")
            try:
                found += await asyncio.wait_for(reader.read(1000), 0.05)
                break
            except TimeoutError:
                continue
        assert status(found) == 408
        writer.close()
        await unharmed(bench)

    run(tmp_path, body, Limits(body_timeout_s=0.5))


def test_a_reader_who_does_not_read_is_closed(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        sha = bench.store.add(bytes(12 << 20), "big")
        reader, writer = await asyncio.open_connection("127.0.0.1", bench.port, limit=1024)
        writer.write(head("GET", f"/v1/images/{sha}/data"))
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        async with asyncio.timeout(10):
            while bench.server.connections:
                await asyncio.sleep(0.05)
        writer.close()

    run(tmp_path, body, Limits(drain_timeout_s=0.3))


# --- numbers


def test_connections_are_bounded_and_the_refused_are_told(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", bench.port) for _ in range(5)]
        found = await bench.raw(b"")
        assert status(found) == 503
        for one in bench.server._server.connections:
            assert one.transport is not None
            sock = one.transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000, "the kernel finds who vanished"
        assert b"Retry-After: " in found
        assert b'"TOO_MANY"' in found
        idle[0][1].close()
        async with asyncio.timeout(5):
            while bench.server.connections > 4:
                await asyncio.sleep(0.01)
        assert (await bench.ask("GET", "/livez"))[0] == 200
        for _, writer in idle:
            writer.close()

    run(tmp_path, body, Limits(connections=5))


def test_a_crowd_from_elsewhere_keeps_nobody_at_the_gateway_out(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        server: HttpServer = bench.server
        taken = [f"10.0.0.{n % 50}" for n in range(500) if server.admit(f"10.0.0.{n % 50}")]
        assert len(taken) == server.services.limits.connections
        mine = [server.admit("127.0.0.1") for _ in range(RESERVED_CONNECTIONS)]
        assert all(mine)
        for host in [*taken, *["127.0.0.1"] * len(mine)]:
            server.dismiss(host)
        one = [server.admit("10.0.0.1") for _ in range(100)]
        assert one.count(True) == 64
        for _ in range(64):
            server.dismiss("10.0.0.1")

    run(tmp_path, body)


def test_nothing_beyond_loopback_without_tls(tmp_path: Path) -> None:
    from bridged.config.values import Listen

    async def body(bench: Bench) -> None:
        for host in ("0.0.0.0", "::", "192.0.2.1"):
            with pytest.raises(NotAllowed):
                await bench.server.listen_tcp(Listen(host, 0))
        with pytest.raises(ConfigError):
            await bench.server.listen_tcp(Listen("127.0.0.1", bench.port))

    run(tmp_path, body)
