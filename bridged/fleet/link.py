"""A connection to the broker, for gateways and operators alike; the only module that imports ``nats``.

One ``Link`` is one connection: when it breaks it is over, and whoever used it makes a new one. nats-py can reconnect by itself,
under calls that are under way, and buffers what is published meanwhile; here everything that must survive is in the ledger, so
a fresh start is both simpler and exact. All errors of nats-py and of sockets leave here as ours.

Secrets are named, never written, in the configuration: a file, or ``credential:NAME`` of systemd.

nats-py imports aiohttp's client, if that is installed, for a transport over WebSocket that is not used here. It costs more
memory than nats-py itself, so it does not find it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bridged.errors import ConfigError, FleetError, FleetRefused, FleetUnreachable
from bridged.fleet import credentials

log = logging.getLogger(__name__)

CONNECT_S = 20.0  # TCP, TLS and the broker's greeting over a link with seconds of latency.
ANSWER_S = 15.0  # A request; at a change of leader JetStream was silent for 4 to 6 s (measured, three nodes on loopback).
SNAPSHOT_BATCH = 500
TRIES = 3
# Errors that say nothing of the request, which may be said again some seconds later: no leader is elected, and who was asked
# is none (any more).
PASSING = (10008, 10009)

Acknowledge = Callable[[], Awaitable[None]]


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # How an import is told that there is none.
    try:
        yield
    finally:
        del sys.modules[name]


def _import_nats() -> Any:
    try:
        with _without("aiohttp"):
            import nats
            import nats.aio.client
            import nats.js
            import nats.js.api
            import nats.js.errors
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"the extra `fleet` is not installed ({error.name} is missing): pip install 'bridged[fleet]'"
        ) from error
    return nats


@dataclass(frozen=True, slots=True)
class Access:
    """Where the broker is, and who we are. Files are paths; ``servers`` are ``tls://HOST:PORT`` or ``nats://HOST:PORT``."""

    servers: tuple[str, ...]
    user: str = ""
    password: Path | None = None
    credentials: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    ping_s: float = 60.0

    def options(self, server: str) -> dict[str, Any]:
        """For ``nats``. Read anew for each connection, so that renewed secrets need no restart. Raises ``ConfigError``."""
        found: dict[str, Any] = {}
        if self.user:
            found["user"] = self.user
        if self.password:
            found["password"] = _secret(self.password, "fleet.password")
        if self.credentials:
            jwt, found["signature_cb"] = credentials.read(self.credentials)
            found["user_jwt_cb"] = lambda: jwt
        if urlsplit(server).scheme == "tls":
            context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            try:
                if self.ca:
                    context.load_verify_locations(self.ca)
                if self.certificate and self.key:
                    context.load_cert_chain(self.certificate, self.key)
            except OSError as error:  # ssl.SSLError is one
                text = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
                raise ConfigError(f"reading the certificates of [fleet]: {text}") from error
            found["tls"] = context
        return found


def _secret(path: Path, what: str) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"reading {what} {path}: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a stream. ``at``: when the broker got it, UTC seconds. ``pending``: how many more there are."""

    subject: str
    data: bytes
    sequence: int = 0
    at: float = 0.0
    pending: int = 0


class Link:
    """See ``connect``. Every method raises ``FleetError`` and its like; ``FleetUnreachable`` when the link is over."""

    def __init__(self, nats: Any, client: Any, server: str, over: asyncio.Event) -> None:
        self._nats, self._client, self.server, self.over = nats, client, server, over
        self.js = client.jetstream(timeout=ANSWER_S)  # Whoever uses it does so within ``doing``.

    @property
    def api(self) -> Any:
        return self._nats.js.api

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Translate what nats-py says.

        A cancellation that comes together with a message is lost in it (``asyncio.wait_for`` before Python 3.12): the daemon's
        end would wait until the next message. Here it is found again.
        """
        js, errors = self._nats.js.errors, self._nats.errors
        try:
            yield
        except js.APIError as error:
            nobody = isinstance(error, js.ServiceUnavailableError) and error.err_code is None
            if nobody or error.err_code in PASSING:
                said = error.description or "JetStream does not answer"
                raise FleetUnreachable(f"{what}: {said}", number=error.err_code) from error
            raise FleetError(f"{what}: {error.description or error}", number=error.err_code) from error
        except (errors.TimeoutError, TimeoutError) as error:
            raise FleetUnreachable(f"{what}: no answer from {self.server} in time") from error
        except (errors.Error, OSError) as error:
            raise FleetUnreachable(f"{what}: {error or type(error).__name__}") from error
        finally:
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise asyncio.CancelledError

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.close(), 5)

    async def publish(self, subject: str, data: bytes, *, id: str = "", only_first: bool = False) -> bool:
        """Into a stream; once this returns the broker has it on (a quorum of) disks.

        ``only_first``: not if there is a message at this subject already; then False.
        """
        headers = {"Nats-Msg-Id": id} if id else {}
        if only_first:
            headers["Nats-Expected-Last-Subject-Sequence"] = "0"
        try:
            with self.doing(f"publishing to {subject}"):
                await self.js.publish(subject, data, headers=headers or None, timeout=ANSWER_S)
        except FleetError as error:
            if only_first and error.facts.get("number") in (10071, 10164):  # wrong last sequence, of 2.9 and of later ones
                return False
            raise
        return True

    async def purge(self, stream: str, subject: str) -> None:
        """Everything at ``subject``, which may have wildcards. Nothing there is no error."""
        with self.doing(f"purging {subject} of {stream}"):
            await self.js.purge_stream(stream, subject=subject)

    async def tell(self, subject: str, data: bytes) -> None:
        """To whoever listens now; in no stream, and nobody knows whether it came."""
        with self.doing(f"telling {subject}"):
            await self._client.publish(subject, data)

    async def flush(self) -> None:
        with self.doing("flushing"):
            await self._client.flush(timeout=max(1, int(ANSWER_S)))

    async def listen(self, subject: str, heard: Callable[[Message], None]) -> None:
        async def callback(message: Any) -> None:
            heard(Message(message.subject, message.data))

        with self.doing(f"listening to {subject}"):
            await self._client.subscribe(subject, cb=callback)

    async def request(self, subject: str, data: bytes, timeout_s: float = ANSWER_S) -> tuple[Mapping[str, str], bytes]:
        """Headers and data of the answer."""
        with self.doing(f"asking {subject}"):
            answer = await self._client.request(subject, data, timeout=timeout_s)
            return answer.headers or {}, answer.data

    async def stored(self, stream: str, subject: str, from_sequence: int = 0, timeout_s: float = ANSWER_S) -> Message | None:
        """The last message of ``stream`` at ``subject``, or with ``from_sequence`` the first one from there on.

        A direct get: any replica or mirror answers, and the right to it is a subject of its own.
        """
        question = {"seq": from_sequence, "next_by_subj": subject} if from_sequence else {"last_by_subj": subject}
        headers, data = await self.request(f"$JS.API.DIRECT.GET.{stream}", json.dumps(question).encode(), timeout_s)
        status = headers.get("Status")
        if status == "404":
            return None
        if status or "Nats-Sequence" not in headers:
            raise FleetError(f"reading {subject} of {stream}: {headers.get('Description') or status or data[:80]!r}")
        return Message(headers["Nats-Subject"], data or b"", int(headers["Nats-Sequence"]))

    async def newest(self, stream: str, subject: str) -> Message | None:
        """The last message at ``subject``, from the leader: ``stored`` may be answered by a replica that lags behind."""
        try:
            with self.doing(f"reading {subject} of {stream}"):
                found = await self.js.get_msg(stream, subject=subject, direct=False)
        except FleetError as error:
            if error.facts.get("number") == 10037:  # no message
                return None
            raise
        return Message(found.subject, found.data or b"", int(found.seq))

    async def pull(self, stream: str, consumer: str) -> Pull:
        inbox = self._client.new_inbox()
        with self.doing(f"pulling from {stream}"):
            subscription = await self._client.subscribe(f"{inbox}.*")
        return Pull(self, stream, consumer, inbox, subscription)

    async def snapshot(self, stream: str, subject: str) -> AsyncIterator[Message]:
        """The last message of each subject that matches, as they are now."""
        api = self.api
        settings = api.ConsumerConfig(
            deliver_policy=api.DeliverPolicy.LAST_PER_SUBJECT,
            ack_policy=api.AckPolicy.NONE,
            filter_subject=subject,
            inactive_threshold=30,
            mem_storage=True,
        )
        with self.doing(f"reading {stream}"):
            info = await self.js.add_consumer(stream, settings)
        pull = await self.pull(stream, info.name)
        try:
            left = int(info.num_pending or 0)
            while left > 0:
                batch = await pull.get(min(left, SNAPSHOT_BATCH))
                if not batch:
                    break  # Nothing more, says the broker: some were replaced by newer ones while we read.
                for message, _ in batch:
                    left = message.pending
                    yield message
        finally:
            with contextlib.suppress(FleetError):
                await pull.close()
                with self.doing("leaving"):
                    await self.js.delete_consumer(stream, info.name)


class Pull:
    """Asks a consumer for messages. Our own few lines, because nats-py's ``fetch`` says a timeout for everything that is no
    message, and asks in a rhythm of its own, which costs a gateway on a radio link more than the messages."""

    def __init__(self, link: Link, stream: str, consumer: str, inbox: str, subscription: Any) -> None:
        self._link, self._stream, self._consumer = link, stream, consumer
        self._inbox, self._subscription, self._asked = inbox, subscription, 0

    async def get(self, count: int, wait_s: float = 0.0) -> list[tuple[Message, Acknowledge]]:
        """Messages with what acknowledges each. Without ``wait_s`` what there is now, at most ``count``; with it the first that
        comes, or none in that time."""
        for attempt in range(TRIES):
            try:
                return await self._get(count, wait_s)
            except FleetUnreachable as error:
                # A question or its answer got lost, as happens beside an election; asked again, nothing is lost by that.
                if wait_s or "status" in error.facts or self._link.over.is_set() or attempt == TRIES - 1:
                    raise
        raise AssertionError("unreachable")

    async def _get(self, count: int, wait_s: float) -> list[tuple[Message, Acknowledge]]:
        self._asked += 1
        reply = f"{self._inbox}.{self._asked}"
        asked = {"batch": 1, "expires": int(wait_s * 1e9)} if wait_s else {"batch": count, "no_wait": True}
        found: list[tuple[Message, Acknowledge]] = []
        client, what = self._link._client, f"pulling from {self._stream}"
        with self._link.doing(what):
            await client.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._consumer}", json.dumps(asked).encode(), reply=reply
            )
            # Its own time-out ends a request at the broker; ours is for one that got lost, as with a leader that died.
            while len(found) < (1 if wait_s else count):
                try:
                    one = await self._subscription.next_msg(timeout=wait_s + ANSWER_S / TRIES)
                except (self._link._nats.errors.TimeoutError, TimeoutError):
                    if wait_s and not self._link.over.is_set():
                        return found
                    raise
                status = (one.headers or {}).get("Status", "")
                if not status:
                    found.append((_message(one), _acknowledging(self._link, one)))
                elif one.subject == reply and status != "100":
                    if status in ("404", "408"):  # no messages; none in time
                        break
                    said = (one.headers or {}).get("Description", "")
                    text = said if said and status != "503" else "no consumer answers"  # With that brokers name the subject.
                    raise FleetUnreachable(f"{what}: {text} ({status})", status=int(status))
        return found

    async def close(self) -> None:
        with self._link.doing("leaving"):
            await self._subscription.unsubscribe()


def _message(one: Any) -> Message:
    meta = one.metadata
    return Message(one.subject, one.data, meta.sequence.stream, meta.timestamp.timestamp(), meta.num_pending)


def _acknowledging(link: Link, one: Any) -> Acknowledge:
    async def acknowledge() -> None:
        with link.doing("acknowledging"):
            await one.ack()

    return acknowledge


async def connect(access: Access, name: str, inbox: str, turn: int = 0) -> Link:
    """One try, with the server whose turn it is. ``inbox``: where answers come, which the credential must allow.

    Raises ``FleetUnreachable``, ``FleetRefused``, ``ConfigError``.
    """
    nats = _import_nats()
    server = access.servers[turn % len(access.servers)]
    options = access.options(server)
    over = asyncio.Event()
    client = nats.aio.client.Client()
    seen: list[Exception] = []

    async def closed() -> None:
        over.set()

    async def failed(error: Exception) -> None:
        # Later ones are told to who uses the link; but nobody waits for the word that a permission is missing.
        if "permissions violation" in str(error).lower():
            log.warning("broker %s: %s", server, error)
        elif len(seen) < 10:
            seen.append(error)

    try:
        async with asyncio.timeout(CONNECT_S):
            await client.connect(
                server,
                name=name,
                inbox_prefix=inbox,
                allow_reconnect=False,
                max_reconnect_attempts=1,  # 0 means without end.
                reconnect_time_wait=0,
                connect_timeout=int(CONNECT_S),
                ping_interval=int(access.ping_s),  # A link that died without a word is noticed after two of them.
                closed_cb=closed,
                disconnected_cb=closed,
                error_cb=failed,
                **options,
            )
    except Exception as error:
        # Its own ``close`` waits for a writer that was never started.
        with contextlib.suppress(Exception):
            await asyncio.wait_for(client.close(), 0.2)
        with contextlib.suppress(Exception):
            client._transport.close()
        first = seen[0] if seen else error  # What it ends with is that there is no server left.
        text = f"connecting to {server}: {first or type(first).__name__}"
        if isinstance(first, ssl.SSLError) or "authorization" in str(first).lower():
            raise FleetRefused(text, server=server) from error
        refused = isinstance(first, ConnectionRefusedError)  # Nobody listens there: TLS had no part in it.
        if "tls" in options and not refused and isinstance(first, ConnectionError | nats.errors.UnexpectedEOF):
            # TLS 1.3: the client is through before the broker looks at its certificate.
            text += "; a broker that does not trust our certificate, or wants one, ends the connection like that"
        if isinstance(error, OSError | TimeoutError | nats.errors.Error):
            raise FleetUnreachable(text, server=server) from error
        raise
    return Link(nats, client, server, over)
