"""The web page: its files from the package, as they are, under a policy that allows nothing from elsewhere.

The page is a client of ``/v1`` like any other; nothing is rendered here. Files are read when they are asked for, so that a
gateway that nobody looks at holds none of them; what was compressed is kept (some 130 KiB in all), because strangers may ask
again and again. What there is, is listed: no path of a client becomes a path on the disk.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from functools import cache
from importlib.resources import files

from bridged.api import web
from bridged.api.http_call import Answer, Call, Operation, Param, tags_match
from bridged.errors import UnknownPath

TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "main.js": "text/javascript; charset=utf-8",
    "api.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
    "plan.js": "text/javascript; charset=utf-8",
    "flash.js": "text/javascript; charset=utf-8",
    "job.js": "text/javascript; charset=utf-8",
    "console.js": "text/javascript; charset=utf-8",
    "sha256.js": "text/javascript; charset=utf-8",
    "xterm.js": "text/javascript; charset=utf-8",
    "xterm-fit.js": "text/javascript; charset=utf-8",
    "xterm.css": "text/css; charset=utf-8",
    "xterm.LICENSE.txt": "text/plain; charset=utf-8",
}
# No script, style, picture or connection that is not ours; no page around it; no text that becomes a script.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
FILE = Param("file", "path", "a file of the page", {"type": "string", "enum": sorted(TYPES)}, True)


async def index(call: Call) -> web.StreamResponse:
    return await _send(call, "index.html")


async def asset(call: Call) -> web.StreamResponse:
    return await _send(call, call.path["file"])


async def icon(call: Call) -> web.StreamResponse:
    """Browsers ask for it whatever the page says."""
    return await _send(call, "icon.svg")


async def _send(call: Call, name: str) -> web.StreamResponse:
    zipped = "gzip" in call.header("Accept-Encoding")
    try:
        body, tag = await asyncio.to_thread(_read, name, zipped)
    except FileNotFoundError:
        raise UnknownPath(f"the installation has no {name}", path=name) from None
    headers = {"ETag": tag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY, "Vary": "Accept-Encoding"}
    if tags_match(call.header("If-None-Match"), tag):
        return web.Response(status=304, headers=headers)
    if zipped:
        headers["Content-Encoding"] = "gzip"
    return web.Response(body=body, headers={**headers, "Content-Type": TYPES[name]})


def _read(name: str, zipped: bool) -> tuple[bytes, str]:
    """The bytes to send, and their tag."""
    if zipped:
        return _zipped(name)
    data = (files("bridged.api") / "page" / name).read_bytes()
    return data, f'"{hashlib.sha256(data).hexdigest()[:32]}"'


@cache
def _zipped(name: str) -> tuple[bytes, str]:
    data, tag = _read(name, zipped=False)
    return gzip.compress(data, 6, mtime=0), f'{tag[:-1]}-gzip"'


_PAGE = {200: Answer("the page", media="text/html"), 304: Answer("as you have it")}

OPERATIONS: tuple[Operation, ...] = (
    Operation("GET", "/", "page", "The web page", None, index, _PAGE, tag="page"),
    Operation(
        *("GET", "/page/{file}", "pageFile", "A file of the web page", None, asset),
        {200: Answer("the file", media="*/*"), 304: Answer("as you have it")},
        (FILE,),
        tag="page",
    ),
    Operation(
        *("GET", "/favicon.ico", "favicon", "The icon of the web page", None, icon),
        {200: Answer("the icon", media="image/svg+xml"), 304: Answer("as you have it")},
        tag="page",
    ),
)
