"""Who may do what: tokens, delays, scopes, targets, and what is written down. Time is a value here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bridged.api.auth import (
    ADDRESSES_LIMIT,
    FIRST_DELAY_S,
    LONGEST_DELAY_S,
    TOKEN,
    WAITING_LIMIT,
    Authority,
    Clock,
    Peer,
    Principal,
    Proxies,
    identities,
    is_loopback,
)
from bridged.config import Auth
from bridged.config.values import SCOPES
from bridged.errors import BadRequest, LoginFirst, NotAllowed, TooMany, UnknownCredential, WrongToken
from bridged.jobs.journal import AUDIT_LIMIT, Journal
from bridged.jobs.records import AuditEntry
from bridged.protocol.verbs import Scope

REMOTE = Peer("192.0.2.7", 40000)
OTHER = Peer("192.0.2.8", 40000)
LOCAL = Peer("127.0.0.1", 40000)
WRONG = "bridged_" + "A" * 43


@dataclass
class Time:
    """A clock that jumps to the next one who waits, once nobody has anything else to do."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)
    _waiting: list[tuple[float, asyncio.Event]] = field(default_factory=list)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        wake = asyncio.Event()
        self._waiting.append((self.now + seconds, wake))
        asyncio.get_running_loop().call_soon(self._jump)
        await wake.wait()

    def _jump(self) -> None:
        if self._waiting:
            first = min(self._waiting, key=lambda item: item[0])
            self._waiting.remove(first)
            self.now = max(self.now, first[0])
            first[1].set()

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.now, lambda: self.now, self.sleep)


Check = Callable[[Authority, Time], Coroutine[Any, Any, None]]


def check(root: Path, body: Check, settings: Auth | None = None) -> None:
    journal = Journal.open(root / "state.db")
    try:
        time = Time()
        asyncio.run(asyncio.wait_for(body(Authority(settings, journal, time.clock), time), 30))
    finally:
        journal.close()


def test_beyond_loopback_nobody_may_anything_whatever_is_configured() -> None:
    open_house = Authority(Auth(loopback=list(SCOPES), socket=list(SCOPES), admins=["root"]))
    for address in ("192.0.2.7", "10.0.0.1", "::ffff:192.0.2.7", "2001:db8::1", "fe80::1%eth0", "0.0.0.0", "localhost.evil"):
        principal = open_house.known(Peer(address, 1))
        assert not principal.known
        for scope in Scope:
            assert not principal.may(scope)
            with pytest.raises(LoginFirst):
                principal.require(scope)


def test_loopback_and_the_unix_socket_may_what_is_configured() -> None:
    standard = Authority()
    assert standard.known(LOCAL).scopes == {Scope.READ, Scope.FLASH, Scope.CONSOLE}
    assert standard.known(Peer(uid=1000)).scopes == {Scope.READ, Scope.FLASH, Scope.CONSOLE}
    assert standard.known(Peer(uid=0)).scopes == set(Scope)
    closed = Authority(Auth(loopback=[], socket=["read"], admins=["4711"]))
    assert not closed.known(LOCAL).known
    assert closed.known(Peer(uid=1000)).scopes == {Scope.READ}
    assert closed.known(Peer(uid=4711)).scopes == set(Scope)


def test_a_scope_and_a_target_are_both_needed() -> None:
    one = Principal("token-a", "x", frozenset({Scope.FLASH, Scope.READ}), frozenset({"m1"}))
    assert one.may(Scope.FLASH, "m1")
    assert not one.may(Scope.FLASH, "m2")
    assert not one.may(Scope.ADMIN)
    with pytest.raises(NotAllowed, match="no right to target m2"):
        one.require(Scope.FLASH, "m2")
    with pytest.raises(NotAllowed, match="needs scope console"):
        one.require(Scope.CONSOLE, "m1", "CONSOLE")


def test_a_token_opens_until_it_is_revoked_and_only_its_digest_is_kept(tmp_path: Path) -> None:
    async def body(authority: Authority, _time: Time) -> None:
        made, token = await authority.grant("ci", [Scope.FLASH], ["m1"], by="uid-0")
        assert TOKEN.fullmatch(token)
        principal = await authority.login(REMOTE, token)
        assert principal.name == "token-ci"
        assert principal.may(Scope.READ, "m1")
        assert not principal.may(Scope.READ, "m2")
        assert authority.valid(principal)
        assert token not in repr(made)
        again = Authority(Auth(), authority._book)  # A restart.
        assert (await again.login(REMOTE, token)).scopes == principal.scopes
        await authority.revoke("ci")
        assert not authority.valid(principal)
        with pytest.raises(WrongToken):
            await authority.login(REMOTE, token)
        with pytest.raises(UnknownCredential):
            await authority.revoke("ci")
        assert Authority(Auth(), authority._book).credentials() == []

    check(tmp_path, body)


def test_a_successor_of_the_same_name_does_not_revive_a_revoked_credential(tmp_path: Path) -> None:
    async def body(authority: Authority, _time: Time) -> None:
        _, stolen = await authority.grant("ci", [Scope.ADMIN])
        thief = await authority.login(REMOTE, stolen)
        await authority.grant("node", [Scope.ADMIN], certificate="node.example")
        node = authority.known(Peer("192.0.2.7", 1, identities=("node.example",)))
        for name, certificate in (("ci", ""), ("node", "node.example")):
            await authority.revoke(name)
            await authority.grant(name, [Scope.READ], certificate=certificate)
        assert not authority.valid(thief)
        assert not authority.valid(node)
        assert authority.valid(authority.known(Peer("192.0.2.7", 1, identities=("node.example",))))

    check(tmp_path, body)


def test_of_two_credentials_of_one_name_at_once_one_is_made(tmp_path: Path) -> None:
    """Of two, revoking would find one."""

    async def body(authority: Authority, _time: Time) -> None:
        made = await asyncio.gather(*(authority.grant("ci", [Scope.READ]) for _ in range(3)), return_exceptions=True)
        assert [type(found) for found in made].count(BadRequest) == 2
        assert [one.name for one in authority.credentials()] == ["ci"]

    check(tmp_path, body)


def test_tokens_differ_and_have_256_bits(tmp_path: Path) -> None:
    async def body(authority: Authority, _time: Time) -> None:
        tokens = {(await authority.grant(f"t{n}", [Scope.READ]))[1] for n in range(20)}
        assert len(tokens) == 20
        assert all(len(token.removeprefix("bridged_")) * 6 >= 256 for token in tokens)

    check(tmp_path, body)


def test_an_expired_token_ends_open_connections_too(tmp_path: Path) -> None:
    async def body(authority: Authority, time: Time) -> None:
        _, token = await authority.grant("short", [Scope.READ], lifetime_s=60)
        principal = await authority.login(REMOTE, token)
        time.now += 59.9
        assert authority.valid(principal)
        time.now += 0.2
        assert not authority.valid(principal)
        with pytest.raises(WrongToken, match="has expired"):
            await authority.login(REMOTE, token)

    check(tmp_path, body)


def test_wrong_tokens_cost_their_address_time_and_nobody_else(tmp_path: Path) -> None:
    async def body(authority: Authority, time: Time) -> None:
        _, token = await authority.grant("ci", [Scope.READ])
        costs = []
        for _ in range(8):
            before = time.now
            with pytest.raises(WrongToken):
                await authority.login(REMOTE, WRONG)
            costs.append(time.now - before)
        assert costs == [min(FIRST_DELAY_S * 2**n, LONGEST_DELAY_S) for n in range(8)]
        before = time.now
        await authority.login(OTHER, token)
        assert time.now == before, "another address had to wait"
        await authority.login(REMOTE, token)  # Its own address has waited, and starts anew.
        with pytest.raises(WrongToken):
            await authority.login(REMOTE, WRONG)
        assert time.slept[-1] == FIRST_DELAY_S

    check(tmp_path, body)


def test_guessing_in_parallel_gains_nothing(tmp_path: Path) -> None:
    async def body(authority: Authority, time: Time) -> None:
        with pytest.raises(WrongToken):
            await authority.login(REMOTE, WRONG)
        begun = time.now
        results = await asyncio.gather(*(authority.login(REMOTE, WRONG) for _ in range(WAITING_LIMIT)), return_exceptions=True)
        assert all(isinstance(result, WrongToken | TooMany) for result in results)
        tried = sum(isinstance(result, WrongToken) for result in results)
        least = sum(min(FIRST_DELAY_S * 2 ** (n + 1), LONGEST_DELAY_S) for n in range(tried))
        assert time.now - begun >= least - 1e-9

    check(tmp_path, body)


def test_logins_that_wait_are_bounded(tmp_path: Path) -> None:
    async def body(authority: Authority, time: Time) -> None:
        for _ in range(5):
            with pytest.raises(WrongToken):
                await authority.login(REMOTE, WRONG)
        authority._trouble[REMOTE.host].until = time.now + 5
        many = [asyncio.ensure_future(authority.login(REMOTE, WRONG)) for _ in range(WAITING_LIMIT + 20)]
        results = await asyncio.gather(*many, return_exceptions=True)
        assert sum(isinstance(result, TooMany) for result in results) == 20

    check(tmp_path, body)


def test_an_ipv6_host_is_its_network_and_a_mapped_one_its_ipv4() -> None:
    assert Peer("2001:db8::1", 1).host == Peer("2001:db8::2", 1).host == "2001:db8::/64"
    assert Peer("2001:db8:0:1::1", 1).host != Peer("2001:db8::1", 1).host
    assert Peer("::ffff:192.0.2.7", 1).host == "192.0.2.7"
    assert is_loopback("::ffff:127.0.0.1")
    assert not is_loopback("::ffff:192.0.2.7")


def test_what_is_remembered_of_wrong_tokens_is_bounded(tmp_path: Path) -> None:
    async def body(authority: Authority, _time: Time) -> None:
        for n in range(ADDRESSES_LIMIT + 50):
            with pytest.raises(WrongToken):
                await authority.login(Peer(f"10.{n >> 16 & 255}.{n >> 8 & 255}.{n & 255}", 1), WRONG)
        assert len(authority._trouble) <= ADDRESSES_LIMIT

    check(tmp_path, body)


@pytest.mark.parametrize(
    ("name", "scopes", "more", "wrong"),
    [
        ("", [Scope.READ], {}, "a credential's name"),
        ("../x", [Scope.READ], {}, "a credential's name"),
        ("x" * 33, [Scope.READ], {}, "a credential's name"),
        ("x", [], {}, "needs a scope"),
        ("x", [Scope.READ], {"lifetime_s": -1.0}, "lives for at most"),
        ("x", [Scope.READ], {"lifetime_s": 1e12}, "lives for at most"),
        ("taken", [Scope.READ], {}, "already"),
    ],
)
def test_a_credential_that_cannot_be(tmp_path: Path, name: str, scopes: list[Scope], more: dict[str, Any], wrong: str) -> None:
    async def body(authority: Authority, _time: Time) -> None:
        await authority.grant("taken", [Scope.READ])
        with pytest.raises(BadRequest, match=wrong):
            await authority.grant(name, scopes, **more)
        assert [c.name for c in authority.credentials()] == ["taken"]

    check(tmp_path, body)


def test_a_certificate_is_a_principal_like_a_token(tmp_path: Path) -> None:
    async def body(authority: Authority, _time: Time) -> None:
        peer = Peer("192.0.2.7", 1, identities=("ci.example.org",))
        assert not authority.known(peer).known
        _, token = await authority.grant("ci", [Scope.FLASH], ["m1"], certificate="ci.example.org")
        assert token == ""
        principal = authority.known(peer)
        assert principal.name == "cert-ci"
        assert principal.may(Scope.FLASH, "m1")
        assert not principal.may(Scope.FLASH, "m2")
        assert not authority.known(Peer("192.0.2.7", 1, identities=("evil.example.org",))).known
        with pytest.raises(WrongToken):  # What is known of a certificate is public; it is no token.
            await authority.login(REMOTE, "cert:ci.example.org")
        await authority.revoke("ci")
        assert not authority.valid(principal)

    check(tmp_path, body)


def test_the_common_name_counts_only_without_alternative_names() -> None:
    subject = ((("organizationName", "x"),), (("commonName", "boss"),))
    assert identities({"subject": subject}) == ("boss",)
    assert identities({"subject": subject, "subjectAltName": (("DNS", "a.example"), ("URI", "urn:b"))}) == (
        "a.example",
        "urn:b",
    )
    assert identities({}) == ()


def test_the_audit_log_says_who_from_where_what_and_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "bridged.audit")

    async def body(authority: Authority, _time: Time) -> None:
        _, token = await authority.grant("ci", [Scope.FLASH])
        who = await authority.login(REMOTE, token)
        authority.note(who, "flash", target="m1", job="abc", result="queued")
        with pytest.raises(WrongToken):
            await authority.login(OTHER, WRONG)
        entries = await authority.audit(10)
        assert [(e.who, e.source, e.what, e.target, e.job, e.result) for e in entries] == [
            ("", "192.0.2.8:40000", "login", "", "", "BAD_TOKEN"),
            ("token-ci", "192.0.2.7:40000", "flash", "m1", "abc", "queued"),
            ("token-ci", "192.0.2.7:40000", "login", "", "", "ok"),
        ]
        assert "audit: token-ci from 192.0.2.7:40000: flash target=m1 job=abc queued" in caplog.text
        told = [record.bridged for record in caplog.records]  # type: ignore[attr-defined]
        assert {"BRIDGED_AUDIT": "login", "BRIDGED_WHO": "nobody", "BRIDGED_SOURCE": "192.0.2.8:40000"}.items() <= told[
            -1
        ].items()
        assert {"BRIDGED_AUDIT": "flash", "BRIDGED_JOB": "abc", "BRIDGED_RESULT": "queued"}.items() <= told[-2].items()
        assert token not in caplog.text + str(told)
        assert WRONG not in caplog.text + str(told)

    check(tmp_path, body)
    on_disk = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"token-ci" in on_disk
    assert b"bridged_" not in on_disk


def test_who_logs_in_each_second_is_noted_now_and_then(tmp_path: Path) -> None:
    async def body(authority: Authority, time: Time) -> None:
        tokens = [(await authority.grant(name, [Scope.READ]))[1] for name in ("one", "two")]
        for _ in range(2000):
            time.now += 1.0
            for token in tokens:
                await authority.login(REMOTE, token)
        assert len(await authority.audit(100)) == 2 * 4
        await authority.login(OTHER, tokens[0])
        assert (await authority.audit(1))[0].source == OTHER.source, "from elsewhere it is news"

    check(tmp_path, body)


TRUSTED = ("127.0.0.1", "10.1.0.0/16", "fd00::/64")


@pytest.mark.parametrize(
    ("address", "said", "asks"),
    [
        ("127.0.0.1", [], "127.0.0.1"),  # Somebody at the gateway itself.
        ("192.0.2.7", ["198.51.100.1"], "192.0.2.7"),  # No proxy of ours: what it says is nothing.
        ("127.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("127.0.0.1", ["127.0.0.1, 203.0.113.9, 198.51.100.1"], "198.51.100.1"),  # What stands before may be invented.
        ("127.0.0.1", ["203.0.113.9", "198.51.100.1"], "198.51.100.1"),
        ("10.1.2.3", ["203.0.113.9,198.51.100.1,10.1.9.9"], "198.51.100.1"),
        ("::ffff:10.1.2.3", ["198.51.100.1"], "198.51.100.1"),
        ("fd00::5", ["2001:db8::1"], "2001:db8::1"),
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
    ],
)
def test_who_asks_by_a_proxy_is_whom_it_has_added(address: str, said: list[str], asks: str) -> None:
    proxied = Peer(address, 5, identities=("proxy.example",))
    found = Proxies(TRUSTED).asking(proxied, said)
    assert found.address == asks
    if found is not proxied:
        assert found.forwarded
        who = Authority(Auth(loopback=["admin"])).known(found)
        assert not who.known, "not even where it says that it is this machine"
        assert found.identities == ()
    assert Proxies().asking(proxied, said) is proxied, "nobody is trusted unless configured"


def test_a_trusted_proxy_that_says_nonsense_gets_nobody_in() -> None:
    for said in ("unknown", "", "198.51.100.1, ", "_hidden", "198.51.100.1:80"):
        with pytest.raises(BadRequest, match="X-Forwarded-For of a trusted proxy"):
            Proxies(TRUSTED).asking(Peer("127.0.0.1", 5), [said])


def test_a_flood_of_wrong_tokens_fills_no_log(tmp_path: Path) -> None:
    async def body(authority: Authority, _time: Time) -> None:
        for _ in range(40):
            with pytest.raises(WrongToken):
                await authority.login(OTHER, WRONG)
        assert len(await authority.audit(100)) == 6  # the 1st, 2nd, 4th, 8th, 16th, 32nd

    check(tmp_path, body)


def test_failed_logins_and_those_who_come_and_go_cannot_push_out_what_others_did(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "state.db")
    try:
        journal.note_audit(AuditEntry(1.0, "token-ci", "x", "flash"))
        crowds = [("", "login"), ("token-b", "login"), ("local", "console end")]
        written: list[Future[None]] = [
            journal.note_audit(AuditEntry(2.0, who, "y", what)) for n in range(AUDIT_LIMIT + 199) for who, what in crowds
        ]
        written[-1].result(60)
        found = journal.audit(10 * AUDIT_LIMIT)
        assert [entry.who for entry in found if entry.what == "flash"] == ["token-ci"]
        assert sum(not entry.who for entry in found) <= AUDIT_LIMIT + 100
        assert sum(bool(entry.who) for entry in found) <= AUDIT_LIMIT + 101, "those who come and go have one room"
    finally:
        journal.close()
