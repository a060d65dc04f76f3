"""How the page is served: what is listed and nothing else, under its policy, small on the wire; and whose terminal it has."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from bridged.api import http_page
from bridged.api.http_page import POLICY, TYPES
from tests.api.http_bench import Bench, run
from tests.support import missing, require_tool

PAGE = Path(str(files("bridged.api"))) / "page"


def test_what_is_served_is_what_there_is() -> None:
    assert {path.name for path in PAGE.iterdir()} == set(TYPES)


def test_the_page_and_its_files(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        for name, media in TYPES.items():
            status, headers, data = await bench.ask("GET", "/" if name == "index.html" else f"/page/{name}")
            assert (status, headers["Content-Type"], data) == (200, media, (PAGE / name).read_bytes()), name
            assert headers["Content-Security-Policy"] == POLICY
            assert headers["X-Frame-Options"] == "DENY"
            again = {"If-None-Match": headers["ETag"]}
            found, headers, _ = await bench.ask("GET", f"/page/{name}", headers=again, skip_auto_headers=["Accept-Encoding"])
            assert found in (200, 304)  # With another encoding it is another representation.
        for path in ("/page/", "/page/http.py", "/page/..%2fhttp.py", "/page/index.html%00", "/index.html"):
            assert (await bench.ask("GET", path))[0] in (400, 404), path
        assert (await bench.ask("HEAD", "/"))[2] == b""
        assert (await bench.ask("GET", "/favicon.ico"))[1]["Content-Type"] == "image/svg+xml"
        assert await bench.problem("POST", "/") == (405, "UNKNOWN_PATH")

    run(tmp_path, body)


def test_it_is_small_on_the_wire_and_not_sent_twice(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        async with bench.client.get(f"{bench.url}/page/xterm.js", auto_decompress=False) as response:
            assert response.headers["Content-Encoding"] == "gzip"
            assert response.headers["Vary"] == "Accept-Encoding"
            assert len(await response.read()) < 90_000
            tag = response.headers["ETag"]
        status, _, data = await bench.ask("GET", "/page/xterm.js", headers={"If-None-Match": tag})
        assert (status, data) == (304, b"")
        packed = http_page._zipped.cache_info().misses
        for name in ("xterm.js", "xterm.js", "main.js"):
            await bench.ask("GET", f"/page/{name}")
        assert http_page._zipped.cache_info().misses <= packed + 1, "strangers may have it compressed again and again"

    run(tmp_path, body)


def test_a_link_to_the_page_works_and_a_frame_around_it_does_not(tmp_path: Path) -> None:
    async def body(bench: Bench) -> None:
        link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
        assert (await bench.ask("GET", "/", headers=link))[0] == 200
        script = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        assert await bench.problem("GET", "/page/main.js", headers=script) == (403, "FOREIGN_ORIGIN")
        assert "frame-ancestors 'none'" in POLICY

    run(tmp_path, body)


@pytest.mark.parametrize("name", [name for name in TYPES if name.endswith((".js", ".html", ".css")) and "xterm" not in name])
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    text = (PAGE / name).read_text()
    outside = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert outside == set()
    assert "innerHTML" not in text
    assert "eval(" not in text
    assert not re.search(r"\son\w+=", text) or name.endswith(".js"), "no script in markup"


def test_the_terminal_is_the_one_that_npm_gives() -> None:
    require_tool("npm", "npm")
    command = [sys.executable, "-m", "tests.build_page", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=110)
    if "npm pack" in done.stderr:
        missing("@xterm/xterm", "let `npm pack @xterm/xterm` reach its registry")
    assert done.returncode == 0, done.stdout + done.stderr
