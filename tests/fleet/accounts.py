"""What ``nsc`` makes, made here: an operator, its account with JetStream, and users of it, as JWTs signed by nkeys."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

OPERATOR, ACCOUNT, USER, SEED = 14 << 3, 0, 20 << 3, 18 << 3
UNLIMITED = {name: -1 for name in ("subs", "data", "payload", "imports", "exports", "conn", "leaf")}
STORAGE = {name: -1 for name in ("mem_storage", "disk_storage", "streams", "consumer")}


def _text(raw: bytes) -> str:
    return base64.b32encode(raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")).decode().rstrip("=")


@dataclass
class Key:
    kind: int
    _key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)

    @property
    def public(self) -> str:
        return _text(bytes((self.kind,)) + self._key.public_key().public_bytes_raw())

    @property
    def seed(self) -> str:
        return _text(bytes((SEED | self.kind >> 5, (self.kind & 31) << 3)) + self._key.private_bytes_raw())

    def issue(self, name: str, subject: str, claims: Mapping[str, Any]) -> str:
        def encoded(data: bytes) -> str:
            return base64.urlsafe_b64encode(data).decode().rstrip("=")

        body: dict[str, Any] = {"iat": 1_700_000_000, "iss": self.public, "name": name, "sub": subject}
        body["nats"] = {"version": 2, **claims}
        body["jti"] = base64.b32encode(hashlib.sha256(json.dumps(body).encode()).digest()).decode().rstrip("=")
        head = json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode()
        text = f"{encoded(head)}.{encoded(json.dumps(body).encode())}"
        return f"{text}.{encoded(self._key.sign(text.encode()))}"


class Accounts:
    """``extra``: what goes into the broker's configuration."""

    def __init__(self) -> None:
        operator, self.account, system = Key(OPERATOR), Key(ACCOUNT), Key(ACCOUNT)
        claims = {"type": "operator", "system_account": system.public}
        itself = operator.issue("op", operator.public, claims)
        limits = {**UNLIMITED, "wildcards": True}
        fleet = operator.issue("FLEET", self.account.public, {"type": "account", "limits": limits | STORAGE})
        own = operator.issue("SYS", system.public, {"type": "account", "limits": limits})
        self.extra = (
            f"operator: {itself}\nsystem_account: {system.public}\nresolver: MEMORY\n"
            f"resolver_preload: {{ {self.account.public}: {fleet}, {system.public}: {own} }}"
        )

    def user(self, path: Path, rights: Mapping[str, list[str]], by: Key | None = None) -> Path:
        """A ``.creds`` file. ``by``: another account, whom the broker does not know."""
        user = Key(USER)
        claims = {"type": "user", "pub": {"allow": rights["publish"]}, "sub": {"allow": rights["subscribe"]}}
        claims |= {name: -1 for name in ("subs", "data", "payload")}  # type: ignore[misc]
        jwt = (by or self.account).issue(path.stem, user.public, claims)
        path.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )
        return path
