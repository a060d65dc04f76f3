"""Who may do what: principals, tokens, scopes, and the record of who did what. One mechanism for every listener.

A listener makes a ``Peer`` of a new connection, asks ``Authority.known`` who that is without a word being said, and
``Authority.login`` when a token comes; what it gets is a ``Principal``, which answers ``may`` and ``require``. Whatever is kept
(credentials, the audit log) is in the journal; whatever is configured is ``[auth]``. Document: docs/security.md.

Invariants:

- Beyond loopback and the Unix socket nobody has a scope without a token or a certificate (P7); no setting changes that.
- A token is 256 random bits and is shown once. Only its SHA-256 is kept, and nothing that is logged or recorded has it.
- A wrong token costs its sender's address time, more with each, and nobody else anything. What is remembered of wrong tokens
  is bounded; an IPv6 host is its /64, or it would have as many addresses as it likes.
- ``valid`` says at once when a credential was revoked or has expired, also to connections that are open.

It knows no wire: what 535 or 401 is, its callers know.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import pwd
import re
import secrets
import socket
import struct
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from bridged.config import Auth
from bridged.errors import BadRequest, BridgedError, LoginFirst, NotAllowed, TooMany, UnknownCredential, WrongToken
from bridged.jobs.records import AuditEntry, Credential
from bridged.logs import note
from bridged.protocol.verbs import Scope

log = logging.getLogger("bridged.audit")

TOKEN_PREFIX = "bridged_"  # So that scanners of repositories, and people, can tell what they have found.
TOKEN_BYTES = 32
TOKEN = re.compile(re.escape(TOKEN_PREFIX) + r"[A-Za-z0-9_-]{43}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
FIRST_DELAY_S = 0.25  # After the first wrong token of an address, and twice as long after each further one ...
LONGEST_DELAY_S = 10.0  # ... up to this: whoever mistypes a token is not punished for long.
FORGET_S = 600.0  # An address that has sent no wrong token for so long starts anew.
SEEN_S = 600.0  # The logins of one credential at one address are noted at most so often.
WAITING_LIMIT = 8  # Logins of one address that are being delayed at once; the next ones are told to come back later.
ADDRESSES_LIMIT = 4096  # Remembered addresses with wrong tokens, some 200 bytes each; the longest unheard of is forgotten.
CREDENTIALS_LIMIT = 1000  # Tokens and certificates; all of them are held in memory.
LIFETIME_LIMIT_S = 100 * 365 * 86400.0  # Of a credential; beyond it the year no longer prints.

IMPLIED: Mapping[Scope, frozenset[Scope]] = {
    # Who flashes or types must be able to look; who administers could give itself everything anyway.
    Scope.READ: frozenset({Scope.READ}),
    Scope.FLASH: frozenset({Scope.FLASH, Scope.READ}),
    Scope.CONSOLE: frozenset({Scope.CONSOLE, Scope.READ}),
    Scope.ADMIN: frozenset(Scope),
}


@dataclass(frozen=True, slots=True)
class Principal:
    """Somebody, and what that one may do. ``targets`` ``None``: all of them. ``source``: where from, for records.

    ``name`` is what jobs, uploads and limits are counted under. ``credential``: name of the token or certificate, or empty.
    ``grant``: the credential itself, because another one may bear the same name later.
    """

    name: str
    source: str
    scopes: frozenset[Scope] = frozenset()
    targets: frozenset[str] | None = None
    credential: str = ""
    grant: Credential | None = field(default=None, repr=False)

    @property
    def known(self) -> bool:
        return bool(self.scopes)

    def may(self, scope: Scope, target: str | None = None) -> bool:
        """``target`` ``None``: what belongs to no single target, as the list of them."""
        return scope in self.scopes and (target is None or self.targets is None or target in self.targets)

    def require(self, scope: Scope, target: str | None = None, doing: str = "this") -> None:
        """Raises ``LoginFirst`` (nobody yet) or ``NotAllowed`` (somebody, but not for this)."""
        if not self.known:
            raise LoginFirst(f"{doing} needs a token with scope {scope}", scope=scope.value)
        if scope not in self.scopes:
            has = ", ".join(sorted(self.scopes))
            raise NotAllowed(f"{doing} needs scope {scope}; {self.name} has {has}", scope=scope.value)
        if not self.may(scope, target):
            raise NotAllowed(f"{doing}: {self.name} has no right to target {target}", scope=scope.value, target=target)


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of a connection, as the kernel and TLS know it. ``address`` is empty on a Unix socket.

    ``identities``: names in a client certificate that TLS has checked against ``tls.client_ca``. ``forwarded``: this is whom a
    proxy asks for, in its words; such a one has neither the rights of this machine nor those of the proxy's certificate.
    """

    address: str = ""
    port: int = 0
    uid: int | None = None
    identities: tuple[str, ...] = ()
    forwarded: bool = False

    @classmethod
    def of(cls, info: Callable[[str], Any]) -> Peer:
        """``info``: ``get_extra_info`` of an asyncio writer or transport, or of an aiohttp transport."""
        sock = info("socket")
        if sock is not None and sock.family == socket.AF_UNIX:
            raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            return cls(uid=struct.unpack("3i", raw)[1])
        name = info("peername") or ("", 0)
        return cls(str(name[0]), int(name[1]), identities=identities(info("peercert") or {}))

    @property
    def local(self) -> bool:
        return self.uid is not None or (is_loopback(self.address) and not self.forwarded)

    @property
    def source(self) -> str:
        """For people and records."""
        if self.uid is not None:
            return f"unix:uid={self.uid}"
        if self.forwarded:
            return f"{self.address} by a proxy"
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    @property
    def host(self) -> str:
        """What delays and limits are counted under."""
        if self.uid is not None:
            return f"uid-{self.uid}"
        try:
            address = ipaddress.ip_address(self.address.partition("%")[0])
        except ValueError:
            return self.address
        if isinstance(address, ipaddress.IPv6Address):
            if address.ipv4_mapped:
                return str(address.ipv4_mapped)
            if not address.is_loopback:
                return str(ipaddress.ip_network((address, 64), strict=False))
        return str(address)


def is_loopback(host: str) -> bool:
    """Whether only this machine can be ``host`` or reach a listener on it. Names other than localhost are not looked up."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


class Proxies:
    """Reverse proxies that are believed when they say for whom they ask (``api.trusted_proxies``), and nobody else is.

    Of ``X-Forwarded-For`` only what trusted proxies have added counts: from its end, past those, the first address. What stands
    before it, anybody may have written. ``Forwarded`` (RFC 7239) is not read: a proxy that adds to one of the two passes the
    other on as a client wrote it.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._trusted = [ipaddress.ip_network(text) for text in trusted]

    def _trusts(self, text: str) -> bool:
        address = ipaddress.ip_address(text.partition("%")[0])
        plain = getattr(address, "ipv4_mapped", None) or address
        return any(plain in network for network in self._trusted)

    def asking(self, peer: Peer, forwarded_for: Iterable[str]) -> Peer:
        """Who asks by the connection of ``peer``. Raises ``BadRequest`` where a trusted proxy says what is no address."""
        said = [word.strip() for line in forwarded_for for word in line.split(",")]
        if not self._trusted or not said or peer.uid is not None or not self._trusts(peer.address):
            return peer
        for word in reversed(said):
            try:
                found = Peer(str(ipaddress.ip_address(word)), forwarded=True)
            except ValueError:
                raise BadRequest(f"X-Forwarded-For of a trusted proxy has {word[:60]!r}, which is no address") from None
            if not self._trusts(found.address):
                break
        return found


def check_loopback(host: str, what: str) -> None:
    """For what asks nobody for a token. Raises ``NotAllowed`` for anything but loopback (P7)."""
    if not is_loopback(host):
        text = f"{what} may not listen on {host or 'every address'}: it asks nobody for a token, so only loopback is allowed"
        raise NotAllowed(f"{text}; from another machine use `ssh -L`", host=host)


def identities(certificate: Mapping[str, Any]) -> tuple[str, ...]:
    """Names in what ``getpeercert`` gives: the alternative names, or the common name where there are none (RFC 6125, 6.4.4)."""
    names = [str(value) for kind, value in certificate.get("subjectAltName", ()) if kind in ("DNS", "URI", "email")]
    if not names:
        parts = [pair for part in certificate.get("subject", ()) for pair in part]
        names = [str(value) for key, value in parts if key == "commonName"]
    return tuple(names)


class Book(Protocol):
    """Where credentials and the audit log are kept: ``jobs.journal.Journal``. Reading blocks; writing gives a ``Future``."""

    def credentials(self) -> list[Credential]: ...
    def put_credential(self, credential: Credential) -> Future[None]: ...
    def drop_credential(self, name: str) -> Future[None]: ...
    def note_audit(self, entry: AuditEntry) -> Future[None]: ...
    def audit(self, limit: int) -> list[AuditEntry]: ...


@dataclass(slots=True)
class _Trouble:
    """What an address has cost itself. ``until``: monotonic time before which no login of it is answered."""

    failures: int = 0
    until: float = 0.0
    waiting: int = 0


@dataclass(frozen=True, slots=True)
class Clock:
    utc: Callable[[], float] = time.time
    monotonic: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


class Authority:
    """See the module docstring. Without a ``book`` there are no credentials: loopback and Unix socket only."""

    def __init__(self, settings: Auth | None = None, book: Book | None = None, clock: Clock | None = None) -> None:
        self._settings, self._book, self._clock = settings or Auth(), book, clock or Clock()
        self._by_key: dict[str, Credential] = {c.key: c for c in (book.credentials() if book else ())}
        self._trouble: OrderedDict[str, _Trouble] = OrderedDict()
        self._seen: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._admins = {0, *_uids(self._settings.admins)}
        self._noted: Future[None] | None = None
        self._changing = asyncio.Lock()  # Credentials are made and revoked one after the other: names are taken once.
        self.on_failure: Callable[[], None] = lambda: None

    # --- who is it ------------------------------------------------------------------------------------------------

    def known(self, peer: Peer) -> Principal:
        """Who ``peer`` is before anything was said. Beyond loopback: whoever its certificate says, or nobody."""
        for identity in peer.identities:
            found = self._by_key.get(_certificate_key(identity))
            if found is not None and self._alive(found):
                return _principal(found, peer)
        if peer.uid is not None:
            scopes = list(Scope) if peer.uid in self._admins else _scopes(self._settings.socket)
            return Principal(f"uid-{peer.uid}", peer.source, _implied(scopes))
        if peer.local:
            return Principal("local", peer.source, _implied(_scopes(self._settings.loopback)))
        return Principal(f"at-{peer.host}", peer.source)

    async def login(self, peer: Peer, token: str) -> Principal:
        """Whose token this is. Raises ``WrongToken``, and ``TooMany`` when its address has too many logins waiting.

        An address with wrong tokens behind it waits first, also with the right one: so that guessing in parallel gains nothing.
        """
        await self._wait_turn(peer)
        found = self._by_key.get(_token_key(token)) if TOKEN.fullmatch(token) else None
        if found is not None and self._alive(found):
            self._trouble.pop(peer.host, None)
            principal = _principal(found, peer)
            if self._is_news(found.key, peer.host):
                self.note(principal, "login", result="ok")
            return principal
        await self._failed(peer, f"expired: {found.name}" if found is not None else "")
        raise WrongToken("this token is not known here" if found is None else f"token {found.name} has expired")

    def valid(self, principal: Principal) -> bool:
        """Whether what ``principal`` showed still counts: a revoked or expired credential ends open connections, too."""
        if principal.grant is None:
            return True
        # The same one, not one of the same name: a stolen token must not come back to life with its successor.
        return self._by_key.get(principal.grant.key) is principal.grant and self._alive(principal.grant)

    def _alive(self, credential: Credential) -> bool:
        return not credential.expires or self._clock.utc() < credential.expires

    def _is_news(self, key: str, host: str) -> bool:
        """A script, or a proxy that opens a connection for each request, logs in each second; what it does is noted anyway."""
        now, before = self._clock.monotonic(), self._seen.pop((key, host), None)
        news = before is None or now - before >= SEEN_S
        self._seen[key, host] = now if before is None or news else before
        if len(self._seen) > ADDRESSES_LIMIT:
            self._seen.popitem(last=False)
        return news

    async def _wait_turn(self, peer: Peer) -> None:
        trouble = self._trouble.get(peer.host)
        if trouble is None:
            return
        if trouble.waiting >= WAITING_LIMIT:
            raise TooMany(f"{trouble.waiting} logins of {peer.host} wait already", limit=WAITING_LIMIT)
        trouble.waiting += 1
        try:
            # One after the other: each that waited may have failed and moved the time for the next.
            while (left := trouble.until - self._clock.monotonic()) > 0:
                await self._clock.sleep(left)
        finally:
            trouble.waiting -= 1

    async def _failed(self, peer: Peer, detail: str) -> None:
        now = self._clock.monotonic()
        for host, old in list(self._trouble.items()):
            if old.until + FORGET_S >= now and len(self._trouble) < ADDRESSES_LIMIT:
                break
            if not old.waiting:
                del self._trouble[host]
        trouble = self._trouble.setdefault(peer.host, _Trouble())
        self._trouble.move_to_end(peer.host)
        trouble.failures += 1
        delay = min(FIRST_DELAY_S * 2.0 ** min(trouble.failures - 1, 30), LONGEST_DELAY_S)
        trouble.until = max(trouble.until, now) + delay
        self.on_failure()
        # A flood of wrong tokens must fill neither the log nor the card: the 1st, 2nd, 4th, 8th ... of an address is noted.
        if trouble.failures & (trouble.failures - 1) == 0:
            nobody = Principal("", peer.source)
            self.note(nobody, "login", result="BAD_TOKEN", detail=f"{trouble.failures} of this address; {detail}".rstrip("; "))
        await self._clock.sleep(delay)

    # --- credentials ----------------------------------------------------------------------------------------------

    def credentials(self) -> list[Credential]:
        return sorted(self._by_key.values(), key=lambda c: c.name)

    async def grant(
        self,
        name: str,
        scopes: Iterable[Scope],
        targets: Iterable[str] = (),
        *,
        lifetime_s: float = 0.0,
        certificate: str = "",
        by: str = "",
    ) -> tuple[Credential, str]:
        """A new credential, in force when this returns, and its token (empty for a certificate); nobody sees that again."""
        if self._book is None:
            raise NotAllowed("no credentials can be kept here")
        if not NAME.fullmatch(name):
            raise BadRequest(f"a credential's name has 1 to 32 of A-Z a-z 0-9 _ . -, not {name[:64]!r}")
        if not (wanted := sorted(set(scopes))):
            raise BadRequest("a credential needs a scope: read, flash, console or admin")
        if not 0 <= lifetime_s <= LIFETIME_LIMIT_S:
            raise BadRequest(f"a credential lives for at most {LIFETIME_LIMIT_S / 86400:.0f} days", limit_s=LIFETIME_LIMIT_S)
        token = "" if certificate else TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        key = _certificate_key(certificate) if certificate else _token_key(token)
        async with self._changing:
            if any(c.name == name for c in self._by_key.values()) or key in self._by_key:
                raise BadRequest(f"there is a credential {certificate or name} already; revoke it first")
            if len(self._by_key) >= CREDENTIALS_LIMIT:
                raise TooMany(f"there are {CREDENTIALS_LIMIT} credentials already", limit=CREDENTIALS_LIMIT)
            now = self._clock.utc()
            expires = now + lifetime_s if lifetime_s else 0.0
            made = Credential(name, key, ",".join(wanted), ",".join(sorted(set(targets))), now, expires, by)
            await asyncio.wrap_future(self._book.put_credential(made))
            self._by_key[key] = made
        return made, token

    async def revoke(self, name: str) -> Credential:
        """Raises ``UnknownCredential``."""
        async with self._changing:
            found = next((c for c in self._by_key.values() if c.name == name), None)
            if found is None or self._book is None:
                raise UnknownCredential(f"there is no credential {name[:64]!r}", name=name[:64])
            # In memory first: from here on it opens nothing, even if the disk does not answer.
            self._by_key.pop(found.key, None)
            await asyncio.wrap_future(self._book.drop_credential(name))
        return found

    # --- the audit log --------------------------------------------------------------------------------------------

    def note(self, who: Principal, what: str, *, target: str = "", job: str = "", result: str = "ok", detail: str = "") -> None:
        """Who did what from where, and what came of it: in the log at once, in the journal with its next commit."""
        entry = AuditEntry(self._clock.utc(), who.name, who.source, what, target, job, result, detail[:200])
        words = [f"{key}={value}" for key, value in (("target", target), ("job", job)) if value]
        text = " ".join([f"{who.name or 'nobody'} from {who.source}: {what}", *words, result])
        fields = note(audit=what, who=who.name or "nobody", source=who.source, target=target, job=job, result=result)
        log.info("audit: %s%s", text, f" ({entry.detail!a})" if entry.detail else "", extra=fields)
        if self._book is not None:
            self._noted = self._book.note_audit(entry)
            self._noted.add_done_callback(_written)

    async def audit(self, limit: int) -> list[AuditEntry]:
        """Newest first, with everything that was noted until now."""
        if self._book is None:
            return []
        if self._noted is not None:
            await asyncio.wrap_future(self._noted)
        return await asyncio.to_thread(self._book.audit, limit)


def _written(future: Future[None]) -> None:
    """A disk that is full has its own complaint elsewhere; the log has the entry already."""
    error = None if future.cancelled() else future.exception()
    if error is not None and not isinstance(error, BridgedError):
        log.error("the audit log cannot be written: %s", error)


def _principal(credential: Credential, peer: Peer) -> Principal:
    kind = "cert" if credential.key.startswith("cert:") else "token"
    targets = frozenset(credential.targets.split(",")) if credential.targets else None
    scopes = _implied(_scopes(credential.scopes.split(",")))
    return Principal(f"{kind}-{credential.name}", peer.source, scopes, targets, credential.name, credential)


def _implied(scopes: Iterable[Scope]) -> frozenset[Scope]:
    return frozenset[Scope]().union(*(IMPLIED[scope] for scope in scopes))


def _scopes(words: Iterable[str]) -> list[Scope]:
    return [Scope(word) for word in words if word in set(Scope)]


def _token_key(token: str) -> str:
    # No salt and no slow hash: 256 random bits cannot be guessed, and equal tokens do not exist.
    return "sha256:" + hashlib.sha256(token.encode()).hexdigest()


def _certificate_key(identity: str) -> str:
    return f"cert:{identity}"


def _uids(names: Iterable[str]) -> set[int]:
    found = set()
    for name in names:
        try:
            found.add(int(name) if name.isdigit() else pwd.getpwnam(name).pw_uid)
        except KeyError:
            log.warning("auth.admins: there is no user %r on this machine", name)
    return found
