"""HTTP as an update server of hawkBit wants it: questions in JSON, downloads that go on where they broke off, few redirects.

The token is sent to the server's own address only, not to where its links or redirects lead. Plain ``http.client`` in a thread
(``aside``): one request at a time is all that this needs, aiohttp's client would cost the daemon 6.6 MiB. Knows no deployments
and no jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

from bridged import __version__
from bridged.errors import (
    ConfigError,
    FleetError,
    FleetRefused,
    FleetUnreachable,
    ImageTooLarge,
)
from bridged.images.durable import disk
from bridged.images.memfd import write_all

T = TypeVar("T")

TIMEOUT_S = 60.0  # Of one read or write.
JSON_BYTES = 256 << 10  # A deployment with many chunks has some 10 KiB.
CHUNK_BYTES = 65536
REDIRECTS = 3
SYNC_BYTES = 1 << 20  # A download is synced so often; a power cut costs no more.


@dataclass(frozen=True, slots=True)
class Server:
    """``url``: up to what stands before ``/controller/v1``. ``authorization``: the header, as ``TargetToken abc``."""

    url: str
    authorization: str = ""
    ca: Path | None = None


def read_token(path: Path) -> str:
    """Raises ``ConfigError``."""
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reading hawkbit.token {path}: {getattr(error, 'strerror', None) or error}") from error
    if not re.fullmatch(r"[!-~]{1,512}", text):
        raise ConfigError(f"hawkbit.token {path}: a token is one word")
    return text


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    body: bytes
    headers: Mapping[str, str]

    def json(self) -> dict[str, Any]:
        try:
            data = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise FleetError(f"the update server sent no JSON: {self.body[:60]!r}") from error
        if not isinstance(data, dict):
            raise FleetError(f"the update server sent no object: {self.body[:60]!r}")
        return data


class Gone(FleetError):
    """The server knows the resource no more: an action that somebody closed there."""


async def aside(call: Callable[..., T], *args: Any) -> T:
    """As ``asyncio.to_thread``, in a thread for which nobody waits at the end: a name that is not answered, a dead link, or a
    download of an hour would keep a daemon from ending. What it had of a download is on disk, and goes on after the start."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # From here on it cannot be cancelled; who asked may be, and hears nothing more.

    def work() -> None:
        try:
            future.set_result(call(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="hawkBit", daemon=True).start()
    return await asyncio.wrap_future(future)


class Http:
    """Blocking: call it ``aside``. Raises ``FleetUnreachable`` (also 429 and 5xx; the fact ``retry_after_s`` where the server
    says it), ``FleetRefused``, ``Gone``, ``FleetError``."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.fetched_bytes = 0

    def ask(self, method: str, url: str, body: Any = None) -> Answer:
        data = json.dumps(body).encode() if body is not None else None
        with self._open(method, url, data, {}) as answer:
            raw = answer.read(JSON_BYTES + 1)
            if len(raw) > JSON_BYTES:
                raise FleetError(f"{method} {url}: the answer has more than {JSON_BYTES} bytes")
            return Answer(answer.status, raw, dict(answer.headers))

    def fetch(self, url: str, path: Path, size: int) -> None:
        """Into ``path``, on from where it is. Raises ``StorageError``, too."""
        offset = path.stat().st_size if path.exists() else 0
        if offset >= size:
            return
        with self._open("GET", url, None, {"Range": f"bytes={offset}-"} if offset else {}) as answer:
            went_on = answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {offset}-")
            offset = offset if went_on else 0
            with disk(f"keeping {url}"):  # Not ``with open``: what the link raises in there is not the disk's.
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if went_on else os.O_TRUNC), 0o600)
            try:
                os.lseek(fd, offset, os.SEEK_SET)
                unsynced = 0
                while chunk := answer.read(min(CHUNK_BYTES, size + 1 - offset)):
                    offset += len(chunk)
                    if offset > size:
                        raise ImageTooLarge(f"{url} has more than the {size} bytes that were announced")
                    self.fetched_bytes += len(chunk)
                    unsynced += len(chunk)
                    with disk(f"keeping {url}"):
                        write_all(fd, chunk)
                        if unsynced >= SYNC_BYTES:
                            os.fsync(fd)
                            unsynced = 0
            finally:
                os.close(fd)
        if offset < size:
            raise FleetUnreachable(f"{url} broke off at {offset} of {size} bytes")

    @contextlib.contextmanager
    def _open(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        for _ in range(REDIRECTS + 1):
            connection = self._connection(url)
            try:
                try:
                    parts = urlsplit(url)
                    path = parts.path + (f"?{parts.query}" if parts.query else "")
                    connection.request(method, path or "/", body, {**self._headers(url, body), **headers})
                    answer = connection.getresponse()
                    if answer.status in (301, 302, 303, 307, 308) and method == "GET":
                        url = self._link(url, answer.headers.get("Location") or "")
                        continue
                    self._check(method, url, answer)
                    yield answer
                    return
                except ssl.SSLError as error:
                    raise FleetRefused(f"{method} {url}: {error.reason or error}") from error
                except (OSError, http.client.HTTPException) as error:
                    raise FleetUnreachable(f"{method} {url}: {error or type(error).__name__}") from error
            finally:
                connection.close()
        raise FleetError(f"{method} {url}: more than {REDIRECTS} redirects")

    def _connection(self, url: str) -> http.client.HTTPConnection:
        parts = urlsplit(url)
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=str(self._server.ca) if self._server.ca else None)
            return http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S, context=context)
        return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=TIMEOUT_S)

    def _headers(self, url: str, body: bytes | None) -> dict[str, str]:
        found = {"Accept": "application/hal+json, application/json", "User-Agent": f"bridged/{__version__}"}
        if body is not None:
            found["Content-Type"] = "application/json"
        if self._server.authorization and urlsplit(url)[:2] == urlsplit(self._server.url)[:2]:
            found["Authorization"] = self._server.authorization
        return found

    def _link(self, base: str, href: str) -> str:
        """Where a link leads. From TLS nowhere but to TLS."""
        url = urljoin(base, href)
        schemes = ("https",) if urlsplit(self._server.url).scheme == "https" else ("http", "https")
        if not href or urlsplit(url).scheme not in schemes or not urlsplit(url).hostname:
            raise FleetError(f"{base} leads to {url[:100]!r}, which is not followed")
        return url

    @staticmethod
    def _check(method: str, url: str, answer: http.client.HTTPResponse) -> None:
        if answer.status < 300:
            return
        text = f"{method} {url}: {answer.status} {answer.reason}"
        if answer.status in (401, 403):
            raise FleetRefused(text)
        if answer.status in (404, 410):
            raise Gone(text)
        if answer.status == 429 or answer.status >= 500:
            after = answer.headers.get("Retry-After") or ""
            raise FleetUnreachable(text, retry_after_s=float(after) if re.fullmatch(r"\d{1,6}", after) else None)
        raise FleetError(text)
