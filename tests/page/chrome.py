"""A real Chromium without a window, driven over its own debugging protocol: what a person does, what the browser complains of.

No driver package: the protocol is JSON over a WebSocket. ``Page.complaints`` has every uncaught error, every violation of the
Content-Security-Policy and every failed request that the browser logged; a test fails when it does not expect them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tests.support import missing

WAIT_S = 30.0


def executable() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    missing("chromium", "apt install chromium")
    raise AssertionError("unreachable: missing() ends the test")


@dataclass
class Page:
    socket: aiohttp.ClientWebSocketResponse
    complaints: list[str] = field(default_factory=list)
    _waiting: dict[int, asyncio.Future[Any]] = field(default_factory=dict)
    _numbers: Any = field(default_factory=lambda: itertools.count(1))

    async def listen(self) -> None:
        async for message in self.socket:
            data = json.loads(message.data)
            if "id" in data:
                waiting = self._waiting.pop(data["id"], None)
                if waiting is not None and not waiting.done():
                    waiting.set_result(data)
            elif data["method"] == "Runtime.exceptionThrown":
                details = data["params"]["exceptionDetails"]
                self.complaints.append(str(details.get("exception", {}).get("description") or details["text"]))
            elif data["method"] == "Log.entryAdded" and data["params"]["entry"]["level"] in ("error", "warning"):
                entry = data["params"]["entry"]
                self.complaints.append(f"{entry['source']}: {entry['text']} {entry.get('url', '')}")
            elif (
                data["method"] == "Audits.issueAdded"
                and "contentSecurityPolicyIssueDetails" in data["params"]["issue"]["details"]
            ):
                self.complaints.append(f"policy: {data['params']['issue']['details']}")

    async def do(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        waiting: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = waiting
        await self.socket.send_str(json.dumps({"id": number, "method": method, "params": params}))
        answer = await asyncio.wait_for(waiting, WAIT_S)
        assert "error" not in answer, f"{method}: {answer.get('error')}"
        return answer["result"]

    # --- looking ----------------------------------------------------------------------------------------------------

    async def js(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        answer = await self.do(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True, allowUnsafeEvalBlockedByCSP=False
        )
        assert "exceptionDetails" not in answer, f"{expression}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    async def until(self, expression: str, within_s: float = WAIT_S) -> None:
        """Until it gives something true."""
        try:
            async with asyncio.timeout(within_s):
                while not await self.js(f"Boolean({expression})"):
                    await asyncio.sleep(0.03)
        except TimeoutError:
            text = await self.js("document.body.innerText")
            raise AssertionError(f"{expression} did not come true; the page says:\n{text}\n{self.complaints}") from None

    async def text(self, selector: str = "main") -> str:
        return str(await self.js(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def says(self, text: str, selector: str = "main", within_s: float = WAIT_S) -> None:
        await self.until(
            f"(document.querySelector({json.dumps(selector)})||{{}}).innerText?.includes({json.dumps(text)})", within_s
        )

    async def picture(self, path: Path) -> None:
        shot = await self.do("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    # --- doing ------------------------------------------------------------------------------------------------------

    async def go(self, url: str) -> None:
        await self.do("Page.navigate", url=url)
        await self.until("document.readyState === 'complete'")

    async def click(self, selector: str) -> None:
        """As a finger does: where it is seen, with what lies over it."""
        quoted = json.dumps(selector)
        await self.until(f"document.querySelector({quoted})")
        await self.js(f"document.querySelector({quoted}).scrollIntoView({{block: 'center'}})")
        box = await self.js(
            f"(() => {{ const r = document.querySelector({quoted}).getBoundingClientRect();"
            " return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.do("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    async def type(self, text: str) -> None:
        for char in text:
            await self.key({"\r": "Enter"}.get(char, char), char)

    async def key(self, key: str, text: str = "", modifiers: int = 0) -> None:
        """``modifiers``: 1 alt, 2 control, 8 shift."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowDown": 40, "ArrowUp": 38}
        code = codes.get(key, ord(key.upper()) if len(key) == 1 else 0)
        text = text or {"Enter": "\r"}.get(key, "")
        name = {" ": "Space"}.get(key, key if len(key) > 1 else f"Key{key.upper()}")
        await self.do(
            "Input.dispatchKeyEvent",
            type="keyDown" if text else "rawKeyDown",
            key=key,
            code=name,
            text=text,
            windowsVirtualKeyCode=code,
            modifiers=modifiers,
        )
        await self.do(
            "Input.dispatchKeyEvent", type="keyUp", key=key, code=name, windowsVirtualKeyCode=code, modifiers=modifiers
        )

    async def drop(self, selector: str, data: bytes, name: str) -> None:
        """A file from elsewhere onto an element: the events that a browser makes of it, with a real file in them."""
        await self.js(
            f"(() => {{ const bytes = Uint8Array.from(atob('{base64.b64encode(data).decode()}'), (c) => c.charCodeAt(0));"
            f" const files = new DataTransfer(); files.items.add(new File([bytes], {json.dumps(name)}));"
            f" const place = document.querySelector({json.dumps(selector)});"
            " for (const kind of ['dragenter', 'dragover', 'drop'])"
            " place.dispatchEvent(new DragEvent(kind, {dataTransfer: files, bubbles: true, cancelable: true})); })()"
        )

    async def look_like(self, *, width: int = 1200, height: int = 900, dark: bool = False, touch: bool = False) -> None:
        await self.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=touch)
        await self.do(
            "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        )

    async def offline(self, off: bool) -> None:
        await self.do("Network.emulateNetworkConditions", offline=off, latency=0, downloadThroughput=-1, uploadThroughput=-1)

    async def tree(self) -> list[tuple[str, str]]:
        """Role and name of what a screen reader meets."""
        found = await self.do("Accessibility.getFullAXTree")
        return [
            (str(node["role"]["value"]), str(node.get("name", {}).get("value", "")))
            for node in found["nodes"]
            if not node.get("ignored") and "role" in node
        ]


class Browser:
    """One process for many tests; each gets a page in a context of its own, which shares nothing with the others."""

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        arguments += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--mute-audio"]
        # A page in the background is slowed down; a test may have several.
        arguments += ["--disable-background-timer-throttling", "--disable-renderer-backgrounding"]
        arguments += [f"--user-data-dir={self._profile.name}", "--remote-debugging-port=0", "about:blank"]
        self._process = subprocess.Popen(
            [executable(), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        """It is ended by its own process group, whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._profile.cleanup()

    async def _where(self) -> str:
        """Where it listens, once it does: the port, and the path of its own socket."""
        file = Path(self._profile.name, "DevToolsActivePort")
        async with asyncio.timeout(WAIT_S):
            while True:
                with contextlib.suppress(OSError, ValueError):
                    port, path = file.read_text().split()
                    return f"ws://127.0.0.1:{port}{path}"
                assert self._process.poll() is None, "the browser has ended"
                await asyncio.sleep(0.02)

    @contextlib.asynccontextmanager
    async def page(self) -> AsyncIterator[Page]:
        where = await self._where()
        async with aiohttp.ClientSession() as session, session.ws_connect(where, max_msg_size=0) as own:
            whole = Page(own)
            talking = asyncio.ensure_future(whole.listen())
            context = (await whole.do("Target.createBrowserContext"))["browserContextId"]
            made = await whole.do("Target.createTarget", url="about:blank", browserContextId=context)
            address = f"{where.partition('/devtools/')[0]}/devtools/page/{made['targetId']}"
            try:
                async with session.ws_connect(address, max_msg_size=0) as socket:
                    page = Page(socket)
                    listening = asyncio.ensure_future(page.listen())
                    for domain in ("Page", "Runtime", "Log", "Network", "Audits", "Accessibility"):
                        await page.do(f"{domain}.enable")
                    await page.look_like()
                    yield page
                    listening.cancel()
            finally:
                await whole.do("Target.disposeBrowserContext", browserContextId=context)
                talking.cancel()
